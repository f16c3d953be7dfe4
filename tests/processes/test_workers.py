"""Two workers of LiteLLM on a real farm: limits, keys and figures are as with one."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import httpx
import pytest
from rich.console import Console

from corral.components.litellm import workers
from corral.runtime import supervisor
from corral.runtime.board import Board
from corral.runtime.haproxy import balancer_of
from corral.verbs.keys import keys
from corral.verbs.up.rolling import workers_out
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import (
    EVEN,
    LIMIT_RPM,
    POOLS,
    Extras,
    Farm,
    Mode,
    body_of,
    inventory_of,
    keep_only,
    key_of,
    running,
)
from tests.processes.helpers import wait_until

pytestmark = pytest.mark.needs("haproxy", "postgres", "prisma-engine", "redis", "prometheus", "node-exporter")

CHAT = "/v1/chat/completions"
FIRST, SECOND = "litellm", "litellm-2"
# Seconds within which a revoked key is refused everywhere: two, and as many for a busy machine.
REVOKED_WITHIN_S = 4.0
RPM, PARALLEL = 20, 2
# A fake's answer costs three US cents.
ANSWERS_PAID = 4
CONSUMERS: dict[str, dict[str, Any]] = {
    "free": {},
    "talking": {},
    "bounded": {"limits": {"rpm": RPM}},
    "alone": {"limits": {"rpm": RPM}},
    "narrow": {"limits": {"parallel": PARALLEL}},
    "tokens": {"limits": {"tpm": 60}},
    "paying": {"budget": {"max_usd": 0.1, "period": "30d"}},
    "gone": {},
    "gone-too": {},
    "gone-last": {},
    "again": {"limits": {"rpm": RPM}},
    "changed": {},
}


def _site(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    site = inventory_of(mode, ports, extras)
    keep_only(site, "even", "mixed", "limited")
    # The ports of the pool that is left out, two in a row.
    site["gateway"] |= {"workers": 2, "litellm_port": ports["chat"]}
    site["gateway"]["conversations"] = {}
    del site["gateway"]["extra"]
    site["monitoring"].pop("extra")
    return site | {"consumers": CONSUMERS}


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with running("slots", _site) as farm:
        yield farm


@pytest.fixture(autouse=True)
def _quiet(farm: Farm) -> None:
    farm.fakes.tell([name for pool in ("even", "mixed", "limited") for name in POOLS[pool]])
    farm.fakes.reset()


def places(farm: Farm) -> dict[str, str]:
    """The address of each worker, past HAProxy."""
    found = workers(farm.plan.site, farm.plan.contributions)
    return {worker.service: f"http://{LOOPBACK}:{worker.port}" for worker in found}


def figures(farm: Farm, name: str, **labels: str) -> dict[str, float]:
    """The sum of one of LiteLLM's figures, by worker."""
    headers = {"Authorization": f"Bearer {farm.secrets['LITELLM_METRICS_KEY']}"}
    found = {}
    for worker, place in places(farm).items():
        text = httpx.get(f"{place}/metrics/", headers=headers, trust_env=False).raise_for_status().text
        lines = re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        found[worker] = sum(float(value) for told, value in lines if wanted <= set(told.split(",")))
    return found


def at_once(farm: Farm, count: int, model: str, name: str) -> Counter[int]:
    """Statuses of so many requests with a consumer's key at the same time."""
    key = key_of(farm, name)
    with ThreadPoolExecutor(count) as pool:
        answers = pool.map(lambda _: farm.ask(model, key=key), range(count))
        return Counter(answer.status_code for answer in answers)


def counts_together(farm: Farm) -> bool:
    """Whether HAProxy knows that the workers have Valkey."""
    text = httpx.get(f"http://{LOOPBACK}:{farm.ports['stats']}/metrics", trust_env=False).text
    return 'haproxy_server_status{proxy="Counters",server="cache",state="UP"} 1' in text


# --- sessions


def test_a_session_goes_on_at_the_other_worker(farm: Farm) -> None:
    """Each turn at another worker than the one before, past HAProxy, and the first at both at once."""
    headers = {"Authorization": f"Bearer {key_of(farm, 'talking')}"}

    def say(place: str, text: str) -> None:
        body = body_of("even", text, session_id="both")
        httpx.post(f"{place}{CHAT}", json=body, headers=headers, trust_env=False, timeout=60).raise_for_status()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(say, places(farm).values(), ("first", "first")))
    farm.fakes.reset()
    for place, text in zip(list(places(farm).values()) * 2, ("second", "third", "fourth", "fifth"), strict=True):
        say(place, text)
    longest = max((body["messages"] for fake in farm.fakes.seen().values() for body in fake.bodies), key=len)
    asked = [item["content"] for item in longest if item["role"] == "user"]
    assert asked == ["first", "first", "second", "third", "fourth", "fifth"]


# --- figures


def test_both_work_and_their_figures_add_up(farm: Farm) -> None:
    wait_until(lambda: at_once(farm, 8, "mixed", "free") == {200: 8}, 60, "both know the key")
    sent = 24  # six at once have room in slots and queue
    wanted = {"requested_model": "even", "api_key_alias": "free"}
    assert sum((at_once(farm, 6, "even", "free") for _ in range(sent // 6)), Counter()) == {200: sent}

    def counted() -> dict[str, float]:
        return figures(farm, "litellm_proxy_total_requests_metric_total", **wanted)

    wait_until(lambda: sum(counted().values()) >= sent, 10, "LiteLLM has counted")
    assert sum(counted().values()) == sent
    assert min(counted().values()) > 0
    query = 'sum(litellm_proxy_total_requests_metric_total{requested_model="even",api_key_alias="free"})'
    wait_until(lambda: asked(farm, query) == [float(sent)], 20, "Prometheus reads both")
    assert asked(farm, 'count(up{job="litellm"} == 1)') == [2.0]


def asked(farm: Farm, query: str) -> list[float]:
    """What Prometheus answers."""
    url = f"http://{LOOPBACK}:{farm.ports['prometheus']}/api/v1/query"
    answer = httpx.get(url, params={"query": query}, trust_env=False).raise_for_status().json()
    return [float(item["value"][1]) for item in answer["data"]["result"]]


# --- limits


def test_requests_of_a_minute_are_counted_together(farm: Farm) -> None:
    assert at_once(farm, 1, "mixed", "bounded") == {200: 1}, "HAProxy knows the key from now on"
    assert at_once(farm, RPM + 9, "mixed", "bounded") == {200: RPM - 1, 429: 10}


def test_requests_at_a_time_are_counted_together(farm: Farm) -> None:
    with farm.fakes.behaving(EVEN, "hold"), ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(farm.ask, "even", key=key_of(farm, "narrow")) for _ in range(8)]
        wait_until(lambda: sum(item.done() for item in asking) == 8 - PARALLEL, 10, "the others are refused")
        farm.fakes.tell(EVEN)
        codes = Counter(item.result().status_code for item in asking)
    assert codes == {200: PARALLEL, 429: 8 - PARALLEL}
    wait_until(lambda: at_once(farm, PARALLEL, "even", "narrow") == {200: PARALLEL}, 10, "they are free again")


def test_tokens_of_a_minute_are_counted_together(farm: Farm) -> None:
    """One after the other, so that each worker knows what the other has counted."""
    codes = [farm.ask("even", key=key_of(farm, "tokens"), max_tokens=5).status_code for _ in range(20)]
    assert 200 in codes
    assert codes == sorted(codes), "once refused, refused by both"
    assert codes.count(200) * 6 <= 60 + 6


def test_the_limit_of_a_pool_is_counted_together(farm: Farm) -> None:
    wait_until(lambda: time.time() % 60 < 50, 12, "the minute that LiteLLM counts in has room for this test")
    assert at_once(farm, LIMIT_RPM * 2, "limited", "free") == {200: LIMIT_RPM, 429: LIMIT_RPM}


def test_a_budget_is_spent_once(farm: Farm) -> None:
    """A refusal may come early: what a request may cost is reserved until a moment after its answer. It may come one
    answer late, as the cost of the last one is on its way to the other worker."""
    codes = [farm.ask("mixed", key=key_of(farm, "paying"), max_tokens=3).status_code for _ in range(12)]
    assert 1 <= codes.count(200) <= ANSWERS_PAID + 1
    assert set(codes[-6:]) == {429}


# --- keys


class Using:
    """Clients of each worker that use a key without a pause; for each answer when it began, and its status."""

    def __init__(self, farm: Farm, key: str, clients: int = 4) -> None:
        self.answers: dict[str, list[tuple[float, int]]] = {name: [] for name in places(farm)}
        self._is_over = threading.Event()
        self._key = key
        self._threads = [
            threading.Thread(target=self._use, args=item) for item in places(farm).items() for _ in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _use(self, name: str, place: str) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=place, headers=headers, trust_env=False, timeout=60) as client:
            while not self._is_over.is_set():
                began = time.monotonic()
                status = client.post(CHAT, json=body_of("mixed")).status_code
                self.answers[name].append((began, status))

    def statuses(self, name: str, since: float) -> set[int]:
        """Statuses of the answers to requests that began after a moment."""
        return {status for began, status in self.answers[name] if began > since}


def revoke_under_load(farm: Farm, consumer: str) -> None:
    """Checks that both workers refuse a key in use so soon after it was revoked."""
    with Using(farm, key_of(farm, consumer)) as using:
        wait_until(lambda: all(len(told) > 10 for told in using.answers.values()), 20, "both are used")
        keys.revoke(farm.plan, farm.out, [consumer])
        revoked = time.monotonic()
        limit = revoked + REVOKED_WITHIN_S
        wait_until(lambda: all(using.statuses(name, limit) for name in places(farm)), 30, "both have answered since")
    assert {name: using.statuses(name, limit) for name in places(farm)} == {FIRST: {401}, SECOND: {401}}


def test_a_revoked_key_is_refused_everywhere(farm: Farm) -> None:
    revoke_under_load(farm, "gone")


def test_a_changed_key_is_as_changed_everywhere(farm: Farm) -> None:
    """Past LiteLLM's messages: as if another gateway had changed it."""
    key = {"Authorization": f"Bearer {key_of(farm, 'changed')}"}

    def statuses() -> set[int]:
        places_ = places(farm).values()
        return {httpx.post(f"{place}{CHAT}", json=body_of("mixed"), headers=key).status_code for place in places_}

    assert statuses() == {200}
    token = next(row["token"] for row in keys.listed(farm.plan, farm.out) if row["name"] == "changed")
    body = {"key": token, "models": ["even"]}
    for _ in range(2):
        farm.admin.post("/key/update", json=body).raise_for_status()
    wait_until(lambda: statuses() == {403}, 4, "both know")
    farm.admin.post("/key/update", json=body | {"models": ["even", "mixed"]}).raise_for_status()
    wait_until(lambda: statuses() == {200}, 4, "both know")


# --- without Valkey


@contextmanager
def valkey_away(farm: Farm) -> Iterator[None]:
    supervisor.call(farm.folder, "stopProcess", "valkey", timeout_s=60)
    try:
        wait_until(lambda: not counts_together(farm), 10, "HAProxy sees it")
        yield
    finally:
        farm.restart("valkey")
        wait_until(lambda: counts_together(farm), 30, "both get requests again")


def counted(farm: Farm, name: str) -> dict[str, float]:
    """Requests of a consumer, by worker."""
    return figures(farm, "litellm_proxy_total_requests_metric_total", api_key_alias=name)


def test_without_valkey_one_worker_counts_and_a_revoked_key_is_refused_by_both(farm: Farm) -> None:
    """When Valkey is back, limits are exact over both again."""
    with valkey_away(farm):
        assert at_once(farm, 1, "mixed", "alone") == {200: 1}, "HAProxy knows the key from now on"
        assert at_once(farm, RPM + 9, "mixed", "alone") == {200: RPM - 1, 429: 10}
        revoke_under_load(farm, "gone-too")
        alone = counted(farm, "alone")
        assert (alone[FIRST] > 0, alone[SECOND]) == (True, 0)
    assert at_once(farm, 1, "mixed", "again") == {200: 1}
    assert at_once(farm, RPM + 9, "mixed", "again") == {200: RPM - 1, 429: 10}
    assert min(counted(farm, "again").values()) > 0
    revoke_under_load(farm, "gone-last")


# --- a worker goes


def test_clients_do_not_notice_when_a_worker_is_changed(farm: Farm) -> None:
    """As `up` and `restart` do it: one worker at a time."""
    is_over, codes = threading.Event(), Counter[int]()

    def ask_on() -> None:
        while not is_over.is_set():
            codes[farm.ask("mixed", key=key_of(farm, "free")).status_code] += 1

    with ExitStack() as ending:
        pool = ending.enter_context(ThreadPoolExecutor(4))
        ending.callback(is_over.set)
        asking = [pool.submit(ask_on) for _ in range(4)]
        wait_until(lambda: codes[200] > 10, 20, "requests are answered")
        balancer = balancer_of(farm.plan, farm.out)
        assert balancer
        workers, board = balancer.workers(FIRST), Board(Console(quiet=True))
        with workers_out(balancer, workers, board, comes_back=True):
            supervisor.call(farm.folder, "stopProcess", FIRST, timeout_s=60)
            stopped = codes[200]
            wait_until(lambda: codes[200] > stopped + 20, 20, "the other answers them")
            assert keys.listed(farm.plan, farm.out), "the operator reaches it, too"
            farm.restart(FIRST)
        returned = codes[200]
        wait_until(lambda: codes[200] > returned + 20, 20, "both answer them")
        is_over.set()
        for item in asking:
            item.result()
    assert set(codes) == {200}
