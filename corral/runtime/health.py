"""Watching the programs of a `local` host until every one of them answers that it is well."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.causes import cause_of
from corral.runtime.supervisor import Program, programs

CHECK_TIMEOUT_S = 2.0
POLL_S = 0.2
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
    # Since the watch began, or until the service was ready.
    seconds: float = 0.0


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
            command,
            cwd=folder,
            env={"PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def statuses(services: Sequence[Service], folder: Path, path: str) -> list[Status]:
    """Every service's state at this moment."""
    known = programs(folder) or {}
    return [_status(service, known.get(service.name), folder, path) for service in services]


def _status(service: Service, program: Program | None, folder: Path, path: str) -> Status:
    if program is None:
        return Status(service, "stopped", None)
    if not program.pid:
        return Status(service, "starting" if program.state == "starting" else "ended", program)
    return Status(service, "ready" if is_well(service, folder, path) else "starting", program)


def watch(services: Sequence[Service], folder: Path, path: str) -> Iterator[list[Status]]:
    """Every service's state, again and again, until all are ready.

    Raises CorralError with the program's last words when one does not stay up, or is not well within its time.
    """
    began = time.monotonic()
    ready: dict[str, float] = {}
    ends: dict[str, set[int]] = {service.name: _known_ends(folder, service) for service in services}
    counts = {name: len(known) for name, known in ends.items()}
    while True:
        elapsed = time.monotonic() - began
        found = []
        for status in statuses(services, folder, path):
            name = status.service.name
            if status.state == "ready":
                ready.setdefault(name, elapsed)
            else:
                ready.pop(name, None)
                _check(status, ends[name], counts[name], elapsed, folder)
            found.append(Status(status.service, status.state, status.program, ready.get(name, elapsed)))
        yield found
        if len(ready) == len(services):
            return
        time.sleep(POLL_S)


def _known_ends(folder: Path, service: Service) -> set[int]:
    program = (programs(folder) or {}).get(service.name)
    return {program.ended} if program and program.ended else set()


def _check(status: Status, ends: set[int], before: int, elapsed: float, folder: Path) -> None:
    """Notes that a program has ended once more; raises CorralError when there is no hope."""
    program, service = status.program, status.service
    if program is None:
        raise CorralError(f"supervisord does not answer any more; it was looking after {service.name}")
    if program.ended:
        ends.add(program.ended)
    count = len(ends) - before
    if count >= MOST_ENDS or program.state == "fatal":
        raise CorralError(_explained(f"{service.name} does not stay up: {_ending(program, folder)}", service, folder))
    if elapsed > service.health.start_timeout_s:
        words = f"{service.name} runs but is not well after {service.health.start_timeout_s} s"
        raise CorralError(_explained(words, service, folder))


def _ending(program: Program, folder: Path) -> str:
    """How a program ended last in supervisord's words, such as `exit status 1`; or why it never ran."""
    pattern = re.compile(rf"exited: {re.escape(program.name)} \(([^;)]*)")
    found = pattern.findall("\n".join(last_lines(folder / "logs" / "supervisord.log", LAST_BYTES)))
    return found[-1] if found else program.problem or f"exit status {program.exit_code}"


def _explained(words: str, service: Service, folder: Path) -> str:
    """The words, the program's last ones, and the likely cause."""
    lines = last_lines(folder / "logs" / f"{service.name}.log")
    cause = cause_of("\n".join([words, *lines]), "process")
    text = f"{words}\n" + ("\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)")
    return f"{text}\n  likely cause: {cause.words}" if cause else text


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log, without empty ones; none if there is no log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
