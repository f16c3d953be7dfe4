"""A client for a busy farm: limits its concurrent requests, honours `Retry-After`, and limits its retries.

Copy this file; it needs only the package `openai`. As a program it sends one question per line and prints the answers
in the same order:

    python clients/patient.py chat --in-flight 3 < questions.txt

docs/clients.md has the reasons.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from openai import OpenAI, OpenAIError, RateLimitError, Timeout

CONNECT_S = 5.0
# Longest time without a byte: longer than the pool's queue.timeout_s and timeout_s together.
ANSWER_S = 600.0
# Longest time over which refusals are put up with.
PATIENCE_S = 900.0
LONGEST_SPREAD_S = 30.0

Result = TypeVar("Result")
log = logging.getLogger("patient")


class BrokenStreamError(Exception):
    """A streamed answer ended without saying that it is complete."""


class PatientClient:
    """An OpenAI client with a share of the farm; threads may use it together.

    Args:
        in_flight: requests at once, refused ones that wait included; the slots of the pool, shared among its clients.
        openai: a client of your own making, with max_retries=0; otherwise address and key are those of the environment.
        patience_s: longest time over which refusals are put up with.
    """

    def __init__(self, in_flight: int, openai: OpenAI | None = None, patience_s: float = PATIENCE_S) -> None:
        # openai's own retries all return after exactly Retry-After, together, and repeat what may have begun.
        self.openai = openai or OpenAI(max_retries=0, timeout=Timeout(ANSWER_S, connect=CONNECT_S))
        self.patience_s = patience_s
        self._places = threading.BoundedSemaphore(in_flight)

    def call(self, request: Callable[[OpenAI], Result]) -> Result:
        """What a request returns, once the farm takes it: `client.call(lambda openai: openai.embeddings.create(…))`."""
        with self._places:
            return self._accepted(request)

    def stream(self, **fields: Any) -> Iterator[str]:
        """The pieces of a chat answer as they come; BrokenStreamError when they end too early.

        Nothing is repeated once the answer has begun.
        """
        with self._places:
            is_whole = False
            with self._accepted(lambda openai: openai.chat.completions.create(stream=True, **fields)) as chunks:
                for chunk in chunks:
                    for choice in chunk.choices:
                        is_whole = is_whole or choice.finish_reason is not None
                        if choice.delta.content:
                            yield choice.delta.content
            if not is_whole:
                raise BrokenStreamError("the answer broke off; what came is not all of it")

    def _accepted(self, request: Callable[[OpenAI], Result]) -> Result:
        end = time.monotonic() + self.patience_s
        attempt = 0
        while True:
            try:
                return request(self.openai)
            except RateLimitError as refusal:
                wait_s = pause_s(refusal.response.headers.get("retry-after"), attempt)
                if wait_s is None or time.monotonic() + wait_s > end:
                    raise
            log.info("refused, back in %.1f s", wait_s)
            time.sleep(wait_s)
            attempt += 1


def pause_s(retry_after: str | None, attempt: int) -> float | None:
    """Seconds until the next try; None when the farm does not want one (a spent budget says no Retry-After).

    Never earlier than told, and spread over a time that doubles, so that refused clients do not return together.
    """
    if retry_after is None:
        return None
    try:
        told = float(retry_after)
    except ValueError:
        told = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    told = max(0.0, told)
    return told + random.uniform(0, min(LONGEST_SPREAD_S, max(1.0, told) * 2**attempt))  # noqa: S311 - no secret


def main() -> int:
    """Answers every line of the standard input; 1 when one of them got no answer."""
    parser = argparse.ArgumentParser(description="Asks one question a line of the standard input.")
    parser.add_argument("model")
    parser.add_argument("--in-flight", type=int, required=True, help="this client's share of the pool's slots")
    given = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s")
    log.setLevel(logging.INFO)
    client = PatientClient(given.in_flight)

    def answer(question: str) -> dict[str, str]:
        try:
            text = "".join(client.stream(model=given.model, messages=[{"role": "user", "content": question}]))
        except (OpenAIError, BrokenStreamError) as error:
            return {"question": question, "error": str(error)}
        return {"question": question, "answer": text}

    is_complete = True
    with ThreadPoolExecutor(given.in_flight) as threads:
        for result in threads.map(answer, sys.stdin.read().splitlines()):
            print(json.dumps(result, ensure_ascii=False), flush=True)
            is_complete = is_complete and "error" not in result
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
