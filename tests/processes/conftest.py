"""One farm for each mode of balancing, started once for all the tests that want it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import preloaded
from tests.processes.farm import POOLS, Farm, running


@pytest.fixture(scope="session", autouse=True)
def _no_litellm_stays() -> Iterator[None]:
    yield
    preloaded.end()


@pytest.fixture(scope="session")
def running_farm(request: pytest.FixtureRequest) -> Iterator[Farm]:
    with running(request.param) as farm:
        yield farm


@pytest.fixture
def farm(running_farm: Farm) -> Farm:
    """The farm of the mode that the test is for (see `in_modes`), with fakes that answer and have seen nothing."""
    running_farm.fakes.tell([name for pool in POOLS.values() for name in pool])
    running_farm.fakes.reset()
    return running_farm
