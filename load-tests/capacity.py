"""Capacity of a pool from the steps of a sweep: knee, safe, N-1, slots, queue allowance, noise. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from corral.config.inventory import Objective
from figures import Figures

SAFE = 0.8
# Times the slowest measured answers, for the longest time that one may take.
SLOWEST_MARGIN = 1.5


@dataclass(frozen=True, slots=True)
class Step:
    """One load of a sweep."""

    repeat: int
    # Of the estimated capacity.
    share: float
    # Requests a second that were asked for.
    rate: float
    began: float
    ended: float
    figures: Figures
    holds: bool


@dataclass(frozen=True, slots=True)
class Capacity:
    """Capacity of a pool. Rates in requests per minute and tokens per minute."""

    knee_rpm: float
    safe_rpm: float
    # With its largest replica lost (N-1); None: there is only one.
    survives_rpm: float | None
    tokens_per_request: float
    slots: int
    # Requests under way at the knee (Little); near the slots when the pool is full.
    in_flight: float
    queue_depth: int
    queue_timeout_s: int
    timeout_s: int
    noise_percent: float
    # Whether a step was reached that did not hold; otherwise the pool holds at least this.
    is_bounded: bool


def capacity_of(steps: Sequence[Step], slots: Sequence[int], objective: Objective) -> Capacity:
    """The capacity of a pool from its steps.

    Args:
        steps: of all repeats; at least one.
        slots: of each replica.
        objective: what the steps were judged by.
    """
    repeats = [[step for step in steps if step.repeat == number] for number in sorted({step.repeat for step in steps})]
    knees = [_knee(repeat) for repeat in repeats]
    rates = [step.figures.answered_per_s if step else 0.0 for step in knees]
    lowest = knees[rates.index(min(rates))]
    knee = min(rates)
    lightest = min(steps, key=lambda step: step.rate).figures
    first = (lightest.ttft_s or lightest.e2e_s).get("p95", 0.0)
    allowance = max(0.0, min(objective.first_token_s, objective.answer_s) - first)
    figures = lowest.figures if lowest else lightest
    slowest = figures.e2e_s.get("p99", 0.0)
    total = sum(slots)
    return Capacity(
        knee_rpm=60 * knee, safe_rpm=60 * knee * SAFE,
        survives_rpm=60 * knee * (total - max(slots)) / total if len(slots) > 1 else None,
        tokens_per_request=figures.tokens_in_mean + figures.tokens_out_mean, slots=total,
        in_flight=figures.in_flight_mean, queue_depth=math.floor(allowance * knee),
        queue_timeout_s=max(1, math.ceil(allowance)),
        timeout_s=math.ceil(max(objective.answer_s, SLOWEST_MARGIN * slowest)),
        noise_percent=noise(rates), is_bounded=any(not step.holds for step in steps),
    )  # fmt: skip


def noise(rates: Sequence[float]) -> float:
    """Spread of the repeats, in percent of their mean."""
    mean = sum(rates) / len(rates)
    return 100 * (max(rates) - min(rates)) / mean if mean else 0.0


def _knee(steps: Sequence[Step]) -> Step | None:
    """The last step that held before the first that did not."""
    last = None
    for step in sorted(steps, key=lambda step: step.rate):
        if not step.holds:
            return last
        last = step
    return last
