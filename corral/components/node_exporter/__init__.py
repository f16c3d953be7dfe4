"""node-exporter: metrics of every machine (CPU, memory, disk, network)."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Dashboard, Endpoint, File, Rules, ScrapeTarget
from corral.plan.site import Site

STAGE = Stage.BALANCER
COMPONENT = "node-exporter"
# Folder of the host whose files it exports, too: those of `./generate.py figures`, and of other programs.
TEXTFILES = "textfile"
README = f"{TEXTFILES}/README"
# With the machine's own /proc there is no need to join its processes (`pid: host`).
PATHS = (
    "--path.rootfs=/host",
    "--path.procfs=/host/proc",
    "--path.sysfs=/host/sys",
    f"--collector.textfile.directory=/{TEXTFILES}",
)
MOUNTS = ((f"./node_exporter/{TEXTFILES}", f"/{TEXTFILES}"),)


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """An exporter and a scrape target for every host."""
    monitoring = site.inventory.monitoring
    if monitoring is None or not monitoring.node_exporter:
        return
    port = monitoring.node_exporter_port
    yield from (Rules(f"monitoring/rules/{name}.yml") for name in ("node", "corral"))
    yield Dashboard("monitoring/dashboards/host.json")
    for host in site.inventory.hosts:
        paths, mounts = ((), ()) if site.is_local(host) else (PATHS, MOUNTS)
        if not site.is_local(host):
            yield File(host, "node_exporter", README, template=f"node_exporter/{README}.j2")
        yield service(site, host, "node_exporter", COMPONENT, port=port, paths=paths, mounts=mounts)
        yield ScrapeTarget("node", Endpoint(port, host, COMPONENT), {"host": host, "role": "host"})
