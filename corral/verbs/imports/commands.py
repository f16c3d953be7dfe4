"""Command lines of llama-server and vLLM, flag by flag, by the tables of the flags that the kit's builds know."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from corral.components.llama import flags as llama
from corral.components.vllm import flags as vllm
from corral.declarations import read_yaml
from corral.verbs.imports.draft import Entry, settle
from corral.verbs.imports.sources import KINDS, NO_SECRET, SECRET_VALUE, TABLES, Leaf

ENGINES = {"llama": llama, "vllm": vllm}
_FLAG = re.compile(r"-+[A-Za-z]")


class Word(NamedTuple):
    """A word of a command line, and the value in which it stands."""

    text: str
    leaf: Leaf


@cache
def _rows(engine: str) -> dict[str, dict[str, Any]]:
    """By every name of a flag, what becomes of it."""
    alike = {name: flag.names for name, flag in llama.known_flags().items()} if engine == "llama" else vllm.table()
    rows = read_yaml(TABLES / f"{engine}.yaml")["flags"]
    return {
        other: row
        for names, row in rows.items()
        for name in names.split()
        for other in {*(() if "own" in row else alike.get(name, ())), name}
    }


def words_of(leaves: Sequence[Leaf]) -> list[Word]:
    """The words of a command, which is one text or a list of texts."""
    if len(leaves) == 1 and not isinstance(leaves[0].path[-1], int):
        text = re.sub(r"\\\n", " ", re.sub(r"(?m)(^|\s)#.*$", "", leaves[0].text))
        return [Word(word, leaves[0]) for word in split(text)]
    return [Word(word, leaf) for leaf in leaves for word in _split(leaf.text)]


def split(text: str) -> list[str]:
    """The words of a text as a shell has them; by spaces alone where quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _split(text: str) -> list[str]:
    """An item of a list: one word, or a whole script after `sh -c`."""
    return split(text) if re.search(r"(llama-server|vllm|ollama)\s", text) else [text]


def read_command(entry: Entry, words: Sequence[Word]) -> None:
    """Takes over every flag of a server's command line, and tells what becomes of it."""
    start = next((n + 1 for n, word in enumerate(words) if re.search(KINDS["program"][entry.engine], word.text)), 0)
    for word in words[:start]:
        word.leaf.tell("kit", f"{word.text}: the kit starts the program")
    for flag, values in pieces(words[start:]):
        _read(entry, flag, values)


def pieces(words: Sequence[Word]) -> Iterator[tuple[Word, list[Word]]]:
    """Every flag with its values; a word where a flag is due is one by itself."""
    at = 0
    while at < len(words):
        flag, sign, value = words[at].text.partition("=")
        if sign and flag.startswith("--"):
            yield words[at]._replace(text=flag), [words[at]._replace(text=value)]
            at += 1
            continue
        end = at + 1
        while end < len(words) and not _FLAG.match(words[end].text) and _FLAG.match(words[at].text):
            end += 1
        yield words[at], list(words[at + 1 : end])
        at = end


def _read(entry: Entry, flag: Word, values: list[Word]) -> None:
    is_flag = bool(_FLAG.match(flag.text))
    name = flag.text.replace("_", "-") if flag.text.startswith("--") else flag.text
    row = _rows(entry.engine).get(name if is_flag else "word")
    said = [word.text for word in values]
    leaves = list(dict.fromkeys(word.leaf for word in (flag, *values)))
    is_secret = any(SECRET_VALUE.search(word) for word in (name, *said)) or bool(row and row.get("secret"))
    if is_secret and said and not NO_SECRET.fullmatch(said[0]):
        for leaf in leaves:
            leaf.tell("look", KINDS["secrets"]["words"])
    if is_secret and row is None:
        flag.leaf.tell("left", f"{name if is_flag else 'word'}: its value looks like a secret")
        return
    for leaf in leaves:
        _judge(entry, name, said, row, leaf)
        if row is not None:
            settle(
                row, leaf, entry, text=" ".join(said) if is_flag else flag.text, label=flag.text if is_flag else "word"
            )
    is_told = any(item.sort != "look" for item in flag.leaf.findings if item.words.startswith(f"{name}:"))
    if row is None and not is_told:
        further = [*entry.get("engine.extra_args", []), name, *said]
        for leaf in leaves:
            entry.put("engine.extra_args", further, leaf, flag.text)


def _judge(entry: Entry, name: str, said: list[str], row: dict[str, Any] | None, leaf: Leaf) -> None:
    """Tells of flags that the pinned build does not have, or reads and ignores."""
    if not _FLAG.match(name):
        return
    found = next(ENGINES[entry.engine].troubles([name, *said]), None)
    if found is None:
        return
    message = found.message.removeprefix(f"{name} ")
    if "is set by the kit" in message:
        if row is None:
            leaf.tell("left", f"{name}: {message}; {found.hint}")
    elif "lacks its value" not in message or row is None:
        leaf.tell(
            "never" if re.search("removed|ignored|has no flag", message) else "left", f"{name}: {message}; {found.hint}"
        )
