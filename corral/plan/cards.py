"""The card catalogue: memory, compute capability and vendor of cards that people own; `cards` overrides it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.config.inventory import Gpu, GpuKind
from corral.config.source import plain_yaml

# Stays free on every card, for the display and the driver.
VRAM_RESERVE_MIB = 256


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What is known of a kind of card."""

    vram_gib: float
    vendor: str
    compute_capability: tuple[int, int] | None = None
    # Build of llama.cpp for it, where its maker alone does not say.
    backend: str = ""


def _capability(text: str | None) -> tuple[int, int] | None:
    major, _, minor = (text or "").partition(".")
    return (int(major), int(minor)) if text else None


_ROWS: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
CATALOGUE = {
    name: CardFacts(**row | {"compute_capability": _capability(row.get("compute_capability"))})
    for name, row in _ROWS.items()
}


def card_facts(name: str, override: GpuKind | None) -> CardFacts | None:
    """Facts of a kind of card, the site's own words first; None when its memory is not known."""
    known = CATALOGUE.get(name)
    if override is None:
        return known
    vram = override.vram_gib or (known.vram_gib if known else None)
    if vram is None:
        return None
    vendor = override.vendor or (known.vendor if known else "nvidia")
    capability = _capability(override.compute_capability) or (known.compute_capability if known else None)
    return CardFacts(vram, vendor, capability, known.backend if known and vendor == known.vendor else "")


def vram_mib(gpu: Gpu, facts: CardFacts) -> int:
    """Memory of one card in MiB."""
    return round((gpu.vram_gib or facts.vram_gib) * 1024)
