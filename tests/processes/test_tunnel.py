"""Workers that dial out, each in a network namespace with no way in (003-01, 11, 13…17; issue 20).

The real sshd, ssh, HAProxy and LiteLLM; what answers on a worker is a fake Ollama on its own loopback address.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from corral.build import build_plan
from corral.cli.main import main
from corral.config.load import load_inventory
from corral.render.output import write
from corral.render.secrets import initialise
from corral.render.tree import render
from corral.runtime import supervisor
from tests.processes import farm as farms
from tests.processes.farm import HOST, Extras, Farm, is_listening
from tests.processes.helpers import Process, wait_until
from tests.processes.wires import orders
from tests.processes.wires.orders import LOOPBACK, order

pytestmark = [pytest.mark.needs("haproxy", "sshd", "network-namespaces"), pytest.mark.xdist_group("tunnel")]

# Nodes with a machine each; `attic` is in the inventory and has never had a key.
MACHINES = ("laptop", "desk")
OLLAMA = 11434
MODEL = "llama3.2:3b"
# sshd gives a silent worker up after 15 s, HAProxy asks a node again after 4 s.
BACK_S, GONE_S, REVOKED_S = 30.0, 45.0, 5.0


class Machines(Farm):
    """The farm, its workers' machines, and the ssh that runs on each."""

    address: str
    ssh: dict[str, Process]

    def space(self, name: str) -> str:
        return f"{self.folder.parent.name[-8:]}-{name}"

    def inside(self, name: str, *words: str) -> list[str]:
        """A command on a machine, where the worker's folder lies in the home folder."""
        script = f'mount --bind {self.out}/homes/{name} /root && exec "$@"'
        return ["ip", "netns", "exec", self.space(name), "sh", "-c", script, "-", *words]

    def home(self, name: str) -> Path:
        return self.out / "homes" / name

    def verb(self, *words: str) -> None:
        """`./generate.py workers …` succeeds."""
        assert main(["workers", *words, "--inventory", str(self.out / "inventory.yaml"), "--out", str(self.out)]) == 0

    def give(self, verb: str, name: str, capsys: pytest.CaptureFixture[str]) -> str:
        """Issues or rotates a key and brings the folder to the machine; returns the printed command."""
        there = self.home(name) / f"corral-worker-{name}"
        shutil.rmtree(there, ignore_errors=True)
        capsys.readouterr()
        self.verb(verb, name, "--to", str(there))
        return capsys.readouterr().out.strip()

    def dial(self, name: str, command: str) -> None:
        """Starts the printed command on a machine, as its user would; it works once the balancer uses the node."""
        self.hang_up(name)
        process = Process(self.inside(name, "sh", "-c", f"exec {command}"), self.out / f"ssh-{name}.log")
        self.ssh[name] = process.__enter__()
        wait_until(lambda: is_listening(self.ports[name]), BACK_S, f"{name} has its port: {process.output}")
        wait_until(lambda: name not in self.down(), BACK_S, f"{name} gets requests: {process.output}")

    def hang_up(self, name: str) -> None:
        if name in self.ssh:
            self.ssh.pop(name).__exit__(None, None, None)

    def listed(self, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
        capsys.readouterr()
        self.verb("ls", "--json")
        return {row["name"]: row for row in json.loads(capsys.readouterr().out)}

    def ssh_words(self, name: str, *words: str, key: str = "key") -> list[str]:
        """A login from a machine with other wishes than those of its own command."""
        folder = f"/root/corral-worker-{name}"
        options = [
            *("-F", "none", "-i", f"{folder}/{key}", "-o", f"UserKnownHostsFile={folder}/known_hosts"),
            *("-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-p", str(self.ports["tunnel"])),
        ]
        return self.inside(name, "ssh", *options, *words)

    def try_ssh(self, name: str, *words: str, key: str = "key") -> subprocess.CompletedProcess[str]:
        """How such a login ends."""
        command = self.ssh_words(name, *words, key=key)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=40, check=False, stdin=subprocess.DEVNULL
        )


def inventory_of(ports: dict[str, int], address: str) -> dict[str, Any]:
    node = {"engine": "ollama", "model": MODEL}
    return {
        "schema_version": 1,
        "name": "test-tunnel",
        "hosts": {HOST: {"runtime": "local", "address": LOOPBACK}},
        "nodes": {name: node | {"dials_in": ports[name]} for name in (*MACHINES, "attic")},
        "pools": {
            "herd": {"on": [{"node": name} for name in MACHINES], "queue": {"depth": 20, "timeout_s": 60}},
            "rare": {"on": {"node": "attic"}},
        },
        "gateway": {
            "host": HOST, "port": ports["gateway"], "admin_port": ports["admin"], "litellm_port": ports["litellm"],
            "balancer_port": ports["balancer"], "stats_port": ports["stats"], "database": False, "cache": False,
            "tunnel": {"port": ports["tunnel"], "address": address},
        },
    }  # fmt: skip


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=30)


@contextmanager
def namespace(name: str, block: int, address: str) -> Iterator[None]:
    """A machine with a cable to the farm, on which it can call the farm's address and no other."""
    here, there = f"203.0.113.{4 * block + 1}", f"203.0.113.{4 * block + 2}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "lan", "netns", name)
        run("ip", "address", "add", f"{here}/30", "dev", name)
        run("ip", "link", "set", name, "up")
        for words in (f"address add {there}/30 dev lan", "link set lan up", "link set lo up"):
            run("ip", "-n", name, *words.split())
        if address != here:
            run("ip", "-n", name, "route", "add", f"{address}/32", "via", here)
        yield
    finally:
        run("ip", "netns", "delete", name)


@contextmanager
def running() -> Iterator[Machines]:
    wanted = ["gateway", "admin", "litellm", "balancer", "stats", "fakes", "tunnel", *MACHINES, "attic"]
    ports = farms.choose_ports(wanted)
    block = random.randrange(32) * 2  # noqa: S311 - no secret
    address = f"203.0.113.{4 * block + 1}"
    # Not pytest's folder: that is closed to the account that root lends sshd.
    folder = Path(tempfile.mkdtemp(prefix="corral-tunnel-"))
    folder.chmod(0o755)
    try:
        path = folder / "inventory.yaml"
        path.write_text(yaml.safe_dump(inventory_of(ports, address), sort_keys=False), encoding="utf-8")
        plan = build_plan(load_inventory(path))
        write(render(plan), folder)
        initialise({HOST: plan.secrets_of(HOST)}, folder)
        farm = Machines("slots", folder, plan, ports, Extras())
        farm.address, farm.ssh = address, {}
        with ExitStack() as stack:
            for number, name in enumerate(MACHINES):
                farm.home(name).mkdir(parents=True)
                stack.enter_context(namespace(farm.space(name), block + number, address))
                command = ["ip", "netns", "exec", farm.space(name), *orders.command("ollama", OLLAMA)]
                stack.enter_context(Process(command, folder / f"{name}.log"))
            supervisor.start(farm.folder, farms.search_path())
            stack.callback(supervisor.stop, farm.folder, grace_s=farms.STOP_GRACE_S)
            farm.wait_healthy()
            stack.enter_context(farm.client)
            yield farm
            for name in MACHINES:
                farm.hang_up(name)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def farm() -> Iterator[Machines]:
    with running() as machines:
        yield machines


@pytest.fixture(autouse=True)
def connected(farm: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """Every test begins with both machines connected."""
    for name in MACHINES:
        if not (farm.home(name) / f"corral-worker-{name}").exists():
            farm.give("issue", name, capsys)
        if name not in farm.ssh or farm.ssh[name].exit_code() is not None:
            farm.dial(name, command_of(name))


def command_of(name: str) -> str:
    return f"ssh -N -F ~/corral-worker-{name}/config farm"


def ask(farm: Machines, text: str = "") -> httpx.Response:
    return farm.ask("herd", text).raise_for_status()


def test_answers_come_through_the_printed_command_plain_and_streamed(farm: Machines) -> None:
    said = ["  Grüße, ", "1 < 2 and\n\n", "🦙"]
    for _ in range(4):
        assert ask(farm, order(said)).json()["choices"][0]["message"]["content"] == "".join(said)
        streamed = farm.ask_streamed("herd", order(said, service_s=0.3))
        assert (streamed.text, streamed.finish_reasons) == ("".join(said), ["stop"])
    assert_both_work(farm)


def test_a_machine_listens_on_loopback_only_and_knows_one_way(farm: Machines) -> None:
    for name in MACHINES:
        words = ["ip", "netns", "exec", farm.space(name)]
        listening = subprocess.run([*words, "ss", "-ltnH"], capture_output=True, text=True, check=True, timeout=30)
        assert {line.split()[3] for line in listening.stdout.splitlines()} == {f"{LOOPBACK}:{OLLAMA}"}
        routes = subprocess.run([*words, "ip", "route"], capture_output=True, text=True, check=True, timeout=30)
        assert "default" not in routes.stdout


# --- workers that are lost


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_costs_what_was_in_flight_there_and_comes_back(farm: Machines, number: signal.Signals) -> None:
    with ThreadPoolExecutor(2) as threads:
        # One on each machine, each of which has one slot.
        slow = [threads.submit(farm.ask, "herd", order(["late"], service_s=6)) for _ in MACHINES]
        wait_until(lambda: busy(farm) == set(MACHINES), 20, "both machines are at work")
        os.kill(farm.ssh["laptop"].pid, number)
        answers = [item.result() for item in slow]
    good = [farm.replica(answer) for answer in answers if answer.is_success]
    assert "desk" in good
    for _ in range(3):
        assert farm.replica(ask(farm)) == "desk"
    wait_until(lambda: "laptop" in farm.down(), GONE_S, "HAProxy uses the machine no more")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{LOOPBACK}:{farm.ports['laptop']}/api/tags", trust_env=False)
    os.kill(farm.ssh["laptop"].pid, signal.SIGCONT)  # a killed one is a zombie still
    assert farm.ssh["laptop"].wait(BACK_S) != 0
    farm.dial("laptop", command_of("laptop"))
    assert_both_work(farm)


def assert_both_work(farm: Machines) -> None:
    """Each machine has one slot, so two requests at once need both."""
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: ask(farm, order(["fine"], service_s=2)), MACHINES))
    assert {farm.replica(answer) for answer in answers} == set(MACHINES)


def seen_on(farm: Machines, name: str) -> str:
    """What has reached the fake on a machine; only that machine can ask it."""
    call = (
        f"import urllib.request as u; print(u.urlopen('http://{LOOPBACK}:{OLLAMA}/seen', timeout=10).read().decode())"
    )
    words = ["ip", "netns", "exec", farm.space(name), sys.executable, "-c", call]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def busy(farm: Machines) -> set[str]:
    figures = farm.balancer_figures("haproxy_server_current_sessions")
    return {name for name in MACHINES if figures[f"herd/{name}"] > 0}


def test_workers_find_the_same_farm_after_a_restart_of_sshd(farm: Machines) -> None:
    farm.restart("tunnel")
    for name in MACHINES:
        assert farm.ssh[name].wait(BACK_S) != 0
        farm.dial(name, command_of(name))
    assert_both_work(farm)


# --- what a worker may not do


def test_a_worker_can_open_its_own_port_and_nothing_else(farm: Machines) -> None:
    farm.hang_up("laptop")
    wait_until(lambda: not is_listening(farm.ports["laptop"]), 10, "its port is free")
    here, other, spare = (str(farm.ports[name]) for name in ("laptop", "desk", "attic"))
    inside = str(farm.ports["balancer"])
    user = f"sshd@{farm.address}"
    back = f"{LOOPBACK}:{OLLAMA}"
    refused = {
        "another worker's port": ("-N", "-R", f"{other}:{back}", user),
        "the port of a worker without a key": ("-N", "-R", f"{spare}:{back}", user),
        "a port that sshd chooses": ("-N", "-R", f"0:{back}", user),
        "every port, as a proxy": ("-N", "-R", "1080", user),
        "a socket in the file system": ("-N", "-R", f"/tmp/{here}.sock:{back}", user),
        "the balancer behind the door": ("-W", f"{LOOPBACK}:{inside}", user),
        "another worker": ("-W", f"{LOOPBACK}:{other}", user),
        "a shell": (user,),
        "a command": (user, "id"),
        "files": ("-s", user, "sftp"),
    }
    for what, words in refused.items():
        done = farm.try_ssh("laptop", *words)
        assert (done.returncode, done.stdout) == (255, ""), (what, done)
    assert not Path(f"/tmp/{here}.sock").exists()
    # The same login may open its own port: what was refused above was so for what it asked.
    allowed = farm.ssh_words("laptop", "-N", "-R", f"{here}:{back}", user)
    with Process(allowed, farm.out / "own.log") as own:
        wait_until(lambda: is_listening(farm.ports["laptop"]), 20, f"its own port is open: {own.output}")


def test_no_other_key_opens_anything(farm: Machines) -> None:
    stranger = farm.home("laptop") / "corral-worker-laptop" / "stranger"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger))
    done = farm.try_ssh("laptop", "-N", f"sshd@{farm.address}", key="stranger")
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


# --- keys


def test_a_revoked_worker_is_out_at_once_and_others_are_not(farm: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = farm.ssh_words("laptop", "-v", "-N", f"sshd@{farm.address}")
    with Process(waiting, farm.out / "waiting.log") as lurker, ThreadPoolExecutor(4) as threads:
        wait_until(lambda: "Authenticated to" in lurker.output, 20, "the lurker is in, without a port")
        slow = [threads.submit(farm.ask, "herd", order(["late"], service_s=6)) for _ in MACHINES]
        wait_until(lambda: busy(farm) == set(MACHINES), 20, "both machines are at work")
        revoked = threads.submit(farm.verb, "revoke", "laptop")
        wait_until(
            lambda: not is_listening(farm.ports["laptop"]), REVOKED_S, "its connection has ended since the order"
        )
        after = threads.submit(ask, farm, "sent afterwards")
        revoked.result()
        assert lurker.wait(REVOKED_S) != 0
        assert farm.ssh["laptop"].wait(REVOKED_S) != 0
        assert farm.replica(after.result()) == "desk"
        assert "sent afterwards" not in seen_on(farm, "laptop")
        assert "sent afterwards" in seen_on(farm, "desk")
        assert farm.ssh["desk"].exit_code() is None
        good = [item.result() for item in slow if item.result().is_success]
    assert "desk" in [farm.replica(answer) for answer in good]
    again = subprocess.run(
        farm.inside("laptop", "sh", "-c", command_of("laptop")), capture_output=True, text=True, timeout=40, check=False
    )
    assert "Permission denied" in again.stderr
    assert farm.replica(ask(farm)) == "desk"
    assert farm.listed(capsys)["laptop"]["fingerprint"] is None
    farm.dial("laptop", farm.give("issue", "laptop", capsys))


def test_a_rotated_key_replaces_the_old_one(farm: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    folder = farm.home("laptop") / "corral-worker-laptop"
    before, old = farm.listed(capsys)["laptop"], (folder / "key").read_bytes()
    command = farm.give("rotate", "laptop", capsys)
    assert farm.ssh["laptop"].wait(REVOKED_S) != 0
    (folder / "old").write_bytes(old)
    (folder / "old").chmod(0o600)
    assert "Permission denied" in farm.try_ssh("laptop", "-N", f"sshd@{farm.address}", key="old").stderr
    farm.dial("laptop", command)
    assert farm.listed(capsys)["laptop"]["fingerprint"] != before["fingerprint"]


def test_ls_says_who_is_connected_and_when_a_worker_was_seen_last(
    farm: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    found = farm.listed(capsys)
    assert {name: row["connected"] for name, row in found.items()} == {"laptop": True, "desk": True, "attic": False}
    assert found["attic"]["fingerprint"] is None
    farm.hang_up("laptop")
    wait_until(lambda: "laptop" in farm.down(), GONE_S, "HAProxy has noticed")
    away = farm.listed(capsys)["laptop"]
    assert away["connected"] is False
    assert away["last_seen"] >= found["laptop"]["last_seen"]
