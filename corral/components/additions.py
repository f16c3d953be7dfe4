"""What an inventory adds to a program's configuration: `gateway.extra` and `monitoring.extra`.

Settings, and entries of lists, are added to the kit's own; none of those is removed or replaced. `additions` in a
component's component.yaml says by which field entries of a list are known, what they need, and what may be said anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.config.source import values_in
from corral.contributions import File
from corral.declarations import declaration
from corral.errors import Finding, KeyPath, shown

# How LiteLLM's and Prometheus' settings name a secret: a variable, or a file.
_SECRET = re.compile(r"(?:os\.environ|/run/secrets)/([A-Z][A-Z0-9_]{0,62})")
_NOTHING: Mapping[str, Any] = {"lists": {}, "changeable": [], "instead": {}}


@dataclass(slots=True)
class Sum:
    """A configuration with what the inventory adds, and what it must not."""

    data: dict[str, Any]
    wrong: list[Finding] = field(default_factory=list)


def summed(file: File) -> Sum:
    """A file's data with the inventory's additions; what would change the kit's own is left out and told."""
    rules = declaration(file.component).get("additions", _NOTHING)
    found = Sum({})
    found.data = _mapping(dict(file.data or {}), file.extra, (), rules, found)
    found.wrong = [Finding(item.message, (*file.extra_at, *item.path), item.remedy) for item in found.wrong]
    return found


def named_secrets(extra: Any) -> list[str]:
    """Names of the secrets that additions want, as `os.environ/NAME` or `/run/secrets/NAME`."""
    return sorted({match[1] for _, value, _ in values_in(extra) if (match := _SECRET.fullmatch(str(value)))})


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same data with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_texts(item, change) for key, item in value.items()}
    return [with_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def _mapping(
    own: dict[str, Any], extra: Mapping[str, Any], path: KeyPath, rules: Mapping[str, Any], found: Sum
) -> dict[str, Any]:
    for key, value in extra.items():
        place: KeyPath = (*path, key)
        spelled = ".".join(map(str, place))
        if key not in own:
            own[key] = _list((), value, place, rules, found) if isinstance(value, list) else value
        elif isinstance(own[key], Mapping) and isinstance(value, Mapping):
            own[key] = _mapping(dict(own[key]), value, place, rules, found)
        elif isinstance(own[key], list | tuple) and isinstance(value, list):
            own[key] = _list(tuple(own[key]), value, place, rules, found)
        elif own[key] != value and spelled in rules["changeable"]:
            own[key] = value
        elif own[key] != value:
            usual = "write a list: its entries are added" if isinstance(own[key], list | tuple) else "leave it out"
            remedy = rules["instead"].get(spelled, usual)
            found.wrong.append(Finding(f"the kit sets this to {shown(own[key])}", place, remedy))
    return own


def _list(own: tuple[Any, ...], extra: list[Any], path: KeyPath, rules: Mapping[str, Any], found: Sum) -> list[Any]:
    """The kit's entries, then those of the inventory that are no second ones of a name."""
    about = rules["lists"].get(".".join(map(str, path)), {})
    items, known = [*own], {_name(item, about) for item in own} - {None}
    for index, item in enumerate(extra):
        place = (*path, index)
        missing = [key for key in about.get("needs", ()) if _at(item, key) is None]
        if missing:
            words = f"an entry here needs {' and '.join(missing)}"
            found.wrong.append(Finding(words, place, "add it"))
        elif item not in items and _name(item, about) in known:
            words = f"there is another entry with the {about['name']} {_name(item, about)}"
            found.wrong.append(Finding(words, place, "give yours another name; the kit's own stays as it is"))
        elif item not in items:
            items.append(item)
            known |= {_name(item, about)} - {None}
    return items


def _name(item: Any, about: Mapping[str, Any]) -> str | None:
    """By what an entry is known: a field, or for `*` its only key; None where any two entries may be there."""
    field_name = about.get("name", "")
    if field_name == "*":
        return str(next(iter(item), None)) if isinstance(item, Mapping) else None
    value = _at(item, field_name) if field_name else None
    return None if value is None else str(value)


def _at(item: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        item = item.get(key) if isinstance(item, Mapping) else None
    return item
