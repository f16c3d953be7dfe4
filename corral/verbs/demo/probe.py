"""A question to the gateway, as a client would ask it: one streamed chat answer, one embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx

from corral.errors import CorralError

if TYPE_CHECKING:
    from openai import OpenAI

ANSWER_TIMEOUT_S = 300.0
# About 30 seconds with the library's pauses: the balancer needs some to see that its servers are well.
RETRIES = 7
MOST_TOKENS = 120


def import_client() -> None:
    """Loads the OpenAI library, which takes seconds, while there is something to wait for anyway."""
    import openai.resources.chat
    import openai.resources.embeddings  # noqa: F401


@contextmanager
def client(base_url: str, key: str) -> Iterator[OpenAI]:
    """An OpenAI client of a gateway on this machine; proxies of the environment are not asked."""
    from openai import OpenAI

    import_client()
    with httpx.Client(trust_env=False, timeout=ANSWER_TIMEOUT_S) as http:
        yield OpenAI(base_url=base_url, api_key=key, http_client=http, max_retries=RETRIES)


def stream_chat(gateway: OpenAI, model: str, question: str) -> Iterator[str]:
    """The pieces of the answer as they come; raises CorralError when there is none or it breaks off."""
    is_empty = True
    with _explained(f"did not answer as {model}"):
        stream = gateway.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=MOST_TOKENS, stream=True
        )
        for choice in (choice for chunk in stream for choice in chunk.choices):
            text = choice.delta.content or getattr(choice.delta, "reasoning_content", None)
            if text:
                is_empty = False
                yield text
    if is_empty:
        raise CorralError(f"the gateway answered as {model} without a word")


def embed(gateway: OpenAI, model: str, text: str) -> list[float]:
    """The embedding of a text; raises CorralError when there is none."""
    with _explained(f"did not embed with {model}"):
        data = gateway.embeddings.create(model=model, input=text, encoding_format="float").data
    if not data or not data[0].embedding:
        raise CorralError(f"the gateway embedded with {model} into nothing")
    return list(data[0].embedding)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns the library's errors into a CorralError."""
    from openai import OpenAIError

    try:
        yield
    except (OpenAIError, httpx.HTTPError) as error:
        message = " ".join(str(error).split())[:500] or type(error).__name__
        raise CorralError(f"the gateway {what}: {message}") from None
