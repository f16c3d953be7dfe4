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
from corral.components import litellm
from corral.components.haproxy import answer_timeout_s
from corral.contributions import Backend, Service
from corral.errors import CorralError
from corral.plan.networks import own_network
from corral.runtime.board import Board, Key, wait_until
from corral.runtime.haproxy import Balancer, BalancerError, Server, backends_of, running_balancer
from corral.runtime.hosts import ComposeHost
from corral.runtime.processes import ProcessHost
from corral.runtime.supervisor import LOOPBACK
from corral.runtime.waiting import COMMAND_LIMIT_S, create, wait_well

ROTATION_LIMIT_S = 60
# Held requests are released at the latest so long after the pool's own limits.
HOLD_SPARE_S = 120
Action = Literal["recreate", "restart", "stop"]


def roll(
    host: ComposeHost,
    services: Sequence[str],
    board: Board,
    *,
    action: Action = "recreate",
    timeout_s: float | None = None,
    keep_out_on_failure: bool = False,
) -> None:
    """Changes services of a host one at a time, replicas without losing a request; returns when the last is well.

    One may take `timeout_s`, its own start timeout when absent. A replica that does not become well is left to the
    balancer's health checks, or (`keep_out_on_failure`) stays out of the balancer.

    Raises:
        CorralError: one did not become well, or is not to stop as its answers do not end; those after it were not
            touched.
    """
    balancer = running_balancer(host.plan, host.out, board)
    known = {service.name: service for service in host.plan.services_of(host.name)}
    for name in services:
        Work(host, known[name], board, action, timeout_s, keep_out_on_failure).change(balancer)


@dataclass(frozen=True, slots=True)
class Work:
    """One service and what is to be done with it."""

    host: ComposeHost
    service: Service
    board: Board
    action: Action
    timeout_s: float | None
    keep_out_on_failure: bool

    @property
    def key(self) -> Key:
        """Its row on the board: host and name."""
        return self.host.name, self.service.name

    @property
    def comes_back(self) -> bool:
        """Whether it runs again afterwards."""
        return self.action != "stop"

    def change(self, balancer: Balancer | None) -> None:
        """Changes the service, drained before where a balancer sends it requests; says so if requests could fail."""
        planned = backends_of(self.host.plan, *self.key)
        is_worker = self.service.component == litellm.COMPONENT and self.host.plan.inventory.gateway.workers > 1
        if balancer and is_worker and (workers := balancer.workers(self.service.name)):
            with workers_out(balancer, workers, self.board, comes_back=self.comes_back):
                self.act()
            return
        if balancer is None or not planned:
            self._say_gap(self.act())
            return
        servers = balancer.servers()
        backends = [item for item in planned if item.name in servers]  # none: not in its configuration yet
        with ExitStack() as out:  # several for a server that pools share
            is_hitless = [out.enter_context(self._out_of_rotation(balancer, item)) for item in backends]
            seconds = self.act()
            for item in backends if self.comes_back else ():
                self._follow(balancer, item)
        if not all(is_hitless):
            self._say_gap(seconds)

    def _say_gap(self, seconds: float) -> None:
        if self.comes_back:
            self.board.say(f"{'/'.join(self.key)}: did not answer for up to {seconds:.0f} s", "yellow")

    def act(self) -> float:
        """Makes, restarts or stops the container, waits until it is well; returns the seconds that this took."""
        began = time.monotonic()
        state = {"recreate": "being made anew", "restart": "restarting", "stop": "stopping"}[self.action]
        self.board.show(*self.key, state)
        if self.action == "recreate" or isinstance(self.host, ProcessHost):
            create(self.host, [self.service.name])
        else:
            options = ["--no-deps"] if self.action == "restart" else []
            self.host.compose(self.action, *options, self.service.name, limit_s=COMMAND_LIMIT_S)
        if self.comes_back:
            wait_well(self.host, [self.service], self.board, self.timeout_s)
        return time.monotonic() - began

    @contextmanager
    def _out_of_rotation(self, balancer: Balancer, backend: Backend) -> Iterator[bool]:
        """The block runs while the replica gets no requests and has none; yields whether no client was affected."""
        servers = balancer.servers()
        server = servers.pop(backend.name)
        is_only = not any(other.is_usable for other in servers.values() if other.group == server.group)
        is_held = is_only and self._hold(balancer, backend.pool, server.group)
        try:
            if not is_held:
                balancer.take_out(server)
            limit_s = answer_timeout_s(self.host.plan.site, backend.pool)
            seen = _only(balancer, backend.name)
            is_idle = _drain(seen, backend.name, limit_s, self.board, self.key, may_cut=self.comes_back)
            if is_held:
                balancer.take_out(server)
            yield is_idle and (is_held or not is_only)
        except BaseException:
            if not self.keep_out_on_failure:
                with suppress(BalancerError):
                    balancer.put_back(server)
            raise
        else:
            balancer.put_back(server)
            if self.comes_back:
                wait_usable(balancer, {backend.name})
                self.board.show(*self.key, "back in rotation", is_done=True)
        finally:
            if is_held:
                with suppress(BalancerError):
                    balancer.release(server.group)

    def _hold(self, balancer: Balancer, pool: str, group: str) -> bool:
        """Lets the pool's new requests wait, and says so; False when the balancer cannot."""
        plan = self.host.plan
        queue = plan.inventory.pools[pool].queue or plan.inventory.gateway.queue
        limit_s = answer_timeout_s(plan.site, pool) + self.service.health.start_timeout_s + HOLD_SPARE_S
        is_held = balancer.hold(group, limit_s)
        if self.comes_back:
            waiting = f"up to {queue.depth} requests wait in the balancer, {queue.timeout_s} s at most,"
            effect, style = (waiting, "") if is_held else ("its requests are refused", "yellow")
            self.board.say(f"{pool} has no other replica that could answer: {effect} until this one is back", style)
        return is_held

    def addresses(self) -> list[str]:
        """Where the changed service is."""
        return addresses_of(self.host, self.service)

    def _follow(self, balancer: Balancer, backend: Backend) -> None:
        """Waits until the balancer knows where the new container is, and changes its port there if that differs."""
        if self.host.plan.site.is_behind_edge(backend.endpoint, balancer.host.name):
            if balancer.servers()[backend.name].port != self.host.plan.inventory.gateway.edge_port:
                raise CorralError(
                    f"the balancer on {balancer.host.name} still calls {backend.name} past the edge of "
                    f"{self.host.name}; run ./generate.py up without --host"
                )
            return
        addresses = self.addresses()

        def is_found() -> bool:
            server = balancer.servers()[backend.name]
            if server.port == backend.endpoint.port and (not addresses or server.address in addresses):
                return True
            if server.port != backend.endpoint.port:
                balancer.move(server, addresses[0], backend.endpoint.port)
            self.board.show(*self.key, "healthy", "the balancer looks up its new address")
            return False

        if not wait_until(is_found, ROTATION_LIMIT_S):
            balancer.move(balancer.servers()[backend.name], addresses[0], backend.endpoint.port)


@contextmanager
def workers_out(balancer: Balancer, workers: Sequence[Server], board: Board, *, comes_back: bool) -> Iterator[None]:
    """The block runs while one of LiteLLM's workers has no request and gets none; the others get them.

    A worker that stops closes its idle connections. A request that HAProxy sends at that moment has no answer.
    """
    name = workers[0].name
    limit_s = balancer.plan.inventory.gateway.timeout_s
    try:
        for worker in workers:
            balancer.take_out(worker)
        _drain(lambda: balancer.workers(name), name, limit_s, board, (balancer.host.name, name))
        yield
    finally:
        for worker in workers:
            balancer.put_back(worker)
    if comes_back and not wait_until(lambda: all(item.is_usable for item in balancer.workers(name)), ROTATION_LIMIT_S):
        raise CorralError(f"{name} is healthy, but the balancer does not reach it")


def addresses_of(host: ComposeHost, service: Service) -> list[str]:
    """The addresses of a service's container, first that on the network on which the balancer calls it."""
    if isinstance(host, ProcessHost):
        return [LOOPBACK]
    own = f"{host.project}_{own_network(service)}"
    container = host.container_of(service.name)
    networks = container.networks if container else {}
    own_first = sorted(networks, key=lambda name: (name != own, name))
    return [networks[name] for name in own_first if networks[name]]


def _only(balancer: Balancer, name: str) -> Callable[[], list[Server]]:
    """Looks a replica up; it finds none once the balancer has forgotten it."""
    return lambda: [server for server in balancer.servers().values() if server.name == name]


def _drain(
    seen: Callable[[], Sequence[Server]], name: str, limit_s: float, board: Board, key: Key, *, may_cut: bool = True
) -> bool:
    """Returns when what is seen has no request, or after so long; whether it has none.

    Raises:
        CorralError: it still has some, which may not be cut off.
    """
    count = 0

    def is_idle() -> bool:
        nonlocal count
        count = sum(server.in_flight + server.waiting for server in seen())
        if count:
            board.show(*key, "draining", f"waits for {count} requests, {limit_s:.0f} s at most")
        return not count

    if wait_until(is_idle, limit_s):
        return True
    message = f"{name}: {count} requests are not done after {limit_s:.0f} s"
    if not may_cut:
        raise CorralError(f"{message}; it goes on")
    board.say(f"{message}; they are cut off", "yellow")
    return False


def wait_usable(balancer: Balancer, names: Collection[str]) -> None:
    """Returns when the balancer gives these replicas requests; raises CorralError when it does not in time."""

    def unusable() -> list[str]:
        return [
            f"{item.name} at {item.address}:{item.port} ({item.status})"
            for item in balancer.servers().values()
            if item.name in names and not item.is_usable
        ]

    if not wait_until(lambda: not unusable(), ROTATION_LIMIT_S):
        raise CorralError(f"healthy, but the balancer does not reach it: {', '.join(unusable())}")


def drain_for_good(plan: Plan, balancer: Balancer, server: Server, board: Board) -> None:
    """Takes a replica out of rotation and waits until it has no request, as long as an answer may take."""
    balancer.take_out(server)
    pool = server.group.partition(".")[0]
    limit_s = answer_timeout_s(plan.site, pool) if pool in plan.inventory.pools else plan.inventory.gateway.timeout_s
    _drain(_only(balancer, server.name), server.name, limit_s, board, (balancer.host.name, server.name))
