"""`models ps | load | unload | swap`: which models are in memory, and changing that while the farm answers.

A shared server's models are loaded and unloaded through the router's own address, asked from inside its container with
the key that lies there; a server with one model is started and stopped. Before a model goes, the balancer sends it
nothing more and its answers end: llama-server itself would cut them off.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.build import Plan
from corral.components.haproxy import answer_timeout_s
from corral.components.llama import API_KEY
from corral.errors import CorralError, UsageError, did_you_mean
from corral.plan.site import Replica
from corral.runtime.board import Board
from corral.runtime.haproxy import Balancer, BalancerError, Server, balancer_of
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.waiting import COMMAND_LIMIT_S, create, wait_well
from corral.verbs.up.rolling import wait_for_answers, wait_usable
from corral.verbs.up.up import LOCK

POLL_S = 0.25
ANSWER_S = 30
# An idle model is gone within a second; the router itself waits ten before it kills one.
UNLOAD_S = 60
HOLD_SPARE_S = 120
# States that count against `loaded`; a sleeping model has given its weights back, not its place.
IN_MEMORY = frozenset({"loaded", "sleeping", "loading"})
STYLES = {"loaded": "green", "running": "green", "sleeping": "cyan", "loading": "yellow", "failed": "bold red"}
ASK = (
    rf"""printf 'Authorization: Bearer %s' "$(sed -n '/^[^#]/{{p;q;}}' /run/secrets/{API_KEY})" | """
    r"""curl -sS -H @- -m "$1" -X "$3" ${5:+-d "$5"} -w '\n%{http_code}' "http://localhost:$2$4" """
)
OK = 200
PROCESSES = "docker top %s -eo pid,rss,args 2>/dev/null"
MEMORY_OF_CARDS = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader,nounits 2>/dev/null || true"
_ALIAS = re.compile(r"--alias (\S+)")
KIB = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """One pool's model on one server, and what is known of it at this moment."""

    pool: str
    model: str
    host: str
    service: str
    state: str
    """`loaded`, `sleeping`, `loading`, `unloaded` or `failed` on a shared server; else `running` or `stopped`."""
    memory_mib: int | None
    """Resident memory of its process as the host's kernel counts it, with the part of its file that is in memory."""
    card_mib: int | None
    """What the NVIDIA driver says its process has on cards."""
    planned_mib: int
    """What the plan counts for it on cards, or on the processor its share of the container's limit."""


@dataclass(frozen=True, slots=True)
class Place:
    """A replica, its host, and how to reach it."""

    host: ComposeHost
    replica: Replica

    @property
    def container(self) -> str:
        """Name of the container that serves it."""
        services = self.host.plan.services_of(self.host.name)
        return next(item.container_name for item in services if item.name == self.replica.service)

    @property
    def key(self) -> tuple[str, str]:
        """As boards show it."""
        return self.host.name, self.replica.service

    @property
    def words(self) -> str:
        """As messages name it."""
        return f"{self.replica.pool} ({self.host.name}/{self.replica.service})"

    @property
    def siblings(self) -> list[Place]:
        """Everybody on the same server, itself among them."""
        return [Place(self.host, item) for item in self.host.plan.site.members(*self.key)]

    @property
    def loaded(self) -> int:
        """How many models its server may hold at once."""
        return self.replica.shared.loaded if self.replica.shared else 1

    @property
    def start_timeout_s(self) -> int:
        """How long it may load."""
        return self.replica.start_timeout_s

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """What the router of a shared server answers: status and data; raises CorralError when it does not."""
        words = [str(ANSWER_S), str(self.replica.port), method, path, json.dumps(body) if body else ""]
        done = self.host.run(["docker", "exec", self.container, "sh", "-c", ASK, "-", *words], check=False)
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


def ps(places: Sequence[Place]) -> list[Model]:
    """Every model with its state and the memory that it takes."""
    hosts = {place.host.name: place.host for place in places}
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        found = pool.map(lambda host: _on_host(host, [item for item in places if item.host is host]), hosts.values())
        return [model for models in found for model in models]


def _on_host(host: ComposeHost, places: Sequence[Place]) -> Iterator[Model]:
    on_cards = _card_memory(host) if any(place.replica.cards for place in places) else {}
    servers: dict[str, list[Place]] = {}
    for place in places:
        servers.setdefault(place.replica.service, []).append(place)
    for members in servers.values():
        processes = _processes(host, members[0].container)
        states = members[0].states() if members[0].replica.shared and processes else {}
        for place in members:
            replica = place.replica
            alone_here = replica.shared is None
            pids = [pid for pid, (alias, _) in processes.items() if alias == replica.pool]
            state = ("running" if pids else "stopped") if alone_here else states.get(replica.pool, "stopped")
            yield Model(
                replica.pool, replica.model, replica.host, replica.service, state,
                sum(processes[pid][1] for pid in pids) // KIB if pids else None,
                sum(on_cards[pid] for pid in pids) if pids and on_cards.keys() & set(pids) else None,
                replica.vram_mib or replica.memory_mib,
            )  # fmt: skip


def _processes(host: ComposeHost, container: str) -> dict[int, tuple[str, int]]:
    """Pool (none: a router) and resident KiB of every llama-server in a container, by number of the process."""
    out = host.run(["sh", "-c", PROCESSES % '"$1"', "-", container], check=False).out
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


def show(models: Sequence[Model], console: Console) -> None:
    """Prints a line for each model."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("pool", "model", "server", "state", "in memory, MiB", "on cards, MiB", "planned, MiB"):
        table.add_column(column, justify="right" if "MiB" in column else "left")
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
    balancer: Balancer | None
    board: Board


@contextmanager
def changing(plan: Plan, out: Path, talk: Console) -> Iterator[Change]:
    """The block changes the farm while no other command does."""
    with Interrupts(), alone(out / LOCK, "corral models"), Board(talk) as board:
        balancer = balancer_of(plan, out)
        if balancer is not None and not balancer.is_running():
            board.say("the balancer does not run, so nothing is drained", "yellow")
            balancer = None
        yield Change(plan, balancer, board)


def unload(change: Change, places: Sequence[Place]) -> None:
    """Takes models out of memory, each after its answers have ended. What shares a server comes back when it is asked.

    Raises:
        CorralError: a model did not go; those after it were not touched.
    """
    for place in places:
        if place.replica.shared:
            if place.states().get(place.replica.pool) not in IN_MEMORY:
                _tell(change, place, "not in memory")
                continue
            with _without_requests(change, [place], [place]):
                _unload(change, place)
        else:
            with _without_requests(change, [place], []):
                change.board.show(*place.key, "stopping")
                place.host.compose("stop", place.replica.service, limit_s=COMMAND_LIMIT_S)
        _tell(change, place, "not in memory any more")


def load(change: Change, places: Sequence[Place], instead_of: str = "") -> None:
    """Brings models into memory. Where a shared server is full, another goes: the least recently used, or the named.

    Raises:
        CorralError: a model did not load; what was there before is back.
        UsageError: the model that is to go is not there.
    """
    for place in places:
        if not place.replica.shared:
            service = next(item for item in place.host.services if item.name == place.replica.service)
            create(place.host, [service.name])
            wait_well(place.host, [service], change.board)
            if change.balancer is not None:
                wait_usable(change.balancer, {place.replica.container})
            _tell(change, place, "in memory")
            continue
        states = place.states()
        if states.get(place.replica.pool) in {"loaded", "sleeping"}:
            _tell(change, place, "in memory already")
            continue
        former = _who_goes(change, place, states, instead_of)
        others = [item for item in place.siblings if item.replica.pool != place.replica.pool]
        with _without_requests(change, [former] if former else [], [*others, place]):
            _exchange(change, place, former)


def _who_goes(change: Change, place: Place, states: Mapping[str, str], instead_of: str) -> Place | None:
    """The model that makes room for another one; None where there is room."""
    there = {item.replica.pool: item for item in place.siblings if states.get(item.replica.pool) in IN_MEMORY}
    there.pop(place.replica.pool, None)
    if instead_of:
        if instead_of not in there:
            held = ", ".join(there) or "nothing"
            raise UsageError(f"{instead_of} is not in memory on {place.replica.service}, which holds {held}")
        return there[instead_of]
    if len(there) < place.loaded:
        return None
    idle = change.balancer.idle_seconds() if change.balancer else {}
    return max(there.values(), key=lambda item: (idle.get(item.replica.container, 0), item.replica.pool))


def _exchange(change: Change, place: Place, former: Place | None) -> None:
    """One model in the place of another; the former comes back when the new one does not load."""
    if former is not None:
        _unload(change, former)
    try:
        _load(change, place)
    except BaseException as error:
        if former is None:
            raise
        change.board.say(f"{place.words} does not load; {former.replica.pool} comes back", "yellow")
        with suppress(CorralError):  # a half-loaded one would be in the way
            _unload(change, place)
        _load(change, former)
        if not isinstance(error, CorralError):
            raise
        raise CorralError(f"{error}\n  {former.words} is in memory again, as before") from None
    _tell(change, place, "in memory" + (f" instead of {former.replica.pool}" if former else ""))


def _load(change: Change, place: Place) -> None:
    pool = place.replica.pool
    change.board.show(*place.key, f"loading {pool}")
    code, data = place.ask("POST", "/models/load", {"model": pool})
    if code != OK and place.states().get(pool) not in IN_MEMORY:  # a request may have made it load already
        raise CorralError(f"{place.words} does not load: {_reason(data)}")
    deadline = time.monotonic() + place.start_timeout_s
    while (state := place.states().get(pool)) not in {"loaded", "sleeping"}:
        if state != "loading":
            words = f"docker logs --tail 50 {place.container} on {place.host.name} says why"
            raise CorralError(f"{place.words} does not load: its server ended; {words}")
        if time.monotonic() > deadline:
            raise CorralError(f"{place.words} is not loaded after {place.start_timeout_s} s (start_timeout_s)")
        time.sleep(POLL_S)


def _unload(change: Change, place: Place) -> None:
    pool = place.replica.pool
    change.board.show(*place.key, f"unloading {pool}")
    code, data = place.ask("POST", "/models/unload", {"model": pool})
    deadline = time.monotonic() + UNLOAD_S
    while place.states().get(pool) in IN_MEMORY:
        if time.monotonic() > deadline:
            raise CorralError(f"{place.words} does not go ({code} {_reason(data)})")
        time.sleep(POLL_S)


def _reason(data: Any) -> str:
    error = data.get("error") if isinstance(data, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(data)


def _tell(change: Change, place: Place, words: str) -> None:
    change.board.show(*place.key, f"{place.replica.pool}: {words}", is_done=True)


# --- requests meanwhile ----------------------------------------------------------------------------------------------


@contextmanager
def _without_requests(change: Change, leaving: Sequence[Place], waiting: Sequence[Place]) -> Iterator[None]:
    """The block runs once the leaving models have no request. New requests to the waiting pools wait for its end.

    Where another replica of a pool can answer, its requests go there; where HAProxy has no Lua, they are refused.
    """
    balancer = change.balancer
    if balancer is None:
        yield
        return
    leave = {place.replica.container for place in leaving}
    with ExitStack() as undo:
        servers = balancer.servers()
        for name, place in {place.replica.container: place for place in (*leaving, *waiting)}.items():
            if name in servers:
                undo.enter_context(_kept_away(change, balancer, place, servers, leaves=name in leave))
        for place in leaving:
            _wait_idle(change, balancer, place)
        yield


@contextmanager
def _kept_away(
    change: Change, balancer: Balancer, place: Place, servers: Mapping[str, Server], *, leaves: bool
) -> Iterator[None]:
    """New requests to a pool wait, or go to its other replicas, while the block runs."""
    server = servers[place.replica.container]
    others = [item for item in servers.values() if item.group == server.group and item.name != server.name]
    limit_s = answer_timeout_s(change.plan.site, place.replica.pool) + place.start_timeout_s + HOLD_SPARE_S
    is_held = not any(item.is_usable for item in others) and balancer.hold(server.group, limit_s)
    if leaves and not is_held:
        balancer.take_out(server)
    try:
        yield
    finally:
        with suppress(BalancerError):
            if is_held:
                balancer.release(server.group)
            elif leaves:
                balancer.put_back(server)


def _wait_idle(change: Change, balancer: Balancer, place: Place) -> None:
    """Returns when a model has no request; raises CorralError when its answers do not end in the pool's own time."""
    limit_s = answer_timeout_s(change.plan.site, place.replica.pool)

    def tell(count: int) -> None:
        change.board.show(*place.key, f"{place.replica.pool}: waits for its answers to end", f"{count}, {limit_s} s")

    count = wait_for_answers(balancer, place.replica.container, limit_s, tell)
    if count:
        raise CorralError(f"{place.words}: {count} requests are not done after {limit_s} s; it stays in memory")
