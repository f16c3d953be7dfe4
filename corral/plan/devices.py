"""How a replica reaches its cards: build of the program, device files, groups and variables, by the cards' maker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from corral.contributions import GpuClaim
from corral.plan.site import Replica, Site

# CUDA 13 has no code for cards before Turing.
CUDA13_FLOOR = (7, 5)
# Cards for which llama.cpp's CUDA 12 images hold compiled code; for others the driver, which has to be as new as CUDA,
# compiles it (PTX) when it is first used.
COMPILED = ((8, 6), (8, 9), (12, 0))
DEVICE_FILES = "AMD and Intel cards are reached through device files; there is no container runtime for them"
KFD, DRI = "/dev/kfd", "/dev/dri"
FILES = {"rocm": (KFD, DRI), "vulkan": (DRI,), "intel": (DRI,)}
# Which of the cards behind the device files a program uses; NVIDIA's runtime shows it no other card at all.
VISIBLE = {
    "rocm": "ROCR_VISIBLE_DEVICES",
    "vulkan": "GGML_VK_VISIBLE_DEVICES",
    "intel": "ONEAPI_DEVICE_SELECTOR",
}
# Whose cards each build runs on.
VENDORS = {
    "cuda12": ("nvidia",),
    "cuda13": ("nvidia",),
    "rocm": ("amd",),
    "vulkan": ("amd", "intel"),
    "intel": ("intel",),
}


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
    """The build that suits the replica's card: CUDA 12 before Turing, 13 from there on, `cpu` without a card.

    What the inventory's `engine.backend` or the card catalogue names comes first.
    """
    if not replica.cards:
        return "cpu"
    card = replica.cards[0]
    if replica.engine.backend or card.backend:
        return replica.engine.backend or card.backend
    if card.vendor != "nvidia":
        return {"amd": "rocm", "intel": "intel"}[card.vendor]
    return "cuda13" if card.compute_capability and card.compute_capability >= CUDA13_FLOOR else "cuda12"


def compiles_first(replica: Replica) -> bool:
    """Whether the driver has to compile llama.cpp's programs for one of the cards before they first run."""
    return any(card.vendor == "nvidia" and card.compute_capability not in COMPILED for card in replica.cards)


def access(site: Site, replica: Replica) -> Access:
    """How the replica reaches its cards."""
    backend = backend_of(replica)
    if backend == "cpu":
        return Access()
    if "nvidia" in VENDORS[backend]:
        # CUDA's own order of several cards is by speed; this is the order of `nvidia-smi` and of the inventory.
        return Access({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    shown = ",".join(card.uuid if card.uuid and backend == "rocm" else str(card.index) for card in replica.cards)
    variables = {VISIBLE[backend]: f"level_zero:{shown}" if backend == "intel" else shown}
    if site.is_local(replica.host):
        return Access(variables)
    return Access(variables, FILES[backend], site.host(replica.host).device_groups, {"host-device": DEVICE_FILES})


def claims(replica: Replica) -> tuple[GpuClaim, ...]:
    """What the replica takes on each of its cards."""
    sizes = zip(replica.cards, replica.card_mib, strict=True)
    return tuple(GpuClaim(card.number, card.device, mib, card.vendor) for card, mib in sizes)
