"""`bench` on a farm of real programs: Locust against LiteLLM and HAProxy, with fakes of known slots behind them."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.render.output import write
from corral.render.tree import render
from tests.processes.farm import EVEN, Extras, Farm, Mode, in_modes, inventory_of, running
from tests.processes.helpers import REPOSITORY

LIMIT_S = 400
# Verbs that go to the farm.
REACHING = ("run", "sweep", "verify")


def bench(farm: Farm, *words: str, code: int = 0, inventory: Path | None = None) -> str:
    """What a verb of `bench` prints; it has to end with the given code."""
    command = [sys.executable, "generate.py", "bench", *words]
    command += ["--inventory", str(inventory or farm.out / "inventory.yaml")]
    command += ["--out", str(farm.out)] if words[0] in REACHING else []
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return rows_in(folder / "requests.jsonl")


def rows_in(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if "end" not in line]


@in_modes("slots")
def test_a_scenario_goes_through_the_gateway_to_every_replica(farm: Farm, tmp_path: Path) -> None:
    """004-55, 004-57, 000-29: streamed through LiteLLM and HAProxy to one replica after the other."""
    farm.fakes.tell(EVEN, service_s=0.3)
    said = bench(farm, "run", "conversation", "--pool", "even", "--duration", "3", "--to", str(tmp_path))
    figures = json.loads((tmp_path / "figures.json").read_text())["pools"]["even"]
    rows = rows_of(tmp_path)
    assert figures["answered"] == figures["requests"] == len(rows) > 3, said
    assert set(figures["replicas"]) == set(EVEN)
    assert sum(farm.fakes.arrivals(EVEN).values()) == len(rows) + 1  # the one that looks whether the way is open
    assert any(len(body["messages"]) > 1 for seen in farm.fakes.seen().values() for body in seen.bodies)


@in_modes("slots")
def test_nothing_is_measured_where_the_way_is_broken(farm: Farm, tmp_path: Path) -> None:
    farm.fakes.tell(EVEN, "break")
    words = ("run", "soak", "--pool", "even", "--rate", "4", "--duration", "2", "--to", str(tmp_path))
    assert "nothing was measured" in bench(farm, *words, code=1)


@in_modes("slots")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "strees"), 'no scenario named "strees"; did you mean "stress"?'),
        (("run", "soak", "--pool", "even"), "say --rate"),
        (("run", "single", "--pool", "even", "--replica", "even-9"), 'no replica "even-9"'),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_sent(farm: Farm, words: tuple[str, ...], said: str) -> None:
    assert said in bench(farm, *words, code=2)
    assert sum(farm.fakes.arrivals(EVEN).values()) == 0


# What a fake of the pool `bench` takes for an answer: known capacity is slots / BUSY_S.
BUSY_S = 0.5
OBJECTIVE = {"availability_percent": 95, "first_token_s": 4, "answer_s": 8, "in_time_percent": 80}
SWEEP = ("--warm-s", "5", "--steps", "0.4,3", "--step-s", "5", "--step-requests", "8", "--repeats", "1")


def _with_objective(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    made = inventory_of(mode, ports, Extras(has_monitoring=extras.has_monitoring))
    even = {"on": made["pools"]["even"]["on"], "objective": OBJECTIVE, "queue": {"depth": 200, "timeout_s": 60}}
    nodes = {name: made["nodes"][name] for name in EVEN}
    if extras.has_monitoring:
        made["monitoring"]["scrape_interval_s"] = 1  # a step lasts five seconds
    return made | {"pools": {"even": even}, "nodes": nodes, "models": {}, "consumers": {}}


@pytest.mark.needs("haproxy")
def test_a_sweep_becomes_limits_that_hold(tmp_path: Path) -> None:
    """004-58, F2: sweep -> report -> apply -> render and restart -> the limits hold and refuse cleanly above."""
    with running("slots", _with_objective) as farm:
        farm.fakes.tell(EVEN, service_s=BUSY_S)
        run = tmp_path / "first"
        bench(farm, "sweep", *SWEEP, "--to", str(run))
        capacity = json.loads((run / "result.json").read_text())["pools"]["even"]["capacity"]
        full = 60 * len(EVEN) / BUSY_S
        assert 0 < capacity["safe_rpm"] < capacity["knee_rpm"] < full
        assert capacity["survives_rpm"] == pytest.approx(capacity["knee_rpm"] * 2 / 3)
        assert capacity["slots"] == 3
        assert capacity["is_bounded"]
        _check_report(run, farm)
        _check_resume(run, farm)

        inventory = farm.out / "inventory.yaml"
        inventory.write_text("# mine\n" + inventory.read_text())
        assert "never measured" not in _plan(inventory)
        said = bench(farm, "apply", "--run", str(run))
        assert f"+    rpm: {int(capacity['safe_rpm'])}" in said or f"rpm: {int(capacity['safe_rpm'])}," in said
        assert "rpm" not in inventory.read_text()
        bench(farm, "apply", "--run", str(run), "--write")
        assert inventory.read_text().startswith("# mine\n")
        assert "measured (run first)" in _plan(inventory)
        plan = build_plan(load_inventory(inventory))
        assert plan.inventory.pools["even"].limits.rpm == int(capacity["safe_rpm"])
        write(render(plan), farm.out)
        for program in ("haproxy", "litellm"):
            farm.restart(program)
        bench(farm, "verify", "--at-s", "6", "--above-s", "8", "--to", str(tmp_path / "verify"))
        found = json.loads((tmp_path / "verify" / "verify.json").read_text())["pools"]["even"]
        assert found["at"]["answered"] == found["at"]["requests"]
        assert found["above"]["errors"]["refused"] == found["above"]["refused_saying_when"] > 0

        text = inventory.read_text().replace("slots: 1", "slots: 2")
        inventory.write_text(text)
        assert "measured with other hardware, model or settings" in _plan(inventory)
        inventory.write_text(re.sub(r"mark: m[0-9a-f]+", "mark: m000000000000", text))
        assert "measured with other hardware, model or settings" in _plan(inventory)


def _plan(inventory: Path) -> str:
    command = [sys.executable, "generate.py", "plan", "--inventory", str(inventory)]
    environment = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60, env=environment
    ).stdout


def _check_report(run: Path, farm: Farm) -> None:
    """One page that needs no other, with pictures; the raw data beside it says the same as the fakes."""
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "http" not in page
    assert ">knee</text>" in page
    assert all(name in page for name in EVEN)
    assert "| knee |" in (run / "report.md").read_text()
    with (run / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) + 1 == sum(farm.fakes.arrivals(EVEN).values()) + sum(row["status"] == "429" for row in rows)
    if farm.extras.has_monitoring:
        assert ">queue</figcaption>" in page


def _check_resume(run: Path, farm: Farm) -> None:
    """A step that was lost is made again, and no other."""
    (run / "result.json").unlink()
    lost = run / "even" / "1-0.4.json"
    kept = (run / "even" / "1-3.json").stat().st_mtime_ns
    requests = len(rows_in(run / "even" / "1-0.4.jsonl"))
    lost.unlink()
    farm.fakes.reset()
    bench(farm, "sweep", "--resume", str(run))
    assert (run / "result.json").exists()
    assert (run / "even" / "1-3.json").stat().st_mtime_ns == kept
    assert sum(farm.fakes.arrivals(EVEN).values()) == requests + 1
    if farm.extras.has_monitoring:
        assert ">queue</figcaption>" in (run / "report.html").read_text()
    assert "within the noise" in bench(farm, "compare", str(run), str(run))
