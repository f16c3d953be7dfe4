"""`on: auto`: the plan chooses the cards of a pool's replicas, and says why.

The fewest cards, evenly filled, never too full. Pure, and the same for the same input. A replica goes onto one card,
or over the fewest cards of a host when none could hold it. Replicas of one pool go onto different cards while there
are enough, since two on one card only share it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from corral.config.inventory import Inventory, Placement, Pool
from corral.plan.sizes import worst
from corral.units import counted

# Host and GPU number of a card.
Key = tuple[str, int]
# MiB that one replica of a pool takes on so many cards of a kind, together.
Size = Callable[[str, str, int], int]


@dataclass(frozen=True, slots=True)
class Room:
    """A card: how many MiB can be used on it, besides what is on it already."""

    key: Key
    room: int
    # Whether something is on it already, so that it is no further card.
    is_used: bool = False
    # Pools that are on it already.
    pools: frozenset[str] = frozenset()
    kind: str = ""
    vendor: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """One replica: its pool, its number in the pool, and what it takes on each card where it may go."""

    pool: str
    number: int
    sizes: dict[Key, int]

    @property
    def order(self) -> tuple[int, str, int]:
        """Its place in the row: what takes most anywhere comes first."""
        return -max(self.sizes.values(), default=0), self.pool, self.number


# Card of every replica, by pool and number.
Placing = dict[tuple[str, int], Key]
# Cards of every replica that is split.
Splitting = dict[tuple[str, int], tuple[Key, ...]]
# How to choose among cards, by their place in the row and what is left on each afterwards: the least comes first.
WAYS: dict[str, Callable[[tuple[int, int]], tuple[int, int]]] = {
    "emptiest": lambda item: (-item[1], item[0]),  # evenly filled
    "fullest": lambda item: (item[1], item[0]),  # tightly packed
    "first": lambda item: item,
}
NO_WAY = "on: auto: no way was found to fit every replica; each went where most was free"


def placed(inventory: Inventory, empty: Sequence[Room], size: Size) -> tuple[Inventory, tuple[str, ...]]:
    """The inventory with a card for every replica that leaves the choice to the plan, and the reasons in words.

    What cannot be placed goes where most is free, so that the rule `vram` says by how much it does not fit.
    """
    free = {name: pool for name, pool in inventory.pools.items() if any(item.auto for item in pool.on)}
    if not free or not empty:
        return inventory, ()
    cards = _beside_others(inventory, empty, size)
    wanted = [need for name, pool in free.items() for need in _needs(name, pool, cards, size)]
    splits, cards, shares = _split(wanted, cards, size)
    needs = [need for need in wanted if (need.pool, need.number) not in splits]
    found = place(needs, cards)
    chosen = found if found is not None else _forced(needs, cards)
    pools = {name: _with_places(inventory, name, chosen, splits) for name in free}
    reasons = (_reasons(needs, cards, chosen) if needs else []) if found is not None else [NO_WAY]
    return inventory.model_copy(update={"pools": {**inventory.pools, **pools}}), (*shares, *reasons)


def _split(wanted: Sequence[Need], cards: list[Room], size: Size) -> tuple[Splitting, list[Room], list[str]]:
    """Cards for replicas that no card could hold, the fewest of a host; what is left on every card; and the reasons."""
    splits: Splitting = {}
    words: list[str] = []
    for need in sorted(wanted, key=lambda need: need.order):
        if not need.sizes or any(need.sizes[card.key] <= card.room for card in cards if card.key in need.sizes):
            continue
        group = next(_groups_for(need, cards, size), ())
        if not group:
            continue
        splits[need.pool, need.number] = tuple(card.key for card in group)
        total, room = size(need.pool, group[0].kind, len(group)), sum(card.room for card in group)
        taken = {card.key: -(-total * card.room // room) for card in group}
        cards = [
            replace(card, room=card.room - taken[card.key], is_used=True, pools=card.pools | {need.pool})
            if card.key in taken
            else card
            for card in cards
        ]
        numbers = ", ".join(str(number) for _, number in taken)
        words.append(f"on: auto: {need.pool} takes {total} MiB, more than a card has: split over GPU {numbers}")
    return splits, cards, words


def _groups_for(need: Need, cards: Sequence[Room], size: Size) -> Iterator[tuple[Room, ...]]:
    """Cards of one host and maker that hold a replica together, the fewest and emptiest first."""
    free = sorted((card for card in cards if card.key in need.sizes), key=lambda card: (-card.room, card.key))
    places = sorted({(card.key[0], card.vendor) for card in free})
    for count in range(2, len(free) + 1):
        for place in places:
            group = [card for card in free if (card.key[0], card.vendor) == place][:count]
            if len(group) == count and size(need.pool, group[0].kind, count) <= sum(card.room for card in group):
                yield tuple(sorted(group, key=lambda card: card.key))


def _beside_others(inventory: Inventory, empty: Sequence[Room], size: Size) -> list[Room]:
    """Every card with the room that is left beside what the inventory puts on it."""
    kinds = {card.key: card.kind for card in empty}
    taken: Counter[Key] = Counter()
    tenants: dict[Key, set[str]] = defaultdict(set)
    turns: dict[tuple[Key, str], list[int]] = defaultdict(list)
    for name, pool in inventory.pools.items():
        for item in pool.on:
            for key in ((item.host or "", number) for number in item.gpus or ()):
                count = item.gpus_per_replica
                share = size(name, kinds[key], count) // count if key in kinds else 0
                tenants[key].add(name)
                if item.shared:
                    turns[key, item.shared].append(share)
                else:
                    taken[key] += share * (item.replicas or 1)
    for (key, server), shares in turns.items():
        taken[key] += worst(shares, inventory.hosts[key[0]].shared[server].loaded)
    return [
        replace(card, room=card.room - taken[card.key], is_used=card.key in tenants, pools=frozenset(tenants[card.key]))
        for card in empty
    ]


def _needs(name: str, pool: Pool, cards: Sequence[Room], size: Size) -> list[Need]:
    wanted = [item for item in pool.on if item.auto for _ in range(item.replicas or 1)]
    return [
        Need(name, number, {card.key: size(name, card.kind, 1) for card in cards if item.host in (None, card.key[0])})
        for number, item in enumerate(wanted)
    ]


def _forced(needs: Sequence[Need], cards: Sequence[Room]) -> Placing:
    """A card for every replica even where there is no room: the one with most of it."""
    room = {card.key: card.room for card in cards}
    found: Placing = {}
    for need in sorted(needs, key=lambda need: need.order):
        best = min(need.sizes, key=lambda key: (need.sizes[key] - room[key], key))
        room[best] -= need.sizes[best]
        found[need.pool, need.number] = best
    return found


def _with_places(inventory: Inventory, name: str, chosen: Placing, splits: Splitting) -> Pool:
    """The pool with places that name their cards."""
    pool = inventory.pools[name]
    count = Counter(key for (owner, _), key in chosen.items() if owner == name)
    places = [
        Placement(host=host, gpus=(number,), replicas=times if times > 1 else None)
        for (host, number), times in sorted(count.items())
    ]
    groups = sorted(group for (owner, _), group in splits.items() if owner == name)
    places += [
        Placement(host=group[0][0], gpus=tuple(number for _, number in group), gpus_per_replica=len(group))
        for group in groups
    ]
    return pool.model_copy(update={"on": (*(item for item in pool.on if not item.auto), *places)})


def _reasons(needs: Sequence[Need], cards: Sequence[Room], chosen: Placing) -> list[str]:
    further = set(chosen.values()) - {card.key for card in cards if card.is_used}
    replicas, more = counted(len(needs), "replica"), counted(len(further), "further card")
    lines = [f"on: auto: {replicas} on the fewest cards ({more}), evenly filled, those of a pool apart"]
    for card in sorted(cards, key=lambda card: card.key):
        mine = sorted((need for need in needs if chosen[need.pool, need.number] == card.key), key=lambda it: it.pool)
        if mine:
            wanted = ", ".join(f"{need.pool} {need.sizes[card.key]}" for need in mine)
            left = card.room - sum(need.sizes[card.key] for need in mine)
            place = f"GPU {card.key[1]} of {card.key[0]}"
            lines.append(f"  {place}: {wanted} of {card.room} MiB that were free; {left} stay")
    return lines


# --- the choice ------------------------------------------------------------------------------------------------------


def place(needs: Iterable[Need], rooms: Iterable[Room]) -> Placing | None:
    """The card of every need; None when no way was found to fit all of them.

    Never more cards than first-fit decreasing would take; of what is left the choice with the fewest replicas that
    share a card with one of their own pool, then with the fewest cards, then with the evenest filling.
    """
    ordered = sorted(needs, key=lambda need: need.order)
    cards = sorted(rooms, key=lambda card: (not card.is_used, -card.room, card.key))
    textbook = _packed(ordered, cards, "first")
    limit = len(cards) if textbook is None else _cards(textbook, cards)
    found = [] if textbook is None else [textbook]
    for count in _counts(ordered, cards):
        ways = [_packed(ordered, cards[:count], way) for way in WAYS]
        found += [way for way in ways if way is not None and _cards(way, cards) <= limit]
    return min(found, key=lambda way: _price(way, ordered, cards), default=None)


def _counts(needs: Sequence[Need], cards: Sequence[Room]) -> list[int]:
    """With how many cards to try: the fewest into which all fits, and enough to keep a pool's replicas apart."""
    counts = range(max(1, sum(card.is_used for card in cards)), len(cards) + 1)
    fits = (n for n in counts if any(_packed(needs, cards[:n], way) for way in ("emptiest", "fullest")))
    fewest = next(fits, len(cards))
    replicas = max(Counter(need.pool for need in needs).values(), default=0)
    return sorted({fewest, min(len(cards), max(fewest, replicas)), len(cards)})


def _cards(found: Placing, cards: Sequence[Room]) -> int:
    """Cards in use, those counted that are used anyway."""
    return len(set(found.values()) | {card.key for card in cards if card.is_used})


def _price(found: Placing, needs: Sequence[Need], cards: Sequence[Room]) -> tuple[int, int, float, list[Key]]:
    """What makes one choice worse than another, the worst first."""
    loads: Counter[Key] = Counter()
    for need in needs:
        loads[found[need.pool, need.number]] += need.sizes[found[need.pool, need.number]]
    rooms = {card.key: max(1, card.room) for card in cards}
    fullest = max((load / rooms[key] for key, load in loads.items()), default=0.0)
    apart = {(pool, key) for (pool, _), key in found.items()}
    return len(found) - len(apart), _cards(found, cards), fullest, [found[key] for key in sorted(found)]


def _packed(needs: Sequence[Need], cards: Sequence[Room], way: str) -> Placing | None:
    """Every need onto one of these cards, each in its turn; None when one finds no room."""
    room = [card.room for card in cards]
    pools = [set(card.pools) for card in cards]
    found: Placing = {}
    for need in needs:
        fitting = [
            (index, room[index] - need.sizes[card.key])
            for index, card in enumerate(cards)
            if card.key in need.sizes and need.sizes[card.key] <= room[index]
        ]
        apart = [item for item in fitting if need.pool not in pools[item[0]]]
        if not fitting:
            return None
        chosen, _ = min(apart or fitting, key=WAYS[way])
        room[chosen] -= need.sizes[cards[chosen].key]
        pools[chosen].add(need.pool)
        found[need.pool, need.number] = cards[chosen].key
    return found
