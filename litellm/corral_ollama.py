"""LiteLLM's client for Ollama's `/api/chat`, extended for InferrLM's dialect of it.

LiteLLM's own parser looks for `<think>` in each chunk of a stream separately, so a split tag turns the rest of the
answer into thinking; and it fails on InferrLM, whose text is in `response` instead of `message.content`. This one does
not change the text: corral_thinking removes thinking. Everything else is LiteLLM's code.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with such a node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import httpx
import litellm
from litellm.integrations.custom_logger import CustomLogger
from litellm.litellm_core_utils.core_helpers import process_response_headers
from litellm.llms.ollama.chat.transformation import OllamaChatCompletionResponseIterator, OllamaChatConfig
from litellm.llms.ollama.common_utils import OllamaError
from litellm.types.utils import ModelResponseStream

BROKEN = 500
# InferrLM's names of Ollama's options.
INFERRLM_NAMES = {"num_predict": "max_tokens"}


class CorralOllamaChat(OllamaChatConfig):
    """LiteLLM's Ollama protocol with answers of both dialects and unchanged texts."""

    def transform_request(self, *args: Any, **arguments: Any) -> dict[str, Any]:
        """Returns Ollama's request, with the options also under InferrLM's names, which Ollama ignores."""
        request: dict[str, Any] = super().transform_request(*args, **arguments)
        options = request["options"]
        dialect = options.pop("dialect", "ollama")
        if dialect == "inferrlm":
            request["options"] = {INFERRLM_NAMES.get(name, name): value for name, value in options.items()}
        return request

    def transform_response(self, model: str, raw_response: httpx.Response, *args: Any, **arguments: Any) -> Any:
        """Returns LiteLLM's answer with the node's headers; separated thinking is in `reasoning_content`."""
        answer = ollama_form(raw_response.json())
        answer["message"].setdefault("thinking", None)  # without this key LiteLLM searches the text for thinking
        normal = httpx.Response(raw_response.status_code, headers={}, content=json.dumps(answer).encode())
        response = super().transform_response(model, normal, *args, **arguments)
        response._hidden_params["additional_headers"] = process_response_headers(raw_response.headers)  # noqa: SLF001
        return response

    def get_model_response_iterator(self, *args: Any, **arguments: Any) -> OllamaChatCompletionResponseIterator:
        """Returns the reader of a stream of JSON lines."""
        return Lines(*args, **arguments)


class Lines(OllamaChatCompletionResponseIterator):
    """Reads a stream of JSON lines; LiteLLM would give each of them an id of its own."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self._id = f"chatcmpl-{uuid4()}"

    def chunk_parser(self, chunk: dict[str, Any]) -> ModelResponseStream:
        """Returns one line as a chunk of the answer; raises OllamaError if the node reports a failure."""
        line = ollama_form(chunk)
        text = line["message"].pop("content", None)
        piece = super().chunk_parser(line)
        piece.id, piece.choices[0].delta.content = self._id, text
        return piece


def ollama_form(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, or one line of it, with its text in `message.content`, for both dialects."""
    if answer.get("error"):
        raise OllamaError(status_code=BROKEN, message=str(answer["error"]), headers={})
    message = dict(answer.get("message") or {"role": "assistant", "content": answer.get("response", "")})
    return {"model": "", **answer, "message": message, "done": bool(answer.get("done"))}


litellm.OllamaChatConfig = CorralOllamaChat  # type: ignore[misc, assignment]

# LiteLLM requires a callback in this file; this one does nothing.
corral_ollama = CustomLogger()
