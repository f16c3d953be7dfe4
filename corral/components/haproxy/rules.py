"""What must hold for a fast lane, and for several workers of LiteLLM; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.contributions import Contributions
from corral.gateway import fast_lane
from corral.plan.site import Site

TEXTS = Texts.beside(__file__)


@TEXTS.check("plan", "fast-lane")
def _fast_lane(site: Site, published: Contributions) -> Findings:
    gateway = site.inventory.gateway
    reasons = fast_lane.verdicts(site, published) if gateway.fast_lane and gateway.balancing == "slots" else {"": ""}
    yield from TEXTS.first(
        ("gateway", "fast_lane"),
        (gateway.fast_lane and gateway.balancing != "slots", "fast-lane/balancing", ""),
        (all(reasons.values()), "fast-lane/no-pool", ""),
        balancing=gateway.balancing,
        why="; ".join(f"{pool}: {reason}" for pool, reason in reasons.items()),
    )


@TEXTS.check("plan", "gateway-workers")
def _gateway_workers(site: Site, _published: Contributions) -> Findings:
    gateway = site.inventory.gateway
    yield from TEXTS.broken(
        ("gateway", "workers"),
        (gateway.workers > 1 and gateway.balancing != "slots", "gateway-workers/balancing", ""),
        (gateway.workers > 1 and not gateway.cache, "gateway-workers/cache", ""),
        gateway=gateway,
    )
