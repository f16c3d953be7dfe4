"""What the routing callback makes of requests, with the settings that are rendered for it (000-04)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.render.tree import render
from tests.callbacks import load_callback

DEEP = "compare these two kinds of bridge"
INVENTORY = """
schema_version: 1
name: farm
hosts: {box: {address: 192.0.2.10}}
models: {m: {source: m-1b-q4_0.gguf, kind: chat, context: 4096}}
pools:
  small: {model: m, on: {host: box}, aliases: [s], fallback: [large]}
  large: {model: m, on: {host: box}, ports: 9100}
gateway:
  host: box
  auto: {tiers: TIERS}
"""
SEED = "[{name: simple, pool: small, spill: [large]}, {name: medium, pool: large}, {name: complex, pool: large}]"
OWN = """[
    {name: kurz, pool: small},
    {name: lang, pool: large, words: [warum, "schritt für schritt", 解释], words_beyond: 2, messages_beyond: 3},
    {name: code, pool: large, words: [c++, code], characters_beyond: 50}]"""


def callback_for(tiers: str, folder: Path) -> ModuleType:
    path = folder / "inventory.yaml"
    path.write_text(INVENTORY.replace("TIERS", tiers), encoding="utf-8")
    for name, content in render(build_plan(load_inventory(path))).items():
        if Path(name).parent.name == "litellm":
            (folder / Path(name).name).write_bytes(content)
    return load_callback("corral_routing", folder)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return callback_for(SEED, tmp_path_factory.mktemp("seed"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return callback_for(OWN, tmp_path_factory.mktemp("own"))


def chat(*texts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for text in texts]}


def tier(module: ModuleType, data: dict[str, Any]) -> str:
    return str(module.corral_routing.tier_of(data).name)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (chat("hello"), "simple"),
        (chat(""), "simple"),
        (chat("x" * 400), "simple"),
        (chat("x" * 401), "medium"),
        (chat("x" * 1200), "medium"),
        (chat("x" * 1201), "complex"),
        (chat(*["hi"] * 4), "simple"),
        (chat(*["hi"] * 5), "medium"),
        (chat(*["hi"] * 8), "medium"),
        (chat(*["hi"] * 9), "complex"),
        (chat("Explain it"), "medium"),
        (chat("WRITE a poem"), "medium"),
        (chat("my code"), "medium"),
        (chat("a barcode, decoded"), "simple"),
        (chat(f"{DEEP} for me"), "simple"),
        (chat(f"{DEEP} for me please"), "complex"),
        (chat("go through all of it step by step, slowly please"), "complex"),
        (chat(f"{DEEP} for me please", "thanks"), "simple"),
        (chat("analyze"), "simple"),
        (chat("explain", role="system"), "medium"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "explain"}]}, "simple"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x" * 400}]}, "medium"),
        ({"messages": []}, "simple"),
        ({}, "simple"),
        ({"input": "explain"}, "medium"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "explain"}]}]}, "medium"),
        ({"prompt": "x" * 1201}, "complex"),
    ],
)
def test_tiers_of_the_seed_at_every_threshold(seed: ModuleType, data: dict[str, Any], expected: str) -> None:
    assert tier(seed, data) == expected


def test_a_picture_counts_for_a_hundred_characters(seed: ModuleType) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    assert tier(seed, chat([{"type": "text", "text": "x" * 300}, picture])) == "simple"
    assert tier(seed, chat([{"type": "text", "text": "x" * 301}, picture])) == "medium"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (chat("Warum ist das so"), "lang"),
        (chat("warum nicht"), "kurz"),
        (chat("bitte Schritt für Schritt"), "lang"),
        (chat("请 给 我 解释一下"), "lang"),
        (chat("a b c d"), "kurz"),
        (chat(*["hi"] * 4), "lang"),
        (chat("some code"), "code"),
        (chat("is this c++?"), "code"),
        (chat("x" * 51), "code"),
        (chat("explain the rain to me"), "kurz"),
    ],
)
def test_a_site_has_tiers_and_words_of_its_own(own: ModuleType, data: dict[str, Any], expected: str) -> None:
    assert tier(own, data) == expected


def test_one_more_difficult_than_another_wins(own: ModuleType) -> None:
    assert tier(own, chat("warum hat mein code fehler")) == "code"


def test_settings_come_from_the_inventory(seed: ModuleType) -> None:
    settings = yaml.safe_load(Path(str(seed.__file__)).with_name("routing.yaml").read_text())
    assert settings["auto"]["names"] == ["auto"]
    assert settings["slots_url"] == "http://haproxy:8081/slots"
    assert settings["fallbacks"] == {"small": ["large"], "s": ["large"]}
    assert settings["pools"] == {"small": "small", "large": "large"}


# --- which pool: HAProxy's figures are [free slots, waiting, may wait, servers up] for each group of a pool


def chosen(module: ModuleType, rooms: dict[str, Any], monkeypatch: pytest.MonkeyPatch, times: int = 1) -> list[str]:
    """The pools for so many simple requests at once, none of which has reached HAProxy yet."""
    routing = module.CorralRouting(module._settings())

    async def ask() -> dict[str, Any]:
        return {pool: routing._rooms._room(pool, groups) for pool, groups in rooms.items()}

    monkeypatch.setattr(routing._rooms, "ask", ask)

    async def all_of_them() -> list[str]:
        requests = [{"model": "auto", **chat("hi")} for _ in range(times)]
        return [
            (await routing.async_pre_call_hook(None, None, request, "acompletion"))["model"] for request in requests
        ]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ({"small": [1, 0, 2, 1]}, {"large": [2, 0, 2, 1]}, "small"),
        ({"small": [0, 0, 2, 1]}, {"large": [2, 0, 2, 1]}, "large"),
        ({"small": [0, 0, 2, 1], "small.b": [1, 0, 2, 1]}, {"large": [2, 0, 2, 1]}, "small"),
        ({"small": [0, 0, 2, 1]}, {"large": [0, 0, 2, 1]}, "small"),
        ({"small": [0, 2, 2, 1]}, {"large": [0, 1, 2, 1]}, "large"),
        ({"small": [0, 2, 2, 1]}, {"large": [0, 2, 2, 1]}, "small"),
        ({"small": [0, 0, 2, 0]}, {"large": [0, 1, 2, 1]}, "large"),
        ({"small": [0, 0, 2, 0]}, {"large": [0, 0, 2, 0]}, "small"),
    ],
    ids=["free", "full", "a group is free", "both full", "first queue full", "both queues full", "down", "both down"],
)
def test_room_decides(
    seed: ModuleType, monkeypatch: pytest.MonkeyPatch, small: dict[str, Any], large: dict[str, Any], expected: str
) -> None:
    assert chosen(seed, {"small": small, "large": large}, monkeypatch) == [expected]


def test_requests_on_their_way_take_room(seed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = {"small": {"small": [1, 0, 2, 1]}, "large": {"large": [2, 0, 1, 1]}}
    pools = chosen(seed, rooms, monkeypatch, times=7)
    assert pools == ["small", "large", "large", "small", "small", "large", "small"]


def test_without_figures_a_tier_has_its_own_pool(seed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(seed, {}, monkeypatch, times=3) == ["small"] * 3
