"""Words for llama-server's command line that people write themselves (`extra_args`): known, gone, or not theirs.

`llama_flags.yaml` has the flags of its own parser. Here stands what earlier ones had and what the kit sets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import yaml

from corral.errors import did_you_mean, shown

TABLE = Path(__file__).with_suffix(".yaml")
LEAVE = "leave it out"
ALL = "corral/components/llama/flags.yaml has all that it knows"

# Flags of earlier builds that this one refuses, mostly without a word about successors (xllamacpp 0.2.9 to 2026.4).
GONE = {
    "--mlock": "write mlock: true in engine, which lets the container lock memory, too",
    "--mmap": f"{LEAVE}: llama-server maps files by itself",
    "--no-mmap": "write --load-mode and none as two words",
    "-dio --direct-io": "write --load-mode and dio as two words",
    "-ndio --no-direct-io": f"{LEAVE}: --load-mode says how files are read",
    "-cd --ctx-size-draft": f"{LEAVE}: a draft model has the context of its model",
    "--spec-replace": f"{LEAVE}, and take a draft model with the same vocabulary",
    "-cpent --checkpoint-every-n-tokens": "use --checkpoint-min-step",
    "--clear-idle": "use --cache-idle-slots",
    "--no-clear-idle": "use --no-cache-idle-slots",
    "-hfv -hfrv --hf-repo-v -hffv --hf-file-v -mv --model-vocoder --tts-use-guide-tokens": f"{LEAVE}: it cannot speak",
    "--draft --draft-n --draft-max": "write draft: with tokens_max of the model, or use --spec-ngram-mod-n-max",
    "--draft-min --draft-n-min": "write draft: with tokens_min of the model, or use --spec-ngram-mod-n-min",
    "--verbose-prompt": "use --verbose",
    "--license": LEAVE,
}
# Flags that are read and do nothing.
IDLE = {"--defrag-thold": f"{LEAVE}: it does nothing any more"}
# Flags after which it prints something and ends.
ENDS = ("--help", "--version", "--cache-list", "--completion-bash", "--list-devices")
# What the kit says itself, by any of its names, and the key that decides it.
SET = {
    "--model": "write source: of the model",
    "--model-url --hf-repo --hf-file --docker-repo --hf-token": "write source: of the model; `models pull` fetches it",
    "--mmproj --mmproj-url --mmproj-auto": "write projector: of the model",
    "--alias": "write aliases: of the pool",
    "--host": "write address: of the host",
    "--port": "write ports: of the pool",
    "--api-key --api-key-file": f"{LEAVE}: `secrets init` makes LLAMA_API_KEY",
    "--ctx-size": "write context: of the model, for one slot",
    "--parallel": "write slots: in engine",
    "--batch-size": "write batch: in engine",
    "--ubatch-size": "write ubatch: in engine",
    "--flash-attn": "write flash_attention: in engine",
    "--cache-type-k --cache-type-v": "write cache_type: in engine",
    "--cache-ram": "write cache_ram_mib: in engine",
    "--cache-reuse": "write cache_reuse: in engine",
    "--cache-prompt": "write cache: of the pool",
    "--n-gpu-layers": "write gpu_layers: in engine",
    "--split-mode": "write split_mode: in engine",
    "--threads": "write threads: in engine",
    "--sleep-idle-seconds": "write sleep_idle_s: in engine",
    "--jinja": "write jinja: in engine",
    "--pooling": "write pooling: in engine",
    "--embedding": "write kind: embedding for the model",
    "--rerank": "write kind: rerank for the model",
    "--reasoning --reasoning-format": "write thinking: of the pool",
    "--spec-draft-model --spec-draft-hf": "write draft: of the model",
    "--spec-draft-n-max": "write tokens_max: in draft: of the model",
    "--spec-draft-n-min": "write tokens_min: in draft: of the model",
    "--spec-draft-p-min": "write probability_min: in draft: of the model",
    "--spec-draft-ngl": "write gpu_layers: in draft: of the model",
    "--spec-draft-type-k --spec-draft-type-v": "write cache_type: in engine, which holds for the draft, too",
    "--lora --lora-scaled --lora-init-without-apply": "write adapters: of the model",
    "--fit --fit-target --fit-ctx": f"{LEAVE}: the plan says what fits, and llama-server takes what it is told",
    "--offline --metrics": f"{LEAVE}: it is always on",
    "--models-dir --models-preset --models-max --models-autoload": "write shared: of the host, and in on: of its pools",
}
# Flags of which the kit sets some values, and the key for these.
NOT_ENOUGH = {
    "--load-mode": (("mlock", "mmap+mlock"), GONE["--mlock"]),
    "--spec-type": (("draft-simple",), "write draft: of the model"),
}


class Trouble(NamedTuple):
    """What is wrong with one word, and what to do."""

    number: int
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: all its names, and how many words follow it."""

    names: tuple[str, ...]
    values: int


@dataclass(frozen=True, slots=True)
class Table:
    """llama-server's flags by every name, and remedies for what is not one, or not to be given."""

    flags: Mapping[str, Flag]
    # By name: what is wrong with it, and the remedy.
    remedies: Mapping[str, tuple[str, str]]


@cache
def table() -> Table:
    """The flags of the pinned llama-server."""
    data = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    found = [
        Flag(tuple(names.split()), count)
        for title, count in (("switches", 0), ("values", 1), ("pairs", 2))
        for names in data[title]
    ]
    flags = {name: flag for flag in found for name in flag.names}
    remedies: dict[str, tuple[str, str]] = {}
    for names, hint in SET.items():
        remedies |= dict.fromkeys(_all_names(flags, names), ("is set by the kit", hint))
    remedies |= dict.fromkeys(_all_names(flags, " ".join(ENDS)), ("prints something and ends the server", LEAVE))
    for names, hint in IDLE.items():
        remedies |= dict.fromkeys(_all_names(flags, names), ("is read by llama-server and ignored", hint))
    for names, hint in {**data["removed"], **GONE}.items():
        remedies |= dict.fromkeys(names.split(), ("was removed from llama-server", hint))
    return Table(flags, remedies)


def _all_names(flags: Mapping[str, Flag], names: str) -> list[str]:
    return [other for name in names.split() for other in flags[name].names]


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
        flag = table().flags.get(name)
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
        flag = table().flags.get(name)
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
        flag = table().flags.get(name)
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
    known = table()
    first = known.flags[name].names[-1] if name in known.flags else ""
    ours, hint = NOT_ENOUGH.get(first, ((), ""))
    if not set(",".join(values).split(",")).isdisjoint(ours):
        return f"{name} {values[0]} is not enough", hint
    if name in known.remedies:
        message, hint = known.remedies[name]
        return f"{name} {message}", hint
    if name in known.flags:
        return "", ""
    if not word.startswith("-"):
        return f"{shown(word)} stands where llama-server wants a flag", "write a flag before it, or remove it"
    flag = word.replace("=", " ").split()[0]
    if flag != word and _name(flag) in {**known.flags, **known.remedies}:
        return f"{shown(word)} is one word", f"write {flag} and its value as two words of the list"
    near = did_you_mean(name, known.flags)
    return f"llama-server has no flag {shown(word)}", near if near.startswith("did") else f"{LEAVE}; {ALL}"
