"""Are the cards those of the inventory, in the order that it says, and can containers get them?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from corral.checks.registry import check
from corral.checks.rules import CUDA13_WORDS
from corral.errors import Finding
from corral.plan.devices import COMPILED, CUDA13_FLOOR
from corral.plan.own_image import is_own
from corral.plan.site import Card
from corral.runtime.causes import card_faults, cause_of
from corral.runtime.observe import SeenCard, card_at, card_of, short_slot, slot_of
from corral.units import gib
from corral.verbs.doctor.case import Case, error, hint, version_of, warning

CUDA13_DRIVER = 580
# Belongs to CUDA 12.8, which the pinned images are built with.
CUDA12_DRIVER = 570
# Minor-version compatibility: compiled code of every CUDA 12.x runs from here on, PTX does not.
CUDA12_OLDEST = 525
# The last driver branch for Maxwell, Pascal and Volta.
LAST_BEFORE_TURING = 580
VRAM_TOLERANCE = 0.1
INSTALL_TOOLKIT = (
    "install nvidia-container-toolkit, run sudo nvidia-ctk runtime configure --runtime=docker, restart docker"
)
_XID = re.compile(r"^NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)", re.MULTILINE)
gpus = partial(check, "running", section="gpus")


def _cards(case: Case) -> list[Card]:
    return [card for card in case.plan.site.cards[case.name] if card.has_nvidia_smi]


@gpus("gpu-driver", "cards", remedy="install the NVIDIA driver, or reboot after an update of it")
def gpu_driver(case: Case) -> Iterator[Finding]:
    """The NVIDIA driver answers."""
    words = case.seen.cards_problem
    if not _cards(case):
        return
    if case.has_cpu_variant:
        yield hint("the servers run on the processor (compose.cpu.yaml), not on the cards")
    elif cause := cause_of(words, "nvidia-smi"):
        yield error(f"{cause.what}: {words}", cause.remedy)
    elif not case.seen.cards:
        remedy = "install the NVIDIA driver, or start with compose.cpu.yaml on a machine without cards"
        yield error("the plan has cards, but nvidia-smi is not on this machine", remedy)


@gpus("gpu-runtime", "cards", "engine", remedy=INSTALL_TOOLKIT)
def gpu_runtime(case: Case) -> Iterator[str]:
    """The engine can hand NVIDIA cards to containers."""
    devices = [str(item.get("ID", "")) for item in case.info.get("DiscoveredDevices") or []]
    has_cdi = any(item.startswith("nvidia.com/gpu") for item in devices)
    is_there = has_cdi or "nvidia" in (case.info.get("Runtimes") or {}) or case.said("hook")
    has_nvidia = any(card.vendor == "nvidia" for card in case.plan.site.cards[case.name])
    if has_nvidia and not case.has_cpu_variant and not is_there:
        yield "the engine has no NVIDIA runtime"


@gpus("device-files", "cards", remedy="install the kernel driver of the cards: amdgpu, i915 or xe")
def device_files(case: Case) -> Iterator[Finding]:
    """The device files of AMD and Intel cards are there, and containers are in the groups that own them."""
    there = {name: int(group) for name, group in re.findall(r"(\S+) (\d+)", case.said("devices"))}
    for service in case.services:
        missing = [path for path in service.devices if not any(name.startswith(path) for name in there)]
        wanted = {group for name, group in there.items() if name.startswith(service.devices)}
        closed = sorted(wanted - {*service.groups, 0})
        if missing and not case.has_cpu_variant:
            words = f"{service.name} wants {' and '.join(missing)}, which this machine lacks"
            slots = ", or correct its pci, as lspci -D prints it" if any(":" in path for path in missing) else ""
            yield error(words, f"install the kernel driver of the card (amdgpu, i915, xe), then reboot{slots}")
        if closed:
            numbers = " and ".join(map(str, closed))
            words = f"{service.name} may not open its card: the device files belong to group {numbers}"
            groups = ", ".join(map(str, sorted({*service.groups, *closed})))
            yield error(words, f"write hosts.{case.name}.device_groups: [{groups}]")


@gpus("driver-version", "cards", remedy="install a driver that fits image and card")
def driver_version(case: Case) -> Iterator[Finding]:
    """The driver is new enough for the images, and still knows the cards."""
    if not case.seen.cards:
        return
    driver = case.seen.cards[0].driver
    major = (version_of(driver) or (0,))[0]
    cards = [card for card in _cards(case) if card.compute_capability]
    services = [item for item in case.services if item.gpus and not is_own(item.image) and "vulkan" not in item.image]
    for image in sorted({item.image for item in services}):
        numbers = {claim.number for item in services if item.image == image for claim in item.gpus}
        yield from _image_against_driver(image, driver, major, [card for card in cards if card.number in numbers])
    old = sorted({card.card for card in cards if card.compute_capability and card.compute_capability < CUDA13_FLOOR})
    if old and major > LAST_BEFORE_TURING:
        remedy = f"install the branch {LAST_BEFORE_TURING}, the last one for cards before Turing, and hold it"
        yield error(f"driver {driver} no longer knows {', '.join(old)}", remedy)


def _image_against_driver(image: str, driver: str, major: int, cards: list[Card]) -> Iterator[Finding]:
    without_code = sorted({card.card for card in cards if card.compute_capability not in COMPILED})
    remedy = f"install driver {CUDA12_DRIVER} to {LAST_BEFORE_TURING}"
    if any(word in image for word in CUDA13_WORDS):
        if major < CUDA13_DRIVER:
            remedy = f"install driver {CUDA13_DRIVER} or newer, or name a CUDA 12 image in images:"
            yield error(f"driver {driver} is too old for {image}, which needs {CUDA13_DRIVER}", remedy)
    elif major < CUDA12_OLDEST or (major < CUDA12_DRIVER and without_code):
        reason = f"; {', '.join(without_code)} needs it to compile for the card" if without_code else ""
        remedy += ", or build an image with code for the card (docs/own-image.md)" if without_code else ""
        yield error(f"driver {driver} is too old for {image} (CUDA 12.8 wants {CUDA12_DRIVER}){reason}", remedy)
    elif major < CUDA12_DRIVER:
        words = f"driver {driver} runs {image} only by minor-version compatibility (CUDA 12.8 wants {CUDA12_DRIVER})"
        yield warning(words, remedy)


@gpus("card-there", "cards", remedy="reseat the card, or correct hosts.….gpus")
def card_there(case: Case) -> Iterator[Finding]:
    """Every card of the inventory is in the machine."""
    seen, wanted = case.seen.cards, _cards(case)
    if not seen:
        return
    for card in wanted:
        if card_of(card, seen) is None and card.pinned_by != "index":
            near = card_at(card, seen)
            there = f"; at that place is {near.uuid} in slot {short_slot(near.pci)}" if near else ""
            words = f"GPU {card.number} ({card.pinned_by} {card.device}) is not in this machine{there}"
            yield error(words, "reseat it and reboot, or correct its uuid and pci in the inventory")
    if len(seen) < len(wanted):
        words = f"{len(seen)} of {len(wanted)} cards answer"
        yield error(words, "look at riser and power, reboot; card-errors names one that fell off the bus")
    elif len(seen) > len(wanted):
        words = f"the machine has {len(seen)} cards, the inventory {len(wanted)}"
        yield hint(words, f"add them to hosts.{case.name}.gpus to use them")


@gpus("card-errors", "cards", remedy="reset the card, reboot the host or reseat it, as the error says")
def card_errors(case: Case) -> Iterator[Finding]:
    """The kernel has no message (Xid) of this boot about an error from which a card does not recover by itself."""
    seen = {slot_of(item.pci)[:3]: item for item in case.seen.cards}
    for slot, code in dict.fromkeys(_XID.findall(case.said("xids"))):
        fault, there = card_faults().get(int(code)), seen.get(slot_of(slot)[:3])
        if fault:
            card = next((card for card in _cards(case) if there and card_of(card, case.seen.cards) == there), None)
            name = f"GPU {card.number}" if card else "a card"
            words = f"{name} in slot {short_slot(slot)}: {fault.what} (Xid {code}) since the host was started"
            yield error(words, fault.remedy, level="warning" if there else "error")


@gpus("card-order", "cards", remedy="pin every card by its uuid")
def card_order(case: Case) -> Iterator[Finding]:
    """An index still means the card that the inventory means (it changes with reboots and card swaps)."""
    seen = case.seen.cards
    for card in _cards(case):
        near, pinned = card_at(card, seen), card_of(card, seen)
        if near and card.uuid and card.pci and pinned and slot_of(pinned.pci) != slot_of(card.pci):
            words = f"GPU {card.number} moved from slot {card.pci} to {short_slot(pinned.pci)}"
            yield warning(words, "correct its pci in the inventory")
        if near and card.pinned_by == "index" and (why := _differs(card, near)):
            words = f"index {card.index} is not the card that the inventory means by GPU {card.number}: {why}"
            yield error(words, f"correct the order or the card in the inventory, and pin it: uuid: {near.uuid}")
    if len(seen) > 1 and any(card.pinned_by == "index" for card in _cards(case)):
        lines = ", ".join(f"GPU {item.index + 1} uuid: {item.uuid}" for item in seen)
        yield hint("cards are named by index, which can change with every reboot", f"pin them: {lines}")


def _differs(card: Card, seen: SeenCard) -> str:
    """Why a card cannot be the one that is meant; empty when it may be."""
    if card.compute_capability and seen.compute_capability and card.compute_capability != seen.compute_capability:
        return f"it is a {seen.name}, not a {card.card}"
    if seen.total_mib and abs(seen.total_mib - card.vram_mib) > card.vram_mib * VRAM_TOLERANCE:
        return f"it is a {seen.name} with {gib(seen.total_mib)} GiB, not a {card.card} with {gib(card.vram_mib)}"
    return ""


@gpus("card-kind", "cards", remedy="correct card, vram_gib or compute_capability")
def card_kind(case: Case) -> Iterator[Finding]:
    """Memory and compute capability of every card are as the plan counts on."""
    for card in _cards(case):
        seen = card_of(card, case.seen.cards)
        if seen is None or card.pinned_by == "index":  # card-order says it then
            continue
        name, place = f"GPU {card.number} ({seen.name})", f"hosts.{case.name}.gpus[{card.number - 1}].card"
        if 0 < seen.total_mib < card.vram_mib * (1 - VRAM_TOLERANCE):
            words = f"{name} has {gib(seen.total_mib)} GiB, the plan counts on {gib(card.vram_mib)}"
            yield error(words, f"correct {place} or vram_gib")
        if seen.compute_capability and card.compute_capability and seen.compute_capability != card.compute_capability:
            have, want = (".".join(map(str, item)) for item in (seen.compute_capability, card.compute_capability))
            words = f"{name} has compute capability {have}, the plan counts on {want} ({card.card})"
            yield error(words, f"correct {place}; the image depends on it")


def summary(case: Case) -> str:
    """What was found, when all is well."""
    cards = case.seen.cards
    if not case.has("cards"):
        return "none in the plan"
    return f"{len(cards)} cards, driver {cards[0].driver}" if cards else "on the processor"
