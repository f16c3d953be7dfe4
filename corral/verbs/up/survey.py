"""What runs on a host, against what is rendered for it: which services are missing, stopped, changed or left over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.causes import cause_of
from corral.runtime.docker import CONFIG, Container
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import hashes_in

IMAGE_IDS = 'for name; do docker image inspect --format "{{.Id}}" "$name" 2>/dev/null || echo -; done'


@dataclass(frozen=True, slots=True)
class Found:
    """A service of the plan and its container."""

    service: Service
    container: Container | None
    # Whether the container is what is rendered: definition, configuration files and image.
    is_current: bool

    @property
    def is_well(self) -> bool:
        """Whether its container is there and well."""
        return self.container is not None and self.container.is_well

    @property
    def runs(self) -> bool:
        """Whether its program runs, well or not."""
        return self.container is not None and self.container.is_up


@dataclass(frozen=True, slots=True)
class Survey:
    """One host: every service of the plan, containers that are in no plan, images that are not there."""

    host: ComposeHost
    found: Mapping[str, Found]
    left_over: tuple[Container, ...] = ()
    missing_images: tuple[str, ...] = ()
    # Id by name, of the images that are there.
    images: Mapping[str, str] = field(default_factory=dict)


def check_engine(host: ComposeHost) -> None:
    """Raises CorralError with the remedy when the host's engine or Docker Compose cannot be used."""
    script = "docker version --format '{{.Server.Version}}' && docker compose version --short"
    done = host.run(["sh", "-c", script], check=False)
    if done.code != 0:
        cause = cause_of(done.words, "docker")
        words = done.words.splitlines()[-1] if done.words else "no answer"
        raise CorralError(f"{host.name}: {words}" + (f"\n  {cause.words}" if cause else ""))


def survey(host: ComposeHost, seen: Iterable[Container]) -> Survey:
    """A host's containers against its rendering; raises CorralError when Compose cannot read the rendering there."""
    hashes = hashes_in(host.compose("config", "--hash", "*").out)
    services = {service.name: service for service in host.services}
    images = image_ids(host, {service.image for service in services.values()})
    containers: dict[str, list[Container]] = {}
    for item in seen:
        containers.setdefault(item.service, []).append(item)
    found = {
        name: _found(service, containers.get(name, []), hashes.get(name, ""), images)
        for name, service in services.items()
    }
    left_over = tuple(item for name, items in containers.items() if name not in services for item in items)
    missing = tuple(sorted(name for name, image in images.items() if not image))
    return Survey(host, found, left_over, missing, {name: image for name, image in images.items() if image})


def image_ids(host: ComposeHost, names: Iterable[str]) -> dict[str, str]:
    """Id of every image; empty for one that is not there."""
    wanted = sorted(set(names))
    ids = host.run(["sh", "-c", IMAGE_IDS, "-", *wanted]).out.split()
    return {name: "" if image == "-" else image for name, image in zip(wanted, ids, strict=True)}


def _found(service: Service, containers: list[Container], wanted: str, images: Mapping[str, str]) -> Found:
    """More than one container is what a killed change leaves; Compose sorts that out when it is asked again."""
    running = [item for item in containers if item.is_running]
    container = next(iter(running or containers), None)
    is_current = (
        container is not None
        and len(containers) == 1
        and container.config_hash == wanted
        and images.get(service.image, "") in {"", container.image_id}
    )
    return Found(service, container, is_current)


def differs_only_in_configuration(host: ComposeHost, found: Found) -> bool:
    """Whether a container is as rendered but for the content of its configuration files."""
    if found.container is None:
        return False
    overlay = json.dumps({"services": {found.service.name: {"labels": {CONFIG: found.container.config_digest}}}})
    words = [*host.compose_words(), "--file", "-", "config", "--hash", found.service.name]
    hashes = hashes_in(host.run(words, given=overlay.encode(), check=False).out)
    return hashes.get(found.service.name) == found.container.config_hash
