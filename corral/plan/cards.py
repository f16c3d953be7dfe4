"""The card catalogue: memory, compute capability and vendor of cards that people own; `cards` overrides it."""

from __future__ import annotations

from dataclasses import dataclass

from corral.config.inventory import Card, Gpu

# Stays free on every card, for the display and the driver.
VRAM_RESERVE_MIB = 256


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What is known of a kind of card. Sources: the vendors' data sheets."""

    vram_gib: float
    vendor: str
    compute_capability: tuple[int, int] | None = None
    # Build of llama.cpp for it, where its maker alone does not say.
    backend: str = ""


def _nvidia(vram_gib: float, major: int, minor: int) -> CardFacts:
    return CardFacts(vram_gib, "nvidia", (major, minor))


def _amd_without_rocm(vram_gib: float) -> CardFacts:
    """A card for which AMD's ROCm, or upstream's image of it, has no code; Vulkan's driver knows it."""
    return CardFacts(vram_gib, "amd", backend="vulkan")


CATALOGUE: dict[str, CardFacts] = {
    "gtx-750-ti": _nvidia(2, 5, 0),
    "gtx-970": _nvidia(4, 5, 2),
    "gtx-980-ti": _nvidia(6, 5, 2),
    "gtx-1050-ti": _nvidia(4, 6, 1),
    "gtx-1060-3gb": _nvidia(3, 6, 1),
    "gtx-1060-6gb": _nvidia(6, 6, 1),
    "gtx-1070": _nvidia(8, 6, 1),
    "gtx-1080": _nvidia(8, 6, 1),
    "gtx-1080-ti": _nvidia(11, 6, 1),
    "gtx-1070-ti": _nvidia(8, 6, 1),
    "p104-100": _nvidia(8, 6, 1),
    "p106-100": _nvidia(6, 6, 1),
    "p102-100": _nvidia(10, 6, 1),
    "cmp-40hx": _nvidia(8, 7, 5),
    "cmp-90hx": _nvidia(10, 8, 6),
    "tesla-p4": _nvidia(8, 6, 1),
    "tesla-p40": _nvidia(24, 6, 1),
    "tesla-p100": _nvidia(16, 6, 0),
    "tesla-m40": _nvidia(24, 5, 2),
    "titan-v": _nvidia(12, 7, 0),
    "tesla-v100-16gb": _nvidia(16, 7, 0),
    "tesla-v100-32gb": _nvidia(32, 7, 0),
    "tesla-t4": _nvidia(16, 7, 5),
    "gtx-1650": _nvidia(4, 7, 5),
    "gtx-1660-super": _nvidia(6, 7, 5),
    "rtx-2060": _nvidia(6, 7, 5),
    "rtx-2070": _nvidia(8, 7, 5),
    "rtx-2080": _nvidia(8, 7, 5),
    "rtx-2080-ti": _nvidia(11, 7, 5),
    "quadro-rtx-8000": _nvidia(48, 7, 5),
    "rtx-3050": _nvidia(8, 8, 6),
    "rtx-3060": _nvidia(12, 8, 6),
    "rtx-3060-ti": _nvidia(8, 8, 6),
    "rtx-3070": _nvidia(8, 8, 6),
    "rtx-3080": _nvidia(10, 8, 6),
    "rtx-3080-ti": _nvidia(12, 8, 6),
    "rtx-3090": _nvidia(24, 8, 6),
    "rtx-a2000-12gb": _nvidia(12, 8, 6),
    "rtx-a4000": _nvidia(16, 8, 6),
    "rtx-a5000": _nvidia(24, 8, 6),
    "a10": _nvidia(24, 8, 6),
    "a40": _nvidia(48, 8, 6),
    "rtx-a6000": _nvidia(48, 8, 6),
    "a100-40gb": _nvidia(40, 8, 0),
    "a100-80gb": _nvidia(80, 8, 0),
    "l4": _nvidia(24, 8, 9),
    "l40s": _nvidia(48, 8, 9),
    "rtx-4060": _nvidia(8, 8, 9),
    "rtx-4060-ti-16gb": _nvidia(16, 8, 9),
    "rtx-4070": _nvidia(12, 8, 9),
    "rtx-4070-ti-super": _nvidia(16, 8, 9),
    "rtx-4080": _nvidia(16, 8, 9),
    "rtx-4090": _nvidia(24, 8, 9),
    "h100-80gb": _nvidia(80, 9, 0),
    "h200": _nvidia(141, 9, 0),
    "rtx-5060-ti-16gb": _nvidia(16, 12, 0),
    "rtx-5070": _nvidia(12, 12, 0),
    "rtx-5070-ti": _nvidia(16, 12, 0),
    "rtx-5080": _nvidia(16, 12, 0),
    "rtx-5090": _nvidia(32, 12, 0),
    "rx-580-8gb": _amd_without_rocm(8),
    "rx-5700-xt": _amd_without_rocm(8),
    "rx-6600": _amd_without_rocm(8),
    "rx-6700-xt": _amd_without_rocm(12),
    "rx-6800": CardFacts(16, "amd"),
    "rx-6800-xt": CardFacts(16, "amd"),
    "rx-6900-xt": CardFacts(16, "amd"),
    "rx-7600": CardFacts(8, "amd"),
    "rx-7800-xt": CardFacts(16, "amd"),
    "rx-7900-xt": CardFacts(20, "amd"),
    "rx-7900-xtx": CardFacts(24, "amd"),
    "rx-9070-xt": CardFacts(16, "amd"),
    "mi50": _amd_without_rocm(16),
    "mi50-32gb": _amd_without_rocm(32),
    "mi60": _amd_without_rocm(32),
    "mi100": CardFacts(32, "amd"),
    "arc-a380": CardFacts(6, "intel"),
    "arc-a750": CardFacts(8, "intel"),
    "arc-a770": CardFacts(16, "intel"),
    "arc-b570": CardFacts(10, "intel"),
    "arc-b580": CardFacts(12, "intel"),
}


def card_facts(name: str, override: Card | None) -> CardFacts | None:
    """Facts of a kind of card, the site's own words first; None when its memory is not known."""
    known = CATALOGUE.get(name)
    if override is None:
        return known
    vram = override.vram_gib or (known.vram_gib if known else None)
    if vram is None:
        return None
    vendor = override.vendor or (known.vendor if known else "nvidia")
    capability = known.compute_capability if known else None
    if override.compute_capability:
        major, minor = override.compute_capability.split(".")
        capability = (int(major), int(minor))
    return CardFacts(vram, vendor, capability, known.backend if known and vendor == known.vendor else "")


def vram_mib(gpu: Gpu, facts: CardFacts) -> int:
    """Memory of one card in MiB."""
    return round((gpu.vram_gib or facts.vram_gib) * 1024)
