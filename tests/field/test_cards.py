"""Cards that people have: their names, builds, device files, memory and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.config.card_names import card_name
from corral.config.load import load_inventory
from corral.errors import SiteError
from corral.plan.cards import CATALOGUE

Build = Callable[..., Plan]
CHAT = {"chat": {"model": "m", "on": {"host": "box", "gpus": 1}}}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Makes the plan of a host with these cards; pools, and keys of host and inventory, as in the inventory."""

    def made(
        *gpus: Mapping[str, Any], pools: Mapping[str, Any] = CHAT, host: Mapping[str, Any] | None = None, **more: Any
    ) -> Plan:
        box = {"address": "192.0.2.10", "device_groups": [44], "gpus": list(gpus)} | dict(host or {})
        models = {"m": {"source": "m-1b-q4_0.gguf", "kind": "chat"}}
        text = {"schema_version": 1, "name": "farm", "hosts": {"box": box}, "models": models, "pools": dict(pools)}
        path = tmp_path / "inventory.yaml"
        path.write_text(yaml.safe_dump(text | {"gateway": {"host": "box"}} | more), encoding="utf-8")
        return build_plan(load_inventory(path))

    return made


def refused(build: Build, *gpus: Mapping[str, Any], **more: Any) -> list[str]:
    """What is told about an inventory that is refused, without its place in the file."""
    with pytest.raises(SiteError) as raised:
        build(*gpus, **more)
    return [str(problem).partition(": ")[2] for problem in raised.value.problems]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("GeForce GTX 1060 6GB", "gtx-1060-6gb"),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", "rtx-3070-laptop"),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "rtx-2070"),
        ("NVIDIA TITAN X (Pascal)", "titan-x-pascal"),
        ("GeForce GTX TITAN X", "gtx-titan-x"),
        ("Tesla P40", "tesla-p40"),
        ("Tesla P100-PCIE-16GB", "tesla-p100"),
        ("Tesla V100-SXM2-32GB", "tesla-v100-32gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"),
        ("NVIDIA GB10", "gb10"),
        ("NVIDIA Corporation GA102 [GeForce RTX 3090] (rev a1)", "rtx-3090"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("AMD Radeon PRO W7900", "radeon-pro-w7900"),
        ("AMD Radeon VII", "radeon-vii"),
        ("AMD Instinct MI210", "mi210"),
        ("Radeon 8060S Graphics", "radeon-8060s"),
        ("strix-halo", "radeon-8060s"),
        ("Intel(R) Arc(TM) B580 Graphics", "arc-b580"),
        ("Intel(R) Arc(TM) Pro A40 Graphics", "arc-pro-a40"),
        ("Intel(R) Data Center GPU Flex 170", "flex-170"),
        ("voodoo2", "voodoo2"),
        ("my_card", "my_card"),
        ("a100-3g20gb", "a100-3g20gb"),
    ],
)
def test_a_name_as_tools_print_it_is_the_catalogue_s(printed: str, name: str) -> None:
    assert card_name(printed) == name


@pytest.mark.parametrize(
    "name",
    [
        "4060-ti-8gb", "4070-super", "3090-ti", "rtx-pro-6000", "7900-gre", "9060-xt-16gb", "b60", "w6800", "v620",
        "mi25", "titan-rtx", "p6000", "1660-ti", "5070", "p102-100", "cmp-170hx", "t1000", "a30", "b200", "mi300x",
        "mi355x", "rx-480-8gb", "vega-64", "a770", "max-1550", "jetson-orin-nano-8gb", "gb10", "r9700", "rtx-a2000",
    ],
)  # fmt: skip
def test_the_catalogue_has_what_people_name(name: str) -> None:
    assert card_name(name) in CATALOGUE


def test_a_printed_name_counts_for_its_overrides_too(build: Build) -> None:
    plan = build({"card": "NVIDIA GeForce RTX 3090"}, cards={"NVIDIA GeForce RTX 3090": {"engine": {"slots": 3}}})

    assert [(item.cards[0].card, item.slots) for item in plan.site.replicas] == [("rtx-3090", 3)]


@pytest.mark.parametrize(
    ("gpu", "cards", "words"),
    [
        (
            {"card": "rx-9999"}, {},
            'the card "rx-9999" is not in the catalogue; did you mean',
        ),
        (
            {"card": "arc-b99"}, {"arc-b99": {"vram_gib": 24}},
            "not all of it is said here; add vendor: intel; xpu-smi discovery tells what it has",
        ),
        (
            {"card": "AMD Radeon RX 9999", "vram_gib": 16}, {},
            "Otherwise add cards.rx-9999: {vendor: amd}; rocm-smi",
        ),
        ({"card": "NVIDIA H100 PCIe"}, {}, "write card: h100-80gb (80 GiB) or h100-94gb (94 GiB) or"),
        ({"card": "rtx-6000"}, {}, "write card: quadro-rtx-6000 (24 GiB) or rtx-pro-6000 (96 GiB)"),
    ],
)  # fmt: skip
def test_what_is_not_known_of_a_card_is_asked_for_at_once(
    build: Build, gpu: dict[str, Any], cards: dict[str, Any], words: str
) -> None:
    told = refused(build, gpu, cards=cards)

    assert len(told) == 1
    assert words in told[0]


def test_memory_that_is_said_makes_a_name_clear(build: Build) -> None:
    card = build({"card": "NVIDIA GeForce RTX 4060 Ti", "vram_gib": 16}).site.cards["box"][0]

    assert (card.vram_mib, card.vendor, card.compute_capability) == (16384, "nvidia", (8, 9))
