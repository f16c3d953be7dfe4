"""`figures`: what no exporter tells, for node-exporter: rendering, drift, containers, weights, backups, certificates.

Its own programs tell Prometheus about themselves; this says how they agree with the inventory. Who asks the engine is
this command, so no container needs its socket (docs/decisions/0017-figures.md). The label `host` is Prometheus' own.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.console import Console

from corral import __version__
from corral.build import Plan
from corral.config.source import plain_yaml
from corral.errors import CorralError, UsageError
from corral.render.output import MANIFEST, compare
from corral.render.templates import Tree
from corral.render.tree import render
from corral.runtime.docker import MIB
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.observe import Snapshot, observe_all
from corral.verbs.models.local_files import LocalFolder
from corral.verbs.models.models import Store, rows
from corral.verbs.status.certificates import certificate_script, understood_ends
from corral.verbs.up.history import files_on_disk, last_backups, rendering_hash
from corral.verbs.up.up import as_started

# Below a host's folder; node-exporter has it as /textfile.
FOLDER = "node_exporter/textfile"
FILE = "corral.prom"
WRONG = ("missing", "wrong size", "damaged")
# The collector reads names that end in .prom only, so never half a file.
WRITE = """
cd "$1" || exit 1
umask 022
trap 'rm -f ".corral.$$"' EXIT
cat >".corral.$$" && mv -f ".corral.$$" "$2"
"""


METRICS: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
KINDS = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "info": InfoMetricFamily}
# Values by the name of the metric, then by those of its labels.
Figures = dict[str, dict[tuple[str, ...], Any]]


@dataclass(frozen=True, eq=False)
class _Families(Collector):
    found: Figures

    def collect(self) -> Iterator[Metric]:
        for name, row in METRICS.items():
            family = KINDS[row.get("kind", "gauge")](name, row["says"], labels=row.get("labels", ()))
            for labels, value in self.found.get(name, {}).items():
                family.add_metric(labels, value)
            if "labels" in row or family.samples:
                yield family


def text(found: Figures) -> bytes:
    """A host's figures in Prometheus' text form."""
    registry = CollectorRegistry()
    registry.register(_Families(found))
    return generate_latest(registry)


# --- finding out -----------------------------------------------------------------------------------------------------


def figures_hosts(plan: Plan, out: Path, hosts: Iterable[str] | None = None) -> list[ComposeHost]:
    """The hosts with figures: Docker runs there, and node-exporter; raises UsageError when nothing would read them."""
    monitoring = plan.inventory.monitoring
    if monitoring is None or not monitoring.node_exporter:
        raise UsageError("node-exporter reads the figures, and this site has none; see monitoring.node_exporter")
    return compose_hosts(plan, out, hosts)


def write_figures(
    plan: Plan, hosts: Sequence[ComposeHost], *, is_scheduled: bool = False, err: Console | None = None
) -> None:
    """Writes the file of every host, there; raises CorralError with all hosts that failed after the others are done."""
    tree = render(plan)
    problems: list[str] = []
    for host, seen in zip(hosts, observe_all(hosts, sections), strict=True):
        try:
            found = figures_of(host, seen, tree, is_scheduled=is_scheduled)
            _put(host, text(found))
        except CorralError as error:
            problems.append(str(error))
            continue
        if err:
            kinds = ", ".join(kind for (kind,), is_so in found["corral_drift"].items() if is_so)
            words = f"drift: {kinds}" if kinds else "no drift"
            services = len(found["corral_container_healthy"])
            err.print(f"{host.name}: {services} services, {words}; {host.folder}/{FOLDER}/{FILE}")
    if problems:
        raise CorralError("\n".join(problems))


def sections(host: ComposeHost) -> str:
    """A shell script for what `figures_of` reads besides the containers."""
    manifest = f"section manifest\ncat {shlex.quote(f'{host.folder}/{MANIFEST}')} 2>/dev/null"
    return f"{manifest}\n{certificate_script(host)}"


def figures_of(host: ComposeHost, seen: Snapshot, tree: Tree, *, is_scheduled: bool = False) -> Figures:
    """What is to be told of a host, seen with `sections`; raises CorralError when its Docker does not answer."""
    if seen.problem:
        raise CorralError(f"{host.name}: {seen.problem}")
    backup = last_backups(host.out).get(host.name)
    facts = {
        "hash": rendering_hash(files_on_disk(host.out, host.name)),
        "inventory": hashlib.sha256(Path(host.plan.source_file).read_bytes()).hexdigest()[:16],
        "version": __version__,
    }
    ends = understood_ends(seen.said.get("certificates", ""))
    return {
        "corral_figures_timestamp_seconds": {(): time.time()},
        "corral_figures_scheduled": {(): is_scheduled},
        "corral_rendering": {(): facts},
        **_of_containers(host, seen, tree),
        **_of_weights(host),
        "corral_certificate_expires_timestamp_seconds": {
            (file,): end.timestamp() if end else 0 for file, end in ends.items()
        },
        "corral_backup_last_success_timestamp_seconds": {} if backup is None else {(): backup},
    }


def _of_containers(host: ComposeHost, seen: Snapshot, tree: Tree) -> Figures:
    """The services that are to run on a host, and what differs from the rendering."""
    own = [item for item in seen.containers if item.project == host.project]
    services = as_started(host, own).services
    found = {(item.name, item.container_name): seen.container_of(item.name, host.project) for item in services}
    there = {key: item for key, item in found.items() if item is not None}
    drift = {
        "rendering": any(change.action != "identical" for change in compare(tree, host.out, {host.name})),
        "containers": any(item is None or seen.is_older(item) for item in found.values()),
    }
    if host.ssh:
        drift["copy"] = seen.said.get("manifest", "") != (host.rendered / MANIFEST).read_text(encoding="utf-8").strip()
    used = {key: item.memory_mib for key, item in there.items()}
    limits = {key: item.limit_mib or item.wanted_mib or None for key, item in there.items()}
    return {
        "corral_drift": {(kind,): is_so for kind, is_so in drift.items()},
        "corral_container_healthy": {key: item is not None and item.is_well for key, item in found.items()},
        "corral_container_restarts": {key: item.restarts for key, item in there.items()},
        "corral_container_memory_bytes": {key: mib * MIB for key, mib in used.items() if mib is not None},
        "corral_container_memory_limit_bytes": {key: mib * MIB for key, mib in limits.items() if mib is not None},
    }


def _of_weights(host: ComposeHost) -> Figures:
    store = Store(host.plan.site, Path(host.plan.source_file), host.out, Console(quiet=True))
    here = [row for row in rows(store, hosts={host.name}) if row.host == host.name]
    known = [row for row in here if row.state in ("verified", *WRONG)]
    read = [] if host.ssh else [(row, LocalFolder(Path(row.folder)).last_read(row.file)) for row in here]
    return {
        "corral_weights_verified": {(row.model, row.file): row.state == "verified" for row in known},
        "corral_weights_checked_timestamp_seconds": {
            (row.model, row.file): last[1] for row, last in read if last and last[1] is not None
        },
    }


def _put(host: ComposeHost, data: bytes) -> None:
    folder = f"{host.folder}/{FOLDER}"
    done = host.run(["sh", "-c", WRITE, "-", folder, FILE], given=data, check=False)
    if done.code != 0:
        remedy = f"./generate.py up --host {host.name} makes the folder; it must belong to who runs this"
        raise CorralError(f"{host.name}: {folder}/{FILE} cannot be written: {done.words}; {remedy}")
