"""What a person types, as services of the plan: a service, container, pool, model, host, GPU, component or role.

`gpu-1`, `pea-gpu-1`, `chat`, `pea`, `pea:1`, `gpu 1`, `GPU1`, `litellm` and `gateway` all work, in capitals too.
`pool:chat` says which kind is meant where a word could mean two things.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from corral.build import Plan
from corral.config.client_names import aliases_of
from corral.contributions import Service
from corral.errors import UsageError, did_you_mean
from corral.plan.site import Card, Replica

_GPU = re.compile(r"gpu[ _-]?(\d+)", re.IGNORECASE)
_GPU_OF_HOST = re.compile(r"(.+):(?:gpu[ _-]?)?(\d+)", re.IGNORECASE)
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class _Names:
    """Services by the names of each kind, in lower case; a name may stand for several services."""

    precise: Mapping[str, Mapping[str, list[Service]]]
    # Asked only when no precise kind knows the name: every chat server has the role `chat`, as well as its pool.
    broad: Mapping[str, Mapping[str, list[Service]]]
    gpus: Mapping[tuple[str, int], list[Service]]
    nodes: frozenset[str]
    replicas: frozenset[tuple[str, str]]

    @property
    def kinds(self) -> Mapping[str, Mapping[str, list[Service]]]:
        """Both together."""
        return {**self.precise, **self.broad}


def services_named(plan: Plan, words: Sequence[str], hosts: Iterable[str] | None = None) -> list[Service]:
    """The services meant by these words, each once, in the plan's order; all of them for no words.

    Args:
        plan: the plan whose services are meant.
        words: what was typed; `gpu 1` may come as two words.
        hosts: hosts that are meant; all Compose hosts when absent.

    Raises:
        UsageError: a word means nothing, or more than one thing; the message says what to type instead.
    """
    services = [item for item in _services(plan) if hosts is None or item.host in set(hosts)]
    if not words:
        return services
    names = _names(plan, services)
    meant = {(item.host, item.name) for word in _joined(words) for item in _meant(plan, names, word)}
    return [item for item in services if (item.host, item.name) in meant]


def _services(plan: Plan) -> list[Service]:
    return [item for item in plan.contributions.services if not plan.site.is_local(item.host)]


def _joined(words: Sequence[str]) -> list[str]:
    """`gpu 1` as one word."""
    found: list[str] = []
    for word in words:
        if found and found[-1].lower() == "gpu" and word.isdecimal():
            found[-1] = f"gpu {word}"
        else:
            found.append(word)
    return found


# --- names -----------------------------------------------------------------------------------------------------------


def _names(plan: Plan, services: list[Service]) -> _Names:
    def members(item: Service) -> tuple[Replica, ...]:
        return plan.site.members(item.host, item.name)

    def of_replica(pick: Callable[[Service], Iterable[str]]) -> dict[str, list[Service]]:
        return _by_name([item for item in services if members(item)], pick)

    def pool_names(item: Service) -> list[str]:
        pools = [replica.pool for replica in members(item)]
        return [name for pool in pools for name in (pool, *aliases_of(plan.inventory, pool))]

    def containers(item: Service) -> list[str]:
        """The container, and what the balancer and the figures call those who share it."""
        return list(dict.fromkeys([item.container_name, *(one.container for one in members(item))]))

    precise = {
        "service": _by_name(services, lambda item: [item.name]),
        "container": _by_name(services, containers),
        "pool": of_replica(pool_names),
        "model": of_replica(lambda item: {replica.model for replica in members(item)}),
        "host": _by_name(services, lambda item: [item.host]),
    }
    broad = {
        "component": _by_name(services, lambda item: {item.component, item.component.replace("_", "-")}),
        "role": _by_name(services, lambda item: [item.role] if item.role else []),
    }
    replicas = frozenset((item.host, item.service) for item in plan.site.replicas)
    return _Names(precise, broad, _by_gpu(plan, services), frozenset(plan.inventory.nodes), replicas)


def _by_name(services: list[Service], pick: Callable[[Service], Iterable[str]]) -> dict[str, list[Service]]:
    found: dict[str, list[Service]] = {}
    for item in services:
        for name in pick(item):
            found.setdefault(name.lower(), []).append(item)
    return found


def _by_gpu(plan: Plan, services: list[Service]) -> dict[tuple[str, int], list[Service]]:
    """Services by host (in lower case) and number of every card, those without any among them."""
    hosts = {item.host for item in services}
    cards: list[Card] = [card for name in hosts for card in plan.site.cards[name]]
    return {
        (card.host.lower(), card.number): [
            item
            for item in services
            if item.host == card.host and card.number in {gpu.number for gpu in item.tenancies}
        ]
        for card in cards
    }


# --- meaning ---------------------------------------------------------------------------------------------------------


def _meant(plan: Plan, names: _Names, typed: str) -> list[Service]:
    word = typed.lower()
    kind, colon, rest = word.partition(":")
    if colon and kind in names.kinds and rest in names.kinds[kind]:
        return names.kinds[kind][rest]
    for kinds in (names.precise, names.broad):
        found = {kind: known[word] for kind, known in kinds.items() if word in known}
        if found:
            return _one_of(names, typed, found)
    return _on_gpu(names, typed) or _unknown(plan, names, typed)


def _one_of(names: _Names, typed: str, found: Mapping[str, list[Service]]) -> list[Service]:
    """The services that every kind agrees on; raises UsageError when they do not agree."""
    kinds = {kind: [(item.host, item.name) for item in items] for kind, items in found.items()}
    different = {tuple(items): kind for kind, items in reversed(kinds.items())}
    if len(different) > 1:
        ways = " or ".join(f"{kind}:{typed}" for kind in sorted(different.values()))
        raise UsageError(f'"{typed}" is the name of a {" and of a ".join(sorted(different.values()))}; say {ways}')
    items = next(iter(found.values()))
    hosts = sorted({item.host for item in items})
    if "service" in found and len(hosts) > 1 and any((item.host, item.name) in names.replicas for item in items):
        containers = " or ".join(item.container_name for item in items[:_SHOWN])
        raise UsageError(f'"{typed}" is a service of {" and ".join(hosts)}; say {containers}, or name the --host')
    return items


def _on_gpu(names: _Names, typed: str) -> list[Service]:
    """Services on a card, as `pea:1`, `gpu 1`, `GPU1`; none when the word is no card's name."""
    with_host = _GPU_OF_HOST.fullmatch(typed)
    alone = _GPU.fullmatch(typed)
    if with_host and any(host == with_host[1].lower() for host, _ in names.gpus):
        found = [(host, number) for host, number in names.gpus if host == with_host[1].lower()]
        number = int(with_host[2])
    elif alone:
        found, number = list(names.gpus), int(alone[1])
    else:
        return []
    hosts = sorted({host for host, other in found if other == number})
    if not hosts:
        raise UsageError(f"there is no GPU {number}; {_known_gpus(found)}")
    if len(hosts) > 1:
        raise UsageError(
            f"{' and '.join(hosts)} have a GPU {number} each; say {' or '.join(f'{host}:{number}' for host in hosts)}"
        )
    services = names.gpus[hosts[0], number]
    if not services:
        raise UsageError(f"nothing runs on GPU {number} of {hosts[0]}")
    return services


def _known_gpus(found: Iterable[tuple[str, int]]) -> str:
    """`pea has 1 to 8`, for every host with cards."""
    most = dict(sorted(found))  # the last number of each host stays
    return (
        ", ".join(f"{host} has {'only 1' if last == 1 else f'1 to {last}'}" for host, last in most.items())
        or "no host has one"
    )


def _unknown(plan: Plan, names: _Names, typed: str) -> list[Service]:
    if typed.lower() in names.nodes:
        raise UsageError(f'"{typed}" is a node: it is used, but not run by the kit; look there')
    everywhere = {item.name for item in _services(plan)} | {item.container for item in _services(plan)}
    if typed in everywhere:
        raise UsageError(f'"{typed}" is not on the hosts named with --host')
    known = {name for kinds in names.kinds.values() for name in kinds}
    hint = did_you_mean(typed.lower(), known)
    if not hint.startswith("did"):
        some = ", ".join(sorted(names.precise["service"])[: _SHOWN * 3])
        hint = f"services: {some}; pools: {', '.join(sorted(names.precise['pool'])) or 'none'}"
    raise UsageError(f'nothing is called "{typed}"; {hint}')
