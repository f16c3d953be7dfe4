"""From a load test to limits that hold, unattended, on real llama-servers in containers (004-58, 004-F2)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.build import build_plan
from corral.config.load import load_inventory
from tests.compose.site_up import CORRAL, Site, site_in
from tests.processes.helpers import REPOSITORY

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

OBJECTIVE = "objective: {availability_percent: 95, first_token_s: 6, answer_s: 12, in_time_percent: 80}"
SWEEP = ("--warm-s", "8", "--steps", "0.3,3", "--step-s", "8", "--step-requests", "12", "--repeats", "1")
SHORT = ("--max-tokens", "24")


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_in(tmp_path_factory.mktemp("capacity")) as site:
        site.edit("\n  solo:", f"\n    {OBJECTIVE}\n    queue: {{depth: 200, timeout_s: 60}}\n  solo:")
        site.corral("render", "--quiet")
        site.corral("secrets", "init")
        site.corral("up")
        yield site


def asked(site: Site, *words: str) -> str:
    """What a verb prints that only reads and changes files."""
    command = [*CORRAL, *words, "--inventory", str(site.inventory)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout


def test_sweep_report_apply_up_verify(site: Site, tmp_path: Path) -> None:
    run = tmp_path / "run"
    site.corral("bench", "sweep", "--pool", "chat", *SWEEP, *SHORT, "--to", str(run))
    capacity = json.loads((run / "result.json").read_text())["pools"]["chat"]["capacity"]
    assert 0 < capacity["safe_rpm"] < capacity["knee_rpm"]
    assert capacity["survives_rpm"] == pytest.approx(capacity["knee_rpm"] / 2)
    assert capacity["slots"] == 4
    page = (run / "report.html").read_text()
    assert "ua-chat-1" in page
    assert "ua-chat-2" in page

    assert f"rpm: {int(capacity['safe_rpm'])}" in asked(site, "bench", "apply", "--run", str(run))
    asked(site, "bench", "apply", "--run", str(run), "--write")
    assert "# one machine" in site.inventory.read_text()
    assert build_plan(load_inventory(site.inventory)).inventory.pools["chat"].limits.rpm == int(capacity["safe_rpm"])
    site.corral("up", "--render")

    checked = tmp_path / "verify"
    site.corral("bench", "verify", "--pool", "chat", "--at-s", "8", "--above-s", "45", *SHORT, "--to", str(checked))
    found = json.loads((checked / "verify.json").read_text())["pools"]["chat"]
    assert found["at"]["answered"] == found["at"]["requests"]
    assert found["above"]["errors"]["refused"] == found["above"]["refused_saying_when"] > 0
