"""Words for servers' command lines that people write themselves (`extra_args`): what all servers' readers share."""

from __future__ import annotations

from typing import Any, NamedTuple

from corral.declarations import declaration

LEAVE = "leave it out"


class Trouble(NamedTuple):
    """What is wrong with one word, and what to do."""

    number: int
    message: str
    hint: str


def own_words(component: str) -> dict[str, Any]:
    """What the kit says to a component's server itself, and what became of flags: `flags` in its component.yaml."""
    return dict(declaration(component)["flags"])
