"""Every check, by the stage in which it looks: the inventory, the plan, the rendering, or the running hosts.

A check is a generator that is registered with `@check("plan", "host-used", level="warning")`. Its docstring says what
must hold; the reference pages are made from it. It yields a Finding for everything that breaks it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from corral.errors import Finding, Level

Stage = Literal["inventory", "plan", "rendering", "running"]
# Gets the stage's subject; a plain message is a finding with the check's own remedy.
Find = Callable[..., Iterator[Finding | str]]
AnyFind = TypeVar("AnyFind", bound=Find)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its id, and how to look for what breaks it."""

    rule: str
    stage: Stage
    find: Find
    # Of its findings; those of a check for errors may say another one.
    level: Level = "error"
    # What usually helps.
    remedy: str = ""
    # Where it belongs within its stage: an area of `doctor`, a number of the CIS benchmark.
    section: str = ""
    # What must be there to look at; the stage says what each word means.
    needs: tuple[str, ...] = ()

    @property
    def demand(self) -> str:
        """What must hold, in a sentence."""
        return " ".join((self.find.__doc__ or "").split())

    def findings(self, *subject: object) -> Iterator[Finding]:
        """What breaks it, each with its rule and level."""
        for item in self.find(*subject):
            finding = Finding(item, remedy=self.remedy) if isinstance(item, str) else item
            level = finding.level if self.level == "error" else self.level
            yield replace(finding, rule=self.rule, level=level)


_CHECKS: dict[Stage, dict[str, Check]] = defaultdict(dict)


def check(
    stage: Stage, rule: str, *needs: str, level: Level = "error", remedy: str = "", section: str = ""
) -> Callable[[AnyFind], AnyFind]:
    """Registers a function as the check of a stage; raises ValueError for a second one of that id."""

    def register(find: AnyFind) -> AnyFind:
        if rule in _CHECKS[stage]:
            raise ValueError(f"{rule}: a second check of that id")
        _CHECKS[stage][rule] = Check(rule, stage, find, level, remedy, section, needs)
        return find

    return register


def checks(stage: Stage) -> dict[str, Check]:
    """The checks of a stage whose modules were imported, by id, in the order in which they are written."""
    return dict(_CHECKS[stage])


def findings(stage: Stage, *subject: object) -> list[Finding]:
    """What every check of a stage finds in its subject."""
    return [finding for item in _CHECKS[stage].values() for finding in item.findings(*subject)]
