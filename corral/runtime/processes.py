"""A `local` host of this machine as the verbs see a host: its programs under supervisord look like containers."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from corral.build import Plan
from corral.contributions import Service
from corral.declarations import read_yaml
from corral.errors import CorralError, UsageError
from corral.render.tree import LOCAL_DIGEST
from corral.runtime import supervisor
from corral.runtime.causes import Reason, cause_of
from corral.runtime.docker import MIB, Container
from corral.runtime.hosts import ComposeHost, compose_hosts, refuse_swarm
from corral.runtime.supervisor import LocalHost, Program, last_lines

# How to get a program, by its name: `apt` and `brew`; `or` is another program that does as well.
PROGRAMS: dict[str, dict[str, str]] = read_yaml(Path(__file__).with_name("programs.yaml"))
POSTGRES = "/usr/lib/postgresql"
# A program that ended so many seconds ago has not just been started: it is started again.
CALM_S = 60
RUNNING = frozenset({"starting", "running", "stopping"})
_SECTION = re.compile(rf"^\[program:(\S+)\]$(?:\n(?!\[).*)*?\n.*\b{LOCAL_DIGEST}=\"(\w+)\"", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ProcessHost(ComposeHost):
    """A `local` host: what a Compose host is for the verbs, as far as processes have it."""

    @property
    def place(self) -> Path:
        """The rendered folder."""
        return Path(self.folder)

    @property
    def runtime(self) -> LocalHost:
        """What runs its programs."""
        return LocalHost(self.place, supervisor.search_path())

    @property
    def digests(self) -> dict[str, str]:
        """What each program is to be started with, as it is rendered."""
        path = self.rendered / supervisor.CONFIG
        return dict(_SECTION.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def containers(self) -> list[Container]:
        """Every program that supervisord looks after; none where there is no supervisord."""
        services = {item.name: item for item in self.services}
        known = supervisor.programs(self.place) or {}
        return [self._container(item, services.get(name)) for name, item in sorted(known.items())]

    def _container(self, program: Program, service: Service | None) -> Container:
        is_running = program.state in RUNNING and program.pid > 0
        return Container(
            id=program.name,
            name=service.container_name if service else f"{self.name}-{program.name}",
            project=self.project,
            service=program.name,
            image="",
            state="running" if is_running else "restarting" if program.state in ("backoff", "starting") else "exited",
            health=self._health(program, service) if is_running and service else "",
            exit_code=program.exit_code,
            error=program.problem,
            restarts=self.restarts(program.name),
            started=datetime.fromtimestamp(program.started, UTC) if program.started else None,
            config_hash=_digest_of(program.pid),
            memory_mib=supervisor.memory_bytes(program.pid) / MIB if program.pid else None,
        )

    def _health(self, program: Program, service: Service) -> str:
        if supervisor.is_well(service, self.place, self.runtime.path):
            return "healthy"
        age_s = datetime.now(UTC).timestamp() - program.started
        return "starting" if age_s < service.health.start_timeout_s else "unhealthy"

    def restarts(self, name: str) -> int:
        """How often a program ended by itself since supervisord was started, as far as its log goes back."""
        log = self.place / "logs" / "supervisord.log"
        text = log.read_text(errors="replace") if log.is_file() else ""
        since = text.rpartition("supervisord started with pid")[2]
        return len(re.findall(rf"exited: {re.escape(name)} \(.*not expected\)", since))

    def last_lines(self, container: str, count: int) -> str:
        """The last lines that a program wrote, by the name of its service's container."""
        names = {item.container_name: item.name for item in self.services}
        return "\n".join(last_lines(self.log(names.get(container, container)), count))

    def log(self, service: str) -> Path:
        """Where a program's output is."""
        return self.place / "logs" / f"{service}.log"

    def names_of(self, kind: str) -> set[str]:
        """Folders with data of programs, for `volume`; nothing else has a name here."""
        return {str(item) for item in (self.place / "data").glob("*")} if kind == "volume" else set()

    def renew(self, service: str) -> None:
        """Ends a program and starts it as it is rendered."""
        changes = supervisor.reread(self.place)
        if service not in changes.added:
            supervisor.take_out(self.place, service)
        supervisor.put_in(self.place, service)

    def reason(self, service: Service, container: Container | None) -> Reason | None:
        """Why a program is not well; None when it is."""
        if container is None:
            return Reason("it is not started", "./generate.py up")
        if container.is_well:
            return None
        last = last_lines(self.log(service.name), 1)
        cause = cause_of("\n".join(last_lines(self.log(service.name))), "process")
        remedy = cause.words if cause else f"./generate.py logs {service.name}"
        said = f": {last[0].strip()}" if last else ""
        program = (supervisor.programs(self.place) or {}).get(service.name)
        has_just_ended = program is not None and datetime.now(UTC).timestamp() - program.ended < CALM_S
        if container.condition == "starting" and not has_just_ended:
            return Reason("it is still starting", "wait; ./generate.py logs shows how far it is")
        if container.is_running and not has_just_ended:
            return Reason(f"it runs, but does not answer{said}", f"./generate.py restart {service.name}")
        return Reason(
            f"it does not stay up ({self.runtime.ending(service.name)}){said}", f"{remedy}; then ./generate.py up"
        )

    def programs(self) -> Iterator[tuple[str, str, str]]:
        """Every program with its path, empty if it is not on this machine, and with what installs it."""
        path = os.pathsep.join([self.runtime.path, *map(str, Path(POSTGRES).glob("*/bin"))])
        for name in sorted({item.program for item in self.services}):
            known = PROGRAMS.get(name, {})
            found = shutil.which(name, path=path) or shutil.which(known.get("or", name), path=path)
            package, brewed = known.get("apt", name), known.get("brew", name)
            yield name, found or "", known.get("get") or f"apt install {package} (macOS: brew install {brewed})"


def _digest_of(pid: int) -> str:
    """What a running program was started with; empty when that cannot be seen."""
    try:
        return psutil.Process(pid).environ().get(LOCAL_DIGEST, "") if pid else ""
    except (psutil.Error, OSError):
        return ""


def site_hosts(plan: Plan, out: Path, chosen: Iterable[str] | None = None) -> list[ComposeHost]:
    """The plan's hosts that have services, or those of them that were chosen: Compose hosts first, then local ones.

    A local gateway needs what runs elsewhere, and nothing elsewhere can call a local host.

    Raises:
        UsageError: there are none, or a local one is another machine.
    """
    refuse_swarm(plan)
    busy = {service.host for service in plan.contributions.services}
    wanted = [name for name in plan.inventory.hosts if name in busy and (not chosen or name in set(chosen))]
    local = [name for name in wanted if plan.site.is_local(name)]
    for name in local:
        if ssh := plan.site.host(name).ssh:
            raise UsageError(
                f"{name} has `runtime: local` and is another machine ({ssh}): its processes are started there only; "
                "run this there, without `ssh:` in the inventory, or name the other hosts with --host"
            )
    others = [name for name in wanted if name not in local]
    compose = compose_hosts(plan, out, others) if others or not local else []
    return [*compose, *(ProcessHost(plan, name, out) for name in local)]


def refuse_missing(host: ProcessHost) -> None:
    """Raises CorralError when programs of a local host are not on this machine, with what installs each."""
    if missing := [f"  {name}: {remedy}" for name, path, remedy in host.programs() if not path]:
        lines = "\n".join(missing)
        raise CorralError(f"{host.name}: nothing was started; these programs are not on this machine:\n{lines}")
