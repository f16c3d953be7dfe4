"""Which of its project's networks a service is on. Pure.

Every network stands for one kind of callee: the callee names it (`Service.network`), and each service of the same
host that states the callee among its `calls` joins it. Two services that share no network cannot reach each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from corral.contributions import Service

# The exception that puts a service on a network from which calls leave the host.
WAY_OUT = "way-out"
# The exception of a service on a network that exists already.
JOINED = "joined-network"
# Ends the names of outer networks with IPv6: another name, because Docker cannot change a network in use.
IPV6 = "-ipv6"
INSIDE, OUTSIDE = "inside", "outside"


def own_network(service: Service) -> str:
    """The inner network on which a service is called by others on its host."""
    return service.network or _dashed(service.component)


def outer_network(service: Service) -> str:
    """The network through which people come in or calls go out; empty when neither happens.

    It is the component's own: what publishes a port does not meet what else publishes one.
    """
    name = f"{_dashed(service.component)}{IPV6 if service.has_ipv6 else ''}"
    if WAY_OUT in service.exceptions:
        return f"{WAY_OUT}-{name}"
    return f"door-{name}" if any(port.publish for port in service.ports) else ""


def routes_ipv6(service: Service) -> bool:
    """Whether its outer network has IPv6 where the site does: for calls, and for ports that it opens there itself.

    Docker's own proxy passes IPv6 on to what listens over IPv4 only, as long as the network has no IPv6.
    """
    is_published = any(":" in port.publish for port in service.ports)
    return service.is_dual_stack or (WAY_OUT in service.exceptions and not is_published)


def networks(service: Service, on_host: Iterable[Service]) -> tuple[str, ...]:
    """Names of all networks that a service is on, its own first.

    Args:
        service: the service.
        on_host: all services of its host.
    """
    if service.is_on_host:
        return ()
    called = {(endpoint.host, endpoint.service) for endpoint in service.calls}
    joined = sorted({own_network(other) for other in on_host if (other.host, other.name) in called})
    found = [own_network(service), *joined, outer_network(service)]
    return tuple(dict.fromkeys(name for name in found if name))


def aliases(service: Service) -> Mapping[str, str]:
    """By network a name that means the service's address on that network alone, for what listens nowhere else."""
    if not service.is_picky:
        return {}
    own, outer = own_network(service), outer_network(service)
    return {own: alias(service.name, INSIDE)} | ({outer: alias(service.name, OUTSIDE)} if outer else {})


def joined_key(network: str) -> str:
    """How a project calls a network that exists already, beside its own."""
    return f"joined-{network}"


def alias(service: str, side: str) -> str:
    """A service's name on its own network (INSIDE) or on its outer one (OUTSIDE)."""
    return f"{service}.{side}"


def _dashed(component: str) -> str:
    return component.replace("_", "-")
