"""Statistics of a load: percentiles, goodput, rates, and whether the queue grew. Pure.

docs/decisions/0014-measuring.md says what each figure means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, linear_regression, pvariance
from typing import Any

from corral.config.inventory import Objective

PERCENTILES = (50, 90, 95, 99)
# A slope this many times its own error is one (99 in a hundred, two sides).
SIGNIFICANT_T = 2.6
LEAST_FOR_SLOPE = 10
# Share of its mean by which a quantity has to grow over a step before growing matters.
LEAST_GROWTH = 0.5


@dataclass(frozen=True, slots=True)
class Figures:
    """Statistics of one load. Times in seconds, rates in requests (or tokens) per second."""

    requests: int
    answered: int
    # Answered within both times of the objective (goodput).
    in_time: int
    lasted_s: float
    sent_per_s: float
    answered_per_s: float
    goodput_per_s: float
    errors: dict[str, int]
    # Refusals with Retry-After.
    refused_saying_when: int
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    itl_s: dict[str, float]
    e2e_s: dict[str, float]
    lag_p99_s: float
    tokens_in_mean: float
    tokens_out_mean: float
    # In and out together, of answered requests.
    tokens_per_s: float
    # Rate times mean time (Little).
    in_flight_mean: float
    # Over-saturated: requests under way and the wait for the first token both grew significantly.
    is_growing: bool
    is_aborted: bool = False
    replicas: dict[str, int] = field(default_factory=dict)

    @property
    def answered_percent(self) -> float:
        """Share of answered requests, in percent."""
        return 100 * self.answered / self.requests if self.requests else 0.0

    @property
    def in_time_percent(self) -> float:
        """Share of answers in time, in percent of all answers."""
        return 100 * self.in_time / self.answered if self.answered else 0.0

    @property
    def refused(self) -> int:
        """Number of requests with 429."""
        return self.errors.get("refused", 0)

    def keeps(self, objective: Objective) -> bool:
        """Whether the farm can sustain the load within the objective."""
        return (
            not self.is_growing
            and not self.is_aborted
            and self.answered_percent >= objective.availability_percent
            and self.in_time_percent >= objective.in_time_percent
        )


def figures_of(
    rows: Sequence[Mapping[str, Any]], objective: Objective, lasts_s: float, *, is_aborted: bool = False
) -> Figures:
    """The statistics of a load.

    Args:
        rows: its requests, as load-tests/measured.py writes them.
        objective: what counts as in time.
        lasts_s: seconds in which requests were sent.
        is_aborted: whether it ended before its time.
    """
    good = [row for row in rows if not row["error"]]
    in_time = [row for row in good if is_in_time(row, objective)]
    tokens = sum(row["tokens_in"] + row["tokens_out"] for row in good)
    span = lasts_s or 1.0
    e2e = [row["e2e_s"] for row in good]
    return Figures(
        requests=len(rows), answered=len(good), in_time=len(in_time), lasted_s=span,
        sent_per_s=len(rows) / span, answered_per_s=len(good) / span, goodput_per_s=len(in_time) / span,
        errors=dict(Counter(row["error"] for row in rows if row["error"]).most_common()),
        refused_saying_when=sum(row["error"] == "refused" and row["says_when"] for row in rows),
        ttft_s=percentiles(row["ttft_s"] for row in good if row["ttft_s"] is not None),
        tpot_s=percentiles(_tpots(good)), itl_s=percentiles(gap for row in good for gap in row["gaps_s"]),
        e2e_s=percentiles(e2e), lag_p99_s=percentiles(row["lag_s"] for row in rows).get("p99", 0.0),
        tokens_in_mean=_mean(row["tokens_in"] for row in good),
        tokens_out_mean=_mean(row["tokens_out"] for row in good),
        tokens_per_s=tokens / span, in_flight_mean=sum(e2e) / span, is_growing=is_growing(rows), is_aborted=is_aborted,
        replicas=dict(sorted(Counter(row["replica"] for row in good).items())),
    )  # fmt: skip


def is_in_time(row: Mapping[str, Any], objective: Objective) -> bool:
    """Whether an answer met both time limits."""
    first = row["ttft_s"] if row["ttft_s"] is not None else 0.0
    return bool(first <= objective.first_token_s and row["e2e_s"] <= objective.answer_s)


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Percentiles by name (nearest rank, not interpolated); empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in PERCENTILES}


def is_growing(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether running requests and the time to the first token both grew from start to end."""
    ordered = sorted((row for row in rows if not row["error"]), key=lambda row: row["due_at"])
    at = [row["due_at"] - ordered[0]["due_at"] for row in ordered]
    first = [row["ttft_s"] if row["ttft_s"] is not None else row["e2e_s"] for row in ordered]
    return all(_grows(at, values) for values in ([row["in_flight"] for row in ordered], first))


def _grows(at: Sequence[float], values: Sequence[float]) -> bool:
    """Whether a line through the points rises significantly and substantially."""
    count = len(at)
    if count < LEAST_FOR_SLOPE or len(set(at)) == 1 or not any(values):
        return False
    slope, start = linear_regression(at, values)
    rest = sum((value - start - slope * moment) ** 2 for moment, value in zip(at, values, strict=True))
    error = math.sqrt(rest / (count - 2) / (pvariance(at) * count))
    return slope > SIGNIFICANT_T * error and slope * (at[-1] - at[0]) > LEAST_GROWTH * fmean(values)


def _tpots(rows: Iterable[Mapping[str, Any]]) -> Iterable[float]:
    for row in rows:
        if row["ttft_s"] is not None and row["tokens_out"] > 1:
            yield (row["e2e_s"] - row["ttft_s"]) / (row["tokens_out"] - 1)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0
