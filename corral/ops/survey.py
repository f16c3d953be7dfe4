"""What runs on a host, against what is rendered for it: which services are missing, stopped, changed or left over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.contributions import Service
from corral.errors import CorralError
from corral.ops.hosts import ComposeHost, service_of
from corral.ops.observed import GOOD, is_parked

HASH_LABEL = "com.docker.compose.config-hash"
CONFIG_LABEL = "corral.config"
IMAGE_IDS = 'for name; do docker image inspect --format "{{.Id}}" "$name" 2>/dev/null || echo -; done'
ENGINE_REMEDIES = {
    "permission denied": "this user may not use the engine; add it to the group docker, then log in again",
    "cannot connect to the docker daemon": "the engine does not run; start it: sudo systemctl start docker",
    "is the docker daemon running": "the engine does not run; start it: sudo systemctl start docker",
    "command not found": "Docker is not installed there; ./generate.py setup installs it",
    "is not a docker command": "Docker Compose is not installed there; ./generate.py setup installs it",
    "unknown shorthand flag": "Docker Compose is not installed there; ./generate.py setup installs it",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A service of the plan and its container."""

    service: Service
    container: Mapping[str, Any] | None
    is_current: bool
    """Whether the container is what is rendered: definition, configuration files and image."""

    @property
    def state(self) -> str:
        """`missing`, the engine's `created`, `exited`, `restarting` …, or the health of what runs."""
        return "missing" if self.container is None else condition(self.container)

    @property
    def runs(self) -> bool:
        """Whether its program runs, well or not."""
        return self.container is not None and self.container["State"]["Status"] in {"running", "restarting"}


@dataclass(frozen=True, slots=True)
class Survey:
    """One host: every service of the plan, containers that are in no plan, images that are not there."""

    host: ComposeHost
    found: Mapping[str, Found]
    left_over: tuple[Mapping[str, Any], ...] = ()
    missing_images: tuple[str, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    """Id by name, of the images that are there."""


def condition(container: Mapping[str, Any]) -> str:
    """Health while it runs (`running` without a health check, `parked` by a watchdog), else the engine's word."""
    state = container["State"]
    if state["Status"] != "running":
        return str(state["Status"])
    if is_parked(container):
        return "parked"
    return str((state.get("Health") or {}).get("Status") or "running")


def is_well(state: str) -> bool:
    """Whether a condition is what one wants."""
    return state in GOOD


def check_engine(host: ComposeHost) -> None:
    """Raises CorralError with the remedy when the host's engine or Docker Compose cannot be used."""
    script = "docker version --format '{{.Server.Version}}' && docker compose version --short"
    done = host.run(["sh", "-c", script], check=False)
    if done.code != 0:
        words = done.words.lower()
        remedy = next((text for sign, text in ENGINE_REMEDIES.items() if sign in words), "")
        raise CorralError(
            f"{host.name}: {done.words.splitlines()[-1] if done.words else 'no answer'}"
            + f"\n  {remedy}" * bool(remedy)
        )


def survey(host: ComposeHost) -> Survey:
    """What is to be seen on a host; raises CorralError when Compose cannot read the rendering there."""
    hashes = rendered_hashes(host)
    services = {service.name: service for service in host.services}
    images = image_ids(host, {service.image for service in services.values()})
    containers: dict[str, list[Mapping[str, Any]]] = {}
    for item in host.containers():
        containers.setdefault(service_of(item), []).append(item)
    found = {
        name: _found(service, containers.get(name, []), hashes.get(name, ""), images)
        for name, service in services.items()
    }
    left_over = tuple(item for name, items in containers.items() if name not in services for item in items)
    missing = tuple(sorted(name for name, image in images.items() if not image))
    return Survey(host, found, left_over, missing, {name: image for name, image in images.items() if image})


def rendered_hashes(host: ComposeHost) -> dict[str, str]:
    """Compose's hash of every rendered service."""
    lines = host.compose("config", "--hash", "*").out.splitlines()
    return dict(line.split() for line in lines if len(line.split()) == 2)  # noqa: PLR2004 - name and hash


def image_ids(host: ComposeHost, names: Iterable[str]) -> dict[str, str]:
    """Id of every image; empty for one that is not there."""
    wanted = sorted(set(names))
    ids = host.run(["sh", "-c", IMAGE_IDS, "-", *wanted]).out.split()
    return {name: "" if image == "-" else image for name, image in zip(wanted, ids, strict=True)}


def _found(service: Service, containers: list[Mapping[str, Any]], wanted: str, images: Mapping[str, str]) -> Found:
    """More than one container is what a killed change leaves; Compose sorts that out when it is asked again."""
    running = [item for item in containers if item["State"]["Status"] == "running"]
    container = next(iter(running or containers), None)
    is_current = (
        container is not None
        and len(containers) == 1
        and label(container, HASH_LABEL) == wanted
        and images.get(service.image, "") in {"", container["Image"]}
    )
    return Found(service, container, is_current)


def label(container: Mapping[str, Any], name: str) -> str:
    """A label of a container; empty when it has none of that name."""
    return str((container["Config"].get("Labels") or {}).get(name, ""))


def differs_only_in_configuration(host: ComposeHost, found: Found) -> bool:
    """Whether a container is as rendered but for the content of its configuration files."""
    if found.container is None:
        return False
    old = label(found.container, CONFIG_LABEL)
    overlay = json.dumps({"services": {found.service.name: {"labels": {CONFIG_LABEL: old}}}})
    words = host.compose_words()
    done = host.run(
        [*words, "--file", "-", "config", "--hash", found.service.name], given=overlay.encode(), check=False
    )
    hashes = dict(line.split() for line in done.out.splitlines() if len(line.split()) == 2)  # noqa: PLR2004
    return hashes.get(found.service.name) == label(found.container, HASH_LABEL)
