"""`bench run`: runs one scenario and checks its criteria."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.errors import CorralError, UsageError, did_you_mean, on_one_line
from corral.files import write_atomically
from figures import Figures
from load import Load, Rows, run_load
from measured import Measured, ask, body_of, open_session, place_of
from scenarios import SCENARIOS, Scenario
from target import Target, Tasks, backends_of, chosen_pools, kind_of, objective_of, tasks_for

FIRST_S = 120.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The user's options; None: the scenario's default."""

    scenario: str
    pools: tuple[str, ...] = ()
    rate: float | None = None
    users: int | None = None
    duration_s: float | None = None
    web: str = ""
    to: Path | None = None


def run(target: Target, wanted: Wanted, talk: Console) -> dict[str, Any]:
    """Runs a scenario and returns its statistics by pool; raises CorralError when it cannot start."""
    scenario = _scenario(wanted.scenario).lasting(wanted.duration_s)
    pools = chosen_pools(target.plan, wanted.pools, scenario.kinds)
    if target.replica:
        pools = [pool for pool in pools if _slots(target, pool)] or pools
    tasks = tasks_for(target, pools, scenario.long_share, scenario.max_tokens)
    level = _level(target, scenario, wanted, pools)
    stages = tuple(replace(stage, start=stage.start * level, to=stage.to * level) for stage in scenario.stages)
    load = Load(
        tasks, scenario.loop, stages, timeout_s=scenario.timeout_s, turns=scenario.turns, is_ramped=scenario.is_ramped
    )
    check_ways(tasks)
    unit = {"open": "requests a second", "closed": "clients", "burst": "requests in a burst"}[scenario.loop]
    talk.print(Text(f"{scenario.name}: {', '.join(pools)}, up to {level:g} {unit}, {load.lasts_s:.0f} s"))
    folder = wanted.to or Path(".corral") / "bench" / target.plan.inventory.name / scenario.name
    found = run_load(load, folder / "requests.jsonl", wanted.web)
    return _told(target, scenario, pools, found, folder)


def _scenario(name: str) -> Scenario:
    if name not in SCENARIOS:
        raise UsageError(f'no scenario named "{name}"; {did_you_mean(name, SCENARIOS)}')
    return SCENARIOS[name]


def _level(target: Target, scenario: Scenario, wanted: Wanted, pools: Iterable[str]) -> float:
    """Requests per second, clients, or requests in one burst."""
    if scenario.loop != "open":
        slots = sum(_slots(target, pool) for pool in pools)
        return float(wanted.users or scenario.users or slots)
    if wanted.rate:
        return wanted.rate
    limits = [target.plan.inventory.pools[pool].limits.rpm for pool in pools]
    if not any(limits):
        raise UsageError(f"{scenario.name} needs a rate, and no pool has a limit: say --rate REQUESTS_A_SECOND")
    return sum(limit or 0 for limit in limits) / 60


def _slots(target: Target, pool: str) -> int:
    """The slots under load: those of the pool, or of the chosen replica."""
    return sum(one.slots for one in backends_of(target.plan, pool) if target.replica in ("", one.name))


def check_ways(tasks: Tasks) -> None:
    """Sends one small request on every path; raises CorralError with all that fail."""
    ways = {(place["url"], place["model"]): (item["kind"], place) for item in tasks.tasks for place in item["places"]}
    found = [(way, _problem(*ways[way], tasks)) for way in ways if ways[way][0] != "image"]
    problems = [f"{model} at {url}: {problem}" for (url, model), problem in found if problem]
    if problems:
        raise CorralError("nothing was measured:\n  " + "\n  ".join(problems))


def _problem(kind: str, where: dict[str, Any], tasks: Tasks) -> str:
    """The problem with the answer to one small request; empty for none."""
    found = Measured(kind, "")
    body = body_of(kind, where["model"], [{"role": "user", "content": "hi"}], 1)
    with open_session() as session:
        ask(session, place_of(where, tasks.environment), found, body, FIRST_S)
    if found.error == "connection":
        return f"no answer ({on_one_line(found.detail)}); is the farm up?"
    return on_one_line(f"{found.error}: {found.detail}" if found.error else "")


def _told(target: Target, scenario: Scenario, pools: Iterable[str], found: Rows, folder: Path) -> dict[str, Any]:
    by_pool = {pool: found.figures(objective_of(target.plan, pool), pool) for pool in pools}
    data = {
        "scenario": scenario.name, "site": target.plan.inventory.name,
        "kinds": {name: kind_of(target.plan, name) for name in by_pool},
        "pools": {name: asdict(figures) for name, figures in by_pool.items()}, "broken": _broken(scenario, by_pool),
        "went_quiet": went_quiet(found.requests), "raw": str(folder / "requests.jsonl"),
    }  # fmt: skip
    write_atomically(folder / "figures.json", (json.dumps(data, indent=2) + "\n").encode(), 0o644)
    return data


def _broken(scenario: Scenario, by_pool: dict[str, Figures]) -> list[str]:
    """The criteria of the scenario that the farm did not meet."""
    sent, answered = sum(item.requests for item in by_pool.values()), sum(item.answered for item in by_pool.values())
    share = 100 * answered / sent if sent else 0.0
    words = [] if answered else ["no request was answered"]
    if share < scenario.success_percent:
        words.append(f"{share:.1f} % answered, {scenario.success_percent:g} % wanted")
    for name, figures in by_pool.items():
        if figures.answered_percent < scenario.pool_success_percent:
            words.append(
                f"{name}: {figures.answered_percent:.1f} % answered, {scenario.pool_success_percent:g} % wanted"
            )
        slow = figures.e2e_s.get("p95", 0.0)
        if scenario.p95_s and slow > scenario.p95_s:
            words.append(f"{name}: 95 % of the answers within {slow:.1f} s, {scenario.p95_s:g} s wanted")
    return words


def went_quiet(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Replicas that answered in the first half of a load but not in the second."""
    ordered = sorted((row for row in rows if not row["error"]), key=lambda row: float(row["due_at"]))
    half = len(ordered) // 2
    early, late = ({row["replica"] for row in part} for part in (ordered[:half], ordered[half:]))
    return sorted(early - late)


def show(data: dict[str, Any], console: Console) -> None:
    """Prints the statistics of a run."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in (
        "pool",
        "sent",
        "answered",
        "in time",
        "first token p50/p95",
        "answer p50/p95",
        "tokens/s",
        "failures",
    ):
        table.add_column(title)
    for name, item in data["pools"].items():
        failures = ", ".join(f"{count} {kind}" for kind, count in item["errors"].items())
        times = [f"{_seconds(item[key], 'p50')} / {_seconds(item[key], 'p95')}" for key in ("ttft_s", "e2e_s")]
        counts = [str(item[key]) for key in ("requests", "answered", "in_time")]
        table.add_row(name, *counts, *times, f"{item['tokens_per_s']:.1f}", failures)
    console.print(table)
    for words in data["broken"]:
        console.print(Text(words, style="red"))
    if data["went_quiet"]:
        console.print(Text(f"answered at first and no more later: {', '.join(data['went_quiet'])}", style="yellow"))


def _seconds(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.2f} s" if name in values else "-"
