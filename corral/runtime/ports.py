"""Who holds a port, found out before anything is started that wants it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from corral.contributions import Service
from corral.runtime.supervisor import folder_of

LOOPBACK = "127.0.0.1"
SHOWN_COMMAND = 80


@dataclass(frozen=True, slots=True)
class Taken:
    """A port that a service of the plan wants and another process holds."""

    port: int
    service: str
    holder: str

    def __str__(self) -> str:
        """`port 14000 (litellm) is taken by …`."""
        return f"port {self.port} ({self.service}) is taken by {self.holder}"


def taken_ports(services: Iterable[Service]) -> list[Taken]:
    """Every port of these services that cannot be listened on, with the process that holds it where it can be seen."""
    wanted = {port.number: service.name for service in services for port in service.ports}
    return [Taken(port, name, holder_of(port)) for port, name in sorted(wanted.items()) if not is_free(port)]


def is_free(port: int) -> bool:
    """Whether a program could listen on this port of the loopback address now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
        try:
            listener.bind((LOOPBACK, port))
            listener.listen(1)
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True


def holder_of(port: int) -> str:
    """The process that listens on a port, in words for a person."""
    for pid in sorted(_listeners(port)):
        try:
            return _described(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return "a process that only its owner or root can see"


def _listeners(port: int) -> set[int]:
    try:
        found = psutil.net_connections("tcp")
    except psutil.AccessDenied:  # macOS shows nothing to ordinary users
        return set()
    listening = [item for item in found if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port]
    return {item.pid for item in listening if item.pid}


def _described(process: psutil.Process) -> str:
    """`python3 (pid 812: python3 -m http.server 14000)`; of another corral demo also where it runs."""
    try:
        command = " ".join(process.cmdline())
    except psutil.AccessDenied:
        command = ""
    shown = command if len(command) <= SHOWN_COMMAND else command[: SHOWN_COMMAND - 1] + "…"
    words = f"{process.name()} (pid {process.pid}{': ' if shown else ''}{shown})"
    folder = folder_of(process)
    return f"{words}, which corral runs in {folder}" if folder else words
