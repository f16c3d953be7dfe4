"""One load: Locust in a process of its own, from its settings to the rows that it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.errors import CorralError
from scenarios import Loop, Stage
from target import Tasks

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SPARE_S = 120.0
"""Beyond a load's own time: Locust's start and end on a slow machine."""
LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be sent."""

    tasks: Tasks
    loop: Loop
    stages: tuple[Stage, ...]
    timeout_s: float = 300.0
    turns: int = 1
    is_ramped: bool = False
    is_cached: bool = False
    error_budget: float | None = None
    """Share of failures at which the load ends early."""
    seed: int = 1

    @property
    def lasts_s(self) -> float:
        """Seconds in which requests are sent."""
        return sum(stage.duration_s for stage in self.stages)

    def data(self, rows: Path) -> dict[str, Any]:
        """The settings that load-tests/locustfile.py reads."""
        stages = [
            {"duration_s": item.duration_s, "from": item.start, "to": item.to, "every_s": item.every_s}
            for item in self.stages
        ]
        return {
            "tasks": self.tasks.tasks, "loop": self.loop, "stages": stages, "timeout_s": self.timeout_s,
            "turns": self.turns, "ramp": self.is_ramped, "is_cached": self.is_cached,
            "error_budget": self.error_budget, "seed": self.seed, "rows": str(rows),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """All requests of a load as they were measured, and how it ended."""

    requests: list[dict[str, Any]]
    lasted_s: float
    is_aborted: bool


def run_load(load: Load, rows: Path, web: str = "") -> Rows:
    """Sends the load and returns what was measured; the raw data is in `rows`, one JSON object a line.

    Args:
        load: what is sent.
        rows: the file for the raw data.
        web: HOST:PORT of Locust's page; the page stays until Ctrl-C. Empty: no page.

    Raises:
        CorralError: Locust did not come to its end, with its last words.
    """
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.resolve()
    with tempfile.TemporaryDirectory(prefix="corral-load-") as name:
        settings, log = Path(name) / "settings.json", Path(name) / "locust.log"
        settings.write_text(json.dumps(load.data(rows)), encoding="utf-8")
        environment = {**os.environ, **load.tasks.environment, "CORRAL_LOAD": str(settings)}
        limit = None if web else load.lasts_s + load.timeout_s + SPARE_S
        with log.open("wb") as output, suppress(subprocess.TimeoutExpired):
            subprocess.run(
                _command(web, load.timeout_s), env=environment, stdin=subprocess.DEVNULL, timeout=limit, check=False,
                stdout=None if web else output, stderr=None if web else subprocess.STDOUT,
            )  # fmt: skip
        found = read_rows(rows)
        if found is None:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise CorralError(f"the load came to no end; Locust's last words:\n{last}")
        return found


def read_rows(path: Path) -> Rows | None:
    """What a load measured; None if it did not come to its end."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    ends = [line for line in lines if "end" in line]
    if not ends:
        return None
    return Rows([line for line in lines if "end" not in line], ends[0]["lasted_s"], ends[0]["aborted"])


def _command(web: str, timeout_s: float) -> list[str]:
    words = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--stop-timeout", f"{timeout_s:g}"]
    if web:
        host, _, port = web.rpartition(":")
        return [*words, "--autostart", "--web-host", host or "127.0.0.1", "--web-port", port]
    return [*words, "--headless", "--only-summary", "--exit-code-on-error", "0"]
