"""`models load` and its kin with stand-ins; real router, HAProxy and its service are in tests/compose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
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
    """A host whose only container is a router with room for one model: what it holds, and what it was told."""

    loaded: str
    broken: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)
    name: str = "box"
    plan: Any = None

    def run(self, words: Sequence[str], **_: Any) -> Done:
        path, body = words[-2:]
        if path == "/models/unload":
            self.said.append(f"unload {json.loads(body)['model']}")
            self.loaded = ""
        if path.startswith("/props"):
            pool = path.partition("=")[2]
            self.said.append(f"load {pool}")
            self.loaded = "" if pool in self.broken else pool
        states = {name: "loaded" if name == self.loaded else "unloaded" for name in "abc"}
        data = [{"id": name, "status": {"value": state}} for name, state in states.items()]
        return Done(0, json.dumps({"data": data}) + "\n200", "")


@dataclass
class Books:
    """A balancer with one server, and what was asked of it."""

    # Numbers of requests, one for each look at the server.
    in_flight: list[int]
    has_lua: bool = True
    asked: list[str] = field(default_factory=list)

    def servers(self) -> dict[str, Server]:
        count = self.in_flight.pop(0) if self.in_flight else 0
        return {"box-d-1": Server("d", "box-d-1", "UP", count, 0, "", 1, is_out=False)}

    def hold(self, group: str, _seconds: int) -> bool:
        self.asked.append(f"hold {group}")
        return self.has_lua

    def __getattr__(self, name: str) -> Any:
        return lambda _server: self.asked.append(name)


def farm(tmp_path: Path, router: Router, balancer: Books | None = None) -> tuple[Change, dict[str, Place]]:
    plan = plan_of(tmp_path, "loaded: 1", more="  d: {model: c, on: {host: box, gpus: 1}}\n")
    router.plan = plan
    places = {item.pool: Place(cast(ComposeHost, router), item) for item in plan.site.replicas}
    return Change(plan, tmp_path, cast(Balancer, balancer), Board(Console(quiet=True))), places


def test_without_a_balancer_the_router_changes_its_models(tmp_path: Path) -> None:
    router = Router("a")
    change, places = farm(tmp_path, router)
    serving.load(change, [places["b"]])
    serving.load(change, [places["c"]], "b")
    serving.unload(change, [places["c"]])
    assert router.said == ["load b", "unload b", "load c", "unload c"]


def test_without_a_balancer_a_model_that_does_not_load_leaves_the_former_one(tmp_path: Path) -> None:
    router = Router("a", {"b"})
    change, places = farm(tmp_path, router)
    with pytest.raises(CorralError, match=r"b \(box/turns\) does not load.*what was in memory is there again"):
        serving.load(change, [places["b"]])
    assert router.loaded == "a"
    with pytest.raises(UsageError, match="c is not in memory there"):
        serving.load(change, [places["b"]], "c")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, UsageError, r"b \(box/turns\): c is not in memory there"),
        (401, CorralError, r"b \(box/turns\): Invalid API Key; .*secrets init"),
        (502, CorralError, r"b \(box/turns\): it ended; a is back\n  docker logs --tail 50 box-turns on box"),
        (504, CorralError, r"b \(box/turns\): a still has requests$"),
    ],
)
def test_what_the_gateway_refuses_is_said(tmp_path: Path, status: int, error: type[CorralError], words: str) -> None:
    place = farm(tmp_path, Router("a"))[1]["b"]
    message = {
        401: "Invalid API Key",
        400: "c is not in memory there",
        502: "it ended; a is back",
        504: "a still has requests",
    }[status]

    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.url.path, json.loads(request.content)) == ("/models/load", {"model": "b", "instead_of": "c"})
        return httpx.Response(status, json={"error": {"message": message}})

    with (
        httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(error, match=words),
    ):
        serving.ask_to(client, "load", place, "c")


def test_a_pool_that_is_also_on_another_hosts_shared_server_is_changed_as_a_whole(tmp_path: Path) -> None:
    change, places = farm(tmp_path, Router("a"), Books([]))
    elsewhere = Place(cast(ComposeHost, SimpleNamespace(name="other")), places["a"].replica)
    with pytest.raises(UsageError, match=r"a is on box, too.*leave --host out"):
        serving.unload(change, [elsewhere])


def stopping_host(plan: Plan, stopped: list[tuple[str, ...]]) -> ComposeHost:
    return cast(
        ComposeHost,
        SimpleNamespace(name="box", plan=plan, out=Path(), compose=lambda *words, **_: stopped.append(words)),
    )


@pytest.mark.parametrize(
    ("has_lua", "asked"),
    [(True, ["hold d", "take_out", "put_back", "release"]), (False, ["hold d", "take_out", "put_back"])],
)
def test_a_server_of_its_own_is_stopped_once_its_answers_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_lua: bool, asked: list[str]
) -> None:
    """001-07: in-flight answers end first."""
    books = Books([0, 0, 2, 1], has_lua)
    monkeypatch.setattr(rolling, "running_balancer", lambda *_: books)
    change, places = farm(tmp_path, Router(""), books)
    stopped: list[tuple[str, ...]] = []
    serving.unload(change, [Place(stopping_host(change.plan, stopped), places["d"].replica)])
    assert (books.in_flight, books.asked, stopped) == ([], asked, [("stop", places["d"].replica.service)])


def test_answers_that_do_not_end_keep_their_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books([1] * 50)
    monkeypatch.setattr(rolling, "running_balancer", lambda *_: books)
    monkeypatch.setattr(rolling, "answer_timeout_s", lambda _site, _pool: 0)
    change, places = farm(tmp_path, Router(""), books)
    stopped: list[tuple[str, ...]] = []
    with pytest.raises(CorralError, match="1 requests are not done after 0 s; it goes on"):
        serving.unload(change, [Place(stopping_host(change.plan, stopped), places["d"].replica)])
    assert (books.asked, stopped) == (["hold d", "put_back", "release"], [])


def test_a_name_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    _, places = farm(tmp_path, Router("a"))
    with pytest.raises(UsageError, match='no pool named "e"'):
        serving.chosen(list(places.values()), ["e"])


def test_a_container_with_a_published_port_is_found_at_either_address(tmp_path: Path) -> None:
    """`restart` of a shared server waited a minute for each pool whose name HAProxy had looked up as the other one."""
    networks = {"site_door": "172.19.0.2", "site_servers-llama": "172.18.0.3", "gone": ""}
    container = Container("1", "box-turns", "site", "turns", "image", "running", networks=networks)
    plan = plan_of(tmp_path, "loaded: 1, port: 9400")
    service = next(item for item in plan.services_of("box") if item.name == "turns")
    host = cast(ComposeHost, SimpleNamespace(container_of=lambda _name: container, name="box", project="site"))

    assert rolling.addresses_of(host, service) == ["172.18.0.3", "172.19.0.2"]
