"""redis_exporter: figures of the gateway's Valkey."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.config.inventory import Monitoring
from corral.contributions import (
    Contribution,
    Contributions,
    Endpoint,
    Health,
    Port,
    Rules,
    ScrapeTarget,
    Secret,
    Service,
    Store,
)
from corral.plan.networks import FIGURES
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT = "valkey-exporter"
IMAGE = "oliver006/redis_exporter:v1.86.0-alpine"
PASSWORDS = "VALKEY_EXPORTER_PASSWORDS"


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """An exporter beside every cache, its target and its rules."""
    monitoring = site.inventory.monitoring
    stores = [store for store in published.stores if store.kind == "cache"]
    if monitoring is None or not monitoring.store_exporters or not stores:
        return
    yield Rules("monitoring/rules/valkey.yml")
    for store in stores:
        host = store.endpoint.host
        address = site.address(store.endpoint, host)
        passwords = f'{{{{"redis://{store.monitor}@{address}": "{{{store.monitor_password}}}"}}}}\n'
        yield Secret(PASSWORDS, host, "Valkey's password as its exporter reads it", template=passwords)
        yield _service(site, monitoring, store)
        endpoint = Endpoint(monitoring.cache_exporter_port, host, COMPONENT)
        yield ScrapeTarget("valkey", endpoint, {"host": host, "role": "cache"})


def _service(site: Site, monitoring: Monitoring, store: Store) -> Service:
    host, port = store.endpoint.host, monitoring.cache_exporter_port
    listen = f"{'127.0.0.1' if site.is_local(host) else ''}:{port}"
    return Service(
        host=host,
        component="valkey_exporter",
        name=COMPONENT,
        role="exporter",
        image=site.image(COMPONENT, IMAGE),
        program="prometheus-redis-exporter",
        args=(
            f"--redis.addr=redis://{site.address(store.endpoint, host)}",
            f"--redis.user={store.monitor}",
            f"--redis.password-file={site.secret_path(host, PASSWORDS)}",
            "--config-command=-",
            f"--web.listen-address={listen}",
        ),
        health=Health.by_wget(port, "/health"),
        memory_mib=64,
        secrets=(PASSWORDS,),
        ports=(Port(port, site.publish_address(host), "figures of the counters, none of them"),),
        network=FIGURES,
        calls=(store.endpoint,),
        user="59000:59000",
        cpu_weight=256,
        after=((store.endpoint.service, "service_healthy"),),
    )
