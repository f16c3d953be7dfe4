"""The fixed mix of prompts: the same words for everybody, new ones for every request unless the cache is wanted."""

import random

VERSION = 1
"""Figures of different versions are not comparable."""
WORDS = (
    *("river", "lamp", "winter", "engine", "garden", "copper", "letter", "bridge", "window", "harbour", "silent"),
    *("yellow", "morning", "travel", "machine", "paper", "forest", "signal", "kitchen", "music", "planet", "number"),
    *("answer", "question", "market", "shadow", "ladder", "island", "thunder", "pocket"),
)
LENGTHS = {"short": 30, "long": 600}
"""Words of a prompt; about as many tokens."""


def prompt(length: str, chance: random.Random, *, is_shared: bool = False) -> str:
    """A text of that length. Unless it is shared, its first words are like no other's: no cache knows it."""
    chosen = random.Random(VERSION) if is_shared else chance  # noqa: S311 - no secret
    words = chosen.choices(WORDS, k=LENGTHS[length])
    salt = "" if is_shared else f"{chance.getrandbits(48):012x} "
    return f"{salt}Tell a story with these words: {' '.join(words)}."
