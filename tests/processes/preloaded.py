"""A process that has imported LiteLLM and forks for each start of it: `python -m tests.processes.preloaded SOCKET`.

A fork has the arguments, folder, environment and streams of the command that asks (bin/litellm), and ends with it. It
is refused where a start would be another: when a variable that LiteLLM reads while it is imported has another value.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from corral.runtime import supervisor
from tests.processes.helpers import REPOSITORY, Process, wait_until

COMMAND = REPOSITORY / "tests" / "processes" / "bin" / "litellm"
ADDRESS = "preloaded.sock"
# What every rendered LiteLLM has of what LiteLLM reads while it is imported.
SETTINGS = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "CHECKPOINT_DISABLE": "1"}
# Of a process, and not settings of LiteLLM: read when the whole environment is copied.
OF_A_PROCESS = {"HOME", "LANG", "OLDPWD", "PATH", "PWD", "SHELL", "SHLVL", "TERM", "_"}
READY_S = 240.0
LONGEST_START = 1 << 20
PR_SET_PDEATHSIG = 1


_everything = ExitStack()


@cache
def commands() -> Path:
    """A folder for the front of PATH whose `litellm` is a fork; its process is there until `end`."""
    folder = Path(_everything.enter_context(TemporaryDirectory(prefix="corral-litellm-")))
    folder.chmod(0o755)
    shutil.copy(COMMAND, folder)
    passed_on = supervisor.environment(folder, os.environ["PATH"])  # as to the programs of a farm
    taken_away: dict[str, str | None] = {name: None for name in os.environ if name not in passed_on}
    command = [sys.executable, "-m", "tests.processes.preloaded", str(folder / ADDRESS)]
    process = Process(command, folder / "preloaded.log", environment=taken_away | SETTINGS)
    _everything.enter_context(process)
    wait_until(lambda: (folder / ADDRESS).is_socket() or _has_ended(process), READY_S, "LiteLLM is imported")
    return folder


def forked(command: int) -> int:
    """The process that does the work of a command with this pid: its fork, or itself where it was refused one."""
    file = commands() / str(command)
    return int(file.read_text()) if file.exists() else command


def end() -> None:
    """Ends the process, where one was started."""
    _everything.close()


def _has_ended(process: Process) -> bool:
    if process.exit_code() is not None:
        raise ChildProcessError(f"LiteLLM cannot be imported:\n{process.output}")
    return False


# --- the process


@dataclass(slots=True)
class Child:
    """A fork, and the connection of the command that it is for."""

    pid: int
    command: socket.socket


def serve(address: str) -> None:
    """Imports LiteLLM and forks until it is ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    read = _imported()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    ends, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    Path(f"{address}.new").rename(address)
    children: list[Child] = []
    while True:
        heard: list[Any] = [listener, ends, *(child.command for child in children)]
        ready, _, _ = select.select(heard, [], [])
        if ends in ready:
            os.read(ends, 4096)
            _report_ended(children)
        for child in [child for child in children if child.command in ready]:
            os.kill(child.pid, signal.SIGKILL)  # its command has ended; what is left of it is told as its end
            child.command.close()
            children.remove(child)
        if listener in ready:
            kept = [listener.fileno(), ends, wakes, *(child.command.fileno() for child in children)]
            started = _started(listener.accept()[0], read, kept)
            children.extend([started] if started else [])


def _imported() -> dict[str, str | None]:
    """Imports LiteLLM; the variables that were read meanwhile, with their values."""
    read: dict[str, str | None] = {}
    kind: Any = type(os.environ)
    usual = kind.__getitem__

    def noted(self: Any, name: str) -> str:
        read[name] = None
        value: str = usual(self, name)
        read[name] = value
        return value

    kind.__getitem__ = noted
    gc.disable()
    from litellm.proxy import proxy_cli, proxy_server  # noqa: F401 - this is what takes its time

    gc.freeze()
    gc.enable()
    kind.__getitem__ = usual
    return read


def _report_ended(children: list[Child]) -> None:
    """Tells commands the exit codes of their forks."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            for child in [child for child in children if child.pid == ended[0]]:
                with suppress(OSError):
                    child.command.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
                child.command.close()
                children.remove(child)


def _started(command: socket.socket, read: dict[str, str | None], kept: list[int]) -> Child | None:
    """A fork for a command, which closes what is kept here; None where it would differ from a start."""
    text, streams, _, _ = socket.recv_fds(command, LONGEST_START, 3)
    while not text.endswith(b"\n"):
        text += command.recv(LONGEST_START)
    start = json.loads(text)
    environment = start["environment"]
    differing = {name for name, value in read.items() if environment.get(name) != value} - OF_A_PROCESS
    if differing:
        sys.stderr.write(f"not a fork, for {sorted(differing)}\n")
        command.close()
        return None
    pid = os.fork()
    if pid == 0:
        for number in (*kept, command.fileno()):
            os.close(number)
        _become(start, streams)
    for stream in streams:
        os.close(stream)
    command.sendall(b"%d\n" % pid)
    return Child(pid, command)


def _become(start: dict[str, Any], streams: list[int]) -> None:
    """Runs LiteLLM's command here as it would be started; does not return."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(start["cwd"])
    os.environ.clear()
    os.environ.update(start["environment"])
    sys.argv = start["argv"]
    places = [place for place in start["environment"].get("PYTHONPATH", "").split(os.pathsep) if place]
    own = {"", str(REPOSITORY), *places}
    sys.path[:] = [str(Path(sys.argv[0]).parent), *places, *(place for place in sys.path if place not in own)]
    from litellm import run_server

    sys.exit(run_server())


if __name__ == "__main__":
    serve(sys.argv[1])
