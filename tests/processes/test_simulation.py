"""The simulation beside the real balancer: the very same requests through both."""

from __future__ import annotations

import pytest

from corral.whatif.simulation import Station
from tests.processes.farm import EVEN, EVEN_DEPTH, Farm, in_modes
from tests.processes.replaying import Compared, Way, compare, trace_of

ANSWER_S = 0.4
MIXED_SLOTS = 7
LASTS_S = 25.0


def compared(farm: Farm, pool: str, slots: int, depth: int, load: float) -> Compared:
    station = Station(pool, slots, load * slots / ANSWER_S, ANSWER_S, queue_depth=depth, queue_timeout_s=24)
    return compare(Way.to(farm, pool), station, trace_of(station, LASTS_S, seed=round(100 * load)))


@in_modes("slots")
@pytest.mark.parametrize("load", [0.5, 0.7, 0.85])
def test_waits_below_the_knee_are_as_simulated(farm: Farm, load: float) -> None:
    """007-5; docs/benchmarks/simulation.json has the exact figures of an idle machine."""
    found = compared(farm, "mixed", MIXED_SLOTS, 40, load)
    assert found.measured_refused == found.simulated_refused == 0
    assert found.simulated_wait_s == pytest.approx(found.measured_wait_s, rel=0.25, abs=0.02), found


@in_modes("slots")
def test_refusals_of_an_overloaded_pool_are_as_simulated(farm: Farm) -> None:
    found = compared(farm, "even", len(EVEN), EVEN_DEPTH, 1.4)
    assert found.measured_refused > 0.1
    assert found.simulated_refused == pytest.approx(found.measured_refused, abs=0.05), found
    assert found.simulated_wait_s == pytest.approx(found.measured_wait_s, rel=0.25), found
