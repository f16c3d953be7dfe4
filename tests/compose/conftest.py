"""Real Docker engine: one module at a time, because rendered container names and ports are the same for everybody."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes.helpers import wait_until

LOCK = Path(tempfile.gettempdir()) / f"corral-compose-tests-{os.getuid()}.lock"
LOCK_LIMIT_S = 900


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """The engine for this test run alone, also when several run on this machine."""
    with engine_alone():
        yield


@contextmanager
def engine_alone() -> Iterator[None]:
    """Nobody else's test or benchmark uses the engine for as long as the block lasts."""
    with LOCK.open("w") as lock:
        wait_until(lambda: _is_locked(lock.fileno()), LOCK_LIMIT_S, f"the engine free of other test runs ({LOCK})")
        yield


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
