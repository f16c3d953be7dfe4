"""A question to the gateway, as a client would ask it: one streamed chat answer, one embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx

from corral.errors import CorralError, on_one_line

if TYPE_CHECKING:
    from openai import OpenAI

ANSWER_TIMEOUT_S = 300.0
# The balancer may need some 20 seconds to see that its servers are well; the pauses double from 0.5 s to 8 s.
RETRIES = 6
MOST_TOKENS = 120
MOST_TOLD = 500


def import_client() -> None:
    """Loads the OpenAI library, which takes seconds, while there is something to wait for anyway."""
    import openai.resources.chat
    import openai.resources.embeddings  # noqa: F401


@contextmanager
def client(base_url: str, key: str) -> Iterator[OpenAI]:
    """An OpenAI client of a gateway on this machine; proxies of the environment are not asked.

    Raises:
        CorralError: the gateway gives no answer to a question in the block.
    """
    from openai import OpenAI, OpenAIError

    import_client()
    with httpx.Client(trust_env=False, timeout=ANSWER_TIMEOUT_S) as http:
        try:
            yield OpenAI(base_url=base_url, api_key=key, http_client=http, max_retries=RETRIES)
        except (OpenAIError, httpx.HTTPError) as error:
            words = on_one_line(str(error))[:MOST_TOLD] or type(error).__name__
            raise CorralError(f"the gateway did not answer: {words}") from None


def stream_chat(gateway: OpenAI, model: str, question: str) -> Iterator[str]:
    """The pieces of the answer as they come; raises CorralError when there are none."""
    stream = gateway.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=MOST_TOKENS, stream=True
    )
    has_begun = False
    for delta in (choice.delta for chunk in stream for choice in chunk.choices):
        text = delta.content or getattr(delta, "reasoning_content", None)
        if text:
            has_begun = True
            yield text
    if not has_begun:
        raise CorralError(f"the gateway answered as {model} without a word")


def embed(gateway: OpenAI, model: str, text: str) -> list[float]:
    """The embedding of a text; raises CorralError when it is empty."""
    data = gateway.embeddings.create(model=model, input=text, encoding_format="float").data
    if not data or not data[0].embedding:
        raise CorralError(f"the gateway embedded with {model} into nothing")
    return list(data[0].embedding)
