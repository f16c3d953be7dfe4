"""One folder per component. Each says in `STAGE` when it is asked and in `contribute` what it adds to the plan.

A component is found by being here, or in an installed package that says so (corral/declarations.py); nothing else
names it. Earlier stages' contributions are there to be read. What depends on the site alone and is wanted by an earlier
stage, a component may say in `announce`, which is asked before all stages. Beside it, `component.yaml` has what is
data, and `rules.py` the rules that are about the component alone.
"""

from __future__ import annotations

import importlib
import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from enum import IntEnum
from functools import cache
from typing import Protocol, cast

from corral.contributions import Contribution, Contributions, Port, Service, is_systems
from corral.declarations import declaration, packages
from corral.plan.networks import JOINED, routes_ipv6
from corral.plan.site import Site

# Threads and processes of a program besides those for each processor.
SPARE_PIDS = 128
JOINS = "the inventory has it join a network that exists already"
UNLABELLED = "SELinux would keep it from a folder of the system, whose labels stay as they are"


class Stage(IntEnum):
    """Order in which components are asked; components of one stage do not see each other."""

    BACKENDS = 1
    BALANCER = 2
    GATEWAY = 3
    MONITORING = 4
    DASHBOARDS = 5


class Component(Protocol):
    """What a component module offers."""

    STAGE: Stage

    def contribute(self, site: Site, published: Contributions) -> Iterable[Contribution]:
        """What the component adds, given the site and what earlier stages published."""
        ...


@cache
def components() -> tuple[tuple[str, Component], ...]:
    """Every component with its name, in the order of stages and then names; their rules are registered."""
    found = [(name, component(name)) for name in sorted(packages())]
    return tuple(sorted(found, key=lambda item: (item[1].STAGE, item[0])))


@cache
def component(name: str) -> Component:
    """The component of that name; its rules are registered."""
    module, folder = packages()[name]
    if (folder / "rules.py").exists():
        importlib.import_module(f"{module}.rules")
    return cast(Component, importlib.import_module(module))


def gather(site: Site) -> Contributions:
    """Everything that the components add to a site."""
    published = Contributions()
    for _, component in components():
        for item in getattr(component, "announce", lambda _site: ())(site):
            published.add(item)
    for stage in Stage:
        added = [
            item
            for _, component in components()
            if stage == component.STAGE
            for item in component.contribute(site, published)
        ]
        for item in added:
            published.add(item)
    published.services = [_with_additions(site, service) for service in published.services]
    return published


def _with_additions(site: Site, service: Service) -> Service:
    """A service with what the inventory adds to it; what the kit sets itself stays."""
    facts = site.host(service.host)
    # Many programs start a thread for each processor, of which a core has two.
    pids = max(service.pids, 2 * (facts.cpu.cores or 0) + SPARE_PIDS)
    if site.is_swarm:
        service = replace(service, ports=tuple(map(_published_by_swarm, service.ports)))
    service = replace(service, pids=pids, has_ipv6=site.has_ipv6 and routes_ipv6(service))
    unlabelled = [folder for folder, _ in service.mounts if is_systems(folder)] if facts.selinux else []
    if unlabelled:
        service = replace(service, exceptions={**service.exceptions, "confined": UNLABELLED})
    added = facts.services.get(service.name)
    if site.inventory.container_prefix:
        service = replace(service, container=service.container or site.container(service.host, service.name))
    if added is None:
        return service
    joined = {JOINED: JOINS}
    return replace(
        service,
        joins=added.networks,
        labels=added.labels,
        extra_hosts=added.extra_hosts,
        cpuset=added.cpuset or "",
        mounts=(*service.mounts, *added.mounts.items()),
        environment={**added.environment, **service.environment},
        exceptions={**service.exceptions, **(joined if added.networks else {})},
    )


def _published_by_swarm(port: Port) -> Port:
    """The port as Swarm publishes it, at every address of the host; what is for loopback only, not at all."""
    is_public = bool(port.publish) and not ipaddress.ip_address(port.publish).is_loopback
    return replace(port, publish="0.0.0.0" if is_public else "")  # noqa: S104 - what Swarm does


def image_keys() -> frozenset[str]:
    """Names under which `images` of an inventory can replace a component's own image."""
    keys: set[str] = set()
    for name, found in components():
        described = declaration(name).get("services", {})
        keys |= {fields.get("image_key", key) for key, fields in described.items() if "image" in fields}
        keys |= set(getattr(found, "IMAGES", ()))
        keys |= {found.COMPONENT} if hasattr(found, "IMAGE") and hasattr(found, "COMPONENT") else set()
    return frozenset(keys)
