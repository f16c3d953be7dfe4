"""The door: where clients come in. What no pool behind a name has room for is refused here, before LiteLLM works on it.

LiteLLM needs some 30 ms of processor time to pass a refusal on, HAProxy 0.1 ms, and HAProxy is who knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from corral.config.client_names import aliases_of
from corral.config.inventory import Inventory
from corral.plan.routing import reachable

# Begins the names of the balancer's proxies that only refuse; no pool's name has a capital letter.
FULL = "Full:"


def named_doors(
    inventory: Inventory, groups: Sequence[Mapping[str, Any]], elsewhere: Collection[str]
) -> Iterator[dict[str, Any]]:
    """What may be refused at the door: each name with its further names, and the balancer's groups that could take it.

    Args:
        inventory: the site's.
        groups: the balancer's, with `name`, `pool`, `depth` and `retry_after_s`.
        elsewhere: pools that (also) have replicas of which the balancer knows nothing, such as cloud models. Whoever
            may end there is never refused at the door.
    """
    auto = inventory.gateway.auto
    for name in (*inventory.pools, *([auto.name] if auto else [])):
        pools = reachable(inventory, name)
        found = [group for group in groups if group["pool"] in pools]
        if found and set(elsewhere).isdisjoint(pools):
            yield {
                "name": name,
                "pool": pools[0],
                "names": (name, *aliases_of(inventory, name)),
                "groups": found,
                "depth": sum(group["depth"] for group in found),
                "retry_after_s": min(group["retry_after_s"] for group in found),
            }
