"""What must hold for toy servers."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.serving import engine_key, one_of_each_sort
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.site import Site

MOST_SLOTS = 4


@check("plan", "toy-slots")
def _toy_slots(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A toy server has at most four slots."""
    for replica in one_of_each_sort(site, "toy"):
        if replica.slots > MOST_SLOTS:
            words = f"a toy has at most {MOST_SLOTS} slots, not {replica.slots}"
            yield Finding(words, engine_key(site, replica, "slots"), f"set slots: {MOST_SLOTS} or less")
