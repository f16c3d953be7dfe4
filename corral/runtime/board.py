"""Progress of services on their hosts: a live table on a terminal, else a line for every change; and waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from corral.contributions import Service
from corral.errors import CorralError

POLL_S = 0.5
# Beyond a service's own start timeout: Docker checks every ten seconds once that has passed.
SPARE_S = 30
# Host and service.
Key = tuple[str, str]


@dataclass(slots=True)
class _Row:
    state: str
    detail: str
    since: float
    is_done: bool


class Board:
    """Says what happens to which service; `say` prints a line of its own."""

    def __init__(self, talk: Console) -> None:
        self.talk = talk
        self._rows: dict[Key, _Row] = {}
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._table, console=talk, transient=True, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self.talk.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, message: str, style: str = "") -> None:
        """Prints a line."""
        self.talk.print(Text(message, style))

    def show(self, host: str, service: str, state: str, detail: str = "", *, is_done: bool = False) -> None:
        """A service's state now; `detail` changes often and is seen on a terminal only."""
        row = self._rows.get((host, service))
        if row is not None and row.state == state:
            row.detail = detail
            return
        self._rows[host, service] = _Row(state, detail, time.monotonic(), is_done)
        if not self.talk.is_terminal:
            self.talk.print(Text(f"  {host}/{service}: {state}{f' ({detail})' if detail else ''}"))

    def _table(self) -> Table:
        grid = Table.grid(padding=(0, 1, 0, 1))
        for (host, service), row in self._rows.items():
            mark = Text("✓", "green") if row.is_done else self._spinner
            seconds = "" if row.is_done else f"{time.monotonic() - row.since:.0f} s"
            grid.add_row(mark, f"{host}/{service}", Text(row.state), Text(row.detail, "dim"), Text(seconds, "dim"))
        return grid


# --- waiting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A service at one moment, whatever runs it."""

    # In one word.
    state: str
    is_well: bool
    # Whether waiting longer is no use.
    is_hopeless: bool = False


# Each of these services at this moment, by name.
Look = Callable[[Iterable[Service]], Mapping[str, Seen]]
# Why a service is not well; the message begins with the text, if there is one.
Explain = Callable[[Service, str], CorralError]


def wait_all(
    look: Look, explain: Explain, services: Iterable[Service], board: Board, timeout_s: float | None = None
) -> None:
    """Returns when every service is well.

    Raises CorralError when there is no hope for one, or it is not well in `timeout_s`, else its own start timeout.
    """
    began = time.monotonic()
    waiting = {service.name: service for service in services}
    while waiting:
        found, elapsed = look(waiting.values()), time.monotonic() - began
        for name, seen in found.items():
            service = waiting[name]
            state = f"{seen.state} after {elapsed:.0f} s" if seen.is_well else seen.state
            board.show(service.host, name, state, is_done=seen.is_well)
            if seen.is_well:
                del waiting[name]
            elif seen.is_hopeless or elapsed > (limit := _limit_s(service, seen, timeout_s)):
                raise explain(service, "" if seen.is_hopeless else f"not well within {limit:.0f} s")
        if waiting:
            time.sleep(POLL_S)


def _limit_s(service: Service, seen: Seen, timeout_s: float | None) -> float:
    limit = timeout_s if timeout_s is not None else service.health.start_timeout_s + SPARE_S
    return min(limit, SPARE_S) if seen.state == "unhealthy" else limit  # of an earlier run, perhaps


def wait_until(is_done: Callable[[], bool], limit_s: float, poll_s: float = 0.25) -> bool:
    """Returns whether the condition became true within so many seconds."""
    deadline = time.monotonic() + limit_s
    while not (done := is_done()) and time.monotonic() < deadline:
        time.sleep(poll_s)
    return done


# --- watching --------------------------------------------------------------------------------------------------------


def redraw(console: Console, views: Iterable[RenderableType], every_s: float, *, count: int = 0) -> None:
    """Shows views until Ctrl-C, or so many: on a terminal one in the place of the other, else one below the other."""
    is_screen = console.is_terminal and count != 1
    live = Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") if is_screen else None
    with suppress(KeyboardInterrupt), live or nullcontext():
        for number, view in enumerate(views, 1):
            if live is None:
                console.print(view)
            else:
                stamp = Text(f"{datetime.now().astimezone():%H:%M:%S}, every {every_s:g} s, Ctrl-C ends", "dim")
                live.update(Group(view, Text(), stamp), refresh=True)
            if number == count:
                return
            time.sleep(every_s)
