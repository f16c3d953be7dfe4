"""Cards for replicas that leave the choice to the plan (`on: auto`): the fewest cards, evenly filled, never too full.

Pure, and the same for the same input. Every replica goes onto one card. Replicas of one pool go onto different cards
while there are enough, since two on one card only share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Host and GPU number of a card.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Bin:
    """A card: how much room it has besides what is on it already."""

    key: Key
    room: int
    # Whether something is on it already, so that it is no further card.
    is_used: bool = False
    # Pools that are on it already.
    pools: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Piece:
    """One replica: its pool, its number in the pool, and what it takes on each card where it may go."""

    pool: str
    number: int
    sizes: Mapping[Key, int] = field(hash=False)

    @property
    def largest(self) -> int:
        """The most that it takes anywhere."""
        return max(self.sizes.values(), default=0)


# Card of every replica, by pool and number.
Placing = dict[tuple[str, int], Key]
_Choice = Callable[[list[tuple[int, int]]], int]


def place(pieces: Iterable[Piece], bins: Iterable[Bin]) -> Placing | None:
    """The card of every piece; None when no way was found to fit all of them.

    Never more cards than first-fit decreasing would take; of what is left the choice with the fewest replicas that
    share a card with one of their own pool, then with the fewest cards, then with the evenest filling.
    """
    ordered = sorted(pieces, key=lambda piece: (-piece.largest, piece.pool, piece.number))
    cards = sorted(bins, key=lambda card: (not card.is_used, -card.room, card.key))
    textbook = _packed(ordered, cards, _first)
    limit = len(cards) if textbook is None else _cards(textbook, cards)
    found = [] if textbook is None else [textbook]
    for count in _counts(ordered, cards):
        ways = [_packed(ordered, cards[:count], choose) for choose in (_emptiest, _fullest, _first)]
        found += [way for way in ways if way is not None and _cards(way, cards) <= limit]
    return min(found, key=lambda way: _price(way, ordered, cards), default=None)


def _counts(pieces: Sequence[Piece], cards: Sequence[Bin]) -> list[int]:
    """With how many cards to try: the fewest into which all fits, and enough to keep a pool's replicas apart."""
    least = max(1, sum(card.is_used for card in cards))
    ways = range(least, len(cards) + 1)
    fewest = next(
        (n for n in ways if any(_packed(pieces, cards[:n], way) for way in (_emptiest, _fullest))), len(cards)
    )
    replicas = max(Counter(piece.pool for piece in pieces).values(), default=0)
    return sorted({fewest, min(len(cards), max(fewest, replicas)), len(cards)})


def _cards(found: Placing, cards: Sequence[Bin]) -> int:
    """Cards in use, those counted that are used anyway."""
    return len(set(found.values()) | {card.key for card in cards if card.is_used})


def _price(found: Placing, pieces: Sequence[Piece], cards: Sequence[Bin]) -> tuple[int, int, float, list[Key]]:
    """What makes one choice worse than another, the worst first."""
    loads: Counter[Key] = Counter()
    for piece in pieces:
        loads[found[piece.pool, piece.number]] += piece.sizes[found[piece.pool, piece.number]]
    rooms = {card.key: max(1, card.room) for card in cards}
    fullest = max((load / rooms[key] for key, load in loads.items()), default=0.0)
    apart = {(pool, key) for (pool, _), key in found.items()}
    return len(found) - len(apart), _cards(found, cards), fullest, [found[key] for key in sorted(found)]


def _packed(pieces: Sequence[Piece], cards: Sequence[Bin], choose: _Choice) -> Placing | None:
    """Every piece onto one of these cards, each in its turn; None when one finds no room."""
    room = [card.room for card in cards]
    pools = [set(card.pools) for card in cards]
    found: Placing = {}
    for piece in pieces:
        fitting = [
            (index, room[index] - piece.sizes[card.key])
            for index, card in enumerate(cards)
            if card.key in piece.sizes and piece.sizes[card.key] <= room[index]
        ]
        apart = [item for item in fitting if piece.pool not in pools[item[0]]]
        if not fitting:
            return None
        chosen = choose(apart or fitting)
        room[chosen] -= piece.sizes[cards[chosen].key]
        pools[chosen].add(piece.pool)
        found[piece.pool, piece.number] = cards[chosen].key
    return found


def _emptiest(fitting: list[tuple[int, int]]) -> int:
    """The card with the most room afterwards: evenly filled."""
    return max(fitting, key=lambda item: (item[1], -item[0]))[0]


def _fullest(fitting: list[tuple[int, int]]) -> int:
    """The card with the least room afterwards: tightly packed."""
    return min(fitting, key=lambda item: (item[1], item[0]))[0]


def _first(fitting: list[tuple[int, int]]) -> int:
    return fitting[0][0]


def cards_of(placing: Mapping[tuple[str, int], Hashable]) -> int:
    """How many cards a placing takes."""
    return len(set(placing.values()))
