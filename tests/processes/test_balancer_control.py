"""HAProxy's runtime API as `up` uses it, with a real HAProxy on a `local` host: take out, hold, release, put back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from corral.build import build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.render.output import write
from corral.render.tree import render
from corral.runtime.haproxy import Balancer, BalancerError, balancer_of
from tests.needs import program
from tests.processes.helpers import Process, free_port, wait_until

pytestmark = pytest.mark.needs("haproxy")

LIMIT_S = 20
INVENTORY = """\
schema_version: 1
name: control
hosts: {{here: {{runtime: local}}}}
models: {{tiny: {{source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}}}}
pools:
  solo: {{model: tiny, on: {{host: here}}, ports: {server}, engine: {{slots: 2}}, queue: {{depth: 2, timeout_s: 4}}}}
gateway:
  {{host: here, port: {port}, admin_port: {admin}, litellm_port: {behind}, balancer_port: {entry},
    stats_port: {figures}, database: false, cache: false}}
"""


class _Answer(BaseHTTPRequestHandler):
    # Paths of all requests.
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_arguments: object) -> None:
        pass


Reload = Callable[[], None]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Balancer, Process]]:
    ports = {name: free_port() for name in ("server", "port", "admin", "behind", "entry", "figures")}
    plan = build_plan(validate(parse(INVENTORY.format(**ports), "inventory.yaml")))
    write(render(plan), tmp_path)
    folder = tmp_path / "here"
    (folder / "logs").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", ports["server"]), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command: list[str | Path] = [program("haproxy"), "-W", "-db", "-f", str(folder / "haproxy" / "haproxy.cfg")]
    try:
        with Process(command, tmp_path / "haproxy.log", folder=folder) as process:
            found = balancer_of(plan, tmp_path)
            assert found is not None
            wait_until(found.is_running, LIMIT_S, f"the balancer: {process.output}")
            wait_until(lambda: found.servers()["here-solo-1"].is_usable, LIMIT_S, "its server")
            yield found, process
    finally:
        server.shutdown()
        server.server_close()


def _ask(balancer: Balancer) -> int:
    url = f"http://127.0.0.1:{balancer.plan.inventory.gateway.balancer_port}/solo/any/v1/models"
    with httpx.Client(trust_env=False, timeout=LIMIT_S) as client:
        return client.get(url).status_code


@pytest.fixture
def balancer(running: tuple[Balancer, Process]) -> Balancer:
    return running[0]


@pytest.fixture
def reload(running: tuple[Balancer, Process]) -> Reload:
    """Tells HAProxy to read its configuration anew, and returns when the new worker has taken over."""
    balancer, process = running

    def call() -> None:
        os.kill(process.pid, signal.SIGUSR2)
        wait_until(lambda: _is_usable(balancer), LIMIT_S, "the new worker")

    return call


def _is_usable(balancer: Balancer) -> bool:
    try:
        return balancer.servers()["here-solo-1"].is_usable
    except BalancerError:
        return False


def log(balancer: Balancer) -> str:
    return (balancer.host.out / "haproxy.log").read_text()


def test_it_says_which_configuration_it_has_read(balancer: Balancer) -> None:
    assert balancer.loaded() == balancer.rendered() != ""


def test_held_requests_wait_and_are_answered_when_their_only_server_is_back(balancer: Balancer) -> None:
    server = balancer.servers()["here-solo-1"]
    assert balancer.hold("solo", 60)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(_ask, balancer) for _ in range(2)]
        balancer.take_out(server)
        assert balancer.servers()["here-solo-1"].is_out
        assert balancer.put_all_back() == ["here-solo-1"]
        assert [answer.result(LIMIT_S) for answer in answers] == [200, 200]
    assert _ask(balancer) == 200


def test_only_so_many_wait_and_only_so_long(balancer: Balancer) -> None:
    """The queue of the inventory: two may wait, four seconds at most; then 429, as for a full pool."""
    balancer.take_out(balancer.servers()["here-solo-1"])
    with ThreadPoolExecutor(3) as pool:
        answers = [answer.result(LIMIT_S) for answer in [pool.submit(_ask, balancer) for _ in range(3)]]
    assert answers == [429, 429, 429], log(balancer)
    balancer.put_back(balancer.servers()["here-solo-1"])
    wait_until(lambda: balancer.servers()["here-solo-1"].is_usable, LIMIT_S, "the server back")
    assert _ask(balancer) == 200


def test_clients_that_left_while_they_waited_reach_no_server_and_take_no_place(balancer: Balancer) -> None:
    """Two may wait. A script is not told that a client left; it sees within a second that nobody looks any more."""
    url = f"http://127.0.0.1:{balancer.plan.inventory.gateway.balancer_port}/solo/any/v1/models"
    assert balancer.hold("solo", 60)
    _Answer.asked.clear()
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(url, timeout=0.3, trust_env=False)
    time.sleep(1.2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_ask, balancer)
        time.sleep(0.5)
        assert not answer.done()
        assert "/v1/models" not in _Answer.asked
        balancer.release("solo")
        assert answer.result(LIMIT_S) == 200


def test_a_connection_that_was_kept_open_over_a_reload_reaches_the_new_worker(
    balancer: Balancer, reload: Reload
) -> None:
    """What the old worker knows of servers is out of date by then; newer HAProxies leave such connections with it."""
    gateway = balancer.plan.inventory.gateway
    url = f"http://127.0.0.1:{gateway.balancer_port}/solo/any/v1/models"
    with httpx.Client(trust_env=False, timeout=LIMIT_S) as client:
        assert client.get(url).status_code == 200
        balancer.take_out(balancer.servers()["here-solo-1"])  # in the old worker: a local host keeps no states
        reload()
        assert client.get(url).status_code == 200


def test_the_farms_state_goes_on_counting_over_reloads(balancer: Balancer, reload: Reload) -> None:
    def has_counted(count: int) -> bool:
        address = f"http://127.0.0.1:{balancer.plan.inventory.gateway.stats_port}/health"
        found: int = httpx.get(address, trust_env=False).raise_for_status().json()["nodes"][0]["requests"]
        return found == count

    for count in (1, 2):
        assert _ask(balancer) == 200
        balancer.keep_figures()
        reload()
        wait_until(partial(has_counted, count), LIMIT_S, f"{count} requests are counted")
