"""The plan for a person's eyes."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corral.build import Plan
from corral.config.client_names import aliases_of
from corral.config.inventory import Consumer, Tier
from corral.contributions import Service
from corral.gateway.fronts import gateway_publish_address
from corral.plan.cards import VRAM_RESERVE_MIB
from corral.plan.routing import tier_settings
from corral.plan.site import Card, Replica, bracketed, claimed_mib
from corral.units import bar, gib
from corral.whatif import measured

# Columns of tables that go into a file or a pipe, which have no width of their own.
WIDE = 120


def page() -> Console:
    """Where tables go: as wide as the terminal or $COLUMNS say."""
    is_told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_told else WIDE)


def show_plan(plan: Plan, console: Console, hosts: set[str] | None = None) -> None:
    """Prints the farm: every host with its cards and services, then what clients may call."""
    services = by_host(plan)
    shown = [name for name in plan.inventory.hosts if hosts is None or name in hosts]
    console.print(_headline(plan, services))
    for name in shown:
        _show_host(plan, console, name, services[name])
    if hosts is None:
        _show_nodes(plan, console)
        _show_pools(plan, console)
        _show_consumers(plan, console)
        _show_routing(plan, console)
        _show_path(plan, console)


def by_host(plan: Plan) -> dict[str, list[Service]]:
    """The services of each host."""
    found: dict[str, list[Service]] = defaultdict(list)
    for service in plan.contributions.services:
        found[service.host].append(service)
    return found


def _headline(plan: Plan, services: dict[str, list[Service]]) -> str:
    cards = sum(map(len, plan.site.cards.values()))
    total = sum(map(len, services.values()))
    parts = [
        _count(len(plan.inventory.hosts), "host"), _count(cards, "GPU"), _count(len(plan.inventory.nodes), "node"),
        _count(len(plan.inventory.pools), "pool"), _count(total, "service"),
    ]  # fmt: skip
    return f"[bold]{escape(plan.inventory.name)}[/]: {', '.join(part for part in parts if not part.startswith('0 '))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _show_host(plan: Plan, console: Console, name: str, services: list[Service]) -> None:
    host = plan.site.host(name)
    facts = [host.address, "processes without Docker" if host.runtime == "local" else "Docker Compose"]
    facts += [f"{count} × {card}" for card, count in Counter(card.card for card in plan.site.cards[name]).items()]
    pins = Counter(card.pinned_by for card in plan.site.cards[name])
    if pins:
        told = pins if len(pins) == 1 else (f"{pin} ({count})" for pin, count in pins.items())
        facts.append(f"pinned by {' and '.join(told)}")
    if host.cpu.cores:
        facts.append(_count(host.cpu.cores, "core") + ("" if host.cpu.avx else ", no AVX"))
    wanted = sum(service.memory_mib for service in services)
    if host.ram_gib:
        room = round((host.ram_gib - host.os_reserve_gib) * 1024)
        facts.append(f"RAM {bar(wanted, room)} {gib(wanted)} of {gib(room)} GiB for containers")
    else:
        facts.append(f"RAM {gib(wanted)} GiB for containers")
    console.print(f"\n[bold cyan]{escape(name)}[/]  {escape(' · '.join(facts))}", soft_wrap=True)
    replicas = [replica for replica in plan.site.replicas if replica.host == name]
    if replicas:
        console.print(_servers_table(plan.site.cards[name], replicas))
    for line in plan.site.reasons if any(replica.cards for replica in replicas) else ():
        console.print(f"[dim]{escape(line)}[/]", soft_wrap=True)
    guessed = sorted({replica.model for replica in replicas if is_guess(replica)})
    if guessed and plan.site.cards[name]:
        words = f"~ estimated from file names: {', '.join(guessed)}; exact after: ./generate.py models inspect"
        console.print(f"[dim]{escape(words)}[/]", soft_wrap=True)
    others = [service for service in services if service.name not in {replica.service for replica in replicas}]
    if others:
        console.print(_services_table(others))


def _servers_table(cards: tuple[Card, ...], replicas: list[Replica]) -> Table:
    table = new_table("GPU", "VRAM, GiB", "service", "pool", "port", "slots × tokens", "RAM, MiB")
    seats: dict[int, list[Replica]] = defaultdict(list)
    for replica in replicas:
        seats[replica.cards[0].number if replica.cards else 0].append(replica)
    for card in cards:
        room = card.vram_mib - VRAM_RESERVE_MIB
        here = [replica for replica in replicas if card in replica.cards]
        servers = {replica.service: [item for item in here if item.service == replica.service] for replica in here}
        used = sum(claimed_mib(members) // len(members[0].cards) for members in servers.values())
        sign = "~" if any(is_guess(replica) for replica in here) else " "
        _add_rows(
            table, (str(card.number), f"{bar(used, room)}{sign}{gib(used):>4} of {gib(room)}"), seats[card.number]
        )
    _add_rows(table, ("CPU", ""), seats[0])
    return table


def _add_rows(table: Table, place: tuple[str, str], replicas: list[Replica]) -> None:
    if not replicas and place[1]:
        table.add_row(*place, "[dim]free[/]")
    for index, replica in enumerate(replicas):
        where = place if index == 0 else ("", "")
        context = (
            f"{replica.slots} × {replica.weights.context}"
            if replica.kind != "image"
            else _count(replica.slots, "picture")
        )
        service = f"{replica.service}, {replica.shared.loaded} at a time" if replica.shared else replica.service
        table.add_row(*where, service, replica.pool, str(replica.port), context, str(replica.memory_mib))


def _services_table(services: Iterable[Service]) -> Table:
    table = new_table("service", "does", "port", "open on", "RAM, MiB", "image")
    for service in services:
        ports = "\n".join(str(port.number) for port in service.ports)
        places = "\n".join(port.publish or "[dim]inside[/]" for port in service.ports)
        table.add_row(service.name, service.role, ports, places, str(service.memory_mib), service.image)
    return table


def _show_nodes(plan: Plan, console: Console) -> None:
    if not plan.inventory.nodes:
        return
    console.print("\n[bold cyan]nodes[/]  used, not started by the kit")
    table = new_table("node", "engine", "address", "model", "tier", "slots")
    for name, node in plan.inventory.nodes.items():
        table.add_row(name, node.engine, node.url or "provider", node.model, node.tier or "", str(node.slots))
    console.print(table)


def _show_pools(plan: Plan, console: Console) -> None:
    console.print("\n[bold cyan]pools[/]  what clients call")
    table = new_table("pool", "model", "replicas", "slots", "may wait", "limits per minute")
    for name, pool in plan.inventory.pools.items():
        backends = [backend for backend in plan.contributions.backends if backend.pool == name]
        slots = sum(backend.slots for backend in backends)
        queue = pool.queue or plan.inventory.gateway.queue
        waiting = (
            f"{queue.depth} for {queue.timeout_s} s"
            if plan.inventory.gateway.balancing != "direct"
            else "without bound"
        )
        limits = [
            f"{pool.limits.rpm} requests" if pool.limits.rpm else "",
            f"{pool.limits.tpm} tokens" if pool.limits.tpm else "",
            _origin(measured.state(plan, name)),
        ]
        names = "\n".join([name, *(f"[dim]= {alias}[/]" for alias in aliases_of(plan.inventory, name))])
        model = pool.model or "\n".join(dict.fromkeys(backend.upstream_model for backend in backends))
        table.add_row(names, model, str(len(backends)), str(slots), waiting, "\n".join(filter(None, limits)))
    console.print(table)


def _origin(words: str) -> str:
    """Where limits come from; in yellow until this pool was measured."""
    return (
        f"[dim]{escape(words)}[/]" if words.startswith("measured (") else f"[yellow]{escape(words)}[/]" if words else ""
    )


def _show_consumers(plan: Plan, console: Console) -> None:
    if not plan.inventory.consumers:
        return
    console.print("\n[bold cyan]consumers[/]  who calls; `keys sync` makes their keys")
    table = new_table("consumer", "opens", "limits per minute", "at a time", "budget", "until")
    for name, consumer in plan.inventory.consumers.items():
        limits = consumer.limits
        counted = [f"{limits.rpm} requests" if limits.rpm else "", f"{limits.tpm} tokens" if limits.tpm else ""]
        opens = "\n".join(consumer.pools) if consumer.pools else "all pools"
        row = (opens, "\n".join(filter(None, counted)), str(limits.parallel or ""), _budget_words(consumer))
        table.add_row(name, *row, consumer.expires or "")
    console.print(table)


def _budget_words(consumer: Consumer) -> str:
    if consumer.budget is None:
        return ""
    return f"{consumer.budget.max_usd:g} USD" + (f" in {consumer.budget.period}" if consumer.budget.period else "")


def _show_routing(plan: Plan, console: Console) -> None:
    """What happens to requests that name no pool, or that their pool cannot take."""
    auto, pools = plan.inventory.gateway.auto, plan.inventory.pools
    if auto is not None:
        console.print(f"\n[bold cyan]{', '.join((auto.name, *auto.aliases))}[/]  by how difficult a request is")
        table = new_table("tier", "pool", "while it is full", "takes")
        for tier in auto.tiers:
            table.add_row(tier.name, tier.pool, ", ".join(tier.spill) or "wait", _tier_takes(tier))
        console.print(table)
    for section, words in (("fallback", "when it fails or refuses"), ("context_fallback", "for longer requests")):
        for name, pool in pools.items():
            if getattr(pool, section):
                console.print(f"{name} → {', '.join(getattr(pool, section))}  [dim]{words}[/]")
    for name, pool in pools.items():
        if pool.background:
            console.print(f"{', '.join(pool.background)} → {name}  [dim]others go first[/]")


def _tier_takes(tier: Tier) -> str:
    settings = tier_settings(tier)
    words = f"{len(settings['words'])} words" if settings["words"] else ""
    if words and settings["words_beyond"]:
        words += f" in messages of more than {settings['words_beyond']}"
    lengths = [
        f"more than {settings[name]} {unit}"
        for name, unit in (("characters_beyond", "characters"), ("messages_beyond", "messages"))
        if settings[name] is not None
    ]
    return "; ".join(filter(None, [words, *lengths])) or "everything else"


def _show_path(plan: Plan, console: Console) -> None:
    gateway = plan.inventory.gateway
    entrance = f"entrance port {gateway.entrance.port}, or " if gateway.entrance else ""
    way = {
        "slots": "HAProxy by free slots",
        "least-busy": "LiteLLM least-busy, then HAProxy",
        "direct": "LiteLLM alone",
    }[gateway.balancing]
    console.print(
        f"\nclients → {entrance}[bold]http://{bracketed(gateway_publish_address(plan.site))}:{gateway.port}/v1[/] "
        f"(LiteLLM on {gateway.host}) → {way} → replicas"
    )


def new_table(*columns: str) -> Table:
    """An empty table with these columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column in ("port", "slots", "RAM, MiB", "replicas", "GPU")
        table.add_column(
            column, justify="right" if is_number else "left", overflow="fold", no_wrap=column in ("VRAM, GiB", "")
        )
    return table


def is_guess(replica: Replica) -> bool:
    """Whether a replica's size on its card is estimated from its file's name.

    A person's own figure is none, nor is the share that vLLM takes of its cards, whatever it needs.
    """
    return replica.memory is None and replica.engine.vram_mib is None and replica.weights.server != "vllm"
