"""The table of services that `demo` shows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from corral.contributions import Service
from corral.runtime.supervisor import Status, memory_bytes

MIB = 1024**2
MINUTE_S = 60
HOUR_S = 3600


def service_table(services: Sequence[Service], found: Mapping[str, Status]) -> Table:
    """Services with what they do, state, ports and memory with all their children."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("service")
    table.add_column("what it does", style="dim")
    table.add_column("state")
    table.add_column("port", justify="right")
    table.add_column("memory", justify="right")
    for service in services:
        status = found[service.name]
        memory = memory_bytes(status.program.pid) if status.program and status.program.pid else 0
        table.add_row(
            service.name,
            service.role or service.component,
            Text(status.state, "green" if status.state == "ready" else "yellow"),
            _ports(service),
            f"{memory / MIB:.0f} MiB" if memory else "",
        )
    return table


def _ports(service: Service) -> str:
    return ", ".join(str(port.number) for port in service.ports)


def running_since(found: Mapping[str, Status]) -> str:
    """How long the oldest program has run, in words."""
    starts = [status.program.started for status in found.values() if status.program and status.program.pid]
    seconds = time.time() - min(starts) if starts else 0
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE_S:.0f} min" if seconds < HOUR_S else f"{seconds / HOUR_S:.1f} h"
