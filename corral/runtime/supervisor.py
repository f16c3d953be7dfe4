"""A `local` host: its programs under supervisord. Start it, ask it, restart a program, stop it.

Everything that supervisord starts inherits an environment variable with the host's rendered folder. By that a process
is known to be ours, even when its supervisord was killed and whatever the pid file says, so nothing else is ever ended.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from corral.errors import CorralError

MARK = "CORRAL_HOST_FOLDER"
CONFIG = "supervisord.conf"
SOCKET = "supervisor.sock"
ERRORS = "logs/supervisord.err"
# Unix sockets have at most 104 (macOS) or 108 bytes of path, and supervisord adds its pid while it makes one.
LONGEST_SOCKET_PATH = 90

# supervisord expands % twice, and quotes end the quoting of its command lines.
UNFIT_FOR_PATHS = re.compile(r"""[%'"\\\x00-\x1f]""")

ANSWER_TIMEOUT_S = 5.0
START_DEADLINE_S = 20.0
FORCE_DEADLINE_S = 5.0
POLL_S = 0.05
# Ask supervisord not to wait; the waiting is ours.
AT_ONCE = False

KEPT_VARIABLES = frozenset({"HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE"})
KEPT_PREFIXES = ("LC_", "PRISMA_", "CUDA_", "HIP_", "HSA_", "ROCR_", "GGML_", "OMP_", "DYLD_")
# Where HAProxy and the like are installed, off an ordinary user's PATH.
DAEMON_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/opt/homebrew/bin")


@dataclass(frozen=True, slots=True)
class Program:
    """What supervisord says of one program."""

    name: str
    state: str
    pid: int
    # Unix time in seconds of its last start; 0 before the first.
    started: int
    # Unix time in seconds of its last end; 0 while it never ended.
    ended: int
    exit_code: int
    # Why it could not be started, in supervisord's words.
    problem: str


# --- the environment of the programs


def search_path(first: Iterable[str] = ()) -> str:
    """PATH for the programs: the given folders, the Python environment's, the user's, and where daemons lie."""
    users = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    return os.pathsep.join(dict.fromkeys([*first, str(Path(sys.executable).parent), *users, *DAEMON_FOLDERS]))


def _environment(folder: Path, path: str) -> dict[str, str]:
    """Only what programs need: a stray DATABASE_URL, LLAMA_ARG_… or HTTP_PROXY would change how they work."""
    kept = {
        name: value for name, value in os.environ.items() if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)
    }
    return {**kept, "PATH": path, MARK: str(folder)}


# --- start


def start(folder: Path, path: str) -> None:
    """Starts supervisord for a rendered host and returns once it answers; raises CorralError if it does not."""
    strange = UNFIT_FOR_PATHS.search(str(folder))
    if strange:
        raise CorralError(
            f"{folder}: supervisord cannot work in a folder with {strange.group()!r} in its path; move it"
        )
    (folder / "logs").mkdir(exist_ok=True)
    errors = folder / ERRORS
    with errors.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "supervisor.supervisord",
                "--nodaemon",
                "--configuration",
                _configuration(folder),
            ],
            cwd=folder,
            env=_environment(folder, path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the same as in its log file
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_DEADLINE_S
    while programs(folder) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            words = errors.read_text(errors="replace").strip() or "it gave no answer and no reason"
            raise CorralError(f"supervisord did not start: {words}")
        time.sleep(POLL_S)
    process.returncode = 0  # it outlives us on purpose; nothing will wait for it


def _configuration(folder: Path) -> Path:
    """The file supervisord is started with: the rendered one, or a copy of it with a socket whose path is short."""
    rendered, address = folder / CONFIG, socket_path(folder)
    if address.parent == folder:
        return rendered
    address.parent.mkdir(mode=0o700, exist_ok=True)
    facts = address.parent.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise CorralError(f"{address.parent}: is not a private folder of yours; remove it")
    copy = folder / "supervisord.short-socket.conf"
    copy.write_text(rendered.read_text().replace(f"%(here)s/{SOCKET}", str(address)))
    return copy


def socket_path(folder: Path) -> Path:
    """Where supervisord listens: in the host's folder, or in a short private one if that path were too long."""
    beside = folder / SOCKET
    if len(os.fsencode(beside)) <= LONGEST_SOCKET_PATH:
        return beside
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - the folder in it is private, which is checked
        short = Path(parent) / f"corral-{name}" / SOCKET
        if len(os.fsencode(short)) <= LONGEST_SOCKET_PATH:
            return short
    raise CorralError(f"{folder}: the path is too long for a socket; use a shorter one")


# --- ask


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_TIMEOUT_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class _Transport(xmlrpc.client.Transport):
    """XML-RPC over a Unix socket; unlike supervisor's own it does not wait forever."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:  # noqa: ARG002 - its path says it all
        return _Connection(self.path)


def _call(folder: Path, method: str, *arguments: str | bool) -> Any:
    """The answer to a call; OSError if supervisord gives none, Fault if it refuses."""
    try:
        with xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=_Transport(socket_path(folder))) as server:
            return getattr(server.supervisor, method)(*arguments)
    except (http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
        raise OSError(f"supervisord of {folder}: {error}") from None


def programs(folder: Path) -> dict[str, Program] | None:
    """The host's programs by name; None when no supervisord answers."""
    try:
        found: list[Mapping[str, Any]] = _call(folder, "getAllProcessInfo")
    except OSError:
        return None
    return {str(item["name"]): _program(item) for item in found}


def _program(item: Mapping[str, Any]) -> Program:
    return Program(
        name=str(item["name"]),
        state=str(item["statename"]).lower(),
        pid=int(item["pid"]),
        started=int(item["start"]),
        ended=int(item["stop"]),
        exit_code=int(item["exitstatus"]),
        problem=str(item["spawnerr"]),
    )


def restart(folder: Path, name: str, grace_s: float = 3.0) -> None:
    """Ends a program, by force after the grace, and starts it again; raises CorralError if it cannot be ended."""
    with suppress(xmlrpc.client.Fault):  # it does not run
        _call(folder, "stopProcess", name, AT_ONCE)
    force_at, deadline = time.monotonic() + grace_s, time.monotonic() + 2 * grace_s + START_DEADLINE_S
    while (program := (programs(folder) or {}).get(name)) is not None and program.pid:
        if time.monotonic() > deadline:
            raise CorralError(f"{name} (pid {program.pid}) cannot be ended")
        if time.monotonic() > force_at:
            with suppress(xmlrpc.client.Fault):
                _call(folder, "signalProcess", name, "KILL")
        time.sleep(POLL_S)
    with suppress(xmlrpc.client.Fault):  # it runs already
        _call(folder, "startProcess", name, AT_ONCE)


# --- find and stop


def folder_of(process: psutil.Process) -> str:
    """The rendered folder of the host that a process belongs to; empty for processes that are not ours."""
    try:
        return str(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):
        return ""


def folders_below(parent: Path) -> set[Path]:
    """The rendered folders below this one whose processes are running, whether or not the folders are still there."""
    marks = {folder_of(process) for process in psutil.process_iter()} - {""}
    return {Path(mark) for mark in marks if Path(mark).is_relative_to(parent)}


def members(folder: Path) -> list[psutil.Process]:
    """Every living process of a host: supervisord, its programs and their children, orphans included."""
    wanted = str(folder)
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and folder_of(process) == wanted]


def stop(folder: Path, grace_s: float = 15.0) -> int:
    """Ends every process of a host, by force after the grace, and returns how many programs supervisord ran.

    Raises CorralError naming what is still there after the grace and five seconds more.
    """
    force_at = time.monotonic() + grace_s
    count = len([program for program in (programs(folder) or {}).values() if program.pid])
    asked: set[psutil.Process] = set()
    while left := members(folder):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                _end(process, is_asked=process in asked, is_late=time.monotonic() > force_at)
        if time.monotonic() > force_at + FORCE_DEADLINE_S:
            raise CorralError(
                f"cannot be ended: {', '.join(f'{process.name()} (pid {process.pid})' for process in left)}"
            )
        asked |= set(left)
        psutil.wait_procs(left, timeout=POLL_S)
    with suppress(FileNotFoundError):
        if socket_path(folder).parent != folder:
            shutil.rmtree(socket_path(folder).parent)
    return count


def _end(process: psutil.Process, *, is_asked: bool, is_late: bool) -> None:
    if is_late:
        process.kill()
    elif not is_asked:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a frozen process would not notice


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and all its children, in bytes; 0 when it is gone."""
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in family:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total
