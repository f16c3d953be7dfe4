"""The toy itself: `server.py PORT`; it speaks as much of OpenAI's protocol as the balancer and a client need."""

from __future__ import annotations

import configparser
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SETTINGS = configparser.ConfigParser()
SETTINGS.read("/etc/corral/settings.ini")
TOY = SETTINGS["toy"]
KEY = Path(os.environ["TOY_KEY_FILE"]).read_text(encoding="utf-8").strip()


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    def do_GET(self) -> None:
        """Health and metrics, without a key."""
        self._answer(200, {"status": "ok"})

    def do_POST(self) -> None:
        """A chat."""
        self.rfile.read(int(self.headers["Content-Length"]))
        is_known = self.headers["Authorization"] == f"Bearer {KEY}"
        message = {"role": "assistant", "content": "ready to play"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": TOY["model"], "choices": choices}
        self._answer(200 if is_known else 401, answer if is_known else {"error": {"message": "wrong key"}})

    def _answer(self, status: int, data: object) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if not Path("/models", TOY["folder"], "spring").exists():
    sys.exit(f"no spring in {TOY['folder']}")
ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
