"""What pydantic finds in an inventory, in words for people: what is wrong, what to do, and nothing about Python."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from corral.config.inventory import NO_VARIABLES, PATTERNS, Inventory, ServiceAdditions
from corral.config.source import plain_yaml
from corral.errors import Finding, KeyPath, did_you_mean, shown
from corral.units import grouped

_PATTERNS = {pattern.expression: pattern for pattern in PATTERNS.values()}
# What values of a type are, and bounds in words, by pydantic's names of errors.
_WORDS: dict[str, Any] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
_WANTED, _BOUNDS = _WORDS["types"], _WORDS["bounds"]
FOREIGN: dict[str, Any] = plain_yaml(Path(__file__).with_name("foreign_words.yaml").read_bytes())
# Keys by the words that other programs have for them, and what to do about words that are no key.
_FOREIGN_KEYS = grouped((word, place) for place, words in FOREIGN["keys"].items() for word in words.split())
_NO_CHOICES = {word: remedy for words, remedy in FOREIGN["no_values"].items() for word in words.split()}
_NO_KEYS = {word: remedy for words, remedy in FOREIGN["none"].items() for word in words.split()}
_FLAG = re.compile(r"--?[A-Za-z][\w-]*")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NUMBERS = re.compile(r"[0-9][0-9 -]*")
# For engines of nodes that the kit does not know.
PROVIDERS = "other providers are engine: cloud with their model, such as openrouter/…, or engine: openai with a url"
_TRUE, _FALSE = {"yes", "on", "y", "true", "1"}, {"no", "off", "n", "false", "0"}


def problems_of(error: ValidationError) -> list[Finding]:
    """Every problem that a validation found, with its path and remedy."""
    return [_problem(details) for details in error.errors(include_url=False)]


def _problem(details: ErrorDetails) -> Finding:
    path: KeyPath = tuple(details["loc"])
    if path and path[-1] == "[key]":
        path = path[:-1]
    if details["type"] == "extra_forbidden":
        return Finding(f"unknown key {shown(path[-1])}", path, _where_it_belongs(path))
    if details["type"] == "missing":
        return Finding(f'"{path[-1]}" is missing', path[:-1], _purpose(path))
    message, remedy = _about_value(details, path)
    return Finding(message, path, remedy)


def _about_value(details: ErrorDetails, path: KeyPath) -> tuple[str, str]:
    """What is wrong with a value, and the remedy."""
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    message, _, hint = details["msg"].removeprefix("Value error, ").partition("; ")  # our own validators' words
    if kind == "too_short":
        message, hint = "is empty", f"at least one is needed: {_purpose(path)}"
    elif given is None:
        is_section = kind in ("model_type", "dict_type")
        message, hint = "is empty", f"{'write {}' if is_section else 'give it a value'} or remove the line"
    elif kind == "literal_error":
        choices = str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        message, hint = f"must be one of {', '.join(choices)}, not {shown(given)}", _near(given, choices)
        hint = _NO_CHOICES.get(str(given).lower()) or hint or (PROVIDERS if "cloud" in choices else "")
    elif kind == "string_pattern_mismatch":
        pattern = _PATTERNS[str(context["pattern"])]
        told = f", not {shown(given)}" if pattern.is_shown else ""
        is_variable = pattern.is_shown and _VARIABLE.search(str(given))
        message, hint = f"must be {pattern.words}{told}", NO_VARIABLES if is_variable else pattern.remedy
        if path[0] == "pools" and path[-1] == "model":
            hint = "name one of models: there its file is said"
    elif kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key] if isinstance(context[key], int) else f"{context[key]:g}"
        message, hint = f"must be {words} {bound}, not {shown(given)}", _purpose(path)
    elif kind in _WANTED:
        message, hint = f"must be {_WANTED[kind]}, not {shown(given)}", _type_hint(kind, given, path) or _purpose(path)
    return message, hint


def _near(given: Any, choices: list[str]) -> str:
    meant = next((choice for choice in choices if str(given).lower() in FOREIGN["values"].get(choice, "").split()), "")
    hint = did_you_mean(meant or str(given), choices)
    return hint if hint.startswith("did") else ""


def _where_it_belongs(path: KeyPath) -> str:
    """The remedy for an unknown key: the section that has it, what another program means by it, or the nearest key."""
    key, models = str(path[-1]), _models_at((*path[:-1], 0))
    fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
    names = {name: _models_in(annotation) for name, annotation in fields.items()}
    if "gpus" in names and _NUMBERS.fullmatch(key):
        return 'numbers with a comma go in quotes: gpus: "1-3,5"'
    if key.partition(":")[0] in names:
        return 'write a space after the ":"'
    section = next((name for name, inner in names.items() if any(key in model.model_fields for model in inner)), "")
    if not section and key in ServiceAdditions.model_fields:
        return "it belongs to a service: hosts.….services.haproxy, for instance"
    if section and key != "name":
        return f"it belongs under {section}:"
    return _meant(key, models) or did_you_mean(key, names)


def _meant(key: str, models: list[type[BaseModel]]) -> str:
    """The remedy for a word of another program: its key here, in a section here or elsewhere; empty without one."""
    word = key.lower().replace("-", "_")
    # The part of each of its places that has to be written in these sections.
    rests = {place: _rest(place, models) for place in _FOREIGN_KEYS.get(word, ())}
    near = min(filter(None, rests.values()), key=len, default=())
    if len(near) == 1:
        return f"did you mean {shown(near[0])}?"
    if near:
        return f"did you mean {': {'.join(near)}: …{'}' * (len(near) - 1)}?"
    known = _near(key, [name for model in models for name in model.model_fields])
    return _NO_KEYS.get(word) or known or (f"did you mean {next(iter(rests))}?" if rests else "")


def _rest(place: str, models: list[type[BaseModel]]) -> tuple[str, ...]:
    """What of a place is below the nearest of these sections that it leads through; empty when that is none of them."""
    parts = place.split(".")
    starts = [at for at in range(len(parts)) if set(_models_at((*parts[:at], 0))) & set(models)]
    rest = parts[starts[-1] :] if starts else []
    return tuple(rest) if "…" not in rest else ()


def _type_hint(kind: str, given: Any, path: KeyPath) -> str:
    """The remedy for a value of another type, where the value itself shows what was meant."""
    is_single = not isinstance(given, Mapping | list)
    if kind == "string_type" and is_single and not isinstance(given, bool):
        return f'write it in quotes: "{shown(given)}"'
    if kind == "dict_type" and isinstance(given, list):
        return 'write NAME: … for each, without "- "'
    if kind == "model_type" or (kind == "tuple_type" and _models_at((*path, 0))):
        return _as_section(given, path)
    if kind == "tuple_type" and is_single:
        return _as_list(given, path)
    if kind == "bool_type" and str(given).lower() in _TRUE | _FALSE:
        return f"write {'true' if str(given).lower() in _TRUE else 'false'}"
    return _number_hint(given, path) if kind in ("int_type", "float_type") and isinstance(given, str) else ""


def _as_list(given: Any, path: KeyPath) -> str:
    """The remedy for a single value where a list has to be."""
    if path[-1] == "extra_args":
        words = (word if _FLAG.fullmatch(word) else shown(word) for word in str(given).split())
        return f"write [{', '.join(words)}]"
    if re.match("-[^- ]", str(given)):
        return f'write "- {str(given)[1:]}", with a space after the "-"'
    return f"write [{given if isinstance(given, str) and _PLAIN.fullmatch(given) else shown(given)}]"


def _as_section(given: Any, path: KeyPath) -> str:
    """The remedy for a single value where a section has to be: the section with it."""
    model = next(iter(_models_at((*path, 0))), None)
    if model is None or isinstance(given, Mapping | list) or given is False:
        return ""
    needed = [name for name, field in model.model_fields.items() if field.is_required()]
    if isinstance(given, int | float) and given is not True:
        main = _WORDS["number"].get(model.__name__)
        return f"write {{{main}: {given}}}" if main else ""
    keys = needed or [key for name, key in _WORDS["text"].items() if name == model.__name__ and given is not True]
    values = ["…" if given is True else given, *["…"] * len(keys)]
    return f"write {{{', '.join(f'{key}: {value}' for key, value in zip(keys, values, strict=False))}}}"


def _number_hint(given: str, path: KeyPath) -> str:
    if given.strip().replace(".", "", 1).isdecimal():
        return "write it without quotes"
    thousands = re.fullmatch(r"(\d{1,6}) ?[kK]", given)
    if thousands and path[-1] == "context":
        return f"write {int(thousands[1]) * 1024}"
    return (
        "write the number alone; its unit is in the key's name" if re.fullmatch(r"\d[\d.]* ?[A-Za-z]+", given) else ""
    )


def _purpose(path: KeyPath) -> str:
    """What the field at a path is for, from its description."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for model in _models_at(path[:-1]):
        field = model.model_fields.get(str(path[-1])) if path else None
        if field is not None and field.description:
            text = " ".join(field.description.split()).rstrip(".")
            return text if text[1:2].isupper() else text[:1].lower() + text[1:]
    return ""


def _models_at(path: KeyPath) -> list[type[BaseModel]]:
    """Models that may stand at a path; an index that the type has no list for is passed over."""
    found: list[Any] = [Inventory]
    for part in path:
        found = [after for kind in found for after in _step(kind, part)] or found
    return _models(found)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Models that a field takes, by itself or in a list."""
    return [model for kind in _plain(annotation) for model in (*_models([kind]), *_models(_step(kind, 0)))]


def _models(kinds: list[Any]) -> list[type[BaseModel]]:
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _step(kind: Any, part: str | int) -> list[Any]:
    """Types that one step of a path leads to."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return _plain(field.annotation) if field is not None else []
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and not isinstance(part, int):
        return _plain(arguments[1])
    return _plain(arguments[0]) if origin in (list, tuple) and isinstance(part, int) else []


def _plain(kind: Any) -> list[Any]:
    """The alternatives of a type, without Annotated and unions around them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _plain(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [plain for argument in arguments for plain in _plain(argument)]
    return [kind]
