"""Budgets that are spent, and the pool that answers then, on a real gateway with database and counters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.processes.farm import EVEN, MIXED, Extras, Farm, Mode, inventory_of, keep_only, key_of, running
from tests.processes.helpers import wait_until
from tests.processes.interfaces import INTERFACES

pytestmark = pytest.mark.needs("haproxy", "postgres", "prisma-engine", "redis")

QUESTION = [{"role": "user", "content": "hello"}]
# Less than a fake's answer of the pool `mixed` costs: there is one, and then no other.
BUDGET: dict[str, Any] = {"max_usd": 0.02, "period": "30d"}
SOON = BUDGET | {"period": "20s"}
CONSUMERS: dict[str, dict[str, Any]] = {
    "thrifty": {"pools": ["mixed", "even"], "budget": BUDGET | {"fallback": "even"}},
    "strict": {"budget": BUDGET},
    "rich": {"budget": BUDGET | {"max_usd": 1000, "fallback": "even"}},
    "weekly": {"budget": SOON | {"fallback": "even"}},
    "ann": {"team": "family"},
    "bob": {"team": "family", "pools": ["mixed", "even"]},
}
TEAMS = {"family": {"budget": BUDGET | {"fallback": "even"}}}
# LiteLLM looks so often for budgets whose period is over; by default every ten minutes.
EVERY_S = {"proxy_budget_rescheduler_min_time": 1, "proxy_budget_rescheduler_max_time": 2}
HEADER = "x-corral-fallback"


def _site(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    site = inventory_of(mode, ports, extras)
    keep_only(site, "even", "mixed", "vectors")
    site["pools"]["vectors"]["price"] = site["pools"]["mixed"]["price"]
    del site["monitoring"]
    site["gateway"]["extra"] = {"general_settings": EVERY_S}
    return site | {"consumers": CONSUMERS, "teams": TEAMS}


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with running("slots", _site) as farm:
        yield farm


def asked(farm: Farm, name: str, model: str = "mixed") -> httpx.Response:
    return farm.ask(model, key=key_of(farm, name), max_tokens=3)


def spend(farm: Farm, name: str) -> httpx.Response:
    """The first answer that is not the pool's that costs something."""
    for _ in range(12):
        answer = asked(farm, name)
        if answer.status_code != 200 or HEADER in answer.headers:
            return answer
    raise AssertionError("the budget is not spent")


def test_another_pool_answers_once_the_budget_is_spent(farm: Farm) -> None:
    first = asked(farm, "thrifty").raise_for_status()
    assert (first.json()["model"], farm.replica(first) in MIXED, HEADER in first.headers) == ("mixed", True, False)
    answer = spend(farm, "thrifty").raise_for_status()
    assert (answer.json()["model"], farm.replica(answer) in EVEN, answer.headers[HEADER]) == ("even", True, "even")
    own = asked(farm, "thrifty", "even").raise_for_status()
    assert HEADER not in own.headers
    assert asked(farm, "rich").json()["model"] == "mixed"


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("name", INTERFACES)
def test_it_answers_every_interface(farm: Farm, name: str, *, is_streamed: bool) -> None:
    spend(farm, "thrifty")
    farm.fakes.reset()
    interface = INTERFACES[name]
    body = {"model": "mixed", **interface.body("be brief", QUESTION, 7), "stream": is_streamed}
    with farm.new_client(key_of(farm, "thrifty")) as client:
        answer = client.post(interface.path, json=body).raise_for_status()
    assert answer.headers[HEADER] == "even"
    seen = farm.fakes.arrivals([*EVEN, *MIXED])
    assert [sum(seen[fake] for fake in pool) for pool in (EVEN, MIXED)] == [1, 0]
    assert "piece5" in answer.text if is_streamed else "answer of even" in answer.text


def test_only_chats_go_to_another_pool(farm: Farm) -> None:
    spend(farm, "ann")
    body = {"model": "vectors", "input": "hello"}
    with farm.new_client(key_of(farm, "ann")) as client:
        answer = client.post("/v1/embeddings", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")


def test_without_another_pool_requests_are_refused(farm: Farm) -> None:
    refused = spend(farm, "strict")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")


def test_a_team_has_another_pool_for_all_its_keys(farm: Farm) -> None:
    spend(farm, "ann")
    for name in ("ann", "bob"):
        assert asked(farm, name).raise_for_status().headers[HEADER] == "even"


def test_the_next_period_begins_with_a_new_budget(farm: Farm) -> None:
    spend(farm, "weekly").raise_for_status()
    wait_until(lambda: HEADER not in asked(farm, "weekly").raise_for_status().headers, 60, "the next period has begun")
    assert spend(farm, "weekly").raise_for_status().headers[HEADER] == "even"


def test_what_another_pool_answers_is_no_failure(farm: Farm) -> None:
    for name in ("thrifty", "strict"):
        spend(farm, name)
    text = farm.admin.get("/metrics/").raise_for_status().text
    failed = [line for line in text.splitlines() if line.startswith("litellm_proxy_failed_requests_metric_total")]
    assert [any(f'"{name}"' in line for line in failed) for name in ("thrifty", "strict")] == [False, True]
