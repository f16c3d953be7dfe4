"""Are the cards those of the inventory, in the order that it says, and can containers get them?"""

from __future__ import annotations

import re

from corral.checks.registry import Findings
from corral.checks.rules import CUDA13_WORDS
from corral.errors import Level
from corral.plan.devices import COMPILED, CUDA13_FLOOR
from corral.plan.own_image import is_own
from corral.plan.site import Card
from corral.runtime.causes import card_faults, cause_of
from corral.runtime.observe import SeenCard, card_at, card_of, short_slot, slot_of
from corral.units import gib
from corral.verbs.doctor.case import Case, say, version_of

CUDA13_DRIVER = 580
# Belongs to CUDA 12.8, which the pinned images are built with.
CUDA12_DRIVER = 570
# Minor-version compatibility: compiled code of every CUDA 12.x runs from here on, PTX does not.
CUDA12_OLDEST = 525
# The last driver branch for Maxwell, Pascal and Volta.
LAST_BEFORE_TURING = 580
VRAM_TOLERANCE = 0.1
_XID = re.compile(r"^NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)", re.MULTILINE)


def _cards(case: Case) -> list[Card]:
    return [card for card in case.plan.site.cards[case.name] if card.has_nvidia_smi]


def gpu_driver(case: Case) -> Findings:
    """The NVIDIA driver answers."""
    words = case.seen.cards_problem
    if not _cards(case):
        return
    if case.has_cpu_variant:
        yield say("gpu-driver/unused")
    elif cause := cause_of(words, "nvidia-smi"):
        yield say("gpu-driver/silent", cause=cause, words=words)
    elif not case.seen.cards:
        yield say("gpu-driver/absent")


def gpu_runtime(case: Case) -> Findings:
    """The engine can hand NVIDIA cards to containers."""
    devices = [str(item.get("ID", "")) for item in case.info.get("DiscoveredDevices") or []]
    has_cdi = any(item.startswith("nvidia.com/gpu") for item in devices)
    is_there = has_cdi or "nvidia" in (case.info.get("Runtimes") or {}) or case.said("hook")
    has_nvidia = any(card.vendor == "nvidia" for card in case.plan.site.cards[case.name])
    if has_nvidia and not case.has_cpu_variant and not is_there:
        yield say("gpu-runtime/none")


def device_files(case: Case) -> Findings:
    """The device files of AMD and Intel cards are there, and containers are in the groups that own them."""
    there = {name: int(group) for name, group in re.findall(r"(\S+) (\d+)", case.said("devices"))}
    for service in case.services:
        missing = [path for path in service.devices if not any(name.startswith(path) for name in there)]
        wanted = {group for name, group in there.items() if name.startswith(service.devices)}
        closed = sorted(wanted - {*service.groups, 0})
        if missing and not case.has_cpu_variant:
            slots = ", or correct its pci, as lspci -D prints it" if any(":" in path for path in missing) else ""
            yield say("device-files/absent", service=service.name, missing=" and ".join(missing), slots=slots)
        if closed:
            numbers, groups = " and ".join(map(str, closed)), sorted({*service.groups, *closed})
            yield say("device-files/closed", service=service.name, numbers=numbers, name=case.name, groups=groups)


def driver_version(case: Case) -> Findings:
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
        yield say("driver-version/for-cards", driver=driver, cards=", ".join(old), last=LAST_BEFORE_TURING)


def _image_against_driver(image: str, driver: str, major: int, cards: list[Card]) -> Findings:
    without_code = sorted({card.card for card in cards if card.compute_capability not in COMPILED})
    values = {"driver": driver, "image": image, "least": CUDA12_DRIVER, "last": LAST_BEFORE_TURING}
    if any(word in image for word in CUDA13_WORDS):
        if major < CUDA13_DRIVER:
            yield say("driver-version/for-cuda13", new=CUDA13_DRIVER, **values)
    elif major < CUDA12_OLDEST or (major < CUDA12_DRIVER and without_code):
        reason = f"; {', '.join(without_code)} needs it to compile for the card" if without_code else ""
        own = ", or build an image with code for the card (docs/own-image.md)" if without_code else ""
        yield say("driver-version/for-cuda12", reason=reason, own=own, **values)
    elif major < CUDA12_DRIVER:
        yield say("driver-version/by-compatibility", **values)


def card_there(case: Case) -> Findings:
    """Every card of the inventory is in the machine."""
    seen, wanted = case.seen.cards, _cards(case)
    if not seen:
        return
    for card in wanted:
        if card_of(card, seen) is None and card.pinned_by != "index":
            near = card_at(card, seen)
            there = f"; at that place is {near.uuid} in slot {short_slot(near.pci)}" if near else ""
            yield say("card-there/absent", card=card, there=there)
    if len(seen) != len(wanted):
        text = f"card-there/{'fewer' if len(seen) < len(wanted) else 'more'}"
        yield say(text, seen=len(seen), wanted=len(wanted), name=case.name)


def card_errors(case: Case) -> Findings:
    """The kernel has no message (Xid) of this boot about an error from which a card does not recover by itself."""
    seen = {slot_of(item.pci)[:3]: item for item in case.seen.cards}
    for slot, code in dict.fromkeys(_XID.findall(case.said("xids"))):
        fault, there = card_faults().get(int(code)), seen.get(slot_of(slot)[:3])
        if fault:
            card = next((card for card in _cards(case) if there and card_of(card, case.seen.cards) == there), None)
            name = f"GPU {card.number}" if card else "a card"
            level: Level = "warning" if there else "error"
            yield say("card-errors/xid", level=level, card=name, slot=short_slot(slot), fault=fault, code=code)


def card_order(case: Case) -> Findings:
    """An index still means the card that the inventory means (it changes with reboots and card swaps)."""
    seen = case.seen.cards
    for card in _cards(case):
        near, pinned = card_at(card, seen), card_of(card, seen)
        if near and card.uuid and card.pci and pinned and slot_of(pinned.pci) != slot_of(card.pci):
            yield say("card-order/moved", card=card, slot=short_slot(pinned.pci))
        if near and card.pinned_by == "index" and (why := _differs(card, near)):
            yield say("card-order/other", card=card, why=why, near=near)
    if len(seen) > 1 and any(card.pinned_by == "index" for card in _cards(case)):
        lines = ", ".join(f"GPU {item.index + 1} uuid: {item.uuid}" for item in seen)
        yield say("card-order/loose", lines=lines)


def _differs(card: Card, seen: SeenCard) -> str:
    """Why a card cannot be the one that is meant; empty when it may be."""
    if card.compute_capability and seen.compute_capability and card.compute_capability != seen.compute_capability:
        return f"it is a {seen.name}, not a {card.card}"
    if seen.total_mib and abs(seen.total_mib - card.vram_mib) > card.vram_mib * VRAM_TOLERANCE:
        return f"it is a {seen.name} with {gib(seen.total_mib)} GiB, not a {card.card} with {gib(card.vram_mib)}"
    return ""


def card_kind(case: Case) -> Findings:
    """Memory and compute capability of every card are as the plan counts on."""
    for card in _cards(case):
        seen = card_of(card, case.seen.cards)
        if seen is None or card.pinned_by == "index":  # card-order says it then
            continue
        name, place = f"GPU {card.number} ({seen.name})", f"hosts.{case.name}.gpus[{card.number - 1}].card"
        if 0 < seen.total_mib < card.vram_mib * (1 - VRAM_TOLERANCE):
            yield say("card-kind/memory", card=name, has=gib(seen.total_mib), wanted=gib(card.vram_mib), place=place)
        if seen.compute_capability and card.compute_capability and seen.compute_capability != card.compute_capability:
            have, want = (".".join(map(str, item)) for item in (seen.compute_capability, card.compute_capability))
            yield say("card-kind/capability", card=name, has=have, wanted=want, kind=card.card, place=place)


def summary(case: Case) -> str:
    """What was found, when all is well."""
    cards = case.seen.cards
    if not case.has("cards"):
        return "none in the plan"
    return f"{len(cards)} cards, driver {cards[0].driver}" if cards else "on the processor"
