"""HAProxy's public frontends: their limits, and the models whose requests they refuse while all queues are full.

Every frontend has connections of its own: external clients cannot use up those of internal clients, and neither can use
up those of the operator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from corral.config.client_names import aliases_of
from corral.config.inventory import Entrance, Gateway, Inventory
from corral.plan.routing import reachable
from corral.plan.site import Site

# Larger requests wait for one of few places: LiteLLM holds a body several times in memory.
LARGE_KIB = 1024
# Connections of the operator's own calls at once.
MOST_ADMINS = 128
# Prefix of proxies of the balancer that only refuse; no pool's name has a capital letter.
FULL = "Full:"
# Every address, of IPv6 as well.
EVERYWHERE = "[::]"


def fronts(gateway: Gateway, bind: str, most_clients: int, certificate: str) -> list[dict[str, Any]]:
    """Values for the template: the frontend for internal clients, and the entrance where there is one.

    Args:
        gateway: the inventory's section.
        bind: address to listen on.
        most_clients: connections that each of them takes at once.
        certificate: path of the entrance's certificate as HAProxy sees it, or empty for plain HTTP.

    Returns:
        Mappings; `per_address` limits connections at once from one address (IPv6: one /64 network), `connections_10s`
        new ones in ten seconds, `per_credential` requests at once with one key. `origins` are the origins of web pages
        that may call it, `is_inside` shows its clients the state of the whole farm, `guard` goes to LiteLLM's callback.
    """
    inside = {
        "name": "gateway",
        "entry": entry(bind, gateway.port),
        "most_clients": most_clients,
        "per_address": most_clients // 2,
        "connections_10s": most_clients * 10,
        "per_credential": most_clients // 2,
        "max_body_kib": gateway.max_body_kib,
        "origins": "*",
        "is_inside": True,
        "certificate": "",
        "guard": "",
    }
    common = {"path": (gateway.path or "").replace(".", "[.]"), "proxies": " ".join(gateway.proxies)}
    return [
        front | common
        for front in (
            inside,
            *([_entrance(gateway.entrance, bind, most_clients, certificate)] if gateway.entrance else []),
        )
    ]


def entry(bind: str, port: int) -> str:
    """Where HAProxy listens: `bind` is an address, `*` for all of IPv4, or `[::]` for all of both."""
    return f"*:{port},[::]:{port} v6only" if bind == EVERYWHERE else f"{bind}:{port}"


def _entrance(entrance: Entrance, bind: str, most_clients: int, certificate: str) -> dict[str, Any]:
    return {
        "name": "entrance",
        "entry": entry(bind, entrance.port),
        "most_clients": most_clients,
        "per_address": most_clients // 8,
        "connections_10s": most_clients // 4,
        "per_credential": most_clients // 8,
        "max_body_kib": entrance.max_body_kib,
        "origins": " ".join(entrance.origins),
        "is_inside": False,
        "certificate": certificate,
        "guard": guard_of(entrance),
    }


def guard_of(entrance: Entrance) -> str:
    """Limits of the gateway's callback for requests from the entrance, as `messages=100 tokens=1024`."""
    limits = {
        "messages": entrance.max_messages,
        "message_kib": entrance.max_message_kib,
        "tokens": entrance.max_tokens,
        "choices": 1,
    }
    return " ".join(f"{name}={limit}" for name, limit in limits.items() if limit)


def gateway_publish_address(site: Site) -> str:
    """Address on the gateway's host for internal clients of `gateway.port`: loopback beside an entrance."""
    gateway = site.inventory.gateway
    if site.is_local(gateway.host):
        return "127.0.0.1"
    return gateway.address or ("127.0.0.1" if gateway.entrance else site.host(gateway.host).address)


def people_address(site: Site) -> str:
    """Address on the gateway's host for browsers: the entrance's, or else that of internal clients."""
    entrance = site.inventory.gateway.entrance
    return entrance_address(site, entrance) if entrance else gateway_publish_address(site)


def entrance_address(site: Site, entrance: Entrance) -> str:
    """Address on the gateway's host for clients outside the farm."""
    return entrance.address or site.host(site.inventory.gateway.host).address


def named_doors(
    inventory: Inventory, groups: Sequence[Mapping[str, Any]], elsewhere: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Model names that HAProxy refuses while full, each with its aliases and the groups of replicas that could answer.

    LiteLLM needs about 30 ms of processor time to pass a refusal on, HAProxy 0.1 ms.

    Args:
        inventory: the site's.
        groups: the balancer's, with `name`, `pools`, `depth` and `retry_after_s`.
        elsewhere: pools that (also) have replicas which the balancer does not count, such as cloud models. Names that
            may end there are never refused here.
    """
    auto = inventory.gateway.auto
    for name in (*inventory.pools, *([auto.name] if auto else [])):
        pools = reachable(inventory, name)
        found = [group for group in groups if not set(pools).isdisjoint(group["pools"])]
        if found and set(elsewhere).isdisjoint(pools):
            yield {
                "name": name,
                "pool": pools[0],
                "names": (name, *aliases_of(inventory, name)),
                "groups": found,
                "depth": sum(group["depth"] for group in found),
                "retry_after_s": min(group["retry_after_s"] for group in found),
            }
