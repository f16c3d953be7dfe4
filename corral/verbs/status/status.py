"""`status`: what of the plan runs, how well, and how busy it is; every host as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from corral.build import Plan
from corral.contributions import Service
from corral.plan.site import Replica
from corral.runtime.board import redraw
from corral.runtime.causes import EXIT_WORDS
from corral.runtime.docker import PARKED, Container
from corral.runtime.haproxy import Server
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import SeenCard, Snapshot, observe_all, servers_seen
from corral.units import bar, gib

DRIFT = "older than the rendering"
OUT_OF_ROTATION = {
    "DOWN": "the balancer cannot reach it",
    "MAINT": "taken out of the balancer",
    "DRAIN": "draining",
    "NOLB": "draining",
}
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


@dataclass(frozen=True, slots=True)
class Row:
    """One service of the plan, or one container that is not in the plan."""

    service: str
    container: str
    # None while the service has no container.
    seen: Container | None
    is_well: bool
    notes: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    slots_busy: int | None = None
    slots: int | None = None
    pool: str = ""
    model: str = ""
    role: str = ""
    is_planned: bool = True

    @property
    def condition(self) -> str:
        """One word: health while it runs, else the state; `missing` without a container."""
        return self.seen.condition if self.seen else "missing"

    @property
    def uptime_s(self) -> float | None:
        """How long it has been running; None while it does not."""
        if self.seen is None or self.seen.started is None or not self.seen.is_running:
            return None
        return max(0, round((datetime.now(UTC) - self.seen.started).total_seconds()))


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host with its rows; `problem` says why there are none."""

    name: str
    address: str
    problem: str
    rows: tuple[Row, ...] = ()
    cards: tuple[SeenCard, ...] = ()

    @property
    def is_well(self) -> bool:
        """Whether everything of the plan runs well here."""
        return not self.problem and all(row.is_well for row in self.rows)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as the balancer sees it; `state` is empty when unknown."""

    name: str
    pool: str
    address: str
    state: str
    slots_busy: int | None
    slots: int


@dataclass(frozen=True, slots=True)
class FarmStatus:
    """All of it at one moment."""

    hosts: tuple[HostStatus, ...]
    nodes: tuple[NodeStatus, ...]

    @property
    def is_well(self) -> bool:
        """Whether everything that the kit runs is well; nodes are other people's."""
        return all(host.is_well for host in self.hosts)


# --- finding out -----------------------------------------------------------------------------------------------------


def farm_status(plan: Plan, hosts: Sequence[ComposeHost]) -> FarmStatus:
    """What runs now on these hosts, and how busy the balancer says its servers are."""
    observed = observe_all(hosts)
    servers = servers_seen(plan, hosts[0].out, observed)
    found = tuple(_host_status(host, seen, servers) for host, seen in zip(hosts, observed, strict=True))
    return FarmStatus(found, tuple(_nodes(plan, servers)))


def _host_status(host: ComposeHost, seen: Snapshot, servers: Mapping[str, Server]) -> HostStatus:
    address = host.plan.site.host(host.name).address
    if seen.problem:
        return HostStatus(host.name, address, seen.problem)
    services = sorted(host.plan.services_of(host.name), key=lambda service: natural(service.name))
    rows = [_row(host, service, seen, servers) for service in services]
    return HostStatus(host.name, address, "", (*rows, *_strangers(host, seen)), seen.cards)


def _row(host: ComposeHost, service: Service, seen: Snapshot, servers: Mapping[str, Server]) -> Row:
    container = seen.container_of(service.name, host.project)
    members = host.plan.site.members(host.name, service.name)
    server = servers.get(members[0].container) if members else None
    is_up = server is None or server.state == "UP"
    return Row(
        service=service.name,
        container=service.container_name,
        seen=container,
        is_well=container is not None and container.is_well and is_up,
        notes=tuple(_notes(container, seen, server)),
        gpus=tuple(claim.number for claim in service.tenancies),
        role=service.role or service.component,
        **_replica_facts(members, servers),
    )


def _replica_facts(members: Sequence[Replica], servers: Mapping[str, Server]) -> dict[str, Any]:
    """What a server serves; one that several pools share names them all, and has all their slots."""
    if not members:
        return {}
    known = [servers[item.container] for item in members if item.container in servers]
    return {
        "pool": ", ".join(item.pool for item in members),
        "model": ", ".join(dict.fromkeys(item.model for item in members)),
        "slots": sum(item.slots for item in members),
        "slots_busy": sum(server.in_flight for server in known) if known else None,
    }


def _notes(container: Container | None, seen: Snapshot, server: Server | None) -> Iterator[str]:
    if container is None:
        return
    if container.health == "parked":
        yield container.last_check.removeprefix(PARKED)
    elif not container.is_running:
        yield f"code {container.exit_code}" + _meaning(container)
    elif server is not None and server.state != "UP" and container.is_well:
        yield OUT_OF_ROTATION.get(server.state, server.state)
    if seen.is_older(container):
        yield DRIFT


def _meaning(container: Container) -> str:
    words = "out of memory" if container.was_out_of_memory else EXIT_WORDS.get(container.exit_code, "")
    return f": {words}" if words else ""


def _strangers(host: ComposeHost, seen: Snapshot) -> Iterator[Row]:
    """Containers that carry the site's labels and that the plan does not know."""
    planned = {service.name for service in host.plan.services_of(host.name)}
    neighbours = {ComposeHost(host.plan, name, host.out).project for name in host.plan.inventory.hosts} - {host.project}
    for item in seen.containers:
        if item.project in neighbours or (item.project == host.project and item.service in planned):
            continue
        yield Row(
            item.service or item.name, item.name, item, is_well=True, notes=("not in the plan",), is_planned=False
        )


def _nodes(plan: Plan, servers: Mapping[str, Server]) -> Iterator[NodeStatus]:
    for backend in plan.contributions.backends:
        if not backend.is_ours:
            server = servers.get(backend.name)
            address = f"{backend.endpoint.address}:{backend.endpoint.port}" if backend.endpoint.address else "provider"
            state = server.state.lower() if server else ""
            busy = server.in_flight if server else None
            yield NodeStatus(backend.name, backend.pool, address, state, busy, backend.slots)


# --- showing ---------------------------------------------------------------------------------------------------------


def status_as_data(status: FarmStatus) -> dict[str, Any]:
    """The status as plain data."""
    return {
        "well": status.is_well,
        "hosts": {
            host.name: {
                "address": host.address,
                "well": host.is_well,
                "problem": host.problem or None,
                "services": [_row_data(row) for row in host.rows],
                "gpus": [_card_data(card) for card in host.cards],
            }
            for host in status.hosts
        },
        "nodes": [
            {
                "name": node.name, "pool": node.pool, "address": node.address, "state": node.state or None,
                "slots_busy": node.slots_busy, "slots": node.slots,
            }
            for node in status.nodes
        ],
    }  # fmt: skip


def _row_data(row: Row) -> dict[str, Any]:
    seen = row.seen
    used, limit = (seen.memory_mib, seen.limit_mib or seen.wanted_mib or None) if seen else (None, None)
    return {
        "service": row.service, "container": row.container, "state": seen.state if seen else "missing",
        "health": (seen and seen.health) or None, "well": row.is_well, "in_plan": row.is_planned,
        "notes": list(row.notes), "uptime_s": row.uptime_s, "restarts": seen.restarts if seen else 0,
        "memory_mib": round(used, 1) if used is not None else None, "memory_limit_mib": limit,
        "gpus": list(row.gpus), "slots_busy": row.slots_busy, "slots": row.slots, "pool": row.pool or None,
        "model": row.model or None, "role": row.role or None,
    }  # fmt: skip


def _card_data(card: SeenCard) -> dict[str, Any]:
    return {
        "number": card.index + 1, "name": card.name, "uuid": card.uuid, "pci": card.pci, "memory_mib": card.used_mib,
        "memory_total_mib": card.total_mib, "use_percent": card.use_percent, "celsius": card.celsius,
    }  # fmt: skip


def status_view(status: FarmStatus) -> RenderableType:
    """The status for a person's eyes."""
    blocks: list[RenderableType] = []
    for host in status.hosts:
        blocks += [Text(), _headline(host)] if blocks else [_headline(host)]
        if host.rows:
            blocks.append(_table(host))
        if host.cards:
            blocks.append(_cards_table(host.cards))
    if status.nodes:
        headline = Text.assemble(("nodes", "bold cyan"), "  used, not run by the kit")
        blocks += [Text(), headline, _nodes_table(status.nodes)]
    return Group(*blocks)


def _headline(host: HostStatus) -> Text:
    planned = [row for row in host.rows if row.is_planned]
    well = sum(row.is_well for row in planned)
    if host.problem:
        words, style = host.problem, "red"
    elif well == len(planned):
        words, style = f"all {well} services well", "green"
    else:
        words, style = f"{well} of {len(planned)} services well", "red"
    line = Text.assemble((host.name, "bold cyan"), f"  {host.address} · ", (words, style))
    changed = sum(DRIFT in row.notes or row.seen is None for row in planned)
    if changed and not host.problem:
        line.append(f" · {changed} not as rendered: ./generate.py up", "yellow")
    return line


def _table(host: HostStatus) -> Table:
    has_gpus, has_slots = any(row.gpus for row in host.rows), any(row.slots for row in host.rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("service", no_wrap=True)
    table.add_column("state")
    table.add_column("up", justify="right", no_wrap=True)
    table.add_column("restarts", justify="right")
    table.add_column("memory, MiB", justify="right", no_wrap=True)
    if has_gpus:
        table.add_column("GPU", justify="right")
    if has_slots:
        table.add_column("slots", no_wrap=True)
    table.add_column("model")
    for row in host.rows:
        cells: list[RenderableType] = [row.service, _state(row), duration(row.uptime_s), _restarts(row), _memory(row)]
        cells += [", ".join(map(str, row.gpus))] if has_gpus else []
        cells += [_slots(row.slots_busy, row.slots)] if has_slots else []
        table.add_row(*cells, Text(row.model) if row.model else Text(row.role, "dim"))
    return table


def _state(row: Row) -> Text:
    is_odd = not row.is_planned or row.condition == "starting" or DRIFT in row.notes
    style = "red" if not row.is_well and row.condition != "starting" else "yellow" if is_odd else "green"
    words = [row.condition, *row.notes]
    if row.condition == "parked":
        words[:2] = [": ".join(words[:2])]
    return Text(", ".join(words), style, overflow="fold")


def _restarts(row: Row) -> Text:
    return Text(str(row.seen.restarts), "yellow" if row.seen.restarts else "dim") if row.seen else Text()


def _memory(row: Row) -> Text:
    if row.seen is None or row.seen.memory_mib is None:
        return Text()
    used, limit = row.seen.memory_mib, row.seen.limit_mib or row.seen.wanted_mib
    if not limit:
        return Text(f"{used:.0f}")
    share = used / limit
    style = "red" if share > 0.95 else "yellow" if share > 0.85 else ""  # noqa: PLR2004 - shares of the limit
    return Text(f"{used:.0f} of {limit:.0f}", style)


def _slots(busy: int | None, slots: int | None) -> Text:
    if not slots:
        return Text()
    if busy is None:
        return Text(f"? of {slots}", "dim")
    return Text(f"{busy} of {slots}", "yellow" if busy >= slots else "")


def _cards_table(cards: Iterable[SeenCard]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("GPU", justify="right")
    for name in ("card", "memory, GiB", "busy", "°C"):
        table.add_column(name, justify="left" if name in ("card", "memory, GiB") else "right", no_wrap=True)
    for card in cards:
        busy = f"{card.use_percent} %" if card.use_percent is not None else ""
        heat = str(card.celsius) if card.celsius is not None else ""
        table.add_row(str(card.index + 1), card.name, _card_memory(card), busy, heat)
    return table


def _card_memory(card: SeenCard) -> str:
    if card.used_mib is None:
        return gib(card.total_mib)
    return f"{bar(card.used_mib, card.total_mib)} {gib(card.used_mib)} of {gib(card.total_mib)}"


def _nodes_table(nodes: Iterable[NodeStatus]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("node", "state", "slots", "address", "pool"):
        table.add_column(name)
    for node in nodes:
        state = Text(node.state or "unknown", "green" if node.state == "up" else "yellow" if node.state else "dim")
        table.add_row(node.name, state, _slots(node.slots_busy, node.slots), node.address, node.pool)
    return table


def natural(name: str) -> list[tuple[int, str]]:
    """For sorting: `gpu-10` comes after `gpu-9`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def duration(seconds: float | None) -> str:
    """`12 s`, `5 min`, `3 h 12 min`, `4 d 2 h`; empty for None."""
    if seconds is None:
        return ""
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < HOUR_S:
        return f"{seconds // MINUTE_S:.0f} min"
    if seconds < DAY_S:
        return f"{seconds // HOUR_S:.0f} h {seconds % HOUR_S // MINUTE_S:.0f} min"
    return f"{seconds // DAY_S:.0f} d {seconds % DAY_S // HOUR_S:.0f} h"


def show_status(plan: Plan, hosts: Sequence[ComposeHost], console: Console) -> bool:
    """Prints the status once; whether all is well."""
    status = farm_status(plan, hosts)
    console.print(status_view(status))
    return status.is_well


def watch_status(plan: Plan, hosts: Sequence[ComposeHost], console: Console, every_s: float) -> bool:
    """Redraws the status until Ctrl-C, or prints it again without a terminal; whether all was well at the end."""
    seen: list[FarmStatus] = []

    def views() -> Iterator[RenderableType]:
        while True:
            seen[:] = [farm_status(plan, hosts)]
            yield status_view(seen[0]) if console.is_terminal else Group(status_view(seen[0]), Text())

    redraw(console, views(), every_s)
    return bool(seen) and seen[0].is_well
