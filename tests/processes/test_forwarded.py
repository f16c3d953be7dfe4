"""The master key goes to a far gateway through ssh: a real sshd forwards to a port of the host's loopback."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.errors import CorralError
from corral.render.secrets import initialise, read_env
from corral.runtime.hosts import ComposeHost
from corral.verbs.keys.gateway import connected
from tests.compose.far import Sshd, client_config
from tests.processes.helpers import free_port, serving_http

pytestmark = pytest.mark.needs("sshd")

SITE = """
schema_version: 1
name: farm
hosts: {{gate: {{address: 127.0.0.1, ssh: {name}}}}}
models: {{m: {{source: m-1b-q4_0.gguf, kind: chat}}}}
pools: {{chat: {{model: m, on: {{host: gate}}}}}}
gateway: {{host: gate, admin_port: {port}}}
"""


class Gateway(BaseHTTPRequestHandler):
    """Says that it has no keys, and keeps who asked."""

    callers: list[tuple[str, str]] = []  # noqa: RUF012 - of the class, to be looked at

    def do_GET(self) -> None:
        """An empty list."""
        self.callers.append((self.headers["host"], self.headers["authorization"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"keys": [], "total_pages": 1}')

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Plan, int]]:
    """A plan whose gateway's host is behind ssh, and the port at which its gateway listens."""
    name = f"corral-forward-{free_port()}"
    with Sshd(name, tmp_path / "sshd") as door, serving_http(Gateway) as port:
        for variable, value in client_config([door], tmp_path / "ssh_config").items():
            monkeypatch.setenv(variable, value)
        (tmp_path / "inventory.yaml").write_text(SITE.format(name=name, port=port))
        yield build_plan(load_inventory(tmp_path / "inventory.yaml")), port


def test_keys_are_asked_for_through_the_forwarded_port(far: tuple[Plan, int], tmp_path: Path) -> None:
    plan, port = far
    initialise({"gate": plan.secrets_of("gate")}, tmp_path)
    Gateway.callers.clear()
    with connected(plan, tmp_path) as keys:
        assert keys.all() == []
    ((place, key),) = Gateway.callers
    assert place.startswith("127.0.0.1:")
    assert place != f"127.0.0.1:{port}", "it was asked at its own port"
    assert key == f"Bearer {read_env(tmp_path / 'gate' / '.env')['LITELLM_MASTER_KEY']}"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{place}", trust_env=False)


def test_a_port_that_cannot_be_forwarded_to_is_told_by_the_first_request(far: tuple[Plan, int], tmp_path: Path) -> None:
    host = ComposeHost(far[0], "gate", tmp_path)
    with host.forwarded(free_port()) as place, pytest.raises(httpx.HTTPError):
        httpx.get(place, trust_env=False)


def test_a_host_that_ssh_does_not_reach_is_named(
    far: tuple[Plan, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_text("Host *\n  HostName 127.0.0.1\n  Port 1\n")
    monkeypatch.setenv("CORRAL_SSH_CONFIG", str(tmp_path / "other"))
    with (
        pytest.raises(CorralError, match=r"gate: ssh .* does not connect"),
        ComposeHost(far[0], "gate", tmp_path).forwarded(80),
    ):
        pass
