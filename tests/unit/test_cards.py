"""The catalogue of cards, and what a site says about its own."""

import re
from pathlib import Path

from corral import config
from corral.config.card_names import card_name
from corral.config.inventory import PATTERNS, Gpu, GpuKind
from corral.plan.cards import CATALOGUE, CardFacts, card_facts, vram_mib


def test_every_card_of_the_catalogue_can_be_written_in_an_inventory() -> None:
    for name, facts in CATALOGUE.items():
        assert re.fullmatch(PATTERNS["name"].expression, name)
        assert card_name(name) == name
        assert 2 <= facts.vram_gib <= 288 or (facts.vram_gib == 0 and facts.unified_memory), name
        assert (facts.compute_capability is not None) == (facts.vendor == "nvidia")


def test_every_figure_of_the_catalogue_has_its_source() -> None:
    lines = (Path(config.__file__).parent / "cards.yaml").read_text(encoding="utf-8").splitlines()
    figures = [line for line in lines if re.match(r" {4}[a-z0-9-]+: [0-9.]+", line)]

    assert len(figures) == sum(facts.vram_gib > 0 for facts in CATALOGUE.values())
    assert [line for line in figures if not re.search(r"  # (c\d+|[a-g])\b", line)] == []


def test_the_site_s_own_words_win() -> None:
    assert card_facts("p104-100", None) == CardFacts(8, "nvidia", (6, 1))
    assert card_facts("p104-100", GpuKind(vram_gib=4)) == CardFacts(4, "nvidia", (6, 1))
    assert card_facts("p104-100", GpuKind(compute_capability="6.2")) == CardFacts(8, "nvidia", (6, 2))


def test_a_card_that_nobody_knows() -> None:
    assert card_facts("voodoo2", None) is None
    assert card_facts("voodoo2", GpuKind(vram_gib=0.012)) is None
    assert card_facts("voodoo2", GpuKind(vram_gib=0.012, vendor="amd")) == CardFacts(0.012, "amd", None)


def test_a_compute_capability_may_be_written_without_quotes() -> None:
    assert GpuKind.model_validate({"compute_capability": 12.0}).compute_capability == "12.0"
    assert GpuKind.model_validate({"compute_capability": 6.1}).compute_capability == "6.1"


def test_one_card_may_have_more_or_less_memory() -> None:
    assert vram_mib(Gpu(card="p104-100"), CATALOGUE["p104-100"]) == 8192
    assert vram_mib(Gpu(card="p104-100", vram_gib=4), CATALOGUE["p104-100"]) == 4096
