"""postgres_exporter: figures of the gateway's PostgreSQL."""

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
    Service,
    Store,
)
from corral.plan.networks import FIGURES
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT = "postgres-exporter"
IMAGE = "quay.io/prometheuscommunity/postgres-exporter:v0.19.1"


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """An exporter beside every database, its target and its rules."""
    monitoring = site.inventory.monitoring
    stores = [store for store in published.stores if store.kind == "database"]
    if monitoring is None or not monitoring.store_exporters or not stores:
        return
    yield Rules("monitoring/rules/postgres.yml")
    for store in stores:
        host = store.endpoint.host
        yield _service(site, monitoring, store)
        endpoint = Endpoint(monitoring.database_exporter_port, host, COMPONENT)
        yield ScrapeTarget("postgres", endpoint, {"host": host, "role": "database"})


def _service(site: Site, monitoring: Monitoring, store: Store) -> Service:
    host, port = store.endpoint.host, monitoring.database_exporter_port
    listen = f"{'127.0.0.1' if site.is_local(host) else ''}:{port}"
    return Service(
        host=host,
        component="postgres_exporter",
        name=COMPONENT,
        role="exporter",
        image=site.image(COMPONENT, IMAGE),
        program="prometheus-postgres-exporter",
        args=(f"--web.listen-address={listen}", "--no-collector.stat_user_tables", "--no-collector.statio_user_tables"),
        environment={
            "DATA_SOURCE_URI": f"{site.address(store.endpoint, host)}/{store.database}?sslmode=disable",
            "DATA_SOURCE_USER": store.monitor,
            "DATA_SOURCE_PASS_FILE": site.secret_path(host, store.monitor_password),
        },
        health=Health.by_wget(port, "/"),
        memory_mib=96,
        secrets=(store.monitor_password,),
        ports=(Port(port, site.publish_address(host), "figures of the database, none of its contents"),),
        network=FIGURES,
        calls=(store.endpoint,),
        user="65534:65534",
        cpu_weight=256,
        after=((store.endpoint.service, "service_healthy"),),
    )
