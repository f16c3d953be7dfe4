"""The request path with the real programs, in every mode of balancing: what a client gets, and behaviours B1 to B8."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from corral.config.client_names import all_aliases
from tests.processes.fakes import LOOPBACK, PIECES_BEFORE_BREAK, POISON
from tests.processes.farm import (
    ADDED,
    BRIEF,
    BRIEF_TIMEOUT_S,
    CHAT_REPLICAS,
    CHAT_SLOTS,
    EVEN,
    EVEN_DEPTH,
    FAKES_OF_DEFAULT_HEALTH,
    LIMIT_RPM,
    LIMITED,
    MIXED,
    POOLS,
    Farm,
    Load,
    body_of,
    in_modes,
)
from tests.processes.helpers import wait_until
from tests.tiny_models import KNOWN_ANSWER

# Far less than the gateway's own timeout, after which a slot would be free in any case.
FREE_WITHIN_S = 20.0
BACK_WITHIN_S = 30.0
ALL_BACK_WITHIN_S = 15.0
# Three good health checks, at least a second apart.
FAILING_RETURNS_AFTER_S = 2.0

# What cannot differ by the mode is tested in one.
in_slots = in_modes("slots")
everywhere = in_modes("slots", "least-busy", "direct")
behind_haproxy = in_modes("slots", "least-busy")


def statuses(answers: Sequence[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def replicas(farm: Farm, answers: Sequence[httpx.Response]) -> Counter[str]:
    assert statuses(answers) == {200: len(answers)}
    return Counter(map(farm.replica, answers))


# --- what a client gets (004-38, 004-11)


@everywhere
def test_chat_arrives_byte_for_byte(farm: Farm) -> None:
    answer = farm.ask("chat").raise_for_status().json()
    assert answer["choices"][0]["message"]["content"].encode() == KNOWN_ANSWER.encode()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["model"] == "chat"
    assert answer["usage"]["completion_tokens"] >= 100


@everywhere
def test_streamed_chat_arrives_byte_for_byte_and_in_pieces(farm: Farm) -> None:
    answer = farm.ask_streamed("chat", stream_options={"include_usage": True})
    assert answer.response.headers["content-type"].startswith("text/event-stream")
    assert answer.text.encode() == KNOWN_ANSWER.encode()
    assert answer.finish_reasons == ["stop"]
    assert len(answer.events) > 100
    assert answer.events[-1]["usage"]["completion_tokens"] >= 100


@everywhere
def test_an_adapter_is_called_like_a_model(farm: Farm) -> None:
    """`<pool>:<adapter>`, in plain and streamed answers; everybody else's stay as they are (005-4)."""
    late = KNOWN_ANSWER[KNOWN_ANSWER.index(" 50 ") :]

    def said(model: str, **fields: Any) -> str:
        return str(farm.ask(model, **fields).raise_for_status().json()["choices"][0]["message"]["content"])

    assert said("chat:late") == late
    assert farm.ask_streamed("chat:late").text == late
    assert said("chat") == KNOWN_ANSWER
    assert said("chat:weak") == KNOWN_ANSWER, "a scale of 0.1 is too little for this one"
    assert said("chat", lora=[{"id": 1, "scale": 1.0}]) != KNOWN_ANSWER, "a client may say it itself"
    assert said("chat:late", lora=[]) == KNOWN_ANSWER
    assert "chat:late" in [item["id"] for item in farm.client.get("/v1/models").json()["data"]]
    assert farm.ask("chat:none").status_code == (200 if farm.mode == "least-busy" else 404)


@in_slots
def test_embeddings_have_their_shape_and_order(farm: Farm) -> None:
    texts = ["the cat is in the river", "gpu queue model server", "the cat is in the river"]
    response = farm.client.post("/v1/embeddings", json={"model": "embed", "input": texts}).raise_for_status()
    items = response.json()["data"]
    vectors = [item["embedding"] for item in items]
    assert [item["index"] for item in items] == [0, 1, 2]
    assert [len(vector) for vector in vectors] == [128, 128, 128]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)


@in_slots
@pytest.mark.parametrize("alias", ["default", "assistant"])
def test_alias_answers_as_its_pool(farm: Farm, alias: str) -> None:
    assert farm.ask(alias).raise_for_status().json()["choices"][0]["message"]["content"] == KNOWN_ANSWER


@in_slots
def test_models_are_the_pools_and_their_aliases(farm: Farm) -> None:
    models = farm.client.get("/v1/models").raise_for_status().json()["data"]
    assert {model["id"] for model in models} == {"chat", "embed", ADDED, *POOLS, *all_aliases(farm.plan.inventory)}


@in_modes("slots", "direct")
def test_a_model_of_the_sites_own_is_called_with_its_key_beside_the_pools(farm: Farm) -> None:
    farm.ask(ADDED).raise_for_status()
    asked = httpx.Headers(farm.fakes.seen()[LIMITED[0]].headers[-1])
    assert asked["authorization"] == "Bearer value-of-SPEECH_KEY"
    assert farm.ask("chat").raise_for_status().json()["choices"][0]["message"]["content"] == KNOWN_ANSWER


@in_modes("least-busy")
def test_unknown_model_goes_to_the_pool_that_the_site_names(farm: Farm) -> None:
    assert farm.ask("no-such-model").raise_for_status().json()["model"]
    assert farm.ask_streamed("no-such-model").finish_reasons == ["stop"]
    assert sum(farm.fakes.arrivals(EVEN).values()) == 2


@in_modes("slots", "direct")
def test_unknown_model_is_the_clients_error(farm: Farm) -> None:
    response = farm.ask("no-such-model")
    assert response.status_code == 404
    assert "no-such-model" in response.json()["error"]["message"]
    for path, body in (("embeddings", {"input": "x"}), ("images/generations", {"prompt": "x"})):
        answer = farm.client.post(f"/v1/{path}", json={"model": "no-such-model", **body})
        assert answer.status_code == 404, path
        assert "no-such-model" in answer.json()["error"]["message"]


@everywhere
@pytest.mark.parametrize("key", ["", "sk-wrong"])
def test_without_a_valid_key_nothing_is_answered(farm: Farm, key: str) -> None:
    with farm.new_client(key) as stranger:
        assert stranger.post("/v1/chat/completions", json=body_of("even")).status_code == 401
        assert stranger.post("/v1/embeddings", json={"model": "embed", "input": "x"}).status_code == 401
        assert stranger.get("/v1/models").status_code == 401
        for path in ("/model/info", "/metrics/"):
            assert stranger.get(path).status_code == (401 if farm.mode == "direct" else 404), path
    assert sum(farm.fakes.arrivals(EVEN).values()) == 0


@everywhere
def test_servers_behind_refuse_strangers_too(farm: Farm) -> None:
    ports = [farm.ports["chat"], farm.ports["chat-2"]]
    urls = [f"http://{LOOPBACK}:{port}/v1/chat/completions" for port in ports]
    urls.append(f"http://{LOOPBACK}:{farm.ports['embed']}/v1/embeddings")
    if farm.mode != "direct":
        urls.append(f"http://{LOOPBACK}:{farm.ports['balancer']}/chat/any/v1/chat/completions")
    for url in urls:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx.post(url, json=body_of("chat"), headers=headers, trust_env=False)
            assert answer.status_code == 401, url
    assert farm.ask("chat").status_code == 200


# --- B1: fair when idle


def share_of_thirty(farm: Farm) -> Counter[str]:
    return replicas(farm, [farm.ask("even") for _ in range(30)])


@behind_haproxy
def test_b1_idle_replicas_are_used_evenly(farm: Farm) -> None:
    share = share_of_thirty(farm)
    assert set(share) == set(EVEN)
    assert max(share.values()) <= 1.5 * 30 / len(EVEN), share


@in_modes(
    "slots",
    "least-busy",
    broken={"least-busy": "LiteLLM's least-busy never takes back the count of a request whose client has left"},
)
def test_b1_also_after_clients_left_early(farm: Farm) -> None:
    with farm.fakes.behaving(EVEN, "hold"):
        for number in range(8):  # no multiple of three, or each replica would be wronged equally
            farm.leave("even", is_streamed=number < 3)
    wait_until(lambda: farm.fakes.in_flight(EVEN) == 0, FREE_WITHIN_S, "their slots are free")
    share = share_of_thirty(farm)
    assert set(share) == set(EVEN), share
    assert max(share.values()) <= 1.5 * 30 / len(EVEN), share


@in_modes("direct")
def test_b1_without_haproxy_every_replica_at_least_gets_something(farm: Farm) -> None:
    """LiteLLM draws lots: the bound of B1 would be broken about once in twenty runs."""
    assert set(share_of_thirty(farm)) == set(EVEN)


# --- B2: slots are sacred


@behind_haproxy
def test_b2_no_replica_gets_more_than_its_slots_and_bigger_ones_get_more(farm: Farm) -> None:
    slots = POOLS["mixed"]
    with farm.fakes.behaving(MIXED, service_s=0.4), Load(farm, "mixed", 2 * sum(slots.values())) as load:
        wait_until(lambda: len(load.answers) >= 10 * sum(slots.values()), 30, "ten answers for each slot")
        seen = farm.fakes.seen()
    assert load.failures == []
    assert {name: seen[name].most_in_flight for name in MIXED} == slots
    per_slot = [seen[name].arrivals / slots[name] for name in MIXED]
    assert max(per_slot) <= 1.5 * min(per_slot), per_slot


# --- B3: bounded wait, honest refusal


@behind_haproxy
def test_b3_what_does_not_fit_the_queue_is_refused_with_a_delay(farm: Farm) -> None:
    too_many = 5
    count = len(EVEN) + EVEN_DEPTH + too_many
    with ThreadPoolExecutor(count) as pool, farm.fakes.behaving(EVEN, "hold"):
        waiting = [pool.submit(farm.ask, "even") for _ in range(count)]
        wait_until(lambda: done(waiting) >= too_many, 20, "some are refused")
        wait_until(lambda: farm.fakes.in_flight(EVEN) == len(EVEN), 10, "every slot is taken")
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 10, "the queue is full")
        assert done(waiting) == too_many
    answers = [future.result() for future in waiting]
    assert statuses(answers) == {200: count - too_many, 429: too_many}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.headers.get("retry-after") for answer in refused} == {"2"}
    assert all("even is full" in answer.json()["error"]["message"] for answer in refused)
    assert {farm.fakes.seen()[name].most_in_flight for name in EVEN} == {1}
    # Being busy is no fault: nobody is marked down, and the next requests are served and spread as ever.
    assert farm.down() == []
    share = replicas(farm, [farm.ask("even") for _ in range(9)])
    if farm.mode == "slots":  # in the other one LiteLLM still counts the clients of earlier tests that left
        assert set(share.values()) == {3}, share


@in_slots
def test_connections_to_litellm_are_kept_and_outlive_its_restart(farm: Farm) -> None:
    """Accepting one costs LiteLLM more than all of HAProxy's part; a request on one that is gone would be lost."""

    def reused() -> float:
        return farm.balancer_figures("haproxy_server_connection_reuses_total")["Gateway/litellm"]

    before = reused()
    assert statuses([farm.ask("even") for _ in range(5)]) == {200: 5}
    assert reused() >= before + 4
    farm.restart("litellm")
    assert statuses([farm.ask("even") for _ in range(3)]) == {200: 3}


def done(futures: Sequence[Future[Any]]) -> int:
    return sum(future.done() for future in futures)


@behind_haproxy
@pytest.mark.parametrize("is_streamed", [False, True])
def test_b3_who_waited_too_long_is_refused_with_a_delay(farm: Farm, *, is_streamed: bool) -> None:
    with ThreadPoolExecutor(1) as pool, farm.fakes.behaving(BRIEF, "hold"):
        first = pool.submit(farm.ask, "brief")
        wait_until(lambda: farm.fakes.in_flight(BRIEF) == 1, 10, "the only slot is taken")
        begin = time.monotonic()
        second = farm.ask("brief", stream=is_streamed)
        waited_s = time.monotonic() - begin
    assert second.status_code == 429
    assert second.headers.get("retry-after") == "1"
    assert BRIEF_TIMEOUT_S <= waited_s < BRIEF_TIMEOUT_S + 2
    assert first.result().status_code == 200
    assert farm.fakes.arrivals(BRIEF) == {"brief-1": 1}
    assert farm.down() == []
    assert farm.ask("brief").status_code == 200


def passed_on(farm: Farm) -> float:
    """Requests that HAProxy has sent to LiteLLM."""
    return farm.balancer_figures("haproxy_backend_http_requests_total")["Gateway/"]


def refused_at_the_door(farm: Farm, name: str) -> float:
    return farm.balancer_figures("haproxy_backend_http_responses_total", "code")[f"Full:{name}/4xx"]


@in_slots
def test_b3_a_full_pool_refuses_at_the_door(farm: Farm) -> None:
    """LiteLLM hears nothing of it, so that it has time for what can be answered (004-F7)."""
    inside = len(EVEN) + EVEN_DEPTH
    before = refused_at_the_door(farm, "even")
    with ThreadPoolExecutor(inside + 1) as pool, farm.fakes.behaving(EVEN, "hold"):
        waiting = [pool.submit(farm.ask, "even") for _ in range(inside)]
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 10, "the queue is full")
        passed = passed_on(farm)
        refused = [farm.ask(name) for name in ("even", "owner/model:8B", "even")]
        streamed = farm.ask("even", stream=True)
        assert passed_on(farm) == passed
        assert refused_at_the_door(farm, "even") == before + 4
        # What is said in the body, but not as the model, is nobody's name; and other pools have room.
        assert farm.ask("brief", "even", metadata={"model": "even"}).status_code == 200
        assert passed_on(farm) == passed + 1
        # A client who names somebody else for this case is not refused for want of the first.
        assert farm.ask("even", fallbacks=["brief"]).status_code == 200
    assert statuses([future.result() for future in waiting]) == {200: inside}
    for answer in (*refused, streamed):
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
        assert answer.json()["error"] == {
            "message": "even is full: all slots are busy and 4 requests wait",
            "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert "access-control-allow-origin" not in answer.headers
    assert farm.ask("even").status_code == 200


@in_slots
def test_json_that_curl_calls_a_form_is_read_as_json(farm: Farm) -> None:
    """`curl -d` without a header says application/x-www-form-urlencoded."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    body = json.dumps(body_of("even"))
    assert farm.client.post("/v1/chat/completions", content=body, headers=form).status_code == 200
    refused = farm.client.post("/v1/chat/completions", content="model=even", headers=form)
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "the body must be a JSON object")


@in_slots
def test_b3_nobody_gets_past_the_keys_at_the_door(farm: Farm) -> None:
    inside = len(EVEN) + EVEN_DEPTH
    before = sum(farm.fakes.arrivals(EVEN).values())
    with ThreadPoolExecutor(inside) as pool, farm.fakes.behaving(EVEN, "hold"):
        waiting = [pool.submit(farm.ask, "even") for _ in range(inside - 1)]
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH - 1, 10, "one may come in")
        assert farm.ask("even", key="sk-wrong").status_code == 401
        waiting.append(pool.submit(farm.ask, "even"))
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 10, "the queue is full")
        assert farm.ask("even", key="sk-wrong").status_code == 401, "it has no place in the queue, but it could"
    assert statuses([future.result() for future in waiting]) == {200: inside}
    assert farm.ask("even", key="sk-wrong").status_code == 401
    assert sum(farm.fakes.arrivals(EVEN).values()) == before + inside


@in_slots
def test_b3_a_refusal_is_one_line_in_the_gateways_log(farm: Farm) -> None:
    """Those that had room when they came in and none when they arrived; here all of them go around the door."""
    log = farm.folder / "logs" / "litellm.log"
    behind = f"http://{LOOPBACK}:{farm.ports['litellm']}/v1/chat/completions"

    def ask() -> httpx.Response:
        return farm.client.post(behind, json=body_of("brief"))

    with ThreadPoolExecutor(8) as pool, farm.fakes.behaving(BRIEF, "hold"):
        before = log.stat().st_size
        answers = [pool.submit(ask) for _ in range(8)]
        wait_until(lambda: done(answers) >= 7, 10, "all but one are refused")
    refused = statuses([answer.result() for answer in answers])[429]
    written = log.read_text(errors="replace").encode()[before:].decode()
    assert refused == 7
    assert written.count("brief is full") + written.count("could take this request in time") >= 5
    assert "Traceback" not in written
    assert 7 <= written.count("Exception occured") <= 8


# --- B4: a fault costs at most the requests in flight on it


@everywhere
def test_b4_killed_server_costs_what_it_was_working_on_and_comes_back(farm: Farm) -> None:
    with Load(farm, "chat", 2 * CHAT_SLOTS) as load:
        wait_until(lambda: load.replicas_since(0) == set(CHAT_REPLICAS), 20, "both replicas answer")
        victim = farm.pid("chat-1")
        before = len(load.answers)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: farm.pid("chat-1") not in {0, victim}, 10, "supervisord has started it again")
        restarted = len(load.answers)
        wait_until(lambda: "box-chat-1" in load.replicas_since(restarted), BACK_WITHIN_S, "it answers again")
        back_s = time.monotonic() - killed
    # Where LiteLLM chooses the replica, HAProxy cannot send a request elsewhere while the new process loads its model.
    is_chosen = farm.mode == "least-busy"
    failures = [failure for failure in load.failures if not (is_chosen and "Loading model" in failure)]
    assert len(failures) <= CHAT_SLOTS, load.failures
    assert len(load.answers) > before
    assert back_s < BACK_WITHIN_S
    assert load.replicas_since(before) == set(CHAT_REPLICAS)


@in_slots
def test_b4_frozen_server_delays_what_it_was_working_on_and_nothing_else(farm: Farm) -> None:
    with Load(farm, "chat", 2 * CHAT_SLOTS) as load:
        wait_until(lambda: load.replicas_since(0) == set(CHAT_REPLICAS), 20, "both replicas answer")
        pid = farm.pid("chat-1")
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: farm.down() == ["box-chat-1"], 10, "HAProxy has noticed")
            noticed = len(load.answers)
            wait_until(lambda: len(load.answers) >= noticed + 10, 20, "the other one goes on")
            assert load.replicas_since(noticed) == {"box-chat-2"}
        finally:
            os.kill(pid, signal.SIGCONT)
        thawed = len(load.answers)
        wait_until(lambda: "box-chat-1" in load.replicas_since(thawed), BACK_WITHIN_S, "it answers again")
        wait_until(lambda: farm.down() == [], BACK_WITHIN_S, "it is in rotation again")
    assert load.failures == []


@behind_haproxy
def test_b4_mute_server_holds_what_it_was_given_and_nothing_else(farm: Farm) -> None:
    """It accepts every connection and answers none, not even for its health."""
    mute = EVEN[0]
    with Load(farm, "even", len(EVEN)) as load:
        wait_until(lambda: load.replicas_since(0) == set(EVEN), 20, "every replica answers")
        with farm.fakes.behaving([mute], "mute"):
            wait_until(lambda: farm.fakes.in_flight([mute]) == 1, 10, "it was given a request")
            held = farm.fakes.arrivals([mute])[mute]
            answered = len(load.answers)
            wait_until(lambda: len(load.answers) >= answered + 40, 20, "the others go on")
            assert farm.fakes.arrivals([mute])[mute] == held
            wait_until(lambda: farm.down() == [mute], 10, "HAProxy has noticed")
        heard = len(load.answers)
        wait_until(lambda: mute in load.replicas_since(heard), BACK_WITHIN_S, "it is used again")
    assert load.failures == []


@in_slots
def test_b4_loading_server_costs_no_error(farm: Farm) -> None:
    """As llama-server does until its model is loaded: 503 to requests and to whoever asks for its health."""
    with farm.fakes.behaving(EVEN[:1], "loading"):
        seen = statuses([farm.ask("even") for _ in range(12)])
    assert seen[200] >= 12 - unlucky(farm), seen
    everybody_answers(farm)


@behind_haproxy
def test_b4_server_at_a_tenth_of_its_speed_gets_less_and_stays(farm: Farm) -> None:
    slow, *others = EVEN
    with farm.fakes.behaving(others, service_s=0.1), farm.fakes.behaving([slow], service_s=1.0):
        with Load(farm, "even", len(EVEN)) as load:
            wait_until(lambda: len(load.answers) >= 80, 40, "they have answered enough to see it")
            wait_until(lambda: farm.fakes.arrivals(EVEN)[slow] >= 1, 20, "the slow one gets requests, too")
        got = farm.fakes.arrivals(EVEN)
    assert load.failures == []
    assert 2 * got[slow] <= min(got[name] for name in others), got
    assert farm.down() == []


@everywhere
def test_b4_server_that_fails_while_its_health_is_fine_costs_a_bounded_number_of_errors(farm: Farm) -> None:
    """Behind HAProxy three, and one each time that it is tried again; LiteLLM alone draws lots again, twice."""
    with farm.fakes.behaving(EVEN[:1], "error"):
        begin = time.monotonic()
        seen = statuses([farm.ask("even") for _ in range(30)])
        returns = (time.monotonic() - begin) / FAILING_RETURNS_AFTER_S
    assert set(seen) <= {200, 500}
    assert seen[500] <= (unlucky(farm) if farm.mode == "direct" else 3 + returns), seen
    everybody_answers(farm)


@behind_haproxy
def test_b4_poisonous_requests_among_others_take_nobody_out(farm: Farm) -> None:
    try:
        for _ in range(8):
            assert farm.ask("even", f"some {POISON}").status_code == 500
            assert statuses([farm.ask("even") for _ in range(5)]) == {200: 5}
        assert sum(farm.fakes.arrivals(EVEN).values()) == 8 * 6  # none was tried twice
        assert farm.down() == []
    finally:
        everybody_answers(farm)


def unlucky(farm: Farm) -> int:
    """Requests of thirty for which LiteLLM may have drawn the broken replica of three three times in a row."""
    return 2 if farm.mode == "direct" else 0


def everybody_answers(farm: Farm) -> None:
    """Return once each replica has answered again.

    Asked as many at once as there are slots: in `least-busy`, LiteLLM goes on counting the clients of earlier tests
    that left, and an idle farm would never show that the replica which it thinks busy is back.
    """
    back: set[str] = set()

    def is_everybody_back() -> bool:
        with farm.fakes.behaving(EVEN, service_s=0.2), ThreadPoolExecutor(len(EVEN)) as pool:
            answers = [asked.result() for asked in [pool.submit(farm.ask, "even") for _ in EVEN]]
        back.update(farm.replica(answer) for answer in answers if answer.is_success)
        return back == set(EVEN)

    wait_until(is_everybody_back, ALL_BACK_WITHIN_S, "each replica answers again")


@in_slots
@pytest.mark.parametrize("pool", ["even", "brief"])
def test_b4_nine_poisonous_requests_alone_take_nobody_out(farm: Farm, pool: str) -> None:
    answers = [farm.ask(pool, f"{POISON} {number}") for number in range(9)]
    assert (statuses(answers), farm.down()) == ({500: 9}, [])
    assert sum(farm.fakes.arrivals(POOLS[pool]).values()) == 9  # none was tried twice


@in_slots
def test_b4_unreachable_and_failing_nodes_cost_a_bounded_number_of_errors(farm: Farm) -> None:
    unreachable, failing, _sound = EVEN
    with farm.fakes.behaving([unreachable], "refuse"):
        assert statuses([farm.ask("even") for _ in range(12)]) == {200: 12}
        with farm.fakes.behaving([failing], "error"):
            begin = time.monotonic()
            errors = statuses([farm.ask("even") for _ in range(20)])
            returns = (time.monotonic() - begin) / FAILING_RETURNS_AFTER_S
        assert 1 <= errors[500] <= 3 + returns, errors
        assert set(errors) == {200, 500}
        assert unreachable in farm.down()
    begin = time.monotonic()
    wait_until(lambda: farm.down() == [], BACK_WITHIN_S, "both are in rotation again")
    assert time.monotonic() - begin < BACK_WITHIN_S
    assert set(replicas(farm, [farm.ask("even") for _ in range(9)]).values()) == {3}


@in_slots
def test_b4_all_replicas_at_once_and_back(farm: Farm) -> None:
    """No cooldown outlives the recovery by more than 15 seconds, and other pools never notice."""
    with farm.fakes.behaving(EVEN, "refuse"):
        assert not any(farm.ask("even").is_success for _ in range(6))
        assert farm.ask("brief").status_code == 200
    everybody_answers(farm)


@everywhere
def test_b4_one_unreachable_replica_costs_no_error(farm: Farm) -> None:
    with farm.fakes.behaving(EVEN[:1], "refuse"):
        seen = statuses([farm.ask("even") for _ in range(12)])
    assert seen[200] >= 12 - unlucky(farm), seen
    everybody_answers(farm)


# --- B5: one layer retries, and never after the first byte


@in_slots
def test_b5_broken_stream_ends_visibly_and_is_not_sent_again(farm: Farm) -> None:
    with farm.fakes.behaving(EVEN, "break", service_s=0.6):
        answer = farm.ask_streamed("even")
    assert answer.response.status_code == 200
    assert answer.text.split() == [f"piece{number}" for number in range(PIECES_BEFORE_BREAK)]
    assert answer.finish_reasons == []
    assert "error" in answer.events[-1]
    assert sum(farm.fakes.arrivals(EVEN).values()) == 1


@everywhere
def test_b5_answer_broken_before_its_first_byte_is_an_error(farm: Farm) -> None:
    """HAProxy cannot know whether the request itself is to blame and asks nobody else; LiteLLM alone asks again."""
    with farm.fakes.behaving(EVEN, "break"):
        response = farm.ask("even")
    assert response.status_code >= 500
    assert "message" in response.json()["error"]
    assert sum(farm.fakes.arrivals(EVEN).values()) == (3 if farm.mode == "direct" else 1)


# --- B6: a client that leaves frees its slot


@in_slots
@pytest.mark.parametrize("is_streamed", [False, True])
def test_b6_leaving_frees_the_slot(farm: Farm, *, is_streamed: bool) -> None:
    with farm.fakes.behaving(EVEN, "hold"):
        farm.leave("even", is_streamed=is_streamed)
        wait_until(lambda: farm.fakes.in_flight(EVEN) == 0, FREE_WITHIN_S, "the slot is free")
    assert sum(farm.fakes.arrivals(EVEN).values()) == 1


@in_slots
def test_b6_who_leaves_the_queue_never_reaches_a_replica(farm: Farm) -> None:
    with ThreadPoolExecutor(len(EVEN)) as pool, farm.fakes.behaving(EVEN, "hold"):
        holders = [pool.submit(farm.ask, "even") for _ in EVEN]
        wait_until(lambda: farm.fakes.in_flight(EVEN) == len(EVEN), 10, "every slot is taken")
        with farm.leaving("even"):
            wait_until(lambda: farm.queue("even") == 1, 10, "one more waits")
        wait_until(lambda: farm.queue("even") == 0, FREE_WITHIN_S, "the queue is empty")
    assert statuses([holder.result() for holder in holders]) == {200: len(EVEN)}
    assert farm.fakes.arrivals(EVEN) == dict.fromkeys(EVEN, 1)


# --- B7: bodies pass through unchanged

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
PICTURE = "data:image/png;base64,iVBORw0KGgo="
FIELDS: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "parallel_tool_calls": False,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object", "properties": {}}},
    },
    "stop": ["###", "\n\n"],
    "seed": 7,
    "temperature": 0,
    "top_p": 0.5,
    "max_tokens": 17,
    "max_completion_tokens": 18,
    "n": 1,
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"15": -1},
    "presence_penalty": 0.25,
    "frequency_penalty": -0.25,
    "user": "somebody",
    "reasoning_effort": "low",
    "verbosity": "low",
    "min_p": 0.05,
    "cache_prompt": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "grammar": 'root ::= "yes" | "no"',
}
MESSAGES: dict[str, list[dict[str, Any]]] = {
    "a system prompt": [
        {"role": "system", "content": "be ☃ brief"},
        {"role": "user", "content": "hello", "name": "Bob"},
    ],
    "an image": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is this?"},
                {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
            ],
        }
    ],
    "a tool's answer": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
    ],
}


def arrived(farm: Farm, **fields: object) -> dict[str, Any]:
    """The body of this request as the only replica that got it saw it."""
    farm.fakes.reset()
    body = {"model": "even", "messages": [{"role": "user", "content": "hello"}]} | fields
    farm.client.post("/v1/chat/completions", json=body).raise_for_status()
    seen = farm.fakes.seen()
    [only] = [body for name in EVEN for body in seen[name].bodies]
    return only


@in_slots
@pytest.mark.parametrize("is_streamed", [False, True])
def test_b7_every_field_passes_through(farm: Farm, *, is_streamed: bool) -> None:
    fields = FIELDS | ({"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {})
    got = arrived(farm, **fields)
    assert got.pop("model") == "fake-model"
    got.setdefault("stream", False)
    fields.setdefault("stream", False)
    wanted = fields | {"messages": [{"role": "user", "content": "hello"}]}
    del wanted["cache_prompt"]  # it would concern the requests of others
    wanted["max_completion_tokens"] = wanted.pop("max_tokens")  # one bound under one name: the smaller of both
    assert got == wanted


@in_slots
@pytest.mark.parametrize("kind", MESSAGES)
def test_b7_messages_pass_through(farm: Farm, kind: str) -> None:
    assert arrived(farm, messages=MESSAGES[kind])["messages"] == MESSAGES[kind]


@in_slots
def test_b7_every_field_of_an_embedding_request_passes_through(farm: Farm) -> None:
    fields = {"input": ["a", "b"], "encoding_format": "float", "dimensions": 2, "user": "somebody", "truncate": True}
    farm.client.post("/v1/embeddings", json={"model": "vectors"} | fields).raise_for_status()
    [got] = farm.fakes.seen()["vectors-1"].bodies
    assert got == {"model": "fake-model"} | fields


@in_modes("slots", broken={"slots": "LiteLLM drops `content: null` of an assistant's message with tool calls"})
def test_b7_null_content_beside_tool_calls_passes_through(farm: Farm) -> None:
    messages = [dict(message) for message in MESSAGES["a tool's answer"]]
    messages[1]["content"] = None
    assert arrived(farm, messages=messages)["messages"] == messages


@in_modes("slots", broken={"slots": "LiteLLM keeps `metadata` for its own records"})
def test_b7_metadata_passes_through(farm: Farm) -> None:
    assert arrived(farm, metadata={"run": "7"}).get("metadata") == {"run": "7"}


@in_slots
def test_a_private_pool_reuses_no_prompt_whatever_its_client_says(farm: Farm) -> None:
    farm.ask("brief", cache_prompt=True, id_slot=0).raise_for_status()
    farm.ask("brief", extra_body={"cache_prompt": True}).raise_for_status()
    bodies = farm.fakes.seen()["brief-1"].bodies
    assert [body["cache_prompt"] for body in bodies] == [False, False]
    assert not any("id_slot" in body for body in bodies)


@everywhere
def test_b7_replica_sees_neither_the_clients_key_nor_the_conversations_name(farm: Farm) -> None:
    farm.ask("even").raise_for_status()
    [headers] = [headers for seen in farm.fakes.seen().values() for headers in seen.headers]
    assert farm.key not in str(headers)
    if farm.mode != "direct":
        assert "x-corral-session" not in {name.lower() for name in headers}


# --- B8: health checks cost no inference


@in_slots
def test_b8_health_is_asked_without_inference(farm: Farm) -> None:
    names = [name for pool in POOLS.values() for name in pool]
    wait_until(lambda: all(farm.fakes.seen()[name].other_paths for name in names), 15, "every node was checked")
    seen = farm.fakes.seen()
    for name in names:
        path = "/v1/models" if name in FAKES_OF_DEFAULT_HEALTH else "/health"
        assert set(seen[name].other_paths) == {path}, name
        assert seen[name].arrivals == 0


@in_modes("direct")
def test_b8_without_haproxy_nothing_reaches_an_idle_node(farm: Farm) -> None:
    assert farm.ask("even").status_code == 200
    assert all(not seen.other_paths for seen in farm.fakes.seen().values())


# --- what came in by the guarded entrance (004-F9)


@in_slots
def test_requests_by_the_entrance_are_held_to_its_limits(farm: Farm) -> None:
    """The entrance itself is tested in `test_entrance.py`; this is the header that it sets."""
    headers = {"x-corral-guard": "messages=2 message_kib=1 tokens=7 choices=1"}

    def ask(*texts: str, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": text} for text in texts]
        body = {"model": "even", "messages": messages, **fields}
        base = f"http://{LOOPBACK}:{farm.ports['litellm']}"  # HAProxy takes the header off what comes in
        sent = {**headers, "Authorization": f"Bearer {farm.key}"}
        return httpx.post(f"{base}/v1/chat/completions", json=body, headers=sent, trust_env=False, timeout=60)

    assert [ask("a", "b", "c").status_code, ask("x" * 2048).status_code] == [413, 413]
    assert sum(farm.fakes.arrivals(EVEN).values()) == 0
    assert ask("a", "b", n=3).status_code == 400
    assert ask("a", "b", max_tokens=900, n=1).status_code == 200
    [seen] = [body for name in EVEN for body in farm.fakes.seen()[name].bodies]
    assert (seen["max_tokens"], seen["n"]) == (7, 1)


# --- limits (004-32) and conversations


@everywhere
def test_limit_of_a_pool_lets_exactly_so_many_through(farm: Farm) -> None:
    wait_until(lambda: time.time() % 60 < 50, 12, "the minute that LiteLLM counts in has room for this test")
    answers = [farm.ask(name) for name in ["limited", "limited-alias"] * LIMIT_RPM]
    assert [answer.status_code for answer in answers] == [200] * LIMIT_RPM + [429] * LIMIT_RPM
    assert {answer.headers.get("retry-after") for answer in answers[LIMIT_RPM:]} == {"60"}
    assert farm.fakes.arrivals(LIMITED) == {"limited-1": LIMIT_RPM}


@everywhere
def test_turns_of_a_conversation_return_to_the_warm_replica(farm: Farm) -> None:
    for number in range(3):
        messages = [{"role": "user", "content": f"conversation {number} about " + "the river and the bank " * 12}]
        headers = {"x-litellm-session-id": f"conversation-{number}"} if farm.mode != "slots" else {}
        answers = []
        for turn in range(4):
            body = {"model": "chat", "messages": messages}
            answer = farm.client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
            answers.append(answer)
            messages = [*messages, answer.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
            for _other in range(turn):  # now fewer, now more, so that no turn comes back to its replica by chance
                farm.ask("chat").raise_for_status()
        assert len(replicas(farm, answers)) == 1
        for later in answers[1:]:
            assert later.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
