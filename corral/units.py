"""Memory, durations and numbers as people write them, how full something is, and things by what they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")
BAR_WIDTH = 10
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


def gib(mib: int) -> str:
    """MiB as GiB with one digit."""
    return f"{mib / 1024:.1f}"


def counted(count: int, noun: str) -> str:
    """`1 host`, `2 hosts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def bar(used: int, room: int) -> str:
    """A bar of fixed width that is full when nothing is left."""
    filled = min(BAR_WIDTH, round(BAR_WIDTH * used / room)) if room > 0 else BAR_WIDTH
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def duration(seconds: float | None) -> str:
    """`12 s`, `5 min`, `3 h 12 min`, `4 d 2 h`; empty for None."""
    if seconds is None:
        return ""
    minutes, hours, days = (int(seconds // unit) for unit in (MINUTE_S, HOUR_S, DAY_S))
    if not hours:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {minutes % 60} min"


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """The values of every key, both in the order in which they came."""
    found: dict[K, list[V]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found
