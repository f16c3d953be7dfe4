"""`models ps | load | unload | swap`: which models are in memory, and changing that while the farm answers.

A shared server's models are changed by the gateway's own service (`/models/load` and its kin, haproxy/models.lua),
which lets answers end first; a server with one model is started and stopped. What is in memory is asked from inside
the containers, with the key that lies there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from corral.build import Plan
from corral.components.llama import API_KEY
from corral.errors import CorralError, UsageError, did_you_mean
from corral.gateway.frontends import gateway_publish_address
from corral.plan.site import Replica
from corral.render.secrets import ENV_FILE, read_env
from corral.runtime.board import Board
from corral.runtime.haproxy import Balancer, running_balancer
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.waiting import create, wait_well
from corral.tables import new_table
from corral.units import grouped
from corral.verbs.keys.gateway import client as client_of
from corral.verbs.up.rolling import roll, wait_usable
from corral.verbs.up.up import LOCK

ANSWER_S = 30
# A sleeping model has given its weights back, not its place.
READY = frozenset({"loaded", "sleeping"})
STYLES = {"loaded": "green", "running": "green", "sleeping": "cyan", "loading": "yellow", "failed": "bold red"}
ASK = (
    rf"""printf 'Authorization: Bearer %s' "$(sed -n '/^[^#]/{{p;q;}}' /run/secrets/{API_KEY})" | """
    r"""curl -sS -H @- -m "$1" -X "$3" ${5:+-d "$5"} -w '\n%{http_code}' "http://localhost:$2$4" """
)
OK, BAD_REQUEST, UNAUTHORIZED, FAILED = 200, 400, 401, 502
MEMORY_OF_CARDS = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader,nounits 2>/dev/null || true"
_ALIAS = re.compile(r"--alias (\S+)")
KIB = 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """One pool's model on one server, and what is known of it at this moment."""

    pool: str
    model: str
    host: str
    service: str
    # `loaded`, `sleeping`, `loading`, `unloaded` or `failed` on a shared server; else `running` or `stopped`.
    state: str
    # Resident memory of its process as the host's kernel counts it, with the part of its file that is in memory.
    memory_mib: int | None
    # What the NVIDIA driver says its process has on cards.
    card_mib: int | None
    # What the plan counts for it on cards, or on the processor its share of the container's limit.
    planned_mib: int


@dataclass(frozen=True, slots=True)
class Place:
    """A replica, its host, and how to reach it."""

    host: ComposeHost
    replica: Replica

    @property
    def container(self) -> str:
        """Name of the container that serves it."""
        return self.host.plan.site.container(self.host.name, self.replica.service)

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.replica.pool} ({self.host.name}/{self.replica.service})"

    def ask(self, method: str, path: str, model: str = "", limit_s: int = ANSWER_S) -> tuple[int, Any]:
        """What the router of a shared server answers: status and data; raises CorralError when it does not."""
        words = [str(limit_s), str(self.replica.port), method, path, json.dumps({"model": model}) if model else ""]
        argv = ["docker", "exec", self.container, "sh", "-c", ASK, "-", *words]
        done = self.host.run(argv, check=False, limit_s=limit_s + ANSWER_S)
        text, _, code = done.out.rpartition("\n")
        if done.code != 0 or not code.isdecimal():
            raise CorralError(f"{self.host.name}: {self.container} does not answer: {done.words}")
        with suppress(ValueError):
            return int(code), json.loads(text)
        return int(code), text

    def states(self) -> dict[str, str]:
        """State of every model of a shared server, by pool."""
        code, data = self.ask("GET", "/models")
        if code != OK:
            raise CorralError(f"{self.host.name}: {self.container} does not say what it holds: {code} {data}")
        found = {item["id"]: item["status"] for item in data["data"]}
        return {name: "failed" if item.get("failed") else str(item["value"]) for name, item in found.items()}


def places_of(plan: Plan, out: Path, hosts: Iterable[str] | None = None) -> list[Place]:
    """Every replica of a llama-server on the plan's Compose hosts."""
    known = {host.name: host for host in compose_hosts(plan, out, hosts)}
    replicas = [item for item in plan.site.replicas if item.weights.served_by.is_shareable]
    return [Place(known[item.host], item) for item in replicas if item.host in known]


def chosen(places: Sequence[Place], names: Iterable[str]) -> list[Place]:
    """The replicas of these pools; raises UsageError for a name that is no pool of ours."""
    known = {place.replica.pool for place in places}
    for name in names:
        if name not in known:
            raise UsageError(f'no pool named "{name}" on these hosts; {did_you_mean(name, known)}')
    wanted = set(names)
    return [place for place in places if place.replica.pool in wanted]


# --- what is there ---------------------------------------------------------------------------------------------------


def ps(places: Sequence[Place]) -> list[Loaded]:
    """Every model with its state and the memory that it takes."""
    hosts = {place.host.name: place.host for place in places}
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        found = pool.map(lambda host: _on_host(host, [item for item in places if item.host is host]), hosts.values())
        return [model for models in found for model in models]


def _on_host(host: ComposeHost, places: Sequence[Place]) -> Iterator[Loaded]:
    on_cards = _card_memory(host) if any(place.replica.cards for place in places) else {}
    for members in grouped((place.replica.service, place) for place in places).values():
        processes = _processes(host, members[0].container)
        states = members[0].states() if members[0].replica.shared and processes else {}
        for place in members:
            replica = place.replica
            alone_here = replica.shared is None
            pids = [pid for pid, (alias, _) in processes.items() if alias == replica.pool]
            state = ("running" if pids else "stopped") if alone_here else states.get(replica.pool, "stopped")
            yield Loaded(
                replica.pool, replica.model, replica.host, replica.service, state,
                sum(processes[pid][1] for pid in pids) // KIB if pids else None,
                sum(on_cards[pid] for pid in pids) if pids and on_cards.keys() & set(pids) else None,
                replica.vram_mib or replica.memory_mib,
            )  # fmt: skip


def _processes(host: ComposeHost, container: str) -> dict[int, tuple[str, int]]:
    """Pool (none: a router) and resident KiB of every llama-server in a container, by number of the process."""
    out = host.run(["docker", "top", container, "-eo", "pid,rss,args"], check=False).out
    found: dict[int, tuple[str, int]] = {}
    for line in out.splitlines()[1:]:
        pid, rss, command = line.split(None, 2)
        alias = _ALIAS.search(command)
        if command.split()[0].rpartition("/")[2] == "llama-server":
            found[int(pid)] = (alias[1] if alias else "", int(rss))
    return found


def _card_memory(host: ComposeHost) -> dict[int, int]:
    """MiB on NVIDIA cards by number of the process; empty where the driver does not say."""
    lines = host.run(["sh", "-c", MEMORY_OF_CARDS], check=False).out.splitlines()
    found: dict[int, int] = {}
    for pid, _, mib in (line.partition(",") for line in lines):
        if pid.strip().isdecimal() and mib.strip().isdecimal():
            found[int(pid)] = found.get(int(pid), 0) + int(mib)
    return found


def show(models: Sequence[Loaded], console: Console) -> None:
    """Prints a line for each model."""
    table = new_table("pool", "model", "server", "state", ">in memory, MiB", ">on cards, MiB", ">planned, MiB")
    for item in models:
        sizes = ("" if size is None else str(size) for size in (item.memory_mib, item.card_mib, item.planned_mib))
        state = Text(item.state, STYLES.get(item.state, "dim"))
        table.add_row(item.pool, item.model, f"{item.host}/{item.service}", state, *sizes)
    console.print(table)


# --- changing it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What changing needs to know."""

    plan: Plan
    out: Path
    balancer: Balancer | None
    board: Board

    def tell(self, place: Place, words: str, *, is_done: bool = False) -> None:
        """Says what happens to a model."""
        self.board.show(place.host.name, place.replica.service, f"{place.replica.pool}: {words}", is_done=is_done)


@contextmanager
def changing(plan: Plan, out: Path, talk: Console) -> Iterator[Change]:
    """The block changes the farm while no other command does."""
    with Interrupts(), alone(out / LOCK, "corral models"), Board(talk) as board:
        yield Change(plan, out, running_balancer(plan, out, board), board)


def unload(change: Change, places: Sequence[Place]) -> None:
    """Takes models out of memory, each after its answers have ended. What shares a server comes back when it is asked.

    Raises:
        CorralError: a model did not go; those after it were not touched.
    """
    _ask_gateway(change, "unload", places)
    for place in places:
        if not place.replica.shared:
            roll(place.host, [place.replica.service], change.board, action="stop")
        elif change.balancer is None:
            place.ask("POST", "/models/unload", place.replica.pool)
        else:
            continue
        change.tell(place, "not in memory any more", is_done=True)


def load(change: Change, places: Sequence[Place], instead_of: str = "") -> None:
    """Brings models into memory. Where a shared server is full, another goes: the least recently used, or the named.

    Raises:
        CorralError: a model did not load; what was there before is back.
        UsageError: the model that is to go is not there.
    """
    _ask_gateway(change, "load", places, instead_of)
    for place in places:
        if not place.replica.shared:
            service = next(item for item in place.host.services if item.name == place.replica.service)
            create(place.host, [service.name])
            wait_well(place.host, [service], change.board)
            if change.balancer is not None:
                wait_usable(change.balancer, {place.replica.container})
            change.tell(place, "in memory", is_done=True)
        elif change.balancer is None:
            _load_by_router(change, place, instead_of)


def _ask_gateway(change: Change, action: str, places: Sequence[Place], instead_of: str = "") -> None:
    """Lets HAProxy change shared servers: it drains them, and brings the former model back if the new one fails."""
    shared = {place.replica.pool: place for place in places if place.replica.shared}
    if change.balancer is None or not shared:
        return
    named = {(place.replica.pool, place.host.name) for place in places}
    for item in change.plan.site.replicas:
        if item.pool in shared and item.shared and (item.pool, item.host) not in named:
            raise UsageError(f"{item.pool} is on {item.host}, too, and changes everywhere at once; leave --host out")
    gateway = change.plan.inventory.gateway
    host = ComposeHost(change.plan, gateway.host, change.out)
    key = read_env(host.rendered / ENV_FILE).get(API_KEY, "")
    address = gateway_publish_address(change.plan.site)
    with host.forwarded(gateway.port, address) as base, client_of(base, key, None) as client:  # it waits for answers
        for place in shared.values():
            change.tell(place, f"{action}; waits for answers in flight to end")
            change.tell(place, ask_to(client, action, place, instead_of), is_done=True)


def ask_to(client: httpx.Client, action: str, place: Place, instead_of: str = "") -> str:
    """What the gateway says once it has changed a shared server; CorralError or UsageError when it has not."""
    body = {"model": place.replica.pool} | ({"instead_of": instead_of} if instead_of else {})
    try:
        answer = client.post(f"/models/{action}", json=body)
        data = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise CorralError(f"{place}: the gateway does not answer: {error}; see ./generate.py doctor") from None
    if answer.status_code == OK:
        return str(data["message"])
    words = f"{place}: {data['error']['message']}"
    if answer.status_code == BAD_REQUEST:
        raise UsageError(words)
    hints = {
        UNAUTHORIZED: f"; HAProxy runs with another {API_KEY} than {ENV_FILE} has: ./generate.py secrets init, then up",
        FAILED: f"\n  docker logs --tail 50 {place.container} on {place.host.name} says why",
    }
    raise CorralError(words + hints.get(answer.status_code, ""))


def _load_by_router(change: Change, place: Place, instead_of: str) -> None:
    """The same without HAProxy: the router lets answers end before it unloads the least recently used by itself."""
    before = {pool for pool, state in place.states().items() if state in READY}
    if instead_of and instead_of not in before:
        raise UsageError(f"{place}: {instead_of} is not in memory there")
    if instead_of:
        place.ask("POST", "/models/unload", instead_of)
    if _ask_for(place, place.replica.pool):
        change.tell(place, "in memory", is_done=True)
        return
    lost = [pool for pool in before if not _ask_for(place, pool)]
    back = f"{', '.join(lost)} is gone" if lost else "what was in memory is there again"
    words = f"docker logs --tail 50 {place.container} on {place.host.name} says why"
    raise CorralError(f"{place} does not load: {words}; {back}")


def _ask_for(place: Place, pool: str) -> bool:
    """Makes a shared server load a model as a request would; whether it is in memory then."""
    with suppress(CorralError):  # it took too long
        place.ask("GET", f"/props?model={pool}", limit_s=place.replica.start_timeout_s)
    return place.states().get(pool) in READY
