"""Which pool takes a request that names none, or that its own pool cannot take: tiers, fallbacks, names that wait.

Only facts about the inventory; `litellm/corral_routing.py` applies them to requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corral.config.client_names import aliases_of
from corral.config.inventory import Inventory, Tier
from corral.config.source import plain_yaml

# Defaults of tiers with these names; the inventory overrides every part.
TIERS: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_name("tiers.yaml").read_bytes())
CONDITIONS = ("words", "words_beyond", "characters_beyond", "messages_beyond")
SECTIONS = ("fallback", "context_fallback")


def tier_settings(tier: Tier) -> dict[str, Any]:
    """Which requests are of a tier: what the inventory says, else what its name stands for, else None."""
    known = TIERS.get(tier.name, {})
    said = {name: getattr(tier, name) for name in CONDITIONS}
    return {name: known.get(name) if value is None else value for name, value in said.items()}


def pool_context(inventory: Inventory, name: str) -> int | None:
    """Tokens that every replica of a pool takes in one request; None where a node does not say."""
    pool = inventory.pools[name]
    contexts = [node.context for place in pool.on if (node := inventory.node_of(place))]
    if pool.model in inventory.models and any(place.host for place in pool.on):
        contexts.append(inventory.models[pool.model].context)
    known = [context for context in contexts if context is not None]
    return min(known) if known and len(known) == len(contexts) else None


def chains(inventory: Inventory, section: str) -> dict[str, list[str]]:
    """Pools and their further names, each with the pools that are asked instead; `section` is one of SECTIONS."""
    found: dict[str, list[str]] = {}
    for name, pool in inventory.pools.items():
        instead = list(getattr(pool, section))
        if instead:
            found |= dict.fromkeys((name, *aliases_of(inventory, name)), instead)
    return found


def has_routing(inventory: Inventory) -> bool:
    """Whether anything here needs the gateway's routing callback."""
    pools = inventory.pools.values()
    return inventory.gateway.auto is not None or any(pool.background or pool.fallback for pool in pools)


def pools_behind(inventory: Inventory, name: str) -> tuple[str, ...]:
    """The pools that requests for this name end up in: itself, those of every tier, or the one whose work it is."""
    if name in inventory.pools:
        return (name,)
    auto = inventory.gateway.auto
    if auto is not None and name == auto.name:
        return tuple(dict.fromkeys(pool for tier in auto.tiers for pool in (tier.pool, *tier.spill)))
    return tuple(pool for pool, found in inventory.pools.items() if name in found.background)


def reaches_cloud(inventory: Inventory, name: str) -> bool:
    """Whether requests for this name may be sent to a cloud account, without those that fall back to another pool."""
    places = (place for pool in pools_behind(inventory, name) for place in inventory.pools[pool].on)
    return any(node.engine == "cloud" for place in places if (node := inventory.node_of(place)))


def local_names(inventory: Inventory) -> tuple[str, ...]:
    """The pools, and the name of `auto`, whose requests stay in the house."""
    auto = inventory.gateway.auto
    names = (*inventory.pools, *([auto.name] if auto else []))
    return tuple(name for name in names if not reaches_cloud(inventory, name))


def has_private_cache(inventory: Inventory, name: str) -> bool:
    """Whether a pool must not use for one key what it computed for another; decided by who may open it."""
    pool = inventory.pools[name]
    if pool.cache is not None:
        return pool.cache == "private"
    openers = [item.pools for item in inventory.consumers.values()]
    openers += [inventory.chat.pools] if inventory.chat else []
    can_open = [pools is None or any(name in reachable(inventory, opened) for opened in pools) for pools in openers]
    return inventory.gateway.entrance is not None or sum(can_open) > 1


def reachable(inventory: Inventory, name: str) -> tuple[str, ...]:
    """Every pool that may answer requests for this name: those behind it, and their fallbacks when they are full."""
    found = list(pools_behind(inventory, name))
    for pool in found:  # grows as it is walked
        more = inventory.pools[pool].fallback if pool in inventory.pools else ()
        found += (instead for instead in more if instead not in found)
    return tuple(found)
