"""Does every service of the plan run, well, within its limits, and in a version that is safe?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from corral.components import litellm
from corral.contributions import Service
from corral.runtime.causes import ENDS, Reason, explained
from corral.runtime.docker import Container
from corral.verbs.doctor.checks import Case, Finding, check
from corral.verbs.doctor.engine import version_of
from corral.verbs.doctor.gpus import runs_on_cpu

# The first version without CVE-2026-42208: SQL injection before any key is checked, used by attackers.
LITELLM_FLOOR = (1, 83, 7)
# Carried a program that steals credentials (PyPI, March 2026).
LITELLM_MALWARE = ((1, 82, 7), (1, 82, 8))
RESTARTS = 3
YOUNG_S = 600
LOG_LINES = 40
MIB_TOLERANCE = 1


def reason(case: Case, service: Service) -> Reason | None:
    """Why a service is not well, from the engine's words and its last log lines; None when it is."""
    container = case.seen.container_of(service.name, case.host.project)
    if container is not None and container.is_well:
        return None
    log = case.host.last_lines(container.name, LOG_LINES) if container is not None else ""
    return explained(container, service, log)


@check("started", "services", "./generate.py up", "engine")
def started(case: Case) -> Iterator[Finding]:
    """The host's services were started."""
    if not case.has("running") and case.plan.services_of(case.name):
        yield Finding("nothing runs here yet", f"./generate.py up --host {case.name}", "hint")


@check("running", "services", "see the log line, or ./generate.py up", "engine", "running")
def running(case: Case) -> Iterator[Finding]:
    """Every service of the plan runs and is healthy."""
    for service in case.plan.services_of(case.name):
        if service.needs_cards and runs_on_cpu(case):
            continue
        why = reason(case, service)
        container = case.seen.container_of(service.name, case.host.project)
        if why is not None:
            is_starting = container is not None and container.condition == "starting" and container.restarts < ENDS
            yield Finding(f"{service.name}: {why.what}", why.remedy, "hint" if is_starting else "error")


@check("restarts", "services", "./generate.py logs shows why it ends", "engine", "running")
def restarts(case: Case) -> Iterator[Finding]:
    """No service keeps ending and being started again."""
    for item in _own(case):
        age_s = (datetime.now(UTC) - item.started).total_seconds() if item.started else YOUNG_S
        if item.restarts >= RESTARTS and item.is_running and age_s < YOUNG_S:
            words = f"{item.service}: started again {item.restarts} times, last {age_s:.0f} s ago"
            yield Finding(words, f"./generate.py logs {item.name}", "warning")


@check("memory-limits", "services", "switch the kernel's memory controller on, then up", "engine", "running")
def memory_limits(case: Case) -> Iterator[Finding]:
    """The kernel holds every container to its memory limit."""
    free = [
        item.service
        for item in _own(case)
        if item.limit_mib is not None and item.wanted_mib and item.limit_mib > item.wanted_mib + MIB_TOLERANCE
    ]
    if free:
        yield Finding(
            f"the memory limit is not in force for {', '.join(free)}", "restart docker, then ./generate.py up"
        )


@check("memory-room", "services", "raise memory_mib or lower cache_ram_mib", "engine", "running")
def memory_room(case: Case) -> Iterator[Finding]:
    """No container is about to reach its memory limit."""
    for item in _own(case):
        limit = item.limit_mib or item.wanted_mib
        if item.memory_mib is not None and limit and item.memory_mib > 0.95 * limit:
            words = f"{item.service}: {item.memory_mib:.0f} of {limit:.0f} MiB are taken"
            yield Finding(words, "raise memory_mib, or for a replica lower cache_ram_mib", "warning")


@check("strangers", "services", "docker rm -f the container, if you do not need it", "engine")
def strangers(case: Case) -> Iterator[Finding]:
    """No container of this site runs that the plan does not know."""
    planned = {service.name for service in case.plan.services_of(case.name)}
    for item in _own(case):
        if item.service not in planned:
            yield Finding(
                f"{item.name} is not in the plan", f"./generate.py up, or docker rm -f {item.name}", "warning"
            )


@check("litellm-version", "services", "remove images.litellm from the inventory, render, up")
def litellm_version(case: Case) -> Iterator[Finding]:
    """LiteLLM is 1.83.7 or newer (CVE-2026-42208), in the plan and in the running container."""
    services = [item for item in case.plan.services_of(case.name) if item.component == litellm.COMPONENT]
    for service in services:
        tag = service.image.partition("@")[0].rpartition(":")[2]
        planned = version_of(tag)
        if planned and (words := _unsafe(planned)):
            remedy = f"remove images.{litellm.COMPONENT} from the inventory (the kit pins {litellm.IMAGE})"
            yield Finding(f"the image {service.image} {words}", remedy)
        elif not planned and not case.facts.litellm_version:
            yield Finding(
                f"the tag of {service.image} does not say its version", "name a tag with a version", "warning"
            )
        actual = version_of(case.facts.litellm_version)
        if actual and actual != planned and (words := _unsafe(actual)):
            yield Finding(
                f"the running LiteLLM {case.facts.litellm_version} {words}", "./generate.py up with a newer image"
            )


def _unsafe(version: tuple[int, ...]) -> str:
    if version[:3] in LITELLM_MALWARE:
        return "carries malware that steals credentials: change every key that it has seen"
    if version < LITELLM_FLOOR:
        return "lets anybody into its database (CVE-2026-42208, fixed in 1.83.7)"
    return ""


@check("images-pinned", "services", "name a tag with a version, or a digest")
def images_pinned(case: Case) -> Iterator[Finding]:
    """Every image is named with a version that does not move."""
    for service in case.plan.services_of(case.name):
        if "@sha256:" in service.image:
            continue
        tag = re.search(r":([^/:]+)$", service.image)
        if tag is None or re.fullmatch(r"(.*-)?(latest|stable|main|nightly|edge)(-.*)?", tag[1]):
            words = f"{service.name}: the image {service.image} can become another one at any time"
            yield Finding(words, "name a tag with a version, or a digest", "warning")


def _own(case: Case) -> list[Container]:
    return [item for item in case.seen.containers if item.project == case.host.project]


def summary(case: Case) -> str:
    """What was found, when all is well."""
    if not case.has("running"):
        return "not started"
    version = f", LiteLLM {case.facts.litellm_version}" if case.facts.litellm_version else ""
    return f"{len(case.plan.services_of(case.name))} services healthy{version}"
