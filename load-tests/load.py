"""One load: runs Locust in a separate process and reads its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corral.config.inventory import Objective
from corral.errors import CorralError
from figures import Figures, figures_of
from scenarios import Loop, Stage
from target import Tasks

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# Beyond a load's own time: Locust's start and end on a slow machine.
SPARE_S = 120.0
LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Load:
    """The load to send."""

    tasks: Tasks
    loop: Loop
    stages: tuple[Stage, ...]
    timeout_s: float = 300.0
    turns: int = 1
    is_ramped: bool = False
    # Share of failures at which the load ends early.
    error_budget: float | None = None
    seed: int = 1

    @property
    def lasts_s(self) -> float:
        """Seconds in which requests are sent."""
        return sum(stage.duration_s for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Rows:
    """All measured requests of a load, and how it ended."""

    requests: list[dict[str, Any]]
    # Seconds in which requests were to be sent.
    lasts_s: float
    lasted_s: float
    is_aborted: bool

    def figures(self, objective: Objective, pool: str = "") -> Figures:
        """The statistics of all requests, or of those to one pool."""
        rows = [row for row in self.requests if pool in ("", row["pool"])]
        span = min(self.lasts_s, self.lasted_s) if self.is_aborted else self.lasts_s
        return figures_of(rows, objective, span, is_aborted=self.is_aborted)


def run_load(load: Load, rows: Path, web: str = "") -> Rows:
    """Sends the load and returns the measurements; the raw data is in `rows`, one JSON object per line.

    Args:
        load: what is sent.
        rows: the file for the raw data.
        web: HOST:PORT of Locust's page; the page stays until Ctrl-C. Empty: no page.

    Raises:
        CorralError: Locust did not come to its end, with its last words.
    """
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.resolve()
    rows.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="corral-load-") as name:
        settings, log = Path(name) / "settings.json", Path(name) / "locust.log"
        told = {**asdict(load), "tasks": load.tasks.tasks, "rows": str(rows)}
        settings.write_text(json.dumps(told), encoding="utf-8")
        environment = {**os.environ, **load.tasks.environment, "CORRAL_LOAD": str(settings)}
        limit = None if web else load.lasts_s + load.timeout_s + SPARE_S
        with log.open("wb") as output, suppress(subprocess.TimeoutExpired):
            subprocess.run(
                _command(web, load.timeout_s), env=environment, stdin=subprocess.DEVNULL, timeout=limit, check=False,
                stdout=None if web else output, stderr=None if web else subprocess.STDOUT,
            )  # fmt: skip
        with suppress(OSError, ValueError):
            *requests, end = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
            if "end" in end:
                return Rows(requests, load.lasts_s, end["lasted_s"], end["aborted"])
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise CorralError(f"the load came to no end; Locust's last words:\n{last}")


def _command(web: str, timeout_s: float) -> list[str]:
    words = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--stop-timeout", f"{timeout_s:g}"]
    if web:
        host, _, port = web.rpartition(":")
        return [*words, "--autostart", "--web-host", host or "127.0.0.1", "--web-port", port]
    return [*words, "--headless", "--only-summary", "--exit-code-on-error", "0"]
