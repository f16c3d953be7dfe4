"""Containers as Docker describes them: one frozen type for every verb, read from what `docker inspect` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

MIB = 1024**2
# Labels: a container's Compose project, its site, and the digest of its configuration files.
PROJECT = "com.docker.compose.project"
SITE = "corral.site"
CONFIG = "corral.config"
NO_DATE = "0001-01-01T00:00:00Z"
# Begins what the health check says of a server that its watchdog (gpu-server/llama/start.sh) no longer starts.
PARKED = "parked: "
# Conditions of a service that is well.
GOOD = frozenset({"healthy", "running"})
UP = frozenset({"running", "restarting"})


@dataclass(frozen=True, slots=True)
class Container:
    """One container as Docker sees it."""

    id: str
    name: str
    project: str
    service: str
    # The name by which it was started.
    image: str
    # `running`, `exited`, `restarting`, `created`, `paused` or `dead`.
    state: str
    # `healthy`, `starting`, `unhealthy`, or `parked` by its watchdog; empty without a health check.
    health: str = ""
    # What the last health check printed.
    last_check: str = ""
    exit_code: int = 0
    was_out_of_memory: bool = False
    # Why Docker could not start it.
    error: str = ""
    restarts: int = 0
    started: datetime | None = None
    image_id: str = ""
    # Compose's hash of the service that it was made from.
    config_hash: str = ""
    # Digest of the configuration files that it was made with.
    config_digest: str = ""
    # Paths of the Compose files that its project was started with, with commas between.
    compose_files: str = ""
    # Its address on every network that it is on; empty while it does not run.
    networks: Mapping[str, str] = field(default_factory=dict)
    memory_mib: float | None = None
    # What its control group allows; None when it cannot be read.
    limit_mib: float | None = None
    # Addresses and ports on the host.
    published: tuple[tuple[str, int], ...] = ()
    # The limit that Docker was told; 0 for none.
    wanted_mib: float = 0
    # Cards that the runtime was asked to hand in, by id, and device files.
    devices: tuple[str, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether its program runs, well or not."""
        return self.state == "running"

    @property
    def is_up(self) -> bool:
        """Whether its program runs, or is about to be started again."""
        return self.state in UP

    @property
    def condition(self) -> str:
        """One word: its health while it runs (`running` without a health check), else its state."""
        return (self.health or "running") if self.is_running else self.state

    @property
    def is_well(self) -> bool:
        """Whether its health check passes; without one, whether it runs."""
        return self.condition in GOOD


# MiB in use and allowed, by a container's id.
Memory = Mapping[str, tuple[float, float | None]]


def containers_in(text: str, memory: Memory | None = None) -> list[Container]:
    """The containers that `docker inspect` printed, by name."""
    found = json.loads(text) if text.strip() else []
    return sorted((_container(item, memory or {}) for item in found), key=lambda item: item.name)


def _container(item: Mapping[str, Any], memory: Memory) -> Container:
    state, config, settings, network = item["State"], item["Config"], item["HostConfig"], item["NetworkSettings"]
    places = [place for places in (network.get("Ports") or {}).values() for place in places or ()]
    cards = [card for request in settings.get("DeviceRequests") or () for card in request.get("DeviceIDs") or ()]
    labels = config.get("Labels") or {}
    used, limit = memory.get(item["Id"], (None, None))
    return Container(
        id=item["Id"],
        name=str(item["Name"]).removeprefix("/"),
        project=labels.get(PROJECT, ""),
        service=labels.get("com.docker.compose.service", ""),
        image=config["Image"],
        state=state["Status"],
        health=_health(state),
        last_check=str(_last_check(state).get("Output", "")).strip(),
        exit_code=state["ExitCode"],
        was_out_of_memory=state["OOMKilled"],
        error=state.get("Error", ""),
        restarts=item.get("RestartCount", 0),
        started=_date(state.get("StartedAt", "")),
        image_id=item.get("Image", ""),
        config_hash=labels.get("com.docker.compose.config-hash", ""),
        config_digest=labels.get(CONFIG, ""),
        compose_files=labels.get("com.docker.compose.project.config_files", ""),
        networks={name: str(it.get("IPAddress") or "") for name, it in (network.get("Networks") or {}).items()},
        memory_mib=used,
        limit_mib=limit,
        published=tuple((place["HostIp"], int(place["HostPort"])) for place in places),
        wanted_mib=settings.get("Memory", 0) / MIB,
        devices=(*cards, *(device["PathOnHost"] for device in settings.get("Devices") or ())),
    )


def _last_check(state: Mapping[str, Any]) -> Mapping[str, Any]:
    checks: list[dict[str, Any]] = (state.get("Health") or {}).get("Log") or [{}]
    return checks[-1]


def _health(state: Mapping[str, Any]) -> str:
    """A server counts as parked when its watchdog says so in a check since its container was started."""
    check = _last_check(state)
    if state["Status"] == "running" and str(check.get("Output", "")).startswith(PARKED):
        begun, started = _date(check["Start"]), _date(state["StartedAt"])
        if begun and started and begun > started:
            return "parked"
    status = str((state.get("Health") or {}).get("Status", ""))
    return "" if status == "none" else status


def _date(text: str) -> datetime | None:
    return datetime.fromisoformat(text) if text and text != NO_DATE else None
