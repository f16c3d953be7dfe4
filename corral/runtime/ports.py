"""Processes that hold a port, found before anything is started that needs it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from contextlib import suppress

import psutil

from corral.contributions import Service
from corral.runtime.supervisor import folder_of

LOOPBACK = "127.0.0.1"
SHOWN_COMMAND = 80


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
    words = f"{process.name()} (pid {process.pid}{': ' if shown else ''}{shown})"
    folder = folder_of(process)
    return f"{words}, which corral runs in {folder}" if folder else words
