"""A fake in the wire format of `mlx_lm.server` (mlx-lm 0.32.2, mlx_lm/server.py, `APIHandler`).

What is unlike other servers of OpenAI's protocol: HTTP/1.0 with one connection for each request; 411 without a
`Content-Length`; a body's values checked by type; thoughts in `reasoning`, not `reasoning_content`; comments that keep
a stream alive while the prompt is read; 404 with a text in `error` for a model that cannot be loaded.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.processes.wires.orders import LOOPBACK, Order, Seen

MODEL = "mlx-community/Qwen3-8B-4bit"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
SEEN = Seen()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        """Health, models, and what the fake has seen."""
        known: dict[str, Any] = {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1}]},
            "/seen": SEEN.told(),
        }
        if self.path in known:
            self._send(200, json.dumps(known[self.path]))
        else:
            self._send(404, "Not Found")

    def do_POST(self) -> None:
        """A chat request."""
        if self.path not in ("/v1/chat/completions", "/chat/completions", "/v1/completions"):
            self._send(404, "Not Found")
            return
        if self.headers.get("Content-Length") is None:
            self._send(411, json.dumps({"error": "Content-Length header is required"}))
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if wrong := _wrong(body):
            self._send(400, json.dumps({"error": wrong}))
        elif body.get("model", MODEL) != MODEL:
            self._send(404, json.dumps({"error": f"Repository Not Found: {body['model']}"}))
        else:
            if "prompt" in body:
                body["messages"] = [{"content": body["prompt"]}]
            with SEEN.request(self.path, dict(self.headers), body) as order:
                self._stream(body, order) if body.get("stream") else self._answer(body, order)

    def _answer(self, body: dict[str, Any], order: Order) -> None:
        time.sleep(order.service_s)
        thoughts, text = "".join(_thoughts(body, order)), "".join(order.say)
        message = {"role": "assistant", "content": text or None} | ({"reasoning": thoughts} if thoughts else {})
        said = {"text": text} if "prompt" in body else {"message": message}
        self._send(200, json.dumps(_packet(body, said | {"finish_reason": order.finish}) | {"usage": USAGE}))

    def _stream(self, body: dict[str, Any], order: Order) -> None:
        self._head(200, "text/event-stream")
        self._write(": keepalive 0/7")
        for key, pieces in (("reasoning", _thoughts(body, order)), ("content", order.say)):
            for piece in pieces:
                self._event(_chunk(body, {key: piece}, None))
                time.sleep(order.service_s / len(pieces))
        self._event(_chunk(body, {}, order.finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            self._event(_packet(body, {}) | {"choices": [], "usage": USAGE})
        self._write("data: [DONE]")

    def _event(self, packet: dict[str, Any]) -> None:
        self._write(f"data: {json.dumps(packet)}")

    def _write(self, line: str) -> None:
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, text: str) -> None:
        self._head(status, "application/json")
        self.wfile.write(text.encode())

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-type", kind)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


def _thoughts(body: dict[str, Any], order: Order) -> list[str]:
    if "prompt" in body:
        return []
    return order.think if body.get("chat_template_kwargs", {}).get("enable_thinking", True) else []


def _wrong(body: dict[str, Any]) -> str:
    """What `validate_model_parameters` refuses of the fields that clients send most."""
    kinds: dict[str, tuple[type, ...]] = {"stream": (bool,), "max_tokens": (int,), "temperature": (int, float)}
    for name, wanted in kinds.items():
        if name in body and not isinstance(body[name], wanted):
            return f"{name} must be of type {wanted}"
    return ""


def _chunk(body: dict[str, Any], delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    """One event of a stream, of a chat or of a legacy completion."""
    said = {"text": delta.get("content", "")} if "prompt" in body else {"delta": {"role": "assistant", **delta}}
    return _packet(body, said | {"finish_reason": finish}, ".chunk")


def _packet(body: dict[str, Any], choice: dict[str, Any], suffix: str = "") -> dict[str, Any]:
    kind = "text_completion" if "prompt" in body else f"chat.completion{suffix}"
    head = {"id": "chatcmpl-1", "system_fingerprint": "0.32.2", "model": MODEL, "created": 1}
    return head | {"object": kind, "choices": [{"index": 0} | choice]}


if __name__ == "__main__":
    ThreadingHTTPServer((LOOPBACK, int(sys.argv[1])), Handler).serve_forever()
