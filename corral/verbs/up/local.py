"""`up` and `down` of a `local` host: its programs under supervisord, which outlives the command.

`up` starts what does not run and starts again only what is not as rendered: replicas one at a time, drained before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from rich.console import Console

from corral.components import litellm
from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime import supervisor
from corral.runtime.board import Board
from corral.runtime.haproxy import Balancer, running_balancer
from corral.runtime.processes import ProcessHost
from corral.runtime.waiting import wait_well
from corral.verbs.up.order import Phase, in_order, phase_of
from corral.verbs.up.rolling import drain_for_good, roll


def bring_up(host: ProcessHost, board: Board, timeout_s: float | None = None) -> int:
    """Makes what is rendered run; returns how many programs were started, changed or ended once all are well.

    Raises:
        CorralError: a port is taken, or a program does not become well; what runs already stays.
    """
    if supervisor.programs(host.place) is None:
        count = _start(host, board)
        wait_well(host, host.services, board, timeout_s)
        return count
    return _change(host, board, timeout_s)


def _start(host: ProcessHost, board: Board) -> int:
    if left := supervisor.members(host.place):
        board.say(f"{host.name}: ending {len(left)} processes that an earlier run left without their supervisord")
        supervisor.stop(host.place)
    _refuse_taken(host, host.services)
    board.say(f"{host.name}: starting {', '.join(item.name for item in host.services)}")
    supervisor.start(host.place, host.runtime.path)
    return len(host.services)


def _change(host: ProcessHost, board: Board, timeout_s: float | None) -> int:
    """Ends what is not rendered any more, starts what is missing or stopped, then changes the rest in its order."""
    changes = supervisor.reread(host.place)
    services = {item.name: item for item in host.services}
    _refuse_taken(host, [services[name] for name in changes.added])
    for name in changes.removed:
        board.say(f"{host.name}: {name} is not in the inventory any more: ending it")
        _drain(host, name, board)
        supervisor.take_out(host.place, name)
    if changes.added:
        board.say(f"{host.name}: starting {', '.join(changes.added)}")
    for name in changes.added:
        supervisor.put_in(host.place, name)
    stopped = [
        item.name
        for item in (supervisor.programs(host.place) or {}).values()
        if not item.pid and item.state not in ("starting", "backoff") and item.name not in changes.changed
    ]
    for name in stopped:
        board.say(f"{host.name}: {name} does not run: starting it")
        supervisor.asked(host.place, "startProcess", name, timeout_s=supervisor.START_DEADLINE_S)
    well = {item.service for item in host.containers() if item.is_well}
    settling = [item for name, item in services.items() if name not in {*well, *changes.changed}]
    wait_well(host, settling, board, timeout_s)
    ordered = in_order(host.plan, (services[name] for name in changes.changed))
    if ordered:
        board.say(f"{host.name}: changed, one at a time: {', '.join(item.name for item in ordered)}")
    gateways = [item for item in ordered if phase_of(host.plan, item) >= Phase.GATEWAY]
    roll(host, [item.name for item in ordered if item not in gateways], board, timeout_s=timeout_s)
    reloads = _reload_balancer(host, board)
    roll(host, [item.name for item in gateways], board, timeout_s=timeout_s)
    return len([*changes.removed, *changes.added, *stopped, *ordered]) + reloads


def _reload_balancer(host: ProcessHost, board: Board) -> bool:
    """Lets a HAProxy with an older configuration read the rendered one; whether it had an older one."""
    balancer = Balancer(host.plan, host)
    if not any(item.reloads for item in host.services) or balancer.loaded() == balancer.rendered():
        return False
    board.say(f"{host.name}: the balancer reads its new configuration, without a gap")
    balancer.reload()
    return True


def _refuse_taken(host: ProcessHost, services: Iterable[Service]) -> None:
    if taken := supervisor.taken_ports(services):
        lines = "\n".join(f"  {line}" for line in taken)
        raise CorralError(
            f"{host.name}: nothing was started:\n{lines}\nend that process, or change the port in the inventory"
        )


def _drain(host: ProcessHost, name: str, board: Board) -> None:
    """Takes the replicas of a program out of rotation, and waits until they have no request."""
    balancer = running_balancer(host.plan, host.out)
    for server in balancer.servers().values() if balancer else ():
        if balancer and server.name == f"{host.name}-{name}":
            drain_for_good(host.plan, balancer, server, board)


def take_down(host: ProcessHost, talk: Console, *, volumes: bool) -> None:
    """Ends every process of a host, the gateway first: it would wait for its database. Data goes only if asked for."""
    known = supervisor.programs(host.place) or {}
    for name in (item.name for item in host.services if item.component == litellm.COMPONENT):
        if name in known and known[name].pid:
            supervisor.asked(host.place, "stopProcess", name, timeout_s=supervisor.STOP_LIMIT_S)
    supervisor.stop(host.place, max((item.stop_grace_s for item in host.services), default=0))
    talk.print(f"{host.name}: ended {sum(item.pid > 0 for item in known.values())} programs")
    for folder in host.names_of("volume") if volumes else ():
        shutil.rmtree(folder)
