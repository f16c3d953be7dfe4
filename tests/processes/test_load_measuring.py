"""Locust measures what the server did: against a server that writes down its own times for every request (004-55)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from corral.config.inventory import Objective
from figures import figures_of
from load import Load, Rows, run_load
from scenarios import Stage
from target import Tasks
from tests.processes.helpers import REPOSITORY, serving_http

FIRST_S = 0.4
GAP_S = 0.15
PIECES = 6
# Share by which client and server may differ.
CLOSE = 0.15


@dataclass
class Known:
    """A server of known timing, and what it did."""

    port: int = 0
    # No request is answered before so many have arrived.
    held: int = 0
    ends_well: bool = True
    status: int = 200
    arrivals: list[float] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    all_here: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(known: Known) -> Iterator[Known]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            pass

        def do_POST(self) -> None:
            came = time.monotonic()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known.arrivals.append(came)
            known.turns.append(len(body["messages"]))
            if known.status != 200:
                self.send_response(known.status)
                self.send_header("Content-Length", "0")
                self.send_header("Retry-After", "1")
                self.end_headers()
                return
            if len(known.arrivals) >= known.held:
                known.all_here.set()
            assert known.all_here.wait(60)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            times = [came]
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
            for number in range(PIECES):
                time.sleep(GAP_S if number else FIRST_S)
                self.event({"choices": [{"index": 0, "delta": {"content": f"w{number} "}, "finish_reason": None}]})
                times.append(time.monotonic())
            if known.ends_well:
                self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                self.event({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": PIECES}})
                self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
            known.sent.append(times)

        def event(self, data: dict[str, Any]) -> None:
            self.chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

        def chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    with serving_http(Handler) as known.port:
        yield known


def sent(known: Known, folder: Path, **given: Any) -> Rows:
    place = {"name": "one", "url": f"http://127.0.0.1:{known.port}/v1", "model": "m", "slots": 1}
    task = {
        "name": "chat", "pool": "chat", "kind": "chat", "weight": 1, "prompt": "short", "max_tokens": 8,
        "places": [place | {"key": "", "key_header": ""}],
    }  # fmt: skip
    return run_load(Load(Tasks([task]), timeout_s=60, **given), folder / "rows.jsonl")


def test_times_are_those_of_the_server(tmp_path: Path) -> None:
    """TTFT, gaps, TPOT and E2E are within 15 % of what the server wrote down for the same requests."""
    with serving(Known()) as known:
        found = sent(known, tmp_path, loop="burst", stages=(Stage(2.4, 1, every_s=0.8),))
    rows = sorted(found.requests, key=lambda row: float(row["due_at"]))
    assert len(rows) == len(known.sent) == 3
    assert [row["error"] for row in rows] == ["", "", ""]
    there = sorted(known.sent)
    first = [times[1] - times[0] for times in there]
    gaps = [after - before for times in there for before, after in itertools.pairwise(times[1:])]
    whole = [times[-1] - times[0] for times in there]
    tpot = [(times[-1] - times[1]) / (PIECES - 1) for times in there]
    assert median(row["ttft_s"] - row["lag_s"] for row in rows) == pytest.approx(median(first), rel=CLOSE)
    assert median(gap for row in rows for gap in row["gaps_s"]) == pytest.approx(median(gaps), rel=CLOSE)
    assert median(row["e2e_s"] - row["lag_s"] for row in rows) == pytest.approx(median(whole), rel=CLOSE)
    figures = figures_of(rows, Objective(), found.lasted_s)
    assert figures.tpot_s["p50"] == pytest.approx(median(tpot), rel=CLOSE)
    assert figures.tokens_out_mean == PIECES
    assert figures.in_time == 3


def test_a_server_that_stalls_does_not_stop_the_clock(tmp_path: Path) -> None:
    """Open loop: no request is answered before all have arrived, so a client that waits would never send them."""
    with serving(Known(held=6)) as known:
        found = sent(known, tmp_path, loop="burst", stages=(Stage(1.2, 1, every_s=0.2),))
    rows = sorted(found.requests, key=lambda row: float(row["due_at"]))
    assert [row["error"] for row in rows] == [""] * 6
    due = [row["due_at"] - rows[0]["due_at"] for row in rows]
    assert due == pytest.approx([0.2 * number for number in range(6)], abs=0.001)
    assert all(row["ttft_s"] > FIRST_S + rows[-1]["due_at"] - row["due_at"] for row in rows)


def test_arrivals_of_the_open_loop_are_a_poisson_process(tmp_path: Path) -> None:
    """Refused at once, 40 a second: the gaps between due times have the mean and the spread of an exponential."""
    with serving(Known(status=429)) as known:
        found = sent(known, tmp_path, loop="open", stages=(Stage(4, 40, 40),))
    due = sorted(float(row["due_at"]) for row in found.requests)
    gaps = [after - before for before, after in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert len(known.arrivals) == len(due)
    assert mean == pytest.approx(1 / 40, rel=0.25)
    assert spread == pytest.approx(mean, rel=0.25)
    assert {(row["error"], row["says_when"]) for row in found.requests} == {("refused", True)}


def test_a_stream_without_its_end_is_a_failure_and_ends_a_load_with_an_error_budget(tmp_path: Path) -> None:
    with serving(Known(ends_well=False)) as known:
        found = sent(known, tmp_path, loop="open", stages=(Stage(60, 25, 25),), error_budget=0.1)
    assert {(row["error"], row["status"]) for row in found.requests} == {("broken stream", 200)}
    assert found.is_aborted
    assert figures_of(found.requests, Objective(), found.lasted_s).answered == 0


def test_a_closed_loop_talks_in_turns_that_carry_what_was_said(tmp_path: Path) -> None:
    with serving(Known()) as known:
        found = sent(known, tmp_path, loop="closed", stages=(Stage(4, 2),), turns=2)
    assert {row["in_flight"] for row in found.requests} <= {1, 2}
    assert set(known.turns) == {1, 3}


NODE = """
schema_version: 1
name: lab
hosts: {{here: {{runtime: local, address: 127.0.0.1}}}}
nodes: {{one: {{url: "http://127.0.0.1:{port}", model: m, slots: 2}}}}
pools: {{chat: {{on: [{{node: one}}]}}}}
gateway: {{host: here, database: false, cache: false}}
"""


def test_a_sweep_past_the_gateway_becomes_a_report_and_limits(tmp_path: Path) -> None:
    """The verbs themselves, without a farm: sweep, report, apply, compare."""
    with serving(Known()) as known:
        inventory = tmp_path / "inventory.yaml"
        inventory.write_text(NODE.format(port=known.port))

        def bench(*words: str) -> str:
            command = [sys.executable, str(REPOSITORY / "generate.py"), "bench", *words, "--inventory", str(inventory)]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
            return str(done.stdout)

        run = tmp_path / "run"
        steps = ("--steps", "0.4,0.8", "--warm-s", "4", "--step-s", "4", "--step-requests", "4", "--repeats", "1")
        assert bench("sweep", "--direct", *steps, "--to", str(run)) == f"{run}\n"
        result = json.loads((run / "result.json").read_text())["pools"]["chat"]
        assert result["capacity"]["slots"] == 2
        assert [step["share"] for step in result["steps"]] == [0.4, 0.8]
        assert all(step["figures"]["replicas"] == {"one": step["figures"]["answered"]} for step in result["steps"])
        names = {f"{run}/{name}" for name in ("report.html", "report.md", "steps.csv", "requests.csv")}
        assert set(bench("report", "--run", str(run)).split()) == names
        assert "within the noise" in bench("compare", str(run), str(run))
        assert f"rpm: {int(result['capacity']['safe_rpm'])}" in bench("apply", "--run", str(run))
        rows = json.loads(bench("run", "single", "--replica", "one", "--duration", "3", "--json"))["pools"]["chat"]
        assert rows["answered"] == rows["requests"] >= 2
