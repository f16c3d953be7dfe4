"""`logs`: what services print, of one or several hosts in the order of time, with the service's name in front."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, NamedTuple

from rich.console import Console
from rich.text import Text

from corral.contributions import Service
from corral.errors import CorralError, UsageError
from corral.runtime.hosts import ComposeHost
from corral.runtime.processes import ProcessHost

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")
TAIL = "100"
STOP_S = 5
# Print the ends of log files, given as pairs of a name and a path after tail's options.
_READ = """tail $0 "$2" | while IFS= read -r line; do printf '%s |  %s\\n' "$1" "$line"; done"""
READ_FILES = f'while [ $# -gt 0 ]; do [ ! -e "$2" ] || {_READ}; shift 2; done'
FOLLOW_FILES = f"while [ $# -gt 0 ]; do {_READ} & shift 2; done; wait"


class Line(NamedTuple):
    """One line of a service; `time` is Docker's, in RFC 3339; without one for processes, without both for remarks."""

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


@dataclass(frozen=True, slots=True)
class _Found:
    """What the readers of all hosts have found; None in the queue for each that has ended."""

    lines: queue.SimpleQueue[Line | None] = field(default_factory=queue.SimpleQueue)
    problems: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def until_the_end(self, readers: int) -> Iterator[Line]:
        while readers:
            line = self.lines.get()
            if line is None:
                readers -= 1
            else:
                yield line


def show_logs(hosts: Sequence[ComposeHost], services: Sequence[Service], wanted: Wanted, console: Console) -> None:
    """Prints the lines; following ends with Ctrl-C.

    Raises:
        CorralError: a host's lines cannot be read; what other hosts said is printed all the same.
    """
    if wanted.since and any(isinstance(host, ProcessHost) for host in hosts):
        words = "the logs of a `local` host have no times"
        raise UsageError(f"--since: {words}; take --tail LINES, or name other hosts with --host")
    chosen = [(host, items) for host in hosts if (items := [item for item in services if item.host == host.name])]
    labels = {(item.host, item.name): f"{item.host}/{item.name}" if len(chosen) > 1 else item.name for item in services}
    colours = {key: COLOURS[index % len(COLOURS)] for index, key in enumerate(labels)}
    width, found = max(map(len, labels.values()), default=0), _Found()
    with ExitStack() as stack:
        for host, items in chosen:
            stack.enter_context(_reader(host, items, wanted, found))
        with suppress(KeyboardInterrupt):
            lines = found.until_the_end(len(chosen))
            for line in lines if wanted.is_following else sorted(lines, key=_when):
                label, style = labels.get(line[:2], line.host if len(chosen) > 1 else ""), colours.get(line[:2], "dim")
                console.print(Text.assemble((f"{label:<{width}} ", style), ("│ ", "dim"), Text.from_ansi(line.text)))
    if found.problems:
        raise CorralError("\n".join(found.problems))


def _when(line: Line) -> tuple[str, str]:
    """For sorting: Docker leaves out zeros at the end of a second's fraction."""
    seconds, _, fraction = line.time.removesuffix("Z").partition(".")
    return seconds, fraction.ljust(9, "0")


@contextmanager
def _reader(host: ComposeHost, services: Sequence[Service], wanted: Wanted, found: _Found) -> Iterator[None]:
    """Reads a host's lines in a thread; ends the reading at the end of the block."""
    is_local = isinstance(host, ProcessHost)
    command = _of_processes(host, services, wanted) if is_local else _of_containers(host, services, wanted)
    names = {item.container_name: item.name for item in services}
    with TemporaryFile("w+", errors="replace") as complaints:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C is ours; it would end the readers before their last lines
        )  # fmt: skip
        threading.Thread(target=_read, args=(host.name, names, process, complaints, found), daemon=True).start()
        try:
            yield
        finally:
            found.is_over.set()
            _stop(process)


def _of_containers(host: ComposeHost, services: Sequence[Service], wanted: Wanted) -> list[str]:
    options = ["--timestamps", "--no-color", "--tail", wanted.tail]
    options += ["--since", wanted.since] if wanted.since else []
    options += ["--follow"] if wanted.is_following else []
    return host.argv(host.compose_words("logs", *options, *(item.name for item in services)))


def _of_processes(host: ComposeHost, services: Sequence[Service], wanted: Wanted) -> list[str]:
    """Prints the lines of log files as `docker compose logs` prints those of containers, without times."""
    options = ["-n", "+1" if wanted.tail == "all" else wanted.tail, *(["-F"] if wanted.is_following else [])]
    files = [word for item in services for word in (item.container_name, f"{host.folder}/logs/{item.name}.log")]
    return ["sh", "-c", FOLLOW_FILES if wanted.is_following else READ_FILES, " ".join(options), *files]


def _read(
    host: str, names: dict[str, str], process: subprocess.Popen[str], complaints: IO[str], found: _Found
) -> None:  # fmt: skip
    for raw in process.stdout or ():
        container, bar, rest = raw.rstrip("\n").partition(" | ")
        service = names.get(container.strip(), "")
        time, _, text = rest.partition(" ")
        found.lines.put(Line(host, service, time, text) if bar and service else Line(host, "", "", raw.strip()))
    code = process.wait()
    if code > 0 and not found.is_over.is_set():
        complaints.seek(0)
        words = " ".join("".join(complaints.readlines()[-3:]).split())
        found.problems.append(f"{host}: {words or f'ended with {code}'}; ./generate.py doctor looks for the cause")
    found.lines.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
