"""One replica over several cards: how much of it each card gets (`--tensor-split`). Pure.

By itself llama.cpp looks at what is free at the moment of the start, so what another tenant has by then would decide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from corral.plan.cards import VRAM_RESERVE_MIB
from corral.units import grouped

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
    services = grouped(((replica.host, replica.service, replica.cards), replica) for replica in replicas)
    taken: Counter[tuple[str, int]] = Counter()
    found: dict[tuple[str, tuple[str, ...], tuple[int, ...]], tuple[float, ...]] = {}
    for members in services.values():
        for card, mib in zip(members[0].cards, claimed(members), strict=True):
            taken[card.host, card.number] += mib
    for replica in replicas:
        if len(replica.cards) < 2 or replica.engine.tensor_split or replica.weights.served_by.takes_share:  # noqa: PLR2004
            yield replica
            continue
        own = claimed(services[replica.host, replica.service, replica.cards])
        rooms = tuple(
            max(1, card.vram_mib - VRAM_RESERVE_MIB - taken[card.host, card.number] + mib)
            for card, mib in zip(replica.cards, own, strict=True)
        )
        # Replicas of a pool on equal cards with equal neighbours are set alike.
        alike = replica.pool, tuple(card.card for card in replica.cards), rooms
        if alike not in found:
            found[alike] = _fitted(replica, rooms, resized).split
        fitted = resized(replica, found[alike])
        if replica.shared is None:
            for card, before, after in zip(replica.cards, replica.card_mib, fitted.card_mib, strict=True):
                taken[card.host, card.number] += after - before
        yield fitted


def _fitted(replica: Replica, rooms: Sequence[int], resized: Resized) -> Replica:
    """The replica with shares that fill its cards evenly; in layers where its model is known."""
    total = replica.layers_on_cards
    if replica.memory is None or not total:
        steps = [max(1, room // STEP_MIB) for room in rooms]
        return resized(replica, tuple(step // math.gcd(*steps) for step in steps))
    best = resized(replica, _counts(total, rooms))
    for _ in range(total):
        load = _load(best, rooms)
        counts = list(best.split)
        counts[load.index(max(load))] -= 1
        counts[load.index(min(load))] += 1
        other = resized(replica, tuple(counts)) if min(counts) >= 0 else best
        if max(_load(other, rooms)) >= max(load):
            break
        best = other
    return best


def _load(replica: Replica, rooms: Sequence[int]) -> list[float]:
    """How full its cards are."""
    return [mib / room for mib, room in zip(replica.card_mib, rooms, strict=True)]


def _counts(total: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """So many layers in proportion to the rooms."""
    ends = [round(total * end / sum(rooms)) for end in accumulate(rooms)]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
