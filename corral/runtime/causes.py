"""Why a program does not run or is not well: from its last lines, and from what Docker says, to cause and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from corral.contributions import Service
from corral.declarations import CauseRow, Place, cause_rows, read_yaml, servers
from corral.plan.own_image import build_command, tag
from corral.runtime.docker import Container

TABLE = Path(__file__).with_suffix(".yaml")
SHOWN = 160
STOPPED = (0, 143)
# A program that ended so often while it starts will not become well by waiting.
ENDS = 3
COMMANDS = ("docker", "nvidia-smi")


@dataclass(frozen=True, slots=True)
class Reason:
    """What is wrong, and what helps; the remedy is empty when none is known."""

    what: str
    remedy: str = ""

    @property
    def words(self) -> str:
        """Both on one line."""
        return f"{self.what}; {self.remedy}"


@cache
def causes(place: Place) -> tuple[tuple[re.Pattern[str], Reason], ...]:
    """Patterns of messages and what they mean; the first that is found in a message counts."""
    return tuple(
        (re.compile(row.says, re.IGNORECASE), Reason(row.means, row.remedy))
        for row in _rows()
        if (row.of or ("" if place in COMMANDS else place)) == place
    )


def _rows() -> Iterator[CauseRow]:
    """All rows, those of components where the table says so."""
    for row in read_yaml(TABLE)["words"]:
        yield from cause_rows() if row == {"of": "components"} else [CauseRow(**row)]


@cache
def card_faults() -> dict[int, Reason]:
    """The errors (Xid) from which an NVIDIA card does not recover by itself."""
    return {code: Reason(row["means"], row["remedy"]) for code, row in read_yaml(TABLE)["xids"].items()}


def check_words(check: str, status: int) -> str:
    """What the balancer's word for the last check of a server means, with the HTTP status of the answer."""
    words: str = read_yaml(TABLE)["checks"].get(check, "does not answer")
    return words.format(status)


def cause_of(text: str, place: Place = "container") -> Reason | None:
    """What a message or a log usually means; None when no row of the table knows it."""
    return next((reason for pattern, reason in causes(place) if pattern.search(text)), None)


def with_docker_cause(words: str) -> str:
    """What the command `docker` said, with what it means and what helps where that is known."""
    cause = cause_of(words, "docker")
    return f"{words}\n  {cause.words}" if cause else words


def exit_words(container: Container) -> str:
    """What the exit code of a container means; empty when it says nothing."""
    return "out of memory" if container.was_out_of_memory else _exit(container.exit_code).get("means", "")


def _exit(code: int) -> Mapping[str, str]:
    """Meaning and remedy of an exit code, where they are known."""
    found: Mapping[str, str] = read_yaml(TABLE)["exits"].get(code, {})
    return {key: text.format(build=build_command(), tag=tag()) for key, text in found.items()}


def explained(container: Container | None, service: Service | None = None, log: str = "") -> Reason:
    """Why a container is not well.

    Args:
        container: what Docker says; None when there is none.
        service: its service in the plan, for the remedy.
        log: its last lines.
    """
    if container is None:
        return Reason("it has no container", "./generate.py up")
    is_calm = container.is_running and not container.restarts
    known = cause_of(container.last_check if is_calm else f"{container.error}\n{log}")
    last = known.what if known else shortened(last_line(log))
    return _unwell(container, known, last) if container.is_running else _stopped(container, service, known, last)


def _unwell(container: Container, known: Reason | None, last: str) -> Reason:
    restart = f"./generate.py restart {container.service}"
    if container.health == "parked":
        sign = cause_of(container.last_check)
        what = f"its watchdog does not start it any more ({shortened(container.last_check)})"
        return Reason(what, f"{f'{sign.what}: {sign.remedy}' if sign else 'see its logs'}; then {restart}")
    if container.health == "unhealthy":
        words = shortened(container.last_check) or "its health check does not end"
        return Reason(f"it runs, but its health check fails: {words}", known.remedy if known else restart)
    if container.health != "starting":
        return Reason("it runs")
    if container.restarts < ENDS:
        return Reason("it is still starting", "wait; ./generate.py logs shows how far it is")
    what = f"container keeps ending while it starts ({container.restarts} times){last and f': {last}'}"
    return Reason(what, known.remedy if known else "see its logs")


def _stopped(container: Container, service: Service | None, known: Reason | None, last: str) -> Reason:
    if container.was_out_of_memory:
        known_remedies = {item.component: item.memory_remedy for item in servers()}
        remedy = known_remedies.get(service.component if service else "", "raise its memory_mib")
        return Reason(f"container {_ended(container, exit_words(container))}", remedy)
    if container.state == "created":
        known = known or Reason(shortened(container.error) or "it was never started", "./generate.py up")
        return Reason(f"the container was made but not started: {known.what}", known.remedy)
    if container.state == "paused":
        return Reason("the container is paused", f"docker unpause {container.name}")
    if container.state == "exited" and container.exit_code in STOPPED:
        return Reason("the container was stopped", "./generate.py up starts it")
    if known:
        return Reason(f"container {_ended(container, known.what)}", known.remedy)
    by_hand = "./generate.py up starts it" if container.state == "exited" else "see its logs"
    words = f"container {_ended(container, exit_words(container))}{last and f'; it said: {last}'}"
    return Reason(words, _exit(container.exit_code).get("remedy", by_hand))


def _ended(container: Container, words: str) -> str:
    """`exited (137: out of memory)`, `keeps restarting (1)`."""
    verb = "keeps restarting" if container.state == "restarting" else "exited"
    return f"{verb} ({container.exit_code}{words and f': {words}'})"


def last_line(log: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


def shortened(text: str) -> str:
    """A program's words on one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
