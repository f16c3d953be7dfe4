"""A question to the gateway, as a client would ask it: one streamed chat answer, one embedding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx

from corral.errors import CorralError

if TYPE_CHECKING:
    from openai import OpenAI

ANSWER_TIMEOUT_S = 300.0
# The balancer may need this long to see that its servers are well.
PATIENCE_S = 20.0
POLL_S = 0.5
MOST_TOKENS = 120
BUSY = 429
FIRST_SERVER_ERROR = 500


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
        yield OpenAI(base_url=base_url, api_key=key, http_client=http, max_retries=0)


def stream_chat(gateway: OpenAI, model: str, question: str) -> Iterator[str]:
    """The pieces of the answer as they come; raises CorralError when there is none or it breaks off."""
    from openai import OpenAIError

    deadline = time.monotonic() + PATIENCE_S
    has_begun = False
    while not has_begun:
        try:
            for piece in _pieces(gateway, model, question):
                has_begun = True
                yield piece
        except (OpenAIError, httpx.HTTPError) as error:
            if has_begun or not _may_pass(error) or time.monotonic() > deadline:
                raise CorralError(f"the gateway did not answer as {model}: {_words(error)}") from None
            time.sleep(POLL_S)
        else:
            if not has_begun:
                raise CorralError(f"the gateway answered as {model} without a word")


def _pieces(gateway: OpenAI, model: str, question: str) -> Iterator[str]:
    stream = gateway.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=MOST_TOKENS, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            text = choice.delta.content or getattr(choice.delta, "reasoning_content", None)
            if text:
                yield text


def embed(gateway: OpenAI, model: str, text: str) -> list[float]:
    """The embedding of a text; raises CorralError when there is none."""
    from openai import OpenAIError

    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            data = gateway.embeddings.create(model=model, input=text, encoding_format="float").data
        except (OpenAIError, httpx.HTTPError) as error:
            if not _may_pass(error) or time.monotonic() > deadline:
                raise CorralError(f"the gateway did not embed with {model}: {_words(error)}") from None
            time.sleep(POLL_S)
        else:
            if not data or not data[0].embedding:
                raise CorralError(f"the gateway embedded with {model} into nothing")
            return list(data[0].embedding)


def _may_pass(error: Exception) -> bool:
    """Whether it is worth asking again: the balancer does not know yet that its servers are well."""
    from openai import APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code == BUSY or error.status_code >= FIRST_SERVER_ERROR
    return True


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
