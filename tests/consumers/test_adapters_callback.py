"""What the callback for LoRA adapters makes of requests (005-4); `tests/processes` sends real ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.callbacks import load_callback

SQL = [{"id": 0, "scale": 1.0}]
ABLE: dict[str, Any] = {"model_info": {"id": "chat", "adapters": {"chat:sql": {"lora": SQL}}}}
VLLM: dict[str, Any] = {"model_info": {"id": "chat", "adapters": {"chat:sql": {"model": "chat:sql"}}}}
OTHER: dict[str, Any] = {"model_info": {"id": "mac"}}


async def sent(asked: str, deployment: dict[str, Any], **fields: Any) -> Any:
    """What of `extra_body` the deployment gets."""
    callback = load_callback("corral_adapters").corral_adapters
    await callback.async_pre_call_hook(None, None, {"model": asked}, "acompletion")
    changed = await callback.async_pre_call_deployment_hook({"metadata": deployment, **fields}, None)
    return None if changed is None else changed["extra_body"]


@pytest.mark.parametrize(
    ("asked", "deployment", "fields", "expected"),
    [
        ("chat:sql", ABLE, {}, {"lora": SQL}),
        ("chat:sql", ABLE, {"extra_body": {"top_k": 3}}, {"top_k": 3, "lora": SQL}),
        ("chat", ABLE, {}, None),
        ("chat:sql", OTHER, {}, None),
        ("chat:sql", ABLE, {"extra_body": {"lora": []}}, None),
        ("chat:sql", ABLE, {"lora": []}, None),
    ],
)
def test_an_adapter_goes_into_the_body(asked: str, deployment: Any, fields: Any, expected: Any) -> None:
    assert asyncio.run(sent(asked, deployment, **fields)) == expected


def test_where_an_adapter_is_a_model_its_name_takes_the_place_of_the_pools() -> None:
    async def changed() -> Any:
        callback = load_callback("corral_adapters").corral_adapters
        await callback.async_pre_call_hook(None, None, {"model": "chat:sql"}, "acompletion")
        request = {"metadata": VLLM, "model": "openai/chat", "extra_body": {"top_k": 3}}
        return await callback.async_pre_call_deployment_hook(request, None)

    assert asyncio.run(changed()) == {"metadata": VLLM, "model": "openai/chat:sql", "extra_body": {"top_k": 3}}


async def chosen(asked: str, *deployments: dict[str, Any]) -> Any:
    callback = load_callback("corral_adapters").corral_adapters
    await callback.async_pre_call_hook(None, None, {"model": asked}, "acompletion")
    return await callback.async_filter_deployments("chat", list(deployments), None)


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [
        ("chat:sql", (ABLE, OTHER), [ABLE]),
        ("chat", (ABLE, OTHER), [ABLE, OTHER]),
        ("chat:sql", (OTHER,), [OTHER]),
    ],
)
def test_who_has_the_adapter_is_asked(asked: str, there: Any, expected: Any) -> None:
    assert asyncio.run(chosen(asked, *there)) == expected
