"""Save and restore the state of services, on this machine and over ssh.

A volume is read and written by the engine itself (`docker cp`), so that an image needs no tools for it.
"""

from __future__ import annotations

from typing import IO

from corral.contributions import Service, State
from corral.errors import CorralError
from corral.runtime.board import Board
from corral.runtime.hosts import ComposeHost
from corral.runtime.waiting import create, wait_well

# Copies a folder of a paused container. It ends by itself when its reader is gone, and always ends the pause.
COPY = """
set -eu
id=$1 path=$2 held=
end() { [ -z "$held" ] || docker unpause "$id" >/dev/null; }
trap end EXIT
trap 'exit 1' HUP INT TERM
if [ "$(docker inspect --format '{{.State.Running}} {{.State.Paused}}' "$id")" = "true false" ]; then
    held=yes
    docker pause "$id" >/dev/null
fi
docker cp --archive "$id:$path/." -
"""


def state_of_plan(host: ComposeHost) -> list[State]:
    """What of a host's services is worth keeping."""
    return [state for state in host.plan.contributions.states if state.host == host.name]


def title(state: State) -> str:
    """`sa/postgres: database (keys, budgets and spend)`."""
    return f"{state.host}/{state.service}: {state.name} ({state.purpose})"


def take_words(host: ComposeHost, state: State) -> list[str]:
    """The command on the host that prints a state; raises CorralError when there is nothing to take it from."""
    container = host.container_of(state.service)
    remedy = f"start it first: ./generate.py up --host {host.name}"
    if container is None:
        raise CorralError(f"{title(state)} cannot be saved: {state.service} has no container; {remedy}")
    if not state.dump:
        return ["sh", "-c", COPY, "sh", container.id, state.path]
    if not container.is_running:
        raise CorralError(f"{title(state)} cannot be saved: {state.service} does not run ({container.state}); {remedy}")
    return ["docker", "exec", container.id, *state.dump]


def put_back(host: ComposeHost, state: State, data: IO[bytes], board: Board) -> None:
    """Restore a state into its service; raises CorralError when the service refuses it."""
    service = _service(host, state)
    if state.load:
        create(host, [service.name])
        wait_well(host, [service], board)
        words = ["docker", "exec", "--interactive", _id(host, state), *state.load]
    else:
        host.compose("up", "--no-start", "--no-deps", "--no-build", "--pull", "never", service.name)
        words = ["docker", "cp", "--archive", "-", f"{_id(host, state)}:{state.path}"]
    host.feed(words, data)


def _service(host: ComposeHost, state: State) -> Service:
    return next(item for item in host.plan.services_of(host.name) if item.name == state.service)


def _id(host: ComposeHost, state: State) -> str:
    container = host.container_of(state.service)
    if container is None:
        raise CorralError(f"{title(state)}: the container of {state.service} is gone again")
    return container.id
