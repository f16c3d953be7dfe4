"""The plan as tables for people."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corral.build import Plan
from corral.config.client_names import aliases_of
from corral.config.inventory import Consumer, Inventory, KeyBudget, Tier
from corral.contributions import Service
from corral.gateway import fast_lane
from corral.gateway.frontends import gateway_publish_address
from corral.plan.cards import VRAM_RESERVE_MIB
from corral.plan.routing import tier_settings
from corral.plan.site import Replica, bracketed, claimed_mib
from corral.tables import new_table
from corral.units import bar, counted, gib
from corral.whatif import measured

# Columns of tables that go into a file or a pipe, which have no width of their own.
WIDE = 120
NUMBERS = frozenset({"GPU", "port", "slots", "RAM, MiB", "replicas"})
ROUTES = {
    "slots": "HAProxy by free slots",
    "least-busy": "LiteLLM least-busy, then HAProxy",
    "direct": "LiteLLM alone",
}


def page() -> Console:
    """Where tables go: as wide as the terminal or $COLUMNS say."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if has_width else WIDE)


def show_plan(plan: Plan, console: Console, hosts: Collection[str] | None = None) -> None:
    """Prints the farm: every host with its cards and services, then what clients may call."""
    site, inventory = plan.site, plan.inventory
    counts = {
        "host": len(inventory.hosts), "GPU": sum(map(len, site.cards.values())), "node": len(inventory.nodes),
        "pool": len(inventory.pools), "service": len(plan.contributions.services),
    }  # fmt: skip
    parts = [counted(number, noun) for noun, number in counts.items() if number]
    console.print(f"[bold]{escape(inventory.name)}[/]: {', '.join(parts)}")
    for name in inventory.hosts:
        if hosts is None or name in hosts:
            _show_host(plan, console, name)
    if hosts is None:
        _show_clients_view(plan, console)


# --- hosts -----------------------------------------------------------------------------------------------------------


def _show_host(plan: Plan, console: Console, name: str) -> None:
    replicas = [replica for replica in plan.site.replicas if replica.host == name]
    services = plan.services_of(name)
    console.print(f"\n[bold cyan]{escape(name)}[/]  {escape(' · '.join(_facts(plan, name)))}", soft_wrap=True)
    if replicas:
        console.print(_servers_table(plan, name, replicas))
    notes = list(plan.site.reasons) if any(replica.cards for replica in replicas) else []
    if guessed := sorted({replica.model for replica in replicas if replica.cards and replica.is_guess}):
        notes.append(f"~ estimated from file names: {', '.join(guessed)}; exact after: ./generate.py models inspect")
    for note in notes:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    servers = {replica.service for replica in replicas}
    if others := [service for service in services if service.name not in servers]:
        columns = ("service", "does", "port", "open on", "RAM, MiB", "image")
        console.print(_table(columns, map(_service_row, others)))


def _facts(plan: Plan, name: str) -> list[str]:
    host, cards = plan.site.host(name), plan.site.cards[name]
    containers = "Docker Swarm" if plan.site.is_swarm else "Docker Compose"
    facts = [host.address, "processes without Docker" if host.runtime == "local" else containers]
    facts += [f"{count} × {card}" for card, count in Counter(card.card for card in cards).items()]
    pins = Counter(card.pinned_by for card in cards)
    if pins:
        facts.append("pinned by " + " and ".join(f"{pin} ({n})" if len(pins) > 1 else pin for pin, n in pins.items()))
    if host.cpu.cores:
        facts.append(counted(host.cpu.cores, "core") + ("" if host.cpu.avx else ", no AVX"))
    wanted = sum(map(plan.site.host_memory_mib, plan.services_of(name)))
    room = round(((host.ram_gib or 0) - host.os_reserve_gib) * 1024)
    memory = f"{bar(wanted, room)} {gib(wanted)} of {gib(room)}" if host.ram_gib else gib(wanted)
    who = "containers and cards" if any(card.unified_memory for card in cards) else "containers"
    return [*facts, f"RAM {memory} GiB for {who}"]


def _servers_table(plan: Plan, host: str, replicas: list[Replica]) -> Table:
    rows: list[tuple[str, ...]] = []
    for card in plan.site.cards[host]:
        here = [replica for replica in replicas if card in replica.cards]
        first = [replica for replica in here if replica.cards[0] == card]
        services = dict.fromkeys(replica.service for replica in here)
        servers = [[item for item in here if item.service == service] for service in services]
        used = sum(claimed_mib(members)[members[0].cards.index(card)] for members in servers)
        others = f"[dim]{escape('with ' + ', '.join(item.service for item in here)) if here else 'free'}[/]"
        room = card.vram_mib - VRAM_RESERVE_MIB
        memory = (
            f"{bar(used, room)}{'~' if any(replica.is_guess for replica in here) else ' '}{gib(used):>4} of {gib(room)}"
        )
        rows += _placed(str(card.number), memory, [_replica_row(replica) for replica in first] or [(others,)])
    rows += _placed("CPU", "", [_replica_row(replica) for replica in replicas if not replica.cards])
    columns = ("GPU", "VRAM, GiB", "service", "pool", "port", "slots × tokens", "RAM, MiB")
    table = _table(columns, rows)
    table.columns[1].no_wrap = True
    return table


def _placed(place: str, memory: str, rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows of one card, which is named in the first of them."""
    return [((place, memory) if index == 0 else ("", "")) + row for index, row in enumerate(rows)]


def _replica_row(replica: Replica) -> tuple[str, ...]:
    is_image = replica.kind == "image"
    context = counted(replica.slots, "picture") if is_image else f"{replica.slots} × {replica.weights.context}"
    service = f"{replica.service}, {replica.shared.loaded} at a time" if replica.shared else replica.service
    return service, replica.pool, str(replica.port), context, str(replica.memory_mib)


def _service_row(service: Service) -> tuple[str, ...]:
    ports = "\n".join(str(port.number) for port in service.ports)
    places = "\n".join(port.publish or "[dim]inside[/]" for port in service.ports)
    return service.name, service.role, ports, places, str(service.memory_mib), service.image


# --- what clients may call -------------------------------------------------------------------------------------------


def _show_clients_view(plan: Plan, console: Console) -> None:
    inventory = plan.inventory
    _section(
        console, "nodes", "used, not started by the kit", ("node", "engine", "address", "model", "tier", "slots"),
        [
            (name, node.engine, place, "\n".join(node.names), node.tier or "", str(node.slots))
            for name, node in inventory.nodes.items()
            for place in [f"dials in, port {node.dials_in}" if node.dials_in else node.url or "provider"]
        ],
    )  # fmt: skip
    _section(
        console, "pools", "what clients call",
        ("pool", "model", "replicas", "slots", "may wait", "limits per minute"),
        [_pool_row(plan, name) for name in inventory.pools],
    )  # fmt: skip
    _section(
        console, "consumers", "who calls; `keys sync` makes their keys",
        ("consumer", "opens", "limits per minute", "at a time", "budget", "until"),
        [_consumer_row(inventory, name, consumer) for name, consumer in inventory.consumers.items()],
    )  # fmt: skip
    if auto := inventory.gateway.auto:
        title = ", ".join((auto.name, *auto.aliases))
        rows = [(tier.name, tier.pool, ", ".join(tier.spill) or "wait", _takes(tier)) for tier in auto.tiers]
        _section(console, title, "by difficulty of a request", ("tier", "pool", "while it is full", "takes"), rows)
    for name, pool in inventory.pools.items():
        for words, instead in (
            ("when it fails or refuses", pool.fallback), ("for longer requests", pool.context_fallback),
        ):  # fmt: skip
            if instead:
                console.print(f"{name} → {', '.join(instead)}  [dim]{words}[/]")
        if pool.background:
            console.print(f"{', '.join(pool.background)} → {name}  [dim]after all other requests[/]")
    gateway = inventory.gateway
    if gateway.fast_lane:
        _show_fast_lane(plan, console)
    entrance = f"entrance port {gateway.entrance.port}, or " if gateway.entrance else ""
    address = f"http://{bracketed(gateway_publish_address(plan.site))}:{gateway.port}/v1"
    route = f"(LiteLLM on {gateway.host}) → {ROUTES[gateway.balancing]} → replicas"
    console.print(f"\nclients → {entrance}[bold]{address}[/] {route}")


def _show_fast_lane(plan: Plan, console: Console) -> None:
    reasons = fast_lane.verdicts(plan.site, plan.contributions)
    console.print(f"fast lane: {', '.join(pool for pool, reason in reasons.items() if not reason) or 'no pool'}")
    for pool, reason in reasons.items():
        if reason:
            console.print(f"[dim]{pool} through LiteLLM: {escape(reason)}[/]", soft_wrap=True)
    consumers = plan.inventory.consumers.items()
    counted = [name for name, item in consumers if item.budget or item.team or item.limits.tpm]
    if counted:
        console.print(f"[dim]{', '.join(counted)} through LiteLLM: it counts their tokens[/]", soft_wrap=True)


def _section(console: Console, title: str, note: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        console.print(f"\n[bold cyan]{title}[/]  {note}")
        console.print(_table(columns, rows))


def _table(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = new_table(*(f">{column}" if column in NUMBERS else column for column in columns))
    for row in rows:
        table.add_row(*row)
    return table


def _pool_row(plan: Plan, name: str) -> tuple[str, ...]:
    pool, gateway = plan.inventory.pools[name], plan.inventory.gateway
    backends = [backend for backend in plan.contributions.backends if backend.pool == name]
    queue = pool.queue or gateway.queue
    names = [name, *(f"[dim]= {alias}[/]" for alias in aliases_of(plan.inventory, name))]
    models = [pool.model] if pool.model else dict.fromkeys(backend.upstream_model for backend in backends)
    balanced = [backend for backend in backends if backend.protocol != "cloud"]
    waiting = "without bound" if gateway.balancing == "direct" else f"{queue.depth} for {queue.timeout_s} s"
    origin = measured.state(plan, name)
    style = "dim" if origin.startswith("measured (") else "yellow"
    limits = _limits(pool.limits.rpm, pool.limits.tpm, f"[{style}]{escape(origin)}[/]" if origin else "")
    slots = str(sum(backend.slots for backend in balanced)) if balanced else ""
    wait = waiting if balanced else "at the provider"
    return "\n".join(names), "\n".join(models), str(len(backends)), slots, wait, limits


def _consumer_row(inventory: Inventory, name: str, consumer: Consumer) -> tuple[str, ...]:
    limits, team = consumer.limits, consumer.team
    budgets = [_budget(consumer.budget)] if consumer.budget else []
    budgets += [f"{_budget(inventory.teams[team].budget)} with team {team}"] if team else []
    return (
        name, "\n".join(consumer.pools or ["all pools"]), _limits(limits.rpm, limits.tpm), str(limits.parallel or ""),
        "\n".join(budgets), consumer.expires or "",
    )  # fmt: skip


def _budget(budget: KeyBudget) -> str:
    period = f" in {budget.period}" if budget.period else ""
    return f"{budget.max_usd:g} USD{period}" + (f", then {budget.fallback}" if budget.fallback else "")


def _limits(rpm: int | None, tpm: int | None, origin: str = "") -> str:
    return "\n".join(filter(None, [f"{rpm} requests" if rpm else "", f"{tpm} tokens" if tpm else "", origin]))


def _takes(tier: Tier) -> str:
    settings = tier_settings(tier)
    words = f"{len(settings['words'])} words" if settings["words"] else ""
    if words and settings["words_beyond"]:
        words += f" in messages of more than {settings['words_beyond']}"
    lengths = [
        f"more than {settings[f'{unit}_beyond']} {unit}"
        for unit in ("characters", "messages")
        if settings[f"{unit}_beyond"] is not None
    ]
    return "; ".join(filter(None, [words, *lengths])) or "everything else"
