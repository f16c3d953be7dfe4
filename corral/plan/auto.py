"""`on: auto`: the plan chooses the cards of a pool's replicas, and says why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from corral.config.inventory import Inventory, Placement, Pool
from corral.plan.placement import Bin, Key, Piece, Placing, cards_of, place
from corral.plan.sizes import worst

# MiB that one replica of a pool takes on a kind of card.
Size = Callable[[str, str], int]


@dataclass(frozen=True, slots=True)
class Seat:
    """A card where a replica may go: its kind and the MiB that can be used on it."""

    host: str
    number: int
    kind: str
    room: int


def placed(inventory: Inventory, seats: Sequence[Seat], size: Size) -> tuple[Inventory, tuple[str, ...]]:
    """The inventory with a card for every replica that leaves the choice to the plan, and the reasons in words.

    What cannot be placed goes where most is free, so that the rule `vram` says by how much it does not fit.
    """
    free = {name: pool for name, pool in inventory.pools.items() if any(item.auto for item in pool.on)}
    if not free or not seats:
        return inventory, ()
    bins = _bins(inventory, seats, size)
    pieces = [piece for name in free for piece in _pieces(inventory, name, seats, size)]
    found = place(pieces, bins)
    chosen = found if found is not None else _forced(pieces, bins)
    pools = {name: _with_places(inventory, name, chosen) for name in free}
    return (
        inventory.model_copy(update={"pools": {**inventory.pools, **pools}}),
        tuple(_reasons(pieces, bins, chosen, does_fit=found is not None)),
    )


def _bins(inventory: Inventory, seats: Sequence[Seat], size: Size) -> list[Bin]:
    """Every card with the room that is left beside what the inventory puts on it."""
    kinds = {(seat.host, seat.number): seat.kind for seat in seats}
    taken: Counter[Key] = Counter()
    tenants: dict[Key, set[str]] = defaultdict(set)
    turns: dict[tuple[Key, str], list[int]] = defaultdict(list)
    for name, pool in inventory.pools.items():
        for item in pool.on:
            for number in item.gpus or ():
                key = (item.host or "", number)
                share = size(name, kinds[key]) // item.gpus_per_replica if key in kinds else 0
                tenants[key].add(name)
                if item.shared:
                    turns[key, item.shared].append(share)
                else:
                    taken[key] += share * (item.replicas or 1)
    for (key, server), shares in turns.items():
        taken[key] += worst(shares, inventory.hosts[key[0]].shared[server].loaded)
    return [
        Bin(key, seat.room - taken[key], bool(tenants[key]), frozenset(tenants[key]))
        for seat in seats
        for key in [(seat.host, seat.number)]
    ]


def _pieces(inventory: Inventory, name: str, seats: Sequence[Seat], size: Size) -> list[Piece]:
    pieces: list[Piece] = []
    for item in inventory.pools[name].on:
        if not item.auto:
            continue
        sizes = {(seat.host, seat.number): size(name, seat.kind) for seat in seats if item.host in (None, seat.host)}
        for _ in range(item.replicas or 1):
            pieces.append(Piece(name, len(pieces), sizes))
    return pieces


def _forced(pieces: Sequence[Piece], bins: Sequence[Bin]) -> Placing:
    """A card for every piece even where there is no room: the one with most of it."""
    room = {card.key: card.room for card in bins}
    found: Placing = {}
    for piece in sorted(pieces, key=lambda piece: (-piece.largest, piece.pool, piece.number)):
        best = min(piece.sizes, key=lambda key: (piece.sizes[key] - room[key], key))
        room[best] -= piece.sizes[best]
        found[piece.pool, piece.number] = best
    return found


def _with_places(inventory: Inventory, name: str, chosen: Placing) -> Pool:
    """The pool with places that name their cards."""
    pool = inventory.pools[name]
    count = Counter(key for (owner, _), key in chosen.items() if owner == name)
    places = [
        Placement(host=host, gpus=(number,), replicas=times if times > 1 else None)
        for (host, number), times in sorted(count.items())
    ]
    return pool.model_copy(update={"on": (*(item for item in pool.on if not item.auto), *places)})


def _reasons(pieces: Sequence[Piece], bins: Sequence[Bin], chosen: Placing, *, does_fit: bool) -> list[str]:
    if not does_fit:
        return ["on: auto: no way was found to fit every replica; each went where most was free"]
    cards = {card.key: card for card in bins}
    further = cards_of({key: card for key, card in chosen.items() if not cards[card].is_used})
    replicas, more = _count(len(pieces), "replica"), _count(further, "further card")
    lines = [f"on: auto: {replicas} on the fewest cards ({more}), evenly filled, those of a pool apart"]
    by_card: Mapping[Key, list[Piece]] = defaultdict(list)
    for piece in sorted(pieces, key=lambda piece: (piece.pool, piece.number)):
        by_card[chosen[piece.pool, piece.number]].append(piece)
    for key in sorted(by_card):
        wanted = ", ".join(f"{piece.pool} {piece.sizes[key]}" for piece in by_card[key])
        left = cards[key].room - sum(piece.sizes[key] for piece in by_card[key])
        lines.append(f"  GPU {key[1]} of {key[0]}: {wanted} of {cards[key].room} MiB that were free; {left} stay")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
