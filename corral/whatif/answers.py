"""How long answers take, from what `bench sweep` has measured on this very farm."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from corral.build import Plan
from corral.whatif.cases import Measured
from corral.whatif.fingerprint import fingerprint

RESULT_FILE = "result.json"


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
