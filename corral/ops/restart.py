"""`restart`: services one after the other, each well again before the next; replicas are drained before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.console import Console

from corral.contributions import Service
from corral.errors import CorralError
from corral.ops.board import Board
from corral.ops.hosts import ComposeHost
from corral.ops.interrupts import Interrupts
from corral.ops.lock import alone
from corral.ops.observed import observe_all
from corral.ops.rolling import Gap, roll
from corral.ops.up import LOCK

Hosts = Mapping[str, ComposeHost]


def restart(hosts: Iterable[ComposeHost], services: Sequence[Service], talk: Console) -> list[Gap]:
    """Restarts services one at a time and returns how long each was away, when the last one is well.

    Raises:
        CorralError: a service has no container, or did not become well; those after it were not touched. Or another
            command changes this farm at the moment.
    """
    by_name = {host.name: host for host in hosts}
    ordered = in_order(services, by_name)
    _refuse_missing(ordered, by_name)
    gaps: list[Gap] = []
    folder = next(iter(by_name.values())).out
    with Interrupts(), alone(folder / LOCK, "corral restart"), Board(talk) as board:
        for name, group in groupby(ordered, key=lambda service: service.host):
            gaps += roll(by_name[name], [service.name for service in group], board, action="restart")
    return gaps


def in_order(services: Iterable[Service], hosts: Hosts) -> list[Service]:
    """What others wait for comes first: stores, then replicas, then what stands in front of them."""
    replicas = {(item.host, item.service) for host in hosts.values() for item in host.plan.site.replicas}
    planned = [service for host in hosts.values() for service in host.plan.services_of(host.name)]
    awaited = {(service.host, name) for service in planned for name, _ in service.after}

    def rank(service: Service) -> int:
        key = (service.host, service.name)
        return 0 if key in awaited else 1 if key in replicas else 2

    return sorted(services, key=rank)


def _refuse_missing(services: Iterable[Service], hosts: Hosts) -> None:
    """Nothing is restarted when one of the services cannot be."""
    seen = {found.host: found for found in observe_all(hosts.values())}
    for found in seen.values():
        if found.problem:
            raise CorralError(f"{found.host}: {found.problem}")
    missing = [
        f"{item.host}/{item.name}"
        for item in services
        if seen[item.host].container_of(item.name, hosts[item.host].project) is None
    ]
    if missing:
        raise CorralError(f"{', '.join(missing)}: no container to restart; ./generate.py up makes what is missing")
