"""`doctor` from end to end: asks every host, runs every check, shows what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from corral.build import Plan
from corral.checks.registry import checks
from corral.errors import Finding
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import observe_all, servers_seen
from corral.verbs.doctor import files, gpus, machine, path, services
from corral.verbs.doctor.case import Case
from corral.verbs.doctor.sections import sections

# In the order in which they are shown, with what is said of each that is well.
AREAS: dict[str, Callable[[Case], str]] = {
    "engine": machine.engine_summary,
    "machine": machine.summary,
    "gpus": gpus.summary,
    "files": files.summary,
    "services": services.summary,
    "path": path.summary,
    "exposure": services.exposure_summary,
}
# Every check by its id, by area and then in the order in which they are written.
CHECKS = dict(sorted(checks("running").items(), key=lambda item: list(AREAS).index(item[1].section)))
MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "hint": ("·", "dim")}
WORST = list(MARKS)
INDENT = 14


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found on one host, with a line for each area that is well."""

    host: str
    address: str
    found: tuple[Finding, ...]
    # What there is, by area; areas that could not be looked at are absent.
    summaries: dict[str, str]

    @property
    def is_well(self) -> bool:
        """Whether there is no error; warnings and hints do not count."""
        return not any(item.level == "error" for item in self.found)

    def of_area(self, area: str) -> list[Finding]:
        """What was found in an area, the worst first."""
        found = [item for item in self.found if CHECKS[item.rule].section == area]
        return sorted(found, key=lambda item: WORST.index(item.level))


def diagnose(plan: Plan, hosts: Sequence[ComposeHost], *, must_ask: bool = False) -> list[Diagnosis]:
    """What is wrong on every host; hosts are asked at the same time."""
    seen = observe_all(hosts, sections)
    servers = servers_seen(plan, hosts[0].out, seen)
    cases = [Case(host, item, servers) for host, item in zip(hosts, seen, strict=True)]
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda case: diagnosis(case, must_ask=must_ask), cases))


def diagnosis(case: Case, *, must_ask: bool = False) -> Diagnosis:
    """What every check finds on a host; on the one of the gateway what that answers, too."""
    if case.has("gateway") and case.own:
        case = replace(case, answers=path.ask(case.host, must_ask=must_ask))
    return Diagnosis(case.name, case.declared.address, tuple(findings(case)), _summaries(case))


def findings(case: Case) -> list[Finding]:
    """What every check finds that can look at this host; of a host that gives no answer only that."""
    able = [item for item in CHECKS.values() if all(map(case.has, item.needs))]
    able = able if case.seen.is_reached else [CHECKS[machine.REACHABLE]]
    return [finding for item in able for finding in item.findings(case)]


def _summaries(case: Case) -> dict[str, str]:
    if not case.seen.is_reached:
        return {}
    looked_at = list(AREAS) if case.has("engine") else ["machine", "files"]
    return {area: AREAS[area](case) for area in looked_at if area != "path" or case.own}


# --- showing ---------------------------------------------------------------------------------------------------------


def show(diagnoses: Sequence[Diagnosis], console: Console) -> None:
    """Prints a line for each area that is well, and every finding with its remedy."""
    for number, item in enumerate(diagnoses):
        console.print(Text.assemble("\n" if number else "", (item.host, "bold cyan"), f"  {item.address}"))
        for area in AREAS:
            for line in _lines(item, area):
                console.print(line)
    console.print(_verdict([found.level for item in diagnoses for found in item.found]))


def _lines(item: Diagnosis, area: str) -> list[Text]:
    found = item.of_area(area)
    if not found and area not in item.summaries:
        return [Text.assemble("  ", ("-", "dim"), f" {area:<10}", ("not looked at", "dim"))]
    lines = []
    if all(entry.level == "hint" for entry in found) and area in item.summaries:
        lines.append(Text.assemble("  ", ("✓", "green"), f" {area:<10}", item.summaries[area]))
    for entry in found:
        name, mark = "" if lines else area, MARKS[entry.level]
        lines.append(Text.assemble("  ", mark, f" {name:<10}", entry.message, (f"  [{entry.rule}]", "dim")))
        if entry.remedy:
            lines.append(Text.assemble(" " * INDENT, ("→ ", mark[1]), entry.remedy))
    return lines


def _verdict(levels: Sequence[str]) -> Text:
    counts = {level: levels.count(level) for level in ("error", "warning") if level in levels}
    words = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())
    return Text(f"\n{words or 'all is well'}", "red" if "error" in counts else "yellow" if counts else "green")


def as_data(diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """The same as plain data."""
    hosts = {
        item.host: {
            "address": item.address, "well": item.is_well, "areas": item.summaries,
            "findings": [
                {
                    "check": entry.rule, "area": CHECKS[entry.rule].section, "level": entry.level,
                    "what": entry.message, "remedy": entry.remedy or None,
                }
                for entry in item.found
            ],
        }
        for item in diagnoses
    }  # fmt: skip
    return {"well": all(item.is_well for item in diagnoses), "hosts": hosts}
