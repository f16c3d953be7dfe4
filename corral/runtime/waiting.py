"""Containers of services: making them, waiting until they are well, and why one is not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from functools import partial

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.board import Board, Seen, wait_all
from corral.runtime.causes import ENDS, cause_of, explained
from corral.runtime.docker import Container
from corral.runtime.hosts import CommandError, ComposeHost
from corral.runtime.processes import ProcessHost
from corral.runtime.supervisor import holder_of

COMMAND_LIMIT_S = 600
LOG_LINES = 12
WIDTH = 240
# Stands for the container of a service that has none.
ABSENT = Container(id="", name="", project="", service="", image="", state="missing")
# Conditions that do not end by themselves.
HOPELESS = frozenset({"missing", "exited", "dead", "created", "parked"})
# Exit code of a container whose program is not in its image.
NO_PROGRAM = 127
# What the engine says while an earlier, killed command is still at work.
RACES = re.compile(
    r"is already in progress|Conflict\. The container name|No such container|marked for removal", re.IGNORECASE
)
RACE_TRIES = 5
RACE_PAUSE_S = 2
PORT_TAKEN = re.compile(r"(?:Bind for|listen tcp4?|bind host port)\D*\s?\S*?:(\d+)\b")


def create(host: ComposeHost, services: Sequence[str]) -> None:
    """Makes and starts the containers of services as they are rendered, and touches no other.

    Raises:
        CorralError: the engine refuses; the message says why and what helps.
    """
    if isinstance(host, ProcessHost):
        for name in services:
            host.renew(name)
        return
    arguments = ("up", "--detach", "--no-deps", "--no-build", "--pull", "never", *services)
    for left in reversed(range(RACE_TRIES)):
        try:
            host.compose(*arguments, limit_s=COMMAND_LIMIT_S)
        except CommandError as error:
            if left and RACES.search(error.done.words):
                time.sleep(RACE_PAUSE_S)
                continue
            raise CorralError(_refusal(host, services, error)) from None
        return


def _refusal(host: ComposeHost, services: Sequence[str], error: CommandError) -> str:
    message = error.done.words
    lines = message.splitlines() or ["no answer"]
    line = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
    refused = [item.service for item in host.containers() if item.error]
    named = ", ".join(name for name in services if name in refused) or ", ".join(services)
    cause = cause_of(message)
    port = PORT_TAKEN.search(message)
    holder = port_holder(host, int(port[1])) if port else ""
    parts = [f"{host.name}: the engine does not start {named}: {line}"]
    if cause:
        parts.append(f"  likely cause: {cause.words}")
    if port and holder:
        parts.append(f"  port {port[1]} is held by {holder}")
    return "\n".join(parts)


def port_holder(host: ComposeHost, port: int) -> str:
    """Who holds a port of a host: a container, or (on this machine) a process."""
    form = '{{.Names}} (project {{.Label "com.docker.compose.project"}})'
    found = host.run(["docker", "ps", "--filter", f"publish={port}", "--format", form], check=False).out.split("\n")[0]
    if found:
        return f"the container {found.replace(' (project )', '')}"
    return holder_of(port) if host.ssh is None else ""


def wait_well(host: ComposeHost, services: Iterable[Service], board: Board, timeout_s: float | None = None) -> None:
    """Returns when the containers of services are well, as `wait_all` does."""
    if isinstance(host, ProcessHost):
        wait_all(host.runtime.look, host.runtime.explain, services, board, timeout_s)
        return
    restarts: dict[str, int] = {}

    def look(wanted: Iterable[Service]) -> dict[str, Seen]:
        found = {item.service: item for item in host.containers()}
        return {service.name: _seen(found.get(service.name, ABSENT), restarts) for service in wanted}

    wait_all(look, partial(problem, host), services, board, timeout_s)


def _seen(container: Container, restarts: dict[str, int]) -> Seen:
    """How a container is; `restarts` has how often each had been restarted when the wait began."""
    first = restarts.setdefault(container.id, container.restarts)
    is_ending = container.state == "restarting"
    ends = container.restarts - (0 if is_ending else first)
    has_no_program = is_ending and container.exit_code == NO_PROGRAM
    is_hopeless = ends >= ENDS or has_no_program or container.condition in HOPELESS
    return Seen(container.condition, container.is_well, is_hopeless)


def problem(host: ComposeHost, service: Service, message: str = "") -> CorralError:
    """Why a service is not well; `message` comes first."""
    log = host.last_lines(service.container_name, LOG_LINES)
    container = host.container_of(service.name)
    reason = explained(container, service, log)
    lines = [f"{host.name}/{service.name}: {message + '; ' if message else ''}{reason.what}"]
    if container is not None:
        numbers = f"exit code {container.exit_code}, {container.restarts} restarts"
        lines.append(f"  container {container.name}: {container.condition}, {numbers}")
        if container.last_check and container.condition != "healthy":
            lines.append(f"  last health check: {' '.join(container.last_check.split())[:WIDTH]}")
    last = [line.rstrip()[:WIDTH] for line in log.splitlines() if line.strip()][-LOG_LINES:]
    lines.extend(["  last lines:", *(f"    {line}" for line in last)] if last else ["  it wrote nothing"])
    if reason.remedy:
        lines.append(f"  remedy: {reason.remedy}")
    return CorralError("\n".join(lines))
