"""Every interface of the gateway for text: how a client asks, and how it reads a plain and a streamed answer.

Answers of OpenAI's interfaces are read by OpenAI's library and checked against its types, as strictly as Vercel's does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from tests.processes.farm import Farm

Turns = list[dict[str, Any]]
Event = dict[str, Any]
EVENT_TYPES: Mapping[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}


@dataclass(frozen=True)
class Said:
    """An answer of any interface."""

    text: str
    thought: str
    # Name and arguments of every call of a function.
    calls: list[tuple[str, Any]]
    # Why it ended, in the words of the interface.
    stop: str
    # Tokens of the request and of the answer.
    usage: tuple[int, int]


@dataclass(frozen=True)
class Interface:
    """One interface: its path, and its own words for the same things."""

    path: str
    # The request: a system text, the turns, and the most tokens of the answer.
    body: Callable[[str, Turns, int], dict[str, Any]]
    plain: Callable[[dict[str, Any]], Said]
    streamed: Callable[[list[Event]], Said]
    # Its words for OpenAI's `finish_reason`.
    stops: Mapping[str, str]
    # Fields that insist on a call of a function.
    tool: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None

    def ask(self, farm: Farm, body: Mapping[str, Any], *, is_streamed: bool) -> Said:
        """The answer to a request."""
        answer = farm.client.post(self.path, json={**body, "stream": is_streamed}).raise_for_status()
        return self.streamed(events_of(answer.text)) if is_streamed else self.plain(answer.json())


def events_of(text: str) -> list[Event]:
    """The events of a stream; it must end as every interface of OpenAI's does, or with Anthropic's last event.

    Without Anthropic's `ping`, which its libraries skip, too.
    """
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert lines[-1] == "[DONE]" or events[-1]["type"] == "message_stop"
    return [event for event in events if event.get("type") != "ping"]


# --- chat


def _chat_body(system: str, turns: Turns, most: int) -> dict[str, Any]:
    options = {"stream_options": {"include_usage": True}}
    return {"messages": [{"role": "system", "content": system}, *turns], "max_tokens": most} | options


def _chat(answer: dict[str, Any]) -> Said:
    read = ChatCompletion.model_validate(answer)
    [choice] = read.choices
    assert read.object == "chat.completion"
    message = answer["choices"][0]["message"]
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    thought, text = message.get("reasoning_content") or "", message["content"] or ""
    return Said(text, thought, _calls(called), choice.finish_reason, _usage(answer, "prompt", "completion"))


def _chat_streamed(events: list[Event]) -> Said:
    for event in events:
        ChatCompletionChunk.model_validate(event)
    assert (events[-1]["choices"], len({event["id"] for event in events})) == ([], 1)
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    text = "".join(delta.get("content") or "" for delta in deltas)
    thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    functions = [call["function"] for delta in deltas for call in delta.get("tool_calls") or []]
    called = [("".join(part.get("name") or "" for part in functions), "".join(part["arguments"] for part in functions))]
    [stop] = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    return Said(text, thought, _calls(called if functions else []), stop, _usage(events[-1], "prompt", "completion"))


def _function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"tools": [function], "tool_choice": {"type": "function", "function": {"name": name}}}


# --- legacy completions


def _completion_body(_system: str, turns: Turns, most: int) -> dict[str, Any]:
    return {"prompt": turns[-1]["content"], "max_tokens": most, "stream_options": {"include_usage": True}}


def _completion(answer: dict[str, Any]) -> Said:
    [choice] = Completion.model_validate(answer).choices
    return Said(choice.text, "", [], choice.finish_reason, _usage(answer, "prompt", "completion"))


def _completion_streamed(events: list[Event]) -> Said:
    assert {event["object"] for event in events} == {"text_completion"}
    assert (events[-1]["choices"], len({event["id"] for event in events})) == ([], 1)
    choices = [choice for event in events for choice in event["choices"]]
    [stop] = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    text = "".join(choice["text"] for choice in choices)  # every one has it
    return Said(text, "", [], stop, _usage(events[-1], "prompt", "completion"))


# --- OpenAI's responses


def _responses_body(system: str, turns: Turns, most: int) -> dict[str, Any]:
    return {"instructions": system, "input": turns, "max_output_tokens": most, "store": False}


def _response(answer: dict[str, Any]) -> Said:
    read = Response.model_validate(answer)
    items = answer["output"]
    thoughts = [part["text"] for item in items if item["type"] == "reasoning" for part in item["summary"]]
    called = [(item["name"], item["arguments"]) for item in items if item["type"] == "function_call"]
    reason = (answer.get("incomplete_details") or {}).get("reason") or ""
    stop = f"{read.status} {reason}".strip()
    return Said(read.output_text, "".join(thoughts), _calls(called), stop, _usage(answer, "input", "output"))


def _response_streamed(events: list[Event]) -> Said:
    """What the deltas say; the last event has to repeat it."""
    for event in events:
        EVENT_TYPES[event["type"]].model_validate(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds.count("response.reasoning_summary_part.added") == kinds.count("response.reasoning_summary_part.done")
    said = _response(events[-1]["response"])
    text = _deltas(events, "response.output_text.delta")
    thought = _deltas(events, "response.reasoning_summary_text.delta")
    assert (text, thought) == (said.text, said.thought)
    arguments = _deltas(events, "response.function_call_arguments.delta")
    assert [json.loads(arguments)] == [call for _, call in said.calls] if arguments else not said.calls
    return said


def _deltas(events: list[Event], kind: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == kind)


def _response_function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"type": "function", "name": name, "parameters": parameters}
    return {"tools": [function], "tool_choice": {"type": "function", "name": name}}


# --- Anthropic's messages


def _messages_body(system: str, turns: Turns, most: int) -> dict[str, Any]:
    """With thinking, which a plain answer has on request only."""
    thinking = {"type": "enabled", "budget_tokens": 1024}
    return {"system": system, "messages": turns, "max_tokens": most, "thinking": thinking}


def _message(answer: dict[str, Any]) -> Said:
    assert (answer["type"], answer["role"], answer["stop_sequence"]) == ("message", "assistant", None)
    blocks = answer["content"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    thoughts = [block for block in blocks if block["type"] == "thinking"]
    assert all(isinstance(block["signature"], str) for block in thoughts)
    called = [(block["name"], json.dumps(block["input"])) for block in blocks if block["type"] == "tool_use"]
    thought = "".join(block["thinking"] for block in thoughts)
    sent, received = _usage(answer, "input", "output")
    sent += answer["usage"].get("cache_read_input_tokens", 0)  # which the server has not read again
    return Said(text, thought, _calls(called), answer["stop_reason"], (sent, received))


def _message_streamed(events: list[Event]) -> Said:
    """Builds the whole message as Anthropic's libraries do."""
    message = dict(events[0]["message"])
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({"arguments": "", **event["content_block"]})
        elif event["type"] == "content_block_delta":
            _add(blocks[event["index"]], event["delta"])
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
    for block in blocks:
        if block["arguments"]:
            block["input"] = json.loads(block["arguments"])
    kinds = [event["type"] for event in events]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(blocks)
    return _message(message | {"content": blocks})


# By the kind of a delta: what it adds to in its block, and where it has it.
DELTAS = {
    "text_delta": ("text", "text"), "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"), "input_json_delta": ("arguments", "partial_json"),
}  # fmt: skip


def _add(block: dict[str, Any], delta: dict[str, Any]) -> None:
    name, source = DELTAS[delta["type"]]
    block[name] = block.get(name, "") + delta[source]


def _message_tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"tools": [{"name": name, "input_schema": parameters}], "tool_choice": {"type": "tool", "name": name}}


def _calls(called: Iterable[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in called]


def _usage(answer: dict[str, Any], request: str, reply: str) -> tuple[int, int]:
    return answer["usage"][f"{request}_tokens"], answer["usage"][f"{reply}_tokens"]


_SAME = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
INTERFACES = {
    "chat": Interface("/v1/chat/completions", _chat_body, _chat, _chat_streamed, _SAME, _function),
    "completions": Interface("/v1/completions", _completion_body, _completion, _completion_streamed, _SAME),
    "responses": Interface(
        "/v1/responses", _responses_body, _response, _response_streamed,
        {"stop": "completed", "length": "incomplete max_output_tokens", "tool_calls": "completed"}, _response_function,
    ),
    "messages": Interface(
        "/v1/messages", _messages_body, _message, _message_streamed,
        {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}, _message_tool,
    ),
}  # fmt: skip
