"""A stand-in for Grafana's HTTP interface, as far as `grafana push | check` use it, before a real Prometheus.

Paths, states and bodies are those of Grafana's sources (`pkg/api`, `pkg/promlib`): a query that fails makes the whole
answer a 400 with its `error` in `results`, an empty one has no frames, what is not a number is null beside `entities`.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx

from tests.processes.helpers import serving_http

TOKEN = "glsa_of_a_test"
PASSWORD = "of a test"
STEP_S = 30
Answer = tuple[int, Any]


@dataclass
class FakeGrafana:
    """What it has, and what it saw."""

    prometheus: str = ""
    now: float = 0
    """The moment that it takes for the present."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)
    """Titles by uid."""
    pages: dict[str, dict[str, Any]] = field(default_factory=dict)
    provisioned: set[str] = field(default_factory=set)
    role: str = "Admin"
    is_grafana: bool = True
    prefix: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def add_source(self, name: str, *, uid: str = "", kind: str = "prometheus", is_default: bool = False) -> None:
        """Adds a data source as Grafana lists it."""
        number = len(self.sources) + 1
        self.sources.append(
            {
                "id": number, "uid": uid or name, "orgId": 1, "name": name, "type": kind, "access": "proxy",
                "url": self.prometheus, "isDefault": is_default, "jsonData": {}, "readOnly": True,
            }
        )  # fmt: skip

    def answer(self, method: str, path: str, authorization: str, body: Any) -> Answer:
        """The state and body of an answer."""
        if not self.is_grafana or not path.startswith(f"{self.prefix}/api/"):
            return 200, "<html>something else</html>"
        path = path.removeprefix(f"{self.prefix}/api")
        if path == "/health":
            return 200, {"commit": "0", "database": "ok", "version": "13.1.3"}
        admin = "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        if authorization not in {f"Bearer {TOKEN}", admin}:
            return 401, {"message": "Invalid API key", "messageId": "api-key.invalid", "statusCode": 401}
        if found := re.fullmatch(r"/datasources/uid/([^/]+)/health", path):
            return self._health(found[1])
        if found := re.fullmatch(r"/dashboards/uid/([^/]+)", path):
            page = self.pages.get(found[1])
            return (200, {"meta": {}, "dashboard": page}) if page else (404, {"message": "Dashboard not found"})
        answers = {
            ("GET", "/datasources"): self._list_sources,
            ("GET", "/folders"): lambda _: (200, [{"uid": uid, "title": name} for uid, name in self.folders.items()]),
            ("POST", "/folders"): self._make_folder,
            ("POST", "/dashboards/db"): self._save,
            ("POST", "/ds/query"): self._query,
        }
        return answers[method, path](body)

    def _list_sources(self, _body: Any) -> Answer:
        if self.role != "Admin":
            words = "You'll need additional permissions to perform this action. Permissions needed: datasources:read"
            return 403, {"message": words, "accessErrorId": "ACE0", "title": "Access denied"}
        return 200, self.sources

    def _health(self, uid: str) -> Answer:
        source = next(item for item in self.sources if item["uid"] == uid)
        try:
            httpx.get(f"{source['url']}/-/ready", trust_env=False)
        except httpx.HTTPError:
            return 400, {"message": "connection refused - There was an error", "status": "ERROR"}
        return 200, {"message": "Successfully queried the Prometheus API.", "status": "OK"}

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

    def _query(self, body: Any) -> Answer:
        self.asked.append(body)
        assert re.fullmatch(r"now-\d+h", body["from"]), body["from"]
        assert body["to"] == "now"
        hours = int(body["from"].removeprefix("now-").removesuffix("h"))
        results = {query["refId"]: self._result(query, hours) for query in body["queries"]}
        return 400 if any("error" in result for result in results.values()) else 200, {"results": results}

    def _result(self, query: Mapping[str, Any], hours: int) -> dict[str, Any]:
        if not any(source["uid"] == query["datasource"]["uid"] for source in self.sources):
            return {"error": "Data source not found", "errorSource": "downstream", "status": 404}
        expression = query["expr"].replace("$__rate_interval", "2m").replace("$__range", f"{hours}h")
        if query["instant"]:
            path, times = "query", {"time": self.now}
        else:
            path, times = "query_range", {"start": self.now - 3600 * hours, "end": self.now, "step": STEP_S}
        got = httpx.get(
            f"{self.prometheus}/api/v1/{path}", params={"query": expression, **times}, trust_env=False, timeout=60
        )
        if not got.is_success:
            told = got.json()
            return {"error": f"{told['errorType']}: {told['error']}", "errorSource": "downstream", "status": 400}
        return {"status": 200, "frames": [_frame(series) for series in got.json()["data"]["result"]]}


def _frame(series: Mapping[str, Any]) -> dict[str, Any]:
    """A series in Grafana's form."""
    points = series["values"] if "values" in series else [series["value"]]
    numbers = [float(value) for _, value in points]
    plain = [number if math.isfinite(number) else None for number in numbers]
    frame: dict[str, Any] = {
        "schema": {
            "meta": {"type": "timeseries-multi", "typeVersion": [0, 1]},
            "fields": [
                {"name": "Time", "type": "time", "typeInfo": {"frame": "time.Time"}},
                {
                    "name": "Value",
                    "type": "number",
                    "typeInfo": {"frame": "float64"},
                    "labels": series["metric"],
                },
            ],
        },
        "data": {"values": [[int(float(when) * 1000) for when, _ in points], plain]},
    }
    if None in plain:
        frame["data"]["entities"] = [None, {"NaN": [index for index, value in enumerate(plain) if value is None]}]
    return frame


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
