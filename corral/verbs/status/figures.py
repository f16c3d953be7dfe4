"""`figures`: what no exporter tells, for node-exporter: rendering, drift, containers, weights, backups, certificates.

Its own programs tell Prometheus about themselves; this says how they agree with the inventory. Who asks the engine is
this command, so no container needs its socket (docs/decisions/0017-figures.md). The label `host` is Prometheus' own.
"""

from __future__ import annotations

import hashlib
import shlex
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
from corral.verbs.models.models import Row, checked_at, open_shelf, rows
from corral.verbs.status.certificates import certificate_section, understood_ends
from corral.verbs.up.history import files_on_disk, last_backups, rendering_hash
from corral.verbs.up.up import as_started

# Below a host's folder; node-exporter has it as /textfile.
FOLDER = "node_exporter/textfile"
FILE = "corral.prom"
# Values of a metric by those of its labels.
Values = Mapping[tuple[str, ...], float]
WRONG = ("missing", "wrong size", "damaged")
# The collector reads names that end in .prom only, so never half a file.
WRITE = """
cd "$1" || exit 1
umask 022
trap 'rm -f ".corral.$$"' EXIT
cat >".corral.$$" && mv -f ".corral.$$" "$2"
"""


@dataclass(frozen=True, slots=True)
class HostFigures:
    """Everything that is told of a host."""

    when: float
    is_scheduled: bool
    rendering: str
    inventory: str
    # Whether it differs, by what differs.
    drift: Mapping[str, bool]
    # By service and name of the container; None where there is none.
    containers: Mapping[tuple[str, ...], Container | None]
    # By model and file of its weights: whether they are right, and when they were last read.
    verified: Values = field(default_factory=dict)
    checked: Values = field(default_factory=dict)
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
    yield _gauge(
        "corral_drift",
        "1: the rendering differs from the inventory, the copy on a far host or the containers from the rendering.",
        ["kind"],
        {(kind,): is_so for kind, is_so in found.drift.items()},
    )
    yield from _of_containers(found.containers)
    yield _gauge(
        "corral_weights_verified",
        "1: read and as pinned; 0: missing, cut off or damaged; absent: not read since it changed.",
        ["model", "file"],
        found.verified,
    )
    yield _gauge(
        "corral_weights_checked_timestamp_seconds", "When a file was last read.", ["model", "file"], found.checked
    )
    yield _gauge(
        "corral_certificate_expires_timestamp_seconds",
        "When a certificate ends; 0: the file cannot be read as one.",
        ["file"],
        {(file,): end.timestamp() if end else 0 for file, end in found.certificates.items()},
    )
    if found.backup is not None:
        yield GaugeMetricFamily(
            "corral_backup_last_success_timestamp_seconds", "When the last backup was complete.", found.backup
        )


def _of_containers(containers: Mapping[tuple[str, ...], Container | None]) -> Iterator[Metric]:
    names = ["service", "container"]
    there = {key: item for key, item in containers.items() if item is not None}
    used = {key: item.memory_mib * MIB for key, item in there.items() if item.memory_mib is not None}
    limits = {key: (item.limit_mib or item.wanted_mib) * MIB for key, item in there.items()}
    yield _gauge(
        "corral_container_healthy",
        "1: runs, and its health check passes; 0: it does not, or is missing.",
        names,
        {key: item is not None and item.is_well for key, item in containers.items()},
    )
    restarts = CounterMetricFamily("corral_container_restarts", "Restarts by the engine.", labels=names)
    for key, item in there.items():
        restarts.add_metric(key, item.restarts)
    yield restarts
    yield _gauge("corral_container_memory_bytes", "Memory in use, without cache.", names, used)
    limits = {key: most for key, most in limits.items() if most}
    yield _gauge("corral_container_memory_limit_bytes", "Memory that it may use.", names, limits)


def _gauge(name: str, words: str, labels: Sequence[str], values: Values) -> Metric:
    """A metric with a value for every tuple of the labels' values."""
    family = GaugeMetricFamily(name, words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


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
    for host, seen in zip(hosts, observe_all(hosts, sections), strict=True):
        try:
            found = look(host, seen, tree, is_scheduled=is_scheduled)
            _put(host, text(found))
        except CorralError as error:
            problems.append(str(error))
            continue
        if talk:
            kinds = ", ".join(kind for kind, is_so in found.drift.items() if is_so)
            words = f"drift: {kinds}" if kinds else "no drift"
            talk.print(f"{host.name}: {len(found.containers)} services, {words}; {host.folder}/{FOLDER}/{FILE}")
    if problems:
        raise CorralError("\n".join(problems))


def sections(host: ComposeHost) -> dict[str, list[str]]:
    """What `look` asks a host besides its containers."""
    return {
        "manifest": [f"cat {shlex.quote(f'{host.folder}/{MANIFEST}')} 2>/dev/null"],
        **certificate_section(host),
    }


def look(host: ComposeHost, seen: Snapshot, tree: Tree, *, is_scheduled: bool = False) -> HostFigures:
    """What is to be told of a host, seen with `sections`; raises CorralError when its Docker does not answer."""
    if seen.problem:
        raise CorralError(f"{host.name}: {seen.problem}")
    own = [item for item in seen.containers if item.project == host.project]
    services = as_started(host, own).services
    containers: dict[tuple[str, ...], Container | None] = {
        (item.name, item.container_name): seen.container_of(item.name, host.project) for item in services
    }
    drift = {
        "rendering": any(change.action != "identical" for change in compare(tree, host.out, {host.name})),
        "containers": any(item is None or seen.is_older(item) for item in containers.values()),
    }
    if host.ssh:
        drift["copy"] = seen.said.get("manifest", "") != (host.rendered / MANIFEST).read_text(encoding="utf-8").strip()
    weights = _weights(host)
    known = [row for row in weights if row.state in ("verified", *WRONG)]
    times = [] if host.ssh else [(row, checked_at(row)) for row in weights]
    return HostFigures(
        when=time.time(),
        is_scheduled=is_scheduled,
        rendering=rendering_hash(files_on_disk(host.out, host.name)),
        inventory=hashlib.sha256(Path(host.plan.source_file).read_bytes()).hexdigest()[:16],
        drift=drift,
        containers=containers,
        verified={(row.model, row.file): row.state == "verified" for row in known},
        checked={(row.model, row.file): when for row, when in times if when is not None},
        certificates=understood_ends(seen.said.get("certificates", "")),
        backup=last_backups(host.out).get(host.name),
    )


def _weights(host: ComposeHost) -> list[Row]:
    shelf = open_shelf(host.plan.site, Path(host.plan.source_file), host.out, Console(quiet=True))
    return [row for row in rows(shelf, hosts={host.name}) if row.host == host.name]


def _put(host: ComposeHost, data: bytes) -> None:
    folder = f"{host.folder}/{FOLDER}"
    done = host.run(["sh", "-c", WRITE, "-", folder, FILE], given=data, check=False)
    if done.code != 0:
        remedy = f"./generate.py up --host {host.name} makes the folder; it must belong to who runs this"
        raise CorralError(f"{host.name}: {folder}/{FILE} cannot be written: {done.words}; {remedy}")
