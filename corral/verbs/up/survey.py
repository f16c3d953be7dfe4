"""What runs on a host, against what is rendered for it: which services are missing, stopped, changed or left over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.causes import with_docker_cause
from corral.runtime.docker import CONFIG, Container
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import hashes_in
from corral.runtime.waiting import ABSENT, COMMAND_LIMIT_S
from corral.units import grouped

IMAGE_IDS = 'for name; do docker image inspect --format "{{.Id}}" "$name" 2>/dev/null || echo -; done'
# A line for each container: name, project, and its further names on each of its networks.
ALL_NAMES = (
    "docker ps --all --quiet | xargs -r docker inspect --format "
    """'{{.Name}} project={{index .Config.Labels "com.docker.compose.project"}}"""
    """{{range $net, $it := .NetworkSettings.Networks}} {{$net}}/{{range $it.Aliases}} {{$net}}/{{.}}{{end}}{{end}}'"""
    " 2>/dev/null || true"
)
NO_CHANGE = ("--no-start", "--no-recreate", "--no-deps", "--no-build", "--pull", "never")


@dataclass(frozen=True, slots=True)
class Found:
    """A service of the plan, its container and its image."""

    service: Service
    # `ABSENT` when there is none.
    container: Container
    # Whether the container is what is rendered: definition, configuration files and image.
    is_current: bool
    # Id of its image on the host; empty when it is not there.
    image_id: str


@dataclass(frozen=True, slots=True)
class Survey:
    """One host: every service of the plan by name, and containers that are in no plan."""

    host: ComposeHost
    found: Mapping[str, Found]
    left_over: tuple[Container, ...] = ()


def check_engine(host: ComposeHost) -> None:
    """Raises CorralError with the remedy when the host's engine or Docker Compose cannot be used."""
    script = "docker version --format '{{.Server.Version}}' && docker compose version --short"
    done = host.run(["sh", "-c", script], check=False)
    if done.code != 0:
        raise CorralError(f"{host.name}: {with_docker_cause(done.last_line)}")


def check_names(host: ComposeHost) -> None:
    """Raises CorralError when a container that is not of the project has a name that one of its services needs.

    That is a container's name, or on a network that a service joins a name by which services call each other.
    """
    ours = {service.container_name for service in host.services}
    called = {service.name for service in host.services}
    joined = {f"{network}/{name}" for service in host.services for network in service.joins for name in called}
    clashes: dict[str, list[str]] = {}
    for line in host.run(["sh", "-c", ALL_NAMES]).out.splitlines():
        name, project, *places = line.removeprefix("/").split()
        known = {*places, *(f"{place.partition('/')[0]}/{name}" for place in places)}
        if project != f"project={host.project}" and (name in ours or not joined.isdisjoint(known)):
            clashes.setdefault(project.removeprefix("project="), []).append(name)
    for project, names in clashes.items():
        owner = f"the Compose project {project}" if project else "no Compose project"
        words = f"{host.name}: {', '.join(sorted(names))} of {owner} has a name of this site's; nothing was changed"
        raise CorralError(
            f"{words}\n  set container_prefix in one of the two inventories, or rename the other container"
        )


def check_files(host: ComposeHost) -> None:
    """Raises CorralError when a certificate that is mounted by itself is not there: Docker would make a folder."""
    wanted = sorted({file for service in host.services for file, path in service.mounts if path.endswith(".pem")})
    script = 'for file; do [ -f "$file" ] || echo "$file"; done'
    missing = host.run(["sh", "-c", script, "-", *wanted]).out.splitlines() if wanted else []
    if missing:
        words = f"{host.name}: {', '.join(missing)} is not there; nothing was changed"
        raise CorralError(f"{words}\n  put the file there, or correct ca_file of the node")


def survey(host: ComposeHost, seen: Iterable[Container]) -> Survey:
    """A host's containers against its rendering; raises CorralError when Compose cannot read the rendering there."""
    hashes = hashes_in(host.compose("config", "--hash", "*").out)
    services = {service.name: service for service in host.services}
    images = image_ids(host, {service.image for service in services.values()})
    containers = grouped((item.service, item) for item in seen)
    found = {
        name: _found(service, containers.pop(name, []), hashes.get(name, ""), images[service.image])
        for name, service in services.items()
    }
    return Survey(host, found, tuple(item for items in containers.values() for item in items))


def image_ids(host: ComposeHost, names: Iterable[str]) -> dict[str, str]:
    """Id of every image; empty for one that is not there."""
    wanted = sorted(set(names))
    ids = host.run(["sh", "-c", IMAGE_IDS, "-", *wanted]).out.split()
    return {name: "" if image == "-" else image for name, image in zip(wanted, ids, strict=True)}


def _found(service: Service, containers: list[Container], wanted: str, image_id: str) -> Found:
    """More than one container is what a killed change leaves; Compose sorts that out when it is asked again."""
    running = [item for item in containers if item.is_running]
    container = next(iter(running or containers), ABSENT)
    is_same = container.config_hash == wanted and image_id in {"", container.image_id}
    return Found(service, container, len(containers) == 1 and is_same, image_id)


def is_reconfigured(host: ComposeHost, found: Found) -> bool:
    """Whether a container differs from its rendering in nothing but the content of configuration files."""
    if found.image_id not in {"", found.container.image_id}:
        return False
    overlay = json.dumps({"services": {found.service.name: {"labels": {CONFIG: found.container.config_digest}}}})
    command = [*host.compose_words(), "--file", "-", "config", "--hash", found.service.name]
    hashes = hashes_in(host.run(command, given=overlay.encode(), check=False).out)
    return hashes.get(found.service.name) == found.container.config_hash


# --- networks while a rendering with other networks takes a running one's place --------------------------------------


def join_networks(seen: Survey) -> None:
    """Put containers that will be made anew on the inner networks of their rendering: old and new ones meet there."""
    stale = {name: item.container for name, item in seen.found.items() if item.container.is_up and not item.is_current}
    if not stale:
        return
    project = _project(seen.host)
    missing = [
        (service, container.id, network, aliases)
        for service, container in stale.items()
        for network, aliases in _inner(project, service)
        if network not in container.networks
    ]
    if missing:  # makes their networks, and nothing else
        seen.host.compose("up", *NO_CHANGE, *sorted({service for service, *_ in missing}), limit_s=COMMAND_LIMIT_S)
    for service, container_id, network, aliases in missing:
        names = [word for name in (service, *aliases) for word in ("--alias", name)]
        seen.host.run(["docker", "network", "connect", *names, network, container_id])


def prune_networks(host: ComposeHost) -> None:
    """Remove networks of the project that are not in its rendering; one that something else still uses stays."""
    wanted = {str(network["name"]) for network in _project(host)["networks"].values()}
    for name in sorted(host.names_of("network") - wanted):
        host.run(["docker", "network", "rm", name], check=False)


def _project(host: ComposeHost) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.compose("config", "--format", "json").out)
    return found


def _inner(project: Mapping[str, Any], service: str) -> Iterator[tuple[str, list[str]]]:
    """A service's networks that lead nowhere, by Docker's name of each, with its further names there."""
    for key, settings in project["services"].get(service, {}).get("networks", {}).items():
        network = project["networks"][key]
        if network.get("internal"):
            yield str(network["name"]), list((settings or {}).get("aliases") or [])
