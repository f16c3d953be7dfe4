"""What users' scripts relied on in 9bd54e3 is still there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FROZEN = json.loads((HERE / "contract_9bd54e3.json").read_text())
# What was taken away on purpose, and why.
GONE = {
    "grafana check": "the kit's own tests check the pages",
    "grafana push": "--out was for the site's own Grafana, which has the pages anyway",
    "vllm-open": "the server asks for a key behind an edge",
}
# Exit codes that are others on purpose, and why.
CHANGED = {"up -i GOOD -o OUT": 3}  # a site without Docker can be brought up; nothing is rendered for it yet


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    made = subprocess.run([sys.executable, HERE / "contract.py"], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def test_every_command_has_its_options(now: dict[str, Any]) -> None:
    for command, options in FROZEN["commands"].items():
        assert command in GONE or set(options) <= set(now["commands"][command]), command


def test_rules_keep_their_ids(now: dict[str, Any]) -> None:
    assert set(FROZEN["rules"]) - GONE.keys() <= set(now["rules"])


def test_exit_codes_are_the_same(now: dict[str, Any]) -> None:
    assert now["exit_codes"] == FROZEN["exit_codes"] | CHANGED


def test_plan_as_json_has_what_it_had(now: dict[str, Any]) -> None:
    assert set(FROZEN["plan"]) <= set(now["plan"])
