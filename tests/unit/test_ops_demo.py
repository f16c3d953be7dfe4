import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from corral.build import Plan, build_plan
from corral.config.load import Loaded, load_inventory
from corral.errors import CorralError
from corral.render.tree import render
from corral.runtime import supervisor
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.verbs.demo.demo import INVENTORY, fit_inventory


def fitted_plan(*, has_balancer: bool, has_own_model: bool) -> Plan:
    loaded = load_inventory(INVENTORY)
    fitted = fit_inventory(loaded.inventory, has_balancer=has_balancer, has_own_model=has_own_model)
    return build_plan(Loaded(fitted, loaded.source))


# --- the inventory


def test_demo_needs_nothing_that_a_fresh_machine_lacks() -> None:
    plan = fitted_plan(has_balancer=False, has_own_model=False)
    assert {service.program for service in plan.contributions.services} == {"llama-server", "litellm"}
    assert [warning.rule for warning in plan.warnings] == ["direct-mode"]
    assert not fitted_plan(has_balancer=True, has_own_model=True).warnings
    assert plan.inventory.gateway.balancing == "direct"


def test_demo_listens_on_loopback_only() -> None:
    for service in fitted_plan(has_balancer=True, has_own_model=False).contributions.services:
        assert {port.publish for port in service.ports} == {"127.0.0.1"}


def test_real_model_gets_all_cores_and_the_tiny_one_does_not() -> None:
    def threads(*, has_own_model: bool) -> set[str]:
        plan = fitted_plan(has_balancer=True, has_own_model=has_own_model)
        servers = [service for service in plan.contributions.services if service.role == "chat"]
        return {service.args[service.args.index("--threads") + 1] for service in servers}

    assert threads(has_own_model=False) == {"1"}
    assert threads(has_own_model=True) == {str(psutil.cpu_count(logical=False) or 1)}


def test_rendering_is_the_same_every_time() -> None:
    assert render(fitted_plan(has_balancer=True, has_own_model=False)) == render(
        fitted_plan(has_balancer=True, has_own_model=False)
    )


# --- the lock

HOLDER = """
import sys
import time
from pathlib import Path
from corral.runtime.lock import alone
with alone(Path(sys.argv[1]), "corral down"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_lock_names_the_other_one_and_leaves_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / "lock"
    with alone(lock, "corral backup"):
        words = rf"corral backup is at work here already \(pid {os.getpid()}\); wait for it or interrupt it"
        with pytest.raises(CorralError, match=words), alone(lock, "corral up"):
            pass
        assert lock.exists()
    assert not lock.parent.exists()


def test_lock_of_a_killed_process_is_no_hindrance(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    (tmp_path / "other").touch()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        words = rf"corral down is at work here already \(pid {holder.pid}\)"
        with pytest.raises(CorralError, match=words), alone(lock, "corral up"):
            pass
        holder.kill()
    with alone(lock, "corral up"):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()
    assert tmp_path.exists()


def test_lock_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CorralError, match="cannot be written"), alone(tmp_path / "file" / "lock", "make demo"):
        pass


# --- interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_interrupts_and_later_ones_do_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupted(number)
    assert signal.getsignal(number) == before


def interrupted(number: signal.Signals) -> None:
    with Interrupts():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)


def test_held_signal_comes_afterwards() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        held_up(steps)
    assert steps == ["done"]


def held_up(steps: list[str]) -> None:
    with Interrupts() as interrupts:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("done")
        steps.append("never")


def test_an_interruption_that_python_swallows_comes_again_and_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        swallowed(seen)
    assert seen == ["finalizer", "after"]
    assert capfd.readouterr().err == ""


def swallowed(seen: list[str]) -> None:
    class Finalized:
        def __del__(self) -> None:
            seen.append("finalizer")
            os.kill(os.getpid(), signal.SIGINT)

    with Interrupts():
        Finalized()
        seen.append("after")
        signal.pause()


def test_what_fails_because_it_was_interrupted_counts_as_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt):
        fails_while_held()


def fails_while_held() -> None:
    with Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the interruption reached a child, too")


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


# --- supervisord's host


def test_programs_get_only_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "DATABASE_URL", "LLAMA_ARG_PORT", "PYTHONPATH", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    made = supervisor.environment(tmp_path, "/bin")
    assert made["PATH"] == "/bin"
    assert made[supervisor.MARK] == str(tmp_path)
    assert made["CUDA_VISIBLE_DEVICES"] == "0"
    assert not {"HTTP_PROXY", "DATABASE_URL", "LLAMA_ARG_PORT", "PYTHONPATH", "OPENAI_API_KEY"} & made.keys()


def test_search_path_has_the_environment_first_and_daemons_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin::/mine")
    folders = supervisor.search_path(["/first"]).split(os.pathsep)
    assert folders[:4] == ["/first", str(Path(sys.executable).parent), "/usr/bin", "/mine"]
    assert "/usr/sbin" in folders[4:]
    assert "" not in folders
    assert folders[-len(supervisor.package_folders()) :] == supervisor.package_folders()


def test_socket_of_a_long_path_lies_elsewhere(tmp_path: Path) -> None:
    short, long = tmp_path / "a", Path("/" + "/".join(["folder"] * 30))
    if len(str(short)) < supervisor.LONGEST_SOCKET_PATH - len(supervisor.SOCKET):
        assert supervisor.socket_path(short) == short / supervisor.SOCKET
    assert len(str(supervisor.socket_path(long))) <= supervisor.LONGEST_SOCKET_PATH
    assert supervisor.socket_path(long) == supervisor.socket_path(long) != supervisor.socket_path(long / "b")


@pytest.mark.parametrize("name", ["it's", '"quoted"', "100%", "back\\slash"])
def test_folder_that_supervisord_cannot_work_in_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorralError, match="supervisord cannot work in a folder with"):
        supervisor.start(tmp_path / name, "")


def test_stop_ends_what_has_the_mark_frozen_or_deaf_and_nothing_else(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    programs = ("import time; print(flush=True); time.sleep(60)", deaf)
    marked = [start(program, tmp_path, tmp_path) for program in programs]
    stranger = start(programs[0], tmp_path, tmp_path / "other")
    marked[0].send_signal(signal.SIGSTOP)
    try:
        assert {process.pid for process in supervisor.members(tmp_path)} == {process.pid for process in marked}
        assert supervisor.folders_below(tmp_path) == {tmp_path, tmp_path / "other"}
        began = time.monotonic()
        supervisor.stop(tmp_path, grace_s=0.5)
        assert time.monotonic() - began < 5
        assert not any(psutil.pid_exists(process.pid) for process in marked)
        assert stranger.poll() is None
    finally:
        for process in (*marked, stranger):
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


def start(program: str, folder: Path, mark: Path) -> subprocess.Popen[bytes]:
    """A process that works in a folder and has the mark of this one, once it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, supervisor.MARK: str(mark)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    return process
