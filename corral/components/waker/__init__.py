"""Wakes machines that sleep, when requests wait for them (Wake-on-LAN)."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Fact, File, pool_in_figures
from corral.plan.site import Site
from corral.units import grouped

STAGE = Stage.GATEWAY
COMPONENT = "waker"


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The program that sends the packets, and what alerts need to know of machines that may be asleep."""
    machines, gateway = site.sleepers, site.inventory.gateway
    if not machines:
        return
    yield File(gateway.host, COMPONENT, "wake.py", asset="haproxy/wake.py")
    words = tuple(f"{name}={sleep.mac}" for name, sleep in machines.items())
    yield service(site, gateway.host, COMPONENT, port=gateway.stats_port, machines=words)
    servers = grouped((item.name, item) for item in published.backends if site.machine_of(item) in machines)
    for name, backends in servers.items():
        labels = {"host": site.machine_of(backends[0]), "pool": pool_in_figures(backends), "replica": name}
        yield Fact("inventory:may_sleep", 1, labels)
