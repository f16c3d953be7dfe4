"""What a check is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Literal

from corral.build import Plan
from corral.runtime.haproxy import Server
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import Snapshot
from corral.verbs.doctor.facts import Facts

# In the order in which they are asked and shown; a module for each.
AREAS = ("engine", "machine", "gpus", "files", "services", "path", "exposure")
# Id of the check that everything else rests on.
REACHABLE = "host-reachable"
Level = Literal["error", "warning", "hint"]
Need = Literal["engine", "gpus", "running", "gateway"]


@dataclass(frozen=True, slots=True)
class Case:
    """A host with all that is known of it, for the checks to look at."""

    host: ComposeHost
    facts: Facts
    seen: Snapshot
    # What the balancer says of every replica.
    servers: Mapping[str, Server] = field(default_factory=dict)
    # Whether pools may be asked a question, which costs a little inference.
    must_ask: bool = False

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.host.plan

    @property
    def name(self) -> str:
        """The host's name."""
        return self.host.name

    def has(self, need: Need) -> bool:
        """Whether what a check needs is there."""
        if need == "engine":
            return self.facts.is_reachable
        if need == "gpus":
            return bool(self.plan.site.cards[self.name])
        if need == "running":
            return any(item.project == self.host.project for item in self.seen.containers)
        return self.plan.inventory.gateway.host == self.name


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found wrong, and what helps. Errors keep requests from being answered, or will."""

    what: str
    remedy: str = ""
    level: Level = "error"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its id, what must hold, and what usually helps."""

    id: str
    area: str
    rule: str
    remedy: str
    needs: tuple[Need, ...]
    find: Callable[[Case], Iterator[Finding]]


CHECKS: dict[str, Check] = {}


def check(
    name: str, area: str, remedy: str, *needs: Need
) -> Callable[[Callable[[Case], Iterator[Finding]]], Callable[[Case], Iterator[Finding]]]:
    """Registers a function as a check; the first line of its docstring says what must hold."""

    def register(find: Callable[[Case], Iterator[Finding]]) -> Callable[[Case], Iterator[Finding]]:
        if name in CHECKS or area not in AREAS:
            raise ValueError(f"{name}: a second check of that name, or an area that is not known: {area}")
        rule = (find.__doc__ or "").strip().splitlines()[0]
        CHECKS[name] = Check(name, area, rule, remedy, needs, find)
        return find

    return register


def findings(case: Case) -> Iterator[tuple[Check, Finding]]:
    """What every check finds that can look at this host; of a host that cannot be asked only that."""
    for item in checks():
        if all(case.has(need) for need in item.needs) and (not case.facts.problem or item.id == REACHABLE):
            for finding in item.find(case):
                yield item, finding


@cache
def checks() -> tuple[Check, ...]:
    """Every check, by area and then in the order in which they stand there."""
    for area in AREAS:
        import_module(f"corral.verbs.doctor.{area}")
    return tuple(sorted(CHECKS.values(), key=lambda item: AREAS.index(item.area)))
