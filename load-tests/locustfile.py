"""Every scenario of `./generate.py bench`, for Locust; CORRAL_LOAD names the JSON file with the settings.

    CORRAL_LOAD=settings.json locust -f load-tests/locustfile.py --headless

Open loop and bursts: one Locust user keeps the clock. Requests are due at times of a Poisson process, whatever the farm
does, and are measured from when they were due. Closed loop: a Locust user is a client with one request at a time.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gevent
import requests
from gevent.pool import Group
from locust import LoadTestShape, User, events, task
from locust.exception import StopUser

from measured import Measured, Place, ask, body_of, open_session, place_of
from prompts import prompt

SETTINGS: dict[str, Any] = json.loads(Path(os.environ["CORRAL_LOAD"]).read_text(encoding="utf-8"))
IS_CLOSED = SETTINGS["loop"] == "closed"
LASTS_S = sum(stage["duration_s"] for stage in SETTINGS["stages"])
# Requests before the share of failures means anything.
LEAST_JUDGED = 20
PAUSE_S = 0.05


@dataclass
class Load:
    """The whole load: its targets, its counts, its file of raw data."""

    chance: random.Random = field(default_factory=lambda: random.Random(SETTINGS["seed"]))  # noqa: S311 - no secret
    places: dict[str, list[Place]] = field(
        default_factory=lambda: {
            item["name"]: [place_of(one, os.environ) for one in item["places"]] for item in SETTINGS["tasks"]
        }
    )
    session: requests.Session = field(default_factory=open_session)
    began: float = 0.0
    in_flight: int = 0
    sent: int = 0
    failed: int = 0

    def begin(self) -> None:
        """Opens a new file of raw data for each start in Locust's web interface."""
        self.rows = Path(SETTINGS["rows"]).open("w", encoding="utf-8")  # noqa: SIM115 - closed by finish
        self.began = time.monotonic()
        self.sent = self.failed = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether the load must stop because too many requests failed."""
        budget = SETTINGS["error_budget"]
        return budget is not None and self.sent >= LEAST_JUDGED and self.failed > budget * self.sent

    def choose(self) -> dict[str, Any]:
        """A random task, by weight."""
        return self.chance.choices(SETTINGS["tasks"], [item["weight"] for item in SETTINGS["tasks"]])[0]

    def send(self, item: dict[str, Any], due: float, history: list[dict[str, str]]) -> bool:
        """Sends and records one request; returns whether it was answered, and extends the history."""
        place = min(self.places[item["name"]], key=lambda one: one.in_flight / one.slots)
        text = prompt(item["prompt"], self.chance)
        history.append({"role": "user", "content": text})
        self.in_flight += 1
        place.in_flight += 1
        self.sent += 1
        late = max(0.0, time.monotonic() - due)
        found = Measured(item["name"], item["pool"], due_at=time.time() - late, lag_s=late, in_flight=self.in_flight)
        answer = ""
        try:
            body = body_of(item["kind"], place.model, history, item["max_tokens"])
            answer = ask(self.session, place, found, body, SETTINGS["timeout_s"])
        except gevent.GreenletExit:
            found.error = "timeout"
        finally:
            self.in_flight -= 1
            place.in_flight -= 1
        self.failed += bool(found.error)
        history.append({"role": "assistant", "content": answer})
        self.rows.write(json.dumps(found.row()) + "\n")
        _tell_locust(found)
        return not found.error

    def finish(self) -> None:
        """Closes the file of raw data."""
        end = {"end": True, "aborted": self.is_hopeless, "lasted_s": time.monotonic() - self.began}
        self.rows.write(json.dumps(end) + "\n")
        self.rows.close()


LOAD = Load()


@events.test_start.add_listener
def _begin(**_: Any) -> None:
    LOAD.begin()


@events.test_stop.add_listener
def _finish(**_: Any) -> None:
    LOAD.finish()


class Steps(LoadTestShape):
    """The number of clients over time: the stages of the settings; one in an open loop."""

    def tick(self) -> tuple[int, float] | None:
        """Users and their spawn rate per second; None ends the load."""
        at, before = self.get_run_time(), 0.0
        if LOAD.is_hopeless:
            return None
        for stage in SETTINGS["stages"]:
            if at < stage["duration_s"]:
                share = at / stage["duration_s"] if SETTINGS["is_ramped"] else 1.0
                users = round(before + share * (stage["to"] - before)) if IS_CLOSED else 1
                return users, max(1, users)
            at, before = at - stage["duration_s"], stage["to"]
        return None


class Client(User):
    """One client of a closed loop: a request, its answer, the next request."""

    abstract: ClassVar[bool] = not IS_CLOSED

    def on_start(self) -> None:
        """Starts with an empty conversation."""
        self.history: list[dict[str, str]] = []
        self.chosen = LOAD.choose()

    @task
    def turn(self) -> None:
        """One turn of a conversation; after the last one, a new conversation."""
        if time.monotonic() >= LOAD.began + LASTS_S or LOAD.is_hopeless:
            raise StopUser
        if len(self.history) >= 2 * SETTINGS["turns"]:
            self.on_start()
        if not LOAD.send(self.chosen, time.monotonic(), self.history):
            self.history.clear()
            gevent.sleep(PAUSE_S)


class Clock(User):
    """The only user of an open loop: it starts every request when it is due."""

    abstract: ClassVar[bool] = IS_CLOSED

    @task
    def run_all(self) -> None:
        """Runs all stages, and waits for the last answer."""
        under_way = Group()
        try:
            for at, count in _schedule():
                gevent.sleep(max(0.0, LOAD.began + at - time.monotonic()))
                if LOAD.is_hopeless:
                    break
                for _ in range(count):
                    under_way.spawn(LOAD.send, LOAD.choose(), LOAD.began + at, [])
            under_way.join(timeout=SETTINGS["timeout_s"])
        finally:
            under_way.kill()
        raise StopUser


def _schedule() -> Iterator[tuple[float, int]]:
    """Due times of the requests, in seconds from the start."""
    start = 0.0
    for stage in SETTINGS["stages"]:
        end = start + stage["duration_s"]
        if SETTINGS["loop"] == "burst":
            yield from ((at, int(stage["to"])) for at in _beats(start, end, stage["every_s"]))
        else:
            yield from ((at, 1) for at in _arrivals(start, end, stage["start"], stage["to"]))
        start = end


def _arrivals(start: float, end: float, first: float, last: float) -> Iterator[float]:
    """A Poisson process with a rate that changes linearly from first to last (requests per second)."""
    fastest = max(first, last)
    at = start
    while fastest > 0:
        at += LOAD.chance.expovariate(fastest)
        if at >= end:
            return
        rate = first + (last - first) * (at - start) / (end - start)
        if LOAD.chance.random() < rate / fastest:
            yield at


def _beats(start: float, end: float, every: float) -> Iterator[float]:
    at = start
    while at < end:
        yield at
        at += every


def _tell_locust(found: Measured) -> None:
    """Reports a request to Locust's web interface and statistics."""
    failure = RuntimeError(f"{found.error}: {found.detail}") if found.error else None
    times = {"e2e": found.e2e_s, "ttft": found.ttft_s, "tpot": found.tpot_s}
    for kind, seconds in times.items():
        if seconds is not None and (kind == "e2e" or failure is None):
            events.request.fire(
                request_type=kind, name=found.task, response_time=seconds * 1000,
                response_length=found.tokens_out, exception=failure if kind == "e2e" else None, context={},
            )  # fmt: skip
