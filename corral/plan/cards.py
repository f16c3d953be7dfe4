"""What is known of a kind of card: the catalogue (config/cards.yaml), and what the site says in `cards`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from corral.config.card_names import ROWS, meant_by
from corral.config.inventory import Gpu, GpuKind

# Stays free on every card, for the display and the driver.
VRAM_RESERVE_MIB = 256
# Of Jetson's modules: their driver belongs to the system, NVIDIA's container runtime hands it in, without nvidia-smi.
JETSON = {(5, 3), (6, 2), (7, 2), (8, 7), (11, 0)}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What is known of a kind of card; no memory (0) where the cards of its name differ in it, or the host decides."""

    vram_gib: float
    vendor: str
    compute_capability: tuple[int, int] | None = None
    # Build of llama.cpp for it, where its maker alone does not say.
    backend: str = ""
    # Whether it has the host's memory, and none of its own.
    unified_memory: bool = False


def _capability(text: str | None) -> tuple[int, int] | None:
    major, _, minor = (text or "").partition(".")
    return (int(major), int(minor)) if text else None


def _facts(row: dict[str, Any]) -> CardFacts:
    more = {"compute_capability": _capability(row.get("compute_capability")), "vram_gib": row["vram_gib"] or 0}
    return CardFacts(**row | more)


CATALOGUE = {name: _facts(row) for name, row in ROWS.items()}


def card_facts(name: str, override: GpuKind | None) -> CardFacts | None:
    """Facts of a kind of card, the site's own words first; None when its maker is not known."""
    # What the cards of a name have in common that only their memory tells apart.
    alike = {replace(CATALOGUE[item], vram_gib=0) for item in meant_by(name)}
    known = CATALOGUE.get(name) or (alike.pop() if len(alike) == 1 else None)
    if override is None:
        return known
    # Compute capabilities are NVIDIA's alone.
    vendor = override.vendor or (known.vendor if known else "nvidia" if override.compute_capability else None)
    if vendor is None:
        return None
    known = known if known and known.vendor == vendor else CardFacts(known.vram_gib if known else 0, vendor)
    unified = known.unified_memory if override.unified_memory is None else override.unified_memory
    capability = _capability(override.compute_capability) or known.compute_capability
    return CardFacts(override.vram_gib or known.vram_gib, vendor, capability, known.backend, unified)


def vram_mib(gpu: Gpu, facts: CardFacts) -> int:
    """Memory of one card in MiB."""
    return round((gpu.vram_gib or facts.vram_gib) * 1024)
