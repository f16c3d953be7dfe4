"""Values in what tools and servers print; empty or 0 for what is not as expected."""

from __future__ import annotations

import json
import re
from typing import Any


def json_in(text: str) -> Any:
    """The first JSON value in what a tool printed among other lines; None when there is none."""
    for found in re.finditer(r"^\s*[\[{]", text, re.MULTILINE):
        try:
            return json.JSONDecoder().raw_decode(text[found.end() - 1 :])[0]
        except ValueError:
            continue
    return None


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, empty for anything else."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list, none for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def number(value: Any) -> int:
    """The whole number that a text begins with, else 0."""
    found = re.match(r"\d+", str(value))
    return int(found[0]) if found else 0
