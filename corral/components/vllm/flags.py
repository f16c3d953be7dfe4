"""Words for vLLM's command line that people write themselves (`extra_args`): known, and not the kit's own to say.

`flags.yaml` has the flags of its own parser, `component.yaml` those that the kit sets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from corral.components.serving import LEAVE, Trouble, own_words
from corral.declarations import read_yaml
from corral.errors import did_you_mean, shown

TABLE = Path(__file__).with_suffix(".yaml")
ALL = "corral/components/vllm/flags.yaml has all that it knows"
SET = own_words("vllm")["set"]


@cache
def table() -> Mapping[str, tuple[str, ...]]:
    """All names of a flag of the pinned vLLM, by every one of them."""
    data = read_yaml(TABLE)
    flags = [tuple(names.split()) for title in ("switches", "values", "lists") for names in data[title]]
    return {name: names for names in flags for name in names}


@cache
def _set() -> Mapping[str, str]:
    known = table()
    return {other: hint for names, hint in SET.items() for name in names.split() for other in known[name]}


def flag_of(word: str) -> str:
    """The flag that a word begins with, empty for a value: of `--a_b=c` and of `--a-b.c` it is `--a-b`."""
    if not word.startswith("-") or word[1:2].isdecimal():
        return ""
    name = word.partition("=")[0].partition(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def troubles(words: Sequence[str], *, rendered: Collection[str] = (), is_pinned: bool = True) -> Iterator[Trouble]:
    """What is wrong with further words for `vllm serve`.

    Args:
        words: what stands in `extra_args`.
        rendered: the command line that they are added to.
        is_pinned: whether it is the pinned version; of another one only what the kit sets itself is known.
    """
    known = table()
    for number, name in enumerate(map(flag_of, words)):
        if not name and number == 0:
            yield Trouble(number, f"{shown(words[0])} stands where vLLM wants a flag", "write a flag before it")
        elif name in _set():
            yield Trouble(number, f"{name} is set by the kit", _set()[name])
        elif name and not set(known.get(name, ())).isdisjoint(rendered):
            yield Trouble(number, f"{name} is set by the kit", "remove it, or the key that sets it")
        elif name and name not in known and is_pinned:
            near = did_you_mean(name, known)
            hint = near if near.startswith("did") else f"{LEAVE}; {ALL}"
            yield Trouble(number, f"vLLM has no flag {shown(name)}", hint)
