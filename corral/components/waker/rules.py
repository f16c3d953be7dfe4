"""What must hold for machines that sleep; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.contributions import Contributions
from corral.errors import KeyPath
from corral.plan.site import Site

TEXTS = Texts.beside(__file__)


@TEXTS.check("plan", "sleep")
def _sleep(site: Site, published: Contributions) -> Findings:
    inventory, gateway = site.inventory, site.inventory.gateway
    busy = (gateway.host, inventory.monitoring.host if inventory.monitoring else "")
    for name in site.sleepers:
        yield from TEXTS.first(
            ("hosts" if name in inventory.hosts else "nodes", name, "sleep"),
            (name in busy, "sleep/busy", ""),
            (gateway.balancing == "direct" or site.is_local(gateway.host), "sleep/no-waker", ""),
            (name in inventory.nodes and inventory.nodes[name].engine == "cloud", "sleep/cloud", ""),
            name=name,
        )
    for backend in published.backends:
        name, pool = site.machine_of(backend), inventory.pools[backend.pool]
        sleep, timeout_s = site.sleepers.get(name), (pool.queue or gateway.queue).timeout_s
        place: KeyPath = ("pools", backend.pool, "queue", "timeout_s") if pool.queue else ("pools", backend.pool)
        if sleep and timeout_s < sleep.wake_s:
            yield TEXTS.finding("sleep/short", place, timeout_s=timeout_s, name=name, wake_s=sleep.wake_s)
