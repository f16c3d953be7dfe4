"""Networks of running containers while a rendering with other networks takes their place.

Services are changed one at a time, so old and new containers have to reach each other meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from corral.runtime.docker import PROJECT
from corral.runtime.hosts import ComposeHost
from corral.runtime.waiting import COMMAND_LIMIT_S
from corral.verbs.up.survey import Survey

NO_CHANGE = ("--no-start", "--no-recreate", "--no-deps", "--no-build", "--pull", "never")


def join(seen: Survey) -> None:
    """Put containers that will be made anew on the inner networks of their rendering as well."""
    stale = [item for item in seen.found.values() if item.runs and not item.is_current and item.container]
    if not stale:
        return
    project = _project(seen.host)
    missing = [
        (item.service.name, item.container.id, network, aliases)
        for item in stale
        if item.container
        for network, aliases in _inner(project, item.service.name)
        if network not in item.container.networks
    ]
    if not missing:
        return
    services = sorted({service for service, *_ in missing})
    seen.host.compose("up", *NO_CHANGE, *services, limit_s=COMMAND_LIMIT_S)  # makes their networks, and nothing else
    for service, container, network, aliases in missing:
        names = [word for name in (service, *aliases) for word in ("--alias", name)]
        seen.host.run(["docker", "network", "connect", *names, network, container])


def remove_unused(host: ComposeHost) -> None:
    """Remove networks of the project that are not in its rendering; one that something else still uses stays."""
    wanted = {str(network["name"]) for network in _project(host)["networks"].values()}
    words = ["docker", "network", "ls", "--filter", f"label={PROJECT}={host.project}", "--format", "{{.Name}}"]
    for name in sorted(set(host.run(words).out.split()) - wanted):
        host.run(["docker", "network", "rm", name], check=False)


def _project(host: ComposeHost) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.compose("config", "--format", "json").out)
    return found


def _inner(project: Mapping[str, Any], service: str) -> Iterator[tuple[str, list[str]]]:
    """A service's networks that lead nowhere, by the engine's name of each, with its further names there."""
    for key, settings in project["services"].get(service, {}).get("networks", {}).items():
        network = project["networks"][key]
        if network.get("internal"):
            yield str(network["name"]), list((settings or {}).get("aliases") or [])
