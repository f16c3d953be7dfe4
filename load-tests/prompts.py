"""The fixed mix of prompts: the same word list for every user, a different text for every request."""

import random

# Figures of different versions are not comparable.
VERSION = 1
WORDS = (
    *("river", "lamp", "winter", "engine", "garden", "copper", "letter", "bridge", "window", "harbour", "silent"),
    *("yellow", "morning", "travel", "machine", "paper", "forest", "signal", "kitchen", "music", "planet", "number"),
    *("answer", "question", "market", "shadow", "ladder", "island", "thunder", "pocket"),
)
# Words of a prompt; about as many tokens.
LENGTHS = {"short": 30, "long": 600}


def prompt(length: str, chance: random.Random) -> str:
    """A text of that length with a unique first word, so that no cache contains it."""
    words = chance.choices(WORDS, k=LENGTHS[length])
    return f"{chance.getrandbits(48):012x} Tell a story with these words: {' '.join(words)}."
