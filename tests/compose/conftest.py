"""Real Docker engine: two groups of modules, each one module at a time, since a group's names and ports are alike."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.engine_groups import GROUPS, group_of
from tests.processes.helpers import wait_until

LOCK = Path(tempfile.gettempdir()) / f"corral-compose-tests-{os.getuid()}"
LOCK_LIMIT_S = 900


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine, in which no other test or benchmark uses the names and ports of this module's group."""
    with engine_alone(group_of(request.path.stem)):
        yield


@contextmanager
def engine_alone(*groups: str) -> Iterator[None]:
    """No other test or benchmark uses the names and ports of these groups (all of them by default) in the block."""
    with ExitStack() as stack:
        for group in groups or GROUPS:
            lock = stack.enter_context(LOCK.with_name(f"{LOCK.name}-{group}").open("w"))
            wait_until(partial(_is_locked, lock.fileno()), LOCK_LIMIT_S, f"the engine free of other runs ({lock.name})")
        yield


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
