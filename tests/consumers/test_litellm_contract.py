import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.consumers.litellm_contract import load_with_litellm, unknown_keys

GATEWAY = Path(__file__).parents[2] / "litellm" / "corral_gateway.py"
ENVIRONMENT = {"LITELLM_MASTER_KEY": "sk-contract-7d1fe0c29ab4"}
REDIS = {"host": "os.environ/REDIS_HOST", "port": "os.environ/REDIS_PORT", "password": "os.environ/REDIS_PASSWORD"}

Config = dict[str, Any]


PARAMETERS: dict[str, Config] = {
    "chat": {
        "model": "openai/chat",
        "allowed_openai_params": ["user", "verbosity", "chat_template_kwargs"],
        "use_chat_completions_api": True,
    },
    "embedding": {"model": "openai/embed", "allowed_openai_params": ["user", "dimensions"]},
    "image_generation": {"model": "hosted_vllm/image"},
}


def deployment(pool: str, mode: str, path: str, **info: object) -> Config:
    return {
        "model_name": pool,
        "litellm_params": {
            **PARAMETERS[mode],
            "api_base": f"http://haproxy:8100/{pool}/{path}/v1",
            "api_key": "none",
            "max_retries": 0,
        },
        "model_info": {"id": f"{pool}-{path}", "mode": mode, **info},
    }


SETTINGS: Config = {
    "litellm_settings": {
        "callbacks": ["corral_gateway.corral_gateway", "prometheus"],
        "drop_params": False,
        "json_logs": True,
        "prometheus_latency_buckets": [0.5, 1.0, 5.0],
        "prometheus_metrics_config": [{"group": "ours", "metrics": ["litellm_spend_metric"]}],
        "request_timeout": 660,
        "require_auth_for_metrics_endpoint": True,
    },
    "general_settings": {
        "master_key": "os.environ/LITELLM_MASTER_KEY",
        "background_health_checks": False,
        "cancel_on_disconnect": True,
        "database_connection_pool_limit": 10,
        "database_url": "os.environ/DATABASE_URL",
        "proxy_batch_write_at": 10,
        "trusted_proxy_ranges": [],
    },
}

SLOTS: Config = {
    "model_list": [
        deployment("chat", "chat", "any", rpm=35, tpm=50_000),
        deployment("embed", "embedding", "any"),
        deployment("image", "image_generation", "any", disable_background_health_check=True),
    ],
    "router_settings": {
        "routing_strategy": "least-busy",
        "num_retries": 0,
        "disable_cooldowns": True,
        "timeout": 660,
        "model_group_alias": {"default": "chat"},
        "optional_pre_call_checks": ["enforce_model_rate_limits"],
    },
    **SETTINGS,
}

LEAST_BUSY: Config = {
    "model_list": [deployment("chat", "chat", f"chat{number}") for number in range(3)],
    "router_settings": {
        "routing_strategy": "least-busy",
        "num_retries": 0,
        "disable_cooldowns": True,
        "optional_pre_call_checks": ["session_affinity"],
        "deployment_affinity_ttl_seconds": 1800,
    },
    **SETTINGS,
    "general_settings": {**SETTINGS["general_settings"], "coordination_redis": REDIS},
}

DIRECT: Config = {
    "model_list": [deployment("chat", "chat", f"chat{number}") for number in range(3)],
    "router_settings": {
        "routing_strategy": "simple-shuffle",
        "num_retries": 2,
        "retry_policy": {"RateLimitErrorRetries": 0, "TimeoutErrorRetries": 0},
        "allowed_fails": 2,
        "allowed_fails_policy": {"RateLimitErrorAllowedFails": 1_000_000},
        "cooldown_time": 10,
    },
    **SETTINGS,
}

TIERS: Config = {
    "model_list": [
        {
            "model_name": "auto",
            "litellm_params": {
                "model": "auto_router/complexity_router",
                "complexity_router_config": {
                    "tiers": {"SIMPLE": "small", "COMPLEX": "large"},
                    "default_model": "small",
                    "max_tokens_from_tier_model": False,
                },
            },
        }
    ]
}


@pytest.mark.parametrize("config", [SLOTS, LEAST_BUSY, DIRECT, TIERS], ids=["slots", "least-busy", "direct", "tiers"])
def test_accepts_what_a_gateway_is_made_of(config: Config) -> None:
    assert unknown_keys(config) == []


def with_key(path: str, value: object = 1) -> Config:
    """The slots configuration with one more key; a number in the path is a place in a list."""
    config = copy.deepcopy(SLOTS)
    *parents, key = path.split(".")
    place: Any = config
    for name in parents:
        place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
    place[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model_lists", "model_lists"),
        ("model_list.0.litellm_param", "model_list[0].litellm_param"),
        ("model_list.0.max_parallel", "model_list[0].max_parallel"),
        ("model_list.1.litellm_params.api_bse", "model_list[1].litellm_params.api_bse"),
        ("model_list.0.litellm_params.allowed_openai_param", "model_list[0].litellm_params.allowed_openai_param"),
        ("model_list.0.model_info.modes", "model_list[0].model_info.modes"),
        ("model_list.0.model_info.disable_health_check", "model_list[0].model_info.disable_health_check"),
        ("general_settings.cancel_on_disconect", "general_settings.cancel_on_disconect"),
        ("general_settings.coordination_redis.pasword", "general_settings.coordination_redis.pasword"),
        ("litellm_settings.request_timeouts", "litellm_settings.request_timeouts"),
        ("litellm_settings.completion", "litellm_settings.completion"),
        ("router_settings.num_retry", "router_settings.num_retry"),
        ("router_settings.model_list", "router_settings.model_list"),
        ("router_settings.retry_policy.RateLimitRetries", "router_settings.retry_policy.RateLimitRetries"),
        (
            "router_settings.allowed_fails_policy.RateLimitErrorRetries",
            "router_settings.allowed_fails_policy.RateLimitErrorRetries",
        ),
    ],
)
def test_names_a_misspelt_key_at_every_level(path: str, named: str) -> None:
    assert named in unknown_keys(with_key(path))


def test_names_a_misspelt_key_of_the_cache() -> None:
    config = with_key("litellm_settings.cache_params", {"type": "redis", "host": "valkey", "pasword": "x"})
    config["litellm_settings"]["cache"] = True

    assert unknown_keys(config) == ["litellm_settings.cache_params.pasword"]


def test_names_a_misspelt_setting_of_the_complexity_router() -> None:
    config = copy.deepcopy(TIERS)
    config["model_list"][0]["litellm_params"]["complexity_router_config"]["tier_boundary"] = {}

    assert unknown_keys(config) == ["model_list[0].litellm_params.complexity_router_config.tier_boundary"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("router_settings.optional_pre_call_checks", ["enforce_rate_limits"], "enforce_rate_limits"),
        ("litellm_settings.callbacks", ["promethius"], "promethius"),
    ],
)
def test_names_a_list_item_that_litellm_has_nothing_for(path: str, value: list[str], named: str) -> None:
    assert f"{path}.{named}" in unknown_keys(with_key(path, value))


def test_names_the_dead_keys_of_the_farm_whose_limits_never_worked() -> None:
    farm = {
        "model_list": [deployment("chat", "chat", "any")],
        "router_settings": {
            "routing_strategy": "least-busy",
            "num_retries": 2,
            "allowed_fails": 2,
            "cooldown_time": 60,
            "enable_health_check": True,
            "model_rate_limits": {"chat": {"rpm": 35, "tpm": 50_000}},
        },
        "litellm_settings": {"drop_params": True},
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            "health_check_interval": 15,
            "max_parallel_requests": 7,
            "global_max_parallel_requests": 14,
        },
    }

    assert unknown_keys(farm) == [
        "general_settings.max_parallel_requests",
        "general_settings.global_max_parallel_requests",
        "router_settings.enable_health_check",
        "router_settings.model_rate_limits",
        "general_settings.health_check_interval",
    ]


@pytest.mark.parametrize(
    ("path", "value", "asleep"),
    [
        ("general_settings.health_check_interval", 15, ["general_settings.health_check_interval"]),
        ("general_settings.database_url", "", ["database_connection_pool_limit", "proxy_batch_write_at"]),
        ("litellm_settings.cache_params", {"type": "redis"}, ["litellm_settings.cache_params"]),
        ("router_settings.cooldown_time", 60, ["router_settings.cooldown_time"]),
        ("router_settings.deployment_affinity_ttl_seconds", 60, ["router_settings.deployment_affinity_ttl_seconds"]),
        ("router_settings.routing_strategy_args", {"ttl": 10}, ["router_settings.routing_strategy_args"]),
        ("router_settings.optional_pre_call_checks", [], ["model_info.rpm", "model_info.tpm"]),
    ],
)
def test_names_a_key_that_waits_for_another(path: str, value: object, asleep: list[str]) -> None:
    named = unknown_keys(with_key(path, value))

    assert [key for key in named if key.endswith(tuple(asleep))] == named
    assert len(named) == len(asleep)


def test_wakes_a_key_with_the_one_it_waits_for() -> None:
    config = with_key("general_settings.health_check_interval", 15)
    config["general_settings"]["background_health_checks"] = True

    assert unknown_keys(config) == []


def written(config: Config, folder: Path) -> Path:
    import yaml

    shutil.copy(GATEWAY, folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("config", [SLOTS, DIRECT], ids=["slots", "direct"])
def test_litellm_loads_a_gateway_without_a_word(config: Config, tmp_path: Path) -> None:
    assert load_with_litellm(written(config, tmp_path), ENVIRONMENT) == ""


def test_hears_litellm_ignore_an_unknown_router_key(tmp_path: Path) -> None:
    path = written(with_key("router_settings.model_rate_limits", {"chat": {"rpm": 35}}), tmp_path)

    assert "'model_rate_limits' is not a valid argument" in load_with_litellm(path, ENVIRONMENT)


def test_says_why_litellm_refuses_a_file(tmp_path: Path) -> None:
    path = written(with_key("router_settings.health_check_interval", 15), tmp_path)

    with pytest.raises(ValueError, match=r"LiteLLM refuses config\.yaml: .*health_check_interval"):
        load_with_litellm(path, ENVIRONMENT)
