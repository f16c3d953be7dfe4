"""Graphics cards as every maker's tool prints them, and as the kernel lists them without any tool."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from corral.config.card_names import ROWS, card_name, meant_by
from corral.runtime.docker import MIB
from corral.runtime.observe import parse_cards, short_slot
from corral.verbs.init.said import items, json_in, mapping, number

MAKERS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
# Memory in MiB below which a card of AMD is a processor's own graphics.
LEAST_MIB = 2048
# By how much a figure of memory may differ from the catalogue's.
TOLERANCE = 0.05
# Characters of a tool's complaint that are told.
MOST_TOLD = 120
# What others have on a card, in MiB, that the plan does not count with anyway.
USUAL_MIB = 256


@dataclass(frozen=True, slots=True)
class FoundCard:
    """A card; sizes in MiB, 0 where no tool said them."""

    vendor: str
    name: str
    total_mib: int = 0
    used_mib: int = 0
    uuid: str = ""
    pci: str = ""
    capability: str = ""
    # Host memory that it may take, of a processor's own graphics.
    gtt_mib: int = 0

    @property
    def kind(self) -> str:
        """Its name in the inventory: the catalogue's, the one of those with that name whose memory is nearest."""
        meant = meant_by(self.name)
        if len(meant) > 1:
            return min(meant, key=lambda row: abs((ROWS[row]["vram_gib"] or 0) * 1024 - self.total_mib))
        return str(card_name(self.name)).strip("-.")

    @property
    def words(self) -> str:
        """The card in words."""
        used = f", {self.used_mib} MiB are in use now" if self.used_mib > USUAL_MIB else ""
        return f"{self.name}, {self.total_mib / 1024:.1f} GiB{used}" if self.total_mib else self.name

    @property
    def is_unified(self) -> bool:
        """Whether it has the host's memory and none of its own."""
        return bool(ROWS.get(self.kind, {}).get("unified_memory"))

    @property
    def facts(self) -> dict[str, Any]:
        """What `cards` has to say of it; nothing for a card of the catalogue."""
        if self.kind in ROWS:
            return {}
        own = {"vendor": self.vendor, "vram_gib": round(self.total_mib / 1024, 1)}
        return own | ({"compute_capability": self.capability} if self.capability else {})

    @property
    def room_gib(self) -> float | None:
        """Memory to write for it, where it differs from the catalogue's or a desktop has some of it; else None."""
        if self.is_unified:
            return round(max(self.total_mib, self.gtt_mib) / 1024, 1)
        known = round((ROWS.get(self.kind, {}).get("vram_gib") or self.total_mib / 1024) * 1024)
        has_desktop = USUAL_MIB < self.used_mib < self.total_mib // 8
        room = self.total_mib - (self.used_mib - USUAL_MIB if has_desktop else 0)
        return round(room / 1024, 1) if room and abs(room - known) > known * TOLERANCE * (not has_desktop) else None


def cards_in(said: Mapping[str, str]) -> tuple[tuple[FoundCard, ...], list[str]]:
    """Every card that a model can run on, in the order of the makers' tools; and what is to be said of others."""
    seen, problem = parse_cards(said.get("nvidia-smi", ""))
    notes = [f"nvidia-smi shows no card: {problem}"] if problem and not seen else []
    found = [
        FoundCard(
            "nvidia", card.name, card.total_mib, card.used_mib or 0, card.uuid, short_slot(card.pci),
            ".".join(map(str, card.compute_capability or ())),
        )
        for card in seen
    ]  # fmt: skip
    tools: list[FoundCard] = []
    for tool, reader in {"rocm-smi": _rocm, "amd-smi": _amd, "xpu-smi": _intel}.items():
        shown = list(reader(said.get(tool, "")))
        lines = [line.strip() for line in said.get(tool, "").splitlines() if line.strip() and line != "code 0"]
        notes += [f"{tool} shows no card: {lines[-1][:MOST_TOLD]}"] if lines and not shown else []
        tools += shown
    for kernels in _graphics(said.get("graphics", "")):
        same = [card for card in tools if card.pci == kernels.pci]
        if kernels.vendor != "nvidia":
            tools = [card for card in tools if card not in same] + [_together([*same, kernels])]
        elif not any(card.vendor == "nvidia" for card in found) and not problem:
            notes.append(f"an NVIDIA card is in slot {kernels.pci}, and no driver shows it (nvidia-smi)")
    by_slot: dict[str, FoundCard] = {}
    for card in tools:
        by_slot[card.pci] = _together([by_slot[card.pci], card]) if card.pci in by_slot else card
    for card in by_slot.values():
        if _is_usable(card):
            found.append(card)
        elif card.name or card.vendor == "amd":
            words = "is a processor's own graphics, or its memory is not known; it is left out"
            notes.append(
                f"{card.name or card.vendor} in slot {card.pci} {words} (docs/inventory.md shows how to add it)"
            )
    return tuple(found), [*notes, *_apple(said.get("apple", ""))]


def _is_usable(card: FoundCard) -> bool:
    if card.is_unified:
        return card.room_gib is not None and card.room_gib > LEAST_MIB / 1024
    return card.total_mib >= LEAST_MIB or (card.kind in ROWS and bool(card.name) and not card.total_mib)


def _together(cards: list[FoundCard]) -> FoundCard:
    """What several tools say of one card: the first that says something counts."""
    first, *others = cards
    for other in others:
        lacking = {name: getattr(other, name) for name in FoundCard.__slots__ if not getattr(first, name)}
        first = replace(first, **lacking)
    return first


def _graphics(text: str) -> Iterator[FoundCard]:
    for line in text.splitlines():
        slot, maker, device, *figures, unique, name = [*line.split("|"), *[""] * 8][:8]
        if maker in MAKERS and not (maker == "0x8086" and slot.endswith("00:02.0")):
            total, used, gtt = (number(figure) // MIB for figure in figures)
            vendor = MAKERS[maker]
            name = name or (f"{vendor}-{device.removeprefix('0x')}" if vendor == "amd" and total >= LEAST_MIB else "")
            uuid = f"GPU-{unique}" if unique else ""
            yield FoundCard(vendor, name, total, used, uuid, slot, gtt_mib=gtt)


def _rocm(text: str) -> Iterator[FoundCard]:
    for name, card in mapping(json_in(text)).items():
        said = {key.lower(): str(value) for key, value in mapping(card).items()}
        if name.startswith("card") and said.get("pci bus"):
            total, used = (number(said.get(f"vram total {word}memory (b)", "")) // MIB for word in ("", "used "))
            unique = re.sub("^0x", "", said.get("unique id", "").lower())
            uuid = f"GPU-{unique}" if re.fullmatch(r"[0-9a-f]{8,}", unique) else ""
            yield FoundCard("amd", said.get("card series", ""), total, used, uuid, said["pci bus"].lower())


def _amd(text: str) -> Iterator[FoundCard]:
    found = json_in(text)
    for row in items(mapping(found).get("gpu_data", found)):
        asic, bus, vram = (mapping(row.get(key)) for key in ("asic", "bus", "vram"))
        total = number(mapping(vram.get("size")).get("value"))
        serial = str(asic.get("asic_serial", "")).lower().removeprefix("0x")
        uuid = f"GPU-{serial}" if re.fullmatch(r"[0-9a-f]{8,}", serial) else ""
        if bus.get("bdf"):
            yield FoundCard("amd", str(asic.get("market_name", "")), total, 0, uuid, str(bus["bdf"]).lower())


def _intel(text: str) -> Iterator[FoundCard]:
    for row in items(mapping(json_in(text)).get("device_list")):
        slot = str(row.get("pci_bdf_address", "")).lower()
        if not slot.endswith("00:02.0"):
            yield FoundCard("intel", str(row.get("device_name", "")), pci=slot)


def _apple(text: str) -> list[str]:
    rows = items(mapping(json_in(text)).get("SPDisplaysDataType"))
    names = [f"{row.get('sppci_model', 'graphics')} ({row.get('sppci_cores', '?')} cores)" for row in rows]
    words = (
        "only programs outside of containers use it: Ollama, LM Studio, MLX or llama-server, as nodes (docs/nodes.md)"
    )
    return [f"graphics of {name}: {words}" for name in names]
