"""How LiteLLM leases a slot of a pool of unlike servers (000-07, 000-09); a fake stands in for HAProxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import litellm
import pytest
from aiohttp import web
from litellm.exceptions import APIError, RateLimitError

from tests.callbacks import load_callback

CLOUD = {"litellm_params": {"model": "openai/gpt"}, "model_info": {}}
DEAD = "http://127.0.0.1:9"
REQUEST = {"extra_headers": {"x-corral-consumer": "me", "x-other": "1"}}
Answer = Callable[[str, dict[str, str]], Awaitable[tuple[int, str]]]


@pytest.fixture
def leases() -> ModuleType:
    return load_callback("corral_leases")


@asynccontextmanager
async def haproxy(answer: Answer) -> AsyncIterator[tuple[str, list[str]]]:
    """Address of a fake, and the pools of which it has leased slots that are in use; `answer` says status and group."""
    held: list[str] = []

    async def lease(request: web.Request) -> web.StreamResponse:
        pool = request.match_info["pool"]
        status, group = await answer(pool, dict(request.headers))
        if status != 200:
            text = '{"error":{"message":"it is full"}}'
            return web.Response(status=status, text=text, headers={"Retry-After": "5"})
        response = web.StreamResponse(headers={"x-corral-group": group})
        await response.prepare(request)
        held.append(pool)
        try:
            while True:
                await response.write(b"\n")
                await asyncio.sleep(0.01)
        finally:
            held.remove(pool)

    app = web.Application()
    app.router.add_get("/{pool}", lease)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", held
    finally:
        await runner.cleanup()


def node(base: str, pool: str, name: str) -> dict[str, Any]:
    where = {"api_base": f"{base}/{pool}.{name}/any/v1"}
    return {"model_name": pool, "litellm_params": where, "model_info": {"lease_url": f"{base}/{pool}"}}


async def chosen(leases: ModuleType, deployments: list[Any], **request: Any) -> list[Any]:
    found: list[Any] = await leases.corral_leases.async_filter_deployments("small", deployments, None, request)
    return found


def play(leases: ModuleType, scene: Coroutine[Any, Any, Any]) -> None:
    """Runs a scene, and closes the callback's connections in its loop."""

    async def whole() -> None:
        try:
            await scene
        finally:
            await leases.corral_leases.close()

    asyncio.run(whole())


async def until(held: list[str], wanted: list[str]) -> None:
    async with asyncio.timeout(5):
        while held != wanted:  # noqa: ASYNC110 - the fake says nothing when a client leaves
            await asyncio.sleep(0.01)


def test_slot_is_leased_for_as_long_as_the_request_lasts(leases: ModuleType) -> None:
    seen: list[dict[str, str]] = []

    async def answer(pool: str, headers: dict[str, str]) -> tuple[int, str]:
        seen.append(headers)
        return 200, f"{pool}.b"

    async def run() -> None:
        async with haproxy(answer) as (base, held):
            nodes = [node(base, "small", "a"), node(base, "small", "b")]

            async def request() -> None:
                await leases.corral_leases.async_pre_call_hook(None, None, {}, "acompletion")
                # LiteLLM makes the call in a task of its own, which ends before the answer does.
                assert await asyncio.create_task(chosen(leases, nodes, **REQUEST)) == [nodes[1]]
                await until(held, ["small"])

            await asyncio.create_task(request())
            await until(held, [])
            assert await chosen(leases, nodes) == nodes  # LiteLLM counts tokens

    play(leases, run())
    assert [headers.get("x-corral-consumer") for headers in seen] == ["me"]
    assert "x-other" not in seen[0]


@pytest.mark.parametrize(("status", "kind"), [(429, RateLimitError), (503, APIError)])
def test_refusal_is_the_balancers_own(leases: ModuleType, status: int, kind: type[Any]) -> None:
    async def answer(_pool: str, _headers: dict[str, str]) -> tuple[int, str]:
        return status, ""

    async def run() -> None:
        async with haproxy(answer) as (base, _):
            nodes = [node(base, "small", "a"), CLOUD]
            if status == 503:
                assert await chosen(leases, nodes, **REQUEST) == [CLOUD]
            with pytest.raises(kind, match="it is full") as refusal:
                await chosen(leases, nodes[:1] if status == 503 else nodes, **REQUEST)
            assert refusal.value.status_code == status
            if status == 429:
                assert refusal.value.response.headers["retry-after"] == "5"

    play(leases, run())


def test_balancer_that_is_away_is_503(leases: ModuleType) -> None:
    with pytest.raises(APIError) as refusal:
        play(leases, chosen(leases, [node(DEAD, "small", "a")], **REQUEST))
    assert refusal.value.status_code == 503


@pytest.mark.parametrize(
    ("status", "text", "is_repeated"), [(503, "", True), (500, "", False), (500, "Server disconnected", True)]
)
def test_only_what_no_server_began_gets_another_slot(
    leases: ModuleType, status: int, text: str, *, is_repeated: bool
) -> None:
    async def answer(_pool: str, _headers: dict[str, str]) -> tuple[int, str]:
        return 200, "small.a"

    async def run() -> None:
        async with haproxy(answer) as (base, held):
            nodes = [node(base, "small", "a")]
            await chosen(leases, nodes, **REQUEST)
            failure = APIError(status, text, llm_provider="", model="small")
            await leases.corral_leases.async_post_call_failure_deployment_hook({}, failure, None)
            if is_repeated:
                assert await chosen(leases, nodes, **REQUEST) == nodes
                await until(held, ["small"])
            else:
                with pytest.raises(APIError):
                    await chosen(leases, nodes, **REQUEST)
                await until(held, [])

    play(leases, run())


def test_request_that_may_spill_takes_the_first_slot_and_no_other(
    leases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free = asyncio.Event()

    async def answer(pool: str, _headers: dict[str, str]) -> tuple[int, str]:
        if pool == "small":
            await is_free.wait()
        return 200, f"{pool}.a"

    async def run() -> None:
        async with haproxy(answer) as (base, held):
            small, large = node(base, "small", "a"), node(base, "large", "a")
            router = SimpleNamespace(get_model_list=lambda model_name: [large] if model_name == "large" else [])
            monkeypatch.setattr("litellm.proxy.proxy_server.llm_router", router)
            monkeypatch.setattr(litellm, "callbacks", [SimpleNamespace(spill=lambda _model: ["large"])])
            assert await chosen(leases, [small], **REQUEST) == [large]
            is_free.set()
            await until(held, ["large"])

    play(leases, run())
