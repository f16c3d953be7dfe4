"""What the page about the farm knows beside `/health`: names, kinds and aliases of pools, and the inventory's links."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from corral.config.client_names import aliases_of, kind_of
from corral.config.inventory import Inventory

# Bytes of an answer that HAProxy gives by itself; its buffer has 16 KiB, with the headers.
MOST_BYTES = 14_000
FILES = ("page.html", "page.css", "page.js")


def data(
    inventory: Inventory,
    queues: Sequence[Mapping[str, Any]],
    *,
    is_inside: bool,
    own_links: Sequence[tuple[str, str]] = (),
) -> str:
    """JSON for the page at one frontend, without `'` and without letters beyond ASCII; empty where there is no page.

    A site with too many pools for one answer of HAProxy's has a page without their aliases, or none.

    Args:
        inventory: the site's.
        queues: the balancer's groups that admit requests, with `name`, `pool`, `pools`, `servers` and `is_lease`.
        is_inside: whether the frontend's clients may know the pools.
        own_links: titles and addresses of the site's own pages; a link of the inventory with that title replaces one.
    """
    shown = inventory.gateway.page.shown
    if not queues or shown == "nowhere" or (shown == "inside" and not is_inside):
        return ""
    pools = list(_pools(inventory, queues)) if is_inside else []
    admin = inventory.gateway.admin_port if is_inside and inventory.gateway.database else 0
    named = {
        "admin": admin,
        "name": inventory.name,
        "links": list({**dict(own_links), **inventory.gateway.page.links}.items()),
    }
    choices = ({"pools": pools, **named}, {"pools": [pool | {"aliases": ()} for pool in pools], **named})
    texts = [json.dumps(told, separators=(",", ":")).replace("'", "\\u0027") for told in choices]
    return next((text for text in texts if len(text) <= MOST_BYTES), "")


def _pools(inventory: Inventory, queues: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Names that clients call; `queue` and `replicas` are the names that `/health` has for what answers them."""
    auto = inventory.gateway.auto
    for name in (*inventory.pools, *([auto.name] if auto else [])):
        found = [queue for queue in queues if name in queue["pools"]]
        yield {
            "name": name,
            "kind": kind_of(inventory, name) if name in inventory.pools else "chat",
            "aliases": aliases_of(inventory, name),
            "queue": next((queue["pool"] if queue["is_lease"] else queue["name"] for queue in found), ""),
            "replicas": [server["name"] for queue in found for server in queue["servers"]],
        }
