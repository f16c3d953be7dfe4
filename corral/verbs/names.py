"""What a person types, as services of the plan: a service, container, pool, model, host, GPU, component or role.

`gpu-1`, `pea-gpu-1`, `chat`, `pea`, `pea:1`, `gpu 1`, `GPU1`, `litellm` and `gateway` all work, in capitals too.
`pool:chat` states the kind of a name that has two meanings.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from corral.build import Plan
from corral.config.client_names import aliases_of
from corral.contributions import Service
from corral.errors import UsageError, did_you_mean

# By kind, then by name in lower case.
Table = Mapping[str, Mapping[str, list[Service]]]
# By host in lower case and number of the card.
Cards = Mapping[tuple[str, int], list[Service]]

# Used only when no other kind has the name: every chat server has the role `chat`, which is usually also a pool.
BROAD = frozenset({"component", "role"})
_GPU = re.compile(r"(?:(.+):(?:gpu[ _-]?)?|gpu[ _-]?)(\d+)", re.IGNORECASE)
_SHOWN = 4


def services_named(plan: Plan, words: Sequence[str], hosts: Iterable[str] | None = None) -> list[Service]:
    """The services that these words name, each once, in the plan's order; all of them for no words.

    Args:
        plan: the plan that has the services.
        words: what was typed; `gpu 1` may come as two words.
        hosts: hosts to consider; all of them when absent.

    Raises:
        UsageError: a word names nothing, or more than one thing; the message says what to type instead.
    """
    chosen = None if hosts is None else set(hosts)
    services = [item for item in plan.contributions.services if chosen is None or item.host in chosen]
    if not words:
        return services
    table = _table(plan, services)
    typed = re.sub(r"^gpu\n(?=\d+$)", "gpu ", "\n".join(words), flags=re.IGNORECASE | re.MULTILINE).split("\n")
    found = {(item.host, item.name) for word in typed for item in _meant(plan, table, services, word)}
    return [item for item in services if (item.host, item.name) in found]


def _table(plan: Plan, services: Iterable[Service]) -> Table:
    table: dict[str, dict[str, list[Service]]] = defaultdict(lambda: defaultdict(list))
    for item in services:
        members = plan.site.members(item.host, item.name)
        names = {
            "service": [item.name],
            "container": [item.container_name, *(one.container for one in members)],
            "pool": [name for one in members for name in (one.pool, *aliases_of(plan.inventory, one.pool))],
            "model": [one.model for one in members],
            "host": [item.host],
            "component": [item.component, item.component.replace("_", "-")],
            "role": [item.role],
        }
        for kind, words in names.items():
            for word in {word.lower() for word in words if word}:
                table[kind][word].append(item)
    return table


def _meant(plan: Plan, table: Table, services: list[Service], typed: str) -> list[Service]:
    word = typed.lower()
    kind, _, rest = word.partition(":")
    if rest in table.get(kind, {}):
        return table[kind][rest]
    found = {kind: names[word] for kind, names in table.items() if word in names}
    if found:
        return _one_of(plan, typed, {kind: items for kind, items in found.items() if kind not in BROAD} or found)
    return _on_gpu(plan, services, typed) or _unknown(plan, table, typed)


def _one_of(plan: Plan, typed: str, found: Mapping[str, list[Service]]) -> list[Service]:
    """The services that every kind agrees on; raises UsageError when they do not agree."""
    meanings = {tuple((item.host, item.name) for item in items): kind for kind, items in reversed(list(found.items()))}
    kinds = sorted(meanings.values())
    if len(kinds) > 1:
        remedy = " or ".join(f"{kind}:{typed}" for kind in kinds)
        raise UsageError(f'"{typed}" is the name of a {" and of a ".join(kinds)}; say {remedy}')
    items = next(iter(found.values()))
    hosts = sorted({item.host for item in items})
    if "service" in found and len(hosts) > 1 and any(plan.site.members(item.host, item.name) for item in items):
        containers = " or ".join(item.container_name for item in items[:_SHOWN])
        raise UsageError(f'"{typed}" is a service of {" and ".join(hosts)}; say {containers}, or name the --host')
    return items


def _on_gpu(plan: Plan, services: list[Service], typed: str) -> list[Service]:
    """Services on a card, as `pea:1`, `gpu 1`, `GPU1`; none when the word is no card's name."""
    match = _GPU.fullmatch(typed)
    cards = _cards(plan, services, match[1]) if match else {}
    if match is None or (match[1] and not cards):
        return []
    number = int(match[2])
    hosts = sorted(host for host, other in cards if other == number)
    if not hosts:
        last = dict(sorted(cards))
        ranges = (f"{host} has {'only 1' if most == 1 else f'1 to {most}'}" for host, most in last.items())
        raise UsageError(f"there is no GPU {number}; {', '.join(ranges) or 'no host has one'}")
    if len(hosts) > 1:
        remedy = " or ".join(f"{host}:{number}" for host in hosts)
        raise UsageError(f"{' and '.join(hosts)} have a GPU {number} each; say {remedy}")
    if not cards[hosts[0], number]:
        raise UsageError(f"nothing runs on GPU {number} of {hosts[0]}")
    return cards[hosts[0], number]


def _cards(plan: Plan, services: list[Service], host: str | None) -> Cards:
    """The services of every card of this host, or of all hosts; cards without services are included."""
    hosts = {item.host for item in services if not host or item.host.lower() == host.lower()}
    numbers = {(name, card.number) for name in hosts for card in plan.site.cards[name]}
    return {
        (name.lower(), number): [
            item for item in services if item.host == name and number in {gpu.number for gpu in item.tenancies}
        ]
        for name, number in numbers
    }


def _unknown(plan: Plan, table: Table, typed: str) -> list[Service]:
    if typed.lower() in plan.inventory.nodes:
        raise UsageError(f'"{typed}" is a node: the farm uses it, but the kit does not run it; look on its machine')
    if any(typed in {item.name, item.container} for item in plan.contributions.services):
        raise UsageError(f'"{typed}" is not on the hosts named with --host')
    hint = did_you_mean(typed.lower(), {name for names in table.values() for name in names})
    if not hint.startswith("did"):
        some = ", ".join(sorted(table["service"])[: _SHOWN * 3])
        hint = f"services: {some}; pools: {', '.join(sorted(table['pool'])) or 'none'}"
    raise UsageError(f'nothing is called "{typed}"; {hint}')
