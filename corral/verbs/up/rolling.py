"""Changing services one at a time while the farm answers.

A replica is taken out of the balancer, finishes the requests that it has, is made anew (or restarted), becomes healthy
and goes back; then comes the next. When it is the only one of its pool, new requests wait in the balancer meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from corral.build import Plan
from corral.components.haproxy import answer_timeout_s
from corral.contributions import Backend, Service
from corral.errors import CorralError
from corral.plan.networks import own_network
from corral.runtime.board import Board, Key
from corral.runtime.haproxy import Balancer, BalancerError, Server, backends_of, balancer_of
from corral.runtime.hosts import ComposeHost
from corral.runtime.waiting import COMMAND_LIMIT_S, create, wait_well

POLL_S = 0.25
ROTATION_LIMIT_S = 60
# Held requests are released at the latest so long after the pool's own limits.
HOLD_SPARE_S = 120
Action = Literal["recreate", "restart"]


@dataclass(frozen=True, slots=True)
class Gap:
    """A service that was away: how long, and whether its requests were elsewhere or waited meanwhile."""

    host: str
    service: str
    seconds: float
    is_hitless: bool


def roll(
    host: ComposeHost,
    services: Sequence[str],
    board: Board,
    *,
    action: Action = "recreate",
    timeout_s: float | None = None,
    keep_out_on_failure: bool = False,
) -> list[Gap]:
    """Changes services of a host one at a time, replicas without losing a request; returns when the last is well.

    Args:
        host: where they run.
        services: their names, in the order in which they are changed.
        board: shows what happens.
        action: make their containers anew as rendered, or restart them as they are.
        timeout_s: longest wait for one to become well; its own start timeout when absent.
        keep_out_on_failure: leave a replica that does not become well out of the balancer, instead of leaving the
            decision to the balancer's health checks.

    Raises:
        CorralError: one did not become well; those after it were not touched.
    """
    known = {service.name: service for service in host.plan.services_of(host.name)}
    balancer = balancer_of(host.plan, host.out)
    if balancer is not None and not balancer.is_running():
        board.say("the balancer does not run, so nothing is drained", "yellow")
        balancer = None
    gaps = []
    for name in services:
        work = _Work(host, known[name], board, action, timeout_s)
        backends = backends_of(host.plan, host.name, name)
        if balancer is None or not backends:
            gaps.append(Gap(host.name, name, _change(work), is_hitless=False))
        else:
            gaps.append(_change_replica(work, balancer, backends, keep_out=keep_out_on_failure))
    return gaps


@dataclass(frozen=True, slots=True)
class _Work:
    """One service and what is to be done with it."""

    host: ComposeHost
    service: Service
    board: Board
    action: Action
    timeout_s: float | None

    @property
    def key(self) -> Key:
        return self.host.name, self.service.name

    def show(self, state: str, detail: str = "") -> None:
        self.board.show(*self.key, state, detail)


def _change(work: _Work) -> float:
    """Makes a service anew and waits until it is well; returns the seconds that this took."""
    work.show("restarting" if work.action == "restart" else "being made anew")
    began = time.monotonic()
    if work.action == "restart":
        work.host.compose("restart", "--no-deps", work.service.name, limit_s=COMMAND_LIMIT_S)
    else:
        create(work.host, [work.service.name])
    wait_well(work.host, [work.service], work.board, work.timeout_s)
    return time.monotonic() - began


def _change_replica(work: _Work, balancer: Balancer, backends: Sequence[Backend], *, keep_out: bool) -> Gap:
    servers = balancer.servers()
    known = [backend for backend in backends if backend.name in servers]
    if not known:  # not in the running balancer's configuration yet
        return Gap(work.host.name, work.service.name, _change(work), is_hitless=True)
    with ExitStack() as out:  # several for a server that pools share
        is_hitless = [out.enter_context(_out_of_rotation(work, balancer, item, keep_out=keep_out)) for item in known]
        seconds = _change(work)
        for backend in known:
            _follow(work, balancer, backend)
    return Gap(work.host.name, work.service.name, seconds, all(is_hitless))


@contextmanager
def _out_of_rotation(work: _Work, balancer: Balancer, backend: Backend, *, keep_out: bool) -> Iterator[bool]:
    """The block runs while the replica gets no requests and has none; yields whether no client was affected."""
    server = balancer.servers()[backend.name]
    is_only = not _siblings(balancer, server)
    is_held = is_only and _hold(work, balancer, backend, server)
    limit_s = answer_timeout_s(work.host.plan.site, backend.pool)
    try:
        if not is_held:
            balancer.take_out(server)
        is_idle = _wait_idle(balancer, server.name, limit_s, work.board, work.key)
        if is_held:
            balancer.take_out(server)
        yield is_idle and (is_held or not is_only)
    except BaseException:
        if not keep_out:
            with suppress(BalancerError):
                balancer.put_back(server)
        raise
    else:
        balancer.put_back(server)
        wait_usable(balancer, {backend.name})
        work.board.show(*work.key, "back in rotation", is_done=True)
    finally:
        if is_held:
            with suppress(BalancerError):
                balancer.release(server.group)


def _siblings(balancer: Balancer, server: Server) -> list[Server]:
    """Replicas that can take the server's requests."""
    others = balancer.servers().values()
    return [other for other in others if other.group == server.group and other.name != server.name and other.is_usable]


def _hold(work: _Work, balancer: Balancer, backend: Backend, server: Server) -> bool:
    """Lets the pool's new requests wait, and says so; False when the balancer cannot."""
    plan = work.host.plan
    queue = plan.inventory.pools[backend.pool].queue or plan.inventory.gateway.queue
    limit_s = answer_timeout_s(plan.site, backend.pool) + work.service.health.start_timeout_s + HOLD_SPARE_S
    if not balancer.hold(server.group, limit_s):
        work.board.say(
            f"{backend.pool} has no other replica that could answer: its requests are refused until this one is back",
            "yellow",
        )
        return False
    work.board.say(
        f"{backend.pool} has no other replica that could answer: up to {queue.depth} requests wait in the balancer, "
        f"{queue.timeout_s} s at most, until this one is back"
    )
    return True


def _wait_idle(balancer: Balancer, name: str, limit_s: float, board: Board, key: Key) -> bool:
    """Returns when a replica has no request, or after so long; whether it has none."""

    def tell(count: int) -> None:
        board.show(*key, "draining", f"waits for {count} requests, {limit_s:.0f} s at most")

    count = wait_for_answers(balancer, name, limit_s, tell)
    if count:
        board.say(f"{name}: {count} requests are not done after {limit_s:.0f} s; they are cut off", "yellow")
    return not count


def wait_for_answers(balancer: Balancer, name: str, limit_s: float, tell: Callable[[int], None]) -> int:
    """Requests that a replica still has after so many seconds; 0 as soon as it has none. `tell` hears how many."""
    deadline = time.monotonic() + limit_s
    while (now := balancer.servers().get(name)) and (count := now.in_flight + now.waiting):
        if time.monotonic() > deadline:
            return count
        tell(count)
        time.sleep(POLL_S)
    return 0


def _follow(work: _Work, balancer: Balancer, backend: Backend) -> None:
    """Waits until the balancer knows where the new container is, and tells it when the port is another one."""
    site = work.host.plan.site
    if work.host.name != balancer.host.name:
        server = balancer.servers()[backend.name]
        if server.port != site.inventory.gateway.edge_port:
            raise CorralError(
                f"the balancer on {balancer.host.name} still calls {backend.name} past the edge of {work.host.name}; "
                "run ./generate.py up without --host"
            )
        return
    addresses = _addresses(work)
    deadline = time.monotonic() + ROTATION_LIMIT_S
    while True:
        server = balancer.servers()[backend.name]
        if server.port != backend.endpoint.port:
            balancer.move(server, addresses[0], backend.endpoint.port)
        elif not addresses or server.address in addresses:
            return
        if time.monotonic() > deadline:
            balancer.move(server, addresses[0], backend.endpoint.port)
            return
        work.show("healthy", "the balancer looks up its new address")
        time.sleep(POLL_S)


def _addresses(work: _Work) -> list[str]:
    """The container's addresses, first that on the network on which the balancer calls it."""
    own = f"{work.host.project}_{own_network(work.service)}"
    container = work.host.container_of(work.service.name)
    networks = container.networks if container else {}
    own_first = sorted(networks, key=lambda name: (name != own, name))
    return [networks[name] for name in own_first if networks[name]]


def wait_usable(balancer: Balancer, names: Collection[str]) -> None:
    """Returns when the balancer gives these replicas requests; raises CorralError when it does not in time."""
    deadline = time.monotonic() + ROTATION_LIMIT_S
    while True:
        lame = [item for item in balancer.servers().values() if item.name in names and not item.is_usable]
        if not lame:
            return
        if time.monotonic() > deadline:
            places = ", ".join(f"{item.name} at {item.address}:{item.port} ({item.status})" for item in lame)
            raise CorralError(f"healthy, but the balancer does not reach it: {places}")
        time.sleep(POLL_S)


def drained(plan: Plan, balancer: Balancer, name: str, board: Board) -> None:
    """Takes a replica out of rotation for good and waits until it has no request, as long as an answer may take."""
    server = balancer.servers().get(name)
    if server is None:
        return
    balancer.take_out(server)
    pool = server.group.partition(".")[0]
    limit_s = answer_timeout_s(plan.site, pool) if pool in plan.inventory.pools else plan.inventory.gateway.timeout_s
    _wait_idle(balancer, name, limit_s, board, (balancer.host.name, name))
