"""Streams that wait: their clients are told so, in every interface, and of an error after that as an event."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from tests.processes import interfaces
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, EVEN_DEPTH, POOLS, Extras, Farm, Mode, inventory_of, keep_only, running
from tests.processes.helpers import wait_until
from tests.processes.interfaces import INTERFACES

pytestmark = pytest.mark.needs("haproxy")

QUESTION = [{"role": "user", "content": "hello"}]
PIECES = "piece0 piece1 piece2 piece3 piece4 piece5 "
# In place of 15 s; a request waits longer in the pool `brief` until it is refused.
EVERY_S = 0.3
SIGNS = dict.fromkeys(INTERFACES, ": keep-alive") | {"messages": "event: ping"}
every_interface = pytest.mark.parametrize("name", INTERFACES)


def _site(mode: Mode, ports: dict[str, int], _extras: Extras) -> dict[str, Any]:
    site = inventory_of(mode, ports, Extras())
    keep_only(site, "even", "brief")
    del site["gateway"]["extra"]
    return site


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    """A farm whose LiteLLM is less patient than a user's."""
    with running("slots", _site) as farm:
        callback = farm.folder / "litellm" / "corral_errors.py"
        patient = callback.read_text()
        callback.write_text(patient.replace("KEEP_ALIVE_S = 15.0", f"KEEP_ALIVE_S = {EVERY_S}"))
        assert callback.read_text() != patient
        farm.restart("litellm")
        yield farm


@contextmanager
def busy(farm: Farm, pool: str) -> Iterator[None]:
    """Every slot of a pool is taken for as long as the block lasts."""
    names = tuple(POOLS[pool])
    with farm.fakes.behaving(names, "hold"), ThreadPoolExecutor(len(names)) as threads:
        asked = [threads.submit(farm.ask, pool) for _ in names]
        wait_until(lambda: farm.fakes.in_flight(names) == len(names), 20, "all slots are taken")
        yield
        farm.fakes.tell(names)
        assert {item.result().status_code for item in asked} == {200}


class Stream:
    """A streamed answer that is read in a thread of its own."""

    def __init__(self, farm: Farm, pool: str, name: str) -> None:
        self.text = ""
        self.status = 0
        self._body = {"model": pool, **INTERFACES[name].body("be brief", QUESTION, 7), "stream": True}
        self._arguments = (farm, INTERFACES[name].path)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        farm, path = self._arguments
        with farm.client.stream("POST", path, json=self._body) as answer:
            self.status = answer.status_code
            for piece in answer.iter_text():
                self.text += piece

    def all_of_it(self) -> str:
        self._thread.join()
        return self.text


@every_interface
def test_a_stream_that_waits_says_so_and_goes_on(farm: Farm, name: str) -> None:
    with busy(farm, "even"):
        stream = Stream(farm, "even", name)
        wait_until(lambda: stream.text.count(SIGNS[name]) >= 2, 20, "the client knows that it waits")
        assert (stream.status, farm.queue("even")) == (200, 1)
    said = INTERFACES[name].streamed(interfaces.events_of(stream.all_of_it()))
    assert (said.text, said.stop) == (PIECES, INTERFACES[name].stops["stop"])


@every_interface
def test_a_stream_that_pauses_says_so(farm: Farm, name: str) -> None:
    with farm.fakes.behaving(EVEN, "hold"):
        stream = Stream(farm, "even", name)
        # A first request may be slow enough for a sign before its first piece.
        wait_until(lambda: SIGNS[name] in stream.text.partition("piece2")[2], 20, "the client knows that it goes on")
    text = stream.all_of_it()
    paused = text.index(SIGNS[name], text.index("piece2"))
    assert "piece5" in text[paused:]
    assert text[:paused].endswith("\n\n")


@every_interface
def test_an_error_after_that_is_the_last_event(farm: Farm, name: str) -> None:
    """It has waited for as long as it may."""
    with busy(farm, "brief"):
        stream = Stream(farm, "brief", name)
        text = stream.all_of_it()
    assert stream.status == 200
    assert text.startswith(SIGNS[name])
    last = events_of(text)[-1]
    if name == "responses":
        assert Response.model_validate(last["response"]).status == last["type"].removeprefix("response.") == "failed"
    else:
        assert (last["type"], last["error"]["type"]) == ("error", "rate_limit_error")
    error = (last.get("response") or last)["error"]
    assert (error["code"], error["message"]) == ("rate_limit_exceeded", "no replica could take this request in time")
    assert text.endswith("\n\n")
    assert ("event: error\n" in text, "data: [DONE]" in text) == (name == "messages", name != "messages")


@every_interface
def test_a_refusal_without_a_wait_has_its_status(farm: Farm, name: str) -> None:
    with busy(farm, "even"), ThreadPoolExecutor(EVEN_DEPTH) as threads:
        waiting: list[Future[httpx.Response]] = [threads.submit(farm.ask, "even") for _ in range(EVEN_DEPTH)]
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 20, "the queue is full")
        stream = Stream(farm, "even", name)
        error = json.loads(stream.all_of_it())["error"]
        assert (stream.status, error["code"]) == (429, "rate_limit_exceeded")
        farm.fakes.tell(EVEN)
        assert {item.result().status_code for item in waiting} == {200}


def test_a_client_that_leaves_gives_its_place_up(farm: Farm) -> None:
    with busy(farm, "even"):
        with farm.client.stream("POST", "/v1/chat/completions", json=body("even")) as answer:
            pieces = answer.iter_text()
            assert next(pieces).startswith(SIGNS["chat"])
            wait_until(lambda: farm.queue("even") == 1, 10, "it waits")
        wait_until(lambda: farm.queue("even") == 0, 10, "nothing waits")


def test_openais_library_waits_and_knows_the_error(farm: Farm) -> None:
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    with openai.OpenAI(base_url=base, api_key=farm.key, max_retries=0) as client:
        with busy(farm, "brief"), pytest.raises(openai.APIError) as refused:
            list(client.chat.completions.create(**body("brief")))
        assert refused.value.code == "rate_limit_exceeded"
        with busy(farm, "even"):
            chunks = client.chat.completions.create(**body("even"))
            wait_until(lambda: farm.queue("even") == 1, 10, "it waits")
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == PIECES


def body(pool: str) -> dict[str, Any]:
    return {"model": pool, "messages": QUESTION, "stream": True}


def events_of(text: str) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in data]
