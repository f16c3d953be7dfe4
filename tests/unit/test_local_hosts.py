"""Sites without Docker: what the verbs refuse and what doctor finds, in words, without starting anything."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.errors import CorralError, UsageError
from corral.render.output import write
from corral.render.secrets import initialise
from corral.render.tree import render
from corral.runtime import processes, supervisor
from corral.runtime.docker import Container
from corral.runtime.observe import Snapshot, observe
from corral.runtime.processes import ProcessHost, refuse_missing, site_hosts
from corral.verbs.doctor.case import Case, sections
from corral.verbs.doctor.report import CHECKS
from tests.trees import ROOT

INVENTORY = """
schema_version: 1
name: lab
hosts:
  big: {address: 192.0.2.9}
  mac: {runtime: local, address: 192.0.2.8%s}
models:
  m: {source: m.gguf, kind: chat, context: 2048, size_gib: 0.01}
pools:
  far: {model: m, on: {host: big}}
  near: {model: m, on: {host: mac}, ports: 24991}
gateway: {host: mac, database: false, cache: false}
"""


def plan_of(folder: Path, more: str = "") -> Plan:
    path = folder / "inventory.yaml"
    path.write_text(INVENTORY % more)
    return build_plan(load_inventory(path))


@pytest.fixture
def host(tmp_path: Path) -> ProcessHost:
    plan = plan_of(tmp_path)
    write(render(plan), tmp_path / "out")
    found = site_hosts(plan, tmp_path / "out", ["mac"])[0]
    assert isinstance(found, ProcessHost)
    return found


def found(host: ProcessHost, check: str, *containers: Container) -> list[str]:
    case = Case(host, Snapshot("mac", containers=containers))
    return [f"{item.message} → {item.remedy}" for item in CHECKS[check].findings(case)]


def test_compose_hosts_come_first_because_a_local_gateway_calls_them(tmp_path: Path) -> None:
    hosts = site_hosts(plan_of(tmp_path), tmp_path)
    assert [(item.name, isinstance(item, ProcessHost)) for item in hosts] == [("big", False), ("mac", True)]


def test_local_host_on_another_machine_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ", ssh: me@192.0.2.8")
    with pytest.raises(UsageError, match=r"mac has `runtime: local` and is another machine \(me@192.0.2.8\).*--host"):
        site_hosts(plan, tmp_path)
    assert [item.name for item in site_hosts(plan, tmp_path, ["big"])] == ["big"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["up", "--cpu", "--host", "mac"], "a `local` host's servers run on the processor anyway"),
        (["logs", "--since", "1h", "--host", "mac"], "the logs of a `local` host have no times; take --tail LINES"),
        (["setup", "--host", "mac"], "this verb works with containers; `local` hosts have up, status, logs, restart"),
    ],
)
def test_what_has_no_effect_on_processes_is_refused(
    host: ProcessHost, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main([*words, "--inventory", host.plan.source_file, "--out", str(host.out)]) == 2
    assert told in capsys.readouterr().err


def test_programs_that_are_missing_are_named_with_what_installs_them(
    host: ProcessHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "search_path", lambda: "/nowhere")
    with pytest.raises(CorralError) as error:
        refuse_missing(host)
    assert "  haproxy: apt install haproxy (macOS: brew install haproxy)" in str(error.value).splitlines()
    assert "haproxy is not on this machine → apt install haproxy (macOS: brew install haproxy)" in found(
        host, "programs"
    )


def test_program_out_of_a_python_package_is_a_hint(host: ProcessHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "search_path", lambda: str(supervisor.SHIM))
    llama = next(line for line in found(host, "programs") if "llama-server" in line)
    assert llama.startswith("llama-server is the one in a Python package")


def test_store_that_does_as_well_is_enough(host: ProcessHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redis-server").touch(mode=0o755)
    monkeypatch.setattr(supervisor, "search_path", lambda: str(tmp_path))
    services = [replace(host.services[0], program="valkey-server")]
    monkeypatch.setattr(ProcessHost, "services", services)
    assert [path for _, path, _ in host.programs()] == [str(tmp_path / "redis-server")]


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 24991)):
        yield 24991


def test_port_that_another_process_holds_is_named(host: ProcessHost, listener: int) -> None:
    (line,) = (item for item in found(host, "ports-free") if str(listener) in item)
    assert line.startswith(f"port {listener} (near-1) is taken by ")
    assert f"(pid {os.getpid()}" in line


def test_orphans_are_named_until_supervisord_answers(host: ProcessHost) -> None:
    command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]
    environment = {**os.environ, supervisor.MARK: str(host.place)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        (line,) = found(host, "supervised")
        process.kill()
    assert "1 processes run without their supervisord: python" in line
    assert f"(pid {process.pid})" in line
    assert found(host, "supervised") == []


def test_digests_are_read_from_the_rendered_file(host: ProcessHost) -> None:
    assert set(host.digests) == {item.name for item in host.services}
    text = (host.rendered / supervisor.CONFIG).read_text()
    assert all(text.count(f'CORRAL_CONFIG="{digest}"') == 1 for digest in host.digests.values())


def test_every_program_of_the_table_is_one_that_a_component_starts() -> None:
    declared = {path.read_text() for path in (ROOT / "corral" / "components").glob("*/component.yaml")}
    assert [name for name in processes.PROGRAMS if not any(f"program: {name}\n" in text for text in declared)] == []


BSD_STAT = """#!/bin/sh
# As on macOS: no -c, and its own letters.
case $1 in -L) shift; follow=-L ;; esac
[ "$1" = -f ] || exit 1
form=$(echo "$2" | sed 's/%Lp/%a/; s/%z/%s/; s/%N/%n/')
shift 2
exec {stat} ${{follow-}} -c "$form" "$@"
"""


def test_models_and_secrets_are_seen_with_the_stat_of_macos(
    host: ProcessHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialise({"mac": host.plan.secrets_of("mac")}, host.out)
    (host.place / "models").mkdir()
    (host.place / "models" / "m.gguf").write_bytes(b"GGUF and more")
    seen = observe(host, sections)
    fake = tmp_path / "stat"
    fake.write_text(BSD_STAT.format(stat=shutil.which("stat")))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with_fake = observe(host, sections)
    assert with_fake.said["models"] == seen.said["models"]
    assert "13 47475546 m.gguf" in seen.said["models"]
    assert with_fake.said["modes"] == seen.said["modes"]
    assert "600 .env" in seen.said["modes"]
