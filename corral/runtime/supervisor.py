"""A `local` host: its programs under supervisord. Start it, ask it, restart a program, stop it.

Everything that supervisord starts inherits an environment variable with the host's rendered folder. By that a process
is known to be ours, even when its supervisord was killed and whatever the pid file says, so nothing else is ever ended.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from corral.errors import CorralError
from corral.files import private_folder

MARK = "CORRAL_HOST_FOLDER"
CONFIG = "supervisord.conf"
SOCKET = "supervisor.sock"
ERRORS = "logs/supervisord.err"
# Unix sockets have at most 104 (macOS) or 108 bytes of path, and supervisord adds its pid while it makes one.
LONGEST_SOCKET_PATH = 90

# supervisord expands % twice, and quotes end the quoting of its command lines.
UNFIT_FOR_PATHS = re.compile(r"""[%'"\\\x00-\x1f]""")

ANSWER_TIMEOUT_S = 5.0
# Longest time in which supervisord ends a program, by force after the program's own grace period.
END_TIMEOUT_S = 90.0
START_DEADLINE_S = 20.0
FORCE_DEADLINE_S = 5.0
POLL_S = 0.05

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
    if strange := UNFIT_FOR_PATHS.search(str(folder)):
        raise CorralError(f"{folder}: supervisord cannot work in a folder with {strange[0]!r} in its path; move it")
    process = _spawned(folder, path)
    deadline = time.monotonic() + START_DEADLINE_S
    while programs(folder) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            words = (folder / ERRORS).read_text(errors="replace").strip() or "it gave no answer and no reason"
            raise CorralError(f"supervisord did not start: {words}")
        time.sleep(POLL_S)
    process.returncode = 0  # it outlives us on purpose; nothing will wait for it


def _spawned(folder: Path, path: str) -> subprocess.Popen[bytes]:
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / ERRORS).open("wb") as errors:
        return subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "supervisor.supervisord"),
                *("--nodaemon", "--configuration", _configuration(folder)),
            ],
            cwd=folder,
            env=_environment(folder, path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the same as in its log file
            stderr=errors,
            start_new_session=True,
        )


def _configuration(folder: Path) -> Path:
    """The file supervisord is started with: the rendered one, or a copy of it with a socket whose path is short."""
    rendered, address = folder / CONFIG, socket_path(folder)
    if address.parent == folder:
        return rendered
    private_folder(address.parent)
    copy = folder / "supervisord.short-socket.conf"
    copy.write_text(rendered.read_text().replace(f"%(here)s/{SOCKET}", str(address)))
    return copy


def socket_path(folder: Path) -> Path:
    """Where supervisord listens: in the host's folder, or in a short private one if that path were too long."""
    beside = folder / SOCKET
    if len(os.fsencode(beside)) <= LONGEST_SOCKET_PATH:
        return beside
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return Path(f"/tmp/corral-{name}", SOCKET)  # noqa: S108 - `private_folder` checks it


# --- ask


def call(folder: Path, method: str, *arguments: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
    """The answer of supervisord's XML-RPC; raises httpx.HTTPError if there is none, Fault if it refuses."""
    body = xmlrpc.client.dumps(arguments, f"supervisor.{method}")
    transport = httpx.HTTPTransport(uds=str(socket_path(folder)))
    with httpx.Client(transport=transport, timeout=timeout_s) as client:
        answer = client.post("http://localhost/RPC2", content=body, headers={"Content-Type": "text/xml"})
    return xmlrpc.client.loads(answer.raise_for_status().content)[0][0]


def programs(folder: Path) -> dict[str, Program] | None:
    """The host's programs by name; None when no supervisord answers."""
    try:
        found: list[Mapping[str, Any]] = call(folder, "getAllProcessInfo")
    except httpx.HTTPError:
        return None
    return {str(item["name"]): _program(item) for item in found}


def _program(item: Mapping[str, Any]) -> Program:
    keys = ("pid", "start", "stop", "exitstatus", "spawnerr")
    return Program(item["name"], item["statename"].lower(), *(item[key] for key in keys))


def restart(folder: Path, name: str) -> None:
    """Ends a program, by force after its grace period, and starts it again; raises CorralError if it does not end."""
    try:
        with suppress(xmlrpc.client.Fault):  # it does not run
            call(folder, "stopProcess", name, timeout_s=END_TIMEOUT_S)
        with suppress(xmlrpc.client.Fault):  # it runs already
            call(folder, "startProcess", name)
    except httpx.HTTPError as error:
        raise CorralError(f"supervisord does not restart {name}: {error}") from None


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
    count = sum(program.pid > 0 for program in (programs(folder) or {}).values())
    left = _end_all(folder, _ask_to_end, grace_s) and _end_all(folder, psutil.Process.kill, FORCE_DEADLINE_S)
    if left:
        raise CorralError(f"cannot be ended: {', '.join(f'{item.name()} (pid {item.pid})' for item in left)}")
    if socket_path(folder).parent != folder:
        shutil.rmtree(socket_path(folder).parent, ignore_errors=True)
    return count


def _end_all(folder: Path, end: Callable[[psutil.Process], None], limit_s: float) -> list[psutil.Process]:
    """Ends every process of a host once, also those that are started meanwhile; returns those that are left."""
    deadline = time.monotonic() + limit_s
    asked: set[psutil.Process] = set()
    while (left := members(folder)) and time.monotonic() < deadline:
        for process in set(left) - asked:
            with suppress(psutil.NoSuchProcess):
                end(process)
        asked.update(left)
        psutil.wait_procs(left, timeout=POLL_S)
    return left


def _ask_to_end(process: psutil.Process) -> None:
    process.terminate()
    process.send_signal(signal.SIGCONT)  # a frozen process would not notice


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and all its children, in bytes; 0 when it is gone."""
    total = 0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total
