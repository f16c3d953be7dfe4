"""What must hold for a fast lane, and for several workers of LiteLLM."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.contributions import Contributions
from corral.errors import Finding, KeyPath
from corral.gateway import fast_lane
from corral.plan.site import Site


@check("plan", "fast-lane")
def _fast_lane(site: Site, published: Contributions) -> Iterator[Finding]:
    """The fast lane needs HAProxy to choose the replica, and a pool whose requests LiteLLM would not change."""
    gateway = site.inventory.gateway
    path: KeyPath = ("gateway", "fast_lane")
    if not gateway.fast_lane:
        return
    if gateway.balancing != "slots":
        yield Finding(f"with balancing: {gateway.balancing} LiteLLM chooses the replica", path, "use balancing: slots")
        return
    reasons = fast_lane.verdicts(site, published)
    if all(reasons.values()):
        why = "; ".join(f"{pool}: {reason}" for pool, reason in reasons.items())
        yield Finding(f"no pool can use it ({why})", path, "remove it, or change one of these pools", level="warning")


@check("plan", "gateway-workers")
def _gateway_workers(site: Site, _published: Contributions) -> Iterator[Finding]:
    """Several workers of LiteLLM have HAProxy in front, which chooses the replica, and a cache in which they count."""
    gateway = site.inventory.gateway
    path: KeyPath = ("gateway", "workers")
    if gateway.workers == 1:
        return
    if gateway.balancing != "slots":
        words = f"with balancing: {gateway.balancing} each worker would choose replicas without the others"
        yield Finding(words, path, "use balancing: slots, or leave workers out")
    if not gateway.cache:
        words = f"{gateway.workers} workers without a cache would each allow the whole of every limit"
        yield Finding(words, path, "write cache: true, or leave workers out")
