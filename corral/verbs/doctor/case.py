"""What a check of `doctor` looks at: one host, with all that is known of it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from corral.build import Plan
from corral.checks.registry import Texts
from corral.components import litellm
from corral.config.inventory import Host
from corral.config.source import plain_yaml
from corral.contributions import Service
from corral.render.output import MANIFEST, digest
from corral.render.secrets import ENV_FILE, FOLDER
from corral.runtime.causes import Reason, explained
from corral.runtime.docker import Container
from corral.runtime.haproxy import Server
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import Snapshot, assigned
from corral.runtime.processes import ProcessHost
from corral.verbs.status.certificates import certificate_script

LOG_LINES = 40
SCRIPT = Path(__file__).with_name("sections.sh")
# What each check demands and tells, by area.
ROWS: dict[str, dict[str, dict[str, Any]]] = plain_yaml(Path(__file__).with_name("checks.yaml").read_bytes())
say = Texts({rule: row for rows in ROWS.values() for rule, row in rows.items()}).finding
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the gateway answered, with and without the operator's key; a status is 0 when it was not asked."""

    # Why it gives no answer, or why this machine does not reach the operator's port.
    problem: str = ""
    unreached: str = ""
    # Status of requests: without a key at the address of clients, for its health, for the list of models.
    stranger: int = 0
    health: int = 0
    models: int = 0
    # Names that it offers.
    offered: frozenset[str] = frozenset()
    # Seconds until a pool answered a question, or what it said instead; only of pools that were asked.
    pools: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A host with its snapshot, for the checks to look at."""

    host: ComposeHost
    seen: Snapshot
    # What the balancer says of every replica.
    servers: Mapping[str, Server] = field(default_factory=dict)
    # What the gateway answered, on its own host while something runs there.
    answers: Answers | None = None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.host.plan

    @property
    def name(self) -> str:
        """The host's name."""
        return self.host.name

    @property
    def declared(self) -> Host:
        """The host as the inventory has it."""
        return self.plan.site.host(self.name)

    @property
    def services(self) -> list[Service]:
        """The services of the plan on this host."""
        return self.plan.services_of(self.name)

    @property
    def own(self) -> list[Container]:
        """The containers of this host's project."""
        return [item for item in self.seen.containers if item.project == self.host.project]

    @property
    def info(self) -> dict[str, Any]:
        """What `docker info` says; empty when it says nothing."""
        return json_of(self.said("info"), {})

    @property
    def has_cpu_variant(self) -> bool:
        """Whether the host was started with the variant for machines without cards."""
        wanted = {item.name for item in self.services if item.gpus}
        found = [item for item in self.own if item.service in wanted]
        return bool(found) and not any(item.devices for item in found)

    @property
    def up(self) -> str:
        """The command that brings this host up."""
        return f"./generate.py up --host {self.name}"

    def said(self, section: str) -> str:
        """What a section of the snapshot says; see `sections`."""
        return self.seen.said.get(section, "").strip()

    def mib(self, name: str) -> int:
        """A line of /proc/meminfo, such as `MemTotal`; 0 when it is not there."""
        found = re.search(rf"^{name}:\s+(\d+)", self.said("ram"), re.MULTILINE)
        return int(found[1]) // 1024 if found else 0

    def container_of(self, service: Service) -> Container | None:
        """The container of a service."""
        return self.seen.container_of(service.name, self.host.project)

    def reason(self, service: Service) -> Reason | None:
        """Why a service is not well, from Docker's words and its last log lines; None when it is."""
        container = self.container_of(service)
        if isinstance(self.host, ProcessHost):
            return self.host.reason(service, container)
        if container is not None and container.is_well:
            return None
        log = self.host.last_lines(container.name, LOG_LINES) if container is not None else ""
        return explained(container, service, log)

    def has(self, need: str) -> bool:
        """Whether what a check needs is there."""
        is_gateway = self.plan.inventory.gateway.host == self.name
        is_local = isinstance(self.host, ProcessHost)
        return {
            "seen": not self.seen.problem,
            "engine": not self.seen.problem and not is_local,
            "containers": not is_local,
            "processes": is_local,
            "cards": bool(self.plan.site.cards[self.name]),
            "running": bool(self.own),
            "gateway": is_gateway and bool(self.own),
            "entrance": is_gateway and self.plan.inventory.gateway.entrance is not None,
        }[need]


def json_of(text: str | bytes, default: T) -> T:
    """What a program printed as JSON, where it did."""
    try:
        return cast(T, json.loads(text)) or default
    except ValueError:
        return default


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: `28.5.2+dfsg4` is (28, 5, 2)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


# --- what the host is asked ------------------------------------------------------------------------------------------


def sections(host: ComposeHost) -> str:
    """The shell script that asks a host for what the checks read besides its containers."""
    secrets = [f"{FOLDER}/{item.name}" for item in host.plan.secrets_of(host.name)]
    gateways = [item.container_name for item in host.services if item.component == litellm.COMPONENT]
    given = {
        "folder": host.folder,
        "models": host.models_folder,
        "stores": shlex.join(host.used_stores),
        "files": shlex.join(sorted(host.model_sources)),
        "private": shlex.join([ENV_FILE, FOLDER, *secrets]),
        "sums": "\n".join(f"{value}  {path}" for path, value in _digests(host, secrets).items()) if host.ssh else "",
        "litellm": "".join(gateways[:1]),
    }
    return "\n".join([assigned(given), certificate_script(host), SCRIPT.read_text(encoding="utf-8")])


def manifest(host: ComposeHost) -> dict[str, str]:
    """Digests of the host's rendered files on this machine, by path; nothing when nothing is rendered."""
    path = host.rendered / MANIFEST
    return json_of(path.read_bytes(), {}) if path.is_file() else {}


def _digests(host: ComposeHost, secrets: list[str]) -> dict[str, str]:
    """Of the host's files on this machine, secrets among them."""
    there = [path for path in secrets if (host.rendered / path).is_file()]
    return {**manifest(host), **{path: digest((host.rendered / path).read_bytes()) for path in there}}
