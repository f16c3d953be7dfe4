"""`restart`: services one after the other, each well again before the next; replicas are drained before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.board import Board
from corral.runtime.hosts import ComposeHost
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.verbs.up.order import in_order
from corral.verbs.up.rolling import roll
from corral.verbs.up.up import LOCK


def restart(hosts: Iterable[ComposeHost], services: Sequence[Service], talk: Console) -> None:
    """Restarts services one at a time; returns when the last one is well.

    Raises:
        CorralError: a service has no container, or did not become well; those after it were not touched. Or another
            command changes this farm at the moment.
    """
    by_name = {host.name: host for host in hosts}
    first = next(iter(by_name.values()))
    there = {(name, item.service) for name, host in by_name.items() for item in host.containers()}
    missing = [f"{item.host}/{item.name}" for item in services if (item.host, item.name) not in there]
    if missing:
        raise CorralError(f"{', '.join(missing)}: no container to restart; ./generate.py up makes what is missing")
    with Interrupts(), alone(first.out / LOCK, "corral restart"), Board(talk) as board:
        for name, group in groupby(in_order(first.plan, services), key=lambda service: service.host):
            roll(by_name[name], [service.name for service in group], board, action="restart")
