"""The gateway: LiteLLM, the one address that clients call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count, repeat
from typing import Any

from corral.components import Stage, edge
from corral.components.additions import named_secrets, with_texts
from corral.components.declared import filled, service
from corral.config.client_names import all_aliases
from corral.config.inventory import Auto, Consumer, Gateway, Team, TokenLimits
from corral.contributions import (
    Backend,
    Contribution,
    Contributions,
    Dashboard,
    Endpoint,
    File,
    OwnKey,
    Relabel,
    Route,
    Rules,
    ScrapeTarget,
    Secret,
    Service,
    Store,
    TraceReceiver,
)
from corral.declarations import declaration
from corral.gateway.frontends import gateway_publish_address
from corral.gateway.keys import METRICS_NAME, metrics_settings
from corral.plan.routing import SECTIONS, chains, has_routing, pool_context, tier_settings
from corral.plan.site import Site
from corral.units import grouped

STAGE = Stage.GATEWAY
COMPONENT = "litellm"
MASTER_KEY = "LITELLM_MASTER_KEY"
SALT_KEY = "LITELLM_SALT_KEY"
METRICS_KEY = "LITELLM_METRICS_KEY"
DATA = declaration(COMPONENT)
IMAGE: str = DATA["services"][COMPONENT]["image"]
DIRECT_CALLS: dict[str, str] = DATA["direct_calls"]
METRICS: list[str] = DATA["metrics"]
# Shipped files beside the configuration, below /etc/corral in the container.
FILES = (
    "corral_access.py", "corral_errors.py", "corral_gateway.py", "corral_limits.py", "corral_interfaces.py", "start.sh",
)  # fmt: skip
# Begins the variables with the keys of pools' servers: LiteLLM takes a provider's usual variable for any request.
CLOUD_KEY = "CORRAL_KEY_"
# How many times LiteLLM holds a body in memory while it works on it, at most.
BODY_COPIES = 6
# What LiteLLM takes before any request, with room for what grows.
OWN_MIB = 1100
# Callbacks beside the gateway's own, each on sites that have a route which needs it.
CALLBACKS: dict[str, Callable[[Route], bool]] = {
    "corral_adapters": lambda route: bool(route.backend.adapters),
    "corral_cache": lambda route: bool(route.backend.cache_field),
    "corral_leases": lambda route: bool(route.lease_url),
    "corral_ollama": lambda route: route.backend.protocol == "ollama" and route.backend.kind == "chat",
    "corral_thinking": lambda route: route.backend.hides_thoughts,
}
# The callbacks of sites with a fast lane, and of those that have a database as well.
PERMITS, USAGE = "corral_permit", "corral_usage"
# The callback of sites with several workers and a database.
REVOCATION = "corral_revocation"
# The callback of sites whose consumers have another pool for when their budget is spent.
BUDGETS = "corral_budgets"
# The callback of sites with tracing.
TRACES = "corral_traces"
# The callbacks of sites that keep conversations, and their data: seconds in a unit of the inventory's periods.
CONVERSATIONS = ("corral_conversations", "corral_sessions")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "mo": 30 * 86_400}
CLOUD = "it calls cloud providers"
FAR = "it calls servers on other machines"
TRACED = "it sends traces to another machine"
EXTRA = "`gateway.extra` may name something on another machine"
# The gateway waits this much longer than queue and answer together may take, so that HAProxy decides.
SPARE_TIME_S = 60


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The gateway, its configuration, its keys and its metrics."""
    host = site.inventory.gateway.host
    secrets = _needed_secrets(site, published)
    yield Secret(MASTER_KEY, host, "opens everything on the gateway; for the operator only", "sk")
    if published.stores:
        yield Secret(SALT_KEY, host, "encrypts what the gateway keeps in its database; never change it", "sk")
    yield File(
        host, COMPONENT, "config.yaml", data=configuration(site, published),
        extra=_own_part(site), extra_at=("gateway", "extra"),
        note="pools and limits come from the plan; add your own settings through `gateway.extra`",
    )  # fmt: skip
    yield from (File(host, COMPONENT, name, asset=f"litellm/{name}") for name in _files(site, published))
    yield File(host, COMPONENT, "limits.yaml", data={"pools": limits(site, published)}, note="read by corral_limits.py")
    if conversations := site.inventory.gateway.conversations:
        data = {"keep_s": seconds(conversations.keep), "contexts": contexts(site)}
        yield File(host, COMPONENT, "conversations.yaml", data=data, note=f"read by {CONVERSATIONS[1]}.py")
    if has_routing(site.inventory):
        yield File(host, COMPONENT, "routing.yaml", data=routing(site, published), note="read by corral_routing.py")
    yield from _added_secrets(site)
    yield from (_service(site, published, secrets, worker) for worker in workers(site, published))
    if _has_far_receiver(site, published):
        yield from edge.client_secrets(host, "gateway")
    yield from _scraped(site, published)


def seconds(period: str) -> int:
    """A period of the inventory, such as `24h`, in seconds."""
    unit = period.lstrip("0123456789")
    return int(period.removesuffix(unit)) * SECONDS[unit]


def contexts(site: Site) -> dict[str, int]:
    """By every name that clients use how many tokens one request may have, where that is known."""
    inventory = site.inventory
    known = {name: pool_context(inventory, name) for name in inventory.pools}
    if auto := inventory.gateway.auto:
        tiers = [known[tier.pool] for tier in auto.tiers]
        known[auto.name] = None if None in tiers else min(filter(None, tiers))
    known |= {alias: known.get(name) for alias, name in all_aliases(inventory).items()}
    known |= {name: known[pool] for pool, told in inventory.pools.items() for name in told.background}
    return {name: context for name, context in known.items() if context is not None}


def _callbacks(site: Site, published: Contributions) -> list[str]:
    needed = [name for name, is_needed in CALLBACKS.items() if any(map(is_needed, published.routes))]
    gateway = site.inventory.gateway
    fast = [PERMITS, *([USAGE] if gateway.database else [])] if gateway.fast_lane else []
    shared = [REVOCATION] if gateway.database and gateway.workers > 1 else []
    payers: tuple[Consumer | Team, ...] = (*site.inventory.consumers.values(), *site.inventory.teams.values())
    spent = [BUDGETS] if any(item.budget and item.budget.fallback for item in payers) else []
    return [*needed, *fast, *shared, *spent, *([TRACES] if published.trace_receivers else [])]


def _files(site: Site, published: Contributions) -> list[str]:
    """Shipped files beside the configuration."""
    names = [*FILES, *(f"{name}.py" for name in _callbacks(site, published))]
    kept = [f"{name}.py" for name in CONVERSATIONS] if site.inventory.gateway.conversations else []
    return [*names, *kept, *(["corral_routing.py"] if has_routing(site.inventory) else [])]


def _scraped(site: Site, published: Contributions) -> Iterator[Contribution]:
    gateway, monitoring = site.inventory.gateway, site.inventory.monitoring
    if monitoring is None:
        return
    key = METRICS_KEY if gateway.database else MASTER_KEY  # without a database LiteLLM knows only one key
    if key != MASTER_KEY:
        yield Secret(key, gateway.host, "opens the gateway's figures, for Prometheus", "sk")
        yield OwnKey(METRICS_NAME, key, metrics_settings())
    yield from (Rules(f"monitoring/rules/{name}.yml") for name in ("litellm", "objectives"))
    yield Dashboard("monitoring/dashboards/gateway.json")
    if gateway.database:
        yield Dashboard("monitoring/dashboards/keys.json")
    labels = {"host": gateway.host, "role": "gateway"}
    for endpoint in workers(site, published):
        yield ScrapeTarget("litellm", endpoint, labels, "/metrics/", key, relabel=_relabel(published.routes))


def workers(site: Site, published: Contributions) -> tuple[Endpoint, ...]:
    """Where LiteLLM's processes listen: behind the door, where there is one."""
    gateway = site.inventory.gateway
    return workers_behind(site) if published.doors else (Endpoint(gateway.port, gateway.host, COMPONENT),)


def workers_behind(site: Site) -> tuple[Endpoint, ...]:
    """Where LiteLLM's processes listen behind the door; on a `local` host each on a port that the gateway has not."""
    gateway = site.inventory.gateway
    entrance = gateway.entrance.port if gateway.entrance else 0
    taken = {entrance, *(value for name, value in gateway if name.endswith("port"))}
    free = (port for port in count(gateway.litellm_port) if port not in taken)
    further = free if site.is_local(gateway.host) else repeat(gateway.litellm_port)
    names = (f"{COMPONENT}-{number}" for number in range(2, gateway.workers + 1))
    first = Endpoint(gateway.litellm_port, gateway.host, COMPONENT)
    return first, *(Endpoint(port, gateway.host, name) for name, port in zip(names, further, strict=False))


def _relabel(routes: list[Route]) -> tuple[Relabel, ...]:
    """The label `pool` for LiteLLM's own `model_id`."""
    pools = grouped((route.pool, route.name) for route in routes)
    return tuple(Relabel("model_id", tuple(names), "pool", pool) for pool, names in pools.items())


def buckets(site: Site) -> list[float]:
    """Upper ends in seconds of the buckets in which times are counted; every objective is one of them."""
    monitoring = site.inventory.monitoring
    own = [pool.objective for pool in site.inventory.pools.values() if pool.objective]
    objectives = [*own, *([monitoring.objective] if monitoring else [])]
    ends = {float(end) for item in objectives for end in (item.first_token_s, item.answer_s)}
    return sorted({*DATA["buckets"], *ends})


def _server_keys(site: Site, published: Contributions) -> tuple[str, ...]:
    """Names of the secrets with which LiteLLM calls pools' servers, and what `gateway.extra` adds to its models."""
    added = named_secrets(site.inventory.gateway.extra.get("model_list"))
    keys = {route.backend.secret for route in published.routes if route.backend.secret}
    return tuple(sorted(keys | {name.removeprefix(CLOUD_KEY) for name in added}))


def _needed_secrets(site: Site, published: Contributions) -> tuple[str, ...]:
    """Names of every other secret that LiteLLM takes from its environment."""
    named: tuple[Iterable[Store | TraceReceiver], ...] = (published.stores, published.trace_receivers)
    names = {item.secret for items in named for item in items if item.secret}
    names |= set(named_secrets(site.inventory.gateway.extra | {"model_list": None}))
    return tuple(sorted(names | {MASTER_KEY} | ({SALT_KEY} if published.stores else set())))


def _own_part(site: Site) -> dict[str, Any]:
    """`gateway.extra` with the variables of its models' keys called as all such keys are."""
    extra = site.inventory.gateway.extra
    own = with_texts(extra.get("model_list"), _own_variable)
    return extra | ({"model_list": own} if own else {})


def _own_variable(text: str) -> str:
    is_secret = bool(named_secrets(text)) and f"/{CLOUD_KEY}" not in text
    return text.replace("os.environ/", f"os.environ/{CLOUD_KEY}") if is_secret else text


def _added_secrets(site: Site) -> Iterator[Secret]:
    """The secrets that `gateway.extra` names; one that the kit makes up as well stays as it makes it."""
    gateway = site.inventory.gateway
    for name in sorted({name.removeprefix(CLOUD_KEY) for name in named_secrets(gateway.extra)}):
        yield Secret(name, gateway.host, "named in gateway.extra", "given")


def limits(site: Site, published: Contributions) -> dict[str, dict[str, int]]:
    """What one request may ask of each pool, as corral_limits.py reads it."""
    kinds = {route.pool: route.backend.kind for route in published.routes}
    cloud = {route.pool for route in published.routes if route.backend.protocol == "cloud"}
    return {pool: request_limits(site, pool, kind, is_cloud=pool in cloud) for pool, kind in kinds.items()}


def request_limits(site: Site, pool: str, kind: str, *, is_cloud: bool = False) -> dict[str, int]:
    """What one request may ask of a pool, by the names that corral_limits.py knows."""
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
    has_database = any(store.kind == "database" for store in published.stores)
    has_fallbacks = any(chains(site.inventory, section) for section in SECTIONS)
    deployments = [_deployment(site, route, slots[route.pool]) for route in published.routes]
    if gateway.auto is not None:
        deployments.append(_auto(gateway.auto, deployments))
    routing_callback = ("corral_routing.corral_routing",) if has_routing(site.inventory) else ()
    values = {
        "deployments": deployments,
        "router": _router(site, published.routes),
        "routing": routing_callback,
        "conversations": tuple(f"{name}.{name}" for name in CONVERSATIONS) if gateway.conversations else (),
        "callbacks": tuple(f"{name}.{name}" for name in _callbacks(site, published)),
        "buckets": buckets(site),
        "metrics": METRICS,
        "patience_s": patience_s(site),
        "cache": _cache(site, published),
        "database_url": "os.environ/DATABASE_URL" if has_database else None,
        "database_connections": 10 if has_database else None,
        "database_write_s": 10 if has_database else None,
        "has_fallbacks": has_fallbacks or None,
        "keeps_prompts": False if gateway.database else None,
        "keeps_conversations": True if gateway.conversations else None,
    }
    return dict(filled(DATA["configuration"], values))


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


def _router(site: Site, routes: list[Route]) -> dict[str, Any]:
    gateway = site.inventory.gateway
    leased = dict.fromkeys(route.pool for route in routes if route.lease_url)
    aliases = all_aliases(site.inventory)
    longer = chains(site.inventory, "context_fallback")
    router: dict[str, Any] = {"num_retries": 0, "timeout": patience_s(site)}
    checks: list[str] = []
    if any(pool.limits.rpm or pool.limits.tpm for pool in site.inventory.pools.values()):
        checks.append("enforce_model_rate_limits")
    if gateway.balancing == "direct":
        router |= DATA["direct_router"]
    else:
        router |= {"routing_strategy": "least-busy", "disable_cooldowns": True}
    if gateway.balancing != "slots":  # there HAProxy knows which replica answered a conversation last
        checks.append("session_affinity")
        router["deployment_affinity_ttl_seconds"] = 1800
    return (
        router
        | ({"model_group_alias": aliases} if aliases else {})
        | ({"optional_pre_call_checks": checks} if checks else {})
        | ({"model_group_retry_policy": dict.fromkeys(leased, DATA["leased_retries"])} if leased else {})
        | ({"context_window_fallbacks": [{name: pools} for name, pools in longer.items()]} if longer else {})
    )


def _cache(site: Site, published: Contributions) -> dict[str, Any] | None:
    """Where its processes share counters; None without a cache."""
    for store in published.stores:
        if store.kind == "cache":
            address, _, port = site.address(store.endpoint, site.inventory.gateway.host).rpartition(":")
            login = {"username": store.user, "password": f"os.environ/{store.secret}"}
            checks = DATA["one_of_several"]["cache"] if site.inventory.gateway.workers > 1 else {}
            return {"host": address, "port": int(port), **login, **checks}
    return None


def _deployment(site: Site, route: Route, pool_slots: int) -> dict[str, Any]:
    """One entry of LiteLLM's model list; where a pool has several, each has its share of the limits by slots."""
    pool, backend, share = site.inventory.pools[route.pool], route.backend, route.slots / pool_slots
    price, is_openai = pool.price, backend.protocol == "openai"
    is_priced = price is not None or backend.cost is not None or backend.protocol == "cloud"
    queue = pool.queue or site.inventory.gateway.queue
    values = {
        "pool": route.pool,
        "name": route.name,
        "model": _model_name(route),
        "url": route.url or None,
        "key": f"os.environ/{CLOUD_KEY}{backend.secret}" if backend.secret else "none",
        "input_usd": price.input_usd_per_million / 1_000_000 if price else None,
        "output_usd": price.output_usd_per_million / 1_000_000 if price else None,
        "timeout_s": pool.timeout_s + queue.timeout_s if pool.timeout_s else None,
        "passed_on": DATA["passed_on"].get(backend.kind, {}) if is_openai else {},
        "parameters": backend.parameters,
        "cost": _cost(backend),
        "mode": DATA["modes"][backend.kind],
        "free": {} if is_priced else DATA["free"].get(backend.kind, {}),
        "supports_reasoning": False if is_openai and backend.kind == "chat" else None,
        "thinking": "hidden" if backend.hides_thoughts else None,
        "cache_field": backend.cache_field or None,
        "adapters": dict(backend.adapters) or None,
        "lease_url": route.lease_url or None,
        "rpm": max(1, round(pool.limits.rpm * share)) if pool.limits.rpm else None,
        "tpm": max(1, round(pool.limits.tpm * share)) if pool.limits.tpm else None,
    }
    return dict(filled(DATA["deployment"], values))


def _cost(backend: Backend) -> dict[str, Any]:
    """What LiteLLM counts spend with, and where it stops asking; it keeps the count in the cache."""
    cost = backend.cost
    if cost is None:
        return {}
    price = {"input_cost_per_token": cost.input_usd, "output_cost_per_token": cost.output_usd}
    budget = {"max_budget": cost.budget_usd, "budget_duration": cost.period}
    return price if cost.budget_usd is None else price | budget


def _model_name(route: Route) -> str:
    """LiteLLM's name of a model: the provider decides the protocol."""
    if route.backend.protocol == "cloud":
        return route.backend.upstream_model
    provider = DATA["providers"].get(route.backend.protocol, {}).get(route.backend.kind, "openai")
    return f"{provider}/{route.backend.upstream_model}"


def _service(site: Site, published: Contributions, secrets: tuple[str, ...], worker: Endpoint) -> Service:
    """One of LiteLLM's processes; the first brings the database's tables up to date, the others wait for it."""
    gateway = site.inventory.gateway
    is_local, is_first = site.is_local(gateway.host), worker.service == COMPONENT
    address = site.publish_address(gateway.host) if published.doors else gateway_publish_address(site)
    stores = {store.endpoint.service for store in published.stores}
    environment = {
        **({} if is_local else DATA["writable"]),
        **DATA["behind_the_door" if published.doors else "no_pages"],
        **(DIRECT_CALLS if gateway.balancing != "direct" else {}),
        **(DATA["one_of_several"]["environment"] if gateway.workers > 1 else {}),
        **({} if is_first else DATA["further_worker"]),
        **({"CORRAL_AFTER": str(gateway.litellm_port)} if is_local and not is_first else {}),
    }
    routing_file = ["routing.yaml"] if has_routing(site.inventory) else []
    conversations_file = ["conversations.yaml"] if gateway.conversations else []
    files = (*_files(site, published), *routing_file, *conversations_file)
    return service(
        site,
        gateway.host,
        COMPONENT,
        worker=worker.service,
        port=worker.port,
        bind="127.0.0.1" if is_local else "0.0.0.0",  # noqa: S104 - inside the container's own network
        open_on=address,
        memory_mib=gateway.memory_mib,
        names=" ".join(secrets),
        server_keys=" ".join(_server_keys(site, published)),
        unknown_model=gateway.unknown_model or None,
        environment=environment,
        **_tracing(site, published),
        keys=tuple(sorted({*secrets, *_server_keys(site, published), *_certificates(site, published)})),
        files=tuple((name, f"/etc/corral/{name}") for name in files),
        calls=tuple(_calls(published)),
        after=tuple((name, "service_healthy") for name in (*sorted(stores), *(() if is_first else (COMPONENT,)))),
        exceptions=_way_out(site, published),
    )


def _calls(published: Contributions) -> Iterator[Endpoint]:
    """Everything that the gateway calls: the balancer or else the servers, its stores, and the receivers of traces."""
    yield from (door.endpoint for door in published.doors)
    if not published.doors:
        yield from (backend.endpoint for backend in published.backends)
    yield from (store.endpoint for store in published.stores)
    yield from (receiver.endpoint for receiver in published.trace_receivers if receiver.endpoint)


def _has_far_receiver(site: Site, published: Contributions) -> bool:
    """Whether traces go to another host of the site."""
    endpoints = [receiver.endpoint for receiver in published.trace_receivers if receiver.endpoint]
    return edge.is_called(site, endpoints, site.inventory.gateway.host)


def _certificates(site: Site, published: Contributions) -> tuple[str, ...]:
    return (edge.AUTHORITY, edge.CLIENTS["gateway"]) if _has_far_receiver(site, published) else ()


def _tracing(site: Site, published: Contributions) -> dict[str, str | None]:
    """Settings of LiteLLM's OpenTelemetry callback, and of the library that sends for it."""
    tracing, host = site.inventory.tracing, site.inventory.gateway.host
    names = ("traces_url", "traces_protocol", "traces_content", "traces_name", "authority", "certificate")
    if tracing is None or not published.trace_receivers:
        return dict.fromkeys(names)
    own = [site.secret_path(host, name) for name in _certificates(site, published)]
    content = "SPAN_ONLY" if tracing.prompts else "NO_CONTENT"
    url = published.trace_receivers[0].url
    return dict(zip(names, (url, "http/protobuf", content, site.inventory.name, *(own or (None, None))), strict=True))


def _way_out(site: Site, published: Contributions) -> dict[str, str]:
    """Why the gateway may call beyond its host; empty when everything that it calls is on it."""
    gateway = site.inventory.gateway
    if any(route.backend.protocol == "cloud" for route in published.routes):
        return {"way-out": CLOUD}
    far = [backend for backend in published.backends if site.is_outside(backend.endpoint, gateway.host)]
    if far and gateway.balancing == "direct":
        return {"way-out": FAR}
    if any(receiver.is_outside for receiver in published.trace_receivers):
        return {"way-out": TRACED}
    return {"way-out": EXTRA} if gateway.extra else {}
