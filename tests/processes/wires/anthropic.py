"""A fake of Anthropic's Messages API, plain and streamed, as its reference of version 2023-06-01 describes it.

    python -m tests.processes.wires.anthropic PORT

It wants its key in `x-api-key`. A request whose last message is the name of an error gets that error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

from tests.processes.wires.orders import LOOPBACK, Order, Seen

SEEN = Seen()
KEY = "value-of-the-key"
STOPS = {"stop": "end_turn", "length": "max_tokens"}
ERRORS = {
    "authentication_error": 401,
    "rate_limit_error": 429,
    "overloaded_error": 529,
    "api_error": 500,
    "invalid_request_error": 400,
}
SENT, RECEIVED = 7, 3


async def messages(request: web.Request) -> web.StreamResponse:
    """`POST /v1/messages`."""
    body = await request.json()
    with SEEN.request(request.path, dict(request.headers), body) as order:
        if request.headers.get("x-api-key") != KEY:
            return _error("authentication_error", 401)
        last = body["messages"][-1]["content"]
        text = last if isinstance(last, str) else last[-1].get("text", "")
        if text in ERRORS:
            return _error(text, ERRORS[text])
        await asyncio.sleep(order.service_s)
        return await _stream(request, body, order) if body.get("stream") else _plain(body, order)


def _error(kind: str, status: int) -> web.Response:
    headers = {"retry-after": "7"} if status == 429 else {}
    error = {"type": kind, "message": f"{kind}: organization org-of-the-account"}
    return web.json_response({"type": "error", "error": error}, status=status, headers=headers)


def _head(body: dict[str, Any]) -> dict[str, Any]:
    usage = {"input_tokens": SENT, "output_tokens": 1}
    head = {"id": "msg_01", "type": "message", "role": "assistant", "model": body["model"], "content": []}
    return head | {"stop_reason": None, "stop_sequence": None, "usage": usage}


def _plain(body: dict[str, Any], order: Order) -> web.Response:
    usage = {"input_tokens": SENT, "output_tokens": RECEIVED}
    content = [{"type": "text", "text": "".join(order.say)}]
    end = {"stop_reason": STOPS[order.finish], "content": content, "usage": usage}
    return web.json_response(_head(body) | end)


async def _stream(request: web.Request, body: dict[str, Any], order: Order) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for kind, fields in _events(body, order):
        packet = json.dumps({"type": kind, **fields}, ensure_ascii=False)
        await response.write(f"event: {kind}\ndata: {packet}\n\n".encode())
        await asyncio.sleep(0)
    return response


def _events(body: dict[str, Any], order: Order) -> list[tuple[str, dict[str, Any]]]:
    deltas = [{"index": 0, "delta": {"type": "text_delta", "text": text}} for text in order.say]
    end = {"stop_reason": STOPS[order.finish], "stop_sequence": None}
    return [
        ("message_start", {"message": _head(body)}),
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        ("ping", {}),
        *(("content_block_delta", delta) for delta in deltas),
        ("content_block_stop", {"index": 0}),
        ("message_delta", {"delta": end, "usage": {"output_tokens": RECEIVED}}),
        ("message_stop", {}),
    ]


async def told(_request: web.Request) -> web.Response:
    """What the fake has seen."""
    return web.json_response(SEEN.told())


if __name__ == "__main__":
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_post("/v1/messages", messages)
    app.router.add_get("/seen", told)
    web.run_app(app, host=LOOPBACK, port=int(sys.argv[1]), print=None, access_log=None)
