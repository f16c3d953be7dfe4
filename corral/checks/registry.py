"""What all checks have in common, of the inventory, the plan, the rendering and the running hosts.

What rules demand and what is told when they are broken is in YAML beside the code that looks (`Texts`). A component
registers its rules one by one with `@TEXTS.check("plan", "node-used")`, or with `@check("plan", "node-used")` where the
code has the texts; then its docstring says what must hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from corral.config.source import plain_yaml
from corral.errors import Finding, KeyPath, Level, did_you_mean

Stage = Literal["inventory", "plan"]
Findings = Iterator[Finding]
# Gets the stage's subject.
Find = Callable[..., Findings]
# Whether a rule is broken, the rule with its text (`rule/text`), and the key below the path that is meant (`a.b`).
Row = tuple[object, str, str]
# A level that is not the rule's own.
_LEVEL = re.compile(r"(warning|hint): ")


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its id, and how to look for what breaks it."""

    rule: str
    find: Find
    # What must hold, in a sentence.
    demand: str
    # Of its findings; those of a check for errors may say another one.
    level: Level = "error"

    def findings(self, *subject: object) -> Findings:
        """What breaks it, each with its rule and level."""
        for item in self.find(*subject):
            yield replace(item, rule=self.rule, level=item.level if self.level == "error" else self.level)


_CHECKS: dict[Stage, dict[str, Check]] = {"inventory": {}, "plan": {}}


def check(stage: Stage, rule: str, *, level: Level = "error", demand: str = "") -> Callable[[Find], Find]:
    """Registers a function as the check of a stage; raises ValueError for a second one of that id.

    Without a text of what it demands, its docstring says that.
    """

    def register(find: Find) -> Find:
        if rule in _CHECKS[stage]:
            raise ValueError(f"{rule}: a second check of that id")
        _CHECKS[stage][rule] = Check(rule, find, demand or " ".join((find.__doc__ or "").split()), level)
        return find

    return register


def checks(stage: Stage) -> dict[str, Check]:
    """The checks of a stage whose modules were imported, by id, in the order in which they are written."""
    return dict(_CHECKS[stage])


def findings(stage: Stage, *subject: object) -> list[Finding]:
    """What every check of a stage finds in its subject."""
    return [finding for item in _CHECKS[stage].values() for finding in item.findings(*subject)]


@dataclass(frozen=True, slots=True)
class Texts:
    """Rules of one file: what each demands, its level, and what is told when it is broken, by name of the text."""

    rows: Mapping[str, Mapping[str, Any]]

    @classmethod
    def beside(cls, module: str) -> Texts:
        """Those of the YAML file beside a module."""
        return cls(plain_yaml(Path(module).with_suffix(".yaml").read_bytes()))

    @property
    def demands(self) -> dict[str, tuple[str, Level]]:
        """What each rule demands, and how grave it is to break it."""
        return {rule: (row["demand"], row.get("level", "error")) for rule, row in self.rows.items()}

    def check(self, stage: Stage, rule: str) -> Callable[[Find], Find]:
        """Registers a function as the check of one of these rules."""
        demand, level = self.demands[rule]
        return check(stage, rule, level=level, demand=demand)

    def finding(self, text: str, path: KeyPath = (), /, level: Any = "", **values: object) -> Finding:
        """A finding with a text (`rule/text`), filled with values; without a remedy of its own it has the rule's."""
        rule, _, key = text.partition("/")
        row = self.rows[rule]
        said, level = row[key], level or row.get("level", "error")
        if match := _LEVEL.match(said):
            said, level = said[match.end() :], match[1]
        message, _, remedy = said.rpartition(" →") if " →" in said else (said, "", row.get("remedy", ""))
        return Finding(message.format_map(values), path, remedy.format_map(values).strip(), rule, level)

    def broken(self, path: KeyPath, *rows: Row, **values: object) -> Findings:
        """A finding for each of these that is broken."""
        for is_broken, text, key in rows:
            if is_broken:
                yield self.finding(text, (*path, *filter(None, key.split("."))), **values)

    def first(self, path: KeyPath, *rows: Row, **values: object) -> Findings:
        """Like `broken`, for reasons of which one is enough."""
        return islice(self.broken(path, *rows, **values), 1)


def known(rule: str, what: str, name: str | None, path: KeyPath, names: Iterable[str]) -> Findings:
    """A finding where something is named that is not there."""
    if name is not None and name not in names:
        yield Finding(f'no {what} named "{name}"', path, did_you_mean(name, names), rule)
