"""How a replica reaches its cards: build of the program, device files, groups and variables, by the cards' maker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.config.source import plain_yaml
from corral.contributions import GpuClaim
from corral.plan.site import Card, Replica, Site

# CUDA 13 has no code for cards before Turing.
CUDA13_FLOOR = (7, 5)
# Cards for which llama.cpp's CUDA 12 images hold compiled code; for others the driver, which has to be as new as CUDA,
# compiles it (PTX) when it is first used.
COMPILED = ((8, 6), (8, 9), (12, 0))
DEVICE_FILES = "AMD and Intel cards are reached through device files; there is no container runtime for them"
# The file of one card alone, whatever its number is after the next start of the host.
RENDER_NODE = "/dev/dri/by-path/pci-{}-render"
DATA: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
# Whose cards each build runs on.
VENDORS: dict[str, list[str]] = DATA["vendors"]


@dataclass(frozen=True, slots=True)
class Access:
    """What a container needs to use its cards."""

    environment: Mapping[str, str] = field(default_factory=dict)
    # Device files of the host, under the same path in the container.
    devices: tuple[str, ...] = ()
    # Numeric groups that may open them.
    groups: tuple[int, ...] = ()
    # Rules of the security baseline that do not hold because of it.
    exceptions: Mapping[str, str] = field(default_factory=dict)


def backend_of(replica: Replica) -> str:
    """The build that runs on all the replica's cards: of one maker's that maker's, else Vulkan; `cpu` without a card.

    What the inventory's `engine.backend` or the card catalogue names comes first.
    """
    if not replica.cards:
        return "cpu"
    named = [replica.engine.backend or "", *(card.backend for card in replica.cards)]
    if any(named):
        return next(filter(None, named))
    return "vulkan" if len({card.vendor for card in replica.cards}) > 1 else makers_build(replica.cards)


def makers_build(cards: Sequence[Card]) -> str:
    """The build for cards of one maker: with NVIDIA's CUDA 13, or 12 if one of them is from before Turing."""
    if cards[0].vendor != "nvidia":
        return {"amd": "rocm", "intel": "intel"}[cards[0].vendor]
    return "cuda13" if all((card.compute_capability or (0, 0)) >= CUDA13_FLOOR for card in cards) else "cuda12"


def compiles_first(replica: Replica) -> bool:
    """Whether the driver has to compile llama.cpp's programs for one of the cards before they first run."""
    return any(card.vendor == "nvidia" and card.compute_capability not in COMPILED for card in replica.cards)


def uses_vulkan_on_nvidia(replica: Replica) -> bool:
    """Whether one of its cards is NVIDIA's and its server does not use CUDA."""
    return backend_of(replica) == "vulkan" and any(card.vendor == "nvidia" for card in replica.cards)


def access(site: Site, replica: Replica) -> Access:
    """How the replica reaches its cards."""
    backend = backend_of(replica)
    if backend == "cpu":
        return Access()
    others = [card for card in replica.cards if card.vendor != "nvidia"]
    variables: dict[str, str] = {}
    if len(others) < len(replica.cards):
        # CUDA's own order of several cards is by speed; this is the order of `nvidia-smi` and of the inventory.
        variables |= DATA["vulkan_on_nvidia"] if uses_vulkan_on_nvidia(replica) else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        variables |= _cuda_order(replica)
    if backend == "intel" and len(others) > 1:
        variables["ZE_ENABLE_PCI_ID_DEVICE_ORDER"] = "1"
    if backend in DATA["visible"]:
        shown = ",".join(_names(backend, replica.cards))
        variables[DATA["visible"][backend]] = f"level_zero:{shown}" if backend == "intel" else shown
    if not others:
        return Access(variables)
    files = tuple(DATA["files"].get(backend, ()))
    if sees_only_its_own(backend, replica.cards):
        files = tuple(RENDER_NODE.format(card.slot) for card in others)
    return Access(variables, files, site.host(replica.host).device_groups, {"host-device": DEVICE_FILES})


def sees_only_its_own(backend: str, cards: Sequence[Card]) -> bool:
    """Whether a container of such a build gets the device files of these cards of AMD or Intel alone.

    ROCm looks for a card's file by the number that the kernel gave it, so that it gets all of them.
    """
    return backend != "rocm" and all(card.pci for card in cards if card.vendor != "nvidia")


def is_pinned(backend: str, card: Card) -> bool:
    """Whether such a build uses this very card, whatever the order is after the next start of the host."""
    if backend == "rocm":
        return bool(card.uuid)
    return bool(card.pci or (card.uuid and card.vendor == "nvidia"))


def _names(backend: str, cards: Sequence[Card]) -> list[str]:
    """What a build calls these cards: by UUID with ROCm, else by number among those that it sees.

    Where it sees these alone, they are in the order of their slots, a processor's own graphics last.
    """
    if not sees_only_its_own(backend, cards):
        return [card.uuid if card.uuid and backend == "rocm" else str(card.index) for card in cards]
    has_slots = all(card.pci for card in cards)
    seen = sorted(cards, key=lambda card: (card.unified_memory, card.slot)) if has_slots else cards
    return [str(seen.index(card)) for card in cards]


def _cuda_order(replica: Replica) -> dict[str, str]:
    """The order of a llama.cpp server's cards, which its shares of them follow, where it is not that of `nvidia-smi`.

    vLLM takes equal shares, and some of its versions no UUIDs.
    """
    if len(replica.cards) == 1 or not replica.weights.served_by.has_own_build or uses_vulkan_on_nvidia(replica):
        return {}
    uuids, numbers = [card.uuid for card in replica.cards], [card.index for card in replica.cards]
    order = uuids if all(uuids) else [str(sorted(numbers).index(number)) for number in numbers]
    return {"CUDA_VISIBLE_DEVICES": ",".join(order)} if all(uuids) or numbers != sorted(numbers) else {}


def gpu_access(site: Site, host: str) -> str:
    """How the host's containers get NVIDIA cards."""
    has_jetson = any(card.is_jetson for card in site.cards[host])
    return site.host(host).gpu_access or ("runtime" if has_jetson else "reservation")


def claims(replica: Replica) -> tuple[GpuClaim, ...]:
    """What the replica takes on each of its cards."""
    sizes = zip(replica.cards, replica.card_mib, strict=True)
    return tuple(GpuClaim(card.number, card.device, mib, card.vendor) for card, mib in sizes)
