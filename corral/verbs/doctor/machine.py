"""Is the host there with a Docker that is new enough, and is the machine what the inventory says?"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from functools import partial

from corral.checks.registry import check
from corral.contributions import Port
from corral.errors import Finding
from corral.runtime.causes import cause_of, last_line
from corral.units import gib
from corral.verbs.doctor.case import Case, error, json_of, version_of, warning

# Id of the check that everything else rests on.
REACHABLE = "host-reachable"
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
X86 = ("x86_64", "amd64")
EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - what Docker calls all addresses
_DISK = re.compile(r"^(\w+) .*?\s(\d+)\s+[\d-]+%?\s+(/.*)$", re.MULTILINE)
# Of `ss`: address, port, program, process.
_LISTENER = re.compile(r'^(?:\S+\s+){3}(\S+):(\d+)\s+\S+(?:.*?\(\("([^"]+)",pid=(\d+))?', re.MULTILINE)
engine = partial(check, "running", section="engine")
machine = partial(check, "running", section="machine")


@engine(REACHABLE, remedy="make `ssh HOST true` work without a password")
def host_reachable(case: Case) -> Iterator[Finding]:
    """The host can be reached, by ssh when it is another one."""
    if not case.seen.is_reached:
        remedy = f"make `ssh {case.host.ssh} true` work without a password" if case.host.ssh else ""
        yield error(case.seen.problem, remedy)


@engine("engine-answers", remedy="install Docker, start it, or join the group docker")
def engine_answers(case: Case) -> Iterator[Finding]:
    """Docker is installed, runs, and may be used by this user."""
    words = case.seen.problem
    cause = cause_of(words, "docker")
    if not words:
        return
    if "permission denied" in words.lower():
        yield _no_permission(*(case.said("user").splitlines() + 3 * [""])[:3])
    elif cause:
        yield error(cause.what, cause.remedy)
    else:
        yield error(f"Docker does not answer: {last_line(words)}", "sudo systemctl status docker says more")


def _no_permission(user: str, groups: str, next_groups: str) -> Finding:
    remedy = f"sudo usermod -aG docker {user}, then log out and in (members of the group have the rights of root)"
    if "docker" in {*next_groups.split()} - {*groups.split()}:
        remedy = "the user is in the group docker, but only from the next login on: log out and in"
    return error(f"user {user} may not use Docker", remedy)


@engine("engine-version", "engine", remedy="install a newer Docker Engine")
def engine_version(case: Case) -> Iterator[Finding]:
    """Docker Engine is 25 or newer: older ones refuse the health checks."""
    found = case.info.get("ServerVersion", "")
    if found and version_of(found) < ENGINE_FLOOR:
        words = f"Docker Engine {found} is older than 25"
        yield error(words, "install a newer one from docs.docker.com or your distribution")
    elif (
        found
        and version_of(found) < IPV6_FLOOR
        and case.plan.site.has_ipv6
        and not case.info.get("DefaultAddressPools")
    ):
        words = f"Docker Engine {found} is older than 27 and gives networks no IPv6 addresses by itself"
        yield error(words, "install a newer one, or write default-address-pools with an IPv6 range into daemon.json")


@engine("compose-version", "engine", remedy="install a newer Compose plugin")
def compose_version(case: Case) -> Iterator[Finding]:
    """The Compose plugin is there, 2.24 or newer."""
    found = _compose(case)
    version = found.get("Version", "")
    if not version:
        yield error(f"no Compose plugin: {found.get('Err', 'Docker knows none')}", "install docker-compose-plugin")
    elif version_of(version) < COMPOSE_FLOOR:
        yield error(f"Compose {version} is older than 2.24", "install a newer docker-compose-plugin")
    elif version_of(version) < COMPOSE_FOR_SLOTS and any(
        ":" in path for item in case.services for path in item.devices
    ):
        words = f"Compose {version} cannot hand in a card by its PCI slot; 2.30 can"
        yield error(words, "install a newer docker-compose-plugin")


def _compose(case: Case) -> dict[str, str]:
    """What Docker knows of its Compose plugin: `Version`, or `Err` with what is wrong with it."""
    plugins: list[dict[str, str]] = (case.info.get("ClientInfo") or {}).get("Plugins") or []
    return next((item for item in plugins if item.get("Name") == "compose"), {})


@engine("limits-supported", "engine", remedy="switch the kernel's memory controller on")
def limits_supported(case: Case) -> Iterator[Finding]:
    """The kernel can limit memory, swap and processes of containers."""
    info = case.info
    if info.get("MemoryLimit") is False:
        remedy = "add cgroup_enable=memory to the kernel's command line, reboot"
        yield error("this kernel does not limit the memory of containers", remedy)
    elif info.get("SwapLimit") is False and case.mib("SwapTotal"):
        remedy = "add swapaccount=1 to the kernel's command line, reboot"
        yield warning("this kernel does not limit the swap of containers", remedy)
    if info.get("PidsLimit") is False:
        yield warning("this kernel does not limit the number of processes of containers")


@machine("selinux", "engine", remedy="write selinux: true for the host")
def selinux(case: Case) -> Iterator[Finding]:
    """The inventory says whether Docker confines containers by SELinux."""
    is_on = any("name=selinux" in item for item in case.info.get("SecurityOptions") or ())
    if is_on and not case.declared.selinux:
        words = "SELinux keeps containers from files that are not labelled for them"
        yield error(words, f"write hosts.{case.name}.selinux: true")
    elif case.declared.selinux and not is_on:
        yield warning("Docker does not use SELinux here", "remove selinux, or set selinux-enabled in daemon.json")


@machine("address", "engine", remedy="correct hosts.….address")
def address(case: Case) -> Iterator[Finding]:
    """The host's address in the inventory is one of the machine's own."""
    wanted = case.declared.address
    links: list[dict[str, list[dict[str, str]]]] = json_of(case.said("addresses"), [])
    own = {item["local"] for link in links for item in link["addr_info"] if "local" in item}
    if own and wanted not in own and not ipaddress.ip_address(wanted).is_loopback:
        others = ", ".join(sorted(item for item in own if not _is_internal(item))) or "none"
        words = f"{wanted} is not an address of this machine; it has {others}"
        yield error(words, f"correct hosts.{case.name}.address")


def _is_internal(text: str) -> bool:
    """Loopback, link-local and Docker's own bridges."""
    item = ipaddress.ip_address(text)
    return item.is_loopback or item.is_link_local or item in ipaddress.ip_network("172.16.0.0/12")


@machine("cpu", remedy="write cpu: {avx: false}, or the right number of cores")
def cpu(case: Case) -> Iterator[Finding]:
    """AVX and the number of cores are as the inventory says."""
    declared = case.declared.cpu
    cores, has_avx = _processor(case)
    if declared.avx and has_avx is False:
        remedy = f"write hosts.{case.name}.cpu: {{avx: false}}; plan then says what cannot run here"
        yield error("this processor has no AVX, but the inventory says so", remedy)
    if declared.cores and cores and declared.cores > cores:
        remedy = f"correct hosts.{case.name}.cpu.cores and engine.threads"
        yield warning(f"the inventory says {declared.cores} cores, the machine has {cores}", remedy)


def _processor(case: Case) -> tuple[int, bool | None]:
    """How many cores there are, and whether they have AVX; None where no processor has it, or it is not known."""
    kind, cores, flags = (case.said("cpu").splitlines() + 3 * [""])[:3]
    words = flags.partition(":")[2].split()
    return int(cores) if cores.isdecimal() else 0, "avx" in words if words and kind in X86 else None


@machine("ram", remedy="correct ram_gib, lower memory_mib or move a pool")
def ram(case: Case) -> Iterator[Finding]:
    """The machine has the RAM that the inventory says, and all container limits fit into it."""
    declared, has = case.declared, case.mib("MemTotal")
    wanted = sum(service.memory_mib for service in case.services)
    room = has - round(declared.os_reserve_gib * 1024)
    # What the firmware set aside for a processor's graphics, the system does not count.
    is_shared = any(card.unified_memory for card in case.plan.site.cards[case.name])
    if has and wanted > room:
        words = f"the containers may take {gib(wanted)} GiB; of {gib(has)} GiB {gib(max(0, room))} are for them"
        remedy = "lower memory_mib, move a pool, or add RAM"
        yield error(words, remedy, level="error" if wanted > has else "warning")
    elif has and declared.ram_gib and not is_shared and has < declared.ram_gib * 1024 * (1 - RAM_TOLERANCE):
        words = f"the inventory says {declared.ram_gib:g} GiB of RAM, the machine has {gib(has)}"
        yield warning(words, f"correct hosts.{case.name}.ram_gib")


@machine("swap", remedy="add swap, or remove memory_swap_mib")
def swap(case: Case) -> Iterator[Finding]:
    """There is swap where containers may use some."""
    most = max((item.memory_swap_mib - item.memory_mib for item in case.services if item.memory_swap_mib), default=0)
    has = case.mib("SwapTotal")
    if case.mib("MemTotal") and has < most:
        words = f"containers may use {most} MiB of swap each, the machine has {has}"
        yield warning(words, "add swap, or remove memory_swap_mib from the inventory")


@machine("disk", remedy="free some space")
def disk(case: Case) -> Iterator[Finding]:
    """At least 5 GiB are free where the engine, the models and the rendering lie."""
    for place, (free, purposes) in _room(case).items():
        if free < DISK_WARNING_MIB:
            words = f"{gib(free)} GiB are left on {place} ({' and '.join(purposes)})"
            remedy = "docker system df shows what images take; remove old models and images"
            yield error(words, remedy, level="error" if free < DISK_ERROR_MIB else "warning")


def _room(case: Case) -> dict[str, tuple[int, list[str]]]:
    """MiB that are free and what lies there, by mount point."""
    found: dict[str, tuple[int, list[str]]] = {}
    for purpose, kib, mount in _DISK.findall(case.said("disks")):
        found[mount] = (int(kib) // 1024, [*found.get(mount, (0, []))[1], purpose])
    return found


@machine("clock", remedy="switch a time service on")
def clock(case: Case) -> Iterator[Finding]:
    """The clock is set by a time service and agrees with this machine's."""
    leap = re.search(r"leap status\s*:\s*(.+)", case.said("time-service").lower())
    if case.said("time-service") == "no" or (leap and leap[1].strip() != "normal"):
        yield warning("no time service sets the clock", "sudo timedatectl set-ntp true")
    told = re.match(r"\d+(\.\d+)?", case.said("clock")) if case.host.ssh else None
    ahead = float(told[0]) - case.seen.moment if told else 0
    if abs(ahead) > SKEW_WARNING_S:
        words = f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        remedy = "sudo timedatectl set-ntp true on both"
        yield error(words, remedy, level="error" if abs(ahead) > SKEW_ERROR_S else "warning")


@machine("ports", "engine", remedy="stop the other program or choose another port")
def ports(case: Case) -> Iterator[Finding]:
    """Every published port is free or held by the service that it is meant for."""
    for service in case.services:
        container = case.container_of(service)
        held = {number for _, number in container.published} if container else set()
        for port in service.ports:
            if port.publish and port.number not in held and (holder := _holder(case, port)):
                words = f"port {port.number} ({service.name}) is taken by {holder}"
                yield error(words, "stop it, or choose another port in the inventory")


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


def engine_summary(case: Case) -> str:
    """What was found, when all is well."""
    return f"Docker {case.info.get('ServerVersion', '')}, Compose {_compose(case).get('Version', '')}"


def summary(case: Case) -> str:
    """What was found, when all is well."""
    cores, has_avx = _processor(case)
    avx = "" if has_avx is None else ", AVX" if has_avx else ", no AVX"
    free = min((free for free, _ in _room(case).values()), default=0)
    return f"{cores} cores{avx}, {gib(case.mib('MemTotal'))} GiB RAM, {gib(free)} GiB free on disk"
