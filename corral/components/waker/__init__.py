"""Wakes machines that sleep, when requests wait for them (Wake-on-LAN)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Fact, File, name_of_shared
from corral.plan.site import Site

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
    pools = Counter(backend.name for backend in published.backends if not backend.is_ours)
    asleep = [backend for backend in published.backends if site.machine_of(backend) in machines]
    for name, backend in {backend.name: backend for backend in asleep}.items():
        pool = name_of_shared(name) if pools[name] > 1 else backend.pool
        yield Fact("inventory:may_sleep", 1, {"host": site.machine_of(backend), "pool": pool, "replica": name})
