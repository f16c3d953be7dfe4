"""What the fakes of this folder have in common: a request says by itself how it wants to be answered.

Each module here is one server that the kit does not start, in that server's own wire format, and a program:

    python -m tests.processes.wires.mlx PORT

The last message of a request may be JSON (see `order`); `GET /seen` tells what reached the server.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Order:
    """How a request wants to be answered."""

    # The answer, in the pieces in which it is streamed.
    say: list[str] = field(default_factory=lambda: ["an ", "answer"])
    # What the server separates from the answer by itself.
    think: list[str] = field(default_factory=list)
    service_s: float = 0.0
    # The stop sequence that ended the answer.
    stop: str | None = None
    # Why it ended, in OpenAI's words.
    finish: str = "stop"

    @classmethod
    def of(cls, body: dict[str, Any]) -> Order:
        """The order in a request's last message; a plain answer when it is something else."""
        messages = body.get("messages") or [{}]
        content = messages[-1].get("content")
        if isinstance(content, list):
            content = " ".join(part.get("text", "") for part in content)
        try:
            return cls(**json.loads(content))
        except (TypeError, ValueError):
            return cls()


def order(say: list[str], *, think: list[str] | None = None, service_s: float = 0.0, **end: str) -> str:
    """The text of a message that wants this answer."""
    return json.dumps(asdict(Order(say, think or [], service_s, **end)))


class Seen:
    """What a fake has seen since it was started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._most_in_flight = 0
        self._requests: list[dict[str, Any]] = []

    @contextmanager
    def request(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Iterator[Order]:
        """Counts a request for inference for as long as it is worked on."""
        lower = {name.lower(): value for name, value in headers.items()}
        with self._lock:
            self._requests.append({"path": path, "headers": lower, "body": body})
            self._in_flight += 1
            self._most_in_flight = max(self._most_in_flight, self._in_flight)
        try:
            yield Order.of(body)
        finally:
            with self._lock:
                self._in_flight -= 1

    def told(self) -> dict[str, Any]:
        """All of it, for `GET /seen`."""
        return {
            "requests": self._requests,
            "in_flight": self._in_flight,
            "most_in_flight": self._most_in_flight,
        }


def command(wire: str, port: int, *further: str) -> list[str]:
    """The command line of one of the fakes."""
    return [sys.executable, "-m", f"tests.processes.wires.{wire}", str(port), *further]


def seen_by(port: int) -> dict[str, Any]:
    """What the fake on this port has seen: its requests, and how many were in flight at most."""
    told: dict[str, Any] = httpx.get(f"http://{LOOPBACK}:{port}/seen", trust_env=False, timeout=10).json()
    return told
