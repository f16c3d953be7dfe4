"""Which card of the catalogue a name means: its own, or one as nvidia-smi, rocm-smi, xpu-smi or lspci print it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from corral.config.source import plain_yaml

_GROUPS: list[dict[str, Any]] = plain_yaml(Path(__file__).with_name("cards.yaml").read_bytes())
# What is known of every card of the catalogue.
ROWS: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in group.items() if key != "cards"} | {"vram_gib": gib}
    for group in _GROUPS
    for name, gib in group["cards"].items()
}
_NAMES: dict[str, Any] = plain_yaml(Path(__file__).with_name("card_names.yaml").read_bytes())
NICKNAMES: dict[str, str] = _NAMES["nicknames"]
NOISE, FAMILY = frozenset(_NAMES["noise"].split()), frozenset(_NAMES["family"].split())
MAKERS: dict[str, str] = _NAMES["makers"]
# What tells a card's memory and maker, by the maker that its name sounds like.
ASKED: dict[str, str] = _NAMES["asked"]


def card_name(text: object) -> object:
    """The catalogue's name of a card, where the text means exactly one; else the text as a name, if it is not one."""
    if not isinstance(text, str) or text in ROWS:
        return text
    meant = meant_by(text)
    return meant[0] if len(meant) == 1 else text if re.fullmatch(r"[a-z0-9._-]+", text) else "-".join(_words(text))


def meant_by(text: str) -> list[str]:
    """Every card of the catalogue that a text may mean: several when only their memory tells them apart."""
    words = _words(text)
    name = "-".join(words)
    if name in ROWS or name in NICKNAMES:
        return [NICKNAMES.get(name, name)]
    wanted, size = _core(words)
    alike = [row for row, (core, _) in _CORES.items() if core == wanted]
    plain = [row for row in alike if _CORES[row][1] is None]
    if size is None:
        return plain if len(plain) == 1 else alike
    return [row for row in alike if ROWS[row]["vram_gib"] == size]


def maker_of(name: str) -> str:
    """The maker of cards that are called like this one; empty when the name tells none."""
    return next((maker for maker, words in MAKERS.items() if re.match(rf"({words})(?![a-z])", name)), "")


def _words(text: str) -> list[str]:
    """The words of a name that say which card it is; of lspci's line those of its last brackets."""
    text = re.sub(r"\((rev [^)]*|r|tm)\)|[®™]", " ", text.lower())
    text = (re.findall(r"\[([^]]*)\]", text) or [text])[-1]
    # `RTX3090Ti`
    text = re.sub(r"(\d{3,4})(ti|xt|xtx|super|gre)\b", r"\1 \2", re.sub(r"\b([gr]tx|rx)(\d)", r"\1 \2", text))
    found = re.findall(r"[a-z0-9.]+", re.sub(r"(\d) ?gi?b\b", r"\1gb", text.replace("mobile", "laptop")))
    if "design" in found:  # `with Max-Q Design`
        found = [word for word in found if word not in {"max", "q"}]
    words = [word for word in found if word not in NOISE]
    return words[1:] if words[:1] == ["radeon"] and words[1:2] in (["rx"], ["r9"]) else words


def _core(words: list[str]) -> tuple[tuple[str, ...], int | None]:
    """What tells a card from others without the family's name and its memory, and that memory in GiB."""
    sizes = [int(word[:-2]) for word in words if re.fullmatch(r"\d+gb", word)]
    rest = [word for word in words if not re.fullmatch(r"\d+gb", word)]
    while len(rest) > 1 and rest[0] in FAMILY:
        rest = rest[1:]
    return tuple(rest), sizes[0] if sizes else None


_CORES = {name: _core(name.split("-")) for name in ROWS}
