"""The one order of services, from what they are to each other: what others need comes up first and goes down last."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from corral.build import Plan
from corral.contributions import Service


class Phase(IntEnum):
    """Groups of services in the order in which they come up: each is well before the next one begins."""

    EDGES = 0
    REPLICAS = 1
    STORES = 2
    BALANCER = 3
    GATEWAY = 4
    MONITORING = 5

    @property
    def title(self) -> str:
        """Its services in words."""
        return "inference servers" if self == Phase.REPLICAS else self.name.lower()


ROLES = {"edge": Phase.EDGES, "balancer": Phase.BALANCER, "gateway": Phase.GATEWAY}


def phases(plan: Plan) -> dict[Phase, list[Service]]:
    """The services that Docker runs, by phase and in the order in which they come up."""
    services = in_order(plan, (item for item in plan.contributions.services if not plan.site.is_local(item.host)))
    return {phase: [item for item in services if phase_of(plan, item) == phase] for phase in Phase}


def in_order(plan: Plan, services: Iterable[Service]) -> list[Service]:
    """Services in the order in which they come up: by phase, and within one after those that they wait for."""
    by_place = {(item.host, phase_of(plan, item), item.name): item for item in plan.contributions.services}

    def waits(service: Service) -> int:
        """Length of the longest chain of services of its host and phase that it waits for."""
        phase = phase_of(plan, service)
        before = (by_place.get((service.host, phase, name)) for name, _ in service.after)
        return max((1 + waits(item) for item in before if item), default=0)

    return sorted(services, key=lambda item: (phase_of(plan, item), waits(item)))


def phase_of(plan: Plan, service: Service) -> Phase:
    """When a service comes up; what is neither a replica nor in the path of a request comes last."""
    place = (service.host, service.name)
    if any(place == (item.endpoint.host, item.endpoint.service) for item in plan.contributions.stores):
        return Phase.STORES
    if plan.site.members(*place):
        return Phase.REPLICAS
    return ROLES.get(service.role, Phase.MONITORING)
