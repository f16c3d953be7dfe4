"""The simulation beside the real balancer: the very same requests through both."""

from __future__ import annotations

import pytest

from corral.whatif.simulation import Station
from tests.processes.farm import EVEN, EVEN_DEPTH, Farm, in_modes
from tests.processes.replaying import Compared, Way, compare, trace_of

ANSWER_S = 0.4
MIXED_SLOTS = 7
LASTS_S = 15.0


def compared(farm: Farm, pool: str, slots: int, depth: int, load: float) -> Compared:
    station = Station(pool, slots, load * slots / ANSWER_S, ANSWER_S, queue_depth=depth, queue_timeout_s=24)
    return compare(Way.to(farm, pool), station, trace_of(station, LASTS_S, seed=round(100 * load)))


@in_modes("slots")
def test_below_the_knee_all_are_answered_as_simulated(farm: Farm) -> None:
    """007-5; how well waits agree is measured on an idle machine: docs/benchmarks/simulation.json."""
    found = compared(farm, "mixed", MIXED_SLOTS, 40, 0.85)
    assert found.measured_refused == found.simulated_refused == 0
    assert found.simulated_wait_s > 0
    assert found.measured_wait_s > 0


@in_modes("slots")
def test_refusals_of_an_overloaded_pool_are_as_simulated(farm: Farm) -> None:
    found = compared(farm, "even", len(EVEN), EVEN_DEPTH, 1.4)
    assert found.measured_refused > 0.1
    assert found.simulated_refused == pytest.approx(found.measured_refused, abs=0.1), found
