"""`doctor` from end to end: asks every host, runs every check, shows what was found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from corral.build import Plan
from corral.checks.registry import Check
from corral.errors import Finding
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import observe_all, servers_seen
from corral.units import counted
from corral.verbs.doctor import files, gpus, machine, path, services
from corral.verbs.doctor.case import ROWS, Case, sections


@dataclass(frozen=True, slots=True)
class DoctorCheck(Check):
    """A check of running hosts."""

    # What usually helps.
    remedy: str = ""
    # Its area.
    section: str = ""
    # What must be there to look at; see `Case.has`.
    needs: tuple[str, ...] = ()


# Id of the check that everything else rests on.
REACHABLE = "host-reachable"
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
# Every check by its id, in the order of areas and then of the table.
CHECKS = {
    rule: DoctorCheck(
        rule, find := getattr(sys.modules[AREAS[area].__module__], rule.replace("-", "_")), str(find.__doc__),
        remedy=row["remedy"].format(), section=area, needs=tuple(row.get("needs", ())),
    )
    for area in AREAS
    for rule, row in ROWS[area].items()
}  # fmt: skip
# The worst first.
MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "hint": ("·", "dim")}
INDENT = 14
# A part of the diagnosis, as `--json` prints it.
Data = dict[str, Any]


def diagnose(plan: Plan, hosts: Sequence[ComposeHost], *, must_ask: bool = False) -> Data:
    """What is wrong on every host, as plain data; hosts are asked at the same time.

    Args:
        plan: the site.
        hosts: those to look at.
        must_ask: also put a question to every pool, which costs some inference.
    """
    seen = observe_all(hosts, sections)
    servers = servers_seen(plan, hosts[0].out, seen)
    cases = [Case(host, item, servers) for host, item in zip(hosts, seen, strict=True)]
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = dict(
            zip([case.name for case in cases], pool.map(lambda case: _host(case, must_ask), cases), strict=True)
        )
    return {"well": all(host["well"] for host in found.values()), "hosts": found}


def _host(case: Case, must_ask: bool) -> Data:  # noqa: FBT001 - of a map
    """A host's findings, and what there is by area; areas that could not be looked at are absent."""
    if case.has("gateway"):
        case = replace(case, answers=path.ask(case.host, must_ask=must_ask))
    found = [
        {
            "check": item.rule, "area": CHECKS[item.rule].section, "level": item.level,
            "what": item.message, "remedy": item.remedy or None,
        }
        for item in findings(case)
    ]  # fmt: skip
    looked_at = list(AREAS) if case.has("seen") else ["machine", "files"] if case.seen.is_reached else []
    return {
        "address": case.declared.address,
        "well": not any(item["level"] == "error" for item in found),
        "areas": {area: AREAS[area](case) for area in looked_at if area != "path" or case.own},
        "findings": found,
    }


def findings(case: Case) -> list[Finding]:
    """What every check finds that can look at this host; of a host that gives no answer only that."""
    able = [item for item in CHECKS.values() if all(map(case.has, item.needs))]
    able = able if case.seen.is_reached else [CHECKS[REACHABLE]]
    return [finding for item in able for finding in item.findings(case)]


# --- showing ---------------------------------------------------------------------------------------------------------


def show(diagnosis: Data, console: Console) -> None:
    """Prints a line for each area that is well, and every finding with its remedy."""
    for number, (name, host) in enumerate(diagnosis["hosts"].items()):
        console.print(Text.assemble("\n" if number else "", (name, "bold cyan"), f"  {host['address']}"))
        for area in AREAS:
            for line in _lines(
                area, host["areas"].get(area), [item for item in host["findings"] if item["area"] == area]
            ):
                console.print(line)
    levels = [item["level"] for host in diagnosis["hosts"].values() for item in host["findings"]]
    counts = {level: levels.count(level) for level in ("error", "warning") if level in levels}
    words = ", ".join(counted(count, level) for level, count in counts.items())
    console.print(Text(f"\n{words or 'all is well'}", MARKS[next(iter(counts))][1] if counts else "green"))


def _lines(area: str, summary: str | None, found: Sequence[Data]) -> Iterator[Text]:
    name = f" {area:<10}"
    if summary is None and not found:
        yield Text.assemble("  ", ("-", "dim"), name, ("not looked at", "dim"))
    elif summary is not None and all(item["level"] == "hint" for item in found):
        yield Text.assemble("  ", ("✓", "green"), name, summary)
        name = " " * len(name)
    for item in sorted(found, key=lambda item: list(MARKS).index(item["level"])):
        mark = MARKS[item["level"]]
        yield Text.assemble("  ", mark, name, item["what"], (f"  [{item['check']}]", "dim"))
        if item["remedy"]:
            yield Text.assemble(" " * INDENT, ("→ ", mark[1]), item["remedy"])
        name = " " * len(name)
