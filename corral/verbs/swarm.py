"""`up`, `down`, `status` and `logs` of a site that one Docker Swarm runs: all of it through the engine of a manager.

The gateway's host is that manager. What is there already is made anew one service at a time, drained before, because
a deployed stack would change all services at once.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, RenderableType
from rich.text import Text

from corral.build import Plan
from corral.contributions import Service
from corral.errors import CorralError, UsageError
from corral.plan.site import swarm_name
from corral.render.swarm import HOST_LABEL, STACK, named_after, stack_name
from corral.render.templates import dump_yaml, short_digest
from corral.runtime.board import Board
from corral.runtime.haproxy import running_balancer
from corral.runtime.hosts import ComposeHost
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.tables import new_table
from corral.verbs.keys import keys
from corral.verbs.status.logs import Wanted
from corral.verbs.up.order import in_order
from corral.verbs.up.rolling import Work, wait_usable
from corral.verbs.up.up import LOCK, check_rendering, check_secrets, next_words

NAMESPACE = "label=com.docker.stack.namespace"
# Label of a service with the digest of all that was deployed, names of secrets included.
SPEC = "corral.spec"
# What an engine may take beyond the start of its slowest service.
SPARE_S = 120
Data = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """The site's stack as a manager sees it."""

    plan: Plan
    out: Path
    limit_s: float

    @cached_property
    def manager(self) -> ComposeHost:
        """The host whose engine is asked."""
        return ComposeHost(self.plan, self.plan.inventory.gateway.host, self.out)

    @property
    def name(self) -> str:
        """Its name in the engine."""
        return stack_name(self.plan)

    def docker(self, *words: str, given: bytes | None = None) -> str:
        """What a docker command prints there."""
        return self.manager.run(["docker", *words], given=given, limit_s=self.limit_s).out

    def listed(self, kind: str, label: str, form: str = "{{.Name}}") -> list[str]:
        """What there is of a kind with a label."""
        return self.docker(kind, "ls", "--filter", label, "--format", form).splitlines()

    @cached_property
    def rendered(self) -> Data:
        """The stack as it is rendered, with the names that configs and secrets have in the engine."""
        folder = self.out / self.manager.name
        data: Data = yaml.safe_load((folder / STACK).read_text(encoding="utf-8"))
        for kind in ("configs", "secrets"):
            told = data.setdefault(kind, {})
            contents = {key: (folder / item["file"]).read_bytes() for key, item in told.items()}
            data[kind] = {key: {"external": True, "name": named_after(self.plan, key, contents[key])} for key in told}
            self._make(kind.removesuffix("s"), {data[kind][key]["name"]: content for key, content in contents.items()})
        for service in data["services"].values():
            named = [data["secrets"][key]["name"] for key in service.get("secrets", ())]
            named += [data["configs"][item["source"]]["name"] for item in service.get("configs", ())]
            text = json.dumps([service, named], sort_keys=True)
            service["deploy"]["labels"] = {"corral.site": self.plan.inventory.name, SPEC: short_digest(text)}
        return data

    def _make(self, kind: str, contents: Mapping[str, bytes]) -> None:
        label = f"corral.site={self.plan.inventory.name}"
        there = set(self.listed(kind, f"label={label}"))
        for name in contents.keys() - there:
            self.docker(kind, "create", "--label", label, name, "-", given=contents[name])

    def specs(self) -> dict[str, str]:
        """Digest of every service that is deployed, by its name in the stack."""
        names = self.listed("service", f"{NAMESPACE}={self.name}")
        form = f'{{{{.Spec.Name}}}} {{{{index .Spec.Labels "{SPEC}"}}}}'
        lines = self.docker("service", "inspect", "--format", form, *names).splitlines() if names else []
        found = (line.partition(" ") for line in lines)
        return {name.removeprefix(f"{self.name}_"): digest for name, _, digest in found}

    def deploy(self, names: Iterable[str]) -> None:
        """Deploys these services and returns when all of them are well; raises CorralError with what tasks say."""
        services = {name: self.rendered["services"][name] for name in names}
        text = dump_yaml({**self.rendered, "services": services}).encode()
        words = ("--detach=false", "--quiet", "--with-registry-auth", "--resolve-image=never", "--compose-file=-")
        try:
            self.docker("stack", "deploy", *words, self.name, given=text)
        except CorralError as error:
            raise CorralError("\n".join([str(error), *self._complaints(services)])) from None

    def _complaints(self, names: Iterable[str]) -> list[str]:
        """What the engine says of tasks that failed, each once."""
        form = "{{.Name}} on {{.Node}}: {{.CurrentState}}: {{.Error}}"
        given = self.manager.run(["docker", "stack", "ps", "--no-trunc", "--format", form, self.name], check=False).out
        wanted = tuple(f"{self.name}_{name}." for name in names)
        return sorted({line for line in given.splitlines() if line.startswith(wanted) and not line.endswith(": ")})

    def tasks(self) -> list[Data]:
        """Every task that is to run."""
        words = ("--no-trunc", "--filter", "desired-state=running", "--format", "{{json .}}", self.name)
        return [json.loads(line) for line in self.docker("stack", "ps", *words).splitlines()]

    def addresses(self, service: str) -> list[str]:
        """The addresses of a service's task on all its networks."""
        words = ("--quiet", "--no-trunc", "--filter", "desired-state=running", f"{self.name}_{service}")
        found = json.loads(self.docker("inspect", *self.docker("service", "ps", *words).split()))
        networks = (item for task in found for item in task.get("NetworksAttachments") or ())
        return [address.partition("/")[0] for item in networks for address in item.get("Addresses") or ()]

    def sweep(self) -> None:
        """Removes services that are not rendered any more, then configs and secrets that nothing uses."""
        if gone := sorted(self.specs().keys() - self.rendered["services"].keys()):
            self.docker("service", "rm", *(f"{self.name}_{name}" for name in gone))
        for kind in ("config", "secret"):
            used = {item["name"] for item in self.rendered[f"{kind}s"].values()}
            old = set(self.listed(kind, f"label=corral.site={self.plan.inventory.name}")) - used
            if old:  # what a task that ends still uses stays until the next time
                self.manager.run(["docker", kind, "rm", *sorted(old)], check=False)


@dataclass(frozen=True, slots=True)
class _Change(Work):
    """A service that Swarm makes anew, drained before as with Compose."""

    stack: Stack

    def act(self) -> float:
        began = time.monotonic()
        self.board.show(*self.key, "being made anew")
        self.stack.deploy([swarm_name(*self.key)])
        self.board.show(*self.key, f"running after {time.monotonic() - began:.0f} s", is_done=True)
        return time.monotonic() - began

    def addresses(self) -> list[str]:
        return self.stack.addresses(swarm_name(*self.key))


def _stack(plan: Plan, out: Path, timeout_s: float | None = None) -> Stack:
    slowest = max(service.health.start_timeout_s for service in plan.contributions.services)
    return Stack(plan, out, timeout_s or slowest + SPARE_S)


def _hosts(plan: Plan, out: Path) -> list[ComposeHost]:
    busy = {service.host for service in plan.contributions.services}
    return [ComposeHost(plan, name, out) for name in plan.inventory.hosts if name in busy]


# --- up and down -----------------------------------------------------------------------------------------------------


def up(plan: Plan, out: Path, talk: Console, *, timeout_s: float | None = None) -> None:
    """Deploys what is rendered, and returns when all of it is well.

    Raises:
        DriftError: the rendering on disk differs from the plan.
        CorralError: an engine is not as Swarm needs it, or a service did not become well.
    """
    hosts, stack = _hosts(plan, out), _stack(plan, out, timeout_s)
    check_rendering(plan, out, {host.name for host in hosts})
    check_secrets(plan, out, hosts)
    with Interrupts(), alone(out / LOCK, "corral up"), Board(talk) as board:
        _label(stack, hosts)
        there = stack.specs()
        services = {swarm_name(item.host, item.name): item for item in in_order(plan, plan.contributions.services)}
        wanted = {name: stack.rendered["services"][name]["deploy"]["labels"][SPEC] for name in services}
        if new := [name for name in wanted if name not in there]:
            board.say(f"starting {', '.join(new)}")
            stack.deploy(new)
        changed = [services[name] for name in wanted if name in there and there[name] != wanted[name]]
        for service in changed:
            change = _Change(
                ComposeHost(plan, service.host, out), service, board, "recreate", timeout_s,
                keep_out_on_failure=False, stack=stack,
            )  # fmt: skip
            change.change(running_balancer(plan, out))
        stack.sweep()
        if balancer := running_balancer(plan, out):
            balancer.put_all_back()
            wait_usable(balancer, {item.name for item in plan.contributions.backends if item.is_ours})
        for step in keys.sync(plan, out) if keys.needs_sync(plan) else ():
            if step.is_change:
                board.say(f"keys: {step.action} {step.name}")
    talk.print(f"{len(services)} services are up; {len(new)} are new, {len(changed)} were changed")
    talk.print(next_words(plan, out, hosts), soft_wrap=True)


def _label(stack: Stack, hosts: Sequence[ComposeHost]) -> None:
    """Says in the Swarm which node is which host; raises CorralError for engines that are not as Swarm needs them."""
    found = {host.name: json.loads(host.run(["docker", "info", "--format", "{{json .}}"]).out) for host in hosts}
    problems = [f"{name}: {problem}" for name, info in found.items() for problem in _problems(stack, name, info)]
    if problems:
        raise CorralError("nothing was changed\n" + "\n".join(problems))
    for name, info in found.items():
        stack.docker("node", "update", "--label-add", f"{HOST_LABEL}={name}", info["Swarm"]["NodeID"])


def _problems(stack: Stack, host: str, info: Data) -> Iterator[str]:
    """What keeps an engine from running its part of the stack as it is planned."""
    swarm, address = info["Swarm"], stack.plan.site.host(host).address
    if swarm["LocalNodeState"] != "active":
        yield f"is in no Swarm; docker swarm init --advertise-addr {address} on the first, then join the others"
    elif host == stack.manager.name and not swarm["ControlAvailable"]:
        yield "the gateway's host has to be a manager; docker node promote it"
    if not any("no-new-privileges" in option for option in info["SecurityOptions"]):
        yield 'Swarm cannot say no-new-privileges; set "no-new-privileges": true in daemon.json, restart the engine'
    if stack.plan.site.cards[host] and info["DefaultRuntime"] != "nvidia":
        yield 'Swarm asks for no cards; set "default-runtime": "nvidia" in daemon.json, restart the engine'


def down(plan: Plan, out: Path, talk: Console, *, volumes: bool = False, yes: bool = False) -> None:
    """Removes the stack with its configs and secrets; volumes only when asked for twice.

    Raises:
        UsageError: volumes are to go and `yes` was not said; the message names them.
    """
    stack, hosts = _stack(plan, out), _hosts(plan, out) if volumes else []
    listing = ["docker", "volume", "ls", "--quiet", "--filter", f"{NAMESPACE}={stack.name}"]
    kept = {host.name: host.run(listing).out.split() for host in hosts}
    if any(kept.values()) and not yes:
        lost = "\n".join(f"  {host}: {name}" for host, names in kept.items() for name in names)
        raise UsageError(
            f"nothing was stopped; these volumes and all that is in them would be lost:\n{lost}\n"
            "to lose them, add --yes"
        )
    with alone(out / LOCK, "corral down"):
        stack.docker("stack", "rm", "--detach=false", stack.name)
        for kind in ("config", "secret"):
            if names := stack.listed(kind, f"label=corral.site={plan.inventory.name}"):
                stack.docker(kind, "rm", *names)
        for host in hosts:
            if kept[host.name]:
                host.run(["docker", "volume", "rm", *kept[host.name]])
    talk.print("nothing of it runs any more; ./generate.py up starts it again")


# --- status and logs -------------------------------------------------------------------------------------------------


def status(plan: Plan, out: Path) -> Data:
    """Every service of the plan with the node that runs it and what the balancer says of it, as plain data."""
    stack = _stack(plan, out)
    tasks = {task["Name"].rpartition(".")[0]: task for task in stack.tasks()}
    balancer = running_balancer(plan, out)
    servers = balancer.servers() if balancer else {}
    rows = []
    for service in plan.contributions.services:
        name = swarm_name(service.host, service.name)
        task, server = tasks.get(f"{stack.name}_{name}", {}), servers.get(service.container_name)
        is_well = str(task.get("CurrentState", "")).startswith("Running") and (server is None or server.is_usable)
        rows.append(
            {
                "service": name,
                "node": task.get("Node"),
                "state": task.get("CurrentState") or "absent",
                "problem": task.get("Error") or None,
                "balancer": server and server.status,
                "requests": server and server.in_flight,
                "well": is_well,
            }
        )
    return {"well": all(row["well"] for row in rows), "services": rows}


def status_view(data: Data) -> RenderableType:
    """The same for people."""
    table = new_table("service", "node", "state", "balancer", ">requests")
    for row in data["services"]:
        state = Text(" ".join(filter(None, (row["state"], row["problem"]))), "" if row["well"] else "red")
        told = (row["balancer"] or "", "" if row["requests"] is None else str(row["requests"]))
        table.add_row(row["service"], row["node"] or "", state, *told)
    return table


def show_logs(plan: Plan, out: Path, services: Sequence[Service], wanted: Wanted, console: Console) -> None:
    """Prints what tasks of these services print, by time; following ends with Ctrl-C."""
    stack = _stack(plan, out)
    options = ["--timestamps", "--tail", wanted.tail, *(["--since", wanted.since] if wanted.since else [])]
    options += ["--follow"] if wanted.is_following else []
    names = [f"{stack.name}_{swarm_name(service.host, service.name)}" for service in services]
    script = f'for name; do docker service logs {shlex.join(options)} "$name" 2>&1 & done; wait'
    try:
        with stack.manager.stream(["sh", "-c", script, "sh", *names]) as lines:
            texts = (raw.decode(errors="replace").rstrip("\n") for raw in lines)
            for text in texts if wanted.is_following else sorted(texts):
                console.print(Text.from_ansi(re.sub(rf"^\S+ {stack.name}_", "", text)))
    except KeyboardInterrupt:
        return
