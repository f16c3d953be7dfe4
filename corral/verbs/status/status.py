"""`status`: what of the plan runs, how well, and how busy it is; every host as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from corral.build import Plan
from corral.contributions import Backend, Service
from corral.declarations import read_yaml
from corral.runtime.board import redraw
from corral.runtime.causes import TABLE, exit_words
from corral.runtime.docker import PARKED, Container
from corral.runtime.haproxy import Server
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import SeenCard, Snapshot, observe_all, servers_seen
from corral.tables import new_table
from corral.units import bar, duration, gib

DRIFT = "older than the rendering"
OUT_OF_ROTATION: dict[str, str] = read_yaml(TABLE)["rotation"]
# A part of the status, as `--json` prints it.
Data = dict[str, Any]
Servers = Mapping[str, Server]


# --- finding out -----------------------------------------------------------------------------------------------------


def farm_status(plan: Plan, hosts: Sequence[ComposeHost]) -> Data:
    """What runs now on these hosts, and how busy the balancer says its servers are, as plain data."""
    observed = observe_all(hosts)
    servers = servers_seen(plan, hosts[0].out, observed)
    found = {host.name: _host(host, seen, servers) for host, seen in zip(hosts, observed, strict=True)}
    nodes = [_node(item, servers.get(item.name)) for item in plan.contributions.backends if not item.is_ours]
    # Whether nodes are well is not the kit's business.
    return {"well": all(host["well"] for host in found.values()), "hosts": found, "nodes": nodes}


def _host(host: ComposeHost, seen: Snapshot, servers: Servers) -> Data:
    rows: list[Data] = []
    if not seen.problem:
        services = sorted(host.services, key=lambda service: _natural(service.name))
        rows = [*(_planned(host, service, seen, servers) for service in services), *_strangers(host, seen)]
    return {
        "address": host.plan.site.host(host.name).address,
        "well": not seen.problem and all(row["well"] for row in rows),
        "problem": seen.problem or None,
        "services": rows,
        "gpus": [] if seen.problem else [_card(card) for card in seen.cards],
    }


def _planned(host: ComposeHost, service: Service, seen: Snapshot, servers: Servers) -> Data:
    """A service of the plan; one that several pools share names them all, and has all their slots."""
    container = seen.container_of(service.name, host.project)
    members = host.plan.site.members(host.name, service.name)
    known = [servers[item.container] for item in members if item.container in servers]
    is_up = not known or known[0].state == "UP"
    return _row(service.name, service.container_name, container) | {
        "well": container is not None and container.is_well and is_up,
        "notes": list(_notes(container, seen, known)) if container else [],
        "gpus": [claim.number for claim in service.tenancies],
        "slots_busy": sum(server.in_flight for server in known) if known else None,
        "slots": sum(item.slots for item in members) or None,
        "pool": ", ".join(item.pool for item in members) or None,
        "model": ", ".join(dict.fromkeys(item.model for item in members)) or None,
        "role": service.role or service.component or None,
    }


def _notes(container: Container, seen: Snapshot, servers: Sequence[Server]) -> Iterator[str]:
    if container.health == "parked":
        yield container.last_check.removeprefix(PARKED)
    elif not container.is_running:
        yield f"code {container.exit_code}{(words := exit_words(container)) and f': {words}'}"
    elif container.is_well and servers and servers[0].state != "UP":
        yield OUT_OF_ROTATION.get(servers[0].state, servers[0].state)
    if seen.is_older(container):
        yield DRIFT


def _strangers(host: ComposeHost, seen: Snapshot) -> Iterator[Data]:
    """Containers that carry the site's labels and that the plan does not know."""
    planned = {service.name for service in host.services}
    neighbours = {ComposeHost(host.plan, name, host.out).project for name in host.plan.inventory.hosts} - {host.project}
    for item in seen.containers:
        if item.project not in neighbours and (item.project != host.project or item.service not in planned):
            yield _row(item.service or item.name, item.name, item) | {"in_plan": False, "notes": ["not in the plan"]}


def _row(service: str, name: str, seen: Container | None) -> Data:
    """What is known of any container, and of a service without one."""
    started = seen.started if seen and seen.is_running else None
    return {
        "service": service, "container": name, "state": seen.state if seen else "missing",
        "health": (seen and seen.health) or None, "well": True, "in_plan": True, "notes": [],
        "uptime_s": max(0, round((datetime.now(UTC) - started).total_seconds())) if started else None,
        "restarts": seen.restarts if seen else 0,
        "memory_mib": round(seen.memory_mib, 1) if seen and seen.memory_mib is not None else None,
        "memory_limit_mib": (seen.limit_mib or seen.wanted_mib or None) if seen else None,
        "gpus": [], "slots_busy": None, "slots": None, "pool": None, "model": None, "role": None,
    }  # fmt: skip


def _card(card: SeenCard) -> Data:
    return {
        "number": card.index + 1, "name": card.name, "uuid": card.uuid, "pci": card.pci, "memory_mib": card.used_mib,
        "memory_total_mib": card.total_mib, "use_percent": card.use_percent, "celsius": card.celsius,
    }  # fmt: skip


def _node(node: Backend, server: Server | None) -> Data:
    """A node as the balancer sees it."""
    place = node.endpoint.address or node.endpoint.service
    return {
        "name": node.name, "pool": node.pool,
        "address": f"{place}:{node.endpoint.port}" if place else "provider",
        "state": server.state.lower() if server else None,
        "slots_busy": server.in_flight if server else None, "slots": node.slots,
    }  # fmt: skip


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: `gpu-10` comes after `gpu-9`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


# --- showing ---------------------------------------------------------------------------------------------------------


def status_view(status: Data) -> RenderableType:
    """The status for a person's eyes."""
    blocks: list[RenderableType] = []
    for name, host in status["hosts"].items():
        blocks += [Text(), _headline(name, host)] if blocks else [_headline(name, host)]
        blocks += [_services_table(host["services"])] if host["services"] else []
        blocks += [_cards_table(host["gpus"])] if host["gpus"] else []
    if status["nodes"]:
        headline = Text.assemble(("nodes", "bold cyan"), "  used, not run by the kit")
        blocks += [Text(), headline, _nodes_table(status["nodes"])]
    return Group(*blocks)


def _headline(name: str, host: Data) -> Text:
    planned = [row for row in host["services"] if row["in_plan"]]
    well = sum(row["well"] for row in planned)
    is_well = well == len(planned) and not host["problem"]
    words = host["problem"] or (f"all {well} services well" if is_well else f"{well} of {len(planned)} services well")
    line = Text.assemble((name, "bold cyan"), f"  {host['address']} · ", (words, "green" if is_well else "red"))
    if host["problem"]:
        line.append(" · ./generate.py doctor looks for the cause", "yellow")
    elif changed := sum(DRIFT in row["notes"] or row["state"] == "missing" for row in planned):
        line.append(f" · {changed} not as rendered: ./generate.py up", "yellow")
    return line


def _services_table(rows: Sequence[Data]) -> RenderableType:
    cells: dict[str, Callable[[Data], RenderableType]] = {
        "!service": lambda row: row["service"],
        "state": _state,
        ">!up": lambda row: duration(row["uptime_s"]),
        ">restarts": _restarts,
        ">!memory, MiB": _memory,
        ">GPU": lambda row: ", ".join(map(str, row["gpus"])),
        "!slots": _slots,
        "model": lambda row: Text(row["model"]) if row["model"] else Text(row["role"] or "", "dim"),
    }
    if not any(row["gpus"] for row in rows):
        del cells[">GPU"]
    if not any(row["slots"] for row in rows):
        del cells["!slots"]
    table = new_table(*cells, is_compact=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in cells.values()))
    return table


def _state(row: Data) -> Text:
    condition = (row["health"] or "running") if row["state"] == "running" else row["state"]
    is_odd = not row["in_plan"] or condition == "starting" or DRIFT in row["notes"]
    style = "red" if not row["well"] and condition != "starting" else "yellow" if is_odd else "green"
    words = [condition, *row["notes"]]
    if condition == "parked":
        words[:2] = [": ".join(words[:2])]
    return Text(", ".join(words), style, overflow="fold")


def _restarts(row: Data) -> Text:
    return Text("" if row["state"] == "missing" else str(row["restarts"]), "yellow" if row["restarts"] else "dim")


def _memory(row: Data) -> Text:
    used, limit = row["memory_mib"], row["memory_limit_mib"]
    if used is None or not limit:
        return Text("" if used is None else f"{used:.0f}")
    style = "red" if used > 0.95 * limit else "yellow" if used > 0.85 * limit else ""
    return Text(f"{used:.0f} of {limit:.0f}", style)


def _slots(row: Data) -> Text:
    busy, slots = row["slots_busy"], row["slots"]
    if not slots:
        return Text()
    if busy is None:
        return Text(f"? of {slots}", "dim")
    return Text(f"{busy} of {slots}", "yellow" if busy >= slots else "")


def _cards_table(cards: Iterable[Data]) -> RenderableType:
    table = new_table(">GPU", "!card", "!memory, GiB", ">!busy", ">!°C", is_compact=True)
    for card in cards:
        used, total, use, heat = (card[key] for key in ("memory_mib", "memory_total_mib", "use_percent", "celsius"))
        memory = "" if not total else gib(total) if used is None else f"{bar(used, total)} {gib(used)} of {gib(total)}"
        busy = "" if use is None else f"{use} %"
        table.add_row(str(card["number"]), card["name"], memory, busy, "" if heat is None else str(heat))
    return table


def _nodes_table(nodes: Iterable[Data]) -> RenderableType:
    table = new_table("node", "state", "slots", "address", "pool", is_compact=True)
    for node in nodes:
        style = {"up": "green", None: "dim"}.get(node["state"], "yellow")
        table.add_row(
            node["name"], Text(node["state"] or "unknown", style), _slots(node), node["address"], node["pool"]
        )
    return table


def watch_status(plan: Plan, hosts: Sequence[ComposeHost], console: Console, every_s: float) -> bool:
    """Redraws the status until Ctrl-C, or prints it again without a terminal; whether all was well at the end."""
    seen: Data = {"well": False}

    def views() -> Iterator[RenderableType]:
        while True:
            seen.update(farm_status(plan, hosts))
            yield status_view(seen) if console.is_terminal else Group(status_view(seen), Text())

    redraw(console, views(), every_s)
    return bool(seen["well"])
