"""Fake OpenAI-style servers that count exactly what reaches them, all in one process of their own.

    python tests/processes/fakes.py CONTROL_PORT NAME:PORT:SLOTS …

A fake answers at once unless told otherwise, or asked for a `service_s` by the request itself. `24 stamps, 30 ms apart`
in its text gets a stream of so many tokens, each of which is the time at which it was written, and a request that
insists on a function gets a call of it. `Fakes` is how a test starts them, tells them and asks what they saw.
Real servers answer real questions elsewhere; these are for timing, counting and misbehaving at will.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from aiohttp import web

LOOPBACK = "127.0.0.1"
# Pieces of a streamed answer.
PIECES = 6
PIECES_BEFORE_BREAK = 3
INFERENCE_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
HEALTH_PATHS = ("/health", "/v1/models")

# A request with this word in it gets 500, whatever the manner.
POISON = "poison"
STAMPS = re.compile(r"(\d+) stamps, (\d+) ms apart")

# `hold`: wait until told otherwise; `refuse`: the port is closed; `error`: 500; `break`: cut the answer in the middle;
# `loading`: 503 to everything, as llama-server while it loads; `mute`: accepts, and answers nothing, not even health.
Manner = Literal["answer", "hold", "refuse", "error", "break", "loading", "mute"]


@dataclass
class Seen:
    """What one fake has seen since it was last reset."""

    # Requests for inference.
    arrivals: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    # Requests whose client went away before the answer was complete.
    left: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    # How often every path was asked for that does no inference.
    other_paths: dict[str, int] = field(default_factory=dict)


class Fake:
    """One server: its manner, and what it saw."""

    def __init__(self, name: str, port: int, slots: int) -> None:
        self.name = name
        self.port = port
        self.slots = slots
        self.seen = Seen()
        self.manner: Manner = "answer"
        self.service_s = 0.0
        self._released = asyncio.Event()
        self._site: web.TCPSite | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listens from now on."""
        app = web.Application(client_max_size=16 << 20)
        for path in INFERENCE_PATHS:
            app.router.add_post(path, self._infer)
        app.router.add_route("*", "/{path:.*}", self._other)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        await self._listen()

    async def tell(self, manner: Manner, service_s: float) -> None:
        """Behaves so from now on; held requests go on."""
        self.manner, self.service_s = manner, service_s
        self._released.set()
        self._released = asyncio.Event()
        if manner == "refuse" and self._site is not None:
            await self._site.stop()
            self._site = None
            self._hang_up()
        elif manner != "refuse" and self._site is None:
            await self._listen()

    def reset(self) -> None:
        """Forgets what it saw; what is in flight stays in flight."""
        now = self.seen.in_flight
        self.seen = Seen(in_flight=now, most_in_flight=now)

    async def _listen(self) -> None:
        assert self._runner is not None
        self._site = web.TCPSite(self._runner, LOOPBACK, self.port, reuse_address=True)
        await self._site.start()

    def _hang_up(self) -> None:
        """Ends connections that are kept open for further requests, as a program that is gone does."""
        assert self._runner is not None
        for connection in list(self._runner.server.connections) if self._runner.server else []:
            if connection._current_request is None:
                connection.force_close()

    async def _other(self, request: web.Request) -> web.Response:
        self.seen.other_paths[request.path] = self.seen.other_paths.get(request.path, 0) + 1
        if request.path not in HEALTH_PATHS:
            raise web.HTTPNotFound
        if self.manner == "mute":
            await self._released.wait()
        if self.manner == "loading":
            return _loading()
        return web.json_response({"status": "ok", "object": "list", "data": []})

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        seen = self.seen
        seen.arrivals += 1
        seen.in_flight += 1
        seen.most_in_flight = max(seen.most_in_flight, seen.in_flight)
        try:
            body = await request.json()
            seen.bodies.append(body)
            seen.headers.append(dict(request.headers))
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            seen.left += 1
            raise
        finally:
            seen.in_flight -= 1
            if self.seen is not seen:  # reset in the meantime
                self.seen.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        manner = self.manner
        if manner == "error" or POISON in json.dumps(body):
            return web.json_response({"error": {"message": "broken on purpose", "code": 500}}, status=500)
        if manner == "loading":
            return _loading()
        if manner == "mute":
            await self._released.wait()
        if body.get("stream"):
            return await self._stream(request, body, manner)
        if manner == "hold":
            await self._released.wait()
        await asyncio.sleep(body.get("service_s", self.service_s))
        if manner == "break":
            self._cut(request)
        if request.path.endswith("/embeddings"):
            item = {"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}
            return web.json_response({"object": "list", "model": self.name, "data": [item], "usage": _usage()})
        message: dict[str, Any] = {"role": "assistant", "content": f"answer of {self.name}"}
        if calls := _calls(body):
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        return web.json_response(self._head("chat.completion") | {"choices": [choice], "usage": _usage()})

    async def _stream(self, request: web.Request, body: dict[str, Any], manner: Manner) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if calls := _calls(body):
            await response.write(self._chunk(body, {"role": "assistant", "tool_calls": calls}, None))
        stamps = STAMPS.search(json.dumps(body))
        count, gap_s = (int(stamps[1]), int(stamps[2]) / 1000) if stamps else (PIECES, self.service_s / PIECES)
        for number in range(0 if calls else count):
            if number == PIECES_BEFORE_BREAK and manner == "break":
                self._cut(request)
            if number == PIECES_BEFORE_BREAK and manner == "hold":
                await self._released.wait()
            text = f"{time.monotonic():.6f} " if stamps else f"piece{number} "
            await response.write(self._chunk(body, {"role": "assistant", "content": text}, None))
            await asyncio.sleep(gap_s)
        await response.write(self._chunk(body, {}, "tool_calls" if calls else "stop"))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _chunk(self, body: dict[str, Any], delta: dict[str, Any], finish: str | None) -> bytes:
        """One event of a stream, of a chat or of a legacy completion."""
        kind, said = "chat.completion.chunk", {"delta": delta}
        if "prompt" in body:
            kind, said = "text_completion", {"text": delta.get("content", "")}
        chunk = self._head(kind) | {"choices": [{"index": 0, "finish_reason": finish, **said}]}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"fake-{self.name}", "created": 1, "model": self.name, "object": kind}

    @staticmethod
    def _cut(request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("broken on purpose")


def _calls(body: dict[str, Any]) -> list[dict[str, Any]]:
    """A call of the function that a request insists on."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return []
    function = {"name": choice["function"]["name"], "arguments": '{"city": "Paris"}'}
    return [{"index": 0, "id": "call-1", "type": "function", "function": function}]


def _loading() -> web.Response:
    error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    return web.json_response({"error": error}, status=503)


def _usage() -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


async def serve(control_port: int, fakes: list[Fake]) -> None:
    """Runs the fakes and the port on which they are told and asked."""
    by_name = {fake.name: fake for fake in fakes}

    async def ask(_request: web.Request) -> web.Response:
        return web.json_response({name: asdict(fake.seen) for name, fake in by_name.items()})

    async def tell(request: web.Request) -> web.Response:
        order = await request.json()
        for name in order["names"]:
            await by_name[name].tell(order["manner"], order["service_s"])
        return web.json_response({})

    async def reset(_request: web.Request) -> web.Response:
        for fake in fakes:
            fake.reset()
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/", ask)
    app.router.add_post("/tell", tell)
    app.router.add_post("/reset", reset)
    for fake in fakes:
        await fake.start()
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, control_port).start()
    await asyncio.Event().wait()


class Fakes:
    """The fakes as a test sees them."""

    def __init__(self, control_port: int) -> None:
        self.client = httpx.Client(base_url=f"http://{LOOPBACK}:{control_port}", trust_env=False, timeout=10)

    def seen(self) -> dict[str, Seen]:
        """What every fake saw since the last reset."""
        return {name: Seen(**facts) for name, facts in self.client.get("/").raise_for_status().json().items()}

    def arrivals(self, names: Iterable[str]) -> dict[str, int]:
        """Requests for inference that reached each of these."""
        seen = self.seen()
        return {name: seen[name].arrivals for name in names}

    def in_flight(self, names: Iterable[str]) -> int:
        """Requests that these are working on right now, together."""
        seen = self.seen()
        return sum(seen[name].in_flight for name in names)

    def tell(self, names: Iterable[str], manner: Manner = "answer", service_s: float = 0.0) -> None:
        """Makes these behave so from now on."""
        order = {"names": list(names), "manner": manner, "service_s": service_s}
        self.client.post("/tell", json=order).raise_for_status()

    def reset(self) -> None:
        """All of them forget what they saw."""
        self.client.post("/reset").raise_for_status()

    @contextmanager
    def behaving(self, names: Iterable[str], manner: Manner = "answer", service_s: float = 0.0) -> Iterator[None]:
        """Makes these behave so for a while."""
        chosen = list(names)
        self.tell(chosen, manner, service_s)
        try:
            yield
        finally:
            self.tell(chosen)


def command(control_port: int, fakes: Iterable[tuple[str, int, int]]) -> list[str]:
    """The command line that starts fakes, each given as name, port and slots."""
    words = [f"{name}:{port}:{slots}" for name, port, slots in fakes]
    return [sys.executable, str(Path(__file__)), str(control_port), *words]


if __name__ == "__main__":
    given = [word.split(":") for word in sys.argv[2:]]
    asyncio.run(serve(int(sys.argv[1]), [Fake(name, int(port), int(slots)) for name, port, slots in given]))
