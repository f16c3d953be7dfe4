"""`bench verify`: at its limit the pool holds its objective; above it, it refuses cleanly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from corral.config.inventory import Objective
from corral.errors import UsageError
from corral.files import write_atomically
from figures import Figures
from load import Load, run_load
from run import check_ways
from scenarios import Stage
from target import Target, objective_of, tasks_for, usual_long_share

# Times the limit.
ABOVE = 3.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """How long and with what."""

    pools: tuple[str, ...] = ()
    at_s: float = 60.0
    # Limits are counted by the clock's minute: a shorter load may fall into two of them and exceed neither.
    above_s: float = 60.0
    max_tokens: int = 128
    timeout_s: float = 120.0


def verify(target: Target, wanted: Wanted, folder: Path, talk: Console) -> dict[str, Any]:
    """Loads every pool that has a limit, first at it, then above; `broken` says what did not hold."""
    pools = {name: pool.limits.rpm for name, pool in target.plan.inventory.pools.items() if pool.limits.rpm}
    chosen = {name: limit for name, limit in pools.items() if not wanted.pools or name in wanted.pools}
    if not chosen:
        raise UsageError("none of these pools has limits.rpm; ./generate.py bench apply --write proposes limits")
    data: dict[str, Any] = {"pools": {}, "broken": []}
    for pool, limit in chosen.items():
        rate = (limit or 1) / 60
        share = target.long_share if target.long_share is not None else usual_long_share(target.plan, pool)
        tasks = tasks_for(target, [pool], share, wanted.max_tokens)
        check_ways(tasks)
        objective = objective_of(target.plan, pool)
        # Evenly spaced: a Poisson process of this rate is above a limit per minute in every other minute.
        at = Load(tasks, "burst", (Stage(wanted.at_s, 1, every_s=1 / rate),), timeout_s=wanted.timeout_s)
        above = Load(tasks, "open", (Stage(wanted.above_s, ABOVE * rate, ABOVE * rate),), timeout_s=wanted.timeout_s)
        found = {}
        for name, load in (("at", at), ("above", above)):
            found[name] = run_load(load, folder / pool / f"{name}.jsonl").figures(objective)
        broken = [f"{pool}: {words}" for words in judge(found["at"], found["above"], objective)]
        data["broken"] += broken
        data["pools"][pool] = {"limit_rpm": limit, **{name: asdict(figures) for name, figures in found.items()}}
        talk.print(Text(f"{pool}: limit {limit} a minute {'does not hold' if broken else 'holds'}"))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "verify.json", (json.dumps(data, indent=2) + "\n").encode(), 0o644)
    return data


def judge(at: Figures, above: Figures, objective: Objective) -> Sequence[str]:
    """What did not hold, in words."""
    words = []
    if not at.keeps(objective):
        words.append(
            f"at the limit {at.answered_percent:.1f} % were answered, {at.in_time_percent:.1f} % of them in time "
            f"({objective.availability_percent:g} % and {objective.in_time_percent:g} % wanted)"
        )
    others = {kind: count for kind, count in above.errors.items() if kind != "refused"}
    if others:
        told = ", ".join(f"{count} {kind}" for kind, count in others.items())
        words.append(f"above the limit requests failed instead of being refused: {told}")
    if not above.refused:
        words.append("above the limit no request was refused")
    elif above.refused_saying_when < above.refused:
        silent = above.refused - above.refused_saying_when
        words.append(f"above the limit {silent} refusals had no Retry-After")
    if above.in_time_percent < objective.in_time_percent:
        words.append(
            f"above the limit only {above.in_time_percent:.1f} % of the answers were in time, "
            f"{objective.in_time_percent:g} % wanted; is the queue too deep?"
        )
    return words
