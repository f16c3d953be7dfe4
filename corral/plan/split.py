"""One replica over several cards: how much of it each card gets (`--tensor-split`). Pure.

By itself llama.cpp looks at what is free at the moment of the start, so what another tenant has by then would decide.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from corral.plan.cards import VRAM_RESERVE_MIB

if TYPE_CHECKING:
    from corral.plan.site import Replica

# Shares without a known model are in this unit.
STEP_MIB = 512
# A replica with other shares of its cards.
Resized = Callable[["Replica", tuple[float, ...]], "Replica"]
# What the replicas of one service take on each of its cards.
Claimed = Callable[[Sequence["Replica"]], tuple[int, ...]]


def with_shares(replicas: Sequence[Replica], resized: Resized, claimed: Claimed) -> Iterator[Replica]:
    """The replicas; those on several cards with shares by what each card has left beside its other tenants."""
    services: dict[tuple[str, str], list[Replica]] = defaultdict(list)
    for replica in replicas:
        services[replica.host, replica.service].append(replica)
    taken: Counter[tuple[str, int]] = Counter()
    for members in services.values():
        for card, mib in zip(members[0].cards, claimed(members), strict=True):
            taken[card.host, card.number] += mib
    for replica in replicas:
        if len(replica.cards) < 2 or replica.engine.tensor_split or replica.weights.served_by.takes_share:  # noqa: PLR2004
            yield replica
            continue
        own = claimed(services[replica.host, replica.service])
        rooms = [
            max(1, card.vram_mib - VRAM_RESERVE_MIB - taken[card.host, card.number] + mib)
            for card, mib in zip(replica.cards, own, strict=True)
        ]
        yield _fitted(replica, rooms, resized)


def _fitted(replica: Replica, rooms: Sequence[int], resized: Resized) -> Replica:
    """The replica with shares that fill its cards evenly; in layers where its model is known."""
    if replica.memory is None:
        steps = [max(1, room // STEP_MIB) for room in rooms]
        return resized(replica, tuple(step // math.gcd(*steps) for step in steps))
    total = replica.layers_on_cards
    best = resized(replica, _counts(total, rooms))
    for _ in range(total):
        load = [mib / room for mib, room in zip(best.card_mib, rooms, strict=True)]
        fullest, emptiest = load.index(max(load)), load.index(min(load))
        counts = list(best.split)
        counts[fullest], counts[emptiest] = counts[fullest] - 1, counts[emptiest] + 1
        other = resized(replica, tuple(counts))
        if min(counts) < 0 or max(mib / room for mib, room in zip(other.card_mib, rooms, strict=True)) >= max(load):
            break
        best = other
    return best


def _counts(total: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """So many layers in proportion to the rooms."""
    ends = [round(total * sum(rooms[: place + 1]) / sum(rooms)) for place in range(len(rooms))]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
