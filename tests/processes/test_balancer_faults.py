"""Faults behind the rendered HAProxy, without LiteLLM in front: who is left out, who is not, what it costs (B4).

What a client of the whole farm sees of them is in `test_gateway.py`; here every case takes seconds.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.processes.balancing import Balancing, balancing
from tests.processes.fakes import LOOPBACK, POISON, Manner
from tests.processes.helpers import wait_until

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.xdist_group("balancer-faults")]

DEADLINE_S = 20.0
BACK_WITHIN_S = 15.0
ERRORS_AT_FIRST = 3
# A replica that was left out needs three good health checks, at least one second apart.
RETURN_S = 2.0
TRIO = ("even-1", "even-2", "even-3")
SOLO = ("solo-1",)

_numbers = itertools.count(1)


class Pools:
    """The balancer with three equal fakes in one pool and one fake in another."""

    def __init__(self, running: Balancing) -> None:
        self.balancer = running.balancer
        self.log = running.log
        self.health_url = f"{running.url('stats_port')}/health"
        self.fakes = running.fakes
        self.client = httpx.Client(
            base_url=running.url("balancer_port"),
            trust_env=False,
            timeout=DEADLINE_S,
            limits=httpx.Limits(max_connections=None),
        )

    def ask(
        self, pool: str = "even", text: str = "hello", conversation: str = "", consumer: str = ""
    ) -> httpx.Response:
        """The answer to a request of this conversation, or of one of its own."""
        name = conversation or f"{next(_numbers):032x}"
        body = {"model": pool, "messages": [{"role": "user", "content": text}]}
        headers = {"x-corral-session": name, "x-corral-consumer": consumer, "Authorization": "Bearer of-the-servers"}
        return self.client.post(f"/{pool}/any/v1/chat/completions", json=body, headers=headers)

    def health(self) -> httpx.Response:
        """What the farm tells of itself, not older than a second."""
        time.sleep(1.1)
        return self.client.get(self.health_url)

    def down(self) -> set[str]:
        """Replicas that get no requests."""
        return {name for name, server in self.balancer.servers().items() if not server.is_usable}

    def answering(self, until: Callable[[], bool], deadline_s: float = DEADLINE_S) -> list[httpx.Response]:
        """All answers to three clients that ask without a pause until this is so."""
        answers: list[httpx.Response] = []
        end = time.monotonic() + deadline_s

        def ask_on() -> None:
            while not until():
                assert time.monotonic() < end, "never came true"
                answers.append(self.ask())

        with ThreadPoolExecutor(len(TRIO)) as threads:
            for future in [threads.submit(ask_on) for _ in TRIO]:
                future.result()
        return answers


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = {"even": dict.fromkeys(TRIO, 1), "solo": dict.fromkeys(SOLO, 1)}
    queue = {"depth": 10, "timeout_s": 5}
    with balancing(tmp_path_factory.mktemp("faults"), pools, queue=queue, timeout_s=12) as running:
        found = Pools(running)
        with found.client:
            yield found


@pytest.fixture
def pools(running: Pools) -> Pools:
    """All fakes answer, none is left out, and all have answered something since."""
    running.fakes.tell([*TRIO, *SOLO])
    wait_until(lambda: not running.down(), DEADLINE_S, "every replica is used")
    assert [running.ask().status_code for _ in range(6)] == [200] * 6
    running.fakes.reset()
    return running


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


# --- a request that no replica can answer


def test_nine_poisonous_requests_alone_take_nobody_out(pools: Pools) -> None:
    assert statuses([pools.ask(text=POISON) for _ in range(9)]) == {500: 9}
    assert pools.fakes.arrivals(TRIO) == dict.fromkeys(TRIO, 3)
    assert pools.down() == set()


def test_a_poisonous_conversation_that_its_client_repeats_takes_nobody_out(pools: Pools) -> None:
    """As a client library does, which asks again for every 500; the others' requests go on well between."""
    for _ in range(8):
        assert pools.ask(text=POISON, conversation="b" * 32).status_code == 500
        assert statuses([pools.ask() for _ in range(2)]) == {200: 2}
    assert pools.down() == set()
    assert all(pools.fakes.arrivals(TRIO).values())


def test_poisonous_requests_of_ever_new_conversations_and_keys_take_nobody_out(pools: Pools) -> None:
    """Replicas that fail them are probed with a request of the kit's own, and stay in rotation."""
    rounds = 20
    for _ in range(rounds):
        assert pools.ask(text=POISON, consumer="mallory").status_code == 500
        assert pools.ask(text=POISON, consumer="oscar").status_code == 500
        assert pools.ask(consumer="alice").status_code == 200
        assert pools.down() == set()
    bodies = [body for name in TRIO for body in pools.fakes.seen()[name].bodies]
    probes = [body for body in bodies if body.get("max_tokens") == 1]
    assert 1 <= len(probes) == len(bodies) - 3 * rounds <= rounds + 1
    headers = [headers for name in TRIO for headers in pools.fakes.seen()[name].headers]
    assert {found.get("Authorization", found.get("authorization")) for found in headers} == {"Bearer of-the-servers"}
    assert "is left out" not in pools.log.read_text()


def test_the_only_replica_of_a_pool_is_never_left_out_for_what_it_answers(pools: Pools) -> None:
    with pools.fakes.behaving(SOLO, "error"):
        assert statuses([pools.ask("solo") for _ in range(9)]) == {500: 9}
        assert pools.down() == set()
    assert pools.ask("solo").status_code == 200


# --- a replica that fails where others do not


def test_a_replica_that_answers_500_costs_three_errors_and_one_for_each_return(pools: Pools) -> None:
    with pools.fakes.behaving(TRIO[:1], "error"):
        first = pools.answering(lambda: pools.down() == {"even-1"})
        assert statuses(first)[500] <= ERRORS_AT_FIRST
        begin = time.monotonic()
        later = pools.answering(lambda: time.monotonic() > begin + 6 * RETURN_S)
        assert statuses(later)[500] <= (time.monotonic() - begin) / RETURN_S + 1
        assert set(statuses(later)) <= {200, 500}
    wait_until(lambda: not pools.down(), BACK_WITHIN_S, "it is in rotation again")
    assert {pools.ask().headers["x-replica"] for _ in range(6)} == set(TRIO)


def test_a_conversation_whose_replica_fails_is_not_sent_there_again_and_again(pools: Pools) -> None:
    conversation = "c" * 32
    home = pools.ask(conversation=conversation).headers["x-replica"]
    assert pools.ask(conversation=conversation).headers["x-replica"] == home
    with pools.fakes.behaving([home], "error"):
        assert pools.ask(conversation=conversation).status_code == 500
        assert 200 in statuses([pools.ask(conversation=conversation) for _ in range(2)])
    assert pools.down() == set()


def test_a_replica_that_loads_its_model_costs_nothing_while_others_are_free(pools: Pools) -> None:
    """It answers 503 and has not begun: the request moves on, before health checks have noticed anything."""
    with pools.fakes.behaving(TRIO[:1], "loading"):
        assert statuses([pools.ask() for _ in range(6)]) == {200: 6}
        assert statuses(pools.answering(lambda: pools.down() == {"even-1"}))[503] <= ERRORS_AT_FIRST
        assert statuses([pools.ask() for _ in range(6)]) == {200: 6}
    wait_until(lambda: not pools.down(), BACK_WITHIN_S, "it is in rotation again")


def test_a_replica_that_accepts_and_never_answers_costs_what_it_took(pools: Pools) -> None:
    with pools.fakes.behaving(TRIO[:1], "mute"):
        answers = pools.answering(lambda: pools.down() == {"even-1"} and pools.fakes.in_flight(TRIO[:1]) == 0)
        assert statuses([pools.ask() for _ in range(6)]) == {200: 6}
        assert pools.fakes.arrivals(TRIO[:1]) == {"even-1": 1}
    assert set(statuses(answers)) == {200, 504}
    assert statuses(answers)[504] == 1
    wait_until(lambda: not pools.down(), BACK_WITHIN_S, "it is in rotation again")


def test_a_replica_at_a_tenth_of_its_speed_holds_up_only_what_it_works_on(pools: Pools) -> None:
    pools.fakes.tell(TRIO, service_s=0.05)
    with pools.fakes.behaving(TRIO[:1], service_s=0.5):
        answers = pools.answering(lambda: sum(pools.fakes.arrivals(TRIO).values()) >= 40)
    share = Counter(answer.headers["x-replica"] for answer in answers)
    assert set(statuses(answers)) == {200}
    assert share["even-1"] * 4 <= min(share["even-2"], share["even-3"])
    assert pools.fakes.seen()["even-1"].most_in_flight == 1
    assert pools.down() == set()


@pytest.mark.parametrize("manner", ["refuse", "loading", "mute"])
def test_all_replicas_at_once_and_back(pools: Pools, manner: Manner) -> None:
    pools.fakes.tell(TRIO, manner)
    if manner == "refuse":  # which is no lack of slots, also as long as HAProxy still tries
        assert statuses([pools.ask() for _ in range(6)]) == {503: 6}
    wait_until(lambda: pools.down() == set(TRIO), DEADLINE_S, "all are left out")
    assert pools.ask().status_code == 503
    assert pools.ask("solo").status_code == 200
    pools.fakes.tell(TRIO)
    begin = time.monotonic()
    wait_until(lambda: pools.ask().status_code == 200, BACK_WITHIN_S, "somebody answers again")
    wait_until(lambda: not pools.down(), BACK_WITHIN_S, "all are in rotation again")
    assert time.monotonic() - begin < BACK_WITHIN_S


def test_who_waits_too_long_for_a_slot_is_told_when_to_come_back(pools: Pools) -> None:
    with ThreadPoolExecutor(1) as threads, pools.fakes.behaving(SOLO, "hold"):
        holder = threads.submit(pools.ask, "solo")
        wait_until(lambda: pools.fakes.in_flight(SOLO) == 1, DEADLINE_S, "the only slot is taken")
        late = pools.ask("solo")
    assert (late.status_code, late.headers["retry-after"]) == (429, "1")
    assert holder.result(DEADLINE_S).status_code == 200


# --- conversations


def test_a_conversation_stays_where_it_was_only_while_that_replica_is_free(pools: Pools) -> None:
    conversation = "d" * 32
    home = pools.ask(conversation=conversation).headers["x-replica"]
    assert {pools.ask(conversation=conversation).headers["x-replica"] for _ in range(5)} == {home}
    with ThreadPoolExecutor(1) as threads, pools.fakes.behaving([home], "hold"):
        holder = threads.submit(pools.ask, conversation=conversation)
        wait_until(lambda: pools.fakes.in_flight([home]) == 1, DEADLINE_S, "its replica is busy")
        elsewhere = pools.ask(conversation=conversation).headers["x-replica"]
    assert holder.result(DEADLINE_S).headers["x-replica"] == home
    assert elsewhere != home


def test_log_and_figures_name_the_replica_that_answered(pools: Pools) -> None:
    name = pools.ask().headers["x-replica"]
    figures = pools.client.get(pools.health_url.replace("/health", "/metrics")).text
    assert f'haproxy_server_http_responses_total{{proxy="even",server="{name}",code="2xx"}}' in figures
    wait_until(lambda: f" even/{name} " in pools.log.read_text(), DEADLINE_S, "the log names it")


# --- what the farm tells of itself (000-15)


def test_health_names_every_node_with_its_slots_and_figures(pools: Pools) -> None:
    before = {node["name"]: node for node in pools.health().json()["nodes"]}
    with ThreadPoolExecutor(2) as threads, pools.fakes.behaving(SOLO, "hold", service_s=0.3):
        asked = [threads.submit(pools.ask, "solo") for _ in range(2)]
        wait_until(lambda: pools.fakes.in_flight(SOLO) == 1, DEADLINE_S, "one is answered, one waits")
        state = pools.health().json()
    assert [future.result(DEADLINE_S).status_code for future in asked] == [200, 200]
    assert (state["status"], state["healthy"], state["total"], state["queued"]) == ("ok", 4, 4, 1)
    assert (state["busy"], state["slots"]) == (1, 4)
    nodes = {node["name"]: node for node in state["nodes"]}
    assert {name: (node["busy"], node["parallel"]) for name, node in nodes.items()} == {
        "even-1": (0, 1), "even-2": (0, 1), "even-3": (0, 1), "solo-1": (1, 1),
    }  # fmt: skip
    assert nodes["solo-1"]["pool"] == "solo"
    assert nodes["solo-1"]["models"] == ["fake-model"]
    assert next(pool for pool in state["pools"] if pool["name"] == "solo")["queued"] == 1
    with pools.fakes.behaving(SOLO, "error"):
        pools.ask("solo")
    after = {node["name"]: node for node in pools.health().json()["nodes"]}
    assert after["solo-1"]["requests"] - before["solo-1"]["requests"] == 3
    assert after["solo-1"]["errors"] - before["solo-1"]["errors"] == 1
    assert after["solo-1"]["avgMs"] > 0
    assert after["solo-1"]["uptimeMs"] > 0


def test_health_says_what_is_down_and_no_address(pools: Pools) -> None:
    with pools.fakes.behaving(TRIO, "refuse"):
        wait_until(lambda: pools.down() == set(TRIO), DEADLINE_S, "all of a pool are left out")
        degraded = pools.health()
        with pools.fakes.behaving(SOLO, "refuse"):
            wait_until(lambda: pools.down() == {*TRIO, *SOLO}, DEADLINE_S, "nobody is left")
            down = pools.health()
    assert (degraded.status_code, degraded.json()["status"], degraded.json()["healthy"]) == (200, "degraded", 1)
    assert (down.status_code, down.json()["status"], down.json()["slots"]) == (503, "down", 0)
    for answer in (degraded, down):
        assert LOOPBACK not in answer.text
