"""With what a pool was measured: hardware, model and settings as one short mark. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from corral.build import Plan

LENGTH = 12


def fingerprint(plan: Plan, pool: str) -> str:
    """A mark that changes when the pool's cards, model, settings or number of replicas do."""
    replicas = [_replica(plan, replica) for replica in plan.site.replicas if replica.pool == pool]
    nodes = [plan.inventory.nodes[item.node] for item in plan.inventory.pools[pool].on if item.node]
    found = {
        "replicas": replicas,
        "nodes": [{"engine": node.engine, "model": node.model, "slots": node.slots} for node in nodes],
        "balancing": plan.inventory.gateway.balancing,
    }
    # A letter in front: YAML would read some rows of hexadecimal digits as numbers.
    return "m" + hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:LENGTH]


def _replica(plan: Plan, replica: Any) -> dict[str, Any]:
    known = plan.site.lock.get(replica.weights.key(replica.weights.source))
    host = plan.site.host(replica.host)
    return {
        "cards": [[card.card, card.power_limit_w] for card in replica.cards],
        "cpu": [] if replica.cards else [host.cpu.cores, host.cpu.avx, host.runtime],
        "source": replica.weights.source,
        "revision": replica.weights.revision,
        "sha256": known.sha256 if known else "",
        "context": replica.context,
        "engine": replica.engine.model_dump(mode="json"),
    } | _more(replica)


def _more(replica: Any) -> dict[str, Any]:
    """What a small model that drafts and a shared server change; nothing without them, so that older marks stay."""
    more = {} if replica.shared is None else {"shared": [replica.service, replica.shared.loaded]}
    if replica.draft is None:
        return more
    settings = replica.weights.draft.model_dump(mode="json")
    return more | {"draft": settings | {"source": replica.draft.source, "revision": replica.draft.revision}}


def state(plan: Plan, pool: str) -> str:
    """What is known of a pool's limits: `""` (it has none), `never measured`, `measured …`, or with what else."""
    limits = plan.inventory.pools[pool].limits
    if not (limits.rpm or limits.tpm):
        return ""
    if limits.measured is None:
        return "never measured"
    if limits.measured.mark != fingerprint(plan, pool):
        return f"measured with other hardware, model or settings (run {limits.measured.run})"
    return f"measured (run {limits.measured.run})"
