"""Is the host there with a Docker that is new enough, and is the machine what the inventory says?"""

from __future__ import annotations

import ipaddress
import re
from importlib.metadata import version

from corral.checks.registry import Findings
from corral.contributions import Port
from corral.errors import Level
from corral.runtime.causes import cause_of, last_line
from corral.runtime.processes import ProcessHost
from corral.runtime.supervisor import members, package_folders, taken_ports
from corral.units import gib
from corral.verbs.doctor.case import Case, json_of, say, version_of

# The first engine that knows `start_interval` of health checks.
ENGINE_FLOOR = (25, 0)
# The first engine that chooses IPv6 addresses for networks by itself.
IPV6_FLOOR = (27, 0)
# The first Compose that knows `!reset`; `include` and `start_interval` are older.
COMPOSE_FLOOR = (2, 24)
# Paths with colons want the long form of `devices`.
COMPOSE_FOR_SLOTS = (2, 30)
DISK_ERROR_MIB, DISK_WARNING_MIB = 1024, 5 * 1024
# Firmware and graphics keep some of what is sold as 32 GiB.
RAM_TOLERANCE = 0.06
SKEW_WARNING_S, SKEW_ERROR_S = 2, 60
# Processes that a message names.
SHOWN = 3
X86 = ("x86_64", "amd64")
# Docker's own bridges.
BRIDGES = ipaddress.ip_network("172.16.0.0/12")
EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - what Docker calls all addresses
_DISK = re.compile(r"^(\w+) .*?\s(\d+)\s+[\d-]+%?\s+(/.*)$", re.MULTILINE)
# Of `ss`: address, port, program, process.
_LISTENER = re.compile(r'^(?:\S+\s+){3}(\S+):(\d+)\s+\S+(?:.*?\(\("([^"]+)",pid=(\d+))?', re.MULTILINE)


def host_reachable(case: Case) -> Findings:
    """The host can be reached, by ssh when it is another one."""
    if not case.seen.is_reached:
        remedy = f"make `ssh {case.host.ssh} true` work without a password" if case.host.ssh else ""
        yield say("host-reachable/silent", problem=case.seen.problem, remedy=remedy)


def engine_answers(case: Case) -> Findings:
    """Docker is installed, runs, and may be used by this user."""
    words = case.seen.problem
    cause = cause_of(words, "docker")
    if not words:
        return
    if "permission denied" in words.lower():
        user, groups, next_groups = (case.said("user").splitlines() + 3 * [""])[:3]
        is_member = "docker" in {*next_groups.split()} - {*groups.split()}
        yield say(f"engine-answers/{'not-yet' if is_member else 'not-allowed'}", user=user)
    elif cause:
        yield say("engine-answers/known", cause=cause)
    else:
        yield say("engine-answers/unknown", line=last_line(words))


def engine_version(case: Case) -> Findings:
    """Docker Engine is 25 or newer: older ones refuse the health checks."""
    found = case.info.get("ServerVersion", "")
    wants_ipv6 = case.plan.site.has_ipv6 and not case.info.get("DefaultAddressPools")
    if found and version_of(found) < ENGINE_FLOOR:
        yield say("engine-version/old", found=found)
    elif found and version_of(found) < IPV6_FLOOR and wants_ipv6:
        yield say("engine-version/ipv6", found=found)


def compose_version(case: Case) -> Findings:
    """The Compose plugin is there, 2.24 or newer."""
    found = _compose(case)
    version = found.get("Version", "")
    has_slots = any(":" in path for item in case.services for path in item.devices)
    if not version:
        yield say("compose-version/none", problem=found.get("Err", "Docker knows none"))
    elif version_of(version) < COMPOSE_FLOOR:
        yield say("compose-version/old", version=version)
    elif version_of(version) < COMPOSE_FOR_SLOTS and has_slots:
        yield say("compose-version/slots", version=version)


def _compose(case: Case) -> dict[str, str]:
    """What Docker knows of its Compose plugin: `Version`, or `Err` with what is wrong with it."""
    plugins: list[dict[str, str]] = (case.info.get("ClientInfo") or {}).get("Plugins") or []
    return next((item for item in plugins if item.get("Name") == "compose"), {})


def limits_supported(case: Case) -> Findings:
    """The kernel can limit memory, swap and processes of containers."""
    info = case.info
    if info.get("MemoryLimit") is False:
        yield say("limits-supported/memory")
    elif info.get("SwapLimit") is False and case.mib("SwapTotal"):
        yield say("limits-supported/swap")
    if info.get("PidsLimit") is False:
        yield say("limits-supported/pids")


def selinux(case: Case) -> Findings:
    """The inventory says whether Docker confines containers by SELinux."""
    is_on = any("name=selinux" in item for item in case.info.get("SecurityOptions") or ())
    if is_on and not case.declared.selinux:
        yield say("selinux/unsaid", name=case.name)
    elif case.declared.selinux and not is_on:
        yield say("selinux/unused")


def address(case: Case) -> Findings:
    """The host's address in the inventory is one of the machine's own."""
    wanted = case.declared.address
    links: list[dict[str, list[dict[str, str]]]] = json_of(case.said("addresses"), [])
    own = {item["local"] for link in links for item in link["addr_info"] if "local" in item}
    if own and wanted not in own and not ipaddress.ip_address(wanted).is_loopback:
        known = {item: ipaddress.ip_address(item) for item in own}
        inside = {item for item, it in known.items() if it.is_loopback or it.is_link_local or it in BRIDGES}
        others = ", ".join(sorted(own - inside)) or "none"
        yield say("address/other", wanted=wanted, others=others, name=case.name)


def cpu(case: Case) -> Findings:
    """AVX and the number of cores are as the inventory says."""
    declared = case.declared.cpu
    cores, has_avx = _processor(case)
    if declared.avx and has_avx is False:
        yield say("cpu/avx", name=case.name)
    if declared.cores and cores and declared.cores > cores:
        yield say("cpu/cores", declared=declared.cores, cores=cores, name=case.name)


def _processor(case: Case) -> tuple[int, bool | None]:
    """How many cores there are, and whether they have AVX; None where no processor has it, or it is not known."""
    kind, cores, flags = (case.said("cpu").splitlines() + 3 * [""])[:3]
    words = flags.partition(":")[2].split()
    return int(cores) if cores.isdecimal() else 0, "avx" in words if words and kind in X86 else None


def ram(case: Case) -> Findings:
    """The machine has the RAM that the inventory says, and all container limits fit into it."""
    declared, has = case.declared, case.mib("MemTotal")
    wanted = sum(service.memory_mib for service in case.services)
    room = has - round(declared.os_reserve_gib * 1024)
    # What the firmware set aside for a processor's graphics, the system does not count.
    is_shared = any(card.unified_memory for card in case.plan.site.cards[case.name])
    if has and wanted > room:
        level: Level = "error" if wanted > has else "warning"
        yield say("ram/full", level=level, wanted=gib(wanted), has=gib(has), room=gib(max(0, room)))
    elif has and declared.ram_gib and not is_shared and has < declared.ram_gib * 1024 * (1 - RAM_TOLERANCE):
        yield say("ram/less", declared=declared.ram_gib, has=gib(has), name=case.name)


def swap(case: Case) -> Findings:
    """There is swap where containers may use some."""
    most = max((item.memory_swap_mib - item.memory_mib for item in case.services if item.memory_swap_mib), default=0)
    has = case.mib("SwapTotal")
    if case.mib("MemTotal") and has < most:
        yield say("swap/less", most=most, has=has)


def disk(case: Case) -> Findings:
    """At least 5 GiB are free where the engine, the models and the rendering lie."""
    for place, (free, purposes) in _room(case).items():
        if free < DISK_WARNING_MIB:
            level: Level = "error" if free < DISK_ERROR_MIB else "warning"
            yield say("disk/full", level=level, free=gib(free), place=place, purposes=" and ".join(purposes))


def _room(case: Case) -> dict[str, tuple[int, list[str]]]:
    """MiB that are free and what lies there, by mount point."""
    found: dict[str, tuple[int, list[str]]] = {}
    for purpose, kib, mount in _DISK.findall(case.said("disks")):
        found[mount] = (int(kib) // 1024, [*found.get(mount, (0, []))[1], purpose])
    return found


def clock(case: Case) -> Findings:
    """The clock is set by a time service and agrees with this machine's."""
    leap = re.search(r"leap status\s*:\s*(.+)", case.said("time-service").lower())
    if case.said("time-service") == "no" or (leap and leap[1].strip() != "normal"):
        yield say("clock/unset")
    told = re.match(r"\d+(\.\d+)?", case.said("clock")) if case.host.ssh else None
    ahead = float(told[0]) - case.seen.moment if told else 0
    if abs(ahead) > SKEW_WARNING_S:
        skew = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
        yield say("clock/skew", level="error" if abs(ahead) > SKEW_ERROR_S else "warning", skew=skew)


def ports(case: Case) -> Findings:
    """Every published port is free or held by the service that it is meant for."""
    for service in case.services:
        container = case.container_of(service)
        held = {number for _, number in container.published} if container else set()
        for port in service.ports:
            if port.publish and port.number not in held and (holder := _holder(case, port)):
                yield say("ports/taken", port=port.number, service=service.name, holder=holder)


def _holder(case: Case, port: Port) -> str:
    """What listens where a port would be published: a container, or a program as `ss` shows it; empty if nothing."""
    found = [
        name and f"{name} (pid {pid})"
        for address, number, name, pid in _LISTENER.findall(case.said("listeners"))
        if int(number) == port.number and _plain(address) in (port.publish, *EVERYWHERE)
    ]
    container = re.search(rf"^(\S+) .*:{port.number}->", case.said("published"), re.MULTILINE)
    if not found:
        return ""
    return f"the container {container[1]}" if container else max(found) or "a program that only root can see"


def _plain(address: str) -> str:
    """An address without brackets and interface; of all addresses `::`."""
    text = address.partition("%")[0].strip("[]").removeprefix("::ffff:")
    return "::" if text == "*" else text


def programs(case: Case) -> Findings:
    """On a `local` host, every program is installed."""
    for name, path, remedy in case.host.programs() if isinstance(case.host, ProcessHost) else ():
        if not path:
            yield say("programs/missing", program=name, remedy=remedy)
        elif path.startswith(tuple(package_folders())):
            yield say("programs/packaged", program=name, remedy=remedy)


def supervised(case: Case) -> Findings:
    """On a `local` host, supervisord looks after every program of ours that runs."""
    if isinstance(case.host, ProcessHost) and not case.own and (left := members(case.host.place)):
        pids = ", ".join(f"{item.name()} (pid {item.pid})" for item in left[:SHOWN])
        yield say("supervised/orphans", count=len(left), pids=pids, up=case.up)


def ports_free(case: Case) -> Findings:
    """On a `local` host, no other process holds the port of a program that does not run."""
    waiting = [item for item in case.services if not ((there := case.container_of(item)) and there.is_running)]
    for line in taken_ports(waiting):
        yield say("ports-free/taken", line=line)


def engine_summary(case: Case) -> str:
    """What was found, when all is well."""
    if isinstance(case.host, ProcessHost):
        return f"processes under supervisord {version('supervisor')}, without Docker"
    return f"Docker {case.info.get('ServerVersion', '')}, Compose {_compose(case).get('Version', '')}"


def summary(case: Case) -> str:
    """What was found, when all is well."""
    cores, has_avx = _processor(case)
    avx = "" if has_avx is None else ", AVX" if has_avx else ", no AVX"
    free = min((free for free, _ in _room(case).values()), default=0)
    return f"{cores} cores{avx}, {gib(case.mib('MemTotal'))} GiB RAM, {gib(free)} GiB free on disk"
