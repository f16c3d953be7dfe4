"""The fast lane on a real farm: what goes through it, that answers are as LiteLLM's, limits, revocation, usage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from corral.errors import CorralError
from corral.runtime import supervisor
from corral.verbs.keys import keys
from tests.processes.fakes import LOOPBACK, Manner
from tests.processes.farm import (
    EVEN,
    VECTORS,
    Extras,
    Farm,
    Mode,
    body_of,
    inventory_of,
    key_of,
    running,
)
from tests.processes.helpers import wait_until
from tools.catalogue import FOLDER, metrics_in

pytestmark = pytest.mark.needs("haproxy", "postgres", "prisma-engine", "redis")

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
RPM = 6
# LiteLLM writes its sums every ten seconds, what HAProxy has counted a few seconds later.
WRITTEN_S = 40
# Each request with the key of `slow` is LiteLLM's to count.
CONSUMERS: dict[str, dict[str, Any]] = {
    "fast": {},
    "slow": {"limits": {"tpm": 1_000_000_000}},
    "narrow": {"pools": ["vectors"]},
    "bounded": {"limits": {"rpm": RPM}},
    "single": {"limits": {"parallel": 1}},
    "gone": {},
    "gone-meanwhile": {},
    "rotated": {},
    "counted": {},
}
# Fields of answers that no two requests share.
OWN = ("id", "created", "system_fingerprint", "timings", "completion_tokens_details", "prompt_tokens_details")


def _site(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    site = inventory_of(mode, ports, extras)
    for name in ("chat", "even", "mixed"):
        site["pools"][name]["cache"] = "shared"
    for name in EVEN:
        site["nodes"][name]["thinking"] = "shown"
        site["nodes"][name]["model"] = "even"
    site["nodes"][VECTORS[0]]["model"] = "vectors"
    del site["gateway"]["extra"]
    site["gateway"]["fast_lane"] = True
    site.pop("monitoring", None)
    return site | {"consumers": CONSUMERS}


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with running("slots", _site) as farm:
        yield farm


@pytest.fixture(autouse=True)
def _quiet(farm: Farm) -> None:
    farm.fakes.reset()


def used(farm: Farm, consumer: str, metric: str = "corral_fast_requests_total") -> int:
    """One of the fast lane's counters over all pools."""
    text = httpx.get(f"http://{LOOPBACK}:{farm.ports['stats']}/usage", trust_env=False).text
    found = re.findall(rf'^{metric}{{api_key_alias="{consumer}",.*}} (\d+)$', text, re.MULTILINE)
    return sum(map(int, found))


def send(farm: Farm, consumer: str, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key_of(farm, consumer)}"}
    return farm.client.post(path, json=body, headers=headers)


def permitted(farm: Farm, consumer: str, model: str, path: str = CHAT) -> None:
    """Has the consumer's key used until HAProxy answers for it."""
    body = body_of(model) if path == CHAT else {"model": model, "input": "hello"}

    def is_fast() -> bool:
        before = used(farm, consumer)
        assert send(farm, consumer, body, path).status_code == 200
        return used(farm, consumer) > before

    wait_until(is_fast, 10, f"{consumer} may use the lane to {model}")


def through(farm: Farm, consumer: str, body: dict[str, Any], path: str = CHAT) -> bool:
    """Whether a request, sent again where it renewed the permit, took the fast lane."""
    before = used(farm, consumer)
    for _ in range(2):
        send(farm, consumer, body, path)
    return used(farm, consumer) > before


MESSAGES = [{"role": "user", "content": "hello"}]
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat": (CHAT, {"model": "chat", "messages": MESSAGES, "max_tokens": 8, "seed": 1, "temperature": 0}),
    "a system message": (
        CHAT,
        {
            "model": "chat", "max_tokens": 5, "stop": ["\n", "."], "temperature": 0.0, "top_p": 1,
            "messages": [{"role": "system", "content": 'Say "ä" \U0001f600\\'}, *MESSAGES],
        },
    ),
    "a stream": (CHAT, {"model": "chat", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "stream": True}),
    "a stream with usage": (
        CHAT,
        {
            "model": "chat", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "more than the context": (CHAT, {"model": "chat", "messages": [{"role": "user", "content": "word " * 2600}]}),
    "an embedding of too much": (EMBED, {"model": "embed", "input": "word " * 700}),
    "an embedding": (EMBED, {"model": "embed", "input": "hello"}),
    "embeddings": (EMBED, {"model": "embed", "input": ["hello", "you"], "encoding_format": "base64"}),
}  # fmt: skip


# Headers that a client may go by.
HEADERS = ("content-type", "cache-control", "retry-after", "x-accel-buffering")


def _comparable(answer: httpx.Response) -> dict[str, Any]:
    """An answer without what differs between any two."""
    headers = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        body: Any = [line if line == "[DONE]" else _said(json.loads(line)) for line in lines]
    else:
        body = _said(answer.json())
    return {"status": answer.status_code, "headers": headers, "body": body}


def _said(value: Any) -> Any:
    """What JSON says: without null and empty values, which LiteLLM leaves out or adds, and what each answer has anew.

    LiteLLM's last event of a stream has an empty choice, and no answer says how many of its tokens were thoughts.
    """
    if isinstance(value, list):
        return [said for item in value if (said := _said(item)) not in (None, {"index": 0})]
    if not isinstance(value, dict):
        return value
    found = {name: _said(item) for name, item in value.items() if name not in OWN}
    empty: tuple[Any, ...] = (None, {}, []) if value.get("completion_tokens") != 0 else (None, {}, [], 0)
    return {name: item for name, item in found.items() if item not in empty}


def _fast_answer(farm: Farm, body: dict[str, Any], path: str) -> httpx.Response:
    """The answer of the fast lane; a request that renews the permit is sent again."""
    for _ in range(2):
        before = used(farm, "fast")
        answer = send(farm, "fast", body, path)
        if used(farm, "fast") > before:
            return answer
    raise AssertionError(f"not in the fast lane: {answer.status_code} {answer.text}")


@pytest.mark.parametrize("name", PLAIN)
def test_a_client_cannot_tell_the_lanes_apart(farm: Farm, name: str) -> None:
    path, body = PLAIN[name]
    permitted(farm, "fast", body["model"], path)
    send(farm, "fast", body, path)  # what the server keeps of a prompt is kept
    fast = _fast_answer(farm, body, path)
    slow = send(farm, "slow", body, path)
    assert used(farm, "slow") == 0
    assert _comparable(fast) == _comparable(slow)


# --- what is not plain


ODD: dict[str, dict[str, Any]] = {
    "a field for the server": {"cache_prompt": False},
    "a slot": {"id_slot": 0},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    "two answers": {"n": 1},
    "a session": {"session_id": "mine"},
    "a control of LiteLLM": {"num_retries": 3},
    "a bound of no sense": {"max_tokens": 0},
    "a bound twice": {"max_tokens": 3, "max_completion_tokens": 4},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
    "a name": {"messages": [{"role": "user", "content": "hello", "name": "me"}]},
    "an unknown role": {"messages": [{"role": "tool", "content": "hello", "tool_call_id": "1"}]},
    "no messages": {"messages": []},
    "a long text": {"messages": [{"role": "user", "content": "word " * 4000}]},
    "an alias": {"model": "default"},
    "another pool": {"model": "mixed"},
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_plain_is_litellms(farm: Farm, name: str) -> None:
    permitted(farm, "fast", "chat")
    assert not through(farm, "fast", {"model": "chat", "messages": MESSAGES, "max_tokens": 3, **ODD[name]})


RAW = {
    "a second model": '{"model":"chat","messages":[{"role":"user","content":"x"}],"model":"mixed"}',
    "an escaped field": r'{"model":"chat","id_\u0073lot":1,"messages":[{"role":"user","content":"x"}]}',
    "something after it": '{"model":"chat","messages":[{"role":"user","content":"x"}]} {}',
    "a comma too many": '{"model":"chat","messages":[{"role":"user","content":"x"},]}',
    "half a surrogate": r'{"model":"chat","messages":[{"role":"user","content":"\ud83d"}]}',
    "a wrong escape": r'{"model":"chat","messages":[{"role":"user","content":"\x"}]}',
    "a number of no kind": '{"model":"chat","temperature":01,"messages":[{"role":"user","content":"x"}]}',
}


@pytest.mark.parametrize("name", RAW)
def test_json_of_two_readings_is_litellms(farm: Farm, name: str) -> None:
    permitted(farm, "fast", "chat")
    headers = {"Authorization": f"Bearer {key_of(farm, 'fast')}", "Content-Type": "application/json"}
    before = used(farm, "fast")
    for _ in range(2):
        farm.client.post(CHAT, content=RAW[name].encode(), headers=headers)
    assert used(farm, "fast") == before


# --- keys


def test_a_key_takes_the_lane_only_to_its_own_pools(farm: Farm) -> None:
    permitted(farm, "narrow", "vectors", EMBED)
    before = used(farm, "narrow")
    for _ in range(3):
        assert send(farm, "narrow", {"model": "chat", "messages": MESSAGES}).status_code == 403
    assert used(farm, "narrow") == before
    stranger = {"Authorization": "Bearer sk-unknown-to-all"}
    assert farm.client.post(CHAT, json={"model": "chat", "messages": MESSAGES}, headers=stranger).status_code == 401


def test_a_revoked_key_is_refused_at_once_and_does_not_come_back(farm: Farm) -> None:
    permitted(farm, "gone", "chat")
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2}
    value = key_of(farm, "gone")
    keys.revoke(farm.plan, farm.out, ["gone"])
    answers = [farm.client.post(CHAT, json=body, headers={"Authorization": f"Bearer {value}"}) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {401}


def test_the_old_value_of_a_rotated_key_is_refused_at_once(farm: Farm) -> None:
    permitted(farm, "rotated", "chat")
    old = {"Authorization": f"Bearer {key_of(farm, 'rotated')}"}
    keys.rotate(farm.plan, farm.out, "rotated")
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2}
    assert farm.client.post(CHAT, json=body, headers=old).status_code == 401
    assert send(farm, "rotated", body).status_code == 200


def test_a_limit_on_requests_counts_both_lanes(farm: Farm) -> None:
    body = {"model": "embed", "input": "hello"}
    odd = body | {"user": "me"}
    answers = [send(farm, "bounded", odd if number % 2 else body, EMBED) for number in range(RPM + 4)]
    assert sum(answer.status_code == 200 for answer in answers) <= RPM + 1
    assert answers[-1].status_code == 429
    assert answers[-1].headers["retry-after"] == "60"
    assert used(farm, "bounded") > 0


def test_a_limit_at_a_time_counts_both_lanes(farm: Farm) -> None:
    permitted(farm, "single", "even")
    with farm.fakes.behaving(EVEN, "hold"), ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(send, farm, "single", body_of("even", **extra)) for extra in ({}, {"user": "me"}, {}, {})]
        wait_until(lambda: sum(item.done() for item in asking) == 3, 10, "all but one are refused")
        farm.fakes.tell(EVEN)
    codes = sorted(item.result().status_code for item in asking)
    assert codes == [200, 429, 429, 429]


# --- what LiteLLM is not needed for


def test_it_goes_on_while_litellm_is_away(farm: Farm) -> None:
    for consumer in ("fast", "gone-meanwhile"):
        permitted(farm, consumer, "chat")
    supervisor.call(farm.folder, "stopProcess", "litellm", timeout_s=60)
    try:
        body = {"model": "chat", "messages": MESSAGES, "max_tokens": 2}
        wait_until(lambda: send(farm, "fast", body).status_code == 200, 10, "HAProxy has noticed")
        assert [send(farm, "fast", body).status_code for _ in range(5)] == [200] * 5
        assert send(farm, "gone-meanwhile", body).status_code == 200
        with pytest.raises(CorralError, match="answers 503"):
            keys.revoke(farm.plan, farm.out, ["gone-meanwhile"])
        assert send(farm, "gone-meanwhile", body).status_code == 503
    finally:
        farm.restart("litellm")


def test_both_lanes_name_a_conversation_alike(farm: Farm) -> None:
    """So each turn is answered by the replica that has its beginning, whichever lane it takes."""
    permitted(farm, "fast", "even")
    for number in range(4):
        opening = [{"role": "system", "content": 'ä "\n" \\ \U0001f600'}, {"role": "user", "content": f"talk {number}"}]
        body: dict[str, Any] = {"model": "even", "messages": opening}
        slow = send(farm, "fast", body | {"user": "me"})
        seen = {farm.replica(send(farm, "fast", body)) for _ in range(3)}
        assert seen == {farm.replica(slow)}


def _usage_of(farm: Farm, name: str) -> dict[str, int]:
    rows = keys.spending(farm.plan, farm.out)
    return next(row["usage_30d"] for row in rows if row["name"] == name)


def test_usage_of_both_lanes_is_exact(farm: Farm) -> None:
    """A client counts what answers say; HAProxy counts the fast lane, `keys spend` both."""
    body: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 5}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    counted = {"requests": 0, "input_tokens": 0, "output_tokens": 0}
    for number in range(16):
        fields = (streamed if number % 2 else {}) | ({"n": 1} if number % 5 == 4 else {})
        answer = send(farm, "counted", body | fields)
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if '"usage"' in line]
        usage = json.loads(lines[-1] if number % 2 else answer.text)["usage"]
        more = (1, usage["prompt_tokens"], usage["completion_tokens"])
        counted = {name: count + one for (name, count), one in zip(counted.items(), more, strict=True)}
    fast = {name: used(farm, "counted", f"corral_fast_{name}_total") for name in counted}
    assert 10 <= fast["requests"] < counted["requests"]
    each = {name: count // counted["requests"] for name, count in counted.items()}
    assert fast == {name: fast["requests"] * one for name, one in each.items()}
    wait_until(lambda: _usage_of(farm, "counted")["requests"] >= counted["requests"], WRITTEN_S, "all is written")
    assert _usage_of(farm, "counted") == counted
    # llama-server's last event has the counts, too, where the client does not ask for them.
    before = used(farm, "counted", "corral_fast_output_tokens_total")
    assert through(farm, "counted", body | {"stream": True})
    assert used(farm, "counted", "corral_fast_output_tokens_total") - before in {5, 10}


# --- what goes wrong


FAILURES = [
    *((manner, how) for manner in ("error", "loading", "refuse") for how in ("plain", "streamed")),
    ("break", "plain"),
]


@pytest.mark.parametrize(("manner", "how"), FAILURES)
def test_failures_are_told_alike(farm: Farm, manner: Manner, how: str) -> None:
    """Every replica of a pool behaves badly. Only LiteLLM ends a stream that breaks off with an error event."""
    found = []
    for consumer in ("slow", "fast"):
        wait_until(lambda: farm.down() == [], 20, "the pool is well")
        permitted(farm, "fast", "even")
        with farm.fakes.behaving(EVEN, manner):
            found.append(_comparable(send(farm, consumer, body_of("even", stream=how == "streamed"))))
    assert found[0] == found[1]


def test_prometheus_has_times_and_failures_too(farm: Farm) -> None:
    """HAProxy's metrics are those of the catalogue, with which rules and dashboards are compared."""
    permitted(farm, "fast", "chat")
    assert through(farm, "fast", {"model": "chat", "messages": MESSAGES, "stream": True, "max_tokens": 2})
    assert through(farm, "fast", PLAIN["more than the context"][1])
    permitted(farm, "single", "even")
    with farm.fakes.behaving(EVEN, "hold"), ThreadPoolExecutor(1) as pool:
        first = pool.submit(send, farm, "single", body_of("even"))
        wait_until(lambda: farm.fakes.in_flight(EVEN) == 1, 10, "one is at work")
        assert send(farm, "single", body_of("even")).status_code == 429
        farm.fakes.tell(EVEN)
    assert first.result().status_code == 200
    text = httpx.get(f"http://{LOOPBACK}:{farm.ports['stats']}/usage", trust_env=False).text
    assert metrics_in(text) == json.loads((FOLDER / "fast-lane.json").read_text(encoding="utf-8"))["metrics"]
    for series in (
        'requests_total{api_key_alias="fast",.*,pool="chat",status_code="200"}',
        'requests_total{api_key_alias="fast",.*,pool="chat",status_code="400"}',
        'limited_requests_total{api_key_alias="single",.*,pool="even"}',
        'first_token_seconds_bucket{pool="chat",le="[+]Inf"}',
        'answer_seconds_bucket{pool="chat",le="[+]Inf"}',
    ):
        assert re.search(f"^corral_fast_{series} [1-9]", text, re.MULTILINE), series
