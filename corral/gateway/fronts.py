"""HAProxy's public frontends: which there are, and what each lets through at once.

Every frontend has connections of its own, so that clients beyond the farm cannot use up those of clients inside, nor
either of them those of the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

from corral.config.inventory import Entrance, Gateway
from corral.plan.site import Site

# Requests above this size wait for one of few places: LiteLLM holds a body several times in memory.
LARGE_KIB = 1024

# Connections of the operator's own calls at once.
MOST_ADMINS = 128


@dataclass(frozen=True, slots=True)
class Front:
    """A frontend for clients, as the template wants it."""

    name: str
    # Address and port to listen on.
    entry: str
    # Connections at once.
    most_clients: int
    # Connections at once from one address (IPv6: one /64 network).
    per_address: int
    # New connections from one address in ten seconds.
    connections_10s: int
    # Requests at once with one key.
    per_credential: int
    max_body_kib: int
    # Origins of pages that may call it, `*` for all, separated by spaces.
    origins: str
    # Whether its clients are the operator's own: they see the whole state of the farm.
    is_inside: bool
    # File with certificate and key; plain HTTP without it.
    certificate: str = ""
    # Limits for the callback, as `messages=100 tokens=1024`.
    guard: str = ""


def fronts(gateway: Gateway, bind: str, most_clients: int, certificate: str) -> list[Front]:
    """The frontend for clients inside, and the entrance where there is one.

    Args:
        gateway: the inventory's section.
        bind: address to listen on.
        most_clients: connections that each of them takes at once.
        certificate: path of the entrance's certificate as HAProxy sees it, or empty.
    """
    inside = Front(
        name="gateway",
        entry=f"{bind}:{gateway.port}",
        most_clients=most_clients,
        per_address=most_clients // 2,
        connections_10s=most_clients * 10,
        per_credential=most_clients // 2,
        max_body_kib=gateway.max_body_kib,
        origins="*",
        is_inside=True,
    )
    return [inside, *([_entrance(gateway.entrance, bind, most_clients, certificate)] if gateway.entrance else [])]


def _entrance(entrance: Entrance, bind: str, most_clients: int, certificate: str) -> Front:
    return Front(
        name="entrance",
        entry=f"{bind}:{entrance.port}",
        most_clients=most_clients,
        per_address=most_clients // 8,
        connections_10s=most_clients // 4,
        per_credential=most_clients // 8,
        max_body_kib=entrance.max_body_kib,
        origins=" ".join(entrance.origins),
        is_inside=False,
        certificate=certificate,
        guard=guard_of(entrance),
    )


def guard_of(entrance: Entrance) -> str:
    """What the gateway's callback holds requests to that came by the entrance."""
    limits = {
        "messages": entrance.max_messages,
        "message_kib": entrance.max_message_kib,
        "tokens": entrance.max_tokens,
        "choices": 1,
    }
    return " ".join(f"{name}={limit}" for name, limit in limits.items() if limit)


def gateway_publish_address(site: Site) -> str:
    """Address on the gateway's host at which clients inside find `gateway.port`: loopback beside an entrance."""
    gateway = site.inventory.gateway
    if site.is_local(gateway.host):
        return "127.0.0.1"
    return gateway.address or ("127.0.0.1" if gateway.entrance else site.host(gateway.host).address)
