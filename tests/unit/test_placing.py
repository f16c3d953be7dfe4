"""`on: auto`: properties of the choice, and what a person sees of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.cli import main
from corral.config.inventory import Inventory
from corral.plan import placement as placing
from corral.plan.placement import Need, Placing, Room, place
from corral.plan.site import resolve

CARDS = st.lists(st.tuples(st.integers(1, 32), st.integers(0, 1), st.booleans()), min_size=1, max_size=8)
SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=6)


def farm(cards: list[tuple[int, int, bool]], pools: list[tuple[int, int]]) -> tuple[list[Need], list[Room]]:
    """Cards of two hosts and two kinds; on the second kind everything takes one MiB more."""
    rooms = [Room((f"host{kind}", number), room, is_used) for number, (room, kind, is_used) in enumerate(cards, 1)]
    needs = [
        Need(f"pool{index}", number, {card.key: size + (card.key[0] == "host1") for card in rooms})
        for index, (size, count) in enumerate(pools)
        for number in range(count)
    ]
    return needs, rooms


def first_fit_decreasing(needs: list[Need], rooms: list[Room]) -> Placing | None:
    """The textbook's way, for comparison: each need, the largest first, onto the first card that has room."""
    ordered = sorted(needs, key=lambda need: need.order)
    cards = sorted(rooms, key=lambda card: (not card.is_used, -card.room, card.key))
    return placing._packed(ordered, cards, "first")


def taken(found: Placing, rooms: list[Room]) -> int:
    """Cards of a placing, those counted that are used anyway."""
    return len(set(found.values()) | {card.key for card in rooms if card.is_used})


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(CARDS, SIZES, st.randoms(use_true_random=False))
def test_never_too_full_deterministic_and_no_worse_than_first_fit(
    cards: list[tuple[int, int, bool]], pools: list[tuple[int, int]], random: Random
) -> None:
    needs, rooms = farm(cards, pools)
    found = place(needs, rooms)
    textbook = first_fit_decreasing(needs, rooms)
    if found is None:
        assert textbook is None
        return
    used: Counter[tuple[str, int]] = Counter()
    for need in needs:
        key = found[need.pool, need.number]
        used[key] += need.sizes[key]
    assert all(used[card.key] <= card.room for card in rooms), "never over budget"
    assert len(found) == len(needs), "every replica has its card"
    assert textbook is None or taken(found, rooms) <= taken(textbook, rooms)
    random.shuffle(needs)
    random.shuffle(rooms)
    assert place(needs, rooms) == found, "the order of the inventory does not matter"


def test_it_takes_the_fewest_cards_and_fills_them_evenly() -> None:
    needs, rooms = farm([(20, 0, False)] * 3, [(8, 1), (7, 1), (4, 1), (3, 1)])
    found = place(needs, rooms)
    assert found is not None
    assert len(set(found.values())) == 2
    loads = Counter[tuple[str, int]]()
    for need in needs:
        loads[found[need.pool, need.number]] += max(need.sizes.values())
    assert sorted(loads.values()) == [11, 11]


def test_replicas_of_a_pool_get_cards_of_their_own_where_there_are() -> None:
    needs, rooms = farm([(20, 0, False), (20, 0, False), (20, 0, False)], [(5, 2)])
    found = place(needs, rooms)
    assert found is not None
    assert len(set(found.values())) == 2


BASE = """
schema_version: 1
name: farm
hosts:
  box: {address: 192.0.2.10, gpus: {card: p104-100, count: 3}}
models:
  big: {source: big-8b-Q4_K_M.gguf, kind: chat, context: 4096}
  small: {source: small-1b-Q4_K_M.gguf, kind: chat, context: 2048}
  embed: {source: embed.gguf, kind: embedding, context: 512}
pools:
  big: {model: big, on: auto}
  small: {model: small, on: {auto: true, replicas: REPLICAS}}
  embed: {model: embed, on: {host: box, gpus: 2}}
gateway: {host: box}
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "inventory.yaml"


def test_the_plan_shows_the_choice_and_renders_it(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written.write_text(BASE.replace("REPLICAS", "2"))
    assert main(["plan"]) == 0
    said = capsys.readouterr().out
    assert "on: auto: 3 replicas on the fewest cards (1 further card), evenly filled" in said
    assert "estimated from file names: big, embed, small" in said
    assert main(["render"]) == 0


def test_what_does_not_fit_says_by_how_much(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = BASE.replace("context: 2048}", "context: 2048, engine: {vram_mib: 3000}}")
    written.write_text(large.replace("REPLICAS", "12"))
    assert main(["check"]) == 1
    assert "[vram]" in capsys.readouterr().err


def test_a_split_replica_and_one_without_a_place_are_told(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger = BASE.replace("context: 4096}", "context: 4096, engine: {vram_mib: 9000}}").replace("REPLICAS", "1")
    written.write_text(larger.replace("on: auto", "on: {auto: true, replicas: 2}").replace("count: 3", "count: 2"))
    assert main(["check"]) == 1
    said = capsys.readouterr().err
    assert "name-unique" not in said
    assert "[vram]" in said


def test_two_split_replicas_may_begin_on_one_card(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger = BASE.replace("context: 4096}", "context: 4096, engine: {vram_mib: 9000}}").replace("REPLICAS", "1")
    written.write_text(larger.replace("on: auto", "on: {auto: true, replicas: 2}"))
    assert main(["plan"]) == 0
    said = capsys.readouterr().out
    assert "big-1 " in said
    assert "big-1-2" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("on: auto", "on: {auto: true, gpus: 1, host: box}"), "this place names one already"),
        (("gpus: {card: p104-100, count: 3}", "ram_gib: 8"), "auto finds no card to choose from"),
        (("on: auto", "on: {auto: true, host: bxo}"), 'did you mean "box"?'),
    ],
)
def test_slips_with_auto(
    written: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], words: str
) -> None:
    written.write_text(BASE.replace("REPLICAS", "1").replace(*change))
    assert main(["check"]) == 1
    assert words in capsys.readouterr().err


def test_auto_is_the_same_whatever_the_order() -> None:
    gpus = {"card": "rtx-3060", "count": 2}
    pools = {"a": {"model": "m", "on": "auto"}, "b": {"model": "m", "on": [{"auto": True, "host": "x"}]}}
    data = {
        "schema_version": 1, "name": "f", "gateway": {"host": "x"},
        "hosts": {"x": {"address": "192.0.2.1", "gpus": gpus}, "y": {"address": "192.0.2.2", "gpus": gpus}},
        "models": {"m": {"source": "m-7b-q8_0.gguf", "kind": "chat"}},
    }  # fmt: skip
    first = resolve(Inventory.model_validate({**data, "pools": pools}))
    second = resolve(Inventory.model_validate({**data, "pools": dict(reversed(pools.items()))}))
    assert first == second
    assert {replica.host for replica in first.replicas if replica.pool == "b"} == {"x"}
