"""Every scenario of `./generate.py bench`, for Locust: what to do is in the JSON file that CORRAL_LOAD names.

    CORRAL_LOAD=settings.json locust -f load-tests/locustfile.py --headless -u 1 -r 1

One Locust user sends everything. Open loop: requests are due at times of a Poisson process, whatever the farm does, and
are measured from when they were due. Closed loop: so many clients, each with one request at a time.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import requests
from gevent.pool import Group
from locust import User, events, task
from measured import Measured, Place, ask
from prompts import prompt

SETTINGS: dict[str, Any] = json.loads(Path(os.environ["CORRAL_LOAD"]).read_text(encoding="utf-8"))
MOST_CONNECTIONS = 4096
LEAST_JUDGED = 20
"""Requests before the share of failures means anything."""
PAUSE_S = 0.05


def _places() -> dict[str, list[Place]]:
    """Where each task may go, with its keys from the environment."""
    found = {}
    for item in SETTINGS["tasks"]:
        found[item["name"]] = [
            Place(one["name"], one["url"], one["model"], one["slots"], _headers(one)) for one in item["places"]
        ]
    return found


def _headers(one: dict[str, Any]) -> dict[str, str]:
    key = os.environ.get(one["key"], "") if one["key"] else ""
    if not key:
        return {}
    return {one["key_header"]: key} if one["key_header"] else {"Authorization": f"Bearer {key}"}


class Farm(User):
    """The only user: it keeps the clock and starts everybody else."""

    fixed_count = 1

    def on_start(self) -> None:
        """Opens the file for raw data."""
        self.chance = random.Random(SETTINGS["seed"])  # noqa: S311 - no secret
        self.places = _places()
        self.under_way = Group()
        self.session = requests.Session()
        self.session.trust_env = False
        adapter = requests.adapters.HTTPAdapter(pool_connections=64, pool_maxsize=MOST_CONNECTIONS)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        self.rows = Path(SETTINGS["rows"]).open("w", encoding="utf-8")  # noqa: SIM115 - closed at the end
        self.in_flight = self.sent = self.failed = self.surplus = 0
        self.is_over = False

    @task
    def run_all(self) -> None:
        """Everything, from the first stage to the last answer."""
        began = time.monotonic()
        try:
            for at, count in self._schedule():
                gevent.sleep(max(0.0, began + at - time.monotonic()))
                if self._has_failed_too_often():
                    break
                for _ in range(count):
                    self.under_way.spawn(self._one, self._choose(), began + at)
            self.is_over = True
            self.under_way.join(timeout=SETTINGS["timeout_s"])
        finally:
            self.under_way.kill()
            end = {"end": True, "aborted": self._has_failed_too_often(), "lasted_s": time.monotonic() - began}
            self.rows.write(json.dumps(end) + "\n")
            self.rows.close()
            gevent.spawn(self._finish)
        gevent.sleep(SETTINGS["timeout_s"])

    def _finish(self) -> None:
        """Ends a run without a page; with one, the page stays."""
        runner = self.environment.runner
        if self.environment.web_ui is None:
            runner.quit()
        else:
            runner.stop()

    # --- when

    def _schedule(self) -> Iterator[tuple[float, int]]:
        """When so many requests are due, in seconds from the start. Closed loops start their clients here."""
        start, before = 0.0, 0.0
        for stage in SETTINGS["stages"]:
            end = start + stage["duration_s"]
            if SETTINGS["loop"] == "closed":
                yield from self._clients(start, end, before, stage["to"])
            elif SETTINGS["loop"] == "burst":
                yield from ((at, int(stage["to"])) for at in _beats(start, end, stage["every_s"]))
            else:
                yield from self._arrivals(start, end, stage["from"], stage["to"])
            start, before = end, stage["to"]
            if SETTINGS["loop"] == "closed":
                yield start, 0

    def _arrivals(self, start: float, end: float, first: float, last: float) -> Iterator[tuple[float, int]]:
        """A Poisson process whose rate goes in a line from first to last (requests a second)."""
        fastest = max(first, last)
        at = start
        while fastest > 0:
            at += self.chance.expovariate(fastest)
            if at >= end:
                return
            rate = first + (last - first) * (at - start) / (end - start)
            if self.chance.random() < rate / fastest:
                yield at, 1

    def _clients(self, start: float, end: float, before: float, wanted: float) -> Iterator[tuple[float, int]]:
        """Clients come and go in a line from before to wanted."""
        change = int(wanted) - int(before)
        for number in range(abs(change)):
            at = start + (end - start) * number / abs(change) if SETTINGS["ramp"] else start
            yield at, 0
            if change > 0:
                self.under_way.spawn(self._client)
            else:
                self.surplus += 1

    def _client(self) -> None:
        """One client of a closed loop: a request, its answer, the next request."""
        history: list[dict[str, str]] = []
        chosen = self._choose()
        while not self.is_over and not self._has_failed_too_often():
            if self.surplus:
                self.surplus -= 1
                return
            if len(history) >= 2 * SETTINGS["turns"] or SETTINGS["turns"] == 1:
                history, chosen = [], self._choose()
            failures = self.failed
            self._one(chosen, time.monotonic(), history)
            if self.failed > failures:
                gevent.sleep(PAUSE_S)

    # --- what

    def _choose(self) -> dict[str, Any]:
        weights = [item["weight"] for item in SETTINGS["tasks"]]
        return self.chance.choices(SETTINGS["tasks"], weights)[0]

    def _body(self, item: dict[str, Any], place: Place, history: list[dict[str, str]]) -> dict[str, Any]:
        text = prompt(item["prompt"], self.chance, is_shared=SETTINGS["is_cached"])
        if item["kind"] == "chat":
            history.append({"role": "user", "content": text})
            return {
                "model": place.model, "messages": list(history), "max_tokens": item["max_tokens"], "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
        if item["kind"] == "image":
            return {"model": place.model, "prompt": text, "size": "512x512", "n": 1, "response_format": "b64_json"}
        return {"model": place.model, "input": text}

    def _one(self, item: dict[str, Any], due: float, history: list[dict[str, str]] | None = None) -> None:
        """One request from due to written down."""
        place = min(self.places[item["name"]], key=lambda one: one.in_flight / one.slots)
        talk = [] if history is None else history
        body = self._body(item, place, talk)
        self.in_flight += 1
        place.in_flight += 1
        self.sent += 1
        late = max(0.0, time.monotonic() - due)
        found = Measured(item["name"], item["pool"], due_at=time.time() - late, lag_s=late, in_flight=self.in_flight)
        try:
            text = ask(self.session, place, found, body, SETTINGS["timeout_s"])
        except gevent.GreenletExit:
            text, found.error = "", "timeout"
        finally:
            self.in_flight -= 1
            place.in_flight -= 1
        if found.error:
            self.failed += 1
            talk.clear()
        else:
            talk.append({"role": "assistant", "content": text})
        self.rows.write(json.dumps(found.row()) + "\n")
        self._tell_locust(found)

    def _has_failed_too_often(self) -> bool:
        budget = SETTINGS["error_budget"]
        return budget is not None and self.sent >= LEAST_JUDGED and self.failed > budget * self.sent

    def _tell_locust(self, found: Measured) -> None:
        """What the page and the statistics of Locust show."""
        failure = RuntimeError(f"{found.error}: {found.detail}") if found.error else None
        times = {"e2e": found.e2e_s, "ttft": found.ttft_s, "tpot": found.tpot_s}
        for kind, seconds in times.items():
            if seconds is not None and (kind == "e2e" or failure is None):
                events.request.fire(
                    request_type=kind, name=found.task, response_time=seconds * 1000,
                    response_length=found.tokens_out, exception=failure if kind == "e2e" else None, context={},
                )  # fmt: skip


def _beats(start: float, end: float, every: float) -> Iterator[float]:
    at = start
    while at < end:
        yield at
        at += every
