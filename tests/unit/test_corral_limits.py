"""What the gateway's callback makes of one request's bounds, in every spelling."""

from __future__ import annotations

import base64
from types import ModuleType
from typing import Any

import pytest
from fastapi import HTTPException

from tests.callbacks import load_callback

LIMITS = {"messages": 3, "message_kib": 1, "text_kib": 2, "tokens": 64, "default_tokens": 32, "choices": 1}
PICTURE = "data:image/png;base64," + base64.b64encode(bytes(2_000_000)).decode()


@pytest.fixture(scope="module")
def callback() -> ModuleType:
    return load_callback("corral_limits")


def chat(*texts: object, **fields: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts], **fields}


def bounded(
    callback: ModuleType, data: dict[str, Any], call_type: str = "acompletion", **limits: int
) -> dict[str, Any]:
    callback.bound_request(data, call_type, limits or LIMITS)
    return data


def refusal(callback: ModuleType, data: dict[str, Any], call_type: str = "acompletion", **limits: int) -> int:
    with pytest.raises(HTTPException) as refused:
        callback.bound_request(data, call_type, limits or LIMITS)
    return refused.value.status_code


# --- output


@pytest.mark.parametrize(
    ("call_type", "sent", "arrives"),
    [
        ("acompletion", {}, {"max_tokens": 32}),
        ("acompletion", {"max_tokens": 10}, {"max_tokens": 10}),
        ("acompletion", {"max_tokens": 9999}, {"max_tokens": 64}),
        ("acompletion", {"max_tokens": None}, {"max_tokens": 32}),
        ("acompletion", {"max_completion_tokens": 9999}, {"max_completion_tokens": 64}),
        ("acompletion", {"max_tokens": 9999, "max_completion_tokens": 5}, {"max_completion_tokens": 5}),
        ("acompletion", {"n_predict": 9999}, {"max_tokens": 64}),
        ("acompletion", {"max_output_tokens": 9999, "n_predict": 7}, {"max_tokens": 7}),
        ("atext_completion", {"max_tokens": 9999}, {"max_tokens": 64}),
        ("anthropic_messages", {"max_tokens": 9999}, {"max_tokens": 64}),
        ("aresponses", {"max_output_tokens": 9999}, {"max_output_tokens": 64}),
        ("aresponses", {"max_tokens": 9}, {"max_output_tokens": 9}),
        ("aembedding", {}, {}),
    ],
)
def test_every_name_of_the_output_bound_is_held(
    callback: ModuleType, call_type: str, sent: dict[str, Any], arrives: dict[str, Any]
) -> None:
    data = bounded(callback, chat("a", **sent), call_type)
    assert {name: data[name] for name in callback.OUTPUT_NAMES if name in data} == arrives


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"])
@pytest.mark.parametrize("value", [-1, "9999", 5.0, True, [1], {"a": 1}])
def test_a_bound_that_is_no_whole_number_is_refused_with_and_without_limits(
    callback: ModuleType, name: str, value: object
) -> None:
    assert refusal(callback, chat("a", **{name: value})) == 400
    assert refusal(callback, chat("a", **{name: value}), unrelated=1) == 400


@pytest.mark.parametrize("name", ["n", "best_of", "n_cmpl"])
@pytest.mark.parametrize("value", [2, 50, "50", 50.0, 0, -1, True])
def test_one_request_takes_one_slot(callback: ModuleType, name: str, value: object) -> None:
    assert refusal(callback, chat("a", **{name: value})) == 400
    assert bounded(callback, chat("a", **{name: 1}))[name] == 1
    assert bounded(callback, chat("a", **{name: None}))[name] is None


def test_a_pool_may_allow_more_answers(callback: ModuleType) -> None:
    assert bounded(callback, chat("a", n=3), choices=4)["n"] == 3


# --- input

LONG = "x" * 1025
PIECES: list[tuple[str, dict[str, Any]]] = [
    ("acompletion", {"messages": [{"role": "user", "content": LONG}]}),
    ("acompletion", {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
    ("acompletion", {"messages": [{"role": "tool", "tool_call_id": "1", "content": LONG}]}),
    ("acompletion", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": LONG}}]}]}),
    ("acompletion", {"messages": [], "tools": [{"type": "function", "function": {"description": LONG}}]}),
    ("acompletion", {"messages": [{"content": [{"type": "image_url", "image_url": {"url": LONG + "!"}}]}]}),
    ("acompletion", {"messages": [{"content": [{"type": "image_url", "text": LONG}]}]}),
    ("atext_completion", {"prompt": LONG}),
    ("atext_completion", {"prompt": ["a", LONG]}),
    ("aresponses", {"input": LONG}),
    ("aresponses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}]}),
    ("aresponses", {"input": "a", "instructions": LONG}),
    ("anthropic_messages", {"messages": [], "system": LONG}),
    ("anthropic_messages", {"messages": [], "system": [{"type": "text", "text": LONG}]}),
    ("anthropic_messages", {"messages": [{"role": "user", "content": [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": LONG}}]}]}),
    ("aembedding", {"input": ["a", LONG]}),
    ("arerank", {"query": LONG, "documents": ["a"]}),
    ("arerank", {"query": "a", "documents": [{"text": LONG}]}),
    ("aimage_generation", {"prompt": LONG}),
]  # fmt: skip


@pytest.mark.parametrize(("call_type", "body"), PIECES, ids=range(len(PIECES)))
def test_everything_that_becomes_prompt_is_counted(callback: ModuleType, call_type: str, body: dict[str, Any]) -> None:
    assert refusal(callback, dict(body), call_type) == 413
    bounded(callback, dict(body), call_type, message_kib=2, text_kib=4)
    assert refusal(callback, dict(body), call_type, text_kib=1) == 413


@pytest.mark.parametrize(
    "body",
    [
        chat(*"abcd"),
        {"prompt": list("abcd")},
        {"input": list("abcd")},
        {"documents": list("abcd"), "query": "x"},
        chat(*[""] * 4),
    ],
)
def test_there_are_only_so_many_pieces(callback: ModuleType, body: dict[str, Any]) -> None:
    assert refusal(callback, body) == 413
    bounded(callback, dict(body), messages=4)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
        {"type": "image_url", "image_url": PICTURE},
        {"type": "input_image", "image_url": PICTURE},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE.partition(",")[2]}},
        {"type": "input_audio", "input_audio": {"data": PICTURE.partition(",")[2], "format": "wav"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": PICTURE.replace("image/png", "application/pdf")}},
        {"type": "image_url", "image_url": {"url": "https://pictures.example.com/a.png"}},
    ],
    ids=lambda part: part["type"],
)
def test_pictures_and_files_are_not_text(callback: ModuleType, part: dict[str, Any]) -> None:
    bounded(callback, chat([{"type": "text", "text": "what is it"}, part]))


def test_an_agents_long_conversation_passes_the_entrances_own_limits(callback: ModuleType) -> None:
    """A system prompt of 40 KiB, 200 messages, a tool's result of 1000 lines, a picture of 2 MB."""
    entrance: dict[str, Any] = {"messages": 2048, "message_kib": 1024, "choices": 1}
    lines = "\n".join(f"{number}: a line of a file that a tool has read" for number in range(1000))
    data = chat("s" * 40 * 1024, *["and then?"] * 197, lines, [{"type": "image_url", "image_url": {"url": PICTURE}}])
    bounded(callback, data, **entrance)


def test_of_pool_and_entrance_the_smaller_limit_holds(callback: ModuleType) -> None:
    headers = {"X-Corral-Guard": "messages=5 tokens=16"}
    found = callback.entrance_limits({"proxy_server_request": {"headers": headers}})
    assert found == {"messages": 5, "tokens": 16}
    assert callback.smaller(LIMITS, found) == LIMITS | {"messages": 3, "tokens": 16}
    assert callback.entrance_limits({}) == {}
