"""node-exporter: figures of every machine (CPU, memory, disk, network)."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.contributions import (
    Contribution,
    Contributions,
    Dashboard,
    Endpoint,
    File,
    Health,
    Port,
    Rules,
    ScrapeTarget,
    Service,
)
from corral.plan.networks import FIGURES
from corral.plan.site import Site

STAGE = Stage.BALANCER
COMPONENT = "node-exporter"
IMAGE = "prom/node-exporter:v1.11.1"
WHOLE_HOST = "it reads the figures of the whole machine, not of its own container; read-only, and as nobody"
# With the machine's own /proc there is no need to join its processes (`pid: host`).
PATHS = ("--path.rootfs=/host", "--path.procfs=/host/proc", "--path.sysfs=/host/sys")
# Folder of the host whose files it tells, too: those of `./generate.py figures`, and of other programs.
TEXTFILES = "textfile"
README = f"{TEXTFILES}/README"
OPEN = "machine figures without secrets, on the farm's own network"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """An exporter and a scrape target for every host."""
    monitoring = site.inventory.monitoring
    if monitoring is None or not monitoring.node_exporter:
        return
    yield Rules("monitoring/rules/node.yml")
    yield Dashboard("monitoring/dashboards/host.json")
    yield Rules("monitoring/rules/corral.yml")
    for host in site.inventory.hosts:
        if not site.is_local(host):
            yield File(host, "node_exporter", README, template=f"node_exporter/{README}.j2")
        yield _service(site, host, monitoring.node_exporter_port)
        yield ScrapeTarget(
            "node", Endpoint(monitoring.node_exporter_port, host, COMPONENT), {"host": host, "role": "host"}
        )


def _service(site: Site, host: str, port: int) -> Service:
    is_local = site.is_local(host)
    address = f"127.0.0.1:{port}" if is_local else f":{port}"
    return Service(
        host=host,
        component="node_exporter",
        name=COMPONENT,
        role="exporter",
        image=site.image(COMPONENT, IMAGE),
        program="prometheus-node-exporter",
        args=(
            f"--web.listen-address={address}",
            *(() if is_local else (*PATHS, f"--collector.textfile.directory=/{TEXTFILES}")),
        ),
        health=Health.by_wget(port, "/"),
        memory_mib=96,
        ports=(Port(port, site.publish_address(host), OPEN),),
        mounts=(("/", "/host"), *(() if is_local else ((f"./node_exporter/{TEXTFILES}", f"/{TEXTFILES}"),))),
        network=FIGURES,
        user="65534:65534",
        cpu_weight=256,
        exceptions={"host-mount": WHOLE_HOST},
    )
