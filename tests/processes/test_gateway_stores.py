"""What the default farm keeps and shows: counters in Valkey, figures in Prometheus; keys are in test_keys.py."""

from __future__ import annotations

import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from corral.verbs.status import watch
from tests.needs import postgres_folder
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, EVEN_DEPTH, HOST, Farm, in_modes
from tests.processes.helpers import wait_until

in_slots_mode = in_modes("slots")


# --- Valkey


@in_slots_mode
@pytest.mark.needs("redis")
def test_valkey_wants_its_password_and_the_gateway_has_it(farm: Farm) -> None:
    password = farm.secrets["VALKEY_PASSWORD"]
    for user, tried in (("litellm", None), ("litellm", "wrong"), ("default", password), (None, password)):
        stranger = redis.Redis(LOOPBACK, farm.ports["cache"], username=user, password=tried)
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    with redis.Redis(LOOPBACK, farm.ports["cache"], username="litellm", password=password) as own:
        assert own.ping()
        for key in own.scan_iter():
            own.delete(key)
        assert farm.ask("limited").status_code in {200, 429}
        wait_until(lambda: bool(own.dbsize()), 20, "the gateway counts in Valkey")


# --- PostgreSQL


@in_slots_mode
@pytest.mark.needs("postgres", "prisma-engine")
def test_the_gateways_role_owns_its_tables_and_nothing_else(farm: Farm) -> None:
    """LiteLLM has made its tables with it; what the role cannot do is in test_database.py."""
    folder = postgres_folder()
    assert folder is not None
    query = (
        "SELECT rolsuper, (SELECT count(*) > 20 FROM pg_tables WHERE tableowner = rolname AND schemaname = 'public') "
        "FROM pg_roles WHERE rolname = current_user"
    )
    words = [str(folder / "psql"), (farm.out / HOST / "secrets" / "DATABASE_URL").read_text(), "-Atc", query]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip() == "f|t"


# --- Prometheus


@in_slots_mode
@pytest.mark.needs("prometheus", "node-exporter")
def test_prometheus_reads_everybody(farm: Farm) -> None:
    def targets() -> list[dict[str, Any]]:
        url = f"http://{LOOPBACK}:{farm.ports['prometheus']}/api/v1/targets"
        found: list[dict[str, Any]] = httpx.get(url, trust_env=False).raise_for_status().json()["data"]["activeTargets"]
        return found

    wait_until(lambda: all(target["health"] == "up" for target in targets()), 20, "all targets are up")
    jobs = Counter(target["labels"]["job"] for target in targets())
    assert jobs == {"llama": 3, "haproxy": 1, "jobs": 1, "litellm": 1, "node": 1, "prometheus": 1, "router": 1}


@in_slots_mode
@pytest.mark.needs("prometheus", "node-exporter")
def test_figures_of_every_program_are_there(farm: Farm) -> None:
    farm.ask("chat").raise_for_status()
    queries = (
        'llamacpp:tokens_predicted_total{pool="chat",replica="box-chat-1"}',
        'haproxy_backend_http_responses_total{code="2xx",proxy="chat"}',
        'haproxy_backend_current_queue{proxy="even"}',
        'sum(litellm_proxy_total_requests_metric_total{requested_model="chat"})',
        "node_memory_MemTotal_bytes",
    )

    def missing() -> list[str]:
        return [query for query in queries if len(ask_prometheus(farm, query)) != 1]

    wait_until(lambda: not missing(), 20, f"every figure is there once; missing at first: {missing()}")


@in_slots_mode
@pytest.mark.needs("prometheus", "node-exporter")
def test_what_the_door_refuses_is_a_failure_of_its_pool(farm: Farm) -> None:
    """LiteLLM counts nothing of it."""
    inside = len(EVEN) + EVEN_DEPTH
    with ThreadPoolExecutor(inside) as pool, farm.fakes.behaving(EVEN, "hold"):
        waiting = [pool.submit(farm.ask, "even") for _ in range(inside)]
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 10, "the queue is full")
        for _ in range(3):
            assert {farm.ask("even").status_code for _ in range(5)} == {429}
            wait_until_scraped(farm)
    assert {future.result().status_code for future in waiting} == {200}
    refused = 'haproxy_backend_http_responses_total{pool="even",proxy="Full:even",code="4xx"}'
    wait_until(lambda: value_of(farm, refused) >= 15, 20, "they are counted for their pool")
    wait_until(lambda: value_of(farm, 'pool:failures:rate5m{pool="even"}') > 0, 60, "and as its failures")
    assert value_of(farm, 'pool:refused:rate5m{pool="even"}') > 0


def wait_until_scraped(farm: Farm) -> None:
    query = 'timestamp(haproxy_process_uptime_seconds{role="balancer"})'
    before = value_of(farm, query)
    wait_until(lambda: value_of(farm, query) > before, 20, "Prometheus has looked again")


def value_of(farm: Farm, query: str) -> float:
    """The one figure that a query finds; 0 when there is none."""
    return sum(float(item["value"][1]) for item in ask_prometheus(farm, query))


@in_slots_mode
@pytest.mark.needs("prometheus", "node-exporter")
def test_watch_shows_what_prometheus_knows(farm: Farm) -> None:
    def pools() -> dict[str, dict[str, float]]:
        farm.ask("even").raise_for_status()
        rows = watch.rows_now(watch.asking(farm.plan, farm.out))
        return {row.name: row.values for row in rows if row.about == "pool" and row.values.get("requests")}

    wait_until(lambda: "even" in pools(), 60, "requests of the pool are counted")
    assert pools()["even"]["slots"] == 3


def ask_prometheus(farm: Farm, query: str) -> list[dict[str, Any]]:
    url = f"http://{LOOPBACK}:{farm.ports['prometheus']}/api/v1/query"
    answer = httpx.get(url, params={"query": query}, trust_env=False).raise_for_status().json()
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found
