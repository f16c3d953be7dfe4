"""Is the machine what the inventory says: address, processor, memory, disk, clock, ports?"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from corral.units import gib
from corral.verbs.doctor.checks import Case, Finding, check

DISK_ERROR_MIB, DISK_WARNING_MIB = 1024, 5 * 1024
# Firmware and graphics keep some of what is sold as 32 GiB.
RAM_TOLERANCE = 0.06
SKEW_WARNING_S, SKEW_ERROR_S = 2, 60
X86 = ("x86_64", "amd64")
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


@check("address", "machine", "correct hosts.….address", "engine")
def address(case: Case) -> Iterator[Finding]:
    """The host's address in the inventory is one of the machine's own."""
    wanted = case.plan.site.host(case.name).address
    own = case.facts.addresses
    if own and wanted not in own and not ipaddress.ip_address(wanted).is_loopback:
        others = ", ".join(sorted(item for item in own if not _is_internal(item))) or "none"
        yield Finding(
            f"{wanted} is not an address of this machine; it has {others}", f"correct hosts.{case.name}.address"
        )


def _is_internal(text: str) -> bool:
    """Loopback, link-local and Docker's own bridges."""
    item = ipaddress.ip_address(text)
    return item.is_loopback or item.is_link_local or item in ipaddress.ip_network("172.16.0.0/12")


@check("cpu", "machine", "write cpu: {avx: false}, or the right number of cores")
def cpu(case: Case) -> Iterator[Finding]:
    """AVX and the number of cores are as the inventory says."""
    facts, host = case.facts, case.plan.site.host(case.name)
    if host.cpu.avx and facts.machine in X86 and facts.cpu_flags and "avx" not in facts.cpu_flags:
        remedy = f"write hosts.{case.name}.cpu: {{avx: false}}; plan then says what cannot run here"
        yield Finding("this processor has no AVX, but the inventory says so", remedy)
    if host.cpu.cores and facts.cores and host.cpu.cores > facts.cores:
        remedy = f"correct hosts.{case.name}.cpu.cores and engine.threads"
        yield Finding(f"the inventory says {host.cpu.cores} cores, the machine has {facts.cores}", remedy, "warning")


@check("ram", "machine", "correct ram_gib, lower memory_mib or move a pool")
def ram(case: Case) -> Iterator[Finding]:
    """The machine has the RAM that the inventory says, and all container limits fit into it."""
    host, has = case.plan.site.host(case.name), case.facts.ram_mib
    if not has:
        return
    wanted = sum(service.memory_mib for service in case.plan.services_of(case.name))
    room = has - round(host.os_reserve_gib * 1024)
    if wanted > room:
        words = f"the containers may take {gib(wanted)} GiB; of {gib(has)} GiB {gib(max(0, room))} are for them"
        yield Finding(words, "lower memory_mib, move a pool, or add RAM", "error" if wanted > has else "warning")
    elif host.ram_gib and has < host.ram_gib * 1024 * (1 - RAM_TOLERANCE):
        words = f"the inventory says {host.ram_gib:g} GiB of RAM, the machine has {gib(has)}"
        yield Finding(words, f"correct hosts.{case.name}.ram_gib", "warning")


@check("swap", "machine", "add swap, or remove memory_swap_mib")
def swap(case: Case) -> Iterator[Finding]:
    """There is swap where containers may use some."""
    users = [item for item in case.plan.services_of(case.name) if item.memory_swap_mib > item.memory_mib]
    most = max((item.memory_swap_mib - item.memory_mib for item in users), default=0)
    if case.facts.ram_mib and case.facts.swap_mib < most:
        words = f"containers may use {most} MiB of swap each, the machine has {case.facts.swap_mib}"
        yield Finding(words, "add swap, or remove memory_swap_mib from the inventory", "warning")


@check("disk", "machine", "free some space")
def disk(case: Case) -> Iterator[Finding]:
    """At least 5 GiB are free where the engine, the models and the rendering lie."""
    by_mount = {item.mount: item for item in case.facts.filesystems}
    for item in by_mount.values():
        if item.free_mib < DISK_WARNING_MIB:
            purposes = " and ".join(other.purpose for other in case.facts.filesystems if other.mount == item.mount)
            words = f"{gib(item.free_mib)} GiB are left on {item.mount} ({purposes})"
            remedy = "docker system df shows what images take; remove old models and images"
            yield Finding(words, remedy, "error" if item.free_mib < DISK_ERROR_MIB else "warning")


@check("clock", "machine", "switch a time service on")
def clock(case: Case) -> Iterator[Finding]:
    """The clock is set by a time service and agrees with this machine's."""
    if case.facts.is_clock_synchronised is False:
        yield Finding("no time service sets the clock", "sudo timedatectl set-ntp true", "warning")
    ahead = case.facts.clock_ahead_s
    if ahead is not None and abs(ahead) > SKEW_WARNING_S:
        words = f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        remedy = "sudo timedatectl set-ntp true on both"
        yield Finding(words, remedy, "error" if abs(ahead) > SKEW_ERROR_S else "warning")


@check("ports", "machine", "stop the other program or choose another port", "engine")
def ports(case: Case) -> Iterator[Finding]:
    """Every published port is free or held by the service that it is meant for."""
    for service in case.plan.services_of(case.name):
        container = case.seen.container_of(service.name, case.host.project)
        held = {number for _, number in container.published} if container else set()
        for port in service.ports:
            if not port.publish or port.number in held:
                continue
            others = set(case.facts.listeners.get(port.number, ()))
            if others & {port.publish, *EVERYWHERE}:
                who = case.facts.holders.get(port.number, "a program that only root can see")
                words = f"port {port.number} ({service.name}) is taken by {who}"
                yield Finding(words, "stop it, or choose another port in the inventory")


def summary(case: Case) -> str:
    """What was found, when all is well."""
    facts = case.facts
    avx = "" if facts.machine not in X86 else ", AVX" if "avx" in facts.cpu_flags else ", no AVX"
    free = min((item.free_mib for item in facts.filesystems), default=0)
    parts = [f"{facts.cores} cores{avx}", f"{gib(facts.ram_mib)} GiB RAM", f"{gib(free)} GiB free on disk"]
    return ", ".join(parts)
