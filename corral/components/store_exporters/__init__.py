"""Metrics of the gateway's stores: postgres_exporter beside its database, redis_exporter beside its cache."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Endpoint, Rules, ScrapeTarget, Secret
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT = "store_exporters"
JOBS = {"database": "postgres", "cache": "valkey"}


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """An exporter beside every store, its target and its rules."""
    monitoring = site.inventory.monitoring
    if monitoring is None or not monitoring.store_exporters:
        return
    ports = {"database": monitoring.database_exporter_port, "cache": monitoring.cache_exporter_port}
    for store in sorted(published.stores, key=lambda item: list(JOBS).index(item.kind)):
        host, job = store.endpoint.host, JOBS[store.kind]
        name, port, address = f"{job}-exporter", ports[store.kind], site.address(store.endpoint, host)
        yield Rules(f"monitoring/rules/{job}.yml")
        if store.kind == "cache":
            passwords = f'{{{{"redis://{store.monitor}@{address}": "{{{store.monitor_password}}}"}}}}\n'
            yield Secret(
                "VALKEY_EXPORTER_PASSWORDS", host, "Valkey's password as its exporter reads it", template=passwords
            )
        told = {"user": store.monitor, "password": store.monitor_password, "database": store.database}
        called = {"store": address, "service": store.endpoint.service, "calls": (store.endpoint,)}
        yield service(site, host, COMPONENT, name, port=port, **told, **called)
        yield ScrapeTarget(job, Endpoint(port, host, name), {"host": host, "role": store.kind})
