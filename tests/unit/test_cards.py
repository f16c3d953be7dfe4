"""The catalogue of cards, and what a site says about its own."""

import re

import pytest

from corral.config.inventory import PATTERNS, Gpu, GpuKind
from corral.plan.cards import CATALOGUE, CardFacts, card_facts, vram_mib


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_card_of_the_catalogue_can_be_written_in_an_inventory(name: str) -> None:
    facts = CATALOGUE[name]

    assert re.fullmatch(PATTERNS["name"].expression, name)
    assert 2 <= facts.vram_gib <= 192
    assert (facts.compute_capability is not None) == (facts.vendor == "nvidia")


def test_the_site_s_own_words_win() -> None:
    assert card_facts("p104-100", None) == CardFacts(8, "nvidia", (6, 1))
    assert card_facts("p104-100", GpuKind(vram_gib=4)) == CardFacts(4, "nvidia", (6, 1))
    assert card_facts("p104-100", GpuKind(compute_capability="6.2")) == CardFacts(8, "nvidia", (6, 2))


def test_a_card_that_nobody_knows() -> None:
    assert card_facts("voodoo2", None) is None
    assert card_facts("voodoo2", GpuKind(compute_capability="1.0")) is None
    assert card_facts("voodoo2", GpuKind(vram_gib=0.012, vendor="amd")) == CardFacts(0.012, "amd", None)


def test_a_compute_capability_may_be_written_without_quotes() -> None:
    assert GpuKind.model_validate({"compute_capability": 12.0}).compute_capability == "12.0"
    assert GpuKind.model_validate({"compute_capability": 6.1}).compute_capability == "6.1"


def test_one_card_may_have_more_or_less_memory() -> None:
    assert vram_mib(Gpu(card="p104-100"), CATALOGUE["p104-100"]) == 8192
    assert vram_mib(Gpu(card="p104-100", vram_gib=4), CATALOGUE["p104-100"]) == 4096
