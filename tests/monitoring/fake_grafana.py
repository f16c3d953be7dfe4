"""A stand-in for Grafana's HTTP interface, as far as `grafana push` uses it.

Paths, states and bodies are those of Grafana's sources (`pkg/api`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.processes.helpers import serving_http

TOKEN = "glsa_of_a_test"
Answer = tuple[int, Any]


@dataclass
class FakeGrafana:
    """What it has, and what it saw."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    # Titles by uid.
    folders: dict[str, str] = field(default_factory=dict)
    pages: dict[str, dict[str, Any]] = field(default_factory=dict)
    provisioned: set[str] = field(default_factory=set)
    role: str = "Admin"
    is_grafana: bool = True
    prefix: str = ""
    url: str = ""

    def add_source(self, name: str, *, uid: str = "", kind: str = "prometheus", is_default: bool = False) -> None:
        """Adds a data source as Grafana lists it."""
        number = len(self.sources) + 1
        self.sources.append(
            {
                "id": number, "uid": uid or name, "orgId": 1, "name": name, "type": kind, "access": "proxy",
                "url": "http://127.0.0.1:9090", "isDefault": is_default, "jsonData": {}, "readOnly": True,
            }
        )  # fmt: skip

    def answer(self, method: str, path: str, authorization: str, body: Any) -> Answer:
        """The state and body of an answer."""
        if not self.is_grafana or not path.startswith(f"{self.prefix}/api/"):
            return 200, "<html>something else</html>"
        path = path.removeprefix(f"{self.prefix}/api")
        if path == "/health":
            return 200, {"commit": "0", "database": "ok", "version": "13.1.3"}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key", "messageId": "api-key.invalid", "statusCode": 401}
        answers = {
            ("GET", "/datasources"): self._list_sources,
            ("GET", "/folders"): lambda _: (200, [{"uid": uid, "title": name} for uid, name in self.folders.items()]),
            ("POST", "/folders"): self._make_folder,
            ("POST", "/dashboards/db"): self._save,
        }
        return answers[method, path](body)

    def _list_sources(self, _body: Any) -> Answer:
        if self.role != "Admin":
            words = "You'll need additional permissions to perform this action. Permissions needed: datasources:read"
            return 403, {"message": words, "accessErrorId": "ACE0", "title": "Access denied"}
        return 200, self.sources

    def _make_folder(self, body: Any) -> Answer:
        uid = f"folder-{len(self.folders) + 1}"
        self.folders[uid] = body["title"]
        return 200, {"id": len(self.folders), "uid": uid, "title": body["title"]}

    def _save(self, body: Any) -> Answer:
        page = body["dashboard"]
        if page["uid"] in self.provisioned:
            return 400, {"message": "Cannot save provisioned dashboard"}
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        if page["uid"] in self.pages and not body["overwrite"]:
            return 412, {"status": "version-mismatch", "message": "The dashboard has been changed by someone else"}
        self.pages[page["uid"]] = page | {"id": 1}
        return 200, {"id": 1, "uid": page["uid"], "status": "success", "url": f"/d/{page['uid']}", "version": 1}


@contextmanager
def running(fake: FakeGrafana) -> Iterator[FakeGrafana]:
    """The stand-in on a free port of the loopback address; its `url` says which."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_words: Any) -> None:
            """Says nothing."""

        def _answer(self, body: Any) -> None:
            state, answer = fake.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            kind = "text/html" if isinstance(answer, str) else "application/json"
            text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(state)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    with serving_http(Handler) as port:
        fake.url = f"http://127.0.0.1:{port}{fake.prefix}"
        yield fake
