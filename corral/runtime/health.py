"""The programs of a `local` host: whether each of them answers that it is well, and why one does not."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.causes import cause_of
from corral.runtime.supervisor import Program, programs
from corral.runtime.waiting import Seen

CHECK_TIMEOUT_S = 2.0
# A program that ends this often before it was ever well will not become well by waiting.
MOST_ENDS = 2

LAST_LINES = 12
LAST_BYTES = 64 * 1024

State = Literal["starting", "ready", "ended", "stopped"]


@dataclass(frozen=True, slots=True)
class Status:
    """How a service is now."""

    service: Service
    state: State
    program: Program | None


def is_well(service: Service, folder: Path, path: str) -> bool:
    """Whether the service says that it is well: on its health path, or by its health command run with this PATH."""
    if not service.health.path:
        return _succeeds(service.health.command, folder, path)
    try:
        url = f"http://127.0.0.1:{service.health.port}{service.health.path}"
        with httpx.Client(trust_env=False, timeout=CHECK_TIMEOUT_S) as client:
            return client.get(url).is_success
    except httpx.HTTPError:
        return False


def _succeeds(command: Sequence[str], folder: Path, path: str) -> bool:
    try:
        done = subprocess.run(
            command, cwd=folder, env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=CHECK_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@dataclass(frozen=True, slots=True)
class LocalHost:
    """A host's programs under supervisord, as `wait_all` looks at them."""

    # The rendered host.
    folder: Path
    # PATH of its programs.
    path: str
    # When each program has ended, as far as this object saw; what was before its first look does not count.
    _ends: dict[str, set[int]] = field(default_factory=dict)

    def statuses(self, services: Iterable[Service]) -> list[Status]:
        """Every service's state at this moment."""
        known = programs(self.folder) or {}
        return [self._status(service, known.get(service.name)) for service in services]

    def _status(self, service: Service, program: Program | None) -> Status:
        if program is None:
            return Status(service, "stopped", None)
        if not program.pid:
            return Status(service, "starting" if program.state == "starting" else "ended", program)
        return Status(service, "ready" if is_well(service, self.folder, self.path) else "starting", program)

    def look(self, services: Iterable[Service]) -> dict[str, Seen]:
        """How each service is now, by name."""
        return {
            status.service.name: Seen(status.state, status.state == "ready", self._is_hopeless(status.program))
            for status in self.statuses(services)
        }

    def _is_hopeless(self, program: Program | None) -> bool:
        if program is None or program.state == "fatal":
            return True
        ends = self._ends.setdefault(program.name, set())
        ends.add(program.ended)
        return len(ends) > MOST_ENDS  # the first one was before the first look

    def problem(self, service: Service, words: str) -> CorralError:
        """Why a service is not well: the program's last words, and the likely cause."""
        program = (programs(self.folder) or {}).get(service.name)
        if program is None:
            return CorralError(f"supervisord does not answer any more; it was looking after {service.name}")
        what = f"runs but is {words}" if words else f"does not stay up: {self._ending(program)}"
        lines = last_lines(self.folder / "logs" / f"{service.name}.log")
        cause = cause_of("\n".join([what, *lines]), "process")
        shown = [f"{service.name} {what}", *(f"    {line}" for line in lines or ["(it wrote nothing)"])]
        return CorralError("\n".join([*shown, *([f"  likely cause: {cause.words}"] if cause else [])]))

    def _ending(self, program: Program) -> str:
        """How a program ended last in supervisord's words, such as `exit status 1`; or why it never ran."""
        pattern = re.compile(rf"exited: {re.escape(program.name)} \(([^;)]*)")
        found = pattern.findall("\n".join(last_lines(self.folder / "logs" / "supervisord.log", LAST_BYTES)))
        return found[-1] if found else program.problem or f"exit status {program.exit_code}"


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log, without empty ones; none if there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
