"""The entrance: a guarded way in for clients beyond the farm, with TLS, before the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from corral.components import Stage, haproxy, litellm
from corral.contributions import (
    ConfigMount,
    Contribution,
    Contributions,
    Endpoint,
    File,
    Health,
    Port,
    Service,
    is_system_folder,
)
from corral.inventory import Entrance
from corral.site import Site

STAGE = Stage.MONITORING
COMPONENT = "entrance"
IMAGE = haproxy.IMAGE
FOLDER = "/usr/local/etc/haproxy"
CERTIFICATES = "/etc/corral/certificates"
FILES = ("haproxy.cfg", "renew.lua")
CERTIFICATE_THERE = "the certificate is kept in that folder; nothing beside it is mounted, and nothing can be written"
GUARDED = "LiteLLM's keys; only /v1/ and /health are let through"


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """HAProxy before the gateway, where the inventory wants one."""
    entrance = site.inventory.gateway.entrance
    if entrance is None:
        return
    host = site.inventory.gateway.host
    values = _values(site, entrance, published)
    yield File(host, COMPONENT, "haproxy.cfg", template="entrance/haproxy.cfg.j2", values=values)
    yield File(host, COMPONENT, "renew.lua", asset="litellm/renew.lua")
    yield _service(site, entrance, litellm.public_endpoint(site, published))


def _service(site: Site, entrance: Entrance, public: Endpoint) -> Service:
    host = site.inventory.gateway.host
    is_local = site.is_local(host)
    path = site.config_path(host, COMPONENT, "haproxy.cfg", f"{FOLDER}/haproxy.cfg")
    folders = [(f"./{COMPONENT}", FOLDER)]
    if entrance.certificate:
        folders.append((str(PurePosixPath(entrance.certificate).parent), CERTIFICATES))
    return Service(
        host=host,
        component=COMPONENT,
        name=COMPONENT,
        role="entrance",
        image=site.image(COMPONENT, IMAGE),
        program="haproxy",
        args=("-W", "-db", "-f", path) if is_local else ("haproxy", "-W", "-db", "-f", path),
        health=Health(entrance.port, "", () if is_local else _health_command(entrance.port)),
        memory_mib=256,
        ports=(Port(entrance.port, site.host(host).address, GUARDED),),
        configs=tuple(ConfigMount(name, "") for name in FILES),
        mounts=() if is_local else tuple(folders),
        exceptions={} if is_local or not is_system_folder(folders[-1][0]) else {"host-mount": CERTIFICATE_THERE},
        calls=(public, Endpoint(site.inventory.gateway.stats_port, host, haproxy.COMPONENT)),
        user="99:99",
        cpu_weight=2048,
        stop_signal="SIGUSR1",
        after=((litellm.COMPONENT, "service_started"),),
    )


def _health_command(port: int) -> tuple[str, ...]:
    """Somebody listens: bash, which the image has, speaks no TLS."""
    return "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"


def _values(site: Site, entrance: Entrance, published: Contributions) -> dict[str, Any]:
    gateway = site.inventory.gateway
    is_local = site.is_local(gateway.host)
    public = litellm.public_endpoint(site, published)
    has_balancer = any(service.component == haproxy.COMPONENT for service in published.services)
    figures = Endpoint(gateway.stats_port, gateway.host, haproxy.COMPONENT)
    return {
        "entry": f"{'127.0.0.1' if is_local else '*'}:{entrance.port}",
        "certificate": _certificate(entrance, is_local=is_local),
        "origins": list(entrance.origins),
        "max_body_kib": entrance.max_body_kib,
        "guard": _guard(entrance),
        "gateway": site.address(public, gateway.host),
        "balancer": site.address(figures, gateway.host) if has_balancer else "",
        "has_docker_dns": not is_local,
        "patience_s": litellm.patience_s(site),
    }


def _certificate(entrance: Entrance, *, is_local: bool) -> str:
    if not entrance.certificate or is_local:
        return entrance.certificate or ""
    return f"{CERTIFICATES}/{PurePosixPath(entrance.certificate).name}"


def _guard(entrance: Entrance) -> str:
    """What the gateway's callback holds requests to that came this way."""
    limits = {
        "messages": entrance.max_messages,
        "message_kib": entrance.max_message_kib,
        "tokens": entrance.max_tokens,
        "choices": 1,
    }
    return " ".join(f"{name}={limit}" for name, limit in limits.items() if limit)
