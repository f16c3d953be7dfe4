"""Valkey: counters and cached keys that several gateway processes share, and what cloud budgets have spent."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Endpoint, File, Secret, Store
from corral.plan.site import Site

STAGE = Stage.BALANCER
COMPONENT = "valkey"
PASSWORD = "VALKEY_PASSWORD"  # noqa: S105 - the secret's name
MONITOR_PASSWORD = "VALKEY_EXPORTER_PASSWORD"  # noqa: S105 - the secret's name
USERS = "VALKEY_USERS"
ROLE, MONITOR = "litellm", "exporter"
# LiteLLM's: it counts with scripts, which ask for the time, and sends messages. Its keys have no common beginning.
RIGHTS = "~* &* +@all -@admin -@dangerous -function -script +script|load +script|exists +info"
# The exporter's: statistics, and no key at all.
MONITOR_RIGHTS = "+@connection -@admin -@dangerous +info +slowlog|len +slowlog|get +latency|latest +latency|histogram"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """The store, its password, and the users file in which the program reads it."""
    gateway = site.inventory.gateway
    if not gateway.cache:
        return
    endpoint = Endpoint(gateway.cache_port, gateway.host, COMPONENT)
    yield Secret(PASSWORD, gateway.host, "password of the gateway's shared counters")
    users = f"user default off\nuser {ROLE} on #{{{PASSWORD}:sha256}} {RIGHTS}\n"
    monitor_password = MONITOR_PASSWORD if site.has_store_exporters else ""
    if monitor_password:
        yield Secret(monitor_password, gateway.host, "password of Valkey's exporter")
        users += f"user {MONITOR} on #{{{monitor_password}:sha256}} {MONITOR_RIGHTS}\n"
    yield Secret(USERS, gateway.host, "Valkey's users file", template=users)
    yield Store("cache", endpoint, PASSWORD, ROLE, monitor=MONITOR, monitor_password=monitor_password)
    start = ("sh", site.config_path(gateway.host, COMPONENT, "start.sh", ""))
    yield service(
        site,
        gateway.host,
        COMPONENT,
        port=gateway.cache_port,
        start=start if site.is_local(gateway.host) else ("valkey-server",),
    )
    if site.is_local(gateway.host):
        yield File(gateway.host, COMPONENT, "start.sh", asset="litellm/valkey-local.sh")
