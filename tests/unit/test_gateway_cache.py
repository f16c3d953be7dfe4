"""What the gateway's callback adds to requests for pools whose prompt caches are private."""

from __future__ import annotations

import asyncio
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from corral.config.load import validate
from corral.config.source import parse
from corral.gateway.keys import hash_of
from corral.plan.routing import has_private_cache
from tests.callbacks import load_callback


@pytest.fixture(scope="module")
def callback() -> ModuleType:
    return load_callback("corral_cache")


def sent(callback: ModuleType, key: str, field: str, **fields: object) -> dict[str, Any]:
    """The request of this key as it goes to a deployment with this field."""

    async def run() -> Any:
        await callback.corral_cache.async_pre_call_hook(SimpleNamespace(api_key=hash_of(key)), None, {}, "acompletion")
        request = {"model": "openai/m", "metadata": {"model_info": {"cache_field": field} if field else {}}, **fields}
        return await callback.corral_cache.async_pre_call_deployment_hook(request, None) or request

    found: dict[str, Any] = asyncio.run(run())
    return found


def test_a_salt_is_the_keys_own_and_not_the_clients_choice(callback: ModuleType) -> None:
    salts = [
        sent(callback, key, "cache_salt", cache_salt="x", extra_body={"cache_salt": "y", "top_k": 5})
        for key in ("sk-alice", "sk-mallory", "sk-alice")
    ]
    first, second, third = (request["extra_body"]["cache_salt"] for request in salts)
    assert first == third != second
    assert hash_of("sk-alice")[:32] != first
    assert salts[0]["extra_body"] == {"top_k": 5, "cache_salt": first}
    assert "cache_salt" not in salts[0]


def test_llama_servers_get_no_choice_and_others_are_left_alone(callback: ModuleType) -> None:
    request = sent(callback, "sk-alice", "cache_prompt", cache_prompt=True, id_slot=1)
    assert request["extra_body"] == {"cache_prompt": False}
    assert not {"cache_prompt", "id_slot"} & set(request)
    assert sent(callback, "sk-alice", "", cache_prompt=True)["cache_prompt"] is True


SITE = """
schema_version: 1
name: caches
hosts: {here: {runtime: local}}
models: {tiny: {source: chat.gguf, kind: chat, size_gib: 0.01}}
pools:
  chat: {model: tiny, on: {host: here}%s}
  other: {model: tiny, on: {host: here}}
gateway: {host: here%s}
%s
"""


@pytest.mark.parametrize(
    ("pool", "gateway", "consumers", "is_private"),
    [
        ("", "", "", False),
        ("", "", "consumers: {a: {}}", False),
        ("", "", "consumers: {a: {}, b: {pools: [other]}}", False),
        ("", "", "consumers: {a: {}, b: {pools: [chat]}}", True),
        ("", ", entrance: {}", "", True),
        (", cache: private", "", "", True),
        (", cache: shared", ", entrance: {}", "consumers: {a: {}, b: {}}", False),
    ],
)
def test_a_pool_that_several_keys_may_open_is_private(
    pool: str, gateway: str, consumers: str, *, is_private: bool
) -> None:
    inventory = validate(parse(SITE % (pool, gateway, consumers), "inventory.yaml")).inventory
    assert has_private_cache(inventory, "chat") is is_private
