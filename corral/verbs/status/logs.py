"""`logs`: what services print, of one or several hosts in the order of time, with the service's name in front."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.hosts import ComposeHost

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")
TAIL = "100"
STOP_S = 5


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a service; `time` is the engine's, in RFC 3339, and empty for Compose's own remarks."""

    host: str
    service: str
    time: str
    text: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines: the last `tail` of every service (a number or `all`), not older than `since` (`10m`, a date)."""

    tail: str = TAIL
    since: str = ""
    is_following: bool = False


def show_logs(hosts: Sequence[ComposeHost], services: Sequence[Service], wanted: Wanted, console: Console) -> None:
    """Prints the lines; following ends with Ctrl-C.

    Raises:
        CorralError: a host's lines cannot be read; what other hosts said is printed all the same.
    """
    chosen = [(host, [item for item in services if item.host == host.name]) for host in hosts]
    chosen = [(host, items) for host, items in chosen if items]
    width = max((len(_label(item, len(chosen))) for item in services), default=0)
    colours = {(item.host, item.name): COLOURS[index % len(COLOURS)] for index, item in enumerate(services)}
    with ExitStack() as stack:
        readers = [stack.enter_context(_reader(host, items, wanted)) for host, items in chosen]
        with suppress(KeyboardInterrupt):
            lines = _as_they_come(readers) if wanted.is_following else sorted(_all(readers), key=_when)
            for line in lines:
                label = f"{line.host}/{line.service}" if len(chosen) > 1 else line.service
                style = colours.get((line.host, line.service), "dim")
                console.print(Text.assemble((f"{label:<{width}} ", style), ("│ ", "dim"), Text.from_ansi(line.text)))
    problems = [problem for reader in readers if (problem := reader.problem)]
    if problems:
        raise CorralError("\n".join(problems))


def _label(item: Service, hosts: int) -> str:
    return f"{item.host}/{item.name}" if hosts > 1 else item.name


class _Reader:
    """`docker compose logs` of one host, as lines."""

    def __init__(self, host: ComposeHost, services: Sequence[Service], wanted: Wanted) -> None:
        self.host = host
        self.problem = ""
        # Whether reading has ended, and the process is being stopped.
        self.is_over = False
        self._wanted = wanted
        self._names = {item.container_name: item.name for item in services}
        self.process = subprocess.Popen(
            self._command(services),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours; it would end the readers before their last lines
        )

    def _command(self, services: Sequence[Service]) -> list[str]:
        options = ["--timestamps", "--no-color", "--tail", self._wanted.tail]
        options += ["--since", self._wanted.since] if self._wanted.since else []
        options += ["--follow"] if self._wanted.is_following else []
        return self.host.argv(self.host.compose_words("logs", *options, *(item.name for item in services)))

    def lines(self) -> Iterator[Line]:
        """Lines as the host sends them; at the end `problem` is set when it failed."""
        assert self.process.stdout is not None  # noqa: S101 - for the type checker
        complaint: list[str] = []
        listener = threading.Thread(target=lambda: complaint.extend(self.process.stderr or []), daemon=True)
        listener.start()
        for raw in self.process.stdout:
            yield self._line(raw.rstrip("\n"))
        code = self.process.wait()
        listener.join(STOP_S)
        if code > 0 and not self.is_over:
            self.problem = f"{self.host.name}: {' '.join(''.join(complaint[-3:]).split()) or f'ended with {code}'}"

    def _line(self, raw: str) -> Line:
        container, bar, rest = raw.partition(" | ")
        service = self._names.get(container.strip(), "")
        if not bar or not service:
            return Line(self.host.name, "", "", raw.strip())
        time, _, text = rest.partition(" ")
        return Line(self.host.name, service, time, text)


@contextmanager
def _reader(host: ComposeHost, services: Sequence[Service], wanted: Wanted) -> Iterator[_Reader]:
    reader = _Reader(host, services, wanted)
    try:
        yield reader
    finally:
        reader.is_over = True
        if reader.process.poll() is None:
            os.killpg(reader.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            reader.process.wait(STOP_S)
        if reader.process.poll() is None:
            os.killpg(reader.process.pid, signal.SIGKILL)
            reader.process.wait()


def _all(readers: Iterable[_Reader]) -> list[Line]:
    return [line for reader in readers for line in reader.lines()]


def _when(line: Line) -> tuple[str, str]:
    """For sorting: the engine leaves out zeros at the end of a second's fraction."""
    seconds, _, fraction = line.time.removesuffix("Z").partition(".")
    return seconds, fraction.ljust(9, "0")


def _as_they_come(readers: Sequence[_Reader]) -> Iterator[Line]:
    """Lines of every host at the same time, until all of them have ended."""
    found: queue.SimpleQueue[Line | None] = queue.SimpleQueue()

    def read(reader: _Reader) -> None:
        for line in reader.lines():
            found.put(line)
        found.put(None)

    for reader in readers:
        threading.Thread(target=read, args=(reader,), daemon=True).start()
    left = len(readers)
    while left:
        line = found.get()
        if line is None:
            left -= 1
        else:
            yield line
