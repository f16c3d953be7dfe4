"""Words for llama-server's command line that people write themselves (`extra_args`): known, gone, or not theirs.

`flags.yaml` has the flags of its own parser, `component.yaml` what earlier ones had and what the kit sets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from corral.components.serving import LEAVE, Trouble, own_words
from corral.declarations import read_yaml
from corral.errors import did_you_mean, shown

TABLE = Path(__file__).with_suffix(".yaml")
ALL = "corral/components/llama/flags.yaml has all that it knows"
FORK = "a flag of a fork, such as ik_llama.cpp, needs the fork's image (engine.image)"
SET, GONE, IDLE, BARRED, ENDS, NOT_ENOUGH = (
    own_words("llama")[key] for key in ("set", "gone", "idle", "barred", "ends", "not_enough")
)


class Flag(NamedTuple):
    """One flag: all its names, and how many words follow it."""

    names: tuple[str, ...]
    values: int


@cache
def known_flags() -> Mapping[str, Flag]:
    """The flags of the pinned llama-server, by every name."""
    data = read_yaml(TABLE)
    titles = ("switches", "values", "pairs")
    found = [Flag(tuple(names.split()), count) for count, title in enumerate(titles) for names in data[title]]
    return {name: flag for flag in found for name in flag.names}


@cache
def remedies() -> Mapping[str, tuple[str, str]]:
    """By name, what is wrong with a flag that is not to be given, and the remedy."""
    groups: tuple[tuple[str, Mapping[str, str]], ...] = (
        ("is set by the kit", SET),
        ("prints something and ends the server", dict.fromkeys(ENDS, LEAVE)),
        ("is read by llama-server and ignored", IDLE),
        ("cuts the server off from the rest of the farm", BARRED),
        ("was removed from llama-server", {**read_yaml(TABLE)["removed"], **GONE}),
    )
    known = known_flags()
    return {
        other: (message, hint)
        for message, hints in groups
        for names, hint in hints.items()
        for name in names.split()
        for other in (known[name].names if name in known else (name,))
    }


def troubles(words: Sequence[str], *, rendered: Collection[str] = (), is_pinned: bool = True) -> Iterator[Trouble]:
    """What is wrong with further words for llama-server.

    Args:
        words: what stands in `extra_args`.
        rendered: the command line that they are added to.
        is_pinned: whether it is the pinned build; of another one only what the kit sets itself is known.
    """
    at = 0
    while at < len(words):
        name = _name(words[at])
        flag = known_flags().get(name)
        values = list(words[at + 1 : at + 1 + flag.values]) if flag else []
        message, hint = _judged(name, words[at], values)
        if flag and not message and not set(flag.names).isdisjoint(rendered):
            message, hint = f"{name} is set by the kit", "remove it, or the key that sets it"
        if message and (is_pinned or flag):
            yield Trouble(at, message, hint)
        if flag is None:
            values = list(takewhile(_is_value, words[at + 1 :]))
        elif len(values) < flag.values and not message:
            yield Trouble(at, f"{name} lacks its value", "write it as the next word of the list")
        at += 1 + len(values)


def settings(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Words of a command line as the keys and values of a preset file: a switch is `on`, also one that begins with no-.

    Of a flag that the pinned build does not know, the next word is the value unless it looks like a flag.
    """
    for name, values in _in_pieces(words):
        yield name.lstrip("-"), " ".join(values) if values else "on"


def preset_troubles(words: Sequence[str]) -> Iterator[str]:
    """What of further words a preset file cannot say."""
    seen: set[tuple[str, ...]] = set()
    for name, values in _in_pieces(words):
        flag = known_flags().get(name)
        names = flag.names if flag else (name,)
        if len(values) > 1:
            yield f"{name} has {len(values)} values"
        elif ";" in "".join(values) or "#" in "".join(values):
            yield f"the value of {name} has a sign in it with which comments begin"
        elif names in seen:
            yield f"{name} is here twice"
        seen.add(names)


def _in_pieces(words: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Every flag and the words that follow it."""
    at = 0
    while at < len(words):
        name = _name(words[at])
        flag = known_flags().get(name)
        count = flag.values if flag else int(at + 1 < len(words) and _is_value(words[at + 1]))
        yield name, words[at + 1 : at + 1 + count]
        at += 1 + count


def _is_value(word: str) -> bool:
    return not re.match(r"-+[A-Za-z]", word)


def _name(word: str) -> str:
    """A flag as llama-server reads it: underscores in long ones are dashes."""
    return word.replace("_", "-") if word.startswith("--") else word


def _judged(name: str, word: str, values: Sequence[str]) -> tuple[str, str]:
    """What is wrong with a word where a flag is due, and the remedy; empty when nothing is."""
    known = known_flags()
    partly = NOT_ENOUGH.get(known[name].names[-1] if name in known else "")
    if partly and not set(",".join(values).split(",")).isdisjoint(partly["values"]):
        return f"{name} {values[0]} is not enough", partly["remedy"]
    if name in remedies():
        message, hint = remedies()[name]
        return f"{name} {message}", hint
    if name in known:
        return "", ""
    if not word.startswith("-"):
        return f"{shown(word)} stands where llama-server wants a flag", "write a flag before it, or remove it"
    flag = word.replace("=", " ").split()[0]
    if flag != word and _name(flag) in {**known, **remedies()}:
        return f"{shown(word)} is one word", f"write {flag} and its value as two words of the list"
    near = did_you_mean(name, known) if name.startswith("--") else ""  # short ones are alike by chance
    return f"llama-server has no flag {shown(word)}", near if near.startswith("did") else f"{LEAVE}; {FORK}; {ALL}"
