"""The gateway: LiteLLM, the one address that clients call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from corral.components import Stage, edge
from corral.config.client_names import all_aliases
from corral.config.inventory import Auto, Gateway, Pool, TokenLimits
from corral.contributions import (
    ConfigMount,
    Contribution,
    Contributions,
    Dashboard,
    Endpoint,
    File,
    Health,
    Port,
    Relabel,
    Route,
    Rules,
    ScrapeTarget,
    Secret,
    Service,
    Store,
    TraceReceiver,
)
from corral.gateway.frontends import gateway_publish_address
from corral.plan.routing import SECTIONS, chains, has_routing, tier_settings
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT = "litellm"
# Of LiteLLM and the balancer, who call each other.
NETWORK = "gateway"
IMAGE = "ghcr.io/berriai/litellm:v1.106.2"
MASTER_KEY = "LITELLM_MASTER_KEY"
SALT_KEY = "LITELLM_SALT_KEY"
METRICS_KEY = "LITELLM_METRICS_KEY"
FILES = {
    "corral_access.py": ("litellm/corral_access.py", "/etc/corral/corral_access.py"),
    "corral_gateway.py": ("litellm/corral_gateway.py", "/etc/corral/corral_gateway.py"),
    "corral_limits.py": ("litellm/corral_limits.py", "/etc/corral/corral_limits.py"),
    "corral_interfaces.py": ("litellm/corral_interfaces.py", "/etc/corral/corral_interfaces.py"),
    "start.sh": ("litellm/start.sh", "/etc/corral/start.sh"),
}
ROUTING_FILES = {"corral_routing.py": ("litellm/corral_routing.py", "/etc/corral/corral_routing.py")}
ROUTING = "/etc/corral/routing.yaml"
LIMITS = "/etc/corral/limits.yaml"
# Begins the variables with the keys of pools' servers: LiteLLM takes a provider's usual variable for any request.
CLOUD_KEY = "CORRAL_KEY_"
# How many times LiteLLM holds a body in memory while it works on it, at most.
BODY_COPIES = 6
# What LiteLLM takes before any request, with room for what grows.
OWN_MIB = 1100
# Callbacks beside the gateway's own, each on sites that have a route which needs it.
CALLBACKS: dict[str, Callable[[Route], bool]] = {
    "corral_adapters": lambda route: bool(route.adapters),
    "corral_cache": lambda route: bool(route.cache_field),
    "corral_groups": lambda route: route.has_siblings,
    "corral_ollama": lambda route: route.protocol == "ollama" and route.kind == "chat",
    "corral_thinking": lambda route: route.hides_thoughts,
}
# The callback of sites with tracing.
TRACES = "corral_traces"
CONFIG = "/etc/corral/config.yaml"
MODES = {"chat": "chat", "embedding": "embedding", "rerank": "rerank", "image": "image_generation"}
PROVIDERS = {
    ("openai", "image"): "hosted_vllm",  # `openai` refuses response_format and style for models it does not know
    ("openai", "rerank"): "hosted_vllm",
    ("ollama", "chat"): "ollama_chat",
    ("ollama", "embedding"): "ollama",
}
# What LiteLLM would otherwise drop or send elsewhere: bodies pass unchanged (B7), to chat/completions.
PASSED_ON: dict[str, dict[str, Any]] = {
    "chat": {"allowed_openai_params": ["user", "verbosity"], "use_chat_completions_api": True},
    "embedding": {"allowed_openai_params": ["user", "dimensions"]},
}
# LiteLLM would send `/v1/messages` with `thinking` to a server's `/v1/responses`, which it has only at OpenAI.
NO_RESPONSES = {"supports_reasoning": False}
# Set where the inventory has no price: LiteLLM would search its list for one, which takes 4 ms a request.
FREE = dict.fromkeys(
    ("input_cost_per_token", "output_cost_per_token", "cache_creation_input_token_cost", "cache_read_input_token_cost"),
    0.0,
)
# Upstream's own; since 1.94 its image keeps the database client's engine where every user can run it.
USER = "65532:65532"
CLOUD = "it calls cloud providers"
FAR = "it calls servers on other machines"
TRACED = "it sends traces to another machine"
EXTRA = "`gateway.extra` may name something on another machine"
# Where the program may write when its root is read-only: paths in the container, gone when it stops.
WRITABLE = {"HOME": "/tmp", "XDG_CACHE_HOME": "/tmp/cache", "LITELLM_MIGRATION_DIR": "/tmp/migrations"}  # noqa: S108
# Seconds; upstream's own have nothing between 10 and 30.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Labels of LiteLLM's figures that strangers choose, or that say nothing here.
UNBOUNDED_LABELS = ("client_ip", "end_user", "user_agent", "user_email", "org_id", "org_alias")
# Figures that rules and pages look at. LiteLLM would keep some seventy, with a series for every key and model.
METRICS = (
    "litellm_api_key_max_budget_metric",
    "litellm_api_key_rate_limit_allowed_metric",
    "litellm_api_key_rate_limit_used_metric",
    "litellm_callback_logging_failures_metric",
    "litellm_deployment_latency_per_output_token",
    "litellm_in_flight_requests",
    "litellm_input_cached_tokens_metric",
    "litellm_input_tokens_metric",
    "litellm_llm_api_time_to_first_token_metric",
    "litellm_output_tokens_metric",
    "litellm_overhead_latency_metric",
    "litellm_proxy_failed_requests_metric",
    "litellm_proxy_total_requests_metric",
    "litellm_remaining_api_key_budget_metric",
    "litellm_request_total_latency_metric",
    "litellm_spend_metric",
    "litellm_total_tokens_metric",
)
# Requests of which HAProxy has written a line; a second one of LiteLLM's costs more than all of HAProxy's work.
LOGGED_AT_THE_DOOR = (
    "/v1/chat/completions", "/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/rerank",
    "/v1/responses", "/health/liveliness",
)  # fmt: skip
# LiteLLM calls OpenAI's protocol as it does all others, not through OpenAI's library, which is more work.
#
# It also asks once more when a connection is reset. HAProxy resets none that it has taken a request on; a replica that
# dies does, so in `direct` LiteLLM goes on using the library.
DIRECT_CALLS = {"EXPERIMENTAL_OPENAI_BASE_LLM_HTTP_HANDLER": "true"}
# LiteLLM's pages about itself, where clients reach it without HAProxy; behind it they are on the operator's port.
NO_PAGES = {"NO_DOCS": "True", "NO_OPENAPI": "True", "NO_REDOC": "True"}
# How long LiteLLM keeps a connection without requests. HAProxy closes it first, within seconds.
IDLE_S = 120
# The gateway waits this much longer than queue and answer together may take, so that HAProxy decides.
SPARE_TIME_S = 60


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The gateway, its configuration, its keys and its figures."""
    host = site.inventory.gateway.host
    secrets = _needed_secrets(published)
    yield Secret(MASTER_KEY, host, "opens everything on the gateway; for the operator only", "sk")
    if published.stores:
        yield Secret(SALT_KEY, host, "encrypts what the gateway keeps in its database; never change it", "sk")
    yield File(
        host, COMPONENT, "config.yaml", data=configuration(site, published), extra=site.inventory.gateway.extra,
        note="pools and limits come from the plan; add your own settings through `gateway.extra`",
    )  # fmt: skip
    yield from (File(host, COMPONENT, name, asset=asset) for name, (asset, _) in _files(published).items())
    yield File(host, COMPONENT, "limits.yaml", data={"pools": limits(site, published)}, note="read by corral_limits.py")
    if has_routing(site.inventory):
        yield from (File(host, COMPONENT, name, asset=asset) for name, (asset, _) in ROUTING_FILES.items())
        yield File(host, COMPONENT, "routing.yaml", data=routing(site, published), note="read by corral_routing.py")
    yield _service(site, published, secrets)
    if _has_far_receiver(site, published):
        yield from edge.client_secrets(host, "gateway")
    yield from _scraped(site, published)


def _callbacks(published: Contributions) -> list[str]:
    needed = [name for name, is_needed in CALLBACKS.items() if any(map(is_needed, published.routes))]
    return [*needed, *([TRACES] if published.trace_receivers else [])]


def _files(published: Contributions) -> dict[str, tuple[str, str]]:
    """Files beside the configuration: the asset of each and its path in the container."""
    further = {f"{name}.py": (f"litellm/{name}.py", f"/etc/corral/{name}.py") for name in _callbacks(published)}
    return FILES | further


def _scraped(site: Site, published: Contributions) -> Iterator[Contribution]:
    gateway, monitoring = site.inventory.gateway, site.inventory.monitoring
    if monitoring is None:
        return
    key = METRICS_KEY if gateway.database else MASTER_KEY  # without a database LiteLLM knows only one key
    if key != MASTER_KEY:
        yield Secret(key, gateway.host, "opens the gateway's figures, for Prometheus", "sk")
    yield from (Rules(f"monitoring/rules/{name}.yml") for name in ("litellm", "objectives"))
    yield Dashboard("monitoring/dashboards/gateway.json")
    if gateway.database:
        yield Dashboard("monitoring/dashboards/keys.json")
    endpoint = own_endpoint(site, published)
    labels = {"host": gateway.host, "role": "gateway"}
    yield ScrapeTarget("litellm", endpoint, labels, "/metrics/", key, relabel=_relabel(published.routes))


def own_endpoint(site: Site, published: Contributions) -> Endpoint:
    """Where LiteLLM itself listens: behind the door, where there is one."""
    gateway = site.inventory.gateway
    return Endpoint(gateway.litellm_port if published.doors else gateway.port, gateway.host, COMPONENT)


def _relabel(routes: list[Route]) -> tuple[Relabel, ...]:
    """LiteLLM's own word for a deployment as everybody else calls its pool."""
    pools: dict[str, list[str]] = {}
    for route in routes:
        pools.setdefault(route.pool, []).append(route.name)
    return tuple(Relabel("model_id", tuple(names), "pool", pool) for pool, names in pools.items())


def _buckets(site: Site) -> list[float]:
    """Upper ends of the buckets in which times are counted; every objective is one of them."""
    monitoring = site.inventory.monitoring
    own = [pool.objective for pool in site.inventory.pools.values() if pool.objective]
    objectives = [*own, *([monitoring.objective] if monitoring else [])]
    ends = {float(end) for item in objectives for end in (item.first_token_s, item.answer_s)}
    return sorted({*BUCKETS, *ends})


def _server_keys(published: Contributions) -> tuple[str, ...]:
    """Names of the secrets with which LiteLLM calls pools' servers."""
    return tuple(sorted({route.secret for route in published.routes if route.secret}))


def _needed_secrets(published: Contributions) -> tuple[str, ...]:
    """Names of every other secret that LiteLLM takes from its environment."""
    named: tuple[Iterable[Store | TraceReceiver], ...] = (published.stores, published.trace_receivers)
    names = {item.secret for items in named for item in items if item.secret}
    return tuple(sorted(names | {MASTER_KEY} | ({SALT_KEY} if published.stores else set())))


def limits(site: Site, published: Contributions) -> dict[str, dict[str, int]]:
    """What one request may ask of each pool, as corral_limits.py reads it."""
    kinds = {route.pool: route.kind for route in published.routes}
    cloud = {route.pool for route in published.routes if route.protocol == "cloud"}
    return {pool: _request_limits(site, pool, kind, is_cloud=pool in cloud) for pool, kind in kinds.items()}


def _request_limits(site: Site, pool: str, kind: str, *, is_cloud: bool) -> dict[str, int]:
    own, common = site.inventory.pools[pool].request, site.inventory.gateway.request
    tokens = own.max_tokens or common.max_tokens or TokenLimits()
    choices = own.max_choices or common.max_choices or (None if is_cloud or kind == "image" else 1)
    found = {
        "choices": choices,
        "default_tokens": tokens.default or tokens.most,
        "message_kib": own.max_message_kib or common.max_message_kib,
        "messages": own.max_messages or common.max_messages,
        "text_kib": own.max_text_kib or common.max_text_kib,
        "tokens": tokens.most,
    }
    return {name: limit for name, limit in found.items() if limit is not None}


def large_bodies_at_once(gateway: Gateway) -> int:
    """How many of the longest requests LiteLLM's memory holds at the same time."""
    most_kib = max(gateway.max_body_kib, gateway.entrance.max_body_kib if gateway.entrance else 0)
    return max(1, (gateway.memory_mib - OWN_MIB) * 1024 // (BODY_COPIES * most_kib))


def configuration(site: Site, published: Contributions) -> dict[str, Any]:
    """LiteLLM's configuration. Every key is checked against LiteLLM's own code by tests/consumers."""
    gateway = site.inventory.gateway
    slots: Counter[str] = Counter()
    for route in published.routes:
        slots[route.pool] += route.slots
    caches = [store for store in published.stores if store.kind == "cache"]
    general: dict[str, Any] = {
        "master_key": f"os.environ/{MASTER_KEY}",
        "cancel_on_disconnect": True,
        "trusted_proxy_ranges": [],
    } | _cache(site, caches)
    if any(store.kind == "database" for store in published.stores):
        general |= {
            "database_url": "os.environ/DATABASE_URL",
            "database_connection_pool_limit": 10,
            "proxy_batch_write_at": 10,
        }
    if any(chains(site.inventory, section) for section in SECTIONS):
        general["enforce_fallback_model_access"] = True  # a key reaches nothing that it may not call itself
    deployments = [_deployment(site, route, slots[route.pool]) for route in published.routes]
    if gateway.auto is not None:
        deployments.append(_auto(gateway.auto, deployments))
    callbacks = ["corral_routing.corral_routing"] if has_routing(site.inventory) else []
    return {
        "model_list": deployments,
        "router_settings": _router(site),
        "litellm_settings": {
            "callbacks": [
                "corral_access.corral_access",  # before the pool is chosen: what the client named is what is checked
                *callbacks,
                "corral_limits.corral_limits",
                "corral_gateway.corral_gateway",
                "corral_interfaces.corral_interfaces",
                *(f"{name}.{name}" for name in _callbacks(published)),
                "prometheus",
            ],
            "disable_hf_tokenizer_download": True,  # it would stop all requests for as long as that takes
            "drop_params": False,
            "json_logs": True,
            "prometheus_exclude_labels": list(UNBOUNDED_LABELS),
            "prometheus_latency_buckets": _buckets(site),
            "prometheus_metrics_config": [{"group": "corral", "metrics": list(METRICS)}],
            "request_timeout": patience_s(site),
            "require_auth_for_metrics_endpoint": True,
            "use_chat_completions_url_for_anthropic_messages": True,  # by way of /v1/responses plain texts are lost
        },
        "general_settings": general | ({"store_prompts_in_spend_logs": False} if gateway.database else {}),
    }


def _auto(auto: Auto, deployments: list[dict[str, Any]]) -> dict[str, Any]:
    """The name `auto` as LiteLLM has to know it, for keys and lists; the callback puts a pool in its place."""
    easiest = next(item for item in deployments if item["model_name"] == auto.tiers[0].pool)
    return {
        "model_name": auto.name,
        "litellm_params": easiest["litellm_params"],
        "model_info": {"id": auto.name, "mode": "chat"},
    }


def routing(site: Site, published: Contributions) -> dict[str, Any]:
    """What the routing callback does."""
    auto = site.inventory.gateway.auto
    settings: dict[str, Any] = {}
    if auto is not None:
        tiers = [
            {"name": tier.name, "pool": tier.pool, "spill": list(tier.spill)}
            | {
                name: list(value) if name == "words" else value
                for name, value in tier_settings(tier).items()
                if value not in (None, ())
            }
            for tier in auto.tiers
        ]
        settings["auto"] = {"names": [auto.name, *auto.aliases], "tiers": tiers}
    if published.slot_figures:
        settings["slots_url"] = published.slot_figures[0].url
    has_queue = site.inventory.gateway.balancing != "direct"
    background = [name for pool in site.inventory.pools.values() for name in pool.background if has_queue]
    return settings | {
        "background": background,
        "fallbacks": chains(site.inventory, "fallback"),
        "has_context_fallbacks": bool(chains(site.inventory, "context_fallback")),
        "pools": {route.name: route.pool for route in published.routes},
    }


def patience_s(site: Site) -> int:
    """Seconds that the slowest pool may take from arrival to the last byte."""
    gateway = site.inventory.gateway
    longest = [
        (pool.queue or gateway.queue).timeout_s + (pool.timeout_s or gateway.timeout_s)
        for pool in site.inventory.pools.values()
    ]
    return max(longest) + SPARE_TIME_S


def _router(site: Site) -> dict[str, Any]:
    gateway = site.inventory.gateway
    aliases = all_aliases(site.inventory)
    longer = chains(site.inventory, "context_fallback")
    router: dict[str, Any] = {"num_retries": 0, "timeout": patience_s(site)}
    checks: list[str] = []
    if any(pool.limits.rpm or pool.limits.tpm for pool in site.inventory.pools.values()):
        checks.append("enforce_model_rate_limits")
    if gateway.balancing == "direct":
        router |= {
            "routing_strategy": "simple-shuffle",
            "num_retries": 2,  # each draws lots again, and may meet the same replica
            "allowed_fails": 2,
            "cooldown_time": 10,
            **_busy_is_no_failure(),
        }
    else:
        router |= {"routing_strategy": "least-busy", "disable_cooldowns": True}
    if gateway.balancing != "slots":  # there HAProxy knows which replica answered a conversation last
        checks.append("session_affinity")
        router["deployment_affinity_ttl_seconds"] = 1800
    return (
        router
        | ({"model_group_alias": aliases} if aliases else {})
        | ({"optional_pre_call_checks": checks} if checks else {})
        | ({"context_window_fallbacks": [{name: pools} for name, pools in longer.items()]} if longer else {})
    )


def _busy_is_no_failure() -> dict[str, Any]:
    """A refusal for lack of slots is neither retried nor counted against a replica."""
    return {
        "retry_policy": {"RateLimitErrorRetries": 0, "TimeoutErrorRetries": 0},
        "allowed_fails_policy": {"RateLimitErrorAllowedFails": 1_000_000, "TimeoutErrorAllowedFails": 1_000_000},
    }


def _cache(site: Site, caches: list[Store]) -> dict[str, Any]:
    if not caches:
        return {}
    address, _, port = site.address(caches[0].endpoint, site.inventory.gateway.host).rpartition(":")
    store = caches[0]
    login = {"username": store.user, "password": f"os.environ/{store.secret}"}
    return {"coordination_redis": {"host": address, "port": int(port), **login}}


def _deployment(site: Site, route: Route, pool_slots: int) -> dict[str, Any]:
    """One entry of LiteLLM's model list."""
    pool = site.inventory.pools[route.pool]
    params: dict[str, Any] = {"model": _model_name(route)}
    if route.url:
        params["api_base"] = route.url
    params |= {"api_key": f"os.environ/{CLOUD_KEY}{route.secret}" if route.secret else "none", "max_retries": 0}
    params |= _price(pool)
    if pool.timeout_s:
        params["timeout"] = pool.timeout_s + (pool.queue or site.inventory.gateway.queue).timeout_s
    if route.protocol == "openai":
        params |= PASSED_ON.get(route.kind, {})
    params |= {**route.parameters, **_cost(route)}
    info: dict[str, Any] = {"id": route.name, "mode": MODES[route.kind]}
    is_priced = pool.price is not None or route.cost is not None or route.protocol == "cloud"
    info |= FREE if route.kind in ("chat", "embedding") and not is_priced else {}
    info |= NO_RESPONSES if (route.protocol, route.kind) == ("openai", "chat") else {}
    info |= {"thinking": "hidden"} if route.hides_thoughts else {}
    info |= {"cache_field": route.cache_field} if route.cache_field else {}
    info |= {"adapters": dict(route.adapters)} if route.adapters else {}
    info |= _limits(pool, route.slots / pool_slots)
    return {"model_name": route.pool, "litellm_params": params, "model_info": info}


def _price(pool: Pool) -> dict[str, float]:
    """What a token costs, in US dollars; empty where LiteLLM's own figures hold."""
    if pool.price is None:
        return {}
    return {
        "input_cost_per_token": pool.price.input_usd_per_million / 1_000_000,
        "output_cost_per_token": pool.price.output_usd_per_million / 1_000_000,
    }


def _cost(route: Route) -> dict[str, Any]:
    """What LiteLLM counts spend with, and where it stops asking; it keeps the count in the cache."""
    if route.cost is None:
        return {}
    price = {"input_cost_per_token": route.cost.input_usd, "output_cost_per_token": route.cost.output_usd}
    if route.cost.budget_usd is None:
        return price
    return price | {"max_budget": route.cost.budget_usd, "budget_duration": route.cost.period}


def _model_name(route: Route) -> str:
    """LiteLLM's name of a model: the provider decides the protocol."""
    if route.protocol == "cloud":
        return route.upstream_model
    return f"{PROVIDERS.get((route.protocol, route.kind), 'openai')}/{route.upstream_model}"


def _limits(pool: Pool, share: float) -> dict[str, int]:
    """The pool's limits; where a pool has several deployments, each has its share by slots."""
    return {
        name: max(1, round(limit * share))
        for name, limit in (("rpm", pool.limits.rpm), ("tpm", pool.limits.tpm))
        if limit
    }


def _service(site: Site, published: Contributions, secrets: tuple[str, ...]) -> Service:
    gateway = site.inventory.gateway
    is_local = site.is_local(gateway.host)
    config = site.config_path(gateway.host, COMPONENT, "config.yaml", CONFIG)
    port = own_endpoint(site, published).port
    address = site.publish_address(gateway.host) if published.doors else gateway_publish_address(site)
    live = f"http://127.0.0.1:{port}/health/liveliness"
    stores = {store.endpoint.service for store in published.stores}
    return Service(
        host=gateway.host,
        component=COMPONENT,
        name=COMPONENT,
        role="gateway",
        image=site.image(COMPONENT, IMAGE),
        program="litellm",
        entrypoint=(
            "sh" if is_local else "/bin/sh",
            site.config_path(gateway.host, COMPONENT, "start.sh", FILES["start.sh"][1]),
        ),
        args=("--config", config, "--host", "127.0.0.1" if is_local else "0.0.0.0", "--port", str(port)),  # noqa: S104
        health=Health(
            port,
            "/health/liveliness",
            ("python3", "-c", f"import urllib.request as u; u.urlopen('{live}', timeout=3)"),
            180,
        ),
        memory_mib=gateway.memory_mib,
        environment={
            "CHECKPOINT_DISABLE": "1",
            "CORRAL_SECRETS": " ".join(secrets),
            "CORRAL_SERVER_KEYS": " ".join(_server_keys(published)),
            "CORRAL_SECRETS_DIR": site.secret_path(gateway.host, "").rstrip("/"),
            **({"CORRAL_UNKNOWN_MODEL": gateway.unknown_model} if gateway.unknown_model else {}),
            **({} if is_local else WRITABLE),
            **(_behind_a_door() if published.doors else NO_PAGES),
            **(DIRECT_CALLS if gateway.balancing != "direct" else {}),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
            "PROMETHEUS_DISABLE_CREATED_SERIES": "True",
            **_tracing(site, published),
        },
        secrets=tuple(sorted({*secrets, *_server_keys(published), *_certificates(site, published)})),
        ports=(Port(port, address, "LiteLLM's keys"),),
        configs=(
            ConfigMount("config.yaml", CONFIG),
            ConfigMount("limits.yaml", LIMITS),
            *(ConfigMount(name, target) for name, (_, target) in _files(published).items()),
            *(_routing_mounts() if has_routing(site.inventory) else ()),
        ),
        network=NETWORK,
        calls=tuple(_calls(published)),
        user=USER,
        cpu_weight=2048,
        pids=512,
        stop_grace_s=30,
        after=tuple((name, "service_healthy") for name in sorted(stores)),
        exceptions=_way_out(site, published),
    )


def _calls(published: Contributions) -> Iterator[Endpoint]:
    """Everything that the gateway calls: the balancer or else the servers, its stores, and who gets traces."""
    yield from (door.endpoint for door in published.doors)
    if not published.doors:
        yield from (backend.endpoint for backend in published.backends)
    yield from (store.endpoint for store in published.stores)
    yield from (receiver.endpoint for receiver in published.trace_receivers if receiver.endpoint)


def _behind_a_door() -> dict[str, str]:
    return {
        "KEEPALIVE_TIMEOUT": str(IDLE_S),
        "LITELLM_DISABLE_ACCESS_LOG_PATHS": ",".join(LOGGED_AT_THE_DOOR),
    }


def _has_far_receiver(site: Site, published: Contributions) -> bool:
    """Whether traces go to another host of the site."""
    here = site.inventory.gateway.host
    endpoints = (receiver.endpoint for receiver in published.trace_receivers)
    return any(endpoint is not None and site.is_behind_edge(endpoint, here) for endpoint in endpoints)


def _certificates(site: Site, published: Contributions) -> tuple[str, ...]:
    return (edge.AUTHORITY, edge.CLIENTS["gateway"]) if _has_far_receiver(site, published) else ()


def _edge_files(site: Site, published: Contributions) -> dict[str, str]:
    """Where the library that sends traces finds its certificate for another host's edge."""
    names = _certificates(site, published)
    if not names:
        return {}
    authority, own = (site.secret_path(site.inventory.gateway.host, name) for name in names)
    return {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": authority,
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": own,
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": own,
    }


def _tracing(site: Site, published: Contributions) -> dict[str, str]:
    """Settings of LiteLLM's OpenTelemetry callback, and of the library that sends for it."""
    tracing = site.inventory.tracing
    if tracing is None or not published.trace_receivers:
        return {}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": published.trace_receivers[0].url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        # Clients can talk LiteLLM out of `turn_off_message_logging` with a header, but not out of this.
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY" if tracing.prompts else "NO_CONTENT",
        "OTEL_SERVICE_NAME": site.inventory.name,
        **_edge_files(site, published),
    }


def _routing_mounts() -> Iterator[ConfigMount]:
    yield from (ConfigMount(name, target) for name, (_, target) in ROUTING_FILES.items())
    yield ConfigMount("routing.yaml", ROUTING)


def _way_out(site: Site, published: Contributions) -> dict[str, str]:
    """Why the gateway may call beyond its host; empty when everything that it calls is on it."""
    gateway = site.inventory.gateway
    if any(route.protocol == "cloud" for route in published.routes):
        return {"way-out": CLOUD}
    far = [backend for backend in published.backends if site.is_outside(backend.endpoint, gateway.host)]
    if far and gateway.balancing == "direct":
        return {"way-out": FAR}
    if any(receiver.is_outside for receiver in published.trace_receivers):
        return {"way-out": TRACED}
    return {"way-out": EXTRA} if gateway.extra else {}
