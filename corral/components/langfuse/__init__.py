"""Langfuse: traces of requests for people, with its own stores, headless from the first start. Compose hosts only.

Its stores are on a network of their own: SeaweedFS has ports without a lock, and only Langfuse needs any of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage, postgres
from corral.components.declared import filled, secrets, service
from corral.contributions import Contribution, Contributions, Endpoint, File, Secret, State, TraceReceiver
from corral.declarations import declaration
from corral.plan.site import Site, bracketed

STAGE = Stage.DASHBOARDS
COMPONENT = "langfuse"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
# Langfuse's name for the gateway's key, its `public key`: as good as any, for every Langfuse has names of its own.
USER = "pk-lf-corral"
PROJECT_KEY = "LANGFUSE_SECRET_KEY"
OTLP_PATH = "/api/public/otel"


def announce(site: Site) -> Iterator[Contribution]:
    """The receiver of the gateway's traces, and the key with which the gateway comes."""
    tracing, gateway = site.inventory.tracing, site.inventory.gateway
    if tracing is None or tracing.host is None:
        return
    endpoint = Endpoint(tracing.port, tracing.host, COMPONENT)
    for host in dict.fromkeys((tracing.host, gateway.host)):
        yield Secret(PROJECT_KEY, host, "key of the gateway in Langfuse", "sk")
    headers = f"Authorization=Basic {{{PROJECT_KEY}:basic {USER}}},x-langfuse-ingestion-version=4"
    yield Secret(HEADERS, gateway.host, "the gateway's key as Langfuse wants it", template=headers)
    is_outside = site.is_outside(endpoint, gateway.host)
    base = f"https://{{}}/{COMPONENT}" if is_outside else "http://{}"
    url = base.format(site.address(endpoint, gateway.host)) + OTLP_PATH
    yield TraceReceiver(url, HEADERS, is_outside=is_outside, endpoint=endpoint)


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """Langfuse's two programs and their four stores, where the inventory wants them."""
    tracing = site.inventory.tracing
    if tracing is None or tracing.host is None:
        return
    host = tracing.host
    yield from secrets(COMPONENT, host, user=USER)
    yield File(host, COMPONENT, "start.sh", asset="langfuse/start.sh")
    yield File(host, COMPONENT, "postgres.sh", asset=postgres.SCRIPT)
    own = declaration(COMPONENT)
    yield File(host, COMPONENT, "clickhouse.yaml", data=own["clickhouse"], note="merged into ClickHouse's own settings")
    for name in own["services"]:
        variables = own["variables"] | (own["web_variables"] if name == COMPONENT else {})
        yield service(
            site,
            host,
            COMPONENT,
            name,
            port=tracing.port,
            own=bracketed(site.host(host).address),
            site=site.inventory.name,
            variables=" ".join(f"{variable}={secret}" for variable, secret in sorted(variables.items())),
            given=tuple(sorted(variables.values())),
            stores=tuple(Endpoint(port, host, store) for store, port in own["stores"].items()),
            clickhouse_mib=tracing.clickhouse_mib,
        )
    dump, load = postgres.dump_and_load("--username", "langfuse_app", "--dbname", "langfuse")
    yield from (State(host, **filled(fields, {"dump": dump, "load": load})) for fields in own["states"])
