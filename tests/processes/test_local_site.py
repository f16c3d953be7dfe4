"""The life of a site of one `local` host, through the verbs that a person types, with the real programs."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import httpx
import pytest

from corral.cli import main
from corral.render.secrets import read_env
from corral.runtime import supervisor
from tests.processes import farm
from tests.processes.helpers import wait_until
from tests.tiny_models import make_chat_model

ANSWER = "One machine is enough."
INVENTORY = """\
schema_version: 1
name: lab
hosts:
  mac: {{runtime: local}}
models:
  m: {{source: m.gguf, kind: chat, context: 2048, size_gib: 0.01}}
pools:
  chat: {{model: m, on: {{host: mac, replicas: {replicas}}}, ports: {chat}, engine: {{slots: {slots}, threads: 1}}}}
  other: {{model: m, on: {{host: mac}}, ports: {other}, engine: {{slots: 1, threads: 1}}}}
gateway:
  host: mac
  port: {gateway}
  admin_port: {admin}
  litellm_port: {litellm}
  balancer_port: {balancer}
  stats_port: {stats}
  cache_port: {cache}
  database: false
"""
PORTS = ("chat", "chat-2", "other", "gateway", "admin", "litellm", "balancer", "stats", "cache")
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Site:
    """A folder with an inventory, and the verbs on it."""

    root: Path
    ports: dict[str, int]
    capsys: pytest.CaptureFixture[str]

    @property
    def folder(self) -> Path:
        return (self.root / "out" / "mac").resolve()

    def write(self, *, replicas: int = 2, slots: int = 2) -> None:
        text = INVENTORY.format(replicas=replicas, slots=slots, **self.ports)
        (self.root / "inventory.yaml").write_text(text)

    def run(self, verb: str, *arguments: str, code: int = 0) -> str:
        """What a verb prints on both streams; its exit code must be this one."""
        places = ["--inventory", str(self.root / "inventory.yaml"), "--out", str(self.root / "out")]
        self.capsys.readouterr()
        got = main([*verb.split(), *arguments, *places])
        said = "\n".join(self.capsys.readouterr())
        assert got == code, said
        return said

    def pids(self) -> dict[str, int]:
        return {name: item.pid for name, item in (supervisor.programs(self.folder) or {}).items()}

    def ask(self, pool: str = "chat") -> str:
        key = read_env(self.folder / ".env")["LITELLM_MASTER_KEY"]
        response = httpx.post(
            f"http://127.0.0.1:{self.ports['gateway']}/v1/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": pool, "messages": [{"role": "user", "content": "Hello"}]},
            timeout=DEADLINE_S,
            trust_env=False,
        )
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site that never ran; what a failing test leaves running is ended."""
    path = farm.search_path()
    monkeypatch.setattr(supervisor, "search_path", lambda: path)
    made = Site(tmp_path, farm.choose_ports(PORTS), capsys)
    yield made
    for process in supervisor.members(made.folder):
        process.kill()


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def ask_until(site: Site, is_over: Event) -> int:
    """Asks again and again, and returns how often; an answer that is an error ends it with that error."""
    count = 0
    while not is_over.is_set():
        assert site.ask() == ANSWER
        count += 1
    return count


@pytest.mark.needs("haproxy", "redis")
def test_life_of_a_site_without_docker(site: Site) -> None:
    model = _first_up(site)
    before = site.pids()
    assert "nothing to do: 6 services on mac are up" in site.run("up")
    assert site.pids() == before

    _change_the_inventory(site)
    _break_a_replica(site, model)
    _kill_the_supervisor(site)

    before = site.pids()
    site.run("restart", "other")
    assert changed(before, site.pids()) == {"other-1"}
    said = site.run("logs", "other", "haproxy", "--tail", "2").splitlines()
    assert {line.split()[0] for line in said if line} == {"other-1", "haproxy"}
    assert "have no times" in site.run("logs", "--since", "1h", code=2)

    site.run("down")
    assert supervisor.members(site.folder) == []
    assert "nothing runs here yet" in site.run("doctor")
    assert "missing" in site.run("status", code=1)


def _first_up(site: Site) -> Path:
    """From an inventory to an answer, by the words that the verbs say next; returns the model's file."""
    site.write()
    assert "next: ./generate.py secrets init" in site.run("render")
    site.run("secrets init")
    assert "next: ./generate.py up" in site.run("render")
    assert "m.gguf" in site.run("doctor", code=1)
    model = site.folder / "models" / "m.gguf"
    model.parent.mkdir()
    make_chat_model(model, answer=ANSWER)
    said = site.run("up")
    assert "6 services on mac are up after" in said
    assert f"base URL: http://127.0.0.1:{site.ports['gateway']}/v1" in said
    assert site.ask() == ANSWER
    assert "all 6 services well" in site.run("status")
    assert "all is well" in site.run("doctor", "--ask")
    return model


def _change_the_inventory(site: Site) -> None:
    """Another number of slots and of replicas: only what is not as rendered is another process afterwards."""
    before = site.pids()
    site.write(slots=3)
    assert "nothing was started" in site.run("up", code=3)
    site.run("render")
    assert "2 not as rendered" in site.run("status")
    assert "running with an older configuration: chat-1, chat-2 " in site.run("doctor")
    with ThreadPoolExecutor() as pool:
        is_over = Event()
        asking = [pool.submit(ask_until, site, is_over) for _ in range(2)]
        try:
            said = site.run("up")
        finally:
            is_over.set()
        assert all(one.result() > 1 for one in asking)
    assert "changed, one at a time: chat-1, chat-2" in said
    assert "the balancer reads its new configuration, without a gap" in said
    assert said.count("back in rotation") == 2
    assert changed(before, site.pids()) == {"chat-1", "chat-2"}
    assert "not as rendered" not in site.run("status")
    before = site.pids()
    site.write(slots=3, replicas=1)
    assert "chat-2 is not in the inventory any more" in site.run("up", "--render")
    assert changed(before, site.pids()) == {"chat-2"}
    assert site.ask() == ANSWER


def _break_a_replica(site: Site, model: Path) -> None:
    """A server that ends, and cannot be started again as its model is gone, is said to be so and repaired."""
    kept = model.rename(model.with_suffix(".kept"))
    os.kill(site.pids()["chat-1"], signal.SIGKILL)
    log = site.folder / "logs" / "supervisord.log"
    wait_until(lambda: "exited: chat-1 (exit status 1" in log.read_text(), DEADLINE_S, "the server ended again")
    assert "4 of 5 services well" in site.run("status", code=1)
    assert "chat-1: it does not stay up (exit status 1)" in site.run("doctor", code=1)
    kept.rename(model)
    site.run("up")
    assert site.ask() == ANSWER


def _kill_the_supervisor(site: Site) -> None:
    """What runs without its supervisord is named, ended and started again."""
    orphans = set(site.pids().values())
    os.kill(int((site.folder / "supervisord.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: not site.pids(), DEADLINE_S, "supervisord is gone")
    assert "processes run without their supervisord" in site.run("doctor", code=1)
    assert "not there to restart" in site.run("restart", "chat", code=1)
    assert "processes that an earlier run left" in site.run("up")
    assert not orphans & set(site.pids().values())
    assert site.ask("other") == ANSWER
