"""`figures`: what no exporter tells, for node-exporter: rendering, drift, containers, weights, backups, certificates.

Its own programs tell Prometheus about themselves; this says how they agree with the inventory. Who asks the engine is
this command, so no container needs its socket (docs/decisions/0017-figures.md). The label `host` is Prometheus' own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.console import Console

from corral import __version__
from corral.build import Plan
from corral.errors import CorralError, UsageError
from corral.render.output import MANIFEST, compare
from corral.render.tree import Tree, render
from corral.runtime.docker import MIB, Container
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.observe import Snapshot, observe_all
from corral.verbs.models.local_files import LocalFolder
from corral.verbs.models.models import Row, open_store, rows
from corral.verbs.status.certificates import certificate_lines, understood_ends
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


@dataclass(frozen=True, slots=True)
class ServiceFigures:
    """One service of the plan, with its container if there is one."""

    service: str
    container: str
    seen: Container | None
    # Whether it was made from another rendering than the one that lies there.
    is_old: bool = False


@dataclass(frozen=True, slots=True)
class WeightFigures:
    """One file of weights in the host's folder."""

    model: str
    file: str
    # None: not read since it last changed.
    is_right: bool | None
    checked: float | None = None


@dataclass(frozen=True, slots=True)
class HostFigures:
    """Everything that is told of a host."""

    when: float
    is_scheduled: bool
    rendering: str
    inventory: str
    drift: dict[str, bool]
    services: tuple[ServiceFigures, ...]
    weights: tuple[WeightFigures, ...] = ()
    # When each ends; None when it cannot be read.
    certificates: Mapping[str, datetime | None] = field(default_factory=dict)
    backup: float | None = None


# --- as text ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Figures(Collector):
    found: HostFigures

    def collect(self) -> Iterable[Metric]:
        yield from _families(self.found)


def text(found: HostFigures) -> bytes:
    """A host's figures in Prometheus' text form."""
    registry = CollectorRegistry()
    registry.register(_Figures(found))
    return generate_latest(registry)


def _families(found: HostFigures) -> Iterator[Metric]:
    yield GaugeMetricFamily("corral_figures_timestamp_seconds", "When these figures were written.", found.when)
    yield GaugeMetricFamily(
        "corral_figures_scheduled", "1: by the timer; 0: by a command, which may not run again.", found.is_scheduled
    )
    facts = {"hash": found.rendering, "inventory": found.inventory, "version": __version__}
    yield InfoMetricFamily("corral_rendering", "Hash of the host's rendering and of the inventory.", facts)
    drift = GaugeMetricFamily(
        "corral_drift",
        "1: the rendering differs from the inventory, the copy on a far host or the containers from the rendering.",
        labels=["kind"],
    )
    for kind, is_so in found.drift.items():
        drift.add_metric([kind], is_so)
    yield drift
    yield from _of_containers(found.services)
    yield from _of_weights(found.weights)
    yield _of_certificates(found.certificates)
    if found.backup is not None:
        yield GaugeMetricFamily(
            "corral_backup_last_success_timestamp_seconds", "When the last backup was complete.", found.backup
        )


def _of_containers(services: Sequence[ServiceFigures]) -> Iterator[Metric]:
    names = ["service", "container"]
    healthy = GaugeMetricFamily(
        "corral_container_healthy", "1: runs, and its health check passes; 0: it does not, or is missing.", labels=names
    )
    restarts = CounterMetricFamily("corral_container_restarts", "Restarts by the engine.", labels=names)
    used = GaugeMetricFamily("corral_container_memory_bytes", "Memory in use, without cache.", labels=names)
    limit = GaugeMetricFamily("corral_container_memory_limit_bytes", "Memory that it may use.", labels=names)
    for item in services:
        labels, seen = [item.service, item.container], item.seen
        healthy.add_metric(labels, seen is not None and seen.is_well)
        if seen is None:
            continue
        restarts.add_metric(labels, seen.restarts)
        if seen.memory_mib is not None:
            used.add_metric(labels, seen.memory_mib * MIB)
        if seen.limit_mib or seen.wanted_mib:
            limit.add_metric(labels, (seen.limit_mib or seen.wanted_mib) * MIB)
    yield from (healthy, restarts, used, limit)


def _of_weights(weights: Sequence[WeightFigures]) -> Iterator[Metric]:
    names = ["model", "file"]
    verified = GaugeMetricFamily(
        "corral_weights_verified",
        "1: read and as pinned; 0: missing, cut off or damaged; absent: not read since it changed.",
        labels=names,
    )
    checked = GaugeMetricFamily("corral_weights_checked_timestamp_seconds", "When a file was last read.", labels=names)
    for item in weights:
        if item.is_right is not None:
            verified.add_metric([item.model, item.file], item.is_right)
        if item.checked is not None:
            checked.add_metric([item.model, item.file], item.checked)
    yield from (verified, checked)


def _of_certificates(ends: Mapping[str, datetime | None]) -> Metric:
    expires = GaugeMetricFamily(
        "corral_certificate_expires_timestamp_seconds",
        "When a certificate ends; 0: the file cannot be read as one.",
        labels=["file"],
    )
    for file, end in ends.items():
        expires.add_metric([file], end.timestamp() if end else 0)
    return expires


# --- finding out -----------------------------------------------------------------------------------------------------


def figures_hosts(plan: Plan, out: Path, hosts: Iterable[str] | None = None) -> list[ComposeHost]:
    """The hosts with figures: Docker runs there, and node-exporter; raises UsageError when nothing would read them."""
    monitoring = plan.inventory.monitoring
    if monitoring is None or not monitoring.node_exporter:
        raise UsageError("node-exporter reads the figures, and this site has none; see monitoring.node_exporter")
    return compose_hosts(plan, out, hosts)


def write_figures(
    plan: Plan, hosts: Sequence[ComposeHost], *, is_scheduled: bool = False, talk: Console | None = None
) -> None:
    """Writes the file of every host, there; raises CorralError with all hosts that failed after the others are done."""
    tree = render(plan)
    problems: list[str] = []
    for host, seen in zip(hosts, observe_all(hosts), strict=True):
        try:
            found = look(host, seen, tree, is_scheduled=is_scheduled)
            _put(host, text(found))
        except CorralError as error:
            problems.append(str(error))
            continue
        if talk:
            kinds = ", ".join(kind for kind, is_so in found.drift.items() if is_so)
            words = f"drift: {kinds}" if kinds else "no drift"
            talk.print(f"{host.name}: {len(found.services)} services, {words}; {host.folder}/{FOLDER}/{FILE}")
    if problems:
        raise CorralError("\n".join(problems))


def look(host: ComposeHost, seen: Snapshot, tree: Tree, *, is_scheduled: bool = False) -> HostFigures:
    """What is to be told of a host, now; raises CorralError when its engine does not answer."""
    if seen.problem:
        raise CorralError(f"{host.name}: {seen.problem}")
    plan, out = host.plan, host.out
    source = Path(plan.source_file)
    services = tuple(_services(host, seen))
    drift = {
        "rendering": any(change.action != "identical" for change in compare(tree, out, {host.name})),
        "containers": any(item.seen is None or item.is_old for item in services),
    }
    if host.ssh:
        drift["copy"] = _copied(host) != (host.rendered / MANIFEST).read_text(encoding="utf-8")
    return HostFigures(
        when=time.time(),
        is_scheduled=is_scheduled,
        rendering=rendering_hash(files_on_disk(out, host.name)),
        inventory=hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        drift=drift,
        services=services,
        weights=tuple(_weights(host)),
        certificates=_certificates(host),
        backup=last_backups(out).get(host.name),
    )


def _services(host: ComposeHost, seen: Snapshot) -> Iterator[ServiceFigures]:
    own = (item for item in seen.containers if item.project == host.project)
    for service in as_started(host, own).services:
        container = seen.container_of(service.name, host.project)
        is_old = container is not None and seen.is_older(container)
        yield ServiceFigures(service.name, service.container_name, container, is_old)


def _copied(host: ComposeHost) -> str:
    """What a far host's folder holds; nothing when there is none."""
    return host.run(["sh", "-c", 'cat "$1" 2>/dev/null || true', "-", f"{host.folder}/{MANIFEST}"]).out


def _weights(host: ComposeHost) -> Iterator[WeightFigures]:
    store = open_store(host.plan.site, Path(host.plan.source_file), host.out, Console(quiet=True))
    for row in rows(store, hosts={host.name}):
        if row.host == host.name:
            last = None if host.ssh else LocalFolder(Path(row.folder)).last_read(row.file)
            yield WeightFigures(row.model, row.file, _is_right(row), last[1] if last else None)


def _certificates(host: ComposeHost) -> dict[str, datetime | None]:
    lines = certificate_lines(host)
    return understood_ends(host.run(["sh", "-c", "\n".join(lines)], check=False).out) if lines else {}


def _is_right(row: Row) -> bool | None:
    return True if row.state == "verified" else False if row.state in WRONG else None


def _put(host: ComposeHost, data: bytes) -> None:
    folder = f"{host.folder}/{FOLDER}"
    done = host.run(["sh", "-c", WRITE, "-", folder, FILE], given=data, check=False)
    if done.code != 0:
        remedy = f"./generate.py up --host {host.name} makes the folder; it must belong to who runs this"
        raise CorralError(f"{host.name}: {folder}/{FILE} cannot be written: {done.words}; {remedy}")
