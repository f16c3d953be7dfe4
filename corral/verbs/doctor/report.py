"""`doctor` from end to end: asks every host, runs every check, shows what was found."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.text import Text

from corral.build import Plan
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import observe, servers_seen
from corral.verbs.doctor.checks import AREAS, Case, Finding, findings
from corral.verbs.doctor.facts import Facts, collect

MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "hint": ("·", "dim")}
WORST = ("error", "warning", "hint")
INDENT = 14


@dataclass(frozen=True, slots=True)
class Found:
    """A finding with the check that made it."""

    check: str
    area: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found on one host, with a line for each area that is well."""

    host: str
    address: str
    found: tuple[Found, ...]
    # What there is, by area; areas that could not be looked at are absent.
    summaries: dict[str, str]

    @property
    def is_well(self) -> bool:
        """Whether there is no error; warnings and hints do not count."""
        return not any(item.finding.level == "error" for item in self.found)


def diagnose(plan: Plan, hosts: Sequence[ComposeHost], *, must_ask: bool = False) -> list[Diagnosis]:
    """What is wrong on every host; hosts are asked at the same time."""
    with ThreadPoolExecutor(2 * len(hosts)) as pool:
        facts = [pool.submit(collect, host) for host in hosts]
        seen = [pool.submit(observe, host) for host in hosts]
        servers = servers_seen(plan, hosts[0].out, [item.result() for item in seen])
        cases = [
            Case(host, asked.result(), looked.result(), servers, must_ask)
            for host, asked, looked in zip(hosts, facts, seen, strict=True)
        ]
    return [_diagnosis(case) for case in cases]


def _diagnosis(case: Case) -> Diagnosis:
    found = [Found(item.id, item.area, finding) for item, finding in findings(case)]
    return Diagnosis(case.name, case.plan.site.host(case.name).address, tuple(found), _summaries(case))


def _summaries(case: Case) -> dict[str, str]:
    facts: Facts = case.facts
    if facts.problem:
        return {}
    looked_at = [area for area in AREAS if facts.is_reachable or area in ("machine", "files")]
    if not case.has("running"):
        looked_at = [area for area in looked_at if area != "path"]
    return {area: import_module(f"corral.verbs.doctor.{area}").summary(case) for area in looked_at}


# --- showing ---------------------------------------------------------------------------------------------------------


def show(diagnoses: Sequence[Diagnosis], console: Console) -> None:
    """Prints a line for each area that is well, and every finding with its remedy."""
    for number, item in enumerate(diagnoses):
        console.print(Text.assemble("\n" if number else "", (item.host, "bold cyan"), f"  {item.address}"))
        for area in AREAS:
            for line in _lines(item, area):
                console.print(line)
    console.print(_verdict(diagnoses))


def _lines(item: Diagnosis, area: str) -> list[Text]:
    found = sorted(
        (entry for entry in item.found if entry.area == area), key=lambda entry: WORST.index(entry.finding.level)
    )
    if not found and area not in item.summaries:
        return [Text.assemble("  ", ("-", "dim"), f" {area:<10}", ("not looked at", "dim"))]
    lines = []
    if all(entry.finding.level == "hint" for entry in found) and area in item.summaries:
        lines.append(Text.assemble("  ", ("✓", "green"), f" {area:<10}", item.summaries[area]))
    for entry in found:
        mark, style = MARKS[entry.finding.level]
        name = area if not lines else ""
        lines.append(
            Text.assemble("  ", (mark, style), f" {name:<10}", entry.finding.what, (f"  [{entry.check}]", "dim"))
        )
        if entry.finding.remedy:
            lines.append(Text.assemble(" " * INDENT, ("→ ", style), entry.finding.remedy))
    return lines


def _verdict(diagnoses: Sequence[Diagnosis]) -> Text:
    counts = {level: sum(entry.finding.level == level for item in diagnoses for entry in item.found) for level in WORST}
    if not counts["error"] and not counts["warning"]:
        return Text("\nall is well", "green")
    parts = [f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in WORST[:2] if counts[level]]
    return Text(f"\n{', '.join(parts)}", "red" if counts["error"] else "yellow")


def as_data(diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "well": all(item.is_well for item in diagnoses),
        "hosts": {
            item.host: {
                "address": item.address,
                "well": item.is_well,
                "areas": item.summaries,
                "findings": [
                    {
                        "check": entry.check, "area": entry.area, "level": entry.finding.level,
                        "what": entry.finding.what, "remedy": entry.finding.remedy or None,
                    }
                    for entry in item.found
                ],
            }
            for item in diagnoses
        },
    }  # fmt: skip
