"""What a pool does under a load: waits, answers, refusals, from slots, one bounded queue and a minute's limit. Pure.

The pool is simulated as HAProxy runs it: a request that finds a free slot is answered at once, the others
wait in the order in which they came, a full queue refuses, and so does a wait beyond its longest. Requests come by
chance at a steady mean rate (Poisson). In front of that the gateway counts a pool's requests by the minute.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

LEAST_ARRIVALS = 20_000
ARRIVALS_PER_SLOT = 20
MOST_ARRIVALS = 1_000_000
# Of the simulated time: a farm that was empty a moment ago says nothing of one that runs.
WARM_SHARE = 0.25
MINUTE_S = 60.0
# How many minutes are simulated where some of them reach the gateway's limit.
LEAST_MINUTES = 10
# Standard deviations above its mean that a minute's number of requests hardly ever reaches.
RARE = 4
SEED = 1

# `full`: refused at once; `late`: refused after the longest wait.
Fate = Literal["answered", "full", "late"]


@dataclass(frozen=True, slots=True)
class Station:
    """A pool and its load."""

    pool: str
    # Requests that it works on at the same time.
    slots: int
    # Requests a second that clients ask for.
    rate_per_s: float
    # Mean seconds of an answer, the wait left out.
    answer_s: float
    # How much answers differ: their standard deviation by their mean (gamma); 1: exponential, 0: all alike.
    answer_cv: float = 1.0
    queue_depth: int = 10
    queue_timeout_s: float = 60.0
    # Requests that the gateway lets through in one minute of the clock; None: all.
    limit_rpm: int | None = None

    def __post_init__(self) -> None:
        above_zero = ("slots", "rate_per_s", "answer_s", *(["limit_rpm"] if self.limit_rpm is not None else []))
        wrong = [name for name in above_zero if getattr(self, name) <= 0]
        wrong += [name for name in ("answer_cv", "queue_depth", "queue_timeout_s") if getattr(self, name) < 0]
        if wrong:
            raise ValueError(f"{self.pool}: too small: {', '.join(wrong)}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes of it, in the long run."""

    # Share of the slots in use, on average.
    busy_share: float
    # Seconds that answered requests waited for a slot.
    mean_wait_s: float
    p95_wait_s: float
    answered_per_s: float
    # Share of all requests that got 429, from the gateway or from the balancer.
    refused_share: float
    # The part of `refused_share` that the gateway's limit refused.
    limited_share: float


@dataclass(slots=True)
class Trace:
    """Requests that reach the balancer: when each comes, and how long its answer takes; both in seconds."""

    arrivals: Sequence[float] = ()
    answers: Sequence[float] = ()
    ends_s: float = 0.0
    # Periods in which the gateway refused all requests, since the minute's limit was reached.
    shut: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of each request of a trace."""

    # Seconds in the queue, also of those who left it in vain.
    waits_s: list[float]
    fates: list[Fate]


def simulate(station: Station, *, arrivals: int | None = None, seed: int = SEED) -> Outcome:
    """The outcome of a station's load; the same for the same seed.

    Args:
        station: the pool and its load.
        arrivals: how many requests are simulated at least; chosen by the number of slots when None.
        seed: of the chance by which requests come and answers differ.
    """
    usual = min(MOST_ARRIVALS, max(LEAST_ARRIVALS, ARRIVALS_PER_SLOT * station.slots))
    trace = make_trace(station, arrivals or usual, seed)
    return _outcome(station, trace, replay(station, trace))


def make_trace(station: Station, arrivals: int, seed: int = SEED) -> Trace:
    """At least so many requests by chance, those left out that the gateway refuses.

    Once a minute's limit is reached the rest of that minute is skipped: what comes by chance has no memory.
    """
    # Two of them, so that farms that differ in one thing only get the same requests.
    coming, working = random.Random(seed), random.Random(seed + 1)  # noqa: S311 - no secret
    asked, spread = station.rate_per_s * MINUTE_S, station.answer_cv**2
    meets_limit = station.limit_rpm is not None and asked + RARE * math.sqrt(asked) >= station.limit_rpm
    least_s = LEAST_MINUTES * MINUTE_S if meets_limit else 0.0
    most = max(arrivals, MOST_ARRIVALS)
    found: list[float] = []
    shut: list[tuple[float, float]] = []
    now, minute, count = 0.0, 0, 0
    while len(found) < arrivals or (now < least_s and len(found) < most):
        now += coming.expovariate(station.rate_per_s)
        if now >= (minute + 1) * MINUTE_S:
            minute, count = int(now // MINUTE_S), 0
        found.append(now)
        count += 1
        if count == station.limit_rpm:
            shut.append((now, (minute + 1) * MINUTE_S))
            now, minute, count = shut[-1][1], minute + 1, 0
    answers = [station.answer_s] * len(found)
    if spread:
        answers = [working.gammavariate(1 / spread, station.answer_s * spread) for _ in found]
    return Trace(found, answers, now, shut)


def replay(station: Station, trace: Trace) -> Replayed:
    """What becomes of every request of a trace at a station's slots and queue; its load is the trace's alone.

    Each request in turn takes the slot that is free first: all have the same patience, and none overtakes another.
    """
    free = [0.0] * station.slots
    # When each of those in the queue leaves it, for a slot or in vain; the first one first.
    leaves: deque[float] = deque()
    found = Replayed([], [])
    for at, answer_s in zip(trace.arrivals, trace.answers, strict=True):
        while leaves and leaves[0] <= at:
            leaves.popleft()
        wait_s = max(0.0, free[0] - at)
        fate: Fate = "answered"
        if wait_s and len(leaves) >= station.queue_depth:
            wait_s, fate = 0.0, "full"
        elif wait_s > station.queue_timeout_s:
            wait_s, fate = station.queue_timeout_s, "late"
        else:
            heapq.heapreplace(free, at + wait_s + answer_s)
        if wait_s:
            leaves.append(at + wait_s)
        found.waits_s.append(wait_s)
        found.fates.append(fate)
    return found


def _outcome(station: Station, trace: Trace, replayed: Replayed) -> Outcome:
    begins_s = trace.ends_s * WARM_SHARE
    span_s = trace.ends_s - begins_s
    waits = sorted(
        wait
        for at, wait, fate in zip(trace.arrivals, replayed.waits_s, replayed.fates, strict=True)
        if fate == "answered" and at >= begins_s
    )
    shut_s = sum(_overlap(start, end, begins_s, trace.ends_s) for start, end in trace.shut)
    limited = shut_s * station.rate_per_s
    asked = sum(at >= begins_s for at in trace.arrivals) + limited
    worked_s = sum(
        _overlap(at + wait, at + wait + answer, begins_s, trace.ends_s)
        for at, answer, wait, fate in zip(trace.arrivals, trace.answers, replayed.waits_s, replayed.fates, strict=True)
        if fate == "answered"
    )
    return Outcome(
        busy_share=worked_s / (station.slots * span_s),
        mean_wait_s=sum(waits) / len(waits) if waits else 0.0,
        p95_wait_s=waits[math.ceil(0.95 * len(waits)) - 1] if waits else 0.0,
        answered_per_s=len(waits) / span_s,
        refused_share=1 - len(waits) / asked,
        limited_share=limited / asked,
    )


def _overlap(start: float, end: float, low: float, high: float) -> float:
    """Seconds that two stretches of time have in common."""
    return max(0.0, min(end, high) - max(start, low))
