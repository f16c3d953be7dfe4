"""`models load` and its kin: a router and a balancer that only keep books; the real ones are in tests/compose."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from corral.build import Plan
from corral.errors import CorralError, UsageError
from corral.runtime.board import Board
from corral.runtime.docker import Container
from corral.runtime.haproxy import Balancer, Server
from corral.runtime.hosts import ComposeHost, Done
from corral.verbs.models import serving
from corral.verbs.models.serving import Change, Place
from corral.verbs.up import rolling
from tests.unit.test_shared import plan_of


@dataclass
class Router:
    """A host whose only container is a router: what it holds, what cannot be loaded, and what it was told."""

    plan: Plan
    loaded: list[str]
    broken: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)
    name: str = "box"

    def run(self, words: Sequence[str], **_: Any) -> Done:
        method, path, body = words[-3:]
        pool = json.loads(body)["model"] if body else ""
        if method == "POST":
            self.said.append(f"{path.removeprefix('/models/')} {pool}")
        if path == "/models/unload" and pool in self.loaded:
            self.loaded.remove(pool)
        if path == "/models/load":
            (self.failed.add if pool in self.broken else self.loaded.append)(pool)
        states = {name: "loaded" if name in self.loaded else "unloaded" for name in "abc"}
        data = [
            {"id": name, "status": {"value": state, "failed": name in self.failed}} for name, state in states.items()
        ]
        return Done(0, json.dumps({"data": data}) + "\n200", "")


@dataclass
class Books:
    """A balancer with one server for each pool, and what was asked of it."""

    router: Router
    idle: dict[str, float] = field(default_factory=dict)
    # Numbers of requests, one for each time that somebody looks.
    in_flight: dict[str, list[int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def servers(self) -> dict[str, Server]:
        counts = {pool: left.pop(0) if (left := self.in_flight.get(pool, [])) else 0 for pool in "abc"}
        return {
            f"box-{pool}-1": Server(pool, f"box-{pool}-1", "UP", count, 0, "", 1, is_out=False)
            for pool, count in counts.items()
        }

    def idle_seconds(self) -> dict[str, float]:
        return {f"box-{pool}-1": seconds for pool, seconds in self.idle.items()}

    def hold(self, group: str, _seconds: int) -> bool:
        self.asked.append(f"hold {group}")
        return True

    def release(self, group: str) -> None:
        self.asked.append(f"release {group}")


def farm(
    tmp_path: Path, loaded: Sequence[str], places: int = 1, **idle: float
) -> tuple[Router, Books, Change, dict[str, Place]]:
    plan = plan_of(tmp_path, f"loaded: {places}")
    router = Router(plan, list(loaded))
    books = Books(router, idle)
    host = cast(ComposeHost, router)
    found = {item.pool: Place(host, item) for item in plan.site.replicas}
    return router, books, Change(plan, cast(Balancer, books), Board(Console(quiet=True))), found


def test_the_least_recently_used_goes_when_there_is_no_place(tmp_path: Path) -> None:
    """002-03: as the balancer saw it; a model that was never asked goes before all others."""
    router, _, change, places = farm(tmp_path, "ab", 2, a=5, b=90)
    serving.load(change, [places["c"]])
    assert router.said == ["unload b", "load c"]

    router, _, change, places = farm(tmp_path, "ab", 2, a=math.inf, b=90)
    serving.load(change, [places["c"]])
    assert router.said == ["unload a", "load c"]


def test_nothing_goes_while_there_is_room_and_what_is_there_stays(tmp_path: Path) -> None:
    router, _, change, places = farm(tmp_path, "a", 2)
    serving.load(change, [places["a"], places["b"]])
    assert router.said == ["load b"]


def test_whoever_goes_has_no_request_and_new_ones_wait_until_the_end(tmp_path: Path) -> None:
    """001-07: in-flight answers end first."""
    router, books, change, places = farm(tmp_path, "a")
    books.in_flight["a"] = [2, 2, 1]
    serving.load(change, [places["b"]])

    assert books.in_flight["a"] == [], "it looked until there was none"
    assert router.said == ["unload a", "load b"]
    assert sorted(books.asked) == sorted(f"{verb} {pool}" for verb in ("hold", "release") for pool in "abc")
    assert [words.partition(" ")[0] for words in books.asked] == ["hold"] * 3 + ["release"] * 3


def test_a_model_that_does_not_load_leaves_the_former_one(tmp_path: Path) -> None:
    router, books, change, places = farm(tmp_path, "a")
    router.broken = {"b"}
    with pytest.raises(CorralError, match=r"b \(box/turns\) does not load.*\n  a \(box/turns\) is in memory again"):
        serving.load(change, [places["b"]])

    assert router.loaded == ["a"]
    assert books.asked.count("release a") == 1


def test_answers_that_do_not_end_keep_their_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router, books, change, places = farm(tmp_path, "a")
    books.in_flight["a"] = [1] * 50
    monkeypatch.setattr(serving, "answer_timeout_s", lambda _site, _pool: 0)
    with pytest.raises(CorralError, match="it stays in memory"):
        serving.unload(change, [places["a"]])
    assert (router.loaded, books.asked) == (["a"], ["hold a", "release a"])


def test_the_one_that_is_to_go_has_to_be_there(tmp_path: Path) -> None:
    _, _, change, places = farm(tmp_path, "a")
    with pytest.raises(UsageError, match="c is not in memory on turns, which holds a"):
        serving.load(change, [places["b"]], "c")


def test_a_name_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    _, _, _, places = farm(tmp_path, "a")
    with pytest.raises(UsageError, match='no pool named "d"'):
        serving.chosen(list(places.values()), ["d"])


def test_a_container_with_a_published_port_is_found_at_either_address(tmp_path: Path) -> None:
    """`restart` of a shared server waited a minute for each pool whose name HAProxy had looked up as the other one."""
    networks = {"site_door": "172.19.0.2", "site_servers-llama": "172.18.0.3", "gone": ""}
    container = Container("1", "box-turns", "site", "turns", "image", "running", networks=networks)
    plan = plan_of(tmp_path, "loaded: 1, port: 9400")
    service = next(item for item in plan.services_of("box") if item.name == "turns")
    host = cast(ComposeHost, SimpleNamespace(container_of=lambda _name: container, name="box", project="site"))

    assert rolling.addresses_of(host, service) == ["172.18.0.3", "172.19.0.2"]
