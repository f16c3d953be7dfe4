"""Changes under load: nobody notices a rolling change, a new balancer configuration, a canary or the way back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx
import pytest

from corral.components import llama
from corral.runtime.haproxy import Balancer, balancer_of
from tests.compose.project import PAUSE_S, Client, docker, frozen, streamed_text
from tests.compose.site_up import Site, site_in
from tests.processes.helpers import wait_until
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

MOST = 3000
WARM_S = 60
REPLICAS = {"ua-chat-1", "ua-chat-2", "ua-solo-1"}
GOOD_IMAGE = "corral-test-up/llama:2"
BAD_IMAGE = "corral-test-up/llama:broken"
# An image in which there is no llama-server.
STARTS_NOTHING = "valkey/valkey:9.1.2"


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_in(tmp_path_factory.mktemp("rolling")) as site:
        site.edit("\nmonitoring:", "\n# monitoring:")
        site.corral("render", "--quiet")
        site.corral("secrets", "init")
        yield site


@pytest.fixture
def running(site: Site) -> Site:
    """The site, up and as rendered when the test begins."""
    site.corral("up", "--render")
    return site


@pytest.fixture
def balancer(running: Site) -> Balancer:
    found = balancer_of(running.plan, running.out)
    assert found is not None
    return found


@pytest.fixture
def images(running: Site) -> Iterator[None]:
    """Two further images: the same program under another name, and one without it."""
    docker("tag", llama.IMAGES["llama-cpu"], GOOD_IMAGE)
    docker("tag", STARTS_NOTHING, BAD_IMAGE)
    yield
    for image in (GOOD_IMAGE, BAD_IMAGE):
        docker("rmi", image, check=False)


@dataclass(slots=True)
class Crowd:
    """Clients that ask a pool one question after the other, plain and streamed, until the block ends."""

    client: Client
    pool: str
    clients: int = 2
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self.clients)
        for number in range(self.clients):
            self._threads.submit(self._ask, number)
        wait_until(lambda: len(self.answers) >= 2 * self.clients, WARM_S, f"answers by {self.pool}: {self.failures}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        assert self._threads is not None
        self._threads.shutdown()

    def _ask(self, number: int) -> None:
        for turn in range(MOST // self.clients):
            if self._stop.is_set():
                return
            try:
                is_streamed = bool((number + turn) % 2)
                response = self.client.chat(self.pool, content=f"question {number} {turn}", stream=is_streamed)
                if response.status_code != 200:
                    self.failures.append(f"{response.status_code} {response.text[:200]}")
                elif is_streamed:
                    self.answers.append(streamed_text(response.text))
                else:
                    self.answers.append(response.json()["choices"][0]["message"]["content"])
            except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                self.failures.append(repr(error)[:200])
            self._stop.wait(PAUSE_S)

    def check(self, least: int) -> None:
        """Nobody failed, and everybody was told the same, byte for byte."""
        assert self.failures == []
        assert set(self.answers) == {KNOWN_ANSWER}
        assert len(self.answers) >= least


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_every_replica_is_changed_under_load_and_nobody_notices(running: Site, balancer: Balancer) -> None:
    before = running.ids()
    running.edit("memory_mib: 512", "memory_mib: 520")
    with Crowd(running.client, "chat") as chat, Crowd(running.client, "solo") as solo:
        said = running.corral("up", "--render")
        running.corral("restart", "solo")
    assert _changed(before, running.ids()) == REPLICAS
    assert "solo has no other replica that could answer: up to 10 requests wait in the balancer" in said
    chat.check(20)
    solo.check(10)
    assert all(server.is_usable for server in balancer.servers().values())


def test_a_new_balancer_configuration_is_read_without_a_gap(running: Site, balancer: Balancer) -> None:
    before = running.ids()
    running.edit("depth: 10", "depth: 9")
    with Crowd(running.client, "chat") as chat:
        said = running.corral("up", "--render")
    assert "reads its new configuration, without a gap" in said
    assert running.ids() == before
    assert balancer.loaded() == balancer.rendered()
    chat.check(5)
    assert "nothing to do" in running.corral("up")
    running.project.compose("up", "--detach", "--wait")  # by hand it is right too, with the gap of a new container
    assert _changed(before, running.ids()) == {"ua-haproxy"}
    assert balancer.loaded() == balancer.rendered()


def test_killed_while_it_changes_a_replica_the_next_up_puts_everything_back(running: Site, balancer: Balancer) -> None:
    running.edit("memory_mib: 5", "memory_mib: 6")
    running.corral("render", "--quiet")
    with running.start("up") as process:
        wait_until(
            lambda: any(item.is_out for item in balancer.servers().values()), WARM_S, "a replica out of rotation"
        )
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    running.corral("up")
    servers = balancer.servers()
    assert {name: server.is_usable for name, server in servers.items()} == dict.fromkeys(REPLICAS, True)
    assert set(running.project.states().values()) == {"healthy"}
    assert running.client.chat_text("solo") == KNOWN_ANSWER


def test_interrupted_while_it_drains_the_replica_goes_back_at_once(running: Site, balancer: Balancer) -> None:
    """Ctrl-C while a long answer is waited for: the answer is not cut, and nothing was changed."""
    before = running.ids()
    running.edit("memory_mib: 6", "memory_mib: 7")
    running.corral("render", "--quiet")
    with _occupied(running, "ua-chat-1"), running.start("up") as process:
        wait_until(lambda: balancer.servers()["ua-chat-1"].is_out, WARM_S, "the replica out of rotation")
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        assert not any(server.is_out for server in balancer.servers().values())
    assert _changed(before, running.ids()) == set()
    running.corral("up")


@contextmanager
def _occupied(site: Site, replica: str) -> Iterator[None]:
    """A request to that replica goes on as long as the block, because its program stands still; then it is answered."""
    networks = site.project.inspect("ua-haproxy")["NetworkSettings"]["Networks"]
    client = Client(
        f"http://{networks[f'{site.project.name}_gateway']['IPAddress']}:8081/chat/{replica}",
        site.project.secrets["LLAMA_API_KEY"],
        timeout_s=150,
    )
    balancer = balancer_of(site.plan, site.out)
    assert balancer is not None
    with ThreadPoolExecutor(1) as threads:
        with frozen(site.project, replica):
            answer = threads.submit(client.chat_text)
            wait_until(lambda: balancer.servers()[replica].in_flight > 0, WARM_S, "a request in flight")
            yield
        assert answer.result() == KNOWN_ANSWER


# --- upgrade and rollback --------------------------------------------------------------------------------------------


def _images(site: Site) -> dict[str, str]:
    return {name: site.project.inspect(name)["Config"]["Image"] for name in sorted(REPLICAS)}


def test_an_upgrade_tries_a_canary_first_and_rollback_goes_back(running: Site, images: None) -> None:
    old = _images(running)
    with Crowd(running.client, "chat") as chat, Crowd(running.client, "solo") as solo:
        said = running.corral("upgrade", "--to", f"llama-cpu={GOOD_IMAGE}")
    assert _images(running) == dict.fromkeys(REPLICAS, GOOD_IMAGE)
    assert GOOD_IMAGE in said
    assert said.index("canary chat-1") < said.index("canary solo-1") < said.index("changed, one at a time: chat-2")
    assert "# one machine" in running.inventory.read_text()
    assert "nothing to do" in running.corral("up")
    chat.check(10)
    solo.check(5)

    with Crowd(running.client, "chat") as chat:
        said = running.corral("rollback")
    assert _images(running) == old
    chat.check(10)
    assert "the inventory still says otherwise" in said
    assert GOOD_IMAGE not in (running.out / ".history" / "inventory.yaml").read_text()
    assert running.corral("up", code=3)
    running.edit(f"llama-cpu: {GOOD_IMAGE}", f"llama-cpu: {next(iter(old.values()))}")
    assert "nothing to do" in running.corral("up", "--render")


def test_a_canary_that_fails_is_put_back_and_nobody_notices(running: Site, balancer: Balancer, images: None) -> None:
    text, old = running.inventory.read_text(), _images(running)
    tree = {path: path.read_bytes() for path in running.out.rglob("compose.yaml")}
    with Crowd(running.client, "chat") as chat, Crowd(running.client, "solo") as solo:
        said = running.corral("upgrade", "--to", f"llama-cpu={BAD_IMAGE}", "--timeout", "30", code=1)
    assert "the canary failed; all is as it was before" in said
    assert "ua/chat-1" in said
    assert _images(running) == old
    assert running.inventory.read_text() == text
    assert {path: path.read_bytes() for path in tree} == tree
    assert all(server.is_usable for server in balancer.servers().values())
    chat.check(10)
    solo.check(10)
    assert "nothing to do" in running.corral("up")


def test_secrets_are_not_in_the_history(running: Site) -> None:
    from corral.verbs.up import history

    values = [value.encode() for value in running.project.secrets.values()]
    kept = history.entries(running.out, "ua")
    assert 1 <= len(kept) <= history.KEPT
    for entry in kept:
        assert not [path for path, data in history.load(entry).items() if any(value in data for value in values)]


def test_the_gateway_is_one_process_and_its_change_has_a_gap(running: Site) -> None:
    """What is not hitless is said, not hidden."""
    running.edit("  chat:\n    model: tiny", "  chat:\n    aliases: [fast]\n    model: tiny")
    said = running.corral("up", "--render")
    assert "ua/litellm: did not answer for up to" in said
    assert running.client.chat_text("fast") == KNOWN_ANSWER
