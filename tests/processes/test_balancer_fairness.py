"""Fairness between consumers in the rendered HAProxy, without LiteLLM in front (B10).

The header is what LiteLLM's callback sends; `test_gateway.py` has one case through LiteLLM.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import mean

import httpx
import pytest

from tests.processes.balancing import Balancing, balancing
from tests.processes.helpers import wait_until

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.xdist_group("balancer-fairness")]

SLOTS, DEPTH = 2, 4
INSIDE = SLOTS + DEPTH
SERVICE_S = 0.1
LIMIT_S = 20.0
PAIR, SOLO = ("pair-1",), ("solo-1",)


class Pools:
    """A pool of one fake with two slots, one of a fake with one slot, and who asks them."""

    def __init__(self, running: Balancing) -> None:
        self.running = running
        self.fakes = running.fakes
        self.client = httpx.Client(trust_env=False, timeout=LIMIT_S, limits=httpx.Limits(max_connections=None))

    def ask(
        self, consumer: str, weight: int = 1, service_s: float = SERVICE_S, pool: str = "pair", kind: str = ""
    ) -> httpx.Response:
        """The answer of the balancer to one request of this consumer; `kind` may be `background`."""
        headers = {"x-corral-consumer": consumer, "x-corral-weight": str(weight), "x-corral-class": kind}
        url = f"{self.running.url('balancer_port')}/{pool}/any/v1/chat/completions"
        return self.client.post(url, json={"model": pool, "service_s": service_s, "user": consumer}, headers=headers)

    def ask_at_the_door(self, key: str) -> int:
        """The status that a client with this key gets: 429 from the public frontend, or 200 from LiteLLM's stand-in."""
        url = f"{self.running.url('port')}/v1/chat/completions"
        body = {"model": "pair", "messages": [{"role": "user", "content": "hello"}]}
        return self.client.post(url, json=body, headers={"Authorization": f"Bearer {key}"}).status_code

    def queued(self, pool: str = "pair") -> int:
        """Requests that wait for a slot."""
        text = self.client.get(f"{self.running.url('stats_port')}/metrics").text
        return int(float(text.partition(f'haproxy_backend_current_queue{{proxy="{pool}"}} ')[2].split()[0]))

    def held(self) -> dict[str, int]:
        """Requests in flight to the pool, by consumer."""
        text = self.running.balancer.ask("show table Keys")
        found = re.findall(r"key=pair/(\S+) .*conn_cur=([1-9]\d*)", text)
        return {consumer: int(count) for consumer, count in found}

    def waits(self, consumer: str, count: int, pool: str) -> list[float]:
        """How long each of so many requests, one after the other, had to wait; all of them are answered."""
        found = []
        for _ in range(count):
            begin = time.monotonic()
            assert self.ask(consumer, pool=pool).status_code == 200
            found.append(time.monotonic() - begin - SERVICE_S)
        return found

    @contextmanager
    def asking(self, consumer: str, at_once: int, pool: str = "pair") -> Iterator[Counter[int]]:
        """This consumer keeps so many requests in flight, whatever it is answered; counts the statuses."""
        is_over, statuses = threading.Event(), Counter[int]()

        def ask_on() -> None:
            while not is_over.is_set():
                spread = random.uniform(0.5, 1.5) if pool == "pair" else 1  # noqa: S311 - or its slots end in step
                status = self.ask(consumer, 1, spread * SERVICE_S, pool).status_code
                statuses[status] += 1
                is_over.wait(0.2 if status == 429 else 0)

        threads = [threading.Thread(target=ask_on) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        try:
            yield statuses
        finally:
            is_over.set()
            for thread in threads:
                thread.join(LIMIT_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = {"pair": dict.fromkeys(PAIR, SLOTS), "solo": dict.fromkeys(SOLO, 1)}
    queue = {"depth": DEPTH, "timeout_s": 15}
    names = {"solo": {"background": ["batch"]}}
    with balancing(tmp_path_factory.mktemp("fairness"), pools, names, queue=queue) as found:
        pool = Pools(found)
        with pool.client:
            wait_until(lambda: pool.ask("first").status_code == 200, LIMIT_S, "the pool answers")
            yield pool


@pytest.fixture
def pool(running: Pools) -> Pools:
    running.fakes.tell([*PAIR, *SOLO])
    running.fakes.reset()
    return running


def test_b10_a_flood_costs_another_key_no_longer_wait(pool: Pools) -> None:
    """On one slot, where waits do not depend on whether the slots end their answers in step."""
    with pool.asking("equal", 1, pool="solo"):
        beside_equal = mean(pool.waits("victim", 14, "solo")[2:])
    with pool.asking("aggressor", INSIDE + 2, pool="solo") as statuses:
        wait_until(lambda: statuses[429] > 0, LIMIT_S, "the pool is full")
        beside_flood = mean(pool.waits("victim", 14, "solo")[2:])
    assert beside_flood <= 1.5 * beside_equal


def test_b10_a_flood_costs_another_key_no_refusal(pool: Pools) -> None:
    with pool.asking("aggressor", INSIDE + 2) as statuses:
        wait_until(lambda: statuses[429] > 0, LIMIT_S, "the pool is full")
        waited = pool.waits("victim", 8, "pair")
    assert mean(waited) <= 1.5 * 1.5 * SERVICE_S, "the rest of one answer, the longest of which take 1.5 times as long"
    assert pool.fakes.seen()["pair-1"].most_in_flight == SLOTS


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ([("a", 1), ("a", 1), ("a", 1), ("b", 1)], ["a", "b", "a", "a"]),
        ([("b", 1), ("b", 1), ("a", 3), ("a", 3), ("a", 3)], ["b", "a", "a", "a", "b"]),
    ],
    ids=["equal", "three to one"],
)
def test_b10_turns_are_taken_by_weight(pool: Pools, asked: list[tuple[str, int]], served: list[str]) -> None:
    """Of those that wait for one slot, in the order in which they came."""

    def waits(number: int) -> bool:
        return pool.queued("solo") == number

    with ThreadPoolExecutor(len(asked) + 1) as threads, pool.fakes.behaving(SOLO, "hold"):
        answers = [threads.submit(pool.ask, "holder", pool="solo")]
        wait_until(lambda: pool.fakes.in_flight(SOLO) == 1, LIMIT_S, "the slot is taken")
        for number, (consumer, weight) in enumerate(asked, start=1):
            answers.append(threads.submit(pool.ask, consumer, weight, 0.0, "solo"))
            wait_until(partial(waits, number), LIMIT_S, "it waits")
    assert {answer.result().status_code for answer in answers} == {200}
    assert [body["user"] for body in pool.fakes.seen()["solo-1"].bodies] == ["holder", *served]


def test_b10_a_key_alone_gets_every_slot_and_the_whole_queue(pool: Pools) -> None:
    with ThreadPoolExecutor(INSIDE + 3) as threads, pool.fakes.behaving(PAIR, "hold"):
        asked = [threads.submit(pool.ask, "alone") for _ in range(INSIDE + 3)]
        wait_until(lambda: done(asked) == 3, LIMIT_S, "what does not fit is refused")
        assert (pool.fakes.in_flight(PAIR), pool.queued()) == (SLOTS, DEPTH)
    assert Counter(future.result().status_code for future in asked) == {200: INSIDE, 429: 3}


def test_b10_a_full_queue_has_room_for_keys_that_hold_less_than_their_share(pool: Pools) -> None:
    """Up to the double of its depth; at the public frontend, too, where the credential tells the consumer."""
    keys = ("sk-aggressor", "sk-victim", "sk-other")
    aggressor, victim, other = (hashlib.sha256(key.encode()).hexdigest()[:32] for key in keys)
    with ThreadPoolExecutor(2 * INSIDE) as threads, pool.fakes.behaving(PAIR, "hold"):
        asked = [threads.submit(pool.ask, aggressor) for _ in range(INSIDE)]
        wait_until(lambda: pool.queued() == DEPTH, LIMIT_S, "the queue is full")
        assert [pool.ask_at_the_door(key) for key in keys] == [429, 200, 200]
        asked += [threads.submit(pool.ask, victim) for _ in range(INSIDE // 2)]
        wait_until(lambda: pool.queued() == DEPTH + INSIDE // 2, LIMIT_S, "half of all places for the second of two")
        assert [pool.ask(aggressor).status_code, pool.ask(victim).status_code] == [429, 429]
        assert [pool.ask_at_the_door(key) for key in keys] == [429, 429, 200]
        asked.append(threads.submit(pool.ask, other))
        wait_until(lambda: pool.queued() == 2 * DEPTH, LIMIT_S, "one for the third")
        assert [pool.ask_at_the_door(key) for key in keys] == [429, 429, 429]
        assert pool.ask("fourth").status_code == 429
    assert {future.result().status_code for future in asked} == {200}


def test_b10_half_of_the_queue_is_shared_by_requests_of_the_background(pool: Pools) -> None:
    def batch(consumer: str) -> httpx.Response:
        return pool.ask(consumer, pool="solo", kind="background")

    with ThreadPoolExecutor(INSIDE) as threads, pool.fakes.behaving(SOLO, "hold"):
        asked = [threads.submit(batch, "first") for _ in range(4)]
        wait_until(lambda: (done(asked), pool.queued("solo")) == (1, DEPTH // 2), LIMIT_S, "half of the queue is full")
        asked.append(threads.submit(batch, "second"))
        wait_until(lambda: pool.queued("solo") == DEPTH // 2 + 1, LIMIT_S, "another key's waits, too")
        asked.append(threads.submit(pool.ask, "first", pool="solo"))
        wait_until(lambda: pool.queued("solo") == DEPTH, LIMIT_S, "what is no background finds all of it")
    answers = [future.result() for future in asked]
    assert Counter(answer.status_code for answer in answers) == {200: 5, 429: 1}
    assert "background" in next(answer.text for answer in answers if answer.status_code == 429)


def test_b10_a_held_pool_keeps_places_for_keys_that_hold_less_than_their_share(pool: Pools) -> None:
    """Requests are held while `up` changes a pool, and until it is the pool's turn on a shared server."""
    assert pool.running.balancer.hold("pair", 60)
    with ThreadPoolExecutor(INSIDE) as threads:
        try:
            asked = [threads.submit(pool.ask, "aggressor") for _ in range(DEPTH + 1)]
            wait_until(lambda: done(asked) == 1, LIMIT_S, "as many are held as may wait")
            asked.append(threads.submit(pool.ask, "victim"))
            wait_until(lambda: pool.held() == {"aggressor": DEPTH, "victim": 1}, LIMIT_S, "the victim's request, too")
        finally:
            pool.running.balancer.release("pair")
    assert Counter(future.result().status_code for future in asked) == {200: DEPTH + 1, 429: 1}


def test_b10_the_replica_does_not_see_who_asks(pool: Pools) -> None:
    assert pool.ask("somebody").status_code == 200
    [headers] = pool.fakes.seen()["pair-1"].headers
    assert not [name for name in headers if name.lower().startswith("x-corral")]


def done(futures: list[Future[httpx.Response]]) -> int:
    return sum(future.done() for future in futures)
