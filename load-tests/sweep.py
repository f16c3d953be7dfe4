"""`bench sweep`: measures the capacity of every pool in steps of rising rate; an interrupted sweep can continue."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from capacity import Step, capacity_of
from corral.build import Plan
from corral.errors import CorralError, UsageError
from corral.files import write_atomically
from corral.whatif.measured import RESULT_FILE, bench_folder, fingerprint
from figures import Figures
from load import Load, run_load
from prompts import VERSION
from run import check_ways
from scenarios import Stage
from target import (
    Target,
    backends_of,
    chosen_pools,
    kind_of,
    objective_of,
    tasks_for,
    usual_long_share,
)
from telemetry import figures_between

KINDS = ("chat", "embedding", "rerank")
RUN_FILE = "run.json"
MOST_FAILURES = 0.2
MOST_SHARE = 20.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Settings of a sweep."""

    pools: tuple[str, ...] = ()
    # Rates of the steps, as shares of what the full pool answered.
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3)
    step_s: float = 300.0
    least_requests: int = 100
    warm_s: float = 60.0
    repeats: int = 3
    max_tokens: int = 128
    long_share: float | None = None
    timeout_s: float = 120.0
    is_direct: bool = False


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares from `0.5,0.8,1.2`; raises UsageError for other text."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= MOST_SHARE for share in found):
        raise UsageError(f"--steps {text}: write shares of the full pool's rate, such as 0.5,0.8,1.2")
    return found


def new_run() -> str:
    """The name of a new run."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def find_run(plan: Plan, name: str, *, is_whole: bool = True) -> Path:
    """The folder of a run by path or name, or the newest; raises UsageError if there is none."""
    wanted = RESULT_FILE if is_whole else RUN_FILE
    if name:
        folder = next((path for path in (Path(name), bench_folder(plan) / name) if (path / wanted).exists()), None)
        if folder is None:
            raise UsageError(f"{name}: no {'finished ' if is_whole else ''}run of bench sweep")
        return folder
    found = sorted(path.parent for path in bench_folder(plan).glob(f"*/{wanted}"))
    if not found:
        raise UsageError(f"no run in {bench_folder(plan)}; ./generate.py bench sweep makes one")
    return found[-1]


def sweep(target: Target, wanted: Wanted, folder: Path, talk: Console) -> dict[str, Any]:
    """Starts or continues a measurement, and returns the content of the folder's result.json.

    Raises CorralError when the farm does not answer, or was changed since the run began.
    """
    target = replace(target, is_direct=wanted.is_direct, max_tokens=wanted.max_tokens)
    pools = chosen_pools(target.plan, wanted.pools, KINDS)
    _begin(target.plan, wanted, pools, folder)
    result: dict[str, Any] = {
        "run": folder.name, "site": target.plan.inventory.name, "wanted": asdict(wanted), "pools": {},
        "prompts": VERSION,
    }  # fmt: skip
    for pool in pools:
        result["pools"][pool] = _measured(target, wanted, pool, folder, talk)
    write_atomically(folder / RESULT_FILE, _json(result), 0o644)
    return result


def read_wanted(folder: Path) -> Wanted:
    """Settings of an earlier run."""
    data = json.loads((folder / RUN_FILE).read_text())["wanted"]
    return Wanted(**data | {"pools": tuple(data["pools"]), "shares": tuple(data["shares"])})


def _begin(plan: Plan, wanted: Wanted, pools: list[str], folder: Path) -> None:
    marks = {pool: fingerprint(plan, pool) for pool in pools}
    file = folder / RUN_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_atomically(file, _json({"wanted": asdict(wanted), "marks": marks}), 0o644)
    elif json.loads(file.read_text())["marks"] != marks:
        raise CorralError(f"{folder}: the farm was changed since this run began; start a new one")


def _measured(target: Target, wanted: Wanted, pool: str, folder: Path, talk: Console) -> dict[str, Any]:
    objective, slots = objective_of(target.plan, pool), [one.slots for one in backends_of(target.plan, pool)]
    share = wanted.long_share if wanted.long_share is not None else usual_long_share(target.plan, pool)
    tasks = tasks_for(replace(target, long_share=None), [pool], share, wanted.max_tokens)
    check_ways(tasks)
    base = Load(tasks, "open", (), timeout_s=wanted.timeout_s, error_budget=MOST_FAILURES)
    estimate = _estimate(base, wanted, pool, folder, sum(slots))
    talk.print(Text(f"{pool}: full, it answers {60 * estimate:.0f} requests a minute"))
    if not estimate:
        raise CorralError(f"{pool} answered nothing in {wanted.warm_s:g} s with every slot in use; give it longer")
    steps = list(_steps(target, base, wanted, pool, folder, estimate, talk))
    found = capacity_of(steps, slots, objective)
    # A resumed run made its steps in any order.
    began, ended = min(step.began for step in steps), max(step.ended for step in steps)
    return {
        "kind": kind_of(target.plan, pool), "mark": fingerprint(target.plan, pool), "estimate_rpm": 60 * estimate,
        "long_share": share, "objective": objective.model_dump(), "hardware": hardware(target.plan, pool),
        "capacity": asdict(found), "steps": [asdict(step) for step in steps],
        "telemetry": figures_between(target.plan, pool, began, ended),
    }  # fmt: skip


def _estimate(base: Load, wanted: Wanted, pool: str, folder: Path, slots: int) -> float:
    """Answers per second with all slots in use. The first half is warm-up and does not count."""
    record = folder / pool / "full.json"
    if record.exists():
        return float(json.loads(record.read_text())["rate"])
    load = replace(base, loop="closed", stages=(Stage(wanted.warm_s, slots),), error_budget=None)
    found = run_load(load, folder / pool / "full.jsonl")
    ends = sorted(row["due_at"] + row["e2e_s"] for row in found.requests if not row["error"])
    late = ends[len(ends) // 2 :]
    rate = (len(late) - 1) / (late[-1] - late[0]) if len(late) > 1 and late[-1] > late[0] else 0.0
    if rate:
        write_atomically(record, _json({"rate": rate}), 0o644)
    return rate


def _steps(  # noqa: PLR0913, PLR0917 - what a step needs to know
    target: Target, base: Load, wanted: Wanted, pool: str, folder: Path, estimate: float, talk: Console
) -> Iterator[Step]:
    """Runs every step of every repeat; a repeat ends with the first step that does not hold."""
    for repeat in range(1, wanted.repeats + 1):
        for share in sorted(wanted.shares):
            step = _step(target, base, wanted, pool, folder, (repeat, share, share * estimate))
            words = "holds" if step.holds else "over-saturated" if step.figures.is_growing else "falls short"
            talk.print(
                Text(
                    f"{pool} {repeat}/{wanted.repeats}: {60 * step.rate:.0f} a minute {words} "
                    f"({step.figures.answered_percent:.0f} % answered, {step.figures.in_time_percent:.0f} % in time)"
                )
            )
            yield step
            if not step.holds:
                break


def _step(target: Target, base: Load, wanted: Wanted, pool: str, folder: Path, at: tuple[int, float, float]) -> Step:
    repeat, share, rate = at
    record = folder / pool / f"{repeat}-{share:g}.json"
    if record.exists():
        data = json.loads(record.read_text())
        return Step(**data | {"figures": Figures(**data["figures"])})
    lasts_s = max(wanted.step_s, wanted.least_requests / rate)
    objective = objective_of(target.plan, pool)
    load = replace(base, stages=(Stage(lasts_s, rate, rate),), seed=1000 * repeat + round(100 * share))
    began = time.time()
    figures = run_load(load, record.with_suffix(".jsonl")).figures(objective)
    step = Step(repeat, share, rate, began, time.time(), figures, figures.keeps(objective))
    write_atomically(record, _json(asdict(step)), 0o644)
    return step


def hardware(plan: Plan, pool: str) -> str:
    """Hardware and model of a pool, for people."""
    replicas = [replica for replica in plan.site.replicas if replica.pool == pool]
    nodes = sum(1 for item in plan.inventory.pools[pool].on if item.node)
    words = Counter(" + ".join(card.card for card in replica.cards) or "processor" for replica in replicas)
    if nodes:
        words["node"] = nodes
    return ", ".join(f"{count} × {name}" for name, count in words.items())


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
