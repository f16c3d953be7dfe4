"""A fake in the wire format of InferrLM's server on a phone (sbhjt-gr/InferrLM at b0ee92c, src/services/tcp/http).

It is nearly Ollama's `/api/chat`: `chatCompletionHandler.ts` and `streamChatResponse.ts` put the text into `response`
where Ollama has `message.content`, `settingsBuilder.ts` knows `options.max_tokens` and no `num_predict`. A stream ends
with a line that repeats the whole answer. Every connection is closed. `httpParser.ts` compares the body's length in
characters with `Content-Length`, so that a body with anything but ASCII in it is waited for without end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from tests.processes.wires.orders import LOOPBACK, Seen

SEEN = Seen()
MODELS = ("llama-3.2-3b", "qwen3-4b")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, that is, one request."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        text = ""
        while len(text) < int(headers.get("content-length", 0)):
            part = await reader.read(65536)
            if not part:
                return
            text += part.decode()
        await _answer(writer, f"{method} {path}", headers, text)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _answer(writer: asyncio.StreamWriter, wanted: str, headers: dict[str, str], text: str) -> None:
    if wanted == "GET /api/tags":
        _respond(writer, 200, {"models": [{"name": name, "model_type": "llama"} for name in MODELS]})
    elif wanted == "GET /seen":
        _respond(writer, 200, SEEN.told())
    elif wanted == "POST /api/chat":
        await _chat(writer, headers, json.loads(text))
    else:
        _respond(writer, 404, {"error": "not_found"})
    await writer.drain()


async def _chat(writer: asyncio.StreamWriter, headers: dict[str, str], body: dict[str, Any]) -> None:
    if not isinstance(body.get("messages"), list):
        _respond(writer, 400, {"error": "messages_required"})
        return
    if body.get("model") not in MODELS:
        _respond(writer, 404, {"error": "model_not_found"})
        return
    with SEEN.request("/api/chat", headers, body) as order:
        line: dict[str, Any] = {"model": body["model"], "created_at": "2026-01-01T00:00:00.000Z"}
        if body.get("stream") is not True:
            await asyncio.sleep(order.service_s)
            _respond(writer, 200, line | {"response": "".join(order.say), "done": True})
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
            b"Access-Control-Allow-Origin: *\r\nContent-Type: application/x-ndjson; charset=utf-8\r\n\r\n"
        )
        for piece in order.say:
            _write_chunk(writer, line | {"response": piece, "done": False})
            await writer.drain()
            await asyncio.sleep(order.service_s / len(order.say))
        end = {"response": "", "done": True, "total_duration_ms": 12, "output": "".join(order.say)}
        _write_chunk(writer, line | end)
        writer.write(b"0\r\n\r\n")


def _write_chunk(writer: asyncio.StreamWriter, payload: dict[str, Any]) -> None:
    raw = (json.dumps(payload, ensure_ascii=False) + "\n").encode()
    writer.write(b"%x\r\n%s\r\n" % (len(raw), raw))


def _respond(writer: asyncio.StreamWriter, status: int, payload: dict[str, Any]) -> None:
    raw = json.dumps(payload, ensure_ascii=False).encode()
    head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Type: application/json; charset=utf-8\r\n\r\n" + raw)


async def main(port: int) -> None:
    """Serves until the process is ended."""
    server = await asyncio.start_server(serve, LOOPBACK, port, limit=1 << 20)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
