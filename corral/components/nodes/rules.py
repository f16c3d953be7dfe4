"""What must hold for external nodes."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.nodes import CACHE_FIELDS, WITHOUT_THINKING
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.routing import has_private_cache
from corral.plan.site import Site


@check("plan", "node-used", level="warning")
def _node_used(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A pool uses every node."""
    used = {place.node for pool in site.inventory.pools.values() for place in pool.on}
    for name in site.inventory.nodes:
        if name not in used:
            hint = "remove it or name it in a pool"
            yield Finding(f"no pool uses the node {name}", ("nodes", name), hint)


@check("plan", "cache-private", level="warning")
def _cache_private(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Where several keys may open a chat pool, each of its nodes can keep the cached prompts of one key from others."""
    for name, pool in site.inventory.pools.items():
        if not has_private_cache(site.inventory, name):
            continue
        for placement in pool.on:
            node = site.inventory.nodes.get(placement.node or "")
            if node is None or node.kind != "chat" or node.engine in (*CACHE_FIELDS, "cloud"):
                continue
            words = f"{placement.node} ({node.engine}) has one prompt cache for all keys of the pool"
            hint = "turn prompt caching off there and write cache: shared here, or open the pool to one key"
            yield Finding(words, ("pools", name), hint)


@check("plan", "thinking-off", level="warning")
def _thinking_off(site: Site, _found: Contributions) -> Iterator[Finding]:
    """`thinking: off` stands where the server can be told not to think; elsewhere thoughts are only taken out."""
    for name, pool in site.inventory.pools.items():
        for placement in pool.on:
            node = site.inventory.nodes.get(placement.node or "")
            if node is None or (node.thinking or pool.thinking) != "off" or node.engine in WITHOUT_THINKING:
                continue
            path = ("nodes", placement.node or "") if node.thinking else ("pools", name)
            words = f"requests cannot turn thinking off at {node.engine} nodes ({placement.node}); it still takes time"
            yield Finding(words, (*path, "thinking"), "turn it off there and write thinking: hidden here")
