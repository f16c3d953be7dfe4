"""Are the cards those of the inventory, in the order that it says, and can containers get them?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from corral.checks.rules import CUDA13_WORDS
from corral.plan.devices import COMPILED, CUDA13_FLOOR
from corral.plan.own_image import is_own
from corral.plan.site import Card
from corral.runtime.causes import OFF_THE_BUS
from corral.runtime.observe import SeenCard, card_at, card_of, short_slot, slot_of
from corral.units import gib
from corral.verbs.doctor.checks import Case, Finding, check

CUDA13_DRIVER = 580
# Belongs to CUDA 12.8, which the pinned images are built with.
CUDA12_DRIVER = 570
# Minor-version compatibility: compiled code of every CUDA 12.x runs from here on, PTX does not.
CUDA12_OLDEST = 525
# The last driver branch for Maxwell, Pascal and Volta.
LAST_BEFORE_TURING = 580
VRAM_TOLERANCE = 0.1
RESET = "stop what runs on it, nvidia-smi --gpu-reset -i INDEX, or reboot the host"
# Errors (Xid) from which a card does not recover by itself, as in monitoring/rules/gpu.yml, and what helps.
XIDS = {
    48: ("memory error that cannot be corrected", f"{RESET}; if it comes back, replace the card"),
    62: ("its own processor halted", "reboot the host; if it comes back, replace the card"),
    64: ("memory rows cannot be replaced", f"{RESET}; if it comes back, replace the card"),
    74: ("link error", f"{RESET}; if it comes back, reseat the card and its bridge"),
    79: ("fell off the bus", OFF_THE_BUS),
    95: ("memory error that spread", f"{RESET}; if it comes back, replace the card"),
    119: ("its firmware does not answer", "reboot the host; if it comes back, install another driver"),
    120: ("its firmware failed", "reboot the host; if it comes back, install another driver"),
}
INSTALL_TOOLKIT = (
    "install nvidia-container-toolkit, run sudo nvidia-ctk runtime configure --runtime=docker, restart docker"
)


def _cards(case: Case) -> list[Card]:
    return [card for card in case.plan.site.cards[case.name] if card.vendor == "nvidia"]


def runs_on_cpu(case: Case) -> bool:
    """Whether the host was started with the variant for machines without cards."""
    wanted = {item.name for item in case.plan.services_of(case.name) if item.gpus}
    found = [item for item in case.seen.containers if item.project == case.host.project and item.service in wanted]
    return bool(found) and not any(item.devices for item in found)


@check("gpu-driver", "gpus", "install the NVIDIA driver, or reboot after an update of it", "gpus")
def gpu_driver(case: Case) -> Iterator[Finding]:
    """The NVIDIA driver answers."""
    if not _cards(case):
        return
    if runs_on_cpu(case):
        yield Finding("the servers run on the processor (compose.cpu.yaml), not on the cards", level="hint")
        return
    words = case.seen.cards_problem
    if "version mismatch" in words:
        yield Finding("the NVIDIA driver was updated under the running kernel module", "reboot the host")
    elif re.search(r"lost|fallen off the bus|Unable to determine the device handle", words, re.IGNORECASE):
        yield Finding(f"a card was lost: {words}", "reboot the host; if it comes back, look at riser, power and heat")
    elif words:
        yield Finding(f"nvidia-smi says: {words}", "install or load the NVIDIA driver, then reboot")
    elif not case.seen.cards:
        remedy = "install the NVIDIA driver, or start with compose.cpu.yaml on a machine without cards"
        yield Finding("the plan has cards, but nvidia-smi is not on this machine", remedy)


@check("gpu-runtime", "gpus", INSTALL_TOOLKIT, "gpus", "engine")
def gpu_runtime(case: Case) -> Iterator[Finding]:
    """The engine can hand NVIDIA cards to containers."""
    info = case.facts.info
    devices = [str(item.get("ID", "")) for item in info.get("DiscoveredDevices") or []]
    has_cdi = any(item.startswith("nvidia.com/gpu") for item in devices)
    if not _cards(case) or runs_on_cpu(case) or "nvidia" in (info.get("Runtimes") or {}):
        return
    if not has_cdi and not case.facts.has_nvidia_hook:
        yield Finding("the engine has no NVIDIA runtime", INSTALL_TOOLKIT)


@check("device-files", "gpus", "install the kernel driver of the cards: amdgpu, i915 or xe", "gpus")
def device_files(case: Case) -> Iterator[Finding]:
    """The device files of AMD and Intel cards are there, and containers are in the groups that own them."""
    there = case.facts.device_files
    for service in case.plan.services_of(case.name):
        missing = [path for path in service.devices if not any(name.startswith(path) for name in there)]
        closed = {
            group
            for name, group in there.items()
            if name.startswith(service.devices) and group not in (*service.groups, 0)
        }
        if missing and service.devices and not runs_on_cpu(case):
            words = f"{service.name} wants {' and '.join(missing)}, which this machine lacks"
            yield Finding(words, "install the kernel driver of the card (amdgpu, i915, xe), then reboot")
        if closed:
            groups = ", ".join(map(str, sorted({*service.groups, *closed})))
            words = f"{service.name} may not open its card: the device files belong to group {_numbers(closed)}"
            yield Finding(words, f"write hosts.{case.name}.device_groups: [{groups}]")


def _numbers(groups: set[int]) -> str:
    return " and ".join(map(str, sorted(groups)))


@check("driver-version", "gpus", "install a driver that fits image and card", "gpus")
def driver_version(case: Case) -> Iterator[Finding]:
    """The driver is new enough for the images, and still knows the cards."""
    if not case.seen.cards:
        return
    driver = case.seen.cards[0].driver
    major = int(driver.partition(".")[0]) if driver.partition(".")[0].isdecimal() else 0
    cards = [card for card in _cards(case) if card.compute_capability]
    services = [item for item in case.plan.services_of(case.name) if item.gpus]
    for image in sorted({item.image for item in services if not is_own(item.image)}):
        numbers = {claim.number for item in services if item.image == image for claim in item.gpus}
        yield from _image_against_driver(image, driver, major, [card for card in cards if card.number in numbers])
    old = sorted({card.card for card in cards if card.compute_capability and card.compute_capability < CUDA13_FLOOR})
    if old and major > LAST_BEFORE_TURING:
        words = f"driver {driver} no longer knows {', '.join(old)}"
        yield Finding(
            words, f"install the branch {LAST_BEFORE_TURING}, the last one for cards before Turing, and hold it"
        )


def _image_against_driver(image: str, driver: str, major: int, cards: list[Card]) -> Iterator[Finding]:
    if any(word in image for word in CUDA13_WORDS):
        if major < CUDA13_DRIVER:
            remedy = f"install driver {CUDA13_DRIVER} or newer, or name a CUDA 12 image in images:"
            yield Finding(f"driver {driver} is too old for {image}, which needs {CUDA13_DRIVER}", remedy)
        return
    if major >= CUDA12_DRIVER:
        return
    remedy = f"install driver {CUDA12_DRIVER} to {LAST_BEFORE_TURING}"
    without_code = sorted({card.card for card in cards if card.compute_capability not in COMPILED})
    if major < CUDA12_OLDEST or without_code:
        reason = f"; {', '.join(without_code)} needs it to compile for the card" if without_code else ""
        remedy += ", or build an image with code for the card (docs/own-image.md)" if without_code else ""
        yield Finding(f"driver {driver} is too old for {image} (CUDA 12.8 wants {CUDA12_DRIVER}){reason}", remedy)
    else:
        words = f"driver {driver} runs {image} only by minor-version compatibility (CUDA 12.8 wants {CUDA12_DRIVER})"
        yield Finding(words, remedy, "warning")


@check("card-there", "gpus", "reseat the card, or correct hosts.….gpus", "gpus")
def card_there(case: Case) -> Iterator[Finding]:
    """Every card of the inventory is in the machine."""
    seen = case.seen.cards
    if not seen:
        return
    wanted = _cards(case)
    for card in wanted:
        pinned = card_of(card, seen)
        if card.pinned_by != "index" and pinned is None:
            near = card_at(card, seen)
            there = f"; at that place is {near.uuid} in slot {short_slot(near.pci)}" if near else ""
            words = f"GPU {card.number} ({card.pinned_by} {card.device}) is not in this machine{there}"
            yield Finding(words, "reseat it and reboot, or correct its uuid and pci in the inventory")
    if len(seen) < len(wanted):
        words = f"{len(seen)} of {len(wanted)} cards answer"
        yield Finding(words, "look at riser and power, reboot; card-errors names one that fell off the bus")
    elif len(seen) > len(wanted):
        words = f"the machine has {len(seen)} cards, the inventory {len(wanted)}"
        yield Finding(words, f"add them to hosts.{case.name}.gpus to use them", "hint")


@check("card-errors", "gpus", "reset the card, reboot the host or reseat it, as the error says", "gpus")
def card_errors(case: Case) -> Iterator[Finding]:
    """The kernel has no message (Xid) of this boot about an error from which a card does not recover by itself."""
    there = {slot_of(item.pci)[:3] for item in case.seen.cards}
    for xid in {(item.pci, item.code): item for item in case.facts.xids if item.code in XIDS}.values():
        what, remedy = XIDS[xid.code]
        place = slot_of(xid.pci)[:3]
        numbers = [
            card.number
            for card in _cards(case)
            if (seen := card_of(card, case.seen.cards)) and slot_of(seen.pci)[:3] == place
        ]
        name = f"GPU {numbers[0]}" if numbers else "a card"
        words = f"{name} in slot {short_slot(xid.pci)}: {what} (Xid {xid.code}) since the host was started"
        yield Finding(words, remedy, "warning" if place in there else "error")


@check("card-order", "gpus", "pin every card by its uuid", "gpus")
def card_order(case: Case) -> Iterator[Finding]:
    """An index still means the card that the inventory means (it changes with reboots and card swaps)."""
    seen = case.seen.cards
    for card in _cards(case):
        near, pinned = card_at(card, seen), card_of(card, seen)
        if near is None:
            continue
        if card.uuid and card.pci and pinned and slot_of(pinned.pci) != slot_of(card.pci):
            words = f"GPU {card.number} moved from slot {card.pci} to {short_slot(pinned.pci)}"
            yield Finding(words, "correct its pci in the inventory", "warning")
        if card.pinned_by == "index" and (why := _differs(card, near)):
            words = f"index {card.index} is not the card that the inventory means by GPU {card.number}: {why}"
            yield Finding(words, f"correct the order or the card in the inventory, and pin it: uuid: {near.uuid}")
    if case.has("gpus") and len(seen) > 1 and any(card.pinned_by == "index" for card in _cards(case)):
        lines = ", ".join(f"GPU {item.index + 1} uuid: {item.uuid}" for item in seen)
        yield Finding("cards are named by index, which can change with every reboot", f"pin them: {lines}", "hint")


@check("card-kind", "gpus", "correct card, vram_gib or compute_capability", "gpus")
def card_kind(case: Case) -> Iterator[Finding]:
    """Memory and compute capability of every card are as the plan counts on."""
    for card in _cards(case):
        seen = card_of(card, case.seen.cards)
        if seen is None or card.pinned_by == "index":  # card-order says it then
            continue
        if seen.total_mib < card.vram_mib * (1 - VRAM_TOLERANCE):
            sizes = f"has {gib(seen.total_mib)} GiB, the plan counts on {gib(card.vram_mib)}"
            words = f"GPU {card.number} ({seen.name}) {sizes}"
            yield Finding(words, f"correct hosts.{case.name}.gpus[{card.number - 1}].card or vram_gib")
        if seen.compute_capability and card.compute_capability and seen.compute_capability != card.compute_capability:
            have, want = (".".join(map(str, item)) for item in (seen.compute_capability, card.compute_capability))
            sorts = f"has compute capability {have}, the plan counts on {want} ({card.card})"
            words = f"GPU {card.number} ({seen.name}) {sorts}"
            yield Finding(words, f"correct hosts.{case.name}.gpus[{card.number - 1}].card; the image depends on it")


def _differs(card: Card, seen: SeenCard) -> str:
    """Why a card cannot be the one that is meant; empty when it may be."""
    if card.compute_capability and seen.compute_capability and card.compute_capability != seen.compute_capability:
        return f"it is a {seen.name}, not a {card.card}"
    if abs(seen.total_mib - card.vram_mib) > card.vram_mib * VRAM_TOLERANCE:
        return f"it is a {seen.name} with {gib(seen.total_mib)} GiB, not a {card.card} with {gib(card.vram_mib)}"
    return ""


def summary(case: Case) -> str:
    """What was found, when all is well."""
    cards = case.seen.cards
    if not case.has("gpus"):
        return "none in the plan"
    return f"{len(cards)} cards, driver {cards[0].driver}" if cards else "on the processor"
