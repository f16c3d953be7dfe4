# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/corral_interfaces.py, then run: ./generate.py render

"""LiteLLM callback: corrects LiteLLM's translation between interfaces.

LiteLLM loads this file from beside its `config.yaml`, on every site:

- `/v1/responses`: refuses requests that refer to a stored answer. The gateway stores none, and LiteLLM would silently
  send the rest of the request.
- `/v1/messages`: includes thinking in a plain answer only on request. Unsigned thinking gets an empty signature, as in
  streams; LiteLLM would write null.
- `/v1/completions`: adds `text` to every chunk of a stream; LiteLLM omits it in the last ones.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy._types import ProxyException

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
REMEDY = "This gateway keeps no answers: send the whole input with every request, and `store: false`."


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
        """Leaves the request unchanged; raises Refusal for one of `/v1/responses` that refers to a stored answer."""
        if call_type in ASKED_AGAIN:
            raise Refusal(f"There is no such response. {REMEDY}", "response_not_found", "response_id", NOT_FOUND)
        if "responses" in call_type:
            refuse_state(data)

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: object, response: Any
    ) -> None:
        """Fills what is missing in a plain answer."""
        if isinstance(response, dict):
            _mend_thoughts(response, data.get("thinking"))
        else:
            _fill_texts(response)

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: object, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Returns the stream itself unless it is of `/v1/completions`, so that others have no cost per chunk."""
        return _filled(response) if "prompt" in request_data else response


def refuse_state(data: Mapping[str, Any]) -> None:
    """Raises Refusal if a request refers to a stored response, item, conversation or prompt."""
    for name, code in STATE.items():
        if data.get(name):
            raise Refusal(f"`{name}` is not supported. {REMEDY}", code, name)
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


async def _filled(response: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for chunk in response:
        _fill_texts(chunk)
        yield chunk


def _fill_texts(answer: Any) -> None:
    """Adds `text` to every choice of a legacy completion or of its chunk."""
    if getattr(answer, "object", None) != "text_completion":
        return
    for choice in answer.choices:
        if choice.text is None:
            choice.text = ""


corral_interfaces = CorralInterfaces()
