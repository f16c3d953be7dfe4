"""Is the host there, and does a Docker engine that is new enough answer?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from corral.verbs.doctor.checks import REACHABLE, Case, Finding, check

# The first engine that knows `start_interval` of health checks.
ENGINE_FLOOR = (25, 0)
# The first Compose that knows `!reset`; `include` and `start_interval` are older.
COMPOSE_FLOOR = (2, 24)
INSTALL = "install Docker Engine with the Compose plugin, or run ./generate.py setup"


@check(REACHABLE, "engine", "make `ssh HOST true` work without a password")
def host_reachable(case: Case) -> Iterator[Finding]:
    """The host can be reached, by ssh when it is another one."""
    if case.facts.problem:
        remedy = f"make `ssh {case.host.ssh} true` work without a password" if case.host.ssh else ""
        yield Finding(case.facts.problem, remedy)


@check("engine-answers", "engine", "install Docker, start it, or join the group docker")
def engine_answers(case: Case) -> Iterator[Finding]:
    """Docker is installed, runs, and may be used by this user."""
    words = case.facts.engine_problem
    if case.facts.problem or not words:
        return
    if re.search(r"docker:? (command )?not found|no such file.*docker$", words):
        yield Finding("Docker is not installed", INSTALL)
    elif "permission denied" in words.lower():
        yield Finding(f"user {case.facts.user} may not use Docker", _permission(case))
    elif re.search(
        r"cannot connect|failed to connect to the docker|is the docker daemon running|connection refused",
        words,
        re.IGNORECASE,
    ):
        yield Finding("Docker is installed but does not run", "sudo systemctl enable --now docker")
    else:
        yield Finding(f"Docker does not answer: {_last(words)}", "sudo systemctl status docker says more")


def _permission(case: Case) -> str:
    if "docker" in case.facts.future_groups - case.facts.groups:
        return "the user is in the group docker, but only from the next login on: log out and in"
    return f"sudo usermod -aG docker {case.facts.user}, then log out and in (the group is as mighty as root)"


@check("engine-version", "engine", "install a newer Docker Engine", "engine")
def engine_version(case: Case) -> Iterator[Finding]:
    """Docker Engine is 25 or newer: older ones refuse the health checks."""
    if version_of(case.facts.engine_version) < ENGINE_FLOOR:
        words = f"Docker Engine {case.facts.engine_version} is older than 25"
        yield Finding(words, "install a newer one from docs.docker.com or your distribution")


@check("compose-version", "engine", "install a newer Compose plugin", "engine")
def compose_version(case: Case) -> Iterator[Finding]:
    """The Compose plugin is there, 2.24 or newer."""
    found = case.facts.compose_version
    if not found:
        yield Finding(f"no Compose plugin: {_last(case.facts.compose_problem)}", "install docker-compose-plugin")
    elif version_of(found) < COMPOSE_FLOOR:
        yield Finding(f"Compose {found} is older than 2.24", "install a newer docker-compose-plugin")


@check("limits-supported", "engine", "switch the kernel's memory controller on", "engine")
def limits_supported(case: Case) -> Iterator[Finding]:
    """The kernel can limit memory, swap and processes of containers."""
    info = case.facts.info
    if info.get("MemoryLimit") is False:
        remedy = "add cgroup_enable=memory to the kernel's command line, reboot"
        yield Finding("this kernel does not limit the memory of containers", remedy)
    elif info.get("SwapLimit") is False and case.facts.swap_mib:
        remedy = "add swapaccount=1 to the kernel's command line, reboot"
        yield Finding("this kernel does not limit the swap of containers", remedy, "warning")
    if info.get("PidsLimit") is False:
        yield Finding("this kernel does not limit the number of processes of containers", level="warning")


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: `28.5.2+dfsg4` is (28, 5, 2)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


def _last(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it gave no answer"


def summary(case: Case) -> str:
    """What was found, when all is well."""
    return f"Docker {case.facts.engine_version}, Compose {case.facts.compose_version}"
