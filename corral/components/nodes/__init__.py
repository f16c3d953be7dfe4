"""External nodes and cloud models: backends that the kit uses but does not start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from corral.components import Stage
from corral.config.inventory import Node, Thinking
from corral.contributions import (
    Backend,
    Contribution,
    Contributions,
    Cost,
    Endpoint,
    Fact,
    Rules,
    ScrapeTarget,
    Secret,
    pool_in_figures,
)
from corral.declarations import declaration
from corral.plan.routing import has_private_cache
from corral.plan.site import Site

STAGE = Stage.BACKENDS

# After which the cost of a node counts from zero again, where the inventory does not say.
BUDGET_PERIOD = "30d"
OLLAMA_LIKE = {"ollama", "inferrlm"}
DATA = declaration("nodes")
WITHOUT_THINKING: dict[str, dict[str, Any]] = DATA["without_thinking"]
CACHE_FIELDS: dict[str, str] = DATA["cache_fields"]


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A backend for every node that a pool uses, and a place for its key."""
    seen: dict[str, list[Backend]] = {}
    for pool_name, pool in site.inventory.pools.items():
        for placement in pool.on:
            node = site.inventory.node_of(placement)
            if node is not None and placement.node is not None:
                thinking = node.thinking or pool.thinking or "hidden"
                backend = _backend(pool_name, placement.node, node, site.node_endpoint(node), thinking)
                is_private = node.kind == "chat" and has_private_cache(site.inventory, pool_name)
                yield replace(backend, cache_field=CACHE_FIELDS.get(node.engine, "") if is_private else "")
                seen.setdefault(placement.node, []).append(backend)
    for name, backends in seen.items():
        node = site.inventory.nodes[name]
        yield from _metrics(site, name, node, backends)
        if node.api_key:
            yield Secret(node.api_key, site.inventory.gateway.host, f"key of the node {name}", "given")


def _metrics(site: Site, name: str, node: Node, backends: list[Backend]) -> Iterator[Contribution]:
    """What a node has, and a scrape target for servers whose metrics need no key."""
    labels = {
        "host": name,
        "pool": pool_in_figures(backends),
        "model": ", ".join(backend.upstream_model for backend in backends),
        "replica": name,
        "role": backends[0].kind if len({backend.kind for backend in backends}) == 1 else "node",
    }
    yield Fact("inventory:replica_slots", node.slots, labels)
    endpoint, monitoring = site.node_endpoint(node), site.inventory.monitoring
    # Beyond an edge there is one port for a service, and the tunnel has one for every worker.
    is_readable = monitoring is None or not site.is_behind_edge(endpoint, monitoring.host)
    if node.engine in DATA["open_metrics"] and is_readable:
        yield Rules(DATA["open_metrics"][node.engine])
        scheme: Literal["http", "https"] = "https" if (node.url or "").startswith("https:") else "http"
        yield ScrapeTarget(node.engine, endpoint, labels, scheme=scheme, ca_file=node.ca_file or "")


def _backend(pool: str, name: str, node: Node, endpoint: Endpoint, thinking: Thinking) -> Backend:
    scheme, _, rest = (node.url or "").partition("://")
    path = rest.partition("/")[2].rstrip("/").removesuffix("v1").rstrip("/")
    folder = f"/{path}" if path else ""
    is_ollama, is_cloud = node.engine in OLLAMA_LIKE, node.engine == "cloud"
    is_chat = node.kind == "chat" and not is_cloud
    health = "" if is_cloud else node.health or folder + DATA["health_path"][node.engine]
    return Backend(
        pool, name, node.kind, Endpoint(443) if is_cloud else endpoint, node.slots, node.model or "", health,
        api_path=folder + ("" if is_ollama else "/v1"),
        scheme="https" if scheme == "https" else "http",
        protocol="cloud" if is_cloud else "ollama" if is_ollama else "openai",
        secret=node.api_key or "", is_ours=False, cost=_cost(node),
        ca_file=node.ca_file or "",
        key_header=node.key_header or "",
        base_url=str(node.url or "") if is_cloud else "",
        parameters=_parameters(node, thinking) if is_chat else {},
        hides_thoughts=is_chat and thinking != "shown",
    )  # fmt: skip


def _parameters(node: Node, thinking: Thinking) -> dict[str, Any]:
    """What every chat request to the node carries besides the client's own."""
    dialect = {"dialect": "inferrlm"} if node.engine == "inferrlm" else {}
    lossy = {"drop_params": True} if node.engine in OLLAMA_LIKE else {}  # that protocol lacks parts of OpenAI's
    return lossy | dialect | (WITHOUT_THINKING.get(node.engine, {}) if thinking == "off" else {})


def _cost(node: Node) -> Cost | None:
    if node.price is None:
        return None
    price = (node.price.input_usd_per_million / 1e6, node.price.output_usd_per_million / 1e6)
    return Cost(*price, node.budget.max_usd, node.budget.period or BUDGET_PERIOD) if node.budget else Cost(*price)
