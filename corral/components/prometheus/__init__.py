"""Prometheus: scrapes metrics, on the monitoring host and on hosts with a Prometheus of their own.

The farm's Prometheus also has the rules: recording rules that bring engines and exporters to common names, alerts, and
the values of the inventory that both compare with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from corral.components import Stage, edge
from corral.components.additions import named_secrets, with_texts
from corral.components.declared import filled, service
from corral.config.inventory import Monitoring, Objective
from corral.contributions import (
    Contribution,
    Contributions,
    Dashboard,
    DataSource,
    Endpoint,
    Fact,
    File,
    Relabel,
    ScrapeTarget,
    Secret,
    Service,
    is_system_folder,
)
from corral.declarations import declaration, read_yaml, shipped
from corral.plan.networks import INSIDE, OUTSIDE, alias
from corral.plan.site import Site

STAGE = Stage.MONITORING
COMPONENT = "prometheus"
FOLDER = "/etc/prometheus"
FACTS = "inventory.yml"
RULES = "monitoring/rules/"
OWN_RULES = (f"{RULES}farm.yml", f"{RULES}monitoring.yml")
RUNBOOKS = "docs/runbooks"
FAR = "it reads figures on other machines"
EXTRA = "`monitoring.extra` may name something on another machine"
AUTHORITIES = "/etc/corral/authorities"
AUTHORITY_THERE = "the authority of a node's certificate is kept there; nothing beside it is mounted"
MIB_OF_GIB = 1024
# Ending of the name of a job whose targets are on other hosts of the site; their label `job` has no such ending.
FAR_JOB = "-elsewhere"
OF_EACH_CARD = ("gpu_warm_c", "gpu_hot_c")
_TIMES = (("first_token", "first_token_s"), ("answer", "answer_s"))


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The farm's Prometheus with its rules, and one for each host that keeps its own metrics."""
    monitoring = site.inventory.monitoring
    if monitoring is None:
        return
    own = Endpoint(monitoring.port, monitoring.host, COMPONENT)
    labels = {"host": monitoring.host, "role": "monitoring"}
    itself = ScrapeTarget(COMPONENT, replace(own, service=alias(COMPONENT, INSIDE)), labels)
    yield itself
    yield DataSource(COMPONENT, own)
    yield Dashboard("monitoring/dashboards/farm.json")
    targets = [*published.targets, itself]
    rules = list(_rule_files(site, monitoring, published))
    yield from rules
    yield from _instance(site, monitoring.host, monitoring.port, targets, [file.path for file in rules], published)
    for host, port in monitoring.local.items():
        if host != monitoring.host:
            nearby = [target for target in published.targets if target.endpoint.host == host]
            yield from _instance(site, host, port, nearby, [], Contributions())


def _instance(
    site: Site, host: str, port: int, targets: list[ScrapeTarget], rules: list[str], published: Contributions
) -> Iterator[Contribution]:
    monitoring = _monitoring(site)
    yield File(
        host, COMPONENT, "prometheus.yml", data=configuration(site, host, targets, rules, published),
        extra=_added(site, host), extra_at=("monitoring", "extra"),
        note="scrape targets come from the plan; add your own through `monitoring.extra`",
    )  # fmt: skip
    named = named_secrets(monitoring.extra)
    yield from (Secret(name, host, "named in monitoring.extra", "given") for name in named)
    yield _service(site, host, port, targets, rules, [sink.endpoint for sink in published.sinks])
    if _calls_edges(site, host, targets):
        yield from edge.client_secrets(host, "monitoring")


def _calls_edges(site: Site, host: str, targets: list[ScrapeTarget]) -> bool:
    """Whether targets are on other hosts of the site."""
    return edge.is_called(site, [target.endpoint for target in targets], host)


def _secrets(site: Site, host: str, targets: list[ScrapeTarget]) -> tuple[str, ...]:
    """Keys of what is asked without an edge in between, and the own certificate for the edges."""
    keys = {item.secret for item in targets if item.secret and not site.is_behind_edge(item.endpoint, host)}
    certificates = {edge.AUTHORITY, edge.CLIENTS["monitoring"]} if _calls_edges(site, host, targets) else set()
    return tuple(sorted({*keys, *certificates, *named_secrets(_monitoring(site).extra)}))


def _monitoring(site: Site) -> Monitoring:
    monitoring = site.inventory.monitoring
    if monitoring is None:
        raise ValueError("a site without monitoring has no Prometheus")
    return monitoring


def _added(site: Site, host: str) -> dict[str, Any]:
    """`monitoring.extra` with the files of its secrets where this Prometheus has them."""
    extra = _monitoring(site).extra
    if not site.is_local(host):
        return extra
    moved: dict[str, Any] = with_texts(extra, partial(re.sub, "^/run/secrets/", "../secrets/"))
    return moved


# --- configuration ---------------------------------------------------------------------------------------------------


def configuration(
    site: Site, host: str, targets: list[ScrapeTarget], rules: list[str], published: Contributions
) -> dict[str, Any]:
    """Prometheus' configuration: one job for each kind of target, one entry for each set of labels."""
    jobs: dict[str, dict[str, Any]] = {}
    for target in targets:
        is_far = site.is_behind_edge(target.endpoint, host)
        job = jobs.setdefault(f"{target.job}{FAR_JOB if is_far else ''}", _job(site, host, target, is_far=is_far))
        labels = dict(target.labels) | ({"__scheme__": "https"} if target.scheme == "https" else {})
        labels |= _edge_labels(site, target) if is_far else {}
        job["static_configs"].append({"targets": [site.address(target.endpoint, host)], "labels": labels})
    sinks = [site.address(sink.endpoint, host) for sink in published.sinks]
    values = {
        "interval": f"{_monitoring(site).scrape_interval_s}s",
        "site": site.inventory.name,
        "jobs": list(jobs.values()),
        "rules": [name if site.is_local(host) else f"{FOLDER}/{name}" for name in rules] or None,
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": sinks}]}]} if sinks else None,
    }
    return dict(filled(declaration(COMPONENT)["configuration"], values))


def _edge_labels(site: Site, target: ScrapeTarget) -> dict[str, str]:
    """Where the edge of another host has a target; its job and its instance are called as if it were asked itself."""
    endpoint = target.endpoint
    return {
        "__metrics_path__": f"/{endpoint.service}{target.path}",
        "instance": f"{site.reached_at(endpoint.host)}:{endpoint.port}",
        "job": target.job,
    }


def _job(site: Site, host: str, target: ScrapeTarget, *, is_far: bool) -> dict[str, Any]:
    job: dict[str, Any] = {"job_name": f"{target.job}{FAR_JOB if is_far else ''}"}
    if target.path != "/metrics" and not is_far:
        job["metrics_path"] = target.path
    if is_far:
        own = site.secret_beside(host, edge.CLIENTS["monitoring"])
        job |= {
            "scheme": "https",
            "tls_config": {
                "ca_file": site.secret_beside(host, edge.AUTHORITY),
                "cert_file": own,
                "key_file": own,
                "min_version": "TLS13",
            },
        }
    elif target.user:
        job["basic_auth"] = {"username": target.user, "password_file": site.secret_beside(host, target.secret)}
    elif target.secret:
        job["authorization"] = {"credentials_file": site.secret_beside(host, target.secret)}
    if target.relabel:
        job["metric_relabel_configs"] = [_relabel(rule) for rule in target.relabel]
    return job | {"static_configs": []}


def _relabel(rule: Relabel) -> dict[str, Any]:
    """Prometheus anchors the expression at both ends."""
    values = f"({'|'.join(value.replace('.', '[.]') for value in rule.values)})" if rule.values else "(.+)"
    if rule.left_out:
        return {"source_labels": ["__name__", rule.source], "regex": f"{rule.left_out};{values}", "action": "drop"}
    return {
        "source_labels": [rule.source],
        "regex": values,
        "target_label": rule.target,
        "replacement": rule.replacement or "$1",
    }


# --- rules -----------------------------------------------------------------------------------------------------------


def _rule_files(site: Site, monitoring: Monitoring, published: Contributions) -> Iterator[File]:
    facts = [
        {"record": fact.name, "expr": f"vector({fact.value:g})"}
        | ({"labels": dict(fact.labels)} if fact.labels else {})
        for fact in (*_own_facts(site, monitoring), *published.facts)
    ]
    known = {"groups": [{"name": "inventory", "rules": facts}]}
    note = "what the inventory says, for rules to compare with"
    yield File(monitoring.host, COMPONENT, f"rules/{FACTS}", data=known, note=note)
    runbooks = (monitoring.runbooks or RUNBOOKS).rstrip("/")
    for asset in sorted({*(rules.asset for rules in published.rules), *OWN_RULES}):
        note = f"{asset} with the addresses of the runbooks"
        path = f"rules/{asset.removeprefix(RULES)}"
        yield File(monitoring.host, COMPONENT, path, data=with_runbooks(asset, runbooks), note=note)


def with_runbooks(asset: str, base: str) -> dict[str, Any]:
    """A shipped file of rules in which every alert says where its runbook lies."""
    groups = read_yaml(shipped(asset))["groups"]
    return {"groups": [group | {"rules": [_told(rule, base) for rule in group["rules"]]} for group in groups]}


def _told(rule: dict[str, Any], base: str) -> dict[str, Any]:
    if "alert" not in rule:
        return rule
    return rule | {"annotations": rule["annotations"] | {"runbook_url": f"{base}/{rule['alert']}.md"}}


def _own_facts(site: Site, monitoring: Monitoring) -> Iterator[Fact]:
    """Thresholds, and what every pool has and is expected to do."""
    for name, value in monitoring.thresholds:
        if name not in OF_EACH_CARD:
            ratio = value / 100 if name.endswith("_percent") else value
            yield Fact(f"threshold:{name.removesuffix('_percent')}", ratio)
    for name, pool in site.inventory.pools.items():
        queue = pool.queue or site.inventory.gateway.queue
        yield Fact("inventory:pool_queue_depth", queue.depth, {"pool": name})
        yield from objective_facts(name, pool.objective or monitoring.objective)


def objective_facts(pool: str, objective: Objective) -> Iterator[Fact]:
    """What the rules need to know of a pool's objective; times name the bucket in which they end."""
    budget = {"availability": 100 - objective.availability_percent, "first_token": 100 - objective.in_time_percent}
    budget["answer"] = budget["first_token"]
    for what, percent in budget.items():
        yield Fact("objective:error_budget", round(percent / 100, 6), {"pool": pool, "objective": what})
    for what, key in _TIMES:
        seconds = float(getattr(objective, key))
        yield Fact("objective:bucket", 1, {"pool": pool, "objective": what, "le": str(seconds)})


# --- the program -----------------------------------------------------------------------------------------------------


def _listening(site: Site, host: str, port: int) -> Iterator[str]:
    """It listens for itself, for Grafana and for the port on the host, not on the networks of those that it calls."""
    names = site.own_addresses(host, alias(COMPONENT, INSIDE), alias(COMPONENT, OUTSIDE))
    yield from (f"--web.listen-address={name}:{port}" for name in names)


def _service(
    site: Site, host: str, port: int, targets: list[ScrapeTarget], rules: list[str], sinks: list[Endpoint]
) -> Service:
    monitoring = _monitoring(site)
    files = sorted({target.ca_file for target in targets if target.ca_file})
    mounts = () if site.is_local(host) else tuple((file, f"{AUTHORITIES}/{n}.pem") for n, file in enumerate(files, 1))
    folders = {str(PurePosixPath(path).parent) for path in (files if site.is_local(host) else [to for _, to in mounts])}
    reasons = {"host-mount": AUTHORITY_THERE} if any(is_system_folder(file) for file, _ in mounts) else {}
    is_far = any(site.is_outside(target.endpoint, host) for target in targets)
    return service(
        site,
        host,
        COMPONENT,
        port=port,
        days=monitoring.retention_days,
        mb=round(monitoring.retention_gib * MIB_OF_GIB),
        listening=tuple(_listening(site, host, port)),
        keys=_secrets(site, host, targets),
        rules=tuple((name, f"{FOLDER}/{name}") for name in rules),
        calls=(*(target.endpoint for target in targets), *sinks),
        mounts=mounts,
        authorities=":".join(sorted(folders)) or None,
        exceptions=reasons | ({"way-out": FAR if is_far else EXTRA} if is_far or monitoring.extra else {}),
    )
