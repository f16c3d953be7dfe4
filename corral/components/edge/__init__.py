"""The edge of a host: the one port at which other hosts call its services, over TLS with client certificates.

Services publish nothing for other hosts. HAProxy takes their calls, lets only the needed paths of the needed services
through, and puts the host's own keys in. A caller names the service by the name that it asks for in TLS (SNI), or by
the first part of the path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Endpoint, File, Secret
from corral.gateway.frontends import EVERYWHERE, entry
from corral.plan.site import Site

STAGE = Stage.MONITORING
COMPONENT = "edge"
# Port of HAProxy's runtime API, on the container's own loopback address.
CONTROL_PORT = 9999
AUTHORITY, CERTIFICATE, KEYS = "EDGE_AUTHORITY", "EDGE_CERTIFICATE", "EDGE_KEYS"
Caller = Literal["gateway", "monitoring"]
CLIENTS: dict[Caller, str] = {"gateway": "GATEWAY_CERTIFICATE", "monitoring": "MONITORING_CERTIFICATE"}
# Secrets that are issued anew from time to time.
CERTIFICATES = frozenset({AUTHORITY, CERTIFICATE, *CLIENTS.values()})
# Connections of one address beyond a request for every slot: health checks, metrics, requests that a client left.
SPARE_CONNECTIONS = 256
# What a busy TLS connection takes, and HAProxy without any.
CONNECTION_KIB, BASE_MIB = 96, 96
# What the balancer asks a server that pools share.
MODELS = ("/models", "/models/load", "/models/unload")


@dataclass(frozen=True, slots=True)
class Door:
    """One service that other hosts call: what each caller may ask it for, and the key that is put in."""

    service: str
    port: int
    secret: str = ""
    slots: int = 0
    # By caller; a path that ends in `/` stands for everything below it.
    paths: Mapping[Caller, frozenset[str]] = field(default_factory=dict)


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """An edge on every host that another host of the site calls."""
    for host in site.inventory.hosts:
        doors = doors_of(site, published, host)
        if doors and not site.is_local(host):
            yield from _edge(site, host, doors)


def doors_of(site: Site, published: Contributions, host: str) -> list[Door]:
    """The services of a host that other hosts call, by name."""
    found: dict[str, Door] = {}
    monitoring = site.inventory.monitoring
    readers = {"gateway": site.inventory.gateway.host, "monitoring": monitoring.host if monitoring else host}
    for caller, endpoint, door in _calls(site, published):
        if endpoint is None or endpoint.host != host or not site.is_behind_edge(endpoint, readers[caller]):
            continue
        known = found.get(endpoint.service, Door(endpoint.service, endpoint.port))
        if known.port != endpoint.port:
            raise ValueError(f"{endpoint.service} is called at two ports, {known.port} and {endpoint.port}")
        paths = {**known.paths, caller: known.paths.get(caller, frozenset()) | door.paths[caller]}
        secret, slots = known.secret or door.secret, known.slots + door.slots
        found[endpoint.service] = replace(known, secret=secret, slots=slots, paths=paths)
    return [found[name] for name in sorted(found)]


def _calls(site: Site, published: Contributions) -> Iterator[tuple[Caller, Endpoint | None, Door]]:
    """Who calls what, and what of it."""
    for backend in published.backends:
        is_shared = any(item.shared for item in site.members(backend.endpoint.host, backend.endpoint.service))
        paths = {f"{backend.api_path}/", backend.health_path, *(MODELS if is_shared else ())}
        yield "gateway", backend.endpoint, _door("gateway", paths, backend.secret, backend.slots)
    for target in published.targets:
        paths = {target.path.rstrip("/"), target.path}
        yield "monitoring", target.endpoint, _door("monitoring", paths, target.secret)
    for receiver in published.trace_receivers:
        path = f"/{receiver.url.partition('://')[2].partition('/')[2].partition('/')[2]}/"
        yield "gateway", receiver.endpoint, _door("gateway", {path})


def _door(caller: Caller, paths: set[str], secret: str = "", slots: int = 0) -> Door:
    return Door("", 0, secret, slots, {caller: frozenset(paths)})


def server_name(endpoint: Endpoint) -> str:
    """The name that a caller asks for in TLS; the host's certificate is good for `*.HOST`."""
    return f"{endpoint.service.replace('.', '+')}.{endpoint.host}"


def is_called(site: Site, endpoints: Iterable[Endpoint], host: str) -> bool:
    """Whether one of these is on another host of the site than `host`, behind its edge."""
    return any(site.is_behind_edge(endpoint, host) for endpoint in endpoints)


def client_secrets(host: str, caller: Caller) -> Iterator[Secret]:
    """What a host needs to call other hosts: its certificate and key, and the authority by which it knows them."""
    yield authority(host)
    purpose = f"certificate and key of the {caller} on other hosts"
    yield Secret(CLIENTS[caller], host, purpose, "client", names=(caller,))


def authority(host: str) -> Secret:
    """The certificate of the site's own authority."""
    return Secret(AUTHORITY, host, "the site's certificate authority", "authority")


def _edge(site: Site, host: str, doors: list[Door]) -> Iterator[Contribution]:
    facts = site.host(host)
    names = (host, f"*.{host}", facts.address, *([facts.hostname] if facts.hostname else ()))
    yield authority(host)
    yield Secret(CERTIFICATE, host, "certificate and key of this host", "server", names=names)
    keys = sorted({door.secret for door in doors if door.secret})
    if keys:
        lines = "".join(f"{name} Bearer {{{name}}}\n" for name in keys)
        yield Secret(KEYS, host, "keys of this host's services, put in by its edge", template=lines)
    connections = SPARE_CONNECTIONS + 2 * sum(door.slots for door in doors)
    values = _values(site, host, doors, connections)
    yield File(host, COMPONENT, "haproxy.cfg", template="edge/haproxy.cfg.j2", values=values)
    yield service(
        site,
        host,
        COMPONENT,
        port=site.inventory.gateway.edge_port,
        memory_mib=BASE_MIB + 4 * connections * CONNECTION_KIB // 1024,
        keys=(KEYS,) if keys else (),
        calls=tuple(Endpoint(door.port, host, door.service) for door in doors),
    )


def _values(site: Site, host: str, doors: list[Door], connections: int) -> dict[str, Any]:
    return {
        "entry": entry(EVERYWHERE if site.has_ipv6 else "*", site.inventory.gateway.edge_port),
        "control": f"ipv4@127.0.0.1:{control_port(site)}",
        "certificate": site.secret_path(host, CERTIFICATE),
        "authority": site.secret_path(host, AUTHORITY),
        "keys": site.secret_path(host, KEYS),
        "most_connections": connections,
        "patience_s": _patience_s(site),
        "doors": [_door_values(host, door) for door in doors],
    }


def control_port(site: Site) -> int:
    """Port of HAProxy's runtime API, on the container's own loopback address."""
    return CONTROL_PORT if site.inventory.gateway.edge_port != CONTROL_PORT else CONTROL_PORT - 1


def _door_values(host: str, door: Door) -> dict[str, Any]:
    return {
        "service": door.service,
        "server_name": server_name(Endpoint(door.port, host, door.service)),
        "address": f"{door.service}:{door.port}",
        "secret": door.secret,
        "callers": [
            {
                "name": name,
                "folders": [path for path in sorted(allowed) if path.endswith("/")],
                "paths": [path for path in sorted(allowed) if not path.endswith("/")],
            }
            for name, allowed in sorted(door.paths.items())
        ],
    }


def _patience_s(site: Site) -> int:
    """Seconds that the slowest answer may take; the balancer decides before that."""
    gateway = site.inventory.gateway
    return max(gateway.timeout_s, *(pool.timeout_s or 0 for pool in site.inventory.pools.values())) + 60
