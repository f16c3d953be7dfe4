"""The guarded entrance with the real HAProxy: TLS, renewal, CORS, paths, sizes, state; a fake is the gateway."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from corral.load import validate
from corral.output import write
from corral.plan import build_plan
from corral.render import render
from corral.yamlsource import parse
from tests.needs import program
from tests.processes.fakes import LOOPBACK, Fakes, command
from tests.processes.helpers import Process, free_port, wait_http, wait_until

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.xdist_group("entrance")]

DEADLINE_S = 20.0
ORIGIN = "https://chat.example.com"
MAX_KIB = 4
PATH = "/v1/chat/completions"


def make_certificate(path: Path, name: str) -> None:
    """A certificate of its own authority, with its key, put in place at once as a renewal does."""
    key, certificate, ready = path.with_suffix(".key"), path.with_suffix(".crt"), path.with_suffix(".new")
    arguments = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subjects = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:{LOOPBACK}"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *arguments, *subjects, *files], check=True, capture_output=True)
    ready.write_text(certificate.read_text() + key.read_text())
    ready.replace(path)


@dataclass
class Entrance:
    """What a test needs of it."""

    port: int
    certificate: Path
    fakes: Fakes
    client: httpx.Client

    def shown(self) -> str:
        """The certificate that a client is shown, as text."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection((LOOPBACK, self.port), DEADLINE_S) as link, context.wrap_socket(link) as tls:
            return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")


@pytest.fixture(scope="module")
def entrance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entrance]:
    folder = tmp_path_factory.mktemp("entrance")
    certificate = folder / "farm.pem"
    make_certificate(certificate, "farm.example.com")
    ports = {name: free_port() for name in ("entrance", "node", "fakes", "door", "gateway", "balancer", "figures")}
    inventory = {
        "schema_version": 1,
        "name": "entrance",
        "hosts": {"here": {"runtime": "local"}},
        "nodes": {
            "node-1": {"url": f"http://{LOOPBACK}:{ports['node']}", "engine": "llama.cpp", "model": "m", "slots": 1}
        },
        "pools": {"chat": {"on": [{"node": "node-1"}]}},
        "gateway": {
            "host": "here", "port": ports["door"], "litellm_port": ports["gateway"], "balancer_port": ports["balancer"],
            "stats_port": ports["figures"], "database": False, "cache": False,
            "entrance": {
                "port": ports["entrance"], "certificate": str(certificate), "origins": [ORIGIN],
                "max_body_kib": MAX_KIB, "max_messages": 5, "max_tokens": 64,
            },
        },
    }  # fmt: skip
    plan = build_plan(validate(parse(yaml.safe_dump(inventory), "inventory.yaml")))
    write(render(plan), folder)
    here = folder / "here"
    (here / "logs").mkdir()
    haproxy: list[str | Path] = [program("haproxy"), "-W", "-db", "-f"]
    served = [("gateway", ports["gateway"], 1), ("node-1", ports["node"], 1)]
    with (
        Process(command(ports["fakes"], served), folder / "fakes.log"),
        Process([*haproxy, str(here / "haproxy" / "haproxy.cfg")], folder / "b.log", folder=here),
        Process([*haproxy, str(here / "entrance" / "haproxy.cfg")], folder / "e.log", folder=here) as own,
    ):
        wait_http(f"http://{LOOPBACK}:{ports['fakes']}/")
        base = f"https://{LOOPBACK}:{ports['entrance']}"
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=base, verify=context, trust_env=False, timeout=DEADLINE_S) as client:
            wait_until(lambda: _answers(client), DEADLINE_S, f"the entrance: {own.output}")
            yield Entrance(ports["entrance"], certificate, Fakes(ports["fakes"]), client)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def body(**fields: object) -> dict[str, object]:
    return {"model": "chat", "messages": [{"role": "user", "content": "hello"}], **fields}


def test_requests_reach_the_gateway_with_the_limits_that_it_has_to_keep(entrance: Entrance) -> None:
    entrance.fakes.reset()
    forged = {"x-corral-guard": "messages=9999", "x-forwarded-for": "192.0.2.66"}
    assert entrance.client.post(PATH, json=body(), headers=forged).status_code == 200
    [seen] = entrance.fakes.seen()["gateway"].headers
    got = {name.lower(): value for name, value in seen.items()}
    assert got["x-corral-guard"] == "messages=5 message_kib=32 tokens=64 choices=1"
    assert got["x-forwarded-for"] == LOOPBACK


@pytest.mark.parametrize(
    "path", ["/", "/key/generate", "/ui", "/metrics/", "/health/readiness", "/v1", "/v1/%2e%2e/key/list"]
)
def test_nothing_else_is_let_through(entrance: Entrance, path: str) -> None:
    entrance.fakes.reset()
    assert entrance.client.get(path).status_code == 404
    assert entrance.fakes.seen()["gateway"].other_paths.keys() == set()


def test_what_is_too_big_is_refused_before_the_gateway_sees_it(entrance: Entrance) -> None:
    entrance.fakes.reset()
    big = entrance.client.post(PATH, json=body(padding="x" * MAX_KIB * 1024))
    assert (big.status_code, "KiB" in big.json()["error"]["message"]) == (413, True)
    unsaid = entrance.client.post(PATH, content=iter([b"{}"]))
    assert unsaid.status_code == 411
    assert entrance.fakes.seen()["gateway"].arrivals == 0


def test_pages_of_listed_origins_may_call_and_others_may_not(entrance: Entrance) -> None:
    wanted = {"origin": ORIGIN, "access-control-request-method": "POST"}
    asked = entrance.client.options(PATH, headers=wanted)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, ORIGIN)
    answered = entrance.client.post(PATH, json=body(), headers={"origin": ORIGIN})
    assert answered.headers.get_list("access-control-allow-origin") == [ORIGIN]
    stranger = {"origin": "https://example.net", "access-control-request-method": "POST"}
    assert entrance.client.options(PATH, headers=stranger).status_code == 403
    answered = entrance.client.post(PATH, json=body(), headers={"origin": "https://example.net"})
    assert "access-control-allow-origin" not in answered.headers


def test_the_farms_state_is_open_to_all_and_names_no_address(entrance: Entrance) -> None:
    state = entrance.client.get("/health")
    assert state.json()["nodes"][0]["name"] == "node-1"
    assert LOOPBACK not in state.text


def test_a_renewed_certificate_is_in_use_without_a_restart(entrance: Entrance) -> None:
    before = entrance.shown()
    assert before in entrance.certificate.read_text()
    make_certificate(entrance.certificate, "renewed.example.com")
    renewed = entrance.certificate.read_text()
    wait_until(lambda: entrance.shown() in renewed, DEADLINE_S, "the new certificate is shown")
    entrance.certificate.write_text("no certificate\n")  # is not taken, and the one in use stays
    time.sleep(6)
    assert entrance.shown() in renewed
