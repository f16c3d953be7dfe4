"""What `demo` shows: progress while it starts, the table of services, and how to use them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.contributions import Service
from corral.runtime.board import Board
from corral.runtime.health import Status
from corral.runtime.supervisor import memory_bytes

MIB = 1024**2
MINUTE_S = 60
HOUR_S = 3600


def show_progress(rounds: Iterable[list[Status]], talk: Console, were_ready: Iterable[str] = ()) -> None:
    """Shows rounds of a watch until it ends: live on a terminal, else a line for each service that becomes ready."""
    said = set(were_ready)
    with Board(talk) as board:
        for status in (status for found in rounds for status in found):
            name, is_ready = status.service.name, status.state == "ready"
            if talk.is_terminal:
                board.show(status.service.host, name, status.state, is_done=is_ready)
            elif is_ready and name not in said:
                said.add(name)
                board.say(f"  {name} is ready after {status.seconds:.1f} s")


def service_table(found: Sequence[Status]) -> Table:
    """Services with what they do, state, ports and memory with all their children."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("service")
    table.add_column("what it does", style="dim")
    table.add_column("state")
    table.add_column("port", justify="right")
    table.add_column("memory", justify="right")
    for status in found:
        memory = memory_bytes(status.program.pid) if status.program and status.program.pid else 0
        table.add_row(
            status.service.name,
            status.service.role or status.service.component,
            Text(status.state, "green" if status.state == "ready" else "yellow"),
            _ports(status.service),
            f"{memory / MIB:.0f} MiB" if memory else "",
        )
    return table


def _ports(service: Service) -> str:
    return ", ".join(str(port.number) for port in service.ports)


def running_since(found: Sequence[Status]) -> str:
    """How long the oldest program has run, in words."""
    starts = [status.program.started for status in found if status.program and status.program.pid]
    seconds = time.time() - min(starts) if starts else 0
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE_S:.0f} min" if seconds < HOUR_S else f"{seconds / HOUR_S:.1f} h"
