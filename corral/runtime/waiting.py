"""Waiting until services are well, and saying why one is not: state, health log, last lines and likely cause."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Sequence

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.board import Board
from corral.runtime.causes import ENDS, cause_of, explained
from corral.runtime.docker import Container
from corral.runtime.hosts import CommandError, ComposeHost
from corral.runtime.ports import holder_of

POLL_S = 0.5
# Beyond a service's own start timeout: the engine checks every ten seconds once that has passed.
SPARE_S = 30
COMMAND_LIMIT_S = 600
LOG_LINES = 12
WIDTH = 240
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
    words = ("up", "--detach", "--no-deps", "--no-build", "--pull", "never", *services)
    for left in reversed(range(RACE_TRIES)):
        try:
            host.compose(*words, limit_s=COMMAND_LIMIT_S)
        except CommandError as error:
            if left and RACES.search(error.done.words):
                time.sleep(RACE_PAUSE_S)
                continue
            raise CorralError(_refusal(host, services, error)) from None
        return


def _refusal(host: ComposeHost, services: Sequence[str], error: CommandError) -> str:
    words = error.done.words
    lines = words.splitlines() or ["no answer"]
    line = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
    refused = [item.service for item in host.containers() if item.error]
    named = ", ".join(name for name in services if name in refused) or ", ".join(services)
    cause = cause_of(words)
    port = PORT_TAKEN.search(words)
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


def wait_well(
    host: ComposeHost,
    services: Iterable[Service],
    board: Board,
    timeout_s: float | None = None,
    unsaid: Collection[str] = (),
) -> None:
    """Returns when every service is well.

    Args:
        host: where they run.
        services: those to wait for.
        board: shows their states.
        timeout_s: longest wait for one of them; its own start timeout when absent.
        unsaid: names of services that are not mentioned unless they fail.

    Raises:
        CorralError: one of them is not well in time, or there is no hope.
    """
    began = time.monotonic()
    waiting = {service.name: service for service in services}
    restarts: dict[str, int] = {}
    while waiting:
        containers = {item.service: item for item in host.containers()}
        elapsed = time.monotonic() - began
        for name, service in list(waiting.items()):
            container = containers.get(name)
            state = container.condition if container else "missing"
            is_well = container is not None and container.is_well
            if name not in unsaid:
                board.show(host.name, name, f"{state} after {elapsed:.0f} s" if is_well else state, is_done=is_well)
            if is_well:
                del waiting[name]
            elif _is_hopeless(container, restarts):
                raise problem(host, service)
            elif elapsed > (limit := _limit_s(service, state, timeout_s)):
                raise problem(host, service, f"not well within {limit:.0f} s")
        if waiting:
            time.sleep(POLL_S)


def _limit_s(service: Service, state: str, timeout_s: float | None) -> float:
    limit = timeout_s if timeout_s is not None else service.health.start_timeout_s + SPARE_S
    return min(limit, SPARE_S) if state == "unhealthy" else limit  # of an earlier run, perhaps: it may become well


def _is_hopeless(container: Container | None, restarts: dict[str, int]) -> bool:
    """Whether waiting longer is no use."""
    if container is None or container.condition in {"exited", "dead", "created", "parked"}:
        return True
    count = container.restarts
    first = restarts.setdefault(container.id, count)
    return count - first >= ENDS or (container.state == "restarting" and count >= ENDS)


def problem(host: ComposeHost, service: Service, words: str = "") -> CorralError:
    """Why a service is not well, in words for a person."""
    log = host.last_lines(service.container_name, LOG_LINES)
    container = host.container_of(service.name)
    reason = explained(container, service, log)
    lines = [f"{host.name}/{service.name}: {words + '; ' if words else ''}{reason.what}"]
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
