"""The reference pages under docs/reference, made from the inventory's and the rules' own descriptions."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from corral.checks import policy, references, rules
from corral.checks.registry import Stage, checks
from corral.config.inventory import Inventory
from corral.errors import Level

HEAD = """# Every key of the inventory

Made from `corral/config/inventory.py` by `make golden`. The same words appear in editors that read
`inventory.schema.json`. A key without a default is required. Keys of the top level that start with `x-` are yours.
"""


def inventory_reference() -> str:
    """The page of all keys: a table for each section, in the order in which sections refer to each other."""
    return HEAD + "".join(_section(model) for model in _models(Inventory))


def _models(root: type[BaseModel]) -> list[type[BaseModel]]:
    """The model and every model below it, each once."""
    found: list[type[BaseModel]] = [root]
    for model in found:
        below = (kind for field in model.model_fields.values() for kind in _models_in(field.annotation))
        found.extend(kind for kind in dict.fromkeys(below) if kind not in found)
    return found


def _models_in(kind: object) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in typing.get_args(kind):
        yield from _models_in(part)


def _section(model: type[BaseModel]) -> str:
    summary = " ".join((model.__doc__ or "").split())
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_words(field)} |"
        for name, field in model.model_fields.items()
    ]
    table = "\n".join(["| key | takes | default | what it is |", "|---|---|---|---|", *rows])
    return f"\n## {model.__name__}\n\n{summary}\n\n{table}\n"


def _words(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ({}, ()):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(kind: object) -> str:
    """A type in words a newcomer knows."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    words: dict[object, Callable[[], str]] = {
        typing.Annotated: lambda: _type(arguments[0]),
        typing.Union: lambda: " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not type(None))),
        typing.Literal: lambda: ", ".join(f"`{choice}`" for choice in arguments),
        dict: lambda: f"mapping of {_type(arguments[1])}",
        tuple: lambda: f"list of {_type(arguments[0])}",
    }
    words |= {list: words[tuple], types.UnionType: words[typing.Union]}
    if origin in words:
        return words[origin]()
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}.get(
        typing.cast(type, kind), "anything"
    )


RULES_HEAD = """# Every rule

Made from `corral/checks/references.yaml`, `corral/checks/rules.yaml` and `rules.py` of components;
`pytest tests/rules --update-golden` writes it again. `./generate.py check` applies all rules; a problem ends with the
rule's id in brackets. `tests/rules/<id>` has an inventory that keeps the rule and one that breaks it. An error stops
rendering, what is questionable is a warning.
"""


def rules_reference() -> str:
    """The page of all rules: first what is checked before the site is resolved, then what is checked after."""
    return "\n".join(
        [
            RULES_HEAD,
            *_rule_table("In the inventory", references.TEXTS.demands | _registered("inventory")),
            "",
            *_rule_table("In the plan made from it", dict(sorted((rules.TEXTS.demands | _registered("plan")).items()))),
            "",
        ]
    )


def _registered(stage: Stage) -> dict[str, tuple[str, Level]]:
    return {rule: (item.demand, item.level) for rule, item in sorted(checks(stage).items())}


def _rule_table(title: str, rules: Mapping[str, tuple[str, Level]]) -> Iterator[str]:
    yield from (f"## {title}", "", "| rule | breaking it is | what it demands |", "|---|---|---|")
    for rule, (demand, level) in rules.items():
        yield f"| `{rule}` | {_weight(level)} | {' '.join(demand.split())} |"


POLICY_HEAD = """# The security baseline, rule by rule

Made from `corral/checks/policy.yaml`; `pytest tests/unit/test_policy.py --update-golden` writes it again.
`./generate.py check` applies all rules to what would be rendered, the tests apply them to `docker compose config` as
well. A finding ends with the rule's id in brackets. CIS is the CIS Docker Benchmark 1.6; an empty field: it has no such
point. What is excepted, and why, is in [security](../security.md).

| rule | CIS | breaking it is | what it demands |
|---|---|---|---|
"""


def policy_reference() -> str:
    """The page of all rules."""
    return POLICY_HEAD + "".join(
        f"| `{name}` | {row.get('cis', '')} | {_weight(row.get('level', 'error'))} | {row['demand']} |\n"
        for name, row in policy.TEXTS.rows.items()
    )


def _weight(level: Level) -> str:
    return "an error" if level == "error" else "questionable"
