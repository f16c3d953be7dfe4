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
    """A pool uses every node, and every model of it."""
    places = [place for pool in site.inventory.pools.values() for place in pool.on]
    used = {place.node for place in places}
    taken = {(place.node, place.model) for place in places}
    hint = "remove it or name it in a pool"
    for name, node in site.inventory.nodes.items():
        if name not in used:
            yield Finding(f"no pool uses the node {name}", ("nodes", name), hint)
        for model in node.models if name in used else ():
            if (name, model) not in taken:
                yield Finding(f"no pool uses {model} of the node {name}", ("nodes", name, "models", model), hint)


@check("plan", "node-machine", level="warning")
def _node_machine(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A server is one node, whatever number of models it has, so that its slots are counted once."""
    first: dict[str, str] = {}
    for name, node in site.inventory.nodes.items():
        url = (node.url or name).rstrip("/").removesuffix("/v1")
        other = first.setdefault(url, name)
        if other != name:
            words = f"{other} and {name} are one server, and each counts its own slots there"
            hint = "make one node of them: slots for all, and models: [NAME, …]; pools say on: {node: …, model: NAME}"
            yield Finding(words, ("nodes", name, "url"), hint)


@check("plan", "node-queue")
def _node_queue(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Pools on one node have the same queue and the same time for an answer: there is one queue before a node."""
    inventory = site.inventory
    for node in (name for name, node in inventory.nodes.items() if node.models):
        pools = [name for name, pool in inventory.pools.items() if any(place.node == node for place in pool.on)]
        for key in ("queue", "timeout_s"):
            said = {name: getattr(inventory.pools[name], key) or getattr(inventory.gateway, key) for name in pools}
            for name in pools:
                if said[name] != said[pools[0]]:
                    words = f"{pools[0]} and {name} wait in one queue, that of {node}, and differ in {key}"
                    yield Finding(
                        words, ("pools", name), f"write the same {key}: for both, or the gateway's for neither"
                    )


@check("plan", "cache-private", level="warning")
def _cache_private(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Where several keys may open a chat pool, each of its nodes can keep the cached prompts of one key from others."""
    for name, pool in site.inventory.pools.items():
        if not has_private_cache(site.inventory, name):
            continue
        for placement in pool.on:
            node = site.inventory.node_of(placement)
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
            node = site.inventory.node_of(placement)
            if node is None or (node.thinking or pool.thinking) != "off" or node.engine in WITHOUT_THINKING:
                continue
            path = ("nodes", placement.node or "") if node.thinking else ("pools", name)
            words = f"requests cannot turn thinking off at {node.engine} nodes ({placement.node}); it still takes time"
            yield Finding(words, (*path, "thinking"), "turn it off there and write thinking: hidden here")
