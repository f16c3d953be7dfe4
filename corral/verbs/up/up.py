"""`up`, `down` and `restart`: what is rendered runs, in stages that wait for health; or nothing of it runs any more.

`up` may be interrupted or fail at any point and be run again: it looks at what there is and does what is missing.
Containers that are as rendered are never touched; replicas that changed are drained before they are made anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from rich.console import Console

from corral.build import Plan
from corral.checks.policy import refuse_weak
from corral.components import haproxy
from corral.config.image_lock import IMAGE_LOCK
from corral.contributions import Service
from corral.errors import CorralError, DriftError, UsageError
from corral.gateway.frontends import entrance_address
from corral.plan.site import bracketed
from corral.render.output import compare
from corral.render.tree import render
from corral.runtime.board import Board
from corral.runtime.docker import Container
from corral.runtime.haproxy import Balancer, balancer_of, edge_of, running_balancer
from corral.runtime.hosts import CPU_FILE, CommandError, ComposeHost
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.processes import ProcessHost, refuse_missing, site_hosts
from corral.runtime.waiting import COMMAND_LIMIT_S, create, wait_well
from corral.verbs.images import check_ids
from corral.verbs.keys import keys
from corral.verbs.keys.gateway import client_address
from corral.verbs.up import history
from corral.verbs.up.local import bring_up, take_down
from corral.verbs.up.order import Phase, in_order, phases
from corral.verbs.up.rolling import drain_for_good, roll, wait_usable
from corral.verbs.up.survey import (
    Found,
    Survey,
    check_engine,
    check_files,
    check_names,
    is_reconfigured,
    join_networks,
    prune_networks,
    survey,
)

LOCK = ".up.lock"
PULL_LIMIT_S = 7200


@dataclass(slots=True)
class Run:
    """One `up` at work: the hosts, what was seen there, and how it talks."""

    plan: Plan
    out: Path
    # Those with containers.
    hosts: list[ComposeHost]
    board: Board
    timeout_s: float | None = None
    # Hosts whose programs are processes; what they call on Compose hosts comes up before them.
    local: list[ProcessHost] = field(default_factory=list)
    seen: dict[str, Survey] = field(default_factory=dict)
    # How many services and configurations it has changed.
    touched: int = 0

    @property
    def names(self) -> set[str]:
        """Names of all its hosts."""
        return {host.name for host in (*self.hosts, *self.local)}

    @property
    def haproxies(self) -> list[Balancer]:
        """The balancer and the edges on the hosts that are brought up: they read a new configuration without a gap."""
        found = (balancer_of(self.plan, self.out), *(edge_of(seen.host) for seen in self.seen.values()))
        return [item for item in found if item is not None and item.host.name in self.seen]


# --- up --------------------------------------------------------------------------------------------------------------


def up(
    plan: Plan,
    out: Path,
    talk: Console,
    *,
    hosts: Iterable[str] | None = None,
    timeout_s: float | None = None,
    is_on_cpu: bool = False,
) -> None:
    """Makes what is rendered run, and returns when all of it is well.

    One service may take `timeout_s`, its own start timeout when absent. `is_on_cpu` is for machines without cards: what
    wants one runs on the processor; what runs remembers it.

    Raises:
        DriftError: the rendering on disk differs from the plan.
        CorralError: something did not come up; what runs already stays.
    """
    began = time.monotonic()
    chosen = site_hosts(plan, out, hosts)
    local = [host for host in chosen if isinstance(host, ProcessHost)]
    compose = [replace(host, is_on_cpu=is_on_cpu) for host in chosen if not isinstance(host, ProcessHost)]
    if is_on_cpu and not compose:
        raise UsageError("--cpu is for containers; a `local` host's servers run on the processor anyway")
    check_rendering(plan, out, {host.name for host in chosen})
    check_secrets(plan, out, chosen)
    for host in local:
        refuse_missing(host)
    with Interrupts(), alone(out / LOCK, "corral up"), Board(talk) as board:
        run = Run(plan, out, compose, board, timeout_s, local)
        carry_out(run)
        remember(run, Path(plan.source_file).read_text(encoding="utf-8"))
        _sync_keys(run)
    seconds = time.monotonic() - began
    count = sum(len(seen.found) for seen in run.seen.values()) + sum(len(host.services) for host in local)
    where = f"{count} services on {', '.join(host.name for host in chosen)}"
    if run.touched:
        talk.print(f"{where} are up after {seconds:.0f} s; {run.touched} were started or changed")
    else:
        talk.print(f"nothing to do: {where} are up and as rendered (looked at in {seconds:.1f} s)")
    talk.print(next_words(plan, out, chosen), soft_wrap=True)


def carry_out(run: Run) -> None:
    """Brings everything up in stages; raises CorralError at the first service that does not become well."""
    look(run)
    fetch_images(run)
    _remove_left_over(run)
    for seen in run.seen.values():
        join_networks(seen)
    order = phases(run.plan)
    if _closes_ports(run):
        run.board.say("servers close their published ports: the balancer goes over to the hosts' edges first")
        for phase in (Phase.EDGES, Phase.BALANCER):
            _bring_up(run, phase, order[phase])
        look(run)
    for phase, services in order.items():
        if phase == Phase.STORES:
            _stop_gateway(run, services, order[Phase.GATEWAY])
        _bring_up(run, phase, services)
    for local in run.local:
        run.touched += bring_up(local, run.board, run.timeout_s)
    _restore_rotation(run)
    for host in run.hosts:
        prune_networks(host)


def look(run: Run) -> None:
    """Checks the engines, copies renderings to far hosts, and sees what is there."""
    for number, host in enumerate(run.hosts):
        check_engine(host)
        check_names(host)
        check_files(host)
        _copy(host)
        containers = host.containers()
        run.hosts[number] = as_started(host, containers)
        seen = run.seen[host.name] = survey(run.hosts[number], containers)
        check_ids(
            host, run.plan, [(item.service.image, item.image_id) for item in seen.found.values() if item.image_id]
        )


def as_started(host: ComposeHost, containers: Iterable[Container]) -> ComposeHost:
    """The host with the files that its containers were started with: once on the processor, always there."""
    if not (host.rendered / CPU_FILE).is_file():
        return replace(host, is_on_cpu=False)
    return replace(host, is_on_cpu=host.is_on_cpu or any(CPU_FILE in item.compose_files for item in containers))


def _copy(host: ComposeHost) -> None:
    try:
        host.copy()
    except CommandError as error:
        cause = "the disk is full; " if "no space left" in error.done.words.lower() else ""
        message = f"{cause}nothing was changed there ({error.done.last_line})"
        raise CorralError(f"{host.name}: the rendering cannot be copied: {message}") from None


def _closes_ports(run: Run) -> bool:
    """Whether servers of an older rendering still publish ports that the balancer on another host calls."""
    gateway = run.plan.inventory.gateway.host
    servers = {(item.endpoint.host, item.endpoint.service) for item in run.plan.contributions.backends}
    return gateway in run.seen and any(
        place == run.plan.site.host(host).address
        for host, seen in run.seen.items()
        for name, item in seen.found.items()
        if host != gateway and (host, name) in servers
        for place, _ in item.container.published
    )


def fetch_images(run: Run) -> None:
    """Fetches images that are not there, before anything is touched; raises CorralError for what cannot be had."""
    problems = []
    for seen in run.seen.values():
        missing: dict[str, list[str]] = {}
        for item in seen.found.values():
            if not item.image_id:
                missing.setdefault(item.service.image, []).append(item.service.name)
        for image, services in sorted(missing.items()):
            if problem := _fetch(run, seen.host, image):
                problems.append(
                    f"{seen.host.name}: the image {image} of {', '.join(services)} is not there and {problem}"
                )
    if problems:
        raise CorralError("nothing was changed\n" + "\n".join(problems))


def _fetch(run: Run, host: ComposeHost, image: str) -> str:
    """Fetches an image; what went wrong, with the remedy, empty when nothing did."""
    if run.plan.image_lock.ids(image):
        return (
            f"{IMAGE_LOCK} knows it by id only\n  build it there, or bring it: bundle load, docker save … | docker load"
        )
    run.board.say(f"{host.name}: fetching {image}")
    done = host.run(["docker", "pull", "--quiet", image], check=False, limit_s=PULL_LIMIT_S)
    if done.code == 0:
        return ""
    problem = f"cannot be fetched: {done.last_line}\n  "
    if "@" in image:
        problem += (
            "does the registry have that content no more? Then look what it has now: ./generate.py images lock; or "
        )
    return problem + "name another one in images:, or bring it there: docker save … | docker load"


def _bring_up(run: Run, phase: Phase, services: Sequence[Service]) -> None:
    """Starts what does not run, waits until all of it is well, then changes what is not as rendered."""
    found = {
        host: [seen.found[item.name] for item in services if item.host == host and item.name in seen.found]
        for host, seen in run.seen.items()
    }
    for host in run.hosts:
        if missing := [item.service.name for item in found[host.name] if not item.container.is_up]:
            run.board.say(f"{host.name}: {phase.title}: starting {', '.join(missing)}")
            run.touched += len(missing)
            create(host, missing)
    for host in run.hosts:
        _settle(run, host, found[host.name])
    names = {service.container_name for service in services}
    for item in run.haproxies:
        if item.container in names and item.loaded() != item.rendered():
            _reload(run, item)


def _stop_gateway(run: Run, stores: Sequence[Service], gateways: Sequence[Service]) -> None:
    """Stops a gateway that is changed together with its stores: with the new ones it may refuse valid keys.

    Clients get 503, which they repeat, until the new gateway is there.
    """
    changed = {
        (host, name) for host, seen in run.seen.items() for name, item in seen.found.items() if not item.is_current
    }
    if not any((item.host, item.name) in changed for item in stores):
        return
    for host in run.hosts:
        found = run.seen[host.name].found
        names = [item.name for item in gateways if item.host == host.name and (host.name, item.name) in changed]
        if running := [found[name].container.id for name in names if found[name].container.is_up]:
            run.board.say(f"{host.name}: stores change: stopping {', '.join(names)} until they are well")
            host.run(["docker", "stop", *running], limit_s=COMMAND_LIMIT_S)


def _settle(run: Run, host: ComposeHost, found: Sequence[Found]) -> None:
    """Waits until what is as rendered is well, then changes the rest, but for what reads its new configuration."""
    changed = [item for item in found if item.container.is_up and not item.is_current]
    settling = [item.service for item in found if item not in changed and not item.container.is_well]
    wait_well(host, settling, run.board, run.timeout_s)
    reloadable = {item.container for item in run.haproxies}
    names = [
        item.service.name
        for item in changed
        if not (item.service.container_name in reloadable and item.container.is_well and is_reconfigured(host, item))
    ]
    if names:
        run.board.say(f"{host.name}: changed, one at a time: {', '.join(names)}")
        run.touched += len(names)
        roll(host, names, run.board, timeout_s=run.timeout_s)


def _reload(run: Run, item: Balancer) -> None:
    name = "the balancer" if item.component == haproxy.COMPONENT else "its edge"
    run.board.say(f"{item.host.name}: {name} reads its new configuration, without a gap")
    run.touched += 1
    item.reload()


def _restore_rotation(run: Run) -> None:
    """Puts back what a killed run had taken out."""
    if balancer := running_balancer(run.plan, run.out):
        for name in balancer.put_all_back():
            run.touched += 1
            run.board.say(f"{name}: was out of rotation, is back")
        backends = run.plan.contributions.backends
        wait_usable(balancer, {item.name for item in backends if item.is_ours and item.endpoint.host in run.names})


def _remove_left_over(run: Run) -> None:
    """Stops and removes containers of these projects whose services are not rendered any more, drained first."""
    for seen in run.seen.values():
        for container in seen.left_over:
            run.board.say(
                f"{seen.host.name}: {container.name} is not in the inventory any more: stopping and removing it"
            )
            run.touched += 1
            _drain(run, container, run.plan.site.host(seen.host.name).address)
            seen.host.run(["docker", "stop", container.id], limit_s=COMMAND_LIMIT_S)
            seen.host.run(["docker", "rm", container.id], check=False)


def _drain(run: Run, container: Container, host_address: str) -> None:
    """Drains the replicas in a container; several where pools share a server."""
    if balancer := running_balancer(run.plan, run.out):
        inside = set(container.networks.values()) - {""}
        for server in balancer.servers().values():
            if server.address in inside or (server.address, server.name) == (host_address, container.name):
                drain_for_good(run.plan, balancer, server, run.board)


def _sync_keys(run: Run) -> None:
    """Gives consumers their keys, once the gateway runs; raises CorralError when a name is taken."""
    host = run.plan.inventory.gateway.host
    if host not in run.names or not keys.needs_sync(run.plan):
        return
    steps = keys.sync(run.plan, run.out)
    for step in steps:
        if step.is_change:
            run.board.say(f"{host}: keys: {step.action} {step.name}")
    keys.conclude(steps, dry_run=False)


# --- before and after ------------------------------------------------------------------------------------------------


def check_rendering(plan: Plan, out: Path, hosts: set[str]) -> None:
    """Raises DriftError when what is on disk is not what the inventory says, CorralError when it weakens a host."""
    tree = render(plan)
    refuse_weak(plan, {path: data for path, data in tree.items() if path.partition("/")[0] in hosts})
    changes = [change for change in compare(tree, out, hosts) if change.action != "identical"]
    if changes:
        edited = [change.path for change in changes if change.action == "edited"]
        by_hand = f"; edited by hand: {', '.join(edited)}" if edited else ""
        raise DriftError(
            f"{len(changes)} files in {out} differ from the inventory{by_hand}; "
            f"nothing was started: look with ./generate.py diff, then ./generate.py render (or up --render)"
        )


def check_secrets(plan: Plan, out: Path, hosts: Sequence[ComposeHost]) -> None:
    """Raises CorralError when a host's secrets are not all there."""
    missing = [
        f"{secret.name} of {host.name}"
        for host in hosts
        for secret in plan.secrets_of(host.name)
        if not (out / host.name / "secrets" / secret.name).is_file()
    ]
    if missing:
        raise CorralError(f"secrets are missing: {', '.join(missing)}; run: ./generate.py secrets init")


def remember(run: Run, inventory: str) -> None:
    """Keeps the rendering that has just come up well, and the text of its inventory."""
    for host in (*run.hosts, *run.local):
        history.record(run.out, host.name, history.files_on_disk(run.out, host.name), inventory)


def next_words(plan: Plan, out: Path, hosts: Sequence[ComposeHost]) -> str:
    """The address to use, or what is to be brought up next."""
    gateway = plan.inventory.gateway
    if gateway.host not in {host.name for host in hosts}:
        return f"next: ./generate.py up --host {gateway.host}"
    bases = [f"{client_address(plan)}/v1"]
    if gateway.entrance is not None:
        scheme = "https" if gateway.entrance.certificate else "http"
        bases.append(
            f"{scheme}://{bracketed(entrance_address(plan.site, gateway.entrance))}:{gateway.entrance.port}/v1"
        )
    key = f"LITELLM_MASTER_KEY in {out / gateway.host / '.env'}"
    return f"base URL: {' and '.join(bases)} (key: {key}); next: ./generate.py status"


# --- restart and down ------------------------------------------------------------------------------------------------


def restart(plan: Plan, out: Path, services: Sequence[Service], talk: Console) -> None:
    """Restarts services one at a time, replicas drained before; returns when the last one is well.

    Raises:
        CorralError: a service has no container, or did not become well; those after it were not touched. Or another
            command changes this farm at the moment.
    """
    hosts = {host.name: host for host in site_hosts(plan, out, {item.host for item in services})}
    there = {(name, item.service) for name, host in hosts.items() for item in host.containers()}
    missing = [f"{item.host}/{item.name}" for item in services if (item.host, item.name) not in there]
    if missing:
        raise CorralError(f"{', '.join(missing)}: not there to restart; ./generate.py up makes what is missing")
    with Interrupts(), alone(out / LOCK, "corral restart"), Board(talk) as board:
        for name, group in groupby(in_order(plan, services), key=lambda service: service.host):
            roll(hosts[name], [service.name for service in group], board, action="restart")


def down(
    plan: Plan,
    out: Path,
    talk: Console,
    *,
    hosts: Iterable[str] | None = None,
    volumes: bool = False,
    yes: bool = False,
) -> None:
    """Stops and removes containers, networks and processes of these hosts; volumes only when asked for twice.

    Raises:
        UsageError: volumes are to go and `yes` was not said; the message names them.
    """
    chosen = site_hosts(plan, out, hosts)
    for host in chosen:
        if not isinstance(host, ProcessHost):
            check_engine(host)
    kept = {host.name: sorted(host.names_of("volume")) for host in chosen}
    if volumes and not yes and any(kept.values()):
        lost = "\n".join(f"  {host}: {name}" for host, names in kept.items() for name in names)
        raise UsageError(
            f"nothing was stopped; these volumes and all that is in them would be lost:\n{lost}\n"
            "to lose them, add --yes"
        )
    with alone(out / LOCK, "corral down"):
        # The gateway's host first, so that no request is sent to replicas that are stopping.
        for host in sorted(chosen, key=lambda host: host.name != plan.inventory.gateway.host):
            if isinstance(host, ProcessHost):
                take_down(host, talk, volumes=volumes)
            else:
                _take_down(host, talk, volumes=volumes)
            if kept[host.name]:
                kept_or_lost = f"{'lost' if volumes else 'kept'} the volumes {', '.join(kept[host.name])}"
                talk.print(f"{host.name}: {kept_or_lost}", soft_wrap=True)
    talk.print("nothing of it runs any more; ./generate.py up starts it again")


def _take_down(host: ComposeHost, talk: Console, *, volumes: bool) -> None:
    """By the project's name alone: its files may be gone. The gateway and then the balancer end before replicas do."""
    ids = {item.service: item.id for item in host.containers()}
    talk.print(f"{host.name}: stopping and removing {len(ids)} containers")
    order = phases(host.plan)
    for phase in (Phase.GATEWAY, Phase.BALANCER):
        running = [ids[item.name] for item in order[phase] if item.host == host.name and item.name in ids]
        if running:
            host.run(["docker", "stop", *running], limit_s=COMMAND_LIMIT_S)
    command = ["docker", "compose", "--project-name", host.project, "down", "--remove-orphans"]
    host.run([*command, *(["--volumes"] if volumes else [])], limit_s=COMMAND_LIMIT_S)
    left = [item.service for item in host.containers()]
    if left:
        raise CorralError(f"{host.name}: still there: {', '.join(left)}; run it again")
