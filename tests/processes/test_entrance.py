"""HAProxy's public frontends with the real HAProxy: TLS, keys, routes, sizes, CORS, state; a fake is the gateway."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import yaml

from corral.build import build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.gateway.routes import MODEL_ROUTES
from corral.render.output import write
from corral.render.tree import render
from tests.needs import program
from tests.processes.fakes import LOOPBACK, Fakes, command
from tests.processes.helpers import Process, free_port, wait_http, wait_until

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.xdist_group("entrance")]

DEADLINE_S = 20.0
ORIGIN = "https://chat.example.com"
APP = "app://obsidian.md"
MAX_KIB = 4
PATH = "/v1/chat/completions"
KEY = "sk-a-key-of-the-farm"
# The fake gateway answers 401 to it.
WRONG_KEY = "sk-wrong"
# The files of the page about the farm.
PAGE = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript", "/page.json": "application/json"}
# Another address of the loopback network, as a client's of somewhere else.
STRANGER = "127.0.0.66"
# That of a reverse proxy of the site's.
PROXY = "127.0.0.77"


def make_certificate(path: Path, name: str) -> None:
    """A certificate of its own authority, with its key, put in place at once as a renewal does."""
    key, certificate, ready = path.with_suffix(".key"), path.with_suffix(".crt"), path.with_suffix(".new")
    arguments = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subjects = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:{LOOPBACK}"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *arguments, *subjects, *files], check=True, capture_output=True)
    ready.write_text(certificate.read_text() + key.read_text())
    ready.replace(path)


class _Gateway(BaseHTTPRequestHandler):
    """Stands for LiteLLM: keeps what arrives, and knows every key but one."""

    protocol_version = "HTTP/1.1"
    # Method, path with query, headers with names in lower case, bytes of the body.
    arrived: ClassVar[list[tuple[str, str, dict[str, str], int]]] = []

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", "0"))
        self.rfile.read(length)
        self.arrived.append((self.command, self.path, headers, length))
        is_known = WRONG_KEY not in headers.get("authorization", "")
        text = b'{"ok":true}' if is_known else b'{"error":{"message":"not known here"}}'
        self.send_response(200 if is_known else 401)
        for name, value in (
            ("content-type", "application/json"), ("content-length", str(len(text))), ("x-litellm-version", "1.2.3"),
            ("x-litellm-model-api-base", "http://inside:8081"), ("x-litellm-call-id", "call-1"),
            ("access-control-allow-origin", "*"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = _answer  # noqa: N815 - the names are the library's

    def log_message(self, *_arguments: object) -> None:
        pass


@dataclass
class Entrance:
    """What a test needs of it."""

    port: int
    certificate: Path
    client: httpx.Client
    """Comes in by the entrance, with a key."""
    inside: httpx.Client
    """Comes in by the gateway's own port, with a key."""
    admin: httpx.Client
    balancer: str
    """Where LiteLLM calls pools."""

    def shown(self) -> str:
        """The certificate that a client is shown, as text."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection((LOOPBACK, self.port), DEADLINE_S) as link, context.wrap_socket(link) as tls:
            return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")

    def arrived(self) -> list[tuple[str, str, dict[str, str], int]]:
        """What reached the gateway of requests, without those that only ask whether a key is known."""
        return [item for item in _Gateway.arrived if item[:2] != ("GET", "/v1/models")]

    def from_stranger(self, key: str, address: str = STRANGER) -> httpx.Client:
        """A client of the entrance from another address."""
        transport = httpx.HTTPTransport(local_address=address, verify=ssl_context(self.certificate))
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.client.base_url, headers=headers, transport=transport, timeout=DEADLINE_S)


def with_key(base: str, context: ssl.SSLContext | None = None) -> httpx.Client:
    """A client with a key that the gateway knows."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=base, verify=context or False, headers=headers, trust_env=False, timeout=DEADLINE_S)


def ssl_context(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entrance]:
    folder = tmp_path_factory.mktemp("entrance")
    certificate = folder / "farm.pem"
    make_certificate(certificate, "farm.example.com")
    authority = folder / "house.pem"
    make_certificate(authority, "localhost")
    names = (
        "entrance",
        "node",
        "house",
        "fakes",
        "gateway",
        "admin",
        "litellm",
        "balancer",
        "figures",
        "jobs",
        "store",
    )
    ports = {name: free_port() for name in names}
    inventory = {
        "schema_version": 1,
        "name": "entrance",
        "hosts": {"here": {"runtime": "local"}},
        "nodes": {
            "node-1": {"url": f"http://{LOOPBACK}:{ports['node']}", "engine": "llama.cpp", "model": "m", "slots": 1},
            "house": {"url": f"https://localhost:{ports['house']}", "model": "m", "ca_file": str(authority)},
        },
        "pools": {"chat": {"on": [{"node": "node-1"}]}, "house": {"on": [{"node": "house"}]}},
        "jobs": {"port": ports["jobs"], "store_port": ports["store"], "pollers": {"tab": {"models": ["chat"]}}},
        "gateway": {
            "host": "here", "port": ports["gateway"], "admin_port": ports["admin"], "litellm_port": ports["litellm"],
            "balancer_port": ports["balancer"], "stats_port": ports["figures"], "database": False, "cache": False,
            "path": "/llm", "proxies": [PROXY], "page": {"shown": "everywhere", "links": {"It's <here>": "http://x.test"}},
            "entrance": {
                "port": ports["entrance"], "certificate": str(certificate), "origins": [ORIGIN, APP],
                "max_body_kib": MAX_KIB, "max_messages": 5, "max_tokens": 64,
            },
        },
    }  # fmt: skip
    plan = build_plan(validate(parse(yaml.safe_dump(inventory), "inventory.yaml")))
    write(render(plan), folder)
    here = folder / "here"
    (here / "logs").mkdir()
    haproxy: list[str | Path] = [program("haproxy"), "-W", "-db", "-f", str(here / "haproxy" / "haproxy.cfg")]
    served, balancer = [("node-1", ports["node"], 1)], f"http://{LOOPBACK}:{ports['balancer']}"
    gateway = ThreadingHTTPServer((LOOPBACK, ports["litellm"]), _Gateway)
    house = ThreadingHTTPServer((LOOPBACK, ports["house"]), _Gateway)
    jobs = ThreadingHTTPServer((LOOPBACK, ports["jobs"]), _Gateway)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    house.socket = context.wrap_socket(house.socket, server_side=True)
    for server in (gateway, house, jobs):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with (
            Process(command(ports["fakes"], served), folder / "fakes.log"),
            Process(haproxy, folder / "haproxy.log", folder=here) as own,
            with_key(f"https://{LOOPBACK}:{ports['entrance']}", ssl_context(certificate)) as client,
            with_key(f"http://{LOOPBACK}:{ports['gateway']}") as inside,
            with_key(f"http://{LOOPBACK}:{ports['admin']}") as admin,
        ):
            wait_http(f"http://{LOOPBACK}:{ports['fakes']}/")
            wait_until(lambda: _answers(client), DEADLINE_S, f"the entrance: {own.output}")
            Fakes(ports["fakes"]).reset()
            yield Entrance(ports["entrance"], certificate, client, inside, admin, balancer)
    finally:
        for server in (gateway, house, jobs):
            server.shutdown()
            server.server_close()


@pytest.fixture
def entrance(running: Entrance) -> Entrance:
    """It, with nothing arrived at the gateway yet."""
    _Gateway.arrived.clear()
    return running


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def body(**fields: object) -> dict[str, object]:
    return {"model": "chat", "messages": [{"role": "user", "content": "hello"}], **fields}


def test_requests_reach_the_gateway_with_the_limits_that_it_has_to_keep(entrance: Entrance) -> None:
    forged = {
        "x-corral-guard": "messages=9999", "x-corral-consumer": "another", "x-forwarded-for": "192.0.2.66",
        "x-litellm-num-retries": "50", "X-LiteLLM-Api-Key": "sk-another", "litellm-disable-message-redaction": "true",
        "x-session-id": "talk-1", "x-corral-thinking": "show", "api-key": "sk-another", "x-api-key": "sk-another",
    }  # fmt: skip
    assert entrance.client.post(PATH, json=body(), headers=forged).status_code == 200
    [(_, path, got, _)] = entrance.arrived()
    assert path == PATH
    assert got["x-corral-guard"] == "messages=5 message_kib=1024 tokens=64 choices=1"
    assert got["x-forwarded-for"] == LOOPBACK
    assert (got["x-litellm-session-id"], got["x-corral-thinking"]) == ("talk-1", "show")
    assert got["authorization"] == f"Bearer {KEY}"
    kept = {"x-session-id", "x-corral-guard", "x-forwarded-for", "x-litellm-session-id", "x-corral-thinking"}
    assert [name for name in forged if name.lower() in got and name.lower() not in kept] == []


def test_pollers_come_in_from_outside_and_jobs_do_not(entrance: Entrance) -> None:
    """The fake stands for the API of jobs as well; LiteLLM is not asked about a poller's key."""
    work = "/v1/work/claim"
    for client in (entrance.client, entrance.inside):
        assert client.post(work, json={}, headers={"Authorization": "Bearer sk-of-tab"}).status_code == 200
        assert client.get(work).status_code == 405
    assert [path for _, path, _, _ in _Gateway.arrived] == [work] * 2
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert entrance.client.options(work, headers=asked).headers["access-control-allow-origin"] == ORIGIN
    for path in ("/v1/jobs", "/v1/files", "/v1/batches"):
        assert (entrance.client.get(path).status_code, entrance.inside.get(path).status_code) == (404, 200)
    with entrance.from_stranger(WRONG_KEY, "127.0.0.67") as stranger:
        codes = [stranger.post(work, json={}).status_code for _ in range(25)]
    assert codes == [401] * 21 + [429] * 4


def test_a_proxys_path_is_taken_away_at_both_doors(entrance: Entrance) -> None:
    for client in (entrance.client, entrance.inside):
        assert client.post(f"/llm{PATH}", json=body()).status_code == 200
        assert client.post("/llm/openai/deployments/chat/chat/completions", json=body()).status_code == 200
        assert client.get("/llm/healthz").status_code == 200
        assert client.post(f"/llm/llm{PATH}", json=body()).status_code == 404
        assert client.post(f"/llmx{PATH}", json=body()).status_code == 404
        assert client.get("/llm/metrics").status_code == 404
    assert [path for _, path, _, _ in entrance.arrived()] == [PATH] * 4


def test_the_address_of_a_client_comes_from_the_sites_proxy_only(entrance: Entrance) -> None:
    sent = {"x-forwarded-for": "203.0.113.7, 192.0.2.66"}
    for address in (PROXY, STRANGER):
        with entrance.from_stranger(KEY, address) as client:
            assert client.post(PATH, json=body(), headers=sent).status_code == 200
    assert [got["x-forwarded-for"] for _, _, got, _ in entrance.arrived()] == ["192.0.2.66", STRANGER]


def test_a_node_with_a_certificate_of_a_house_authority_is_called(entrance: Entrance) -> None:
    assert httpx.post(f"{entrance.balancer}/house/any{PATH}", json=body(), trust_env=False).status_code == 200


def test_wrong_keys_through_a_proxy_count_for_the_client_alone(entrance: Entrance) -> None:
    with entrance.from_stranger(WRONG_KEY, PROXY) as client:
        said = [
            client.post(PATH, json=body(), headers={"x-forwarded-for": "192.0.2.67"}).status_code for _ in range(23)
        ]
        assert said[0] == 401
        assert said[-1] == 429
        assert client.post(PATH, json=body(), headers={"x-forwarded-for": "192.0.2.68"}).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/key/generate", "/ui", "/ui/", "/metrics/", "/health/readiness", "/health/liveliness", "/v1",
        "/openapi.json", "/redoc", "/docs", "/v1/%2e%2e/key/list", "/v1/chat/completions/",
        "/v1/vector_stores", "/v1/moderations", "/v1/responses/resp_1", "/v1/models/",
        "/engines/chat/chat/completions", "/openai/deployments/chat/audio/translations", "/anthropic/v1/messages",
        "/v1%2fchat/completions", "/V1/chat/completions", "/utils/token_counter", "/api/v1", "/api/v1/x",
        "/page.html", "/farm.lua",
    ],
)  # fmt: skip
def test_nothing_but_the_listed_routes_is_let_through(entrance: Entrance, path: str) -> None:
    for client in (entrance.client, entrance.inside):
        assert client.get(path).status_code == 404
        assert client.post(path, json=body()).status_code == 404
    assert entrance.arrived() == []


def test_every_route_has_one_spelling_behind_haproxy(entrance: Entrance) -> None:
    for route in MODEL_ROUTES:
        for path in {route, route.removeprefix("/v1"), route.replace("/v1/", "/api/v1/")}:
            assert entrance.inside.post(f"{path}?api-version=2024-10-21&user=x", json=body()).status_code == 200, path
    assert entrance.inside.get("/api/v1/models", headers={"api-key": KEY}).status_code == 200
    assert entrance.inside.get("/api/v1/health").json() == entrance.inside.get("/health").json()
    azure = "/openai/deployments/secret/chat/completions?api-version=2024-10-21"
    assert entrance.inside.post(azure, json=body(), headers={"api-key": KEY}).status_code == 200
    assert {path for _, path, _, _ in entrance.arrived()} == set(MODEL_ROUTES)
    named = entrance.inside.post(f"{PATH}?model=secret", json=body())
    assert (named.status_code, "in the body" in named.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "GET"])
def test_other_methods_end_in_haproxy(entrance: Entrance, method: str) -> None:
    assert entrance.client.request(method, PATH).status_code == 405
    assert entrance.arrived() == []


def test_the_operators_port_has_everything(entrance: Entrance) -> None:
    for path in ("/ui/", "/key/list?page=1", "/health/readiness"):
        assert entrance.admin.get(path).status_code == 200
    assert [path for _, path, _, _ in entrance.arrived()] == ["/ui/", "/key/list?page=1", "/health/readiness"]


# --- credentials


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sk-a b"},
        {"x-api-key": "x"},
    ],
)
def test_a_request_without_a_key_ends_in_haproxy(entrance: Entrance, headers: Mapping[str, str]) -> None:
    with httpx.Client(base_url=entrance.client.base_url, verify=ssl_context(entrance.certificate)) as client:
        for answer in (client.post(PATH, json=body(), headers=headers), client.get("/v1/models", headers=headers)):
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert _Gateway.arrived == []


@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "api-key"])
def test_a_key_is_taken_from_the_headers_that_clients_have_for_it(entrance: Entrance, header: str) -> None:
    with httpx.Client(base_url=entrance.client.base_url, verify=ssl_context(entrance.certificate)) as client:
        value = f"bearer {KEY}" if header == "Authorization" else KEY
        assert client.post(PATH, json=body(), headers={header: value}).status_code == 200
    [(_, _, got, _)] = entrance.arrived()
    assert got["authorization"] == f"Bearer {KEY}"
    assert {"x-api-key", "api-key"}.isdisjoint(got)


def test_a_wrong_key_sends_nothing_to_the_gateway_and_is_soon_refused_unasked(entrance: Entrance) -> None:
    """The gateway is asked once for each try, without the body; from the 21st on it is not asked at all."""
    assert entrance.client.post(PATH, json=body()).status_code == 200
    _Gateway.arrived.clear()
    with entrance.from_stranger(WRONG_KEY) as stranger:
        answers = [stranger.post(PATH, json=body()) for _ in range(21)]
        asked = len(_Gateway.arrived)
        answers += [stranger.post(PATH, json=body()) for _ in range(4)]
        assert answers[0].json() == {"error": {"message": "not known here"}}
        codes = [answer.status_code for answer in answers]
        assert codes == [401] * 21 + [429] * 4
        assert answers[-1].headers["retry-after"] == "60"
        assert entrance.arrived() == []
        assert len(_Gateway.arrived) == asked
        known = stranger.post(PATH, json=body(), headers={"Authorization": f"Bearer {KEY}"})
        assert known.status_code == 200, "a key that is known still works from that address"
    assert entrance.client.post(PATH, json=body()).status_code == 200


# --- sizes


def test_what_is_too_big_is_refused_before_the_gateway_sees_it(entrance: Entrance) -> None:
    big = entrance.client.post(PATH, json=body(padding="x" * MAX_KIB * 1024))
    assert (big.status_code, "KiB" in big.json()["error"]["message"]) == (413, True)
    unsaid = entrance.client.post(PATH, content=iter([b"{}"]))
    assert unsaid.status_code == 411
    assert entrance.arrived() == []


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2147483648",
        "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 4294967305",
        "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 18446744073709551625",
        "GET /v1/models HTTP/1.1\r\nContent-Length: 2147483648",
        "GET /v1/models HTTP/1.1\r\nContent-Length: 900000000",
        "GET /v1/models HTTP/1.1\r\nContent-Length: 100",
        "GET /v1/models HTTP/1.1\r\nTransfer-Encoding: chunked",
        "PUT /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked",
        "POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked",
        "GET /health HTTP/1.1\r\nTransfer-Encoding: chunked",
    ],
)
def test_no_framing_carries_a_body_past_the_limit(entrance: Entrance, head: str) -> None:
    """Refused by the head alone, or after 2 s: before that, no byte of it is passed on."""
    request = f"{head}\r\nHost: farm\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    with socket.create_connection((LOOPBACK, entrance.inside.base_url.port or 0), DEADLINE_S) as link:
        link.sendall(request.encode() + b"64\r\n" + b"x" * 100)
        status = link.recv(4096).split(b" ")[1]
    assert status in {b"400", b"405", b"408", b"411", b"413"}
    assert entrance.arrived() == []


def test_http2_carries_no_body_without_its_length(entrance: Entrance) -> None:
    """GET and POST over HTTP/2 with a body of unsaid length, by curl."""
    url = f"https://{LOOPBACK}:{entrance.port}/v1/models"
    for arguments in (
        ["-X", "GET", "-T", "-"],
        ["-X", "POST", "-T", "-"],
        ["-X", "GET", "-T", "-", "-H", "content-length:"],
    ):
        words = [
            "curl",
            "-sk",
            "--http2",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-H",
            f"Authorization: Bearer {KEY}",
        ]
        done = subprocess.run(
            [*words, *arguments, url], input=b"x" * 200_000, capture_output=True, timeout=60, check=False
        )
        assert done.stdout.decode() in {"000", "400", "405", "411", "413"}, arguments  # 000: the stream was reset
    assert entrance.arrived() == []


def test_half_a_head_and_half_a_body_end_within_seconds(entrance: Entrance) -> None:
    """A stranger's stalled request is refused or ended; the client's timeout here is the bound that is tested."""
    key = f"Authorization: Bearer {KEY}\r\n"
    starts = {
        "half a head": "POST /v1/chat/completions HTTP/1.1\r\nHost: farm\r\n",
        "no key, no body yet": "POST /v1/chat/completions HTTP/1.1\r\nHost: farm\r\nContent-Length: 3000\r\n\r\n",
        "a key, half a body": f"POST {PATH} HTTP/1.1\r\nHost: farm\r\n{key}Content-Length: 3000\r\n\r\n{{",
    }
    for name, start in starts.items():
        with socket.create_connection((LOOPBACK, entrance.inside.base_url.port or 0), DEADLINE_S) as link:
            link.sendall(start.encode())
            answer = http.client.HTTPResponse(link)
            answer.begin()
            assert answer.status in {401, 408}, name
            said = answer.read()
            if name != "half a head":  # before there is a request HAProxy has its own page
                assert json.loads(said)["error"]["message"], name
    assert entrance.arrived() == []


def test_one_address_cannot_hold_all_connections(entrance: Entrance) -> None:
    links: list[socket.socket] = []
    try:
        for _ in range(600):
            with suppress(ConnectionResetError):
                links.append(socket.create_connection((LOOPBACK, entrance.port), DEADLINE_S, (STRANGER, 0)))
        time.sleep(0.5)
        held = sum(_is_open(link) for link in links)
        assert held <= 257
        assert entrance.client.post(PATH, json=body()).status_code == 200
    finally:
        for link in links:
            link.close()


def _is_open(link: socket.socket) -> bool:
    link.settimeout(0)
    try:
        return link.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


# --- pages, state, answers


@pytest.mark.parametrize("origin", [ORIGIN, APP])
def test_pages_of_listed_origins_may_call(entrance: Entrance, origin: str) -> None:
    names = "authorization,content-type,x-stainless-os,x-stainless-retry-count,anthropic-version"
    wanted = {
        "origin": origin, "access-control-request-method": "POST", "access-control-request-headers": names,
        "access-control-request-private-network": "true",
    }  # fmt: skip
    asked = entrance.client.options(PATH, headers=wanted)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, origin)
    assert asked.headers["access-control-allow-headers"] == names
    assert asked.headers["access-control-allow-private-network"] == "true"
    for path, expected in ((PATH, 200), ("/v1/nothing", 404)):
        answered = entrance.client.post(path, json=body(), headers={"origin": origin})
        assert answered.status_code == expected
        assert answered.headers.get_list("access-control-allow-origin") == [origin]
        assert "Retry-After" in answered.headers["access-control-expose-headers"]


def test_pages_of_other_origins_may_not(entrance: Entrance) -> None:
    stranger = {"origin": "https://example.net", "access-control-request-method": "POST"}
    assert entrance.client.options(PATH, headers=stranger).status_code == 403
    answered = entrance.client.post(PATH, json=body(), headers={"origin": "https://example.net"})
    assert "access-control-allow-origin" not in answered.headers
    assert entrance.inside.options(PATH, headers=stranger).status_code == 204


def test_answers_name_no_address_and_no_version(entrance: Entrance) -> None:
    for client in (entrance.client, entrance.inside):
        headers = client.post(PATH, json=body()).headers
        assert [name for name in headers if name.startswith("x-litellm-")] == []


def test_the_farms_state_is_one_word_outside_and_names_no_address_inside(entrance: Entrance) -> None:
    with httpx.Client(base_url=entrance.client.base_url, verify=ssl_context(entrance.certificate)) as client:
        wait_until(lambda: client.get("/health").json() == {"status": "ok"}, DEADLINE_S, "both nodes are well")
    state = entrance.inside.get("/health")
    assert [node["name"] for node in state.json()["nodes"]] == ["node-1", "house"]
    assert LOOPBACK not in state.text
    assert "localhost" not in state.text


def test_the_page_tells_strangers_nothing_of_the_pools(entrance: Entrance) -> None:
    """Its files come from both doors, below the proxy's path as well, and to GET only; no key opens more of them."""
    for client, names in ((entrance.client, []), (entrance.inside, ["chat", "house"])):
        for path, kind in PAGE.items():
            shown = client.get(f"/llm{path}")
            assert (shown.status_code, shown.headers["content-type"].split(";")[0]) == (200, kind)
            assert (client.head(path).status_code, client.post(path, json={}).status_code) == (200, 404)
            if kind != "application/json":
                assert "default-src 'none'; script-src 'self'" in shown.headers["content-security-policy"]
        told = client.get("/page.json").json()
        assert told["links"] == [["It's <here>", "http://x.test"]]
        assert [pool["name"] for pool in told["pools"]] == names
    assert entrance.arrived() == []


def test_a_renewed_certificate_is_in_use_without_a_restart(entrance: Entrance) -> None:
    before = entrance.shown()
    assert before in entrance.certificate.read_text()
    make_certificate(entrance.certificate, "renewed.example.com")
    renewed = entrance.certificate.read_text()
    wait_until(lambda: entrance.shown() in renewed, DEADLINE_S, "the new certificate is shown")
    entrance.certificate.write_text("no certificate\n")  # is not taken, and the one in use stays
    time.sleep(6)
    assert entrance.shown() in renewed
