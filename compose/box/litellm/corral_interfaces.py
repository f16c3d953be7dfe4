# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/corral_interfaces.py, then run: ./generate.py render

"""LiteLLM callback: corrects LiteLLM's translation between interfaces.

LiteLLM loads this file from beside its `config.yaml`, on every site:

- `/v1/responses`: refuses requests that refer to a stored answer, unless corral_conversations has put it in. LiteLLM
  would silently send the rest of the request. Gives thinking and the events of a stream the documented fields, which
  LiteLLM omits.
- `session_id` in a body: refused where corral_sessions has not taken it.
- `/v1/messages`: includes thinking in a plain answer only on request. Unsigned thinking gets an empty signature, as in
  streams; LiteLLM would write null. Names the stop sequence that the server names, also at the end of a stream.
- Both become chat requests that strict chat templates accept: one system text in front, and no two messages of the user
  in a row.
- `/v1/completions`: adds `text` to every chunk of a stream; LiteLLM omits it in the last ones, and writes a usage of 0.
- The chunk with the usage has no choices, in chats as well.
- `/v1/embeddings`: decodes the token numbers that clients send for OpenAI's names; the farm's models have other tokens.
  Refuses `dimensions` if the server has ignored it.

It is the last callback, so that it numbers events which another one adds.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import litellm
from litellm.integrations.custom_logger import CustomLogger
from litellm.litellm_core_utils.prompt_templates.mid_conversation_system import (
    message_field,
    parts_of,
    place_mid_conversation_system,
    split_leading_system_run,
)
from litellm.proxy._types import ProxyException
from litellm.types.llms.base import BaseLiteLLMOpenAIResponseObject

BAD_REQUEST = 400
NOT_FOUND = 404
# Calls that refer to a stored answer.
ASKED_AGAIN = frozenset({"aget_responses", "adelete_responses", "alist_input_items", "acancel_responses"})
# Parameters of a new answer that refer to stored objects, and OpenAI's error code for each.
STATE = {
    "previous_response_id": "previous_response_not_found",
    "conversation": "unsupported_parameter",
    "prompt": "unsupported_parameter",
}
# LiteLLM's names of calls whose `session_id` would be ignored, and so what it stands for.
NAMES_SESSIONS = frozenset(
    {"acompletion", "completion", "atext_completion", "text_completion", "anthropic_messages", "aresponses"}
)
# LiteLLM's names of the calls of which it makes a chat request, and of that request.
TRANSLATED = frozenset({"aresponses", "anthropic_messages"})
CHAT = "acompletion"
BETWEEN_TEXTS = "\n\n"
# Fields of a response's usage that have to be there.
TOKEN_DETAILS = {
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}
# How OpenAI's names of embedding models begin; clients encode text for them with OpenAI's tokenizer.
OPENAI_EMBEDDER = "text-embedding-"
# A name for which LiteLLM uses the same tokenizer.
OPENAI_TOKENS = "gpt-4"
BYTES_PER_NUMBER = 4
# Fields in which servers name the stop sequence that ended an answer: vLLM, SGLang.
STOPPED_BY = ("stop_reason", "matched_stop")
# How the event begins that ends a streamed message.
MESSAGE_DELTA = b"event: message_delta\n"
# What the hooks of one request tell each other: `is_own` (see there), `stopped_by` (stop sequences that servers named),
# `kind` (LiteLLM's name of the call).
_call: ContextVar[dict[str, Any] | None] = ContextVar("corral_translated_call", default=None)
REMEDY = "Nothing is kept here for this key: send the whole input with every request, and `store: false`."


class Refusal(ProxyException):
    """An error in OpenAI's format whose `code` is a name; LiteLLM's own errors have the status there."""

    def __init__(self, message: str, code: str, param: str | None, status: int = BAD_REQUEST) -> None:
        super().__init__(message, "invalid_request_error", param, status, openai_code=code)

    def to_dict(self) -> dict[str, Any]:
        """The object below `error`."""
        return {**super().to_dict(), "code": self.openai_code}


class CorralInterfaces(CustomLogger):
    """LiteLLM hooks for the translated interfaces; one instance serves every request of a worker."""

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> None:
        """Decodes token numbers to embed; raises Refusal for a response that refers to a stored answer."""
        _call.set({"kind": call_type})
        if call_type in ASKED_AGAIN:
            raise Refusal(f"There is no such response. {REMEDY}", "response_not_found", "response_id", NOT_FOUND)
        if "responses" in call_type:
            refuse_state(data)
        if call_type in NAMES_SESSIONS and data.get("session_id") is not None:  # corral_sessions has taken its own out
            message = "Nothing keeps sessions for this route here: send the whole conversation, and no `session_id`."
            raise Refusal(message, "unsupported_parameter", "session_id")
        if "embedding" in call_type and str(data.get("model")).startswith(OPENAI_EMBEDDER):
            _decode_input(data)

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: object) -> dict[str, Any] | None:
        """Returns the chat request that LiteLLM has made of another interface's; None for no change."""
        kind, call = getattr(call_type, "value", call_type), _call.get()
        if call is None:
            return None
        if kind in TRANSLATED:
            call["is_own"] = is_own(kwargs)
        is_changed = kind == CHAT and call.get("is_own")
        return {**kwargs, "messages": in_strict_order(kwargs["messages"])} if is_changed else None

    async def async_post_call_success_deployment_hook(
        self, request_data: dict[str, Any], response: Any, call_type: object
    ) -> None:
        """Remembers which stop sequence ended the answer to a chat request, before LiteLLM translates it."""
        call = _call.get()
        if call and getattr(response, "object", None) == "chat.completion":
            _note_stop(call, (getattr(response.choices[0], "provider_specific_fields", None) or {}).get)

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: object, response: Any
    ) -> None:
        """Fills what is missing in a plain answer."""
        kind = getattr(response, "object", None)
        if isinstance(response, dict):
            _mend_thoughts(response, data.get("thinking"))
            _name_stop(response, data.get("stop_sequences") or ())
        elif kind == "response":
            _mend_response(response, response.model)
        elif kind == "list" and data.get("dimensions"):
            _check_dimensions(response.data, data["dimensions"])
        else:
            _fill_texts(response)

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: object, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Returns the stream itself for a chat without usage, which has no cost per chunk."""
        if "input" in request_data:
            return _documented(response, request_data)
        if (_call.get() or {}).get("kind") == "anthropic_messages":
            return _with_stop(response, request_data.get("stop_sequences") or ())
        has_usage = (request_data.get("stream_options") or {}).get("include_usage")
        return _filled(response) if has_usage or "prompt" in request_data else response


def refuse_state(data: Mapping[str, Any]) -> None:
    """Raises Refusal if a request refers to a stored response, item, conversation or prompt."""
    for name, code in STATE.items():
        if data.get(name):
            raise Refusal(f"`{name}` names nothing. {REMEDY}", code, name)
    items = data.get("input")
    for index, item in enumerate(items if isinstance(items, list) else []):
        if _is_reference(item):
            message = f"`input[{index}]` refers to an item of an answer before. {REMEDY}"
            raise Refusal(message, "unsupported_parameter", f"input[{index}]")


def _is_reference(item: object) -> bool:
    """Whether an item of the input is only a reference; OpenAI allows omitting its type."""
    if not isinstance(item, Mapping):
        return False
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "id" in item and "role" not in item)


def _mend_thoughts(answer: dict[str, Any], wish: object) -> None:
    """Removes thinking from an answer if the request has no `thinking`; else adds signatures, which clients require."""
    is_asked = isinstance(wish, Mapping) and wish.get("type") != "disabled"
    blocks = answer.get("content") or []
    thoughts = [block for block in blocks if isinstance(block, dict) and block.get("type") == "thinking"]
    if thoughts and not is_asked:
        answer["content"] = [block for block in blocks if block not in thoughts]
    for block in thoughts:
        block["signature"] = block.get("signature") or ""


# --- stop sequences


def _note_stop(call: dict[str, Any], field: Callable[[str], Any]) -> None:
    """Remembers which stop sequence a server names as the end of an answer."""
    call["stopped_by"] = [named for name in STOPPED_BY if (named := field(name))]


def _name_stop(answer: dict[str, Any], sequences: Iterable[str]) -> None:
    """Names the stop sequence if the server has named one of the request's."""
    found = [name for name in (_call.get() or {}).get("stopped_by", ()) if name in sequences]
    if found:
        answer |= {"stop_reason": "stop_sequence", "stop_sequence": found[0]}


async def _with_stop(response: AsyncIterator[Any], sequences: Iterable[str]) -> AsyncIterator[Any]:
    """The events of a streamed message; its end names the stop sequence, as that of a plain one."""
    async for event in response:
        yield _mended_end(event, sequences) if isinstance(event, bytes) and event.startswith(MESSAGE_DELTA) else event


def _mended_end(event: bytes, sequences: Iterable[str]) -> bytes:
    head, mark, data = event.partition(b"data: ")
    told = json.loads(data)
    told["delta"].setdefault("stop_sequence", None)
    _name_stop(told["delta"], sequences)
    return head + mark + json.dumps(told).encode() + b"\n\n"


def _noting_stops(create: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """LiteLLM's conversion of a server's chunk, which loses the name of the stop sequence."""

    def chunk_creator(self: Any, chunk: Any) -> Any:
        call = _call.get()
        choices = getattr(chunk, "choices", None)
        if call and choices and choices[0].finish_reason:
            _note_stop(call, lambda name: getattr(choices[0], name, None))
        return create(self, chunk)

    return chunk_creator


# --- chat requests for strict templates


def is_own(call: Mapping[str, Any]) -> bool:
    """Whether a deployment is a server of the farm; cloud providers need the marks of their caches on each part."""
    return bool(call.get("use_chat_completions_api")) or str(call.get("model")).startswith("ollama_chat/")


def in_strict_order(messages: Iterable[Any]) -> list[Any]:
    """Returns messages that strict chat templates accept: one system text in front, then no two users in a row.

    A later system message becomes part of the user's turn: in front, it would change the beginning of the conversation,
    and the server would read all of it again.
    """
    known = [{**item, "role": "system"} if message_field(item, "role") == "developer" else item for item in messages]
    leading, rest = split_leading_system_run(known)
    system = joined(leading)
    turns = place_mid_conversation_system(rest, supports_mid_conversation_system=False)
    return [*([{"role": "system", "content": system}] if system else []), *_merged(turns)]


def _merged(messages: Iterable[Any]) -> Iterator[Any]:
    for role, run in groupby(messages, key=lambda message: message_field(message, "role")):
        turns = list(run)
        yield from turns if role != "user" or len(turns) == 1 else [{"role": "user", "content": joined(turns)}]


def joined(messages: Iterable[Any]) -> str | list[Any]:
    """Returns the content of several messages: one text if there is nothing else, else all parts."""
    contents = [message_field(message, "content") or [] for message in messages]
    parts = [
        part
        for content in contents
        for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]
    if any(message_field(part, "type") != "text" for part in parts):
        return parts
    return BETWEEN_TEXTS.join(part["text"] for part in parts if part.get("text"))


# --- responses


async def _documented(response: AsyncIterator[Any], request: Mapping[str, Any]) -> AsyncIterator[Any]:
    """The events of a stream with every field that OpenAI documents."""
    events = Events(request.get("_litellm_client_requested_model") or request.get("model"))
    async for event in response:
        for shown in events.complete(event) if hasattr(event, "type") else (event,):
            yield shown


class Events:
    """Completes the events of one stream."""

    def __init__(self, model: object) -> None:
        self._model = model
        self._number = 0
        # Thoughts that have begun, and the functions of calls, by the item's id.
        self._thoughts: set[str] = set()
        self._functions: dict[str, str] = {}

    def complete(self, event: Any) -> Iterator[Any]:
        """The event with all of its fields, after the one that LiteLLM does not send before a thought."""
        if event.type == "response.reasoning_summary_text.delta" and event.item_id not in self._thoughts:
            self._thoughts.add(event.item_id)
            part, kind = {"type": "summary_text", "text": ""}, "response.reasoning_summary_part.added"
            place = {"item_id": event.item_id, "output_index": event.output_index}
            yield from self.complete(BaseLiteLLMOpenAIResponseObject(type=kind, part=part, **place))
        self._fill(event)
        event.sequence_number = self._number
        self._number += 1
        yield event

    def _fill(self, event: Any) -> None:
        if "reasoning_summary" in event.type:
            event.summary_index = 0
        elif event.type in ("response.output_text.delta", "response.output_text.done"):
            event.logprobs = getattr(event, "logprobs", None) or []
        elif event.type == "response.function_call_arguments.done":
            event.name = self._functions.get(event.item_id, "")
        elif item := getattr(event, "item", None):
            self._functions[str(message_field(item, "id"))] = str(message_field(item, "name"))
            event.item = _mended_item(item)
        elif answer := getattr(event, "response", None):
            _mend_response(answer, self._model)


def _mend_response(answer: Any, model: object) -> None:
    answer.model = model
    answer.output = [_mended_item(item) for item in answer.output]
    for name, none in TOKEN_DETAILS.items() if answer.usage else ():
        setattr(answer.usage, name, none | _fields(getattr(answer.usage, name)))


def _mended_item(item: Any) -> Any:
    """An item of a response; a thought is a summary, where LiteLLM gives it the shape of a message."""
    if message_field(item, "type") != "reasoning":
        return item
    known = _fields(item)
    texts = [part["text"] for part in known.get("content") or [] if part.get("type") == "output_text"]
    summary = known.get("summary") or [{"type": "summary_text", "text": text} for text in texts]
    left = {name: value for name, value in known.items() if name not in ("content", "phase", "role")}
    return left | {"summary": summary}


def _fields(item: Any) -> dict[str, Any]:
    """The fields of an object of LiteLLM's that have a value; none of None."""
    known = item if isinstance(item, Mapping) else item.model_dump() if item else {}
    return {name: value for name, value in known.items() if value is not None}


# --- chats and legacy completions


async def _filled(response: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The chunks of a chat or of a legacy completion; the one with the usage has no choices."""
    async for chunk in response:
        _fill_texts(chunk)
        is_last = getattr(chunk, "usage", None) and not any(map(_says, chunk.choices))
        yield chunk.model_copy(update={"choices": []}) if is_last else chunk


def _says(choice: Any) -> bool:
    delta = getattr(choice, "delta", None)
    said = choice.text if delta is None else delta.model_dump(exclude_none=True)
    return bool(choice.finish_reason or said)


def _fill_texts(answer: Any) -> None:
    """Adds `text` to every choice of a legacy completion or of its chunk; only the last chunk has a usage."""
    if getattr(answer, "object", None) != "text_completion":
        return
    for choice in answer.choices:
        if choice.text is None:
            choice.text = ""
    if (usage := getattr(answer, "usage", None)) and not usage.total_tokens:
        answer.usage = None


# --- embeddings


def _decode_input(data: dict[str, Any]) -> None:
    """Turns token numbers of OpenAI's tokenizer into text; raises Refusal if there is no such token."""
    given = data.get("input")
    if not isinstance(given, list) or not given:
        return
    texts = [given] if isinstance(given[0], int) else given
    try:
        data["input"] = [_decoded(text) if isinstance(text, list) else text for text in texts]
    except (KeyError, OverflowError, TypeError):
        message = "`input` has numbers that are no tokens of OpenAI's tokenizer. Send text."
        raise Refusal(message, "invalid_value", "input") from None


def _decoded(tokens: list[int]) -> str:
    return str(litellm.decode(model=OPENAI_TOKENS, tokens=tokens))


def _check_dimensions(items: list[Any], wanted: object) -> None:
    """Raises Refusal if vectors have another length: cutting is right only for models that are trained for it."""
    vector = message_field(items[0], "embedding") if items else None
    found = len(b64decode(vector)) // BYTES_PER_NUMBER if isinstance(vector, str) else len(parts_of(vector))
    if found and found != wanted:
        message = f"The server of this model ignores `dimensions`: its vectors have {found} numbers. Leave it out."
        raise Refusal(message, "unsupported_parameter", "dimensions")


litellm.CustomStreamWrapper.chunk_creator = _noting_stops(litellm.CustomStreamWrapper.chunk_creator)
corral_interfaces = CorralInterfaces()
