"""The recorded farm's Prometheus, made once for all tests that look at it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.monitoring import figures
from tests.monitoring.recorded import recorded


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Prometheus with two hours of a busy farm."""
    with recorded(tmp_path_factory.mktemp("recorded"), figures.text()) as url:
        yield url
