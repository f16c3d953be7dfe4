"""What must hold for machines that sleep."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.contributions import Contributions
from corral.errors import Finding, KeyPath
from corral.plan.site import Site


@check("plan", "sleep")
def _sleep(site: Site, published: Contributions) -> Iterator[Finding]:
    """A machine that sleeps is woken by the gateway's host, which does not sleep; requests wait until it is awake."""
    inventory = site.inventory
    monitoring = inventory.monitoring.host if inventory.monitoring else ""
    for name in site.sleepers:
        path: KeyPath = ("hosts" if name in inventory.hosts else "nodes", name, "sleep")
        if name in (inventory.gateway.host, monitoring):
            yield Finding(f"{name} has work while it is not asked for", path, "let the other machines sleep")
        elif inventory.gateway.balancing == "direct" or site.is_local(inventory.gateway.host):
            yield Finding("only HAProxy in Docker holds requests and wakes machines", path, "use balancing: slots")
        elif name in inventory.nodes and inventory.nodes[name].engine == "cloud":
            yield Finding("a cloud account does not sleep", path, "remove it")
    for backend in published.backends:
        sleep = site.sleepers.get(site.machine_of(backend))
        pool = inventory.pools[backend.pool]
        timeout_s = (pool.queue or inventory.gateway.queue).timeout_s
        if sleep and timeout_s < sleep.wake_s:
            words = f"requests wait for {timeout_s} s, and {site.machine_of(backend)} needs {sleep.wake_s} to wake"
            place: KeyPath = ("pools", backend.pool, "queue", "timeout_s") if pool.queue else ("pools", backend.pool)
            yield Finding(words, place, f"write queue: {{timeout_s: {sleep.wake_s}}}, or more")
