# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/corral_limits.py, then run: ./generate.py render

"""LiteLLM callback: limits a request, for every route and every spelling of a field.

The limits are in `limits.yaml` beside this file, by pool. For requests from the entrance HAProxy adds further limits in
a header; the smaller one applies. Everything that a client sends counts as text, except images and files, which are
bounded only by the size of the whole request.

LiteLLM loads this file from beside its `config.yaml`, after the callback that chooses the pool.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger

# Set by HAProxy for requests from the entrance, such as `messages=100 message_kib=32 tokens=1024`.
GUARD_HEADER = "x-corral-guard"
BAD_REQUEST, TOO_LARGE = 400, 413
# Fields that limit an answer; clients also use those of other interfaces.
OUTPUT_NAMES = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
# The field of each interface that answers with text.
OUTPUT_NAME_OF = {
    "completion": "max_tokens", "acompletion": "max_tokens", "text_completion": "max_tokens",
    "atext_completion": "max_tokens", "anthropic_messages": "max_tokens", "aanthropic_messages": "max_tokens",
    "responses": "max_output_tokens", "aresponses": "max_output_tokens",
}  # fmt: skip
CHOICE_NAMES = ("n", "best_of", "n_cmpl")
# Fields whose items are messages, texts or documents.
LISTS = ("messages", "input", "prompt", "documents", "texts")
# Fields that are each one more text of the prompt.
FURTHER_TEXTS = ("system", "instructions", "tools", "functions", "query")
# Types of content, and of its source, that are not text.
MEDIA = frozenset(
    {"audio", "base64", "document", "file", "image", "image_url", "input_audio", "input_file", "input_image", "url"}
    | {"video_url"}
)
MEDIA_FIELDS = ("data", "file_data", "image_url", "video_url", "url")
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)
BASE64 = re.compile(r"[A-Za-z0-9+/=_\-\s]*", re.ASCII)
KIB = 1024


class CorralLimits(CustomLogger):
    """LiteLLM hooks that limit requests; one instance serves every request of a worker."""

    def __init__(self, pools: Mapping[str, Mapping[str, int]]) -> None:
        super().__init__()
        self._pools = pools

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request with the limits that it did not set itself.

        Raises:
            HTTPException: 413 for too much text, 400 for a bound that is no number or is too high to be met.
        """
        bound_request(data, call_type, smaller(self._limits_of(data.get("model")), entrance_limits(data)))
        return data

    def _limits_of(self, model: object) -> Mapping[str, int]:
        from litellm.proxy import proxy_server

        router = proxy_server.llm_router
        aliases: Mapping[str, Any] = (router and router.model_group_alias) or {}
        found = aliases.get(str(model), model)
        pool = found.get("model") if isinstance(found, Mapping) else found
        return self._pools.get(str(pool), {})


def entrance_limits(data: Mapping[str, Any]) -> dict[str, int]:
    """The limits that HAProxy sets for its entrance; empty for other requests."""
    request = data.get("proxy_server_request")
    headers = request.get("headers") if isinstance(request, Mapping) else None
    found = {str(name).lower(): str(value) for name, value in (headers or {}).items()}
    pairs = (part.partition("=") for part in found.get(GUARD_HEADER, "").split())
    return {name: int(limit) for name, _, limit in pairs if limit.isdecimal()}


def smaller(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The smaller one of every limit."""
    return {name: min(limits[name] for limits in (one, other) if name in limits) for name in {*one, *other}}


def bound_request(data: dict[str, Any], call_type: str, limits: Mapping[str, int]) -> None:
    """Applies limits to one request: `messages`, `message_kib`, `text_kib`, `tokens`, `default_tokens`, `choices`.

    Args:
        data: the request; bounds that are missing are set.
        call_type: LiteLLM's name of the interface.
        limits: by name; what is not named has no limit.

    Raises:
        HTTPException: 413 or 400, with the limit.
    """
    _bound_text(data, limits)
    _bound_output(data, OUTPUT_NAME_OF.get(call_type, ""), limits)
    _bound_choices(data, limits)


def _bound_text(data: Mapping[str, Any], limits: Mapping[str, int]) -> None:
    if not {"messages", "message_kib", "text_kib"} & set(limits):
        return
    pieces = list(_pieces(data))
    if (count := len(pieces)) > limits.get("messages", count):
        raise HTTPException(TOO_LARGE, f"a request may have {limits['messages']} messages; this one has {count}")
    further = [text_bytes(data[name]) for name in FURTHER_TEXTS if data.get(name)]
    sizes = [*map(text_bytes, pieces), *further]
    if (longest := max(sizes, default=0)) > limits.get("message_kib", longest) * KIB:
        raise HTTPException(TOO_LARGE, f"the text of a message may have {limits['message_kib']} KiB")
    if (total := sum(sizes)) > limits.get("text_kib", total) * KIB:
        raise HTTPException(TOO_LARGE, f"the text of a request may have {limits['text_kib']} KiB")


def _pieces(data: Mapping[str, Any]) -> Iterator[object]:
    for name in LISTS:
        value = data.get(name)
        if isinstance(value, list) and not all(isinstance(item, int) for item in value):
            yield from value
        elif value:
            yield value


def text_bytes(value: object) -> int:
    """Bytes of all text in a JSON value, without the contents of images and files."""
    total = 0
    rest: list[tuple[object, bool]] = [(value, False)]
    while rest:
        item, is_media = rest.pop()
        if isinstance(item, str):
            total += len(item.encode(errors="replace"))
        elif isinstance(item, Mapping):
            is_media = item["type"] in MEDIA if isinstance(item.get("type"), str) else is_media
            total += sum(len(str(name)) for name in item)
            rest += ((part, is_media) for name, part in item.items() if not (is_media and _is_file(name, part)))
        elif isinstance(item, list):
            rest += ((part, is_media) for part in item)
        elif item is not None:
            total += len(str(item))
    return total


def _is_file(name: object, value: object) -> bool:
    """Whether a field of an image or file is its content: base64, a data URL, or an address."""
    if name not in MEDIA_FIELDS or not isinstance(value, str):
        return False
    start = DATA_URL.match(value)
    return BASE64.fullmatch(value, start.end() if start else 0) is not None or _is_address(value)


def _is_address(value: str) -> bool:
    return value.startswith(("http://", "https://")) and len(value) <= 8 * KIB and " " not in value


def _bound_output(data: dict[str, Any], own_name: str, limits: Mapping[str, int]) -> None:
    given = [_whole(name, data[name], 0) for name in OUTPUT_NAMES if data.get(name) is not None]
    if not own_name:
        return
    most = limits.get("tokens")
    wanted = min(given) if given else limits.get("default_tokens", most)
    keeps = own_name == "max_tokens" and data.get("max_completion_tokens") is not None
    for name in OUTPUT_NAMES:
        data.pop(name, None)
    if wanted is not None:
        data["max_completion_tokens" if keeps else own_name] = wanted if most is None else min(wanted, most)


def _bound_choices(data: Mapping[str, Any], limits: Mapping[str, int]) -> None:
    for name in CHOICE_NAMES:
        if data.get(name) is None:
            continue
        count = _whole(name, data[name], 1)
        if count > limits.get("choices", count):
            raise HTTPException(
                BAD_REQUEST, f"{name}: a request may have {limits['choices']} answers; send it again instead"
            )


def _whole(name: str, value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise HTTPException(BAD_REQUEST, f"{name} must be a whole number from {least}; leave it out for the pool's own")
    return value


def _settings() -> Mapping[str, Mapping[str, int]]:
    """The settings beside this file; empty outside a rendered site."""
    path = Path(__file__).with_name("limits.yaml")
    if not path.is_file():
        return {}
    settings: Mapping[str, Mapping[str, int]] = (yaml.safe_load(path.read_text(encoding="utf-8")) or {})["pools"]
    return settings


corral_limits = CorralLimits(_settings())
