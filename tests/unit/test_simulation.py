"""The simulation of a pool against formulas of queueing theory, and against a second way to count the same queue."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.whatif.simulation import Fate, Station, Trace, make_trace, replay, simulate

pytestmark = pytest.mark.slow

ARRIVALS = 40_000
# A queue that is never full, and clients that never give up.
ENDLESS = 1_000_000


def open_queue(slots: int, load: float, cv: float = 1.0) -> Station:
    """Answers of one second each, at a share of what the slots can do, and a queue without bounds."""
    return Station("chat", slots, load * slots, 1.0, cv, queue_depth=ENDLESS, queue_timeout_s=ENDLESS)


def erlang_c(slots: int, offered: float) -> float:
    """Share of requests that have to wait (M/M/c)."""
    blocking = 1.0
    for servers in range(1, slots + 1):
        blocking = offered * blocking / (servers + offered * blocking)
    return blocking / (1 - offered / slots * (1 - blocking))


# --- known formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.8])
def test_one_slot_waits_as_m_m_1_does(load: float) -> None:
    found = simulate(open_queue(1, load), arrivals=ARRIVALS)
    assert found.mean_wait_s == pytest.approx(load / (1 - load), rel=0.08)
    assert found.p95_wait_s == pytest.approx(math.log(load / 0.05) / (1 - load), rel=0.1)
    assert found.busy_share == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize(("slots", "load"), [(3, 0.5), (3, 0.7), (3, 0.85), (7, 0.85), (16, 0.8)])
def test_many_slots_wait_as_erlang_says(slots: int, load: float) -> None:
    found = simulate(open_queue(slots, load), arrivals=ARRIVALS)
    expected = erlang_c(slots, load * slots) / (slots * (1 - load))
    assert found.mean_wait_s == pytest.approx(expected, rel=0.1)
    assert found.answered_per_s == pytest.approx(load * slots, rel=0.02)
    assert found.refused_share == 0


@pytest.mark.parametrize("cv", [0.0, 0.5, 2.0])
def test_the_spread_of_answers_counts_as_pollaczek_and_khinchine_say(cv: float) -> None:
    """Fixed answers (M/D/1) wait half as long as exponential ones."""
    load = 0.7
    found = simulate(open_queue(1, load, cv), arrivals=2 * ARRIVALS)
    assert found.mean_wait_s == pytest.approx(load / (1 - load) * (1 + cv**2) / 2, rel=0.1)


def test_what_is_under_way_is_rate_times_time() -> None:
    """Little's law, from the trace itself: the mean of what waits and works, counted over time."""
    station = open_queue(4, 0.8)
    trace = make_trace(station, 20_000)
    replayed = replay(station, trace)
    changes = []
    for at, wait, answer in zip(trace.arrivals, replayed.waits_s, trace.answers, strict=True):
        changes += [(at, 1), (at + wait + answer, -1)]
    area = count = 0.0
    before = 0.0
    for at, change in sorted(changes):
        area, before = area + count * (at - before), at
        count += change
    mean_time = sum(map(sum, zip(replayed.waits_s, trace.answers, strict=True))) / len(trace.arrivals)
    assert area / before == pytest.approx(len(trace.arrivals) / before * mean_time)


@pytest.mark.parametrize(("load", "depth"), [(0.5, 2), (0.9, 4), (1.0, 10), (3.0, 10)])
def test_a_bounded_queue_refuses_as_m_m_1_k_does(load: float, depth: int) -> None:
    station = replace(open_queue(1, load), queue_depth=depth)
    found = simulate(station, arrivals=ARRIVALS)
    room = depth + 1
    blocked = 1 / (room + 1) if load == 1 else (1 - load) * load**room / (1 - load ** (room + 1))
    assert found.refused_share == pytest.approx(blocked, rel=0.08)
    assert found.answered_per_s == pytest.approx(load * (1 - blocked), rel=0.02)
    assert found.limited_share == 0


def test_without_a_queue_slots_refuse_as_erlang_says() -> None:
    offered, blocking = 4.0, 1.0
    for servers in range(1, 6):
        blocking = offered * blocking / (servers + offered * blocking)
    found = simulate(replace(open_queue(5, 0.8), queue_depth=0), arrivals=ARRIVALS)
    assert found.refused_share == pytest.approx(blocking, rel=0.05)
    assert found.mean_wait_s == 0


# --- patience ---------------------------------------------------------------------------------------------------------


def test_nobody_waits_longer_than_the_timeout() -> None:
    patient = open_queue(2, 1.5)
    found = simulate(replace(patient, queue_timeout_s=3.0), arrivals=20_000)
    assert found.mean_wait_s <= found.p95_wait_s <= 3.0
    assert found.busy_share > 0.98
    assert found.answered_per_s == pytest.approx(2, rel=0.03)
    assert found.refused_share == pytest.approx(1 / 3, abs=0.02)


def test_a_trace_of_known_fate() -> None:
    """One slot, two in the queue, two seconds of patience."""
    station = Station("chat", 1, 1.0, 1.0, queue_depth=2, queue_timeout_s=2.0)
    trace = Trace([0.0, 0.5, 1.0, 1.5, 4.0], [3.5, 1.0, 0.5, 1.0, 1.0], 4.0)
    replayed = replay(station, trace)
    assert replayed.fates == ["answered", "late", "late", "full", "answered"]
    assert replayed.waits_s == [0.0, 2.0, 2.0, 0.0, 0.0]


class _Run:
    """The same queue with events of simpy: one process for each request that waits."""

    def __init__(self, station: Station, trace: Trace) -> None:
        self.station, self.trace = station, trace
        self.env = simpy.Environment()
        # A counter, not a simpy.Resource: that one looks through all its users at each release.
        self.free = simpy.Container(self.env, capacity=station.slots, init=station.slots)
        self.waits_s = [0.0] * len(trace.arrivals)
        self.fates: list[Fate] = ["full"] * len(trace.arrivals)

    def arrive(self) -> Generator[simpy.Event, Any, None]:
        """Requests in their order; a request that finds the queue full leaves."""
        for number, at in enumerate(self.trace.arrivals):
            yield self.env.timeout(max(0.0, at - self.env.now))
            if self.free.level:
                self.free.get(1)
                self.begin(number)
            elif len(self.free.get_queue) < self.station.queue_depth:
                self.env.process(self.wait(number))

    def wait(self, number: int) -> Generator[simpy.Event, Any, None]:
        """One request in the queue, until a slot is free or it has waited too long."""
        came = self.env.now
        slot = self.free.get(1)
        yield slot | self.env.timeout(self.station.queue_timeout_s)
        self.waits_s[number] = self.env.now - came
        if slot.triggered:
            self.begin(number)
        else:
            slot.cancel()
            self.fates[number] = "late"

    def begin(self, number: int) -> None:
        """An answer on a slot that is taken already. No process for each: that takes three times as long."""
        self.fates[number] = "answered"
        end = self.env.timeout(self.trace.answers[number])
        end.callbacks.append(self.end)

    def end(self, _event: simpy.Event) -> None:
        """The slot goes to the request that has waited longest."""
        self.free.put(1)


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 6), load=st.floats(0.2, 3), depth=st.integers(0, 12), timeout=st.floats(0.1, 5),
    cv=st.sampled_from([0.3, 1.0, 1.7]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_request_fares_as_in_a_second_way_to_count(
    slots: int, load: float, depth: int, timeout: float, cv: float, seed: int
) -> None:
    station = Station("chat", slots, load * slots, 1.0, cv, depth, timeout)
    trace = make_trace(station, 300, seed)
    replayed = replay(station, trace)
    expected = _Run(station, trace)
    expected.env.process(expected.arrive())
    expected.env.run()
    assert replayed.fates == expected.fates
    assert replayed.waits_s == pytest.approx(expected.waits_s, abs=1e-6)


# --- the gateway's limit ----------------------------------------------------------------------------------------------


def test_a_minute_lets_no_more_through_than_the_limit() -> None:
    station = Station("chat", 8, 2.0, 1.0, limit_rpm=60)
    trace = make_trace(station, 3000)
    minutes = [int(at // 60) for at in trace.arrivals]
    assert max(minutes.count(minute) for minute in set(minutes)) == 60
    found = simulate(station, arrivals=ARRIVALS // 10)
    assert found.limited_share == pytest.approx(0.5, abs=0.02)
    assert found.answered_per_s == pytest.approx(1.0, rel=0.02)


def test_a_limit_that_is_never_reached_changes_nothing() -> None:
    station = open_queue(4, 0.6)
    assert simulate(replace(station, limit_rpm=10_000), arrivals=20_000) == simulate(station, arrivals=20_000)


def test_a_limit_far_below_the_load_is_quick_to_simulate() -> None:
    found = simulate(Station("chat", 2, 1e6, 0.5, limit_rpm=30))
    assert found.refused_share == pytest.approx(1, abs=1e-4)
    assert 60 * found.answered_per_s <= 30.5


# --- chance -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same() -> None:
    station = Station("chat", 3, 2.0, 1.0)
    assert simulate(station) == simulate(station)
    assert simulate(station, seed=2) != simulate(station)


def test_another_spread_of_answers_meets_the_same_arrivals() -> None:
    station = Station("chat", 3, 2.0, 1.0)
    assert make_trace(station, 100).arrivals == make_trace(replace(station, answer_cv=0.2), 100).arrivals


def test_mean_and_spread_of_answers_are_as_given() -> None:
    answers = make_trace(Station("chat", 1, 1.0, 4.0, 0.5), 50_000).answers
    mean = sum(answers) / len(answers)
    assert mean == pytest.approx(4, rel=0.02)
    assert math.sqrt(sum((answer - mean) ** 2 for answer in answers) / len(answers)) == pytest.approx(2, rel=0.03)


def test_thousands_of_slots_find_their_level() -> None:
    found = simulate(Station("chat", 2000, 1800 / 5, 5.0))
    assert found.busy_share == pytest.approx(0.9, rel=0.03)
    assert found.mean_wait_s < 0.05


@pytest.mark.parametrize(
    ("change", "named"),
    [({"slots": 0}, "slots"), ({"rate_per_s": 0}, "rate_per_s"), ({"answer_s": -1}, "answer_s"),
     ({"limit_rpm": 0}, "limit_rpm"), ({"answer_cv": -0.1, "queue_depth": -1}, "answer_cv, queue_depth")],
)  # fmt: skip
def test_what_cannot_be_is_refused(change: dict[str, float], named: str) -> None:
    given: dict[str, float] = {"slots": 1, "rate_per_s": 1.0, "answer_s": 1.0} | change
    with pytest.raises(ValueError, match=f"chat: too small: {named}$"):
        Station("chat", **given)  # type: ignore[arg-type]
