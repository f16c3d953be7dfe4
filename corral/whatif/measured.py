"""What `bench` has measured of a pool: with which hardware, model and settings, and how long its answers take."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from corral.build import Plan
from corral.plan.site import Replica
from corral.whatif.cases import Measured

LENGTH = 12
RESULT_FILE = "result.json"


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


def _replica(plan: Plan, replica: Replica) -> dict[str, Any]:
    known = plan.site.lock.get(replica.weights.key(replica.weights.source))
    host = plan.site.host(replica.host)
    found = {
        "cards": [[card.card, card.power_limit_w, *(card.clock_lock_mhz or ())] for card in replica.cards],
        "cpu": [] if replica.cards else [host.cpu.cores, host.cpu.avx, host.runtime],
        "source": replica.weights.source,
        "revision": replica.weights.revision,
        "sha256": known.sha256 if known else "",
        "context": replica.context,
        "engine": replica.engine.model_dump(mode="json"),
    }
    # Nothing without a shared server and a draft, so that older marks stay.
    if replica.shared is not None:
        found["shared"] = [replica.service, replica.shared.loaded]
    if replica.draft is not None and replica.weights.draft is not None:
        settings = replica.weights.draft.model_dump(mode="json")
        found["draft"] = settings | {"source": replica.draft.source, "revision": replica.draft.revision}
    return found


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


def bench_folder(plan: Plan) -> Path:
    """Where a site's runs of `bench` are."""
    return Path(".corral") / "bench" / plan.inventory.name


def measured_answers(plan: Plan, folder: Path | None = None) -> dict[str, Measured]:
    """The answer time of every pool that was measured with its present hardware, model and settings.

    From the newest such run in the folder (the site's own when None), in seconds: requests under way at the knee,
    those in the queue left out, by the rate. Pools without one are left out; files that are no result are passed over.
    """
    found: dict[str, Measured] = {}
    marks = {pool: fingerprint(plan, pool) for pool in plan.inventory.pools}
    for file in sorted((folder or bench_folder(plan)).glob(f"*/{RESULT_FILE}"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            for pool, item in json.loads(file.read_text())["pools"].items():
                capacity = item["capacity"]
                if pool in found or item["mark"] != marks.get(pool) or not capacity["knee_rpm"]:
                    continue
                busy = min(capacity["in_flight"], capacity["slots"])
                if busy > 0:
                    found[pool] = Measured(60 * busy / capacity["knee_rpm"], file.parent.name)
    return found
