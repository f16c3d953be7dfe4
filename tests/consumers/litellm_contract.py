"""What the installed LiteLLM makes of a configuration: which of its keys it reads, and what it says while loading it.

LiteLLM takes any key anywhere and keeps silent about most it does not know. What it knows is therefore asked of its own
code: signatures, models, the attributes of its module, and the names its source reads from a section. Where that is not
the whole truth there is a table here, and every line of it says why.
"""

import asyncio
import functools
import inspect
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple, get_args

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM would fetch a price list when imported

Config = Mapping[str, Any]
Keys = frozenset[str]

LOAD_DEADLINE_S = 120
WARNING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")

# Fields of `general_settings` that LiteLLM 1.106 declares and that change nothing.
READ_BUT_NEVER_USED = {
    "database_args": "only mentioned in a comment",
    "database_type": "declared, never read",
    "enable_public_model_hub": "declared, never read",
    "global_max_parallel_requests": "read by the legacy rate limiter alone, which an environment variable turns on",
    "max_parallel_requests": "documented as a default for keys, never read; the limit belongs to the key",
    "otel": "declared, never read; tracing is a callback",
}

ENTRY_EXTRAS = {
    "rpm": "the router moves it into litellm_params",
    "tpm": "the router moves it into litellm_params",
}

# `litellm_params` beyond LiteLLM's own: anything else would reach a backend that does not know it either.
PARAMETER_EXTRAS = {
    "additional_drop_params": "a request's own list of parameters to leave out",
    "drop_params": "also a request parameter",
    "extra_body": "merged into the body",
    "cache_prompt": "llama-server; the openai provider sends unknown parameters on in the body",
    "chat_template_kwargs": "llama-server and vLLM",
    "dialect": "litellm/corral_ollama.py",
    "dry_multiplier": "llama-server",
    "min_p": "llama-server and vLLM",
    "negative_prompt": "LocalAI",
    "reasoning_format": "llama-server",
    "repeat_penalty": "llama-server",
    "repetition_penalty": "vLLM",
    "step": "LocalAI",
    "think": "Ollama, through LiteLLM's ollama_chat",
    "thinking_budget_tokens": "llama-server",
    "top_k": "llama-server, vLLM and MLX",
}

INFO_EXTRAS = {
    "description": "shown by /model/info",
    "disable_background_health_check": "read from the deployment's model_info through a local name",
    "thinking": "litellm/corral_thinking.py",
    "adapters": "litellm/corral_adapters.py",
    "cache_field": "litellm/corral_cache.py",
    "lease_url": "litellm/corral_leases.py",
}

CACHE_EXTRAS = {
    "socket_connect_timeout": "an argument of redis-py's connection",
    "socket_timeout": "an argument of LiteLLM's RedisCache",
}


class Dormant(NamedTuple):
    """Keys that LiteLLM reads and that do nothing while another one is not set."""

    section: str
    keys: Keys
    is_awake: Callable[[Config], bool]


def unknown_keys(config: Config) -> list[str]:
    """Every key, as a dotted path in the order written, that LiteLLM would ignore, only log or never use."""
    return list(dict.fromkeys([*_misplaced(config), *_dormant(config)]))


def load_with_litellm(config_path: Path, env: Mapping[str, str]) -> str:
    """What LiteLLM warns of while it loads this file as its proxy does, one line each; empty if it is content.

    `env` is all that the file's `os.environ/…` references find, besides PATH.

    Raises:
        ValueError: LiteLLM refuses the file; the message ends with its reason.
    """
    environment = {"PATH": os.environ.get("PATH", ""), "LITELLM_LOCAL_MODEL_COST_MAP": "True", **env}
    with tempfile.NamedTemporaryFile("r") as output:
        process = _loaders().Process(target=_load, args=(str(config_path.resolve()), environment, output.name))
        process.start()
        process.join(LOAD_DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"LiteLLM has not loaded {config_path} within {LOAD_DEADLINE_S} s")
        text = output.read()
    said = [line for line in text.splitlines() if line.strip()]
    if process.exitcode != 0:
        raise ValueError(f"LiteLLM refuses {config_path.name}: {said[-1] if said else 'without a word'}")
    return "\n".join(line for line in said if WARNING.search(line))


# --- sections ---


def _misplaced(config: Config) -> Iterator[str]:
    yield from _not_in(_top_level_keys(), config)
    for index, entry in enumerate(_list(config, "model_list")):
        yield from _under(f"model_list[{index}]", _misplaced_in_entry(entry))
    yield from _under("general_settings", _misplaced_in_general(_section(config, "general_settings")))
    yield from _under("litellm_settings", _misplaced_in_litellm(_section(config, "litellm_settings")))
    yield from _under("router_settings", _misplaced_in_router(_section(config, "router_settings")))


def _misplaced_in_entry(entry: Config) -> Iterator[str]:
    from litellm.router_strategy.complexity_router.config import ComplexityRouterConfig
    from litellm.types.router import Deployment

    yield from _not_in(Deployment.model_fields.keys() | ENTRY_EXTRAS.keys(), entry)
    parameters = _section(entry, "litellm_params")
    yield from _under("litellm_params", _not_in(_parameter_keys(), parameters))
    tiers = _section(parameters, "complexity_router_config")
    yield from _under(
        "litellm_params", _under("complexity_router_config", _not_in(ComplexityRouterConfig.model_fields, tiers))
    )
    yield from _under("model_info", _not_in(_info_keys(), _section(entry, "model_info")))


def _misplaced_in_general(settings: Config) -> Iterator[str]:
    from litellm._redis import _get_redis_kwargs
    from litellm.proxy._types import CoordinationRedisParams

    yield from _not_in(_general_keys(), settings)
    redis = _section(settings, "coordination_redis")
    passed_on = _get_redis_kwargs()  # type: ignore[no-untyped-call]
    yield from _under("coordination_redis", _not_in({*CoordinationRedisParams.model_fields, *passed_on}, redis))


def _misplaced_in_litellm(settings: Config) -> Iterator[str]:
    yield from _not_in(_litellm_keys(), settings)
    yield from _under("cache_params", _not_in(_cache_keys(), _section(settings, "cache_params")))
    for name in ("callbacks", "success_callback", "failure_callback"):
        yield from _under(name, (callback for callback in _list(settings, name) if not _is_callback(callback)))


def _misplaced_in_router(settings: Config) -> Iterator[str]:
    from litellm.types.router import AllowedFailsPolicy, OptionalPreCallChecks, RetryPolicy, RoutingGroup

    yield from _not_in(_router_keys(), settings)
    yield from _under("retry_policy", _not_in(RetryPolicy.model_fields, _section(settings, "retry_policy")))
    failures = _section(settings, "allowed_fails_policy")
    yield from _under("allowed_fails_policy", _not_in(AllowedFailsPolicy.model_fields, failures))
    checks = get_args(get_args(OptionalPreCallChecks)[0])
    yield from _under("optional_pre_call_checks", _not_in(checks, _list(settings, "optional_pre_call_checks")))
    for index, group in enumerate(_list(settings, "routing_groups")):
        yield from _under(f"routing_groups[{index}]", _not_in(RoutingGroup.model_fields, group))


# --- keys that need another one ---


def _dormant(config: Config) -> Iterator[str]:
    for section, keys, is_awake in DORMANT:
        if not is_awake(config):
            present = _section(config, section)
            yield from _under(section, (key for key in present if key in keys))
    if not _enforces_model_limits(config):
        for index, entry in enumerate(_list(config, "model_list")):
            limits = (key for key in _section(entry, "model_info") if key in {"rpm", "tpm"})
            yield from _under(f"model_list[{index}].model_info", limits)


def _is_set(section: str, key: str) -> Callable[[Config], bool]:
    return lambda config: bool(_section(config, section).get(key))


def _checks(config: Config) -> set[str]:
    return set(_list(_section(config, "router_settings"), "optional_pre_call_checks"))


def _enforces_model_limits(config: Config) -> bool:
    strategy = str(_section(config, "router_settings").get("routing_strategy", ""))
    limiters = {"dynamic_rate_limiter", "dynamic_rate_limiter_v3"}
    callbacks = set(_list(_section(config, "litellm_settings"), "callbacks"))
    return "enforce_model_rate_limits" in _checks(config) or "usage-based" in strategy or bool(limiters & callbacks)


DORMANT = (
    Dormant(
        "general_settings",
        frozenset(
            {
                "background_health_check_model_groups",
                "enable_health_check_routing",
                "health_check_concurrency",
                "health_check_ignore_transient_errors",
                "health_check_interval",
                "health_check_skip_disabled_background_models",
                "health_check_staleness_threshold",
                "model_list_healthy_only",
                "use_shared_health_check",
            }
        ),
        _is_set("general_settings", "background_health_checks"),
    ),
    Dormant(
        "general_settings",
        frozenset(
            {
                "allow_requests_on_db_unavailable",
                "database_connection_pool_limit",
                "database_connection_timeout",
                "disable_spend_logs",
                "maximum_spend_logs_retention_period",
                "proxy_batch_write_at",
                "store_model_in_db",
                "store_prompts_in_spend_logs",
            }
        ),
        _is_set("general_settings", "database_url"),
    ),
    Dormant("litellm_settings", frozenset({"cache_params"}), _is_set("litellm_settings", "cache")),
    Dormant(
        "router_settings",
        frozenset({"allowed_fails", "allowed_fails_policy", "cooldown_time"}),
        lambda config: not _section(config, "router_settings").get("disable_cooldowns"),
    ),
    Dormant(
        "router_settings",
        frozenset({"deployment_affinity_ttl_seconds"}),
        lambda config: bool(_checks(config) & {"deployment_affinity", "session_affinity"}),
    ),
    Dormant(
        "router_settings",
        frozenset({"routing_strategy_args"}),
        lambda config: "based" in str(_section(config, "router_settings").get("routing_strategy", "")),
    ),
)


# --- what LiteLLM knows ---


@functools.cache
def _top_level_keys() -> Keys:
    """The sections that the proxy takes out of a file."""
    from litellm.proxy import proxy_server

    source = inspect.getsource(proxy_server.ProxyConfig)
    return frozenset(re.findall(r'\bconfig\.get\(\s*"(\w+)"', source)) | {"include"}


@functools.cache
def _general_keys() -> Keys:
    from litellm.proxy._types import ConfigGeneralSettings

    return (_read_from("general_settings") | ConfigGeneralSettings.model_fields.keys()) - READ_BUT_NEVER_USED.keys()


@functools.cache
def _litellm_keys() -> Keys:
    """Names with a branch of their own in the loader, names read from the section, and the module's own settings."""
    import litellm
    from litellm.proxy import proxy_server

    branches = re.findall(r'\bkey == "(\w+)"', inspect.getsource(proxy_server.ProxyConfig.load_config))
    values = {
        name
        for name, value in vars(litellm).items()
        if name.islower() and name[0] != "_" and not callable(value) and not inspect.ismodule(value)
    }
    return _read_from("litellm_settings") | values.union(branches)


@functools.cache
def _router_keys() -> Keys:
    from litellm.constants import ROUTER_SETTINGS_MANAGED_OUTSIDE_CONFIG
    from litellm.router import Router

    return frozenset(Router.get_valid_args()) - ROUTER_SETTINGS_MANAGED_OUTSIDE_CONFIG


@functools.cache
def _parameter_keys() -> Keys:
    from litellm.constants import OPENAI_CHAT_COMPLETION_PARAMS, OPENAI_EMBEDDING_PARAMS
    from litellm.types.router import LiteLLM_Params
    from litellm.types.utils import all_litellm_params

    requests = [*OPENAI_CHAT_COMPLETION_PARAMS, *OPENAI_EMBEDDING_PARAMS, *all_litellm_params]
    return frozenset(LiteLLM_Params.model_fields).union(requests, PARAMETER_EXTRAS)


@functools.cache
def _info_keys() -> Keys:
    from litellm.types.router import ModelInfo
    from litellm.types.utils import ModelInfo as PriceListEntry

    return _read_from("model_info").union(ModelInfo.model_fields, PriceListEntry.__annotations__, INFO_EXTRAS)


@functools.cache
def _cache_keys() -> Keys:
    from litellm._redis import _get_redis_kwargs
    from litellm.caching.caching import Cache

    arguments = {name for name in inspect.signature(Cache.__init__).parameters if name not in {"self", "kwargs"}}
    redis_arguments = _get_redis_kwargs()  # type: ignore[no-untyped-call]
    return frozenset(arguments.union(redis_arguments, CACHE_EXTRAS))


def _is_callback(name: str) -> bool:
    """Whether LiteLLM has a logger of this name; a dotted one is a file beside the configuration."""
    import litellm

    return "." in name or name in litellm._known_custom_logger_compatible_callbacks


@functools.cache
def _read_from(variable: str) -> Keys:
    """The names that LiteLLM's source takes out of a variable called like this."""
    read = re.compile(rf"""\b_?{variable}\b(?:\(\)|\s+or\s+\{{\}}\))?\s*(?:\.get\(|\[)\s*["'](\w+)["']""")
    return frozenset(name for text in _sources() for name in read.findall(text))


@functools.cache
def _sources() -> tuple[str, ...]:
    import litellm

    folder = Path(litellm.__file__).parent
    return tuple(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.py")))


# --- small things ---


def _section(config: Config, name: str) -> Config:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(config: Config, name: str) -> list[Any]:
    value = config.get(name)
    return list(value) if isinstance(value, list | tuple) else []


def _not_in(known: Iterable[str], present: Iterable[str]) -> Iterator[str]:
    names = frozenset(known)
    return (key for key in present if key not in names)


def _under(section: str, keys: Iterable[str]) -> Iterator[str]:
    return (f"{section}.{key}" for key in keys)


@functools.cache
def _loaders() -> ForkServerContext:
    """Makes processes that have LiteLLM's proxy imported already, which takes most of a load's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["litellm.proxy.proxy_server"])
    return context


def _load(config_path: str, environment: dict[str, str], output: str) -> None:
    """Runs in a process of its own, whose output goes to a file."""
    from litellm.proxy.proxy_server import ProxyConfig

    with open(output, "w") as file:  # noqa: PTH123 - its descriptor becomes the process's own
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Else what it prints would come after the reason why it ends.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(Path(config_path).parent)
    os.environ.clear()
    os.environ.update(environment)
    asyncio.run(ProxyConfig().load_config(router=None, config_file_path=config_path))
