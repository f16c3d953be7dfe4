"""Does every service of the plan run, well, within its limits, and in a version that is safe; is it fit for strangers?

The area `exposure` is the checklist of docs/internet.md, as far as it can be seen.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

from corral.checks.registry import check
from corral.components import litellm
from corral.config.inventory import ConsumerLimits
from corral.errors import Finding
from corral.gateway.frontends import entrance_address
from corral.runtime.causes import ENDS
from corral.verbs.doctor.case import Case, error, hint, version_of, warning
from corral.verbs.doctor.machine import EVERYWHERE

# The first version without CVE-2026-42208: SQL injection before any key is checked, used by attackers.
LITELLM_FLOOR = (1, 83, 7)
# Carried a program that steals credentials (PyPI, March 2026).
LITELLM_MALWARE = ((1, 82, 7), (1, 82, 8))
RESTARTS = 3
YOUNG_S = 600
MIB_TOLERANCE = 1
BOUNDS = "set limits: {parallel: …} and pools: […] for the consumer"
services = partial(check, "running", section="services")
exposure = partial(check, "running", section="exposure")


@services("started", "engine", remedy="./generate.py up")
def started(case: Case) -> Iterator[Finding]:
    """The host's services were started."""
    if case.services and not case.own:
        yield hint("nothing runs here yet", case.up)


@services("running", "engine", "running", remedy="see the log line, or ./generate.py up")
def running(case: Case) -> Iterator[Finding]:
    """Every service of the plan runs and is healthy."""
    for service in case.services:
        why = None if service.needs_cards and case.has_cpu_variant else case.reason(service)
        if why is not None:
            found = case.container_of(service)
            is_starting = found is not None and found.condition == "starting" and found.restarts < ENDS
            yield error(f"{service.name}: {why.what}", why.remedy, level="hint" if is_starting else "error")


@services("restarts", "engine", "running", remedy="./generate.py logs shows why it ends")
def restarts(case: Case) -> Iterator[Finding]:
    """No service keeps ending and being started again."""
    for item in case.own:
        age_s = (datetime.now(UTC) - item.started).total_seconds() if item.started else YOUNG_S
        if item.restarts >= RESTARTS and item.is_running and age_s < YOUNG_S:
            words = f"{item.service}: started again {item.restarts} times, last {age_s:.0f} s ago"
            yield warning(words, f"./generate.py logs {item.name}")


@services("memory-limits", "engine", "running", remedy="switch the kernel's memory controller on, then up")
def memory_limits(case: Case) -> Iterator[Finding]:
    """The kernel holds every container to its memory limit."""
    limited = [item for item in case.own if item.limit_mib is not None and item.wanted_mib]
    free = [item.service for item in limited if (item.limit_mib or 0) > item.wanted_mib + MIB_TOLERANCE]
    if free:
        words = f"the memory limit is not in force for {', '.join(free)}"
        yield error(words, "restart docker, then ./generate.py up")


@services("memory-room", "engine", "running", remedy="raise memory_mib or lower cache_ram_mib")
def memory_room(case: Case) -> Iterator[Finding]:
    """No container is about to reach its memory limit."""
    for item in case.own:
        limit = item.limit_mib or item.wanted_mib
        if limit and (item.memory_mib or 0) > 0.95 * limit:
            words = f"{item.service}: {item.memory_mib:.0f} of {limit:.0f} MiB are taken"
            yield warning(words, "raise memory_mib, or for a replica lower cache_ram_mib")


@services("strangers", "engine", remedy="docker rm -f the container, if you do not need it")
def strangers(case: Case) -> Iterator[Finding]:
    """No container of this site runs that the plan does not know."""
    planned = {service.name for service in case.services}
    for item in case.own:
        if item.service not in planned:
            yield warning(f"{item.name} is not in the plan", f"./generate.py up, or docker rm -f {item.name}")


@services("litellm-version", remedy="remove images.litellm from the inventory, render, up")
def litellm_version(case: Case) -> Iterator[Finding]:
    """LiteLLM is 1.83.7 or newer (CVE-2026-42208), in the plan and in the running container."""
    version = case.said("litellm")
    for service in (item for item in case.services if item.component == litellm.COMPONENT):
        planned, actual = version_of(service.image.partition("@")[0].rpartition(":")[2]), version_of(version)
        if planned and (words := _unsafe(planned)):
            remedy = f"remove images.{litellm.COMPONENT} from the inventory (the kit pins {litellm.IMAGE})"
            yield error(f"the image {service.image} {words}", remedy)
        elif not planned and not version:
            yield warning(f"the tag of {service.image} does not say its version", "name a tag with a version")
        if actual and actual != planned and (words := _unsafe(actual)):
            yield error(f"the running LiteLLM {version} {words}", "./generate.py up with a newer image")


def _unsafe(version: tuple[int, ...]) -> str:
    if version[:3] in LITELLM_MALWARE:
        return "carries malware that steals credentials: change every key that it has seen"
    return (
        "executes SQL of unauthenticated clients (CVE-2026-42208, fixed in 1.83.7)" if version < LITELLM_FLOOR else ""
    )


@services("images-pinned", remedy="name a tag with a version, or a digest", level="warning")
def images_pinned(case: Case) -> Iterator[str]:
    """Every image is named with a version that does not move."""
    for service in case.services:
        tag = re.search(r":([^/:]+)$", service.image)
        is_moving = tag is None or re.fullmatch(r"(.*-)?(latest|stable|main|nightly|edge)(-.*)?", tag[1])
        if is_moving and "@sha256:" not in service.image:
            yield f"{service.name}: the image {service.image} can become another one at any time"


def summary(case: Case) -> str:
    """What was found, when all is well."""
    if not case.own:
        return "not started"
    version = f", LiteLLM {case.said('litellm')}" if case.said("litellm") else ""
    return f"{len(case.services)} services healthy{version}"


# --- exposure --------------------------------------------------------------------------------------------------------


@exposure("entrance-tls", "entrance", remedy="set gateway.entrance.certificate")
def entrance_tls(case: Case) -> Iterator[str]:
    """The entrance speaks TLS, or is on loopback behind a proxy that does."""
    entrance = case.plan.inventory.gateway.entrance
    is_behind_proxy = entrance and ipaddress.ip_address(entrance_address(case.plan.site, entrance)).is_loopback
    if entrance and not entrance.certificate and not is_behind_proxy:
        yield "the entrance has no certificate: keys and prompts cross the network in clear"


@exposure(
    "ports-exposed", "entrance", "running", level="warning",
    remedy="publish the port on 127.0.0.1, or write rules into the chain DOCKER-USER",
)  # fmt: skip
def ports_exposed(case: Case) -> Iterator[str]:
    """On the entrance's address nothing is published but the entrance."""
    entrance = case.plan.inventory.gateway.entrance
    public = entrance_address(case.plan.site, entrance) if entrance else ""
    for item in case.seen.containers:
        for address, port in item.published if item.is_running and entrance else ():
            if entrance and port != entrance.port and address in (public, *EVERYWHERE):
                yield f"{item.name}: port {port} is open on {address or public}; the host's firewall does not close it"


@exposure("consumers-bounded", "entrance", remedy=BOUNDS)
def consumers_bounded(case: Case) -> Iterator[Finding]:
    """Every key has a limit and a list of pools."""
    consumers = case.plan.inventory.consumers
    if free := [name for name, item in consumers.items() if item.limits == ConsumerLimits()]:
        yield warning(f"keys without a limit: {', '.join(free)}", BOUNDS)
    if open_to_all := [name for name, item in consumers.items() if item.pools is None]:
        yield warning(f"keys that open every pool, paid ones included: {', '.join(open_to_all)}", BOUNDS)
    if not consumers:
        yield error(
            "there are no consumers: clients beyond the farm would use the master key", "add consumers, then up"
        )


@exposure(
    "answers-bounded", "entrance", level="warning",
    remedy="set gateway.entrance.max_tokens, or gateway.request: {max_tokens: {most: …}}",
)  # fmt: skip
def answers_bounded(case: Case) -> Iterator[str]:
    """Answers have a longest length."""
    gateway = case.plan.inventory.gateway
    tokens = gateway.request.max_tokens
    if not (gateway.entrance and gateway.entrance.max_tokens) and not (tokens and tokens.most):
        yield "an answer may take a slot for as long as timeout_s: no max_tokens is set"


@exposure("told", "entrance", remedy="add monitoring: {receivers: [...]}", level="warning")
def told(case: Case) -> Iterator[str]:
    """Alerts reach a person."""
    monitoring = case.plan.inventory.monitoring
    if not (monitoring and monitoring.receivers):
        yield "no alert reaches a person"


def exposure_summary(case: Case) -> str:
    """What was found, when all is well."""
    entrance = case.plan.inventory.gateway.entrance
    if entrance and case.has("entrance"):
        return f"entrance on port {entrance.port}, {'TLS' if entrance.certificate else 'plain HTTP'}"
    is_private = ipaddress.ip_address(case.declared.address).is_private
    return "no entrance" if is_private else "no entrance, on a public address"
