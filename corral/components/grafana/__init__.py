"""Grafana: pages of figures for people, with the site's Prometheus behind them. Compose hosts only.

Everything that it shows comes from files; its volume holds what people make themselves (accounts, own pages).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from corral.components import Stage, prometheus
from corral.config.inventory import Monitoring
from corral.contributions import (
    ConfigMount,
    Contribution,
    Contributions,
    DataSource,
    Endpoint,
    File,
    Health,
    Port,
    ScrapeTarget,
    Secret,
    Service,
    State,
)
from corral.plan.site import Site, bracketed

STAGE = Stage.DASHBOARDS
COMPONENT = "grafana"
# The last line with Prometheus' data source in the program itself; since 13.2 it is a plugin beside it.
IMAGE = "grafana/grafana:13.1.3"
DATA = "/var/lib/grafana"
VOLUME = "dashboards"
PAGES = "/etc/corral/dashboards"
PROVISIONING = "/etc/grafana/provisioning"
SOURCES_FILE = "datasources/corral.yaml"
PROVIDERS_FILE = "dashboards/corral.yaml"
HOME = "farm.json"
PASSWORD = "GRAFANA_ADMIN_PASSWORD"  # noqa: S105 - the secret's name
SECRET_KEY = "GRAFANA_SECRET_KEY"  # noqa: S105 - the secret's name
METRICS_PASSWORD = "GRAFANA_METRICS_PASSWORD"  # noqa: S105 - the secret's name
READER = "prometheus"
SECRETS = {
    PASSWORD: "password of Grafana's user `admin`, taken when Grafana first starts",
    SECRET_KEY: "encrypts passwords of data sources that people add in Grafana; never change it",
    METRICS_PASSWORD: "opens Grafana's own figures, for Prometheus",
}
OWN_PASSWORD = "Grafana's own password, for its figures too"  # noqa: S105 - a reason
# It calls nobody outside, lets nobody in without a password, and leaves alerts to Prometheus and Alertmanager.
#
# Plugins are those of the image: its installer takes a running one away before it finds that it may not write.
SETTINGS = {
    "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
    "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    "GF_ANALYTICS_FEEDBACK_LINKS_ENABLED": "false",
    "GF_ANALYTICS_REPORTING_ENABLED": "false",
    "GF_AUTH_ANONYMOUS_ENABLED": "false",
    "GF_NEWS_NEWS_FEED_ENABLED": "false",
    "GF_PLUGINS_PLUGIN_ADMIN_ENABLED": "false",
    "GF_PLUGINS_PREINSTALL_DISABLED": "true",
    "GF_PLUGINS_PUBLIC_KEY_RETRIEVAL_DISABLED": "true",
    "GF_SECURITY_DISABLE_GRAVATAR": "true",
    "GF_SNAPSHOTS_EXTERNAL_ENABLED": "false",
    "GF_UNIFIED_ALERTING_ENABLED": "false",
    "GF_USERS_ALLOW_ORG_CREATE": "false",
    "GF_USERS_ALLOW_SIGN_UP": "false",
}


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """Grafana with the pages of what is in the site, where the monitoring is."""
    monitoring = _monitoring(site)
    if monitoring is None:
        return
    host = monitoring.host
    yield from (Secret(name, host, purpose) for name, purpose in SECRETS.items())
    yield File(host, COMPONENT, SOURCES_FILE, data=sources(site, monitoring, published.sources))
    yield File(host, COMPONENT, PROVIDERS_FILE, data=providers(site))
    pages = page_assets(published)
    yield from (File(host, COMPONENT, f"pages/{name}", asset=asset) for name, asset in pages.items())
    yield _service(site, monitoring, list(pages), published.sources)
    yield State(host, COMPONENT, "grafana", "accounts and pages that people made", VOLUME, DATA)


def page_assets(published: Contributions) -> dict[str, str]:
    """The site's pages by file name, in the order of names: the asset of each."""
    return dict(sorted((PurePosixPath(page.asset).name, page.asset) for page in published.dashboards))


def announce(site: Site) -> Iterator[Contribution]:
    """Its own figures, for the Prometheus that it shows itself."""
    monitoring = _monitoring(site)
    if monitoring is not None:
        endpoint = Endpoint(monitoring.grafana_port, monitoring.host, COMPONENT)
        labels = {"host": monitoring.host, "role": "monitoring"}
        yield ScrapeTarget(COMPONENT, endpoint, labels, secret=METRICS_PASSWORD, user=READER)


def _monitoring(site: Site) -> Monitoring | None:
    """The monitoring, if it wants a Grafana and has a host that can run one."""
    monitoring = site.inventory.monitoring
    is_wanted = monitoring is not None and monitoring.grafana and not site.is_local(monitoring.host)
    return monitoring if is_wanted else None


def sources(site: Site, monitoring: Monitoring, found: list[DataSource]) -> dict[str, Any]:
    """Grafana's data sources; each is called as the pages call it, and the first is theirs unless somebody chooses."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": source.name,
                "uid": source.name,
                "type": "prometheus",
                "access": "proxy",
                "orgId": 1,
                "url": f"http://{site.address(source.endpoint, monitoring.host)}",
                "isDefault": number == 0,
                "editable": False,
                "jsonData": {
                    "httpMethod": "POST",
                    "prometheusType": "Prometheus",
                    "timeInterval": f"{monitoring.scrape_interval_s}s",
                    "manageAlerts": False,
                },
            }
            for number, source in enumerate(found)
        ],
    }


def providers(site: Site) -> dict[str, Any]:
    """Where Grafana finds its pages: all in one folder, which is called like the site."""
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "corral",
                "orgId": 1,
                "folder": site.inventory.name,
                "folderUid": "corral",
                "type": "file",
                "disableDeletion": False,
                "allowUiUpdates": False,
                "options": {"path": PAGES},
            }
        ],
    }


def _service(site: Site, monitoring: Monitoring, pages: list[str], sources: list[DataSource]) -> Service:
    host, port = monitoring.host, monitoring.grafana_port
    address = site.host(host).address
    files = {
        "GF_SECURITY_ADMIN_PASSWORD": PASSWORD,
        "GF_SECURITY_SECRET_KEY": SECRET_KEY,
        "GF_METRICS_BASIC_AUTH_PASSWORD": METRICS_PASSWORD,
    }
    return Service(
        host=host,
        component=COMPONENT,
        name=COMPONENT,
        role="monitoring",
        image=site.image(COMPONENT, IMAGE),
        program="grafana-server",
        health=Health.by_wget(port, "/api/health", 300),
        memory_mib=512,
        environment={
            **SETTINGS,
            **{f"{name}__FILE": site.secret_path(host, secret) for name, secret in files.items()},
            "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": f"{PAGES}/{HOME}",
            "GF_METRICS_BASIC_AUTH_USERNAME": READER,
            "GF_SERVER_HTTP_PORT": str(port),
            "GF_SERVER_ROOT_URL": f"http://{bracketed(address)}:{port}/",
        },
        secrets=tuple(sorted(SECRETS)),
        ports=(Port(port, address, OWN_PASSWORD),),
        volumes=((VOLUME, DATA),),
        mounts=((f"./{COMPONENT}/pages", PAGES),),
        configs=(
            *(ConfigMount(name, f"{PROVISIONING}/{name}") for name in (SOURCES_FILE, PROVIDERS_FILE)),
            *(ConfigMount(f"pages/{name}", "") for name in pages),
        ),
        network=prometheus.NETWORK,
        calls=tuple(source.endpoint for source in sources),
        user="472:472",
        cpu_weight=256,
    )
