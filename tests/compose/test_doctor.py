"""`doctor` against a real engine, with faults as they happen: each has to be named at its hop, with what helps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.runtime.hosts import ComposeHost
from tests.compose import command
from tests.compose.images.build import ensure_images
from tests.compose.project import Project, cut_off, docker, make_models, render_site, without_permission
from tests.processes.helpers import wait_until

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

HOST = "sa"
PORT = 21610
LIMIT_S = 60
WHOLE_LIMIT_S = 180
# Less than the server needs, more than the engine's least.
SMALLEST = "7m"
INVENTORY = """
schema_version: 1
name: corral-test-doctor
hosts:
  sa: {address: 127.0.0.1}
models:
  tiny: {source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}
pools:
  chat: {model: tiny, on: {host: sa, replicas: 2}, ports: 21610, engine: {slots: 2, threads: 1}}
gateway: {host: sa, port: 21600, admin_port: 21602, database: false, cache: false}
"""


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    out = tmp_path_factory.mktemp("doctor")
    (out / "inventory.yaml").write_text(INVENTORY)
    plan = render_site(out / "inventory.yaml", out)
    ensure_images([plan])
    make_models(plan, HOST, out / HOST / "models")
    with Project(plan, HOST, out, ComposeHost(plan, HOST, out).project) as project:
        project.up()
        yield project


@pytest.fixture(autouse=True)
def whole(site: Project) -> None:
    """Everything is well when a test begins."""
    wait_until(lambda: bool(doctor(site)["well"]), WHOLE_LIMIT_S, "nothing is wrong")


def run(site: Project, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = ["--inventory", str(site.out / "inventory.yaml"), "--out", str(site.out)]
    return command.run(["doctor", *paths, *words], environment)


def doctor(site: Project, *words: str, **environment: str) -> dict[str, Any]:
    done = run(site, "--json", *words, **environment)
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["well"] else 1)
    return found


def findings(site: Project, *words: str, **environment: str) -> dict[str, str]:
    """What was found, by check; the remedy after an arrow."""
    found = doctor(site, *words, **environment)["hosts"][HOST]["findings"]
    return {item["check"]: f"{item['what']} → {item['remedy']}" for item in found}


def wait_for(site: Project, check: str, words: str) -> str:
    """What a check finds, once it has these words."""
    seen: dict[str, str] = {}

    def is_found() -> bool:
        seen.update(findings(site))
        return words in seen.get(check, "")

    with contextlib.suppress(TimeoutError):
        wait_until(is_found, LIMIT_S, words)
    assert words in seen.get(check, ""), seen
    return seen[check]


def test_all_is_well_in_a_line_for_each_area(site: Project) -> None:
    done = run(site, NO_COLOR="1")
    lines = done.stdout.splitlines()
    assert lines[0] == "sa  127.0.0.1"
    marks = [line.split()[:2] for line in lines if line.startswith("  ✓")]
    areas = ("engine", "machine", "gpus", "files", "services", "path", "exposure")
    assert marks == [["✓", area] for area in areas], done.stdout
    assert "4 services healthy, LiteLLM 1." in done.stdout
    assert "clients → http://127.0.0.1:21600 → HAProxy → 2 of 2 replicas" in done.stdout
    assert (lines[-1], done.returncode) == ("all is well", 0)
    assert "\x1b" not in done.stdout


def test_no_secret_is_printed(site: Project) -> None:
    done = run(site, "--json")
    assert [name for name, value in site.secrets.items() if value in done.stdout + done.stderr] == []


def test_pools_answer_when_asked(site: Project) -> None:
    assert findings(site, "--ask")["answers"].startswith("chat answered after ")


def test_a_replica_out_of_memory_is_named_with_the_remedy(site: Project) -> None:
    docker("stop", "--time", "1", "sa-chat-2")
    docker("update", "--memory", SMALLEST, "--memory-swap", SMALLEST, "sa-chat-2")
    docker("start", "sa-chat-2")
    try:
        found = wait_for(site, "replicas-up", "(137: out of memory)")
        assert found.startswith("chat: HAProxy → sa-chat-2 ")
        assert f"on chat-2:{PORT + 1}: container " in found
        assert found.endswith("→ raise memory_mib or lower cache_ram_mib")
    finally:
        site.compose("up", "--detach", "--force-recreate", "--no-deps", "chat-2")


def test_a_damaged_model_file_is_found_in_the_file_and_in_the_log(site: Project) -> None:
    model = site.folder / "models" / "tiny.gguf"
    good = model.read_bytes()
    model.write_bytes(b"<html>not found</html>")
    try:
        docker("restart", "--time", "1", "sa-chat-1")
        found = wait_for(site, "running", "damaged or not complete")
        assert found.startswith("chat-1: ")
        assert "is no GGUF file; it begins with '<htm'" in findings(site)["models"]
    finally:
        model.write_bytes(good)


def test_a_replica_cut_off_from_the_balancer_is_told_from_a_sick_one(site: Project) -> None:
    with cut_off("sa-chat-2", "chat-2"):
        found = wait_for(site, "replicas-up", "although it is healthy on sa")
        assert found.startswith("chat: HAProxy → sa-chat-2 ")


def test_a_stopped_balancer_is_the_hop_that_fails(site: Project) -> None:
    docker("stop", "sa-haproxy")
    try:
        found = findings(site)
        assert found["balancer-answers"].startswith("clients → haproxy does not answer: ")
        assert "gateway-answers" not in found
    finally:
        docker("start", "sa-haproxy")


def test_another_key_in_env_than_the_gateway_was_started_with(site: Project) -> None:
    env = site.folder / ".env"
    good = env.read_text()
    env.write_text(good.replace("LITELLM_MASTER_KEY=sk-", "LITELLM_MASTER_KEY=sk-other-"))
    try:
        found = findings(site)
        assert found["key-accepted"].startswith("the gateway refuses LITELLM_MASTER_KEY of ")
        assert found["secrets"].startswith(".env and secrets/ disagree about LITELLM_MASTER_KEY")
    finally:
        env.write_text(good)


def test_a_port_that_another_program_holds(site: Project) -> None:
    docker("stop", "--time", "1", "sa-chat-1")
    try:
        with socket.create_server(("127.0.0.1", PORT)):
            assert findings(site)["ports"].startswith(f"port {PORT} (chat-1) is taken by ")
    finally:
        docker("start", "sa-chat-1")


def test_a_changed_inventory_is_told_from_a_changed_rendering(site: Project) -> None:
    inventory = site.out / "inventory.yaml"
    inventory.write_text(INVENTORY.replace("context: 2048", "context: 1024"))
    try:
        assert "not as the inventory says" in findings(site)["rendered"]
        assert "running-as-rendered" not in findings(site)
        render_site(inventory, site.out)
        found = findings(site)
        assert "rendered" not in found
        assert found["running-as-rendered"].startswith("running with an older configuration: chat-1, chat-2")
    finally:
        inventory.write_text(INVENTORY)
        render_site(inventory, site.out)


def test_open_secrets_are_found(site: Project) -> None:
    env = site.folder / ".env"
    env.chmod(0o644)
    try:
        assert findings(site)["secrets-private"].startswith("others can read .env (mode 644)")
    finally:
        env.chmod(0o600)


def test_an_engine_that_does_not_run(site: Project) -> None:
    found = findings(site, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert found["engine-answers"] == "Docker is installed but does not run → sudo systemctl enable --now docker"
    assert "running" not in found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without a right")
def test_a_user_who_may_not_use_the_engine(site: Project, tmp_path: Path) -> None:
    found = findings(site, **without_permission(tmp_path))
    assert found["engine-answers"].startswith(f"user {os.environ.get('USER', 'root')} may not use Docker → ")


def test_a_far_host_is_asked_over_ssh(site: Project, tmp_path: Path) -> None:
    """The words go through ssh's own splitting: a script that runs them in a shell stands in for the far side."""
    folder = tmp_path / "far"
    inventory = tmp_path / "inventory.yaml"
    inventory.write_text(INVENTORY.replace("127.0.0.1", f"127.0.0.1, ssh: somebody@192.0.2.10, folder: {folder}", 1))
    fake = tmp_path / "ssh"
    take_words = 'while [ "$1" != -- ]; do [ "$1" != -O ] || exit 1; shift; done; shift'
    fake.write_text(f'#!/bin/sh\n{take_words}\ncd {tmp_path} && exec sh -c "$*"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    words = ["--inventory", str(inventory), "--out", str(site.out), "--json"]
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    shutil.copytree(site.folder, folder)
    (folder / "haproxy" / "haproxy.cfg").write_text("another one\n")

    done = command.run(["doctor", *words], path)
    found = {item["check"]: item for item in json.loads(done.stdout)["hosts"][HOST]["findings"]}
    assert found["copied"]["what"] == "other files on the host than were rendered here: haproxy/haproxy.cfg"
    assert "engine-answers" not in found
    assert "does not forward to 127.0.0.1:" in found["gateway-answers"]["what"]
    assert "AllowTcpForwarding" in found["gateway-answers"]["remedy"]
    assert "clock" not in found or found["clock"]["what"] == "no time service sets the clock"

    fake.write_text("#!/bin/sh\necho 'somebody@192.0.2.10: Permission denied (publickey).' >&2\nexit 255\n")
    done = command.run(["doctor", *words], path)
    (only,) = json.loads(done.stdout)["hosts"][HOST]["findings"]
    assert (only["check"], "Permission denied (publickey)" in only["what"]) == ("host-reachable", True)
    assert only["remedy"] == "make `ssh somebody@192.0.2.10 true` work without a password"


def test_a_stopped_gateway_is_the_first_hop_that_fails(site: Project) -> None:
    """The last test: a start of LiteLLM takes longer than everything here."""
    docker("stop", "--time", "1", "sa-litellm")
    found = findings(site)
    assert found["gateway-answers"].startswith("clients → litellm does not answer: ")
    assert "container exited (137" in found["gateway-answers"] or "was stopped" in found["gateway-answers"]
    assert "replicas-up" not in found
