"""`status`, `logs` and `restart` against a real engine: two replicas and the balancer; the gateway is never started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.runtime import observe as observing
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import observe
from tests.compose import command
from tests.compose.images.build import ensure_images
from tests.compose.project import Project, cut_off, docker, frozen, make_models, render_site
from tests.processes.helpers import REPOSITORY, Process, wait_until

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

HOST = "sa"
STARTED = ("chat-1", "chat-2", "haproxy")
STRANGER = "sa-stranger"
LIMIT_S = 60
INVENTORY = """
schema_version: 1
name: corral-test-status
hosts:
  sa: {address: 127.0.0.1}
models:
  tiny: {source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}
pools:
  chat:
    model: tiny
    on: {host: sa, replicas: 2}
    ports: 21510
    aliases: [default]
    engine:
      slots: 2
      threads: 1
      environment: {CORRAL_WATCH_S: "1", CORRAL_STALL_S: "20", CORRAL_RESTARTS: "1"}
gateway: {host: sa, port: 21500, admin_port: 21502, database: false, cache: false}
"""


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    out = tmp_path_factory.mktemp("status")
    (out / "inventory.yaml").write_text(INVENTORY)
    plan = render_site(out / "inventory.yaml", out)
    ensure_images([plan])
    make_models(plan, HOST, out / HOST / "models")
    with Project(plan, HOST, out, ComposeHost(plan, HOST, out).project) as project:
        project.up(*STARTED)
        yield project


@pytest.fixture(autouse=True)
def whole(site: Project) -> None:
    """What was started is well, and in rotation, when a test begins."""
    wait_until(lambda: set(_rows(site, "healthy")) == set(STARTED), LIMIT_S, "the started services are well")


def arguments(site: Project, *words: str) -> list[str]:
    return [words[0], "--inventory", str(site.out / "inventory.yaml"), "--out", str(site.out), *words[1:]]


def process(site: Project, out: Path, *words: str) -> Process:
    """A command in a process of its own, to be interrupted."""
    program = [sys.executable, str(REPOSITORY / "generate.py")]
    return Process([*program, *arguments(site, *words)], out, environment={"NO_COLOR": "1"})


def corral(site: Project, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return command.run(arguments(site, *words), environment)


def status(site: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(corral(site, "status", "--json").stdout)
    return found


def rows(site: Project) -> dict[str, dict[str, Any]]:
    return {row["service"]: row for row in status(site)["hosts"][HOST]["services"]}


def _rows(site: Project, health: str) -> list[str]:
    return [name for name, row in rows(site).items() if row["health"] == health and row["well"]]


# --- status ----------------------------------------------------------------------------------------------------------


def test_every_service_of_the_plan_is_shown_with_its_figures(site: Project) -> None:
    found = rows(site)
    assert list(found) == ["chat-1", "chat-2", "haproxy", "litellm"]
    replica = found["chat-1"]
    planned = next(service for service in site.plan.services_of(HOST) if service.name == "chat-1")
    assert [replica[key] for key in ("state", "health", "well", "restarts")] == ["running", "healthy", True, 0]
    assert (replica["pool"], replica["model"], replica["slots"], replica["slots_busy"]) == ("chat", "tiny", 2, 0)
    assert replica["memory_limit_mib"] == planned.memory_mib
    assert 1 < replica["memory_mib"] < planned.memory_mib
    assert 0 <= replica["uptime_s"] < 600


def test_a_missing_service_makes_it_fail(site: Project) -> None:
    done = corral(site, "status", NO_COLOR="1", COLUMNS="120")
    assert done.returncode == 1
    assert "3 of 4 services well · 1 not as rendered: ./generate.py up" in done.stdout
    assert re.search(r"^litellm +missing", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout


def test_a_request_takes_a_slot(site: Project) -> None:
    body = '{"messages": [{"role": "user", "content": "hello"}]}'
    head = rf"POST /chat/sa-chat-1/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    script = f"exec 3<>/dev/tcp/127.0.0.1/8081; printf '{head}{body}' >&3; sleep 20"
    with frozen(site, "sa-chat-1"):
        docker("exec", "--detach", "sa-haproxy", "bash", "-c", script)
        wait_until(lambda: sum(row["slots_busy"] or 0 for row in rows(site).values()) == 1, LIMIT_S, "one slot is busy")


def test_a_stopped_replica_is_named(site: Project) -> None:
    docker("stop", "--time", "1", "sa-chat-2")
    try:
        done = corral(site, "status", NO_COLOR="1", COLUMNS="120")
        assert re.search(r"^chat-2 +exited, code \d+", done.stdout, re.MULTILINE), done.stdout
        assert done.returncode == 1
    finally:
        docker("start", "sa-chat-2")


def test_a_replica_that_the_balancer_cannot_reach_is_not_well(site: Project) -> None:
    with cut_off("sa-chat-2", "chat-2"):
        wait_until(
            lambda: rows(site)["chat-2"]["notes"] == ["the balancer cannot reach it"], LIMIT_S, "the balancer lost it"
        )
        assert rows(site)["chat-2"]["health"] == "healthy"
        assert not rows(site)["chat-2"]["well"]


def test_a_hung_replica_is_started_anew_and_parked_past_its_budget(site: Project) -> None:
    def was_ended(times: int) -> bool:
        return bool(rows(site)["chat-2"]["restarts"] == times)

    before = rows(site)["chat-2"]["restarts"]
    with frozen(site, "sa-chat-2"):
        wait_until(lambda: was_ended(before + 1), 90, "the watchdog has ended the frozen server")
    wait_until(lambda: rows(site)["chat-2"]["well"], LIMIT_S, "it is back, in rotation")
    docker("exec", "sa-chat-2", "sh", "-c", "echo 'CUDA error: made up' >/tmp/corral-trouble")
    wait_until(lambda: rows(site)["chat-2"]["health"] == "parked", LIMIT_S, "it is parked")
    words = "ended 2 times in 60 min, last: CUDA error: made up"
    assert rows(site)["chat-2"]["notes"] == [words]
    shown = " ".join(corral(site, "status", NO_COLOR="1", COLUMNS="200").stdout.split())
    assert f"parked: {words}" in shown
    assert rows(site)["chat-1"]["well"]
    done = corral(site, "restart", "chat-2", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert rows(site)["chat-2"]["well"]


def test_a_container_that_is_not_in_the_plan_is_marked(site: Project) -> None:
    label = f"corral.site={site.plan.inventory.name}"
    docker(*f"run --detach --rm --name {STRANGER} --label {label} --entrypoint sleep haproxy:3.2.26 300".split())
    try:
        row = rows(site)[STRANGER]
        assert (row["in_plan"], row["notes"]) == (False, ["not in the plan"])
    finally:
        docker("rm", "--force", STRANGER)


def test_a_change_that_was_rendered_and_not_brought_up_is_marked(site: Project) -> None:
    inventory = site.out / "inventory.yaml"
    inventory.write_text(INVENTORY.replace("context: 2048", "context: 1024"))
    try:
        render_site(inventory, site.out)
        found = rows(site)
        old = {name for name, row in found.items() if "older than the rendering" in row["notes"]}
        assert old == {"chat-1", "chat-2"}
        assert found["chat-1"]["well"]
    finally:
        inventory.write_text(INVENTORY)
        render_site(inventory, site.out)


def test_an_engine_that_does_not_run_is_a_line_and_not_a_traceback(site: Project) -> None:
    done = corral(site, "status", DOCKER_HOST="unix:///nowhere/docker.sock", NO_COLOR="1", COLUMNS="160")
    assert done.returncode == 1
    assert "Cannot connect to the Docker daemon" in done.stdout
    assert "Traceback" not in done.stderr


def test_memory_is_asked_from_docker_where_control_groups_cannot_be_read(
    site: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = ComposeHost(site.plan, HOST, site.out)
    read = {item.service: item.memory_mib for item in observe(host).containers}
    script = observing.SCRIPT.read_text().replace('"/proc/$pid/cgroup"', "/nowhere")
    monkeypatch.setattr(observing, "SCRIPT", tmp_path / "observe.sh")
    observing.SCRIPT.write_text(script)
    asked = {item.service: item.memory_mib for item in observe(host).containers}
    assert set(asked) == set(read) == set(STARTED)
    for name, mib in asked.items():
        assert mib == pytest.approx(read[name], abs=8), name


def test_watch_draws_again_until_ctrl_c(site: Project, tmp_path: Path) -> None:
    with process(site, tmp_path / "out", "status", "--watch", "0.5") as watch:
        wait_until(lambda: watch.output.count("services well") >= 2, LIMIT_S, "two tables")
        os.kill(watch.pid, signal.SIGINT)
        assert watch.wait(20) == 1
        assert "Traceback" not in watch.output


def test_watch_and_json_do_not_go_together(site: Project) -> None:
    done = corral(site, "status", "--watch", "--json")
    assert (done.returncode, "one document per call" in done.stderr) == (2, True)


# --- logs ------------------------------------------------------------------------------------------------------------


def test_logs_have_the_service_in_front_and_are_in_order(site: Project) -> None:
    done = corral(site, "logs", "chat", "haproxy", "--tail", "5", NO_COLOR="1")
    names = [line.split("│")[0].strip() for line in done.stdout.splitlines()]
    assert set(names) == {"chat-1", "chat-2", "haproxy"}, done.stdout
    assert max(names.count(name) for name in set(names)) <= 5
    assert done.returncode == 0


def test_logs_of_one_container_by_its_name(site: Project) -> None:
    done = corral(site, "logs", "sa-chat-1", "-n", "all")
    assert {line.split("│")[0].strip() for line in done.stdout.splitlines()} == {"chat-1"}
    assert "listening on http://" in done.stdout


def test_logs_of_a_wrong_name_say_what_is_meant(site: Project) -> None:
    done = corral(site, "logs", "chatt")
    assert (done.returncode, done.stderr) == (
        2,
        'corral: nothing is called "chatt"; did you mean "chat" or "chat-2"?\n',
    )


def test_logs_follow_until_ctrl_c(site: Project, tmp_path: Path) -> None:
    with process(site, tmp_path / "out", "logs", "chat-1", "--follow", "--tail", "1") as follow:
        wait_until(lambda: "chat-1" in follow.output, LIMIT_S, "the last line")
        docker("exec", "sa-chat-1", "sh", "-c", "echo hello from the test >/proc/1/fd/1")
        wait_until(lambda: "hello from the test" in follow.output, LIMIT_S, "the new line")
        os.kill(follow.pid, signal.SIGINT)
        assert follow.wait(20) == 0
        assert "Traceback" not in follow.output


# --- restart ---------------------------------------------------------------------------------------------------------


def test_restart_of_a_pool_takes_one_replica_after_the_other(site: Project) -> None:
    before = {name: site.inspect(f"sa-{name}")["State"]["StartedAt"] for name in ("chat-1", "chat-2")}
    ids = site.ids()
    done = corral(site, "restart", "chat", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    after = {name: site.inspect(f"sa-{name}")["State"] for name in ("chat-1", "chat-2")}
    assert all(after[name]["StartedAt"] > before[name] for name in before)
    assert after["chat-2"]["StartedAt"] > after["chat-1"]["StartedAt"]
    assert site.ids() == ids
    assert all(row["notes"] == [] for name, row in rows(site).items() if name in STARTED)


def test_restart_of_what_was_never_started_touches_nothing(site: Project) -> None:
    before = site.inspect("sa-chat-1")["State"]["StartedAt"]
    done = corral(site, "restart", "chat-1", "litellm")
    assert done.returncode == 1
    assert "sa/litellm: not there to restart; ./generate.py up makes what is missing" in done.stderr
    assert site.inspect("sa-chat-1")["State"]["StartedAt"] == before


def test_a_replica_that_does_not_come_back_stops_the_restart(site: Project) -> None:
    model = site.folder / "models" / "tiny.gguf"
    good = model.read_bytes()
    before = site.inspect("sa-chat-2")["State"]["StartedAt"]
    model.write_bytes(b"<html>404</html>")
    try:
        done = corral(site, "restart", "chat")
        assert done.returncode == 1
        assert "damaged or not complete" in done.stderr, done.stderr
        assert site.inspect("sa-chat-2")["State"]["StartedAt"] == before
    finally:
        model.write_bytes(good)
