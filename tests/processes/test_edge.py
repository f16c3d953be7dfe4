"""The balancer and another host's edge as real HAProxies on loopback, with a stand-in for a server that pools share."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps, loads
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.errors import CorralError, UsageError
from corral.render.secrets import initialise, read_env
from corral.render.tree import render
from corral.verbs.models import serving
from tests.needs import program
from tests.processes.helpers import Process, free_port, wait_until

pytestmark = pytest.mark.needs("haproxy")

LIMIT_S = 60
SITE = """
schema_version: 1
name: farm
hosts:
  gate: {{address: 192.0.2.1}}
  big.iron: {{address: 192.0.2.11, gpus: {{card: rtx-3090, count: 2}}, shared: {{turns: {{}}}}}}
models:
  m: {{source: m-1b-q4_0.gguf, kind: chat, size_gib: 1}}
pools:
  a: {{model: m, on: {{host: big.iron, gpus: 2, shared: turns}}}}
  b: {{model: m, on: {{host: big.iron, gpus: 2, shared: turns}}}}
gateway:
  host: gate
  database: false
  cache: false
  port: {port}
  admin_port: {admin_port}
  balancer_port: {balancer_port}
  stats_port: {stats_port}
  edge_port: {edge_port}
"""


class Router(BaseHTTPRequestHandler):
    """Answers as the router of a shared llama-server does, and keeps what it was asked."""

    server: Server

    def do_GET(self) -> None:
        """Its models, or nothing in particular."""
        self.server.asked.append((f"{self.command} {self.path}", self.headers.get("authorization", "")))
        states = [{"id": name, "status": {"value": state}} for name, state in self.server.states.items()]
        self._answer({"data": states} if self.path == "/models" else {})

    def do_POST(self) -> None:
        """Loads or unloads at once."""
        self.server.asked.append((f"{self.command} {self.path}", self.headers.get("authorization", "")))
        body = loads(b"".join(iter(self._chunk, b"")))
        self.server.states[body["model"]] = "loaded" if self.path.endswith("/load") else "unloaded"
        self._answer({})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, data: dict[str, Any]) -> None:
        text = dumps(data).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    """The stand-in with its models."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Router)
        self.states = {"a": "loaded", "b": "unloaded"}
        self.asked: list[tuple[str, str]] = []


@dataclass(frozen=True, slots=True)
class Hosts:
    """Both hosts' secrets, the stand-in, and where things listen."""

    out: Path
    server: Server
    gateway: str
    balancer: str
    edge_port: int
    keys: dict[str, str] = field(default_factory=dict)

    def edge(self, path: str, certificate: str = "") -> int:
        """Status of the edge's answer to a caller with one of the hosts' certificates; 0 when there is none."""
        context = ssl.create_default_context(cafile=str(self.out / "gate/secrets/EDGE_AUTHORITY"))
        context.check_hostname = False  # here the edge is on loopback
        if certificate:
            context.load_cert_chain(self.out / certificate)
        try:
            url = f"https://127.0.0.1:{self.edge_port}{path}"
            return httpx.get(url, verify=context, trust_env=False, timeout=LIMIT_S).status_code
        except httpx.HTTPError:
            return 0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("edge")
    ports = {name: free_port() for name in ("port", "admin_port", "balancer_port", "stats_port", "edge_port")}
    (folder / "inventory.yaml").write_text(SITE.format(**ports))
    plan = build_plan(load_inventory(folder / "inventory.yaml"))
    out = folder / "out"
    for path, data in render(plan).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    initialise({host: plan.secrets_of(host) for host in plan.inventory.hosts}, out)
    server = Server()
    Thread(target=server.serve_forever, daemon=True).start()
    with ExitStack() as stack:
        stack.callback(server.shutdown)
        for host, component in (("big.iron", "edge"), ("gate", "haproxy")):
            file = out / host / component / "haproxy.cfg"
            text = file.read_text().replace("/run/secrets/", f"{out / host / 'secrets'}/")
            text = re.sub(r"server turns turns:\d+", f"server turns 127.0.0.1:{server.server_port}", text)
            text = text.replace("192.0.2.11:", "127.0.0.1:").replace("*:", "127.0.0.1:")
            text = re.sub(r"haproxy\.(inside|outside):\d+,", "", text)
            file.write_text(re.sub(r"127\.0\.0\.1:999\d", f"127.0.0.1:{free_port()}", text))
            stack.enter_context(Process([program("haproxy"), "-db", "-f", file], folder / f"{component}.log"))
        found = Hosts(
            out, server, f"http://127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['balancer_port']}",
            ports["edge_port"], {host: read_env(out / host / ".env")["LLAMA_API_KEY"] for host in ("gate", "big.iron")},
        )  # fmt: skip
        wait_until(lambda: answers(found), LIMIT_S, "the server through balancer and edge")
        yield found


def answers(hosts: Hosts) -> bool:
    try:
        return httpx.get(f"{hosts.balancer}/a/any/v1/models", trust_env=False, timeout=LIMIT_S).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_edge_puts_the_hosts_own_key_in_and_the_gateways_does_not_arrive(hosts: Hosts) -> None:
    headers = {"Authorization": f"Bearer {hosts.keys['gate']}"}
    assert httpx.get(f"{hosts.balancer}/b/any/v1/models", headers=headers, trust_env=False).status_code == 200
    assert {key for _, key in hosts.server.asked} == {f"Bearer {hosts.keys['big.iron']}"}
    assert hosts.keys["gate"] != hosts.keys["big.iron"]


def test_there_is_no_answer_without_a_client_certificate(hosts: Hosts) -> None:
    assert hosts.edge("/turns/health") == 0
    assert hosts.edge("/turns/health", "big.iron/secrets/EDGE_CERTIFICATE") == 0  # a server's is none for a client
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{hosts.edge_port}/turns/health", trust_env=False)


def test_only_the_needed_paths_pass(hosts: Hosts) -> None:
    own = "gate/secrets/GATEWAY_CERTIFICATE"
    passing = ("/turns/health", "/turns/v1/models", "/turns/models")
    assert [hosts.edge(path, own) for path in passing] == [200, 200, 200]
    closed = (
        "/turns/slots",
        "/turns/props",
        "/turns/metrics",
        "/turns/v1x",
        "/turns/v1/%2e%2e/slots",
        "/turns/",
        "/x/v1/",
    )
    assert [hosts.edge(path, own) for path in closed] == [403, 403, 403, 403, 400, 403, 404]


def test_half_open_connections_stop_nobody(hosts: Hosts) -> None:
    with ExitStack() as stack:
        for number in range(80):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", hosts.edge_port), 5))
            link.sendall(b"GET /he" if number % 2 else b"\x16\x03\x01\x02\x00")
        assert answers(hosts)


def test_models_of_a_shared_server_elsewhere_are_swapped_over_http(hosts: Hosts) -> None:
    hosts.server.asked.clear()
    with httpx.Client(base_url=hosts.gateway, trust_env=False, timeout=LIMIT_S) as client:
        for key in ("wrong", hosts.keys["big.iron"]):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.post("/models/swap", json={"model": "b"}, headers=headers).status_code == 401
        assert not [asked for asked, _ in hosts.server.asked if "/models" in asked]
        headers = {"Authorization": f"Bearer {hosts.keys['gate']}"}
        answer = client.post("/models/swap", json={"model": "b", "instead_of": "a"}, headers=headers)
    assert answer.json() == {"model": "b", "message": "in memory instead of a"}
    assert hosts.server.states == {"a": "unloaded", "b": "loaded"}
    asked = {asked for asked, _ in hosts.server.asked}
    assert {"GET /models", "POST /models/unload", "POST /models/load"} <= asked


def test_the_commands_ask_the_same_service(hosts: Hosts) -> None:
    plan = build_plan(load_inventory(hosts.out.parent / "inventory.yaml"))
    places = {place.replica.pool: place for place in serving.places_of(plan, hosts.out)}
    hosts.server.states = {"a": "unloaded", "b": "loaded"}
    headers = {"Authorization": f"Bearer {hosts.keys['gate']}"}
    with httpx.Client(base_url=hosts.gateway, headers=headers, trust_env=False, timeout=LIMIT_S) as client:
        assert serving.ask_to(client, "load", places["b"]) == "in memory already"
        with pytest.raises(UsageError, match=r"a \(big\.iron/turns\): a is not in memory there"):
            serving.ask_to(client, "load", places["a"], "a")
        assert serving.ask_to(client, "load", places["a"]) == "in memory instead of b"
        assert serving.ask_to(client, "unload", places["a"]) == "no longer in memory"
        client.headers["Authorization"] = "Bearer wrong"
        with pytest.raises(CorralError, match=r"secrets init, then up"):
            serving.ask_to(client, "load", places["b"])
    assert hosts.server.states == {"a": "unloaded", "b": "unloaded"}


def test_the_way_of_the_script_is_open_to_nobody_without_the_key(hosts: Hosts) -> None:
    path = f"{hosts.balancer}/-/Shared.big.iron.turns/models"
    assert httpx.get(path, trust_env=False).status_code == 404
    assert httpx.get(path, headers={"Authorization": "Bearer wrong"}, trust_env=False).status_code == 404
