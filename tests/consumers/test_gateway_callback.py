"""What the gateway's callback makes of LiteLLM's own words for a backend that is not there, over a real connection."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest

from corral.components.litellm import DIRECT_CALLS
from tests.callbacks import load_callback

ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


@pytest.fixture(scope="module")
def gateway() -> ModuleType:
    return load_callback("corral_errors")


@pytest.fixture(params=[True, False], ids=["direct calls", "library"], autouse=True)
def _transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DIRECT_CALLS.items():
        if request.param:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)


@asynccontextmanager
async def server(*, answers: int, end: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """The port of a server that answers so many requests on a connection, then sends `end` and closes; what it got."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for number in range(answers + 1):
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                got.append(await reader.readexactly(length))
                writer.write(whole_answer() if number < answers else end)
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1], got


def whole_answer() -> bytes:
    body = json.dumps(ANSWER).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def ask(port: int, *, stream: bool = False) -> Any:
    import litellm

    return await litellm.acompletion(
        model="openai/m",
        api_base=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        messages=[{"role": "user", "content": "hello"}],
        max_retries=0,
        num_retries=0,
        stream=stream,
    )


async def status_after(gateway: ModuleType, port: int, *, stream: bool = False) -> int:
    """The status that a client would get."""
    with pytest.raises(Exception) as failed:  # noqa: PT011 - which class it is, is LiteLLM's affair
        await ask(port, stream=stream)
    await gateway.corral_errors.async_post_call_failure_hook({"model": ""}, failed.value, None)
    return int(vars(failed.value)["status_code"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("answers", [0, 1], ids=["first request", "connection used before"])
def test_who_closes_without_a_word_was_not_there_and_is_asked_once(
    gateway: ModuleType, answers: int, *, stream: bool
) -> None:
    """B5: HAProxy does so when it finds nobody for a later request of a connection; nobody but it tries again."""

    async def run() -> None:
        async with server(answers=answers, end=b"") as (port, got):
            for _ in range(answers):
                assert (await ask(port)).choices[0].message.content == "hello"
            assert await status_after(gateway, port, stream=stream) == 503
            assert len(got) == answers + 1

    asyncio.run(run())


def test_who_is_not_listening_was_not_there(gateway: ModuleType) -> None:
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        assert asyncio.run(status_after(gateway, bound.getsockname()[1])) == 503


def test_a_broken_answer_is_an_error_and_nobody_asks_again(gateway: ModuleType) -> None:
    async def run() -> None:
        async with server(answers=0, end=whole_answer()[:-9]) as (port, got):
            assert await status_after(gateway, port) in {500, 503}
            assert len(got) == 1

    asyncio.run(run())
