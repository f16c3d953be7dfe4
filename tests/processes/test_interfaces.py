"""The interfaces that LiteLLM translates: Anthropic's messages, OpenAI's responses and its legacy completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, Farm, in_modes, key_of
from tests.processes.interfaces import INTERFACES
from tests.tiny_models import KNOWN_ANSWER

pytestmark = in_modes("slots")

QUESTION = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "the weather of a city", "input_schema": PARAMETERS}


def anthropic(farm: Farm, model: str, **fields: object) -> httpx.Response:
    """A request as Anthropic's libraries write it: the key in a header of its own."""
    body = {"model": model, "max_tokens": 200, "messages": QUESTION} | fields
    headers = {"x-api-key": farm.key, "anthropic-version": "2023-06-01"}
    with farm.new_client() as client:
        return client.post("/v1/messages", json=body, headers=headers).raise_for_status()


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in data]


def arrived(farm: Farm) -> dict[str, Any]:
    """The body of the only request that reached a replica."""
    seen = farm.fakes.seen()
    [only] = [body for name in EVEN for body in seen[name].bodies]
    return only


# --- all of them

as_wanted = pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])


@as_wanted
@pytest.mark.parametrize("name", INTERFACES)
def test_every_interface_delivers_what_a_real_server_says(farm: Farm, name: str, *, is_streamed: bool) -> None:
    interface = INTERFACES[name]
    body = {"model": "chat", **interface.body("be brief", QUESTION, 7)}
    said = interface.ask(farm, body, is_streamed=is_streamed)
    assert (said.text, said.stop) == (KNOWN_ANSWER[: len(said.text)], interface.stops["length"])
    assert said.text.endswith(" 6")
    assert said.usage[0] > 3
    assert said.usage[1] == 7


@as_wanted
@pytest.mark.parametrize("name", ["chat", "responses", "messages"])
def test_every_interface_delivers_a_call(farm: Farm, name: str, *, is_streamed: bool) -> None:
    interface = INTERFACES[name]
    assert interface.tool is not None
    body = {"model": "even", **interface.body("be brief", QUESTION, 7), **interface.tool("weather", PARAMETERS)}
    said = interface.ask(farm, body, is_streamed=is_streamed)
    assert (said.calls, said.stop) == ([("weather", {"city": "Paris"})], interface.stops["tool_calls"])
    assert arrived(farm)["tools"][0]["function"]["parameters"] == PARAMETERS


@pytest.mark.parametrize("name", ["responses", "messages"])
def test_turns_return_to_the_replica_that_has_read_them(farm: Farm, name: str) -> None:
    interface, opening = INTERFACES[name], f"a conversation by {name}"
    turns = [{"role": "user", "content": opening}]
    for turn in range(5):
        body = {"model": "even", **interface.body("be brief", turns, 7)}
        farm.client.post(interface.path, json=body).raise_for_status()
        turns = [*turns, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
        for _other in range(turn):  # now fewer, now more, so that no turn comes back to its replica by chance
            farm.ask("even").raise_for_status()
    seen = farm.fakes.seen()
    assert len([name for name in EVEN if opening in str(seen[name].bodies)]) == 1


def test_conversations_with_one_opening_are_told_apart_by_their_key(farm: Farm) -> None:
    """Codex opens all of them in a folder alike."""
    body = {"model": "even", "input": QUESTION}
    keyed = [body | {"prompt_cache_key": f"talk-{number}"} for number in range(12)]
    replicas = [farm.replica(farm.client.post("/v1/responses", json=each).raise_for_status()) for each in keyed]
    assert set(replicas) == set(EVEN)
    again = [farm.replica(farm.client.post("/v1/responses", json=each).raise_for_status()) for each in keyed[::-1]]
    assert again == replicas[::-1]


# --- Anthropic's messages


def test_a_plain_message_carries_its_text(farm: Farm) -> None:
    answer = anthropic(farm, "even").json()
    [block] = answer["content"]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "even")
    assert (block["type"], block["text"].rpartition("-")[0]) == ("text", "answer of even")
    assert (answer["stop_reason"], answer["usage"]) == ("end_turn", {"input_tokens": 3, "output_tokens": 3})


def test_a_streamed_message_has_the_same_end(farm: Farm) -> None:
    events = events_of(anthropic(farm, "even", stream=True))
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(texts) == "piece0 piece1 piece2 piece3 piece4 piece5 "
    [end] = [event for event in events if event["type"] == "message_delta"]
    assert end["delta"]["stop_reason"] == "end_turn"
    assert end["usage"]["output_tokens"] > 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_a_message_asks_for_reaches_the_server(farm: Farm, *, is_streamed: bool) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    wishes = {"stop_sequences": ["###", "END"], "top_k": 5, "top_p": 0.5, "temperature": 0.25, "max_tokens": 17}
    anthropic(farm, "even", stream=is_streamed, system="be brief", thinking=thinking, **wishes)
    body = arrived(farm)
    assert body["messages"] == [{"role": "system", "content": "be brief"}, *QUESTION]
    assert body["stop"] == wishes["stop_sequences"]
    assert {name: body[name] for name in ("top_k", "top_p", "temperature", "max_tokens")} == {
        name: value for name, value in wishes.items() if name != "stop_sequences"
    }
    assert "reasoning_effort" in body


def test_a_real_server_stops_where_a_message_says(farm: Farm) -> None:
    answer = anthropic(farm, "chat", stop_sequences=[" 5"]).json()
    assert [block["text"] for block in answer["content"]] == ["Tiny: 1 2 3 4"]
    cut = anthropic(farm, "chat", max_tokens=4).json()
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 4)


def test_a_tool_is_called_and_its_result_comes_back(farm: Farm) -> None:
    insists = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}
    answer = anthropic(farm, "even", **insists).json()
    [call] = answer["content"]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert answer["stop_reason"] == "tool_use"
    events = events_of(anthropic(farm, "even", stream=True, **insists))
    pieces = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(piece["partial_json"] for piece in pieces)) == {"city": "Paris"}
    farm.fakes.reset()
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    turns = [*QUESTION, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    last = anthropic(farm, "even", messages=turns, tools=[TOOL]).json()["content"]
    assert [block["type"] for block in last] == ["text"]
    assert arrived(farm)["messages"][-1] == {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}


# --- OpenAI's responses: the gateway keeps none

# By the parameter that the error names: what a client sends, and the code that it gets.
KEPT: dict[str, tuple[dict[str, Any], str]] = {
    "previous_response_id": ({"previous_response_id": "resp_made-up"}, "previous_response_not_found"),
    "conversation": ({"conversation": "conv_made-up"}, "unsupported_parameter"),
    "prompt": ({"prompt": {"id": "pmpt_made-up"}}, "unsupported_parameter"),
    "input[1]": ({"input": [*QUESTION, {"type": "item_reference", "id": "msg_1"}]}, "unsupported_parameter"),
    "input[0]": ({"input": [{"id": "msg_1"}]}, "unsupported_parameter"),
}


def key_or_masters(farm: Farm, who: str) -> str:
    return farm.key if who == "operator" else key_of(farm, who)


def responses_of(farm: Farm, who: str) -> openai.OpenAI:
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    client = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=base, api_key=key_or_masters(farm, who), max_retries=0, http_client=client)


everybody = pytest.mark.parametrize(
    "who",
    ["operator", pytest.param("lbrxvoice", marks=pytest.mark.needs("postgres", "prisma-engine", "redis"))],
)


@everybody
@pytest.mark.parametrize("name", KEPT)
def test_a_response_that_needs_one_before_is_refused(farm: Farm, who: str, name: str) -> None:
    fields, code = KEPT[name]
    with responses_of(farm, who) as client, pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": "even", "input": "what is my name?"} | fields)
    assert (refused.value.code, refused.value.param, refused.value.type) == (code, name, "invalid_request_error")
    assert "send the whole input" in refused.value.message
    assert "store: false" in refused.value.message
    assert sum(farm.fakes.arrivals(EVEN).values()) == 0


def test_a_session_that_nothing_keeps_is_refused(farm: Farm) -> None:
    for path, body in (
        ("chat/completions", {"messages": QUESTION}), ("completions", {"prompt": "hello"}),
        ("messages", {"messages": QUESTION, "max_tokens": 5}), ("responses", {"input": "hello"}),
    ):  # fmt: skip
        refused = farm.client.post(f"/v1/{path}", json={"model": "even", "session_id": "mine", **body})
        told = refused.json()["error"]
        code = None if path == "messages" else "unsupported_parameter"  # Anthropic's errors have none
        assert (refused.status_code, told["code"]) == (400, code), path
        assert "Nothing keeps sessions" in told["message"]
    assert farm.client.get("/v1/sessions").status_code == 404
    assert sum(farm.fakes.arrivals(EVEN).values()) == 0


@everybody
def test_a_response_is_not_found_afterwards(farm: Farm, who: str) -> None:
    with responses_of(farm, who) as client:
        made = client.responses.create(model="even", input="hello", store=False)
        assert made.output_text.startswith("answer of even")
        for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError) as missing:
                ask(made.id)
            assert missing.value.type == "not_found_error"
            assert "send the whole input" in missing.value.message


def test_a_response_gets_the_whole_input(farm: Farm) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
    with responses_of(farm, "operator") as client:
        body: Any = {"model": "even", "input": turns, "previous_response_id": None, "conversation": None}
        assert client.responses.create(**body).status == "completed"
    assert [message["role"] for message in arrived(farm)["messages"]] == ["user", "assistant", "user"]


# --- legacy completions


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_every_piece_of_a_legacy_completion_has_a_text(farm: Farm, options: dict[str, Any]) -> None:
    body = {"model": "chat", "prompt": "hello", "max_tokens": 4, "stream": True} | options
    events = events_of(farm.client.post("/v1/completions", json=body).raise_for_status())
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Tiny: 1 2 3"
    assert [choice["finish_reason"] for choice in choices if choice.get("finish_reason")] == ["length"]


# --- embeddings


def test_token_numbers_for_a_name_of_openai_become_text(farm: Farm) -> None:
    """LangChain's default: the server would read the numbers as its own tokens."""
    texts = ["the cat is in the river", "Grüße"]
    numbers = [[1820, 8415, 374, 304, 279, 15140], [6600, 2448, 24352]]  # in cl100k_base
    for given, wanted in ((numbers, texts), (numbers[0], texts[:1]), (texts, texts), ("x", "x")):
        farm.fakes.reset()
        body = {"model": "text-embedding-3-small", "input": given}
        farm.client.post("/v1/embeddings", json=body).raise_for_status()
        assert farm.fakes.seen()["vectors-1"].bodies[0]["input"] == wanted
    body = {"model": "text-embedding-3-small", "input": [[2_000_000]]}
    error = farm.client.post("/v1/embeddings", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "input")
    farm.client.post("/v1/embeddings", json={"model": "vectors", "input": [[1, 2]]}).raise_for_status()
    assert farm.fakes.seen()["vectors-1"].bodies[-1]["input"] == [[1, 2]]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_dimensions_that_the_server_ignores_are_refused(farm: Farm, encoding: str) -> None:
    body = {"model": "embed", "input": "hello", "encoding_format": encoding}
    answer = farm.client.post("/v1/embeddings", json=body | {"dimensions": 4})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "dimensions")
    assert "128 numbers" in error["message"]
    assert farm.client.post("/v1/embeddings", json=body | {"dimensions": 128}).is_success
