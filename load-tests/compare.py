"""`bench compare`: compares two sweeps; only changes beyond the noise of both count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corral.whatif.measured import RESULT_FILE

LEAST_NOISE_PERCENT = 5.0
Verdict = Literal["better", "worse", "within the noise"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One pool in two runs."""

    pool: str
    before_rpm: float
    after_rpm: float
    change_percent: float
    noise_percent: float
    verdict: Verdict
    note: str = ""

    @property
    def words(self) -> str:
        """For people."""
        rates = f"{self.before_rpm:.1f} -> {self.after_rpm:.1f} requests a minute at the knee"
        change = f"{self.change_percent:+.1f} %, noise {self.noise_percent:.1f} %"
        return f"{self.pool}: {rates} ({change}): {self.verdict}{f'; {self.note}' if self.note else ''}"


def compare_runs(before: Path, after: Path) -> list[Comparison]:
    """Every pool of both runs, compared by its knee."""
    old, new = (json.loads((folder / RESULT_FILE).read_text())["pools"] for folder in (before, after))
    return [_compared(pool, old[pool], new[pool]) for pool in old if pool in new]


def _compared(pool: str, old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    before, after = old["capacity"]["knee_rpm"], new["capacity"]["knee_rpm"]
    change = 100 * (after - before) / before if before else 0.0
    noise = max(LEAST_NOISE_PERCENT, old["capacity"]["noise_percent"], new["capacity"]["noise_percent"])
    verdict: Verdict = "within the noise" if abs(change) <= noise else "better" if change > 0 else "worse"
    note = "" if old["mark"] == new["mark"] else "other hardware, model or settings"
    return Comparison(pool, before, after, change, noise, verdict, note)
