"""What must hold for external nodes; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.components.nodes import CACHE_FIELDS, WITHOUT_THINKING
from corral.contributions import Contributions
from corral.plan.routing import has_private_cache
from corral.plan.site import Site

TEXTS = Texts.beside(__file__)


@TEXTS.check("plan", "node-used")
def _node_used(site: Site, _found: Contributions) -> Findings:
    places = [place for pool in site.inventory.pools.values() for place in pool.on]
    used = {place.node for place in places}
    taken = {(place.node, place.model) for place in places}
    for name, node in site.inventory.nodes.items():
        yield from TEXTS.broken(("nodes", name), (name not in used, "node-used/node", ""), name=name)
        for model in node.models if name in used else ():
            row = ((name, model) not in taken, "node-used/model", "")
            yield from TEXTS.broken(("nodes", name, "models", model), row, name=name, model=model)


@TEXTS.check("plan", "node-machine")
def _node_machine(site: Site, _found: Contributions) -> Findings:
    first: dict[str, str] = {}
    for name, node in site.inventory.nodes.items():
        other = first.setdefault((node.url or name).rstrip("/").removesuffix("/v1"), name)
        yield from TEXTS.broken(("nodes", name), (other != name, "node-machine/one", "url"), other=other, name=name)


@TEXTS.check("plan", "node-queue")
def _node_queue(site: Site, _found: Contributions) -> Findings:
    inventory = site.inventory
    for node in (name for name, node in inventory.nodes.items() if node.models):
        pools = [name for name, pool in inventory.pools.items() if any(place.node == node for place in pool.on)]
        for key in ("queue", "timeout_s"):
            said = {name: getattr(inventory.pools[name], key) or getattr(inventory.gateway, key) for name in pools}
            for name in pools:
                row = (said[name] != said[pools[0]], "node-queue/differ", "")
                yield from TEXTS.broken(("pools", name), row, first=pools[0], name=name, node=node, key=key)


@TEXTS.check("plan", "cache-private")
def _cache_private(site: Site, _found: Contributions) -> Findings:
    for name, pool in site.inventory.pools.items():
        for placement in pool.on if has_private_cache(site.inventory, name) else ():
            node = site.inventory.node_of(placement)
            if node is not None and node.kind == "chat" and node.engine not in (*CACHE_FIELDS, "cloud"):
                yield TEXTS.finding("cache-private/one", ("pools", name), node=placement.node, engine=node.engine)


@TEXTS.check("plan", "thinking-off")
def _thinking_off(site: Site, _found: Contributions) -> Findings:
    for name, pool in site.inventory.pools.items():
        for placement in pool.on:
            node = site.inventory.node_of(placement)
            if node is None or (node.thinking or pool.thinking) != "off" or node.engine in WITHOUT_THINKING:
                continue
            path = ("nodes", placement.node or "") if node.thinking else ("pools", name)
            yield TEXTS.finding("thinking-off/told", (*path, "thinking"), node=placement.node, engine=node.engine)
