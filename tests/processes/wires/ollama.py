"""A fake in the wire format of Ollama (ollama/ollama at fb30760: server/routes.go `ChatHandler`, api/types.go).

`/api/chat` answers with one JSON object, or with JSON lines when `stream` is not false; thoughts come in
`message.thinking`, unless the request says `think: false`; figures stand in the last line. `/api/tags` lists models.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

from tests.processes.wires.orders import LOOPBACK, Order, Seen

SEEN = Seen()
MODELS = ("llama3.2:3b", "qwen3:4b")
FIGURES = {
    "total_duration": 9, "load_duration": 1, "prompt_eval_count": 7, "prompt_eval_duration": 3,
    "eval_count": 3, "eval_duration": 5,
}  # fmt: skip


async def chat(request: web.Request) -> web.StreamResponse:
    """`ChatHandler`."""
    body = await request.json()
    if body.get("model") not in MODELS:
        return web.json_response({"error": f"model '{body.get('model')}' not found"}, status=404)
    with SEEN.request(request.path, dict(request.headers), body) as order:
        if body.get("stream") is not False:
            return await _stream(request, body, order)
        await asyncio.sleep(order.service_s)
        message = {"role": "assistant", "content": "".join(order.say)}
        message |= {"thinking": "".join(order.think)} if order.think and _thinks(body) else {}
        return web.json_response(_line(body, message, done=True) | FIGURES | {"done_reason": order.finish})


async def _stream(request: web.Request, body: dict[str, Any], order: Order) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    thoughts = order.think if _thinks(body) else []
    messages = [{"content": "", "thinking": text} for text in thoughts] + [{"content": text} for text in order.say]
    for message in messages:
        line = _line(body, {"role": "assistant", **message}, done=False)
        await response.write(json.dumps(line).encode() + b"\n")
        await asyncio.sleep(order.service_s / len(messages))
    end = _line(body, {"role": "assistant", "content": ""}, done=True) | FIGURES | {"done_reason": order.finish}
    await response.write(json.dumps(end).encode() + b"\n")
    return response


def _thinks(body: dict[str, Any]) -> bool:
    return body.get("think") is not False


def _line(body: dict[str, Any], message: dict[str, str], *, done: bool) -> dict[str, Any]:
    return {"model": body["model"], "created_at": "2026-01-01T00:00:00.000000Z", "message": message, "done": done}


async def tags(_request: web.Request) -> web.Response:
    """`ListHandler`."""
    return web.json_response({"models": [{"name": name, "model": name, "size": 1} for name in MODELS]})


async def told(_request: web.Request) -> web.Response:
    """What the fake has seen."""
    return web.json_response(SEEN.told())


if __name__ == "__main__":
    app = web.Application()
    app.router.add_post("/api/chat", chat)
    app.router.add_get("/api/tags", tags)
    app.router.add_get("/seen", told)
    web.run_app(app, host=LOOPBACK, port=int(sys.argv[1]), print=None, access_log=None)
