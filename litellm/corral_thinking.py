"""LiteLLM callback: removes a model's thinking from its answers.

Some servers return the model's thinking in front of the answer, as `<think>…</think>`. For deployments with `thinking:
hidden` in `model_info`, this removes the tags and the text between them from plain and streamed answers. Thinking that
the server separates itself stays in `reasoning_content`. With the header `x-corral-thinking: show` a client gets the
unchanged answer.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with a server that needs it.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

HEADER = "x-corral-thinking"
SHOW = "show"
HIDDEN = "hidden"
OPENING = ("<think>", "<thinking>")
CLOSING = ("</think>", "</thinking>")
TAGS = (*OPENING, *CLOSING)
TAG = re.compile("|".join(TAGS))


class ThoughtFilter:
    """Filters the thinking out of one answer, in chunks of any size.

    Thoughts may be nested; one that is never closed reaches to the end. A closing tag without its opening one is left
    out alone. White space between thoughts and the beginning of the answer goes with them.
    """

    def __init__(self) -> None:
        self._depth = 0
        # The end of the received text, if it may be the beginning of a tag.
        self._held = ""
        self._has_spoken = False
        self._is_after_thought = False
        # The event of the last chunk, for formats that need another one for the rest.
        self.last_event: Any = None

    @property
    def is_idle(self) -> bool:
        """Whether a chunk without `<` would be returned unchanged."""
        return not (self._depth or self._held or self._is_after_thought)

    def feed(self, piece: str) -> str:
        """The part of the answer that is certain and was not returned before."""
        text, self._held = self._held + piece, ""
        said: list[str] = []
        place = 0
        while place < len(text):
            start = text.find("<", place)
            if start < 0:
                said.append(self._say(text[place:]))
                break
            said.append(self._say(text[place:start]))
            tag = next((tag for tag in TAGS if text.startswith(tag, start)), "")
            if not tag and any(tag.startswith(text[start:]) for tag in TAGS):
                self._held = text[start:]
                break
            if tag:
                self._step(tag)
            else:
                said.append(self._say("<"))
            place = start + (len(tag) or 1)
        return "".join(said)

    def finish(self) -> str:
        """The rest at the end of the answer: an incomplete tag is text."""
        held, self._held = self._held, ""
        return self._say(held)

    def _step(self, tag: str) -> None:
        if tag in OPENING:
            self._depth += 1
            return
        self._depth = max(0, self._depth - 1)
        self._is_after_thought = not self._depth and not self._has_spoken

    def _say(self, text: str) -> str:
        if self._depth:
            return ""
        if self._is_after_thought:
            text = text.lstrip()
            self._is_after_thought = not text
        self._has_spoken = self._has_spoken or bool(text.strip())
        return text


def without_thoughts(text: str) -> str:
    """A whole answer without its thinking.

    What stands before a closing tag without its opening one was a thought as well: the chat template may have opened
    it, or LiteLLM, which takes a thought at the beginning of a plain answer into `reasoning_content` up to the first
    closing tag. In a stream it is too late for that.
    """
    end = _end_of_opened(text)
    thoughts = ThoughtFilter()
    return thoughts.feed(text[end:].lstrip() if end else text) + thoughts.finish()


def _end_of_opened(text: str) -> int:
    """Where the text after the last closing tag without an opening one begins; 0 if there is none."""
    depth, end = 0, 0
    for tag in TAG.finditer(text):
        depth += 1 if tag[0] in OPENING else -1
        if depth < 0:
            depth, end = 0, tag.end()
    return end


class CorralThinking(CustomLogger):
    """LiteLLM hooks that filter answers; one instance serves every request of a worker."""

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: object, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Returns the stream itself if nothing is hidden, so that other pools have no cost per chunk."""
        return _filtered(response) if hides(request_data) else response

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: object, response: Any) -> Any:
        """Returns a plain answer without thinking, or None for no change."""
        if not hides(data):
            return None
        for owner, key in _texts(response):
            _put(owner, key, without_thoughts(_get(owner, key)))
        return response


def hides(request_data: Mapping[str, Any]) -> bool:
    """Whether the deployment hides thinking and the client did not ask for it."""
    info: object = None
    for name in ("metadata", "litellm_metadata"):
        metadata = request_data.get(name)
        if isinstance(metadata, Mapping):
            info = metadata.get("model_info") or info
    if not isinstance(info, Mapping) or info.get("thinking") != HIDDEN:
        return False
    request = request_data.get("proxy_server_request")
    headers = request.get("headers") if isinstance(request, Mapping) else None
    wish = headers.get(HEADER) if isinstance(headers, Mapping) else None
    return str(wish or "").strip().lower() != SHOW


# --- streams


async def _filtered(response: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The stream with every text filtered, in the format of the client's interface."""
    filters: defaultdict[object, ThoughtFilter] = defaultdict(ThoughtFilter)
    last = None
    async for chunk in response:
        last = chunk
        if isinstance(chunk, (bytes, str)):
            yield _filtered_frames(chunk, filters)
        elif getattr(chunk, "choices", None):
            yield _filtered_chunk(chunk, filters)
        else:
            for event in _filtered_events(chunk, filters):
                yield event
    rest = {index: text for index, thoughts in filters.items() if (text := thoughts.finish())}
    if rest and getattr(last, "choices", None):
        yield _with_texts(last, rest)


def _filtered_chunk(chunk: Any, filters: Mapping[object, ThoughtFilter]) -> Any:
    """The chunk itself if nothing changes; otherwise a copy, because LiteLLM keeps the chunk for its statistics."""
    changed: dict[object, str] = {}
    for choice in chunk.choices:
        owner, key = _owner_of_text(choice)
        text = _get(owner, key)
        thoughts = filters[choice.index]
        if thoughts.is_idle and "<" not in text:
            if text:
                thoughts.feed(text)
            continue
        said = thoughts.feed(text) + (thoughts.finish() if choice.finish_reason else "")
        if said != text:
            changed[choice.index] = said
    return _with_texts(chunk, changed) if changed else chunk


def _with_texts(chunk: Any, texts: Mapping[object, str]) -> Any:
    copy = chunk.model_copy(deep=True)
    for choice in copy.choices:
        if choice.index in texts:
            owner, key = _owner_of_text(choice)
            _put(owner, key, texts[choice.index])
    return copy


def _owner_of_text(choice: Any) -> tuple[Any, str]:
    delta = getattr(choice, "delta", None)
    return (choice, "text") if delta is None else (delta, "content")


def _filtered_frames(frames: bytes | str, filters: Mapping[object, ThoughtFilter]) -> bytes | str:
    """Server-sent events of Anthropic's format, which arrive as text."""
    text = frames.decode() if isinstance(frames, bytes) else frames
    if "content_block" not in text:
        return frames
    made = "\n\n".join(_filtered_frame(frame, filters) for frame in text.split("\n\n"))
    return made.encode() if isinstance(frames, bytes) else made


def _filtered_frame(frame: str, filters: Mapping[object, ThoughtFilter]) -> str:
    head, mark, data = frame.partition("data: ")
    event = json.loads(data) if mark and data.startswith("{") else {}
    index = event.get("index")
    if event.get("type") == "content_block_delta" and event["delta"].get("type") == "text_delta":
        event["delta"]["text"] = filters[index].feed(event["delta"]["text"])
        return f"{head}data: {json.dumps(event)}"
    if event.get("type") == "content_block_stop" and (rest := filters[index].finish()):
        delta = {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": rest}}
        return f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n{frame}"
    return frame


def _filtered_events(event: Any, filters: Mapping[object, ThoughtFilter]) -> list[Any]:
    """Events of OpenAI's responses; events at the end of a text repeat the whole text."""
    kind = _kind(event)
    thoughts = filters[_get_any(event, "output_index"), _get_any(event, "content_index")]
    if kind == "response.output_text.delta":
        thoughts.last_event = event
        _put(event, "delta", thoughts.feed(_get(event, "delta")))
        return [event]
    rest = thoughts.finish() if kind == "response.output_text.done" else ""
    for owner, key in [*_texts(event), *_texts(_get_any(event, "response"))]:
        _put(owner, key, without_thoughts(_get(owner, key)))
    if not rest:
        return [event]
    return [thoughts.last_event.model_copy(update={"delta": rest}), event]


def _kind(event: Any) -> str:
    kind = _get_any(event, "type")
    return str(getattr(kind, "value", kind))


# --- whole answers


def _texts(response: Any) -> list[tuple[Any, str]]:
    """Where the texts of a whole answer are: the owner and the key of each."""
    found: list[tuple[Any, str]] = []
    for choice in _get_any(response, "choices") or []:
        message = getattr(choice, "message", None)
        found.append((choice, "text") if message is None else (message, "content"))
    blocks = list(_get_any(response, "content") or []) if not isinstance(_get_any(response, "content"), str) else []
    for item in [*(_get_any(response, "output") or []), _get_any(response, "item")]:
        blocks += _get_any(item, "content") or []
    blocks.append(_get_any(response, "part"))
    found += [(block, "text") for block in blocks if _get_any(block, "type") in ("text", "output_text")]
    if _kind(response) == "response.output_text.done":
        found.append((response, "text"))
    return [(owner, key) for owner, key in found if _get(owner, key)]


def _get_any(owner: Any, key: str) -> Any:
    return owner.get(key) if isinstance(owner, Mapping) else getattr(owner, key, None)


def _get(owner: Any, key: str) -> str:
    value = _get_any(owner, key)
    return value if isinstance(value, str) else ""


def _put(owner: Any, key: str, text: str) -> None:
    if isinstance(owner, dict):
        owner[key] = text
    else:
        setattr(owner, key, text)


corral_thinking = CorralThinking()
