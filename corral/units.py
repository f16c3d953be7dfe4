"""Memory as people write it, and how full something is."""

from __future__ import annotations

BAR_WIDTH = 10


def gib(mib: int) -> str:
    """MiB as GiB with one digit."""
    return f"{mib / 1024:.1f}"


def bar(used: int, room: int) -> str:
    """A bar of fixed width that is full when nothing is left."""
    filled = min(BAR_WIDTH, round(BAR_WIDTH * used / room)) if room > 0 else BAR_WIDTH
    return "█" * filled + "░" * (BAR_WIDTH - filled)
