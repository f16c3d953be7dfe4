"""What the plan computes against what llama.cpp's server reports, for every architecture made here (004-13, 14, F6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model_files import NAMES, make_random_model
from tools.bench_memory import HIGHEST, LOWEST, cases_of, compare


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_what_the_server_takes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make_random_model(name, path)
    for case in cases_of(name)[:3]:
        row = compare(path, name, case)
        assert LOWEST <= row["error_percent"] <= HIGHEST, row
        for kind in ("model", "cache"):
            assert row["estimated_mib"][kind] == pytest.approx(row["reported_mib"][kind], rel=0.01, abs=0.02), row
