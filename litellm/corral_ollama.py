"""How LiteLLM reads Ollama's protocol on a corral site: `/api/chat` of Ollama, and of InferrLM, which is nearly that.

LiteLLM's own reader looks for `<think>` in each piece of a stream by itself, so that a tag cut in two turns the rest of
the answer into thoughts; and it fails on InferrLM, whose text stands in `response` instead of `message.content`. This
one leaves the text as it is: taking thoughts out is corral_thinking's work. All else is LiteLLM's.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with such a node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import litellm
from litellm.integrations.custom_logger import CustomLogger
from litellm.litellm_core_utils.core_helpers import process_response_headers
from litellm.llms.ollama.chat.transformation import OllamaChatCompletionResponseIterator, OllamaChatConfig
from litellm.llms.ollama.common_utils import OllamaError
from litellm.types.utils import ModelResponseStream

BROKEN = 500
# Options that InferrLM calls otherwise than Ollama; it knows these names only.
INFERRLM_NAMES = {"num_predict": "max_tokens"}


class CorralOllamaChat(OllamaChatConfig):
    """LiteLLM's Ollama protocol with answers of both dialects, and the text of each as it was sent."""

    def transform_request(self, *args: Any, **arguments: Any) -> dict[str, Any]:
        """Returns Ollama's request, with the options under InferrLM's names as well; Ollama ignores those."""
        request: dict[str, Any] = super().transform_request(*args, **arguments)
        options = request["options"]
        dialect = options.pop("dialect", "ollama")
        if dialect == "inferrlm":
            request["options"] = {INFERRLM_NAMES.get(name, name): value for name, value in options.items()}
        return request

    def transform_response(self, model: str, raw_response: httpx.Response, *args: Any, **arguments: Any) -> Any:
        """Returns LiteLLM's answer with the node's headers; what it separated is in `reasoning_content`."""
        answer = ollama_form(raw_response.json())
        answer["message"].setdefault("thinking", None)  # LiteLLM looks for thoughts in the text only without this key
        normal = httpx.Response(raw_response.status_code, headers={}, content=json.dumps(answer).encode())
        response = super().transform_response(model, normal, *args, **arguments)
        response._hidden_params["additional_headers"] = process_response_headers(raw_response.headers)  # noqa: SLF001
        return response

    def get_model_response_iterator(self, *args: Any, **arguments: Any) -> OllamaChatCompletionResponseIterator:
        """Returns the reader of a stream of JSON lines."""
        return Lines(*args, **arguments)


class Lines(OllamaChatCompletionResponseIterator):
    """Reads a stream of JSON lines."""

    def chunk_parser(self, chunk: dict[str, Any]) -> ModelResponseStream:
        """Returns one line as a piece of the answer; OllamaError where the node says that it failed midway."""
        line = ollama_form(chunk)
        text = line["message"].pop("content", None)
        piece = super().chunk_parser(line)
        piece.choices[0].delta.content = text
        return piece


def ollama_form(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, or one line of it, with its text in `message.content`, whichever dialect it is in."""
    if answer.get("error"):
        raise OllamaError(status_code=BROKEN, message=str(answer["error"]), headers={})
    message = dict(answer.get("message") or {"role": "assistant", "content": answer.get("response", "")})
    return {"model": "", **answer, "message": message, "done": bool(answer.get("done"))}


litellm.OllamaChatConfig = CorralOllamaChat  # type: ignore[misc, assignment]

# What LiteLLM wants to find in a file that it loads as a callback; it does nothing.
corral_ollama = CustomLogger()
