"""Does every service of the plan run, well, within its limits, and in a version that is safe; is it fit for strangers?

The area `exposure` is the checklist of docs/internet.md, as far as it can be seen.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime

from corral.checks.registry import Findings
from corral.components import litellm
from corral.config.inventory import ConsumerLimits
from corral.gateway.frontends import entrance_address
from corral.runtime.causes import ENDS
from corral.verbs.doctor.case import Case, say, version_of
from corral.verbs.doctor.machine import EVERYWHERE

# The first version without CVE-2026-42208: SQL injection before any key is checked, used by attackers.
LITELLM_FLOOR = (1, 83, 7)
# Carried a program that steals credentials (PyPI, March 2026).
LITELLM_MALWARE = ((1, 82, 7), (1, 82, 8))
RESTARTS = 3
YOUNG_S = 600
MIB_TOLERANCE = 1


def started(case: Case) -> Findings:
    """The host's services were started."""
    if case.services and not case.own:
        yield say("started/nothing", up=case.up)


def running(case: Case) -> Findings:
    """Every service of the plan runs and is healthy."""
    for service in case.services:
        why = None if service.needs_cards and case.has_cpu_variant else case.reason(service)
        if why is not None:
            found = case.container_of(service)
            is_starting = found is not None and found.condition == "starting" and found.restarts < ENDS
            yield say("running/unwell", level="hint" if is_starting else "error", service=service.name, why=why)


def restarts(case: Case) -> Findings:
    """No service keeps ending and being started again."""
    for item in case.own:
        age_s = (datetime.now(UTC) - item.started).total_seconds() if item.started else YOUNG_S
        if item.restarts >= RESTARTS and item.is_running and age_s < YOUNG_S:
            yield say("restarts/often", item=item, age_s=age_s)


def memory_limits(case: Case) -> Findings:
    """The kernel holds every container to its memory limit."""
    limited = [item for item in case.own if item.limit_mib is not None and item.wanted_mib]
    free = [item.service for item in limited if (item.limit_mib or 0) > item.wanted_mib + MIB_TOLERANCE]
    if free:
        yield say("memory-limits/free", free=", ".join(free))


def memory_room(case: Case) -> Findings:
    """No container is about to reach its memory limit."""
    for item in case.own:
        limit = item.limit_mib or item.wanted_mib
        if limit and (item.memory_mib or 0) > 0.95 * limit:
            yield say("memory-room/full", service=item.service, used=item.memory_mib, limit=limit)


def strangers(case: Case) -> Findings:
    """No container of this site runs that the plan does not know."""
    planned = {service.name for service in case.services}
    for item in case.own:
        if item.service not in planned:
            yield say("strangers/unknown", name=item.name)


def litellm_version(case: Case) -> Findings:
    """LiteLLM is 1.83.7 or newer (CVE-2026-42208), in the plan and in the running container."""
    version = case.said("litellm")
    for service in (item for item in case.services if item.component == litellm.COMPONENT):
        planned, actual = version_of(service.image.partition("@")[0].rpartition(":")[2]), version_of(version)
        if planned and (words := _unsafe(planned)):
            yield say("litellm-version/planned", image=service.image, words=words, pinned=litellm.IMAGE)
        elif not planned and not version:
            yield say("litellm-version/unsaid", image=service.image)
        if actual and actual != planned and (words := _unsafe(actual)):
            yield say("litellm-version/actual", version=version, words=words)


def _unsafe(version: tuple[int, ...]) -> str:
    if version[:3] in LITELLM_MALWARE:
        return "carries malware that steals credentials: change every key that it has seen"
    return (
        "executes SQL of unauthenticated clients (CVE-2026-42208, fixed in 1.83.7)" if version < LITELLM_FLOOR else ""
    )


def images_pinned(case: Case) -> Findings:
    """Every image is named with a version that does not move."""
    for service in case.services:
        tag = re.search(r":([^/:]+)$", service.image)
        is_moving = tag is None or re.fullmatch(r"(.*-)?(latest|stable|main|nightly|edge)(-.*)?", tag[1])
        if is_moving and "@sha256:" not in service.image:
            yield say("images-pinned/moving", service=service.name, image=service.image)


def summary(case: Case) -> str:
    """What was found, when all is well."""
    if not case.own:
        return "not started"
    version = f", LiteLLM {case.said('litellm')}" if case.said("litellm") else ""
    return f"{len(case.services)} services healthy{version}"


# --- exposure --------------------------------------------------------------------------------------------------------


def entrance_tls(case: Case) -> Findings:
    """The entrance speaks TLS, or is on loopback behind a proxy that does."""
    entrance = case.plan.inventory.gateway.entrance
    is_behind_proxy = entrance and ipaddress.ip_address(entrance_address(case.plan.site, entrance)).is_loopback
    if entrance and not entrance.certificate and not is_behind_proxy:
        yield say("entrance-tls/plain")


def ports_exposed(case: Case) -> Findings:
    """On the entrance's address nothing is published but the entrance."""
    entrance = case.plan.inventory.gateway.entrance
    public = entrance_address(case.plan.site, entrance) if entrance else ""
    for item in case.seen.containers:
        for address, port in item.published if item.is_running and entrance else ():
            if entrance and port != entrance.port and address in (public, *EVERYWHERE):
                yield say("ports-exposed/open", name=item.name, port=port, address=address or public)


def consumers_bounded(case: Case) -> Findings:
    """Every key has a limit and a list of pools."""
    consumers = case.plan.inventory.consumers
    if free := [name for name, item in consumers.items() if item.limits == ConsumerLimits()]:
        yield say("consumers-bounded/free", names=", ".join(free))
    if open_to_all := [name for name, item in consumers.items() if item.pools is None]:
        yield say("consumers-bounded/open", names=", ".join(open_to_all))
    if not consumers:
        yield say("consumers-bounded/none")


def answers_bounded(case: Case) -> Findings:
    """Answers have a longest length."""
    gateway = case.plan.inventory.gateway
    tokens = gateway.request.max_tokens
    if not (gateway.entrance and gateway.entrance.max_tokens) and not (tokens and tokens.most):
        yield say("answers-bounded/free")


def told(case: Case) -> Findings:
    """Alerts reach a person."""
    monitoring = case.plan.inventory.monitoring
    if not (monitoring and monitoring.receivers):
        yield say("told/none")


def exposure_summary(case: Case) -> str:
    """What was found, when all is well."""
    entrance = case.plan.inventory.gateway.entrance
    if entrance and case.has("entrance"):
        return f"entrance on port {entrance.port}, {'TLS' if entrance.certificate else 'plain HTTP'}"
    is_private = ipaddress.ip_address(case.declared.address).is_private
    return "no entrance" if is_private else "no entrance, on a public address"
