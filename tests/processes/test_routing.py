"""Tiers, spill, fallbacks, budgets and names that wait, through the rendered LiteLLM and HAProxy, in every mode."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import yaml
from openai.resources.responses import Responses

from corral.config.inventory import Inventory
from corral.gateway.keys import wanted_keys
from corral.gateway.routes import CONSUMER_ROUTES
from tests.needs import postgres_folder
from tests.processes.fakes import LOOPBACK, PIECES_BEFORE_BREAK
from tests.processes.farm import HOST, Extras, Farm, Mode, in_modes, running
from tests.processes.helpers import wait_until

# Pools of fakes: the name of each fake and its slots.
POOLS = {
    "easy": {"easy-1": 1},
    "hard": {"hard-1": 2},
    "shared": {"shared-1": 1},
    "front": {"front-1": 1},
    "second": {"second-1": 1},
    "last": {"last-1": 4},
}
NAMES = [name for pool in POOLS.values() for name in pool]
TIERS = ("easy-1", "hard-1")
CHAIN = ("front-1", "second-1", "last-1")
DEPTH = 2
SHARED_DEPTH = 8
SHORT_CONTEXT, LONG_CONTEXT = 256, 1024
# A fake's answer is three tokens after a prompt of three, at one dollar each.
DOLLARS_PER_ANSWER = 6
BUDGET_USD = 30
SIMPLE, MEDIUM, COMPLEX = (
    "hello there",
    "explain rain",
    "please compare these two very different kinds of bridge for me",
)


def routing_inventory(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    """A site with everything that routes: tiers, fallbacks, a longer context, a budget, and a name that waits."""
    nodes = {
        name: {
            "url": f"http://{LOOPBACK}:{ports[name]}",
            "model": f"model-of-{pool}",
            "slots": slots,
            "health": "/health",
        }
        for pool, names in POOLS.items()
        for name, slots in names.items()
    }
    nodes["last-1"] |= {
        "price": {"input_usd_per_million": 1_000_000, "output_usd_per_million": 1_000_000},
        "budget": {"max_usd": BUDGET_USD, "period": "1d"},
        "api_key": "LAST_RESORT_KEY",
    }
    on = {pool: {"on": [{"node": name} for name in names]} for pool, names in POOLS.items()}
    queue = {"depth": DEPTH, "timeout_s": 24}
    real = {"on": {"host": HOST}, "engine": {"slots": 1, "threads": 1}}
    return {
        "schema_version": 1,
        "name": f"routing-{mode}",
        "hosts": {HOST: {"runtime": "local", "address": LOOPBACK}},
        "models": {
            "short": {"source": "chat.gguf", "kind": "chat", "context": SHORT_CONTEXT},
            "long": {"source": "chat.gguf", "kind": "chat", "context": LONG_CONTEXT},
        },
        "nodes": nodes,
        "pools": {
            "easy": on["easy"] | {"queue": queue},
            "hard": on["hard"] | {"queue": queue},
            "shared": on["shared"] | {
                "aliases": ["live"], "background": ["batch"], "queue": queue | {"depth": SHARED_DEPTH},
            },
            "front": on["front"] | {
                "aliases": ["facade"], "fallback": ["second", "last"], "queue": queue | {"depth": 0},
            },
            "second": on["second"] | {"queue": queue | {"depth": 0}},
            "last": on["last"] | {"queue": queue},
            "short": real | {
                "model": "short", "ports": ports["chat"], "context_fallback": ["long"], "fallback": ["last"],
            },
            "long": real | {"model": "long", "ports": ports["chat-2"]},
        },
        "gateway": {
            "host": HOST, "port": ports["gateway"], "balancing": mode, "timeout_s": 40,
            "admin_port": ports["admin"], "litellm_port": ports["litellm"],
            "balancer_port": ports["balancer"], "stats_port": ports["stats"],
            "database": extras.has_database, "database_port": ports["database"],
            "cache": extras.has_cache, "cache_port": ports["cache"],
            **({"conversations": {"keep": "1h"}} if extras.has_database else {}),
            "auto": {
                "aliases": ["gpt-4o"],
                "tiers": [
                    {"name": "simple", "pool": "easy", "spill": ["hard"]},
                    {"name": "medium", "pool": "hard"},
                    {"name": "complex", "pool": "hard", "spill": ["easy"]},
                ],
            },
        },
    }  # fmt: skip


# What cannot differ by the mode is tested in one.
in_slots = in_modes("slots")
everywhere = in_modes("slots", "least-busy", "direct")
behind_haproxy = in_modes("slots", "least-busy")


@pytest.fixture(scope="module")
def running_farm(request: pytest.FixtureRequest) -> Iterator[Farm]:
    with running(request.param, routing_inventory, POOLS) as farm:
        yield farm


@pytest.fixture
def farm(running_farm: Farm) -> Farm:
    """The farm of the mode that the test is for, with fakes that answer and have seen nothing."""
    running_farm.fakes.tell(NAMES)
    if running_farm.mode != "direct":
        wait_until(lambda: not running_farm.down(), 30, "HAProxy uses every replica again")
    running_farm.fakes.reset()
    return running_farm


def pool_of(answer: httpx.Response) -> str:
    """Which pool answered, as the client is told."""
    answer.raise_for_status()
    return str(answer.headers["x-corral-pool"])


@contextmanager
def held(farm: Farm, *names: str) -> Iterator[None]:
    """These fakes keep their answers for as long as the block lasts."""
    with farm.fakes.behaving(names, "hold"):
        yield


def is_busy(farm: Farm, number: int) -> bool:
    return farm.fakes.in_flight(NAMES) >= number


def has_waiting(farm: Farm, number: int, *pools: str) -> bool:
    return sum(map(farm.queue, pools)) >= number


@contextmanager
def asking(farm: Farm, *questions: tuple[str, str]) -> Iterator[list[Future[httpx.Response]]]:
    """Asks, one after the other, each once the one before has arrived at a fake."""
    with ThreadPoolExecutor(len(questions)) as threads:
        futures = []
        for number, (model, text) in enumerate(questions, start=farm.fakes.in_flight(NAMES) + 1):
            futures.append(threads.submit(farm.ask, model, text))
            wait_until(partial(is_busy, farm, number), 20, f"request {number} has arrived")
        yield futures


# --- tiers (000-04)


@everywhere
def test_each_request_goes_to_its_tier(farm: Farm) -> None:
    for text, tier, pool in ((SIMPLE, "simple", "easy"), (MEDIUM, "medium", "hard"), (COMPLEX, "complex", "hard")):
        for name in ("auto", "gpt-4o"):
            answer = farm.ask(name, text).raise_for_status()
            assert (answer.headers["x-corral-tier"], pool_of(answer)) == (tier, pool)
    arrivals = farm.fakes.arrivals(NAMES)
    assert (arrivals["easy-1"], arrivals["hard-1"], sum(arrivals.values())) == (2, 4, 6), "no inference of its own"
    assert farm.fakes.seen()["hard-1"].bodies[0]["model"] == "model-of-hard"
    log = (farm.folder / "logs" / "litellm.log").read_text()
    assert '"tier": "complex", "tier_pool": "hard", "pool": "hard"' in log
    assert COMPLEX not in log


@in_slots
def test_a_streamed_answer_says_its_tier_too(farm: Farm) -> None:
    answer = farm.ask_streamed("auto", MEDIUM)
    assert (answer.response.headers["x-corral-tier"], pool_of(answer.response)) == ("medium", "hard")
    assert answer.finish_reasons == ["stop"]


@in_slots
def test_models_are_listed_with_all_their_names(farm: Farm) -> None:
    models = farm.client.get("/v1/models").raise_for_status().json()["data"]
    assert {model["id"] for model in models} == {*POOLS, "short", "long", "auto", "gpt-4o", "live", "batch", "facade"}


# --- spill (000-06) keeps B3: a bounded wait, then 429


@behind_haproxy
def test_a_full_tier_spills_before_anybody_waits(farm: Farm) -> None:
    with held(farm, *TIERS), asking(farm, *[("auto", SIMPLE)] * 3) as futures:
        assert farm.fakes.arrivals(TIERS) == {"easy-1": 1, "hard-1": 2}
        farm.fakes.tell(TIERS)
        assert [pool_of(future.result()) for future in futures] == ["easy", "hard", "hard"]


@in_slots
def test_when_all_tiers_are_full_requests_wait_and_then_are_refused(farm: Farm) -> None:
    with held(farm, *TIERS), ThreadPoolExecutor(8) as threads, asking(farm, *[("auto", SIMPLE)] * 3) as running:
        waiting = []
        for number in range(1, 2 * DEPTH + 1):
            waiting.append(threads.submit(farm.ask, "auto", SIMPLE))
            wait_until(partial(has_waiting, farm, number, "easy", "hard"), 20, "it waits")
        assert (farm.queue("easy"), farm.queue("hard")) == (DEPTH, DEPTH)
        refused = farm.ask("auto", SIMPLE)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        farm.fakes.tell(TIERS)
        assert {future.result().status_code for future in [*running, *waiting]} == {200}


@in_slots
def test_a_burst_is_refused_only_when_nothing_is_left(farm: Farm) -> None:
    room = 1 + 2 + 2 * DEPTH
    with farm.fakes.behaving(TIERS, service_s=1.5), ThreadPoolExecutor(2 * room) as threads:
        answers = list(threads.map(lambda _: farm.ask("auto", SIMPLE), range(2 * room)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= room, "no place stays empty"
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    assert farm.fakes.seen()["easy-1"].most_in_flight == 1
    assert farm.fakes.seen()["hard-1"].most_in_flight == 2


@in_slots
def test_a_tier_without_spill_waits_for_its_own_pool(farm: Farm) -> None:
    with held(farm, *TIERS), asking(farm, *[("auto", MEDIUM)] * 2) as running, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(farm.ask, "auto", MEDIUM)
        wait_until(lambda: farm.queue("hard") == 1, 20, "it waits")
        assert farm.fakes.arrivals(TIERS) == {"easy-1": 0, "hard-1": 2}
        farm.fakes.tell(TIERS)
        assert {pool_of(future.result()) for future in [*running, waiting]} == {"hard"}


@in_slots
def test_a_tier_whose_servers_are_down_spills(farm: Farm) -> None:
    with farm.fakes.behaving(["easy-1"], "refuse"):
        wait_until(lambda: "easy-1" in farm.down(), 30, "HAProxy has seen it")
        answer = farm.ask("auto", SIMPLE)
        assert (answer.headers["x-corral-tier"], pool_of(answer)) == ("simple", "hard")
    wait_until(lambda: not farm.down(), 30, "HAProxy uses it again")


@in_modes("direct")
def test_without_haproxy_nothing_spills(farm: Farm) -> None:
    with held(farm, *TIERS), asking(farm, *[("auto", SIMPLE)] * 3):
        assert farm.fakes.arrivals(TIERS) == {"easy-1": 3, "hard-1": 0}
        farm.fakes.tell(TIERS)


# --- names that wait (001-03, 001-05)


@in_slots
def test_live_and_batch_are_one_pool(farm: Farm) -> None:
    assert [pool_of(farm.ask(name)) for name in ("shared", "live", "batch")] == ["shared"] * 3
    assert farm.fakes.arrivals(["shared-1"]) == {"shared-1": 3}
    names = {name.lower() for headers in farm.fakes.seen()["shared-1"].headers for name in headers}
    assert "x-corral-class" not in names


@contextmanager
def queued(farm: Farm, *questions: tuple[str, str]) -> Iterator[list[Future[httpx.Response]]]:
    """One request in the only slot of `shared`, and these behind it, in this order; then all are answered."""
    with (
        held(farm, "shared-1"),
        ThreadPoolExecutor(len(questions)) as threads,
        asking(farm, ("live", "first")) as futures,
    ):
        for number, question in enumerate(questions, start=1):
            futures.append(threads.submit(farm.ask, *question))
            wait_until(partial(has_waiting, farm, number, "shared"), 20, f"request {number} waits")
        yield futures
        farm.fakes.tell(["shared-1"])
        assert {future.result().status_code for future in futures} == {200}


def order_of_arrival(farm: Farm) -> list[str]:
    return [str(body["messages"][0]["content"]) for body in farm.fakes.seen()["shared-1"].bodies]


@behind_haproxy
def test_live_overtakes_waiting_background(farm: Farm) -> None:
    questions = (("batch", "b1"), ("batch", "b2"), ("live", "l1"), ("batch", "b3"), ("shared", "l2"))
    with queued(farm, *questions):
        pass
    assert order_of_arrival(farm) == ["first", "l1", "l2", "b1", "b2", "b3"]


@in_slots
def test_background_leaves_half_of_the_queue_to_the_others(farm: Farm) -> None:
    half = [("batch", f"b{number}") for number in range(SHARED_DEPTH // 2)]
    with queued(farm, *half):
        refused = farm.ask("batch", "one too many")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        with ThreadPoolExecutor(1) as threads:
            live = threads.submit(farm.ask, "live", "l1")
            wait_until(lambda: farm.queue("shared") == len(half) + 1, 20, "live waits")
            farm.fakes.tell(["shared-1"])
            assert live.result().status_code == 200
    assert order_of_arrival(farm)[:2] == ["first", "l1"]


@in_modes("direct")
def test_without_haproxy_nobody_overtakes(farm: Farm) -> None:
    with held(farm, "shared-1"), asking(farm, ("live", "first"), ("batch", "b1"), ("live", "l1")):
        farm.fakes.tell(["shared-1"])
    assert order_of_arrival(farm) == ["first", "b1", "l1"], "the server has them all at once, in the order they came"


# --- fallbacks (000-09, 000-25) keep B5: each pool once, and never after the first byte


def attempts(farm: Farm, name: str) -> int:
    """How often a failing fake was asked, as far as it has to be known: once.

    In direct mode LiteLLM is the only layer. It asks three times, and for the next seconds not at all.
    """
    seen = farm.fakes.arrivals([name])[name]
    return 1 if farm.mode == "direct" and seen <= 3 else seen


@in_slots
def test_b5_after_the_first_byte_nobody_else_is_asked(farm: Farm) -> None:
    with farm.fakes.behaving(["front-1"], "break", service_s=0.6):
        answer = farm.ask_streamed("front")
    assert answer.text.split() == [f"piece{number}" for number in range(PIECES_BEFORE_BREAK)]
    assert answer.finish_reasons == []
    assert any("error" in event for event in answer.events)
    assert farm.fakes.arrivals(CHAIN) == {"front-1": 1, "second-1": 0, "last-1": 0}


@everywhere
@pytest.mark.parametrize("name", ["front", "facade"])
def test_a_pool_that_fails_falls_back(farm: Farm, name: str) -> None:
    with farm.fakes.behaving(["front-1"], "error"):
        assert pool_of(farm.ask(name)) == "second"
    assert [attempts(farm, fake) for fake in CHAIN[:2]] == [1, 1]
    assert farm.fakes.arrivals(CHAIN)["last-1"] == 0


@in_slots
def test_the_last_resort_is_asked_last_and_with_its_own_key(farm: Farm) -> None:
    with farm.fakes.behaving(["front-1", "second-1"], "error"):
        assert pool_of(farm.ask("front")) == "last"
    assert [attempts(farm, fake) for fake in CHAIN] == [1, 1, 1]
    seen = farm.fakes.seen()
    assert seen["last-1"].headers[0]["Authorization"] == "Bearer value-of-LAST_RESORT_KEY"
    assert "value-of-LAST_RESORT_KEY" not in str([seen[name].headers for name in CHAIN[:2]])


@in_slots
def test_a_full_pool_falls_back_instead_of_refusing(farm: Farm) -> None:
    with held(farm, "front-1"), asking(farm, ("front", "first")):
        assert pool_of(farm.ask("front")) == "second"
        farm.fakes.tell(["front-1"])


@in_slots
def test_a_clients_own_mistake_goes_nowhere_else(farm: Farm) -> None:
    answer = farm.ask("short", "hello", grammar="root ::= (")
    assert answer.status_code == 400, answer.text
    assert farm.fakes.arrivals(CHAIN)["last-1"] == 0


# --- requests that are too long


def words(count: int) -> str:
    return "the river and the bank " * (count // 5)


@in_slots
def test_a_request_that_is_too_long_goes_to_a_longer_context(farm: Farm) -> None:
    assert pool_of(farm.ask("short", "hello", max_tokens=4)) == "short"
    answer = farm.ask("short", words(SHORT_CONTEXT + 100), max_tokens=4)
    assert pool_of(answer) == "long"
    assert answer.json()["usage"]["prompt_tokens"] > SHORT_CONTEXT


@in_slots
@pytest.mark.parametrize("pool", ["short", "long"])
def test_a_request_that_is_too_long_for_all_is_the_clients_error(farm: Farm, pool: str) -> None:
    answer = farm.ask(pool, words(LONG_CONTEXT + 500), max_tokens=4)
    assert answer.status_code == 400
    assert "context" in answer.json()["error"]["message"]
    assert farm.fakes.arrivals(CHAIN)["last-1"] == 0, "a longer context is another thing than a fallback"


# --- keys: a fallback leads only where the key may go


def new_key(farm: Farm, *models: str) -> str:
    told = {"models": models, "allowed_routes": list(CONSUMER_ROUTES)}
    answer = farm.admin.post("/key/generate", json=told).raise_for_status()
    return str(answer.json()["key"])


@in_slots
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_key_for_auto_has_the_tiers_and_nothing_else(farm: Farm) -> None:
    key = new_key(farm, "auto")
    assert [pool_of(farm.ask("auto", text, key=key)) for text in (SIMPLE, MEDIUM)] == ["easy", "hard"]
    assert farm.ask("hard", key=key).status_code in (401, 403)


@in_slots
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_key_for_the_background_stays_there(farm: Farm) -> None:
    key = new_key(farm, "batch")
    assert pool_of(farm.ask("batch", key=key)) == "shared"
    assert farm.ask("live", key=key).status_code in (401, 403)


@in_slots
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_local_only_key_stays_in_the_house(farm: Farm) -> None:
    site = yaml.safe_load((farm.out / "inventory.yaml").read_text(encoding="utf-8"))
    site["nodes"]["last-1"] = {"engine": "cloud", "model": "openai/gpt-4o", "slots": 4}
    inventory = Inventory.model_validate(site | {"consumers": {"child": {"local_only": True}}})
    (spec,) = wanted_keys(inventory)
    key = new_key(farm, *spec.settings["models"])
    assert pool_of(farm.ask("live", key=key)) == "shared"
    assert farm.ask("last", key=key).status_code in (401, 403)
    with farm.fakes.behaving(["front-1", "second-1"], "error"):
        assert not farm.ask("front", key=key).is_success
    assert farm.fakes.arrivals(CHAIN)["last-1"] == 0


@in_slots
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_fallback_leads_only_where_the_key_may_go(farm: Farm) -> None:
    with farm.fakes.behaving(["front-1"], "error"):
        assert farm.ask("front", key=new_key(farm, "front")).status_code == 500
        assert pool_of(farm.ask("front", key=new_key(farm, "front", "second"))) == "second"


# --- conversations of /v1/responses (002-12, 002-13)

keeps_conversations = pytest.mark.needs("postgres", "prisma-engine")


@contextmanager
def talking(farm: Farm, key: str = "") -> Iterator[Responses]:
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    with openai.OpenAI(
        base_url=base, api_key=key or farm.key, max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as client:
        yield client.responses


def heard(farm: Farm) -> list[tuple[str, str]]:
    """Role and text of the messages that the simple tier's server got last."""
    return [(item["role"], item["content"]) for item in farm.fakes.seen()["easy-1"].bodies[-1]["messages"]]


def on_rows(farm: Farm, statement: str) -> str:
    words = [str(postgres_folder() or "") + "/psql", (farm.out / HOST / "secrets" / "DATABASE_URL").read_text()]
    done = subprocess.run([*words, "-Atc", statement], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


@in_slots
@keeps_conversations
def test_a_conversation_goes_on_after_a_restart_and_from_every_turn_of_it(farm: Farm) -> None:
    """The second turn is streamed by a real llama-server, the third comes after a restart of LiteLLM."""
    with talking(farm) as responses:
        first = responses.create(model="easy", input="I am Ada")
        with responses.create(model="long", input="again", previous_response_id=first.id, stream=True) as stream:
            events = list(stream)
        second = next(event.response for event in events if event.type == "response.completed")
        ids = {event.response.id for event in events if event.type in ("response.created", "response.completed")}
        assert ids == {second.id}
        assert second.previous_response_id == first.id
        farm.restart("litellm")
        third = responses.create(
            model="easy", input=[{"role": "user", "content": "who?"}], previous_response_id=second.id
        )
        assert [role for role, _ in heard(farm)] == ["user", "assistant"] * 2 + ["user"]
        assert heard(farm)[0] == ("user", "I am Ada")
        assert heard(farm)[1:4:2] == [("assistant", first.output_text), ("assistant", second.output_text)]
        responses.create(model="easy", input="and from here?", previous_response_id=first.id)
        assert heard(farm)[1:] == [("assistant", first.output_text), ("user", "and from here?")]
        assert third.output_text


@in_slots
@keeps_conversations
def test_a_conversation_is_of_one_key_and_ends(farm: Farm) -> None:
    with talking(farm) as responses, talking(farm, new_key(farm, "easy")) as others:
        kept, unkept = responses.create(model="easy", input="I am Ada"), responses.create(
            model="easy", input="I am Bob", store=False
        )  # fmt: skip
        with responses.create(model="easy", input="x", previous_response_id=kept.id, stream=True) as stream:
            begun = next(event.response for event in stream if event.type == "response.created")
        own = others.create(model="easy", input="I am Eve")
        assert others.create(model="easy", input="x", previous_response_id=own.id).output_text
        for asked, previous in ((others, kept), (responses, own), (responses, unkept), (responses, begun)):
            refuses(asked, previous.id)
        assert "I am" not in (farm.folder / "logs" / "litellm.log").read_text()
        assert responses.create(model="easy", input="x", previous_response_id=kept.id).output_text
        on_rows(farm, "UPDATE corral.answers SET until = now() - interval '1 second'")
        refuses(responses, kept.id)
        responses.create(model="easy", input="what has ended is deleted")
        assert on_rows(farm, "SELECT count(*) FROM corral.answers") == "1"


def refuses(responses: Responses, previous: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        responses.create(model="easy", input="who am I?", previous_response_id=previous)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


@in_slots
@keeps_conversations
def test_a_tools_result_follows_its_call_of_the_turn_before(farm: Farm) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
    call: Any = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}
    result: Any = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    with talking(farm) as responses:
        asked = responses.create(model="easy", input=[{"role": "user", "content": "weather?"}, call], tools=[tool])
        responses.create(model="easy", input=[result], tools=[tool], previous_response_id=asked.id)
    assert ("tool", "sunny") in heard(farm)


# --- sessions (002-12…16)


@contextmanager
def chatting(farm: Farm, key: str = "") -> Iterator[openai.OpenAI]:
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    with openai.OpenAI(
        base_url=base, api_key=key or farm.key, max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as client:
        yield client


def say(client: openai.OpenAI, session: str, text: str, model: str = "easy", **more: Any) -> Any:
    messages: Any = [*more.pop("before", []), {"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, extra_body={"session_id": session}, **more)


def of_session(farm: Farm, key: str, session: str, below: str = "", method: str = "GET") -> httpx.Response:
    with farm.new_client(key) as client:
        return client.request(method, f"/v1/sessions/{session}{below}", json={} if method == "POST" else None)


@in_slots
@keeps_conversations
def test_a_session_goes_on_over_streams_a_restart_and_an_answer_that_was_left(farm: Farm) -> None:
    system: Any = [{"role": "system", "content": "be brief"}]
    with chatting(farm) as client:
        session = farm.client.post("/v1/sessions", json={"data": {"of": "ada"}}).raise_for_status().json()["id"]
        first = say(client, session, "I am Ada", before=system).choices[0].message.content
        with say(client, session, "again", stream=True) as stream:
            second = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        with say(client, session, "24 stamps, 60 ms apart", stream=True) as stream:
            next(iter(stream))
        farm.restart("litellm")
        third = say(client, session, "who?")
    said = [("user", "I am Ada"), ("assistant", first), ("user", "again"), ("assistant", second), ("user", "who?")]
    assert heard(farm) == [("system", "be brief"), *said]
    kept = of_session(farm, farm.key, session, "/messages").json()["data"]
    assert [(item["role"], item["content"]) for item in kept] == [
        *said, ("assistant", third.choices[0].message.content),
    ]  # fmt: skip
    shown = of_session(farm, farm.key, session).json()
    assert (shown["turns"], shown["data"]) == (3, {"of": "ada"})
    assert session in {item["id"] for item in farm.client.get("/v1/sessions?limit=5").json()["data"]}
    assert farm.client.post("/v1/sessions", json={"id": session}).status_code == 409


@in_slots
@keeps_conversations
def test_a_session_is_of_one_key_and_ends(farm: Farm) -> None:
    other = new_key(farm, "easy")
    session = farm.client.post("/v1/sessions", json={"ttl_s": 60}).json()["id"]
    with chatting(farm) as client, chatting(farm, other) as stranger:
        say(client, session, "I am Ada")
        say(client, "my-own", "I am Bob")
        say(stranger, "my-own", "I am Eve")
        assert heard(farm) == [("user", "I am Eve")]
        with pytest.raises(openai.NotFoundError) as refused:
            say(stranger, session, "who am I?")
        assert (refused.value.code, refused.value.param) == ("session_not_found", "session_id")
        for below, method in (("", "GET"), ("/messages", "GET"), ("/extend", "POST"), ("", "DELETE")):
            assert of_session(farm, other, session, below, method).status_code == 404
            assert of_session(farm, "", session, below, method).status_code == 401
        with farm.new_client() as nameless:
            assert nameless.get("/v1/sessions").status_code == 401
            for path in ("/v1/sessions", "/v1/responses"):
                assert nameless.post(path, json={"model": "easy", "input": "x"}).status_code == 401
        assert [item["id"] for item in json_of(farm, other)] == ["my-own"]
        before = of_session(farm, farm.key, session).json()["expires_at"]
        longer = farm.client.post(f"/v1/sessions/{session}/extend", json={"ttl_s": 600}).json()["expires_at"]
        assert 500 < longer - before < 700
        assert farm.client.post(f"/v1/sessions/{session}/extend", json={"ttl_s": 3601}).status_code == 400
        assert of_session(farm, farm.key, "my-own", method="DELETE").json()["deleted"]
        on_rows(farm, "UPDATE corral.sessions SET until = now() - interval '1 second'")
        with pytest.raises(openai.NotFoundError):
            say(client, session, "who am I?")
        say(client, "my-own", "who am I?")
        assert heard(farm) == [("user", "who am I?")]
    assert on_rows(farm, "SELECT count(*) FROM corral.turns") == "1"
    assert "I am" not in (farm.folder / "logs" / "litellm.log").read_text()


def json_of(farm: Farm, key: str) -> list[dict[str, Any]]:
    with farm.new_client(key) as client:
        found: list[dict[str, Any]] = client.get("/v1/sessions").json()["data"]
        return found


@in_slots
@keeps_conversations
def test_a_session_is_cut_to_what_a_real_model_takes(farm: Farm) -> None:
    """A longer request than the context would be answered by the pool `long`, and the header would say so."""
    with chatting(farm) as client:
        sizes = []
        for turn in range(8):
            text = f"turn {turn}: {'tell me more about bridges ' * (turn % 3)}"
            raw = client.chat.completions.with_raw_response.create(
                model="short", messages=[{"role": "user", "content": text}], max_tokens=24,
                extra_body={"session_id": "cut"},
            )  # fmt: skip
            assert raw.headers["x-corral-pool"] == "short"
            usage = raw.parse().usage
            assert usage
            sizes.append(usage.prompt_tokens)
    assert max(sizes) + 24 <= SHORT_CONTEXT
    assert max(sizes) > SHORT_CONTEXT / 3, "as much of it as fits"
    assert of_session(farm, farm.key, "cut").json()["turns"] == len(sizes)
    assert int(on_rows(farm, "SELECT sum(tokens) FROM corral.turns WHERE session = 'cut'")) > SHORT_CONTEXT


# --- a budget that is used up (the last test: afterwards the last resort is out)


def is_out(farm: Farm) -> bool:
    return not farm.ask("last").is_success


@in_slots
def test_a_budget_that_is_used_up_takes_the_last_resort_out(farm: Farm) -> None:
    wait_until(lambda: is_out(farm), 30, "the budget is used up")
    spent = farm.fakes.arrivals(CHAIN)["last-1"] * DOLLARS_PER_ANSWER
    assert spent <= BUDGET_USD + 2 * DOLLARS_PER_ANSWER, "counted in time"
    refused = farm.ask("last")
    assert refused.status_code == 429
    assert refused.json()["error"]["message"] == "the budget of this pool is spent"
    assert (refused.json()["error"]["code"], refused.headers.get("retry-after")) == ("insufficient_quota", None)
    farm.fakes.reset()
    with farm.fakes.behaving(["front-1", "second-1"], "error"):
        assert not farm.ask("front").is_success
    assert farm.fakes.arrivals(CHAIN)["last-1"] == 0
    if farm.extras.has_cache:
        for program in ("valkey", "litellm"):
            farm.restart(program)
        assert farm.ask("last").status_code == 429, "and stays out after a restart of both"
