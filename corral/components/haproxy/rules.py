"""What must hold for a fast lane."""

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
