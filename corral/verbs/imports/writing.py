"""The report on sources as lines, and the inventory as commented YAML."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from corral.errors import KeyPath, dotted, on_one_line
from corral.units import counted
from corral.verbs.imports.reader import Imported
from corral.verbs.imports.sources import KINDS, Document

SIGNS: dict[str, str] = KINDS["signs"]
HEAD = """\
# yaml-language-server: $schema=./inventory.schema.json
#
# Imported from {sources}. Lines with COMPLETE are for you; docs/import.md explains the rest.
"""
WIDTH = 100


def report(found: Imported) -> Iterator[str]:
    """A line for every finding of every value, in the order of the files."""
    for document in found.documents:
        yield f"{document.file}: {KINDS['titles'][document.kind]}, {counted(len(document.leaves), 'value')}"
        for leaf in sorted(document.leaves, key=lambda item: item.line):
            for number, told in enumerate(leaf.findings):
                where = on_one_line(dotted(leaf.path)) if not number else " " * min(len(dotted(leaf.path)), 24)
                yield f"{leaf.place}: {where} {SIGNS[told.sort]} {on_one_line(told.words)}"
        yield _summary(document)


def _summary(document: Document) -> str:
    counts = Counter(told.sort for leaf in document.leaves for told in leaf.findings)
    said = ", ".join(f"{counts[sort]} {words}" for sort, words in KINDS["counted"].items() if counts[sort])
    return f"{document.file}: {said}"


def as_data(found: Imported) -> list[dict[str, Any]]:
    """The report for programs."""
    return [
        {"file": leaf.file, "line": leaf.line, "path": dotted(leaf.path), "finding": told.sort, "words": told.words}
        for document in found.documents
        for leaf in document.leaves
        for told in leaf.findings
    ]


def text_of(found: Imported) -> str:
    """The inventory as a person would write it: one line for small things, with comments on where each comes from."""
    data = CommentedMap(found.data)
    for section, value in found.data.items():
        if isinstance(value, dict):
            data[section] = _shaped(value, (section,), found)
            data.yaml_set_comment_before_after_key(section, before="\n")
    out = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(data, out)
    sources = ", ".join(document.file for document in found.documents)
    return HEAD.format(sources=on_one_line(sources)) + out.getvalue().replace("\n# \n", "\n\n").replace("\n#\n", "\n\n")


def _lists_mappings(value: Any) -> bool:
    """Whether a list of several mappings is in a value."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    is_list = isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict)
    return is_list or any(map(_lists_mappings, items))


def _shaped(value: Any, path: KeyPath, found: Imported) -> Any:
    """Mappings as blocks where they are long or have comments, else on one line."""
    if not isinstance(value, dict | list):
        return value
    marks = {*found.draft.origins, *found.draft.complete}
    is_block = _lists_mappings(value)
    is_block |= any(mark[: len(path)] == path and len(mark) > len(path) for mark in marks) or len(str(value)) > WIDTH
    if isinstance(value, list):
        items = CommentedSeq(_shaped(item, (*path, number), found) for number, item in enumerate(value))
        if not is_block:
            items.fa.set_flow_style()
        return items
    shaped = CommentedMap({key: _shaped(item, (*path, key), found) for key, item in value.items()})
    if not is_block:
        shaped.fa.set_flow_style()
    for key in value:
        words = found.draft.complete.get((*path, key))
        origin = found.draft.origins.get((*path, key))
        if words:
            shaped.yaml_add_eol_comment(f"COMPLETE: {words}", key)
        elif origin:
            shaped.yaml_add_eol_comment(f"{origin.place}", key)
    return shaped
