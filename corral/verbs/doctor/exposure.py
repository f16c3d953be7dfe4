"""Is a site with an entrance fit for strangers? The checklist of docs/internet.md, as far as it can be seen."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from corral.config.inventory import ConsumerLimits
from corral.verbs.doctor.checks import Case, Finding, check

EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - what the engine calls all addresses


def _is_exposed(case: Case) -> bool:
    return case.has("gateway") and case.plan.inventory.gateway.entrance is not None


@check("entrance-tls", "exposure", "set gateway.entrance.certificate")
def entrance_tls(case: Case) -> Iterator[Finding]:
    """The entrance speaks TLS."""
    entrance = case.plan.inventory.gateway.entrance
    if _is_exposed(case) and entrance and not entrance.certificate:
        yield Finding("the entrance has no certificate: keys and prompts cross the network in clear")


@check(
    "ports-exposed", "exposure", "publish the port on 127.0.0.1, or write rules into the chain DOCKER-USER", "running"
)
def ports_exposed(case: Case) -> Iterator[Finding]:
    """On the entrance's address nothing is published but the entrance."""
    entrance = case.plan.inventory.gateway.entrance
    if not _is_exposed(case) or entrance is None:
        return
    public = case.plan.site.host(case.name).address
    for container in case.seen.containers:
        for address, port in container.published:
            if port != entrance.port and address in (public, *EVERYWHERE) and container.is_running:
                where = f"{container.name}: port {port} is open on {address or public}"
                yield Finding(f"{where}; the host's firewall does not close it", level="warning")


@check("consumers-bounded", "exposure", "set limits: {parallel: …} and pools: […] for the consumer")
def consumers_bounded(case: Case) -> Iterator[Finding]:
    """Every key has a limit and a list of pools."""
    if not _is_exposed(case):
        return
    consumers = case.plan.inventory.consumers
    free = [name for name, item in consumers.items() if item.limits == ConsumerLimits()]
    if free:
        yield Finding(f"keys without a limit: {', '.join(free)}", level="warning")
    open_to_all = [name for name, item in consumers.items() if item.pools is None]
    if open_to_all:
        yield Finding(f"keys that open every pool, paid ones included: {', '.join(open_to_all)}", level="warning")
    if not consumers:
        yield Finding(
            "there are no consumers: clients beyond the farm would use the master key", "add consumers, then up"
        )


@check("answers-bounded", "exposure", "set gateway.entrance.max_tokens, or gateway.request: {max_tokens: {most: …}}")
def answers_bounded(case: Case) -> Iterator[Finding]:
    """Answers have a longest length."""
    gateway = case.plan.inventory.gateway
    tokens = gateway.request.max_tokens
    if _is_exposed(case) and gateway.entrance and not gateway.entrance.max_tokens and not (tokens and tokens.most):
        yield Finding("an answer may take a slot for as long as timeout_s: no max_tokens is set", level="warning")


@check("told", "exposure", "add monitoring: {receivers: [...]}")
def told(case: Case) -> Iterator[Finding]:
    """Alerts reach a person."""
    monitoring = case.plan.inventory.monitoring
    if _is_exposed(case) and not (monitoring and monitoring.receivers):
        yield Finding("no alert reaches a person", level="warning")


def summary(case: Case) -> str:
    """What was found, when all is well."""
    entrance = case.plan.inventory.gateway.entrance
    if not _is_exposed(case) or entrance is None:
        address = case.plan.site.host(case.name).address
        return "no entrance" if ipaddress.ip_address(address).is_private else "no entrance, on a public address"
    return f"entrance on port {entrance.port}, {'TLS' if entrance.certificate else 'plain HTTP'}"
