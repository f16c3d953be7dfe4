"""A receiver of traces that the kit does not start: any program or service that takes OTLP over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.contributions import Contribution, Contributions, Secret, TraceReceiver
from corral.plan.site import Site

STAGE = Stage.BACKENDS
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"


def announce(site: Site) -> Iterator[Contribution]:
    """The receiver, and the header that opens it."""
    tracing, gateway = site.inventory.tracing, site.inventory.gateway
    if tracing is None or tracing.url is None:
        return
    if tracing.secret:
        yield Secret(tracing.secret, gateway.host, "opens the receiver of traces", "given")
        template = f"{tracing.header}={{{tracing.secret}}}"
        yield Secret(HEADERS, gateway.host, "the header for the receiver of traces", template=template)
    yield TraceReceiver(tracing.url, HEADERS if tracing.secret else "", is_outside=True)


def contribute(_site: Site, _published: Contributions) -> Iterator[Contribution]:
    """Nothing besides: it runs elsewhere."""
    return iter(())
