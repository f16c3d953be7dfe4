"""Reads sources into one draft: the first fitting row of its kind's table settles a value; what is left is told of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

from corral.config.source import parse
from corral.declarations import read_yaml
from corral.errors import KeyPath
from corral.verbs.imports import compose, litellm, others
from corral.verbs.imports.build import build
from corral.verbs.imports.commands import Word, read_command
from corral.verbs.imports.draft import Draft, Entry, Step, settle
from corral.verbs.imports.sources import KINDS, TABLES, Document, Leaf, Told, is_secret

Action = Callable[[Step], None]
# Servers before what leads to them.
ORDER = ("dotenv", "compose", "llama_swap", "modelfile", "litellm")
MODULES = {"litellm": litellm, "compose": compose, "llama_swap": others, "modelfile": others, "dotenv": others}
BEGIN: dict[str, Callable[[Draft, Document], None]] = {
    "dotenv": others.begin_dotenv,
    "compose": compose.begin,
    "llama_swap": others.begin_llama_swap,
    "modelfile": others.begin_modelfile,
    "litellm": litellm.begin,
}
# The parts of a path below which values belong to one entry, by kind.
OWN = {"compose": "services", "llama_swap": "models"}


class Imported(NamedTuple):
    """What became of sources."""

    documents: list[Document]
    data: dict[str, Any]
    draft: Draft


def read(documents: Iterable[Document], *, address: str = "", card: str = "") -> Imported:
    """The inventory of some sources, and a finding for each of their values.

    Args:
        documents: the sources.
        address: of the machine that Compose files, llama-swap and `localhost` are about; from the sources when empty.
        card: kind of its graphics cards, which no source says.
    """
    found = sorted(documents, key=lambda item: ORDER.index(item.kind))
    draft = Draft(address=address, card=card, documents={item.file: item for item in found})
    for document in found:
        if document.kind == "dotenv":
            draft.variables |= {str(leaf.path[0]): leaf.text for leaf in document.leaves}
        else:
            texts = " ".join(leaf.text for leaf in document.leaves)
            draft.named |= set(re.findall(r"(?:\$\{?|os\.environ/|env\.)([A-Za-z_]\w*)", texts))
    for document in found:
        secrets = [leaf for leaf in document.leaves if is_secret(leaf)]
        BEGIN[document.kind](draft, document)
        _settle_all(draft, document)
        for leaf in secrets:
            leaf.tell("look", KINDS["secrets"]["words"])
    data = build(draft)
    for leaf in (leaf for document in found for leaf in document.leaves):
        if all(told.sort == "look" for told in leaf.findings):
            leaf.tell("left", KINDS["outcome"]["none"])
    return Imported(found, data, draft)


def _settle_all(draft: Draft, document: Document) -> None:
    rows = _rows(document.kind)
    for leaf in document.leaves:
        if any(not isinstance(told, Told) or told.sort != "look" for told in leaf.told):
            continue
        entry = _entry(draft, document, leaf)
        place = "\0".join(map(str, leaf.path)) + f"\0={leaf.text}"
        row = next((row for pattern, row in rows if pattern.fullmatch(place)), None)
        if row is None or (entry.engine and entry.engine not in row.get("of", entry.engine).split()):
            leaf.tell("left", KINDS["outcome"]["none"])
            continue
        settle(row, leaf, entry)
        if "cards" in row and entry.engine in compose.RUN:
            entry.values.setdefault("place.cards", [row["cards"]])
            entry.values.setdefault("place.maker", row.get("maker", ""))
            entry.cards_leaf = entry.cards_leaf or leaf
        if "flag" in row:
            read_command(entry, [Word(row["flag"], leaf), Word(leaf.text, leaf)])
        if "do" in row:
            action: Action = getattr(MODULES[document.kind], row["do"])
            action(Step(draft, entry, leaf))


@cache
def _rows(kind: str) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    found = [(pattern, row) for pattern, row in read_yaml(TABLES / f"{kind}.yaml").items() if isinstance(row, dict)]
    return [(_pattern(pattern), row) for pattern, row in found]


def _pattern(text: str) -> re.Pattern[str]:
    path, _, value = text.partition("=")
    parts = [re.escape(part).replace(r"\*", r"[^\0]*") for part in path.removesuffix(".**").split(".")]
    below = r"(\0.*)?" if path.endswith(".**") else ""
    return re.compile("\0".join(parts) + below + "\0=" + (value or ".*"), re.DOTALL)


def _entry(draft: Draft, document: Document, leaf: Leaf) -> Entry:
    """The entry to which a value belongs; the site's for what is of no single one."""
    known = [item for item in draft.entries if item.leaf.file == document.file]
    if document.kind == "modelfile":
        return known[0]
    if document.kind == "litellm" and leaf.path[0] == "model_list" and len(leaf.path) > 1:
        first = document.below("model_list", leaf.path[1])[0]
        return next((item for item in known if item.leaf is first), None) or draft.entry(
            f"model_list[{leaf.path[1]}]", first
        )
    if len(leaf.path) > 1 and leaf.path[0] == OWN.get(document.kind):
        return next((item for item in known if item.name == str(leaf.path[1])), draft.site)
    return draft.site


def lines_to_complete(text: str, complete: dict[KeyPath, str]) -> list[tuple[int, str]]:
    """Lines of an inventory that its user has to complete, each with what to write."""
    marks = parse(text, "").marks
    return sorted((marks[path][0], words) for path, words in complete.items() if path in marks)
