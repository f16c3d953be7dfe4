"""A site that one Docker Swarm runs: three real engines, a gateway that answers, a change under load, a lost node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from corral.verbs.keys.gateway import reached
from tests.compose import command
from tests.compose.engines import Engine, Switch, run
from tests.compose.far import Sshd, client_config
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, Load, replica_of
from tests.compose.site_up import Site
from tests.processes.helpers import wait_until
from tests.tiny_models import KNOWN_ANSWER, make_chat_model

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "network-namespaces", "sshd")

HOSTS = {"gate": "198.51.100.130", "one": "198.51.100.131", "two": "198.51.100.132"}
UUID = "GPU-5d3b7e3a-0f4b-4b3e-9a53-0c4f6f1d2e01"
STACK = f"{PREFIX}swarm"
# This kernel has no IPsec.
INVENTORY = """\
schema_version: 1
name: {name}
runtime: swarm
encrypted_networks: false
hosts:
  gate: {{address: {gate}, models_dir: {models}, ssh: {prefix}gate}}
  one: {{address: {one}, models_dir: {models}, ssh: {prefix}one, gpus: [{{card: p104-100, uuid: {uuid}}}]}}
  two: {{address: {two}, models_dir: {models}, ssh: {prefix}two}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}}
pools:
  chat:
    model: tiny
    on: [{{host: one, gpus: 1}}, {{host: two}}]
    engine: {{slots: 2, threads: 1, memory_mib: 512, environment: {{CORRAL_COMPUTES_ON: processor}}}}
gateway: {{host: gate, database: false, cache: false, queue: {{depth: 20, timeout_s: 60}}}}
"""
LIMIT_S = 60


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("swarm"))
    models = site.folder / "models"
    models.mkdir()
    make_chat_model(models / "tiny.gguf", context=2048)
    site.inventory.write_text(INVENTORY.format(name=STACK, models=models, prefix=PREFIX, uuid=UUID, **HOSTS))
    ensure_images([site.plan])
    return site


@pytest.fixture(scope="module")
def lan(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    """Three engines in one Swarm, reachable from here by address and through ssh."""
    folder = tmp_path_factory.mktemp("engines")
    options = ("--no-new-privileges", "--default-runtime=nvidia")
    engines = [
        Engine(name, f"{address}/25", folder / name, sorted(site.plan.images_of(name)), options)
        for name, address in HOSTS.items()
    ]
    with Switch(engines, "198.51.100.254/25") as lan, ExitStack() as stack:
        doors = [
            Sshd(f"{PREFIX}{item.name}", folder / f"sshd-{item.name}", HOSTS[item.name], item.namespace, item.socket)
            for item in engines
        ]
        site.environment.update(client_config([stack.enter_context(door) for door in doors], folder / "ssh_config"))
        yield lan


def _docker(lan: Switch, number: int, *words: str) -> str:
    return run("docker", *lan.engines[number].words, *words)


@pytest.fixture(scope="module")
def swarm(site: Site, lan: Switch) -> Switch:
    """The site, brought up on engines that were no Swarm before."""
    site.corral("render", "--quiet")
    site.corral("secrets", "init")
    assert "one: is in no Swarm; docker swarm init" in site.corral("up", code=1)
    _docker(lan, 0, "swarm", "init", "--advertise-addr", HOSTS["gate"])
    token = _docker(lan, 0, "swarm", "join-token", "--quiet", "worker").strip()
    for number in (1, 2):
        own = lan.engines[number].address.partition("/")[0]
        _docker(lan, number, "swarm", "join", "--token", token, "--advertise-addr", own, f"{HOSTS['gate']}:2377")
    said = site.corral("up")
    assert "4 services are up; 4 are new, 0 were changed" in said
    return lan


@pytest.fixture
def client(site: Site, swarm: Switch) -> Client:
    key = (site.out / "gate" / "secrets" / "LITELLM_MASTER_KEY").read_text()
    return Client(f"http://{HOSTS['gate']}:4000", key)


def test_a_chat_goes_from_host_to_host_and_is_answered_by_both(client: Client) -> None:
    wait_until(lambda: client.chat().status_code == 200, LIMIT_S, "the first answer")
    assert client.chat_text() == KNOWN_ANSWER
    wait_until(
        lambda: {replica_of(client.chat(content=str(number))) for number in range(6)} == {"one-chat-1", "two-chat-1"},
        LIMIT_S,
        "an answer of both",
    )


def test_every_task_is_confined_and_has_its_card_alone(swarm: Switch) -> None:
    cards = []
    for number in range(3):
        for task in _docker(swarm, number, "ps", "--quiet").split():
            [found] = json.loads(_docker(swarm, number, "inspect", task))
            status = Path(f"/proc/{found['State']['Pid']}/status").read_text()
            assert "NoNewPrivs:\t1" in status
            assert "CapEff:\t0000000000000000" in status
            assert found["HostConfig"]["ReadonlyRootfs"]
            cards += [item for item in found["Config"]["Env"] if item.startswith("NVIDIA_VISIBLE_DEVICES=GPU-")]
    assert cards == [f"NVIDIA_VISIBLE_DEVICES={UUID}"]


def test_status_and_logs_come_from_the_manager(site: Site, swarm: Switch) -> None:
    found = site.data("status")
    assert {row["service"] for row in found["services"]} == {"gate-haproxy", "gate-litellm", "one-chat-1", "two-chat-1"}
    assert all(row["well"] for row in found["services"])
    assert "one-chat-1.1." in site.corral("logs", "one", "--tail", "3")
    assert "leave out --host" in site.corral("up", "--host", "one", code=2)
    assert "see docs/swarm.md" in site.corral("doctor", code=2)


def test_the_operators_port_is_reached_over_ssh_and_published_nowhere(
    site: Site, swarm: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    key = (site.out / "gate" / "secrets" / "LITELLM_MASTER_KEY").read_text()
    with reached(site.plan, site.out) as place:
        found = httpx.get(f"{place}/model/info", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    assert [item["model_name"] for item in found.json()["data"]] == ["chat"]
    ports = _docker(swarm, 0, "ps", "--format", "{{.Ports}}")
    assert "->4000/" in ports
    assert "4002->" not in ports


def test_a_change_of_all_replicas_under_load_fails_no_request(site: Site, client: Client) -> None:
    site.edit("memory_mib: 512", "memory_mib: 600")
    with Load(client) as load:
        load.wait_for(3)
        said = site.corral("up", "--render")
        load.wait_for(3)
    assert load.failures() == []
    assert "0 are new, 2 were changed" in said
    assert {replica for _, replica in load.results} == {"one-chat-1", "two-chat-1"}


def test_a_lost_node_is_left_out_and_the_others_answer(site: Site, swarm: Switch, client: Client) -> None:
    swarm.cut(swarm.engines[1])

    def states() -> dict[str, bool]:
        done = command.run(site.arguments("status", "--json"), site.environment)
        return {row["service"]: row["well"] for row in json.loads(done.stdout)["services"]}

    wait_until(lambda: not states()["one-chat-1"], LIMIT_S, "the pinned replica is marked")
    assert states() == {"gate-haproxy": True, "gate-litellm": True, "one-chat-1": False, "two-chat-1": True}
    assert {client.chat(content=str(number)).status_code for number in range(6)} == {200}


def test_down_leaves_nothing_at_the_manager(site: Site, swarm: Switch) -> None:
    site.corral("down")
    for kind in ("service", "config", "secret"):
        assert _docker(swarm, 0, kind, "ls", "--quiet").split() == []
