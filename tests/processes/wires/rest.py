"""A fake REST server of OpenAI's protocol behind a key, as LM Studio, vLLM and hosted providers offer it.

    python -m tests.processes.wires.rest PORT HEADER

It answers 401 to what does not carry the key in HEADER (with `Bearer ` before it in `Authorization`), in the words of
vLLM's `AuthenticationMiddleware` (vllm/entrypoints/openai); without HEADER it wants no key. Thoughts stand in
`reasoning_content`, as llama-server and LM Studio put them. No event of a stream arrives in one piece.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.processes.wires.orders import LOOPBACK, Order, Seen

SEEN = Seen()
KEY = "value-of-the-key"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
# Bytes that are written at once.
PART = 7
# What it says: no text of any coding.
SOUND = bytes(range(256)) * 64


@web.middleware
async def authentication(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Lets requests with the key in."""
    if len(sys.argv) == 2:
        return await handler(request)
    header = sys.argv[2]
    wanted = f"Bearer {KEY}" if header.lower() == "authorization" else KEY
    if request.path != "/seen" and request.headers.get(header) != wanted:
        return web.json_response({"error": "Unauthorized"}, status=401)
    return await handler(request)


async def chat(request: web.Request) -> web.StreamResponse:
    """A chat request."""
    body = await request.json()
    with SEEN.request(request.path, dict(request.headers), body) as order:
        if body.get("stream"):
            return await _stream(request, body, order)
        await asyncio.sleep(order.service_s)
        message = {"role": "assistant", "content": "".join(order.say)}
        message |= {"reasoning_content": "".join(order.think)} if order.think else {}
        return web.json_response(_packet({"message": message, **_end(order)}) | {"usage": USAGE})


async def completions(request: web.Request) -> web.StreamResponse:
    """A legacy completion; its prompt is the order."""
    body = await request.json()
    body["messages"] = [{"content": body["prompt"]}]
    with SEEN.request(request.path, dict(request.headers), body) as order:
        if body.get("stream"):
            return await _stream(request, body, order)
        choice = {"text": "".join(order.say), "logprobs": None, **_end(order)}
        return web.json_response(_packet(choice) | {"object": "text_completion", "usage": USAGE})


def _end(order: Order) -> dict[str, Any]:
    """Why the answer ended; vLLM names the stop sequence in `stop_reason`."""
    return {"finish_reason": order.finish, "stop_reason": order.stop}


async def _stream(request: web.Request, body: dict[str, Any], order: Order) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    is_legacy = "prompt" in body
    for key, pieces in (("reasoning_content", [] if is_legacy else order.think), ("content", order.say)):
        for piece in pieces:
            said = {"text": piece} if is_legacy else {"delta": {"role": "assistant", key: piece}}
            raw = _event(body, said | {"finish_reason": None})
            for start in range(0, len(raw), PART):
                await response.write(raw[start : start + PART])
    last: dict[str, Any] = {"text": ""} if is_legacy else {"delta": {}}
    await response.write(_event(body, last | _end(order)))
    if (body.get("stream_options") or {}).get("include_usage"):
        await response.write(_event(body, {}, usage=USAGE))
    await response.write(b"data: [DONE]\n\n")
    return response


def _packet(choice: dict[str, Any]) -> dict[str, Any]:
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "some-model"}
    return head | {"choices": [{"index": 0, **choice}]}


def _event(body: dict[str, Any], choice: dict[str, Any], usage: dict[str, int] | None = None) -> bytes:
    """One event of a stream; the one with the usage has no choice."""
    packet = _packet(choice) | {"object": "text_completion" if "prompt" in body else "chat.completion.chunk"}
    packet |= {"choices": [], "usage": usage} if usage else {}
    return b"data: " + json.dumps(packet, ensure_ascii=False).encode() + b"\n\n"


async def transcriptions(request: web.Request) -> web.StreamResponse:
    """`/v1/audio/transcriptions`: a form with the recording; its prompt is the order."""
    form = await request.post()
    file = form["file"]
    assert isinstance(file, web.FileField)
    fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
    body = fields | {"bytes": len(file.file.read()), "filename": file.filename}
    body["messages"] = [{"content": fields.get("prompt", "")}]
    with SEEN.request(request.path, dict(request.headers), body) as order:
        await asyncio.sleep(order.service_s)
        text = "".join(order.say)
        if fields.get("response_format") in ("text", "srt", "vtt"):
            return web.Response(text=text)
        return web.json_response({"text": text})


async def speech(request: web.Request) -> web.StreamResponse:
    """`/v1/audio/speech`: sound for a text, which is the order."""
    body = await request.json()
    body["messages"] = [{"content": body["input"]}]
    with SEEN.request(request.path, dict(request.headers), body) as order:
        await asyncio.sleep(order.service_s)
        return web.Response(body=SOUND, content_type="audio/mpeg")


async def models(_request: web.Request) -> web.Response:
    """What it serves."""
    return web.json_response({"object": "list", "data": [{"id": "some-model", "object": "model"}]})


async def told(_request: web.Request) -> web.Response:
    """What the fake has seen."""
    return web.json_response(SEEN.told())


if __name__ == "__main__":
    app = web.Application(middlewares=[authentication], client_max_size=64 * 1024**2)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/audio/transcriptions", transcriptions)
    app.router.add_post("/v1/audio/speech", speech)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", models)
    app.router.add_get("/seen", told)
    web.run_app(app, host=LOOPBACK, port=int(sys.argv[1]), print=None, access_log=None)
