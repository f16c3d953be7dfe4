"""JSON for files that are committed: complete, and as few lines as can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator

WIDTH = 120


def laid_out(data: object) -> str:
    """Data as JSON: what fits stands on one line of 120 columns, other arrays and objects are broken at their members.

    Members that fit share lines. Of an array of objects that do not fit, each begins where the one before ends.
    """
    return f"{_laid_out(data, 0, 0)}\n"


def _laid_out(data: object, indent: int, used: int) -> str:
    """The text of a value that begins at column `indent + used`; further lines are indented by `indent` columns."""
    line = _one_line(data)
    if not isinstance(data, (dict, list)) or not data or indent + used + len(line) < WIDTH:
        return line
    start, end = "{}" if isinstance(data, dict) else "[]"
    if isinstance(data, list):
        objects = [_laid_out(item, indent, used=1) for item in data if isinstance(item, dict)]
        if len(objects) == len(data) and all("\n" in text for text in objects):
            return f"{start}{', '.join(objects)}{end}"
    margin = " " * (indent + 1)
    lines = ",\n".join(f"{margin}{line}" for line in _filled(_members(data, indent + 1), WIDTH - indent - 2))
    return f"{start}\n{lines}\n{' ' * indent}{end}"


def _members(data: dict[str, object] | list[object], indent: int) -> Iterator[str]:
    if isinstance(data, list):
        yield from (_laid_out(item, indent, used=0) for item in data)
    else:
        for key, value in data.items():
            name = f"{_one_line(key)}: "
            yield name + _laid_out(value, indent, len(name))


def _filled(texts: Iterator[str], width: int) -> Iterator[str]:
    """The texts, joined while they fit in a line; one of several lines stays alone."""
    line = ""
    for text in texts:
        if line and "\n" not in line + text and len(line) + len(text) + 2 <= width:
            line += f", {text}"
        else:
            if line:
                yield line
            line = text
    yield line


def _one_line(data: object) -> str:
    return json.dumps(data, ensure_ascii=False)
