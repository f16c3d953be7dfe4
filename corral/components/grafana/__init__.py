"""Grafana: dashboards, with the site's Prometheus behind them. Compose hosts only.

Everything that it shows comes from files; its volume holds what people make themselves (accounts, own pages).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from corral.components import Stage
from corral.components.declared import filled, secrets, service
from corral.config.inventory import Monitoring
from corral.contributions import Contribution, Contributions, DataSource, Endpoint, File, ScrapeTarget, State
from corral.declarations import declaration
from corral.plan.site import Site, bracketed

STAGE = Stage.DASHBOARDS
COMPONENT = "grafana"
SOURCES_FILE = "datasources/corral.yaml"
PROVIDERS_FILE = "dashboards/corral.yaml"
METRICS_PASSWORD = "GRAFANA_METRICS_PASSWORD"  # noqa: S105 - the secret's name


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """Grafana with the pages of what is in the site, where the monitoring is."""
    monitoring = _monitoring(site)
    if monitoring is None:
        return
    host = monitoring.host
    yield from secrets(COMPONENT, host)
    yield File(host, COMPONENT, SOURCES_FILE, data=sources(site, monitoring, published.sources))
    yield File(host, COMPONENT, PROVIDERS_FILE, data=providers(site))
    pages = page_assets(published)
    yield from (File(host, COMPONENT, f"pages/{name}", asset=asset) for name, asset in pages.items())
    yield service(
        site,
        host,
        COMPONENT,
        port=monitoring.grafana_port,
        own=bracketed(site.host(host).address),
        pages=tuple((f"pages/{name}", "") for name in pages),
        calls=tuple(source.endpoint for source in published.sources),
    )
    yield State(host, COMPONENT, "grafana", "accounts and pages that people made", "dashboards", "/var/lib/grafana")


def page_assets(published: Contributions) -> dict[str, str]:
    """The site's pages by file name, in the order of names: the asset of each."""
    return dict(sorted((PurePosixPath(page.asset).name, page.asset) for page in published.dashboards))


def announce(site: Site) -> Iterator[Contribution]:
    """Its own metrics, for the Prometheus whose dashboards it shows."""
    monitoring = _monitoring(site)
    if monitoring is not None:
        endpoint = Endpoint(monitoring.grafana_port, monitoring.host, COMPONENT)
        labels = {"host": monitoring.host, "role": "monitoring"}
        yield ScrapeTarget(COMPONENT, endpoint, labels, secret=METRICS_PASSWORD, user="prometheus")


def url_of(site: Site) -> str:
    """Where browsers in the farm's network find it; empty without one."""
    monitoring = _monitoring(site)
    return f"http://{bracketed(site.host(monitoring.host).address)}:{monitoring.grafana_port}/" if monitoring else ""


def _monitoring(site: Site) -> Monitoring | None:
    """The monitoring, if it wants a Grafana and has a host that can run one."""
    monitoring = site.inventory.monitoring
    is_wanted = monitoring is not None and monitoring.grafana and not site.is_local(monitoring.host)
    return monitoring if is_wanted else None


def sources(site: Site, monitoring: Monitoring, found: list[DataSource]) -> dict[str, Any]:
    """Grafana's data sources; each is called as the pages call it, and the first is theirs unless another is chosen."""
    interval = f"{monitoring.scrape_interval_s}s"
    urls = {source.name: f"http://{site.address(source.endpoint, monitoring.host)}" for source in found}
    return {
        "apiVersion": 1,
        "datasources": [
            filled(
                declaration(COMPONENT)["source"],
                {"name": name, "url": url, "is_first": number == 0, "interval": interval},
            )
            for number, (name, url) in enumerate(urls.items())
        ],
    }


def providers(site: Site) -> dict[str, Any]:
    """Where Grafana finds its pages."""
    provider = filled(declaration(COMPONENT)["provider"], {"site": site.inventory.name})
    return {"apiVersion": 1, "providers": [provider]}
