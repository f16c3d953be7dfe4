"""Measurement of one request from its due time to the first and the last token.

Every time is in seconds. A stream that does not say why it ended is a failure, whatever came before.
"""

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import requests

OK = 200
TOO_MANY = 429
# Headers in which the gateway says which replica answered.
WHO = ("llm_provider-x-replica", "x-replica", "x-litellm-model-id")
MOST_CONNECTIONS = 4096
# Gaps between tokens that are kept of one answer.
MOST_GAPS = 4096


@dataclass
class Measured:
    """Measurements of one request."""

    task: str
    pool: str
    replica: str = ""
    # When it was to be sent, in seconds since 1970.
    due_at: float = 0.0
    # How much later it was sent: what this client itself is late.
    lag_s: float = 0.0
    # Requests under way when it was sent, itself included.
    in_flight: int = 0
    status: int = 0
    # Kind of failure; empty: answered, whole.
    error: str = ""
    detail: str = ""
    # Whether a refusal said when to come back (`Retry-After`).
    says_when: bool = False
    # From due to the first content token.
    ttft_s: float | None = None
    # From due to the end of the answer.
    e2e_s: float = 0.0
    # Between pieces of the answer that have content (ITL).
    gaps_s: list[float] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first."""
        if self.ttft_s is None or self.tokens_out < 2:  # noqa: PLR2004 - a first token and one more
            return None
        return (self.e2e_s - self.ttft_s) / (self.tokens_out - 1)

    def row(self) -> dict[str, Any]:
        """The row of the raw data."""
        rounded = asdict(self)
        rounded["gaps_s"] = [round(gap, 6) for gap in self.gaps_s[:MOST_GAPS]]
        return {key: round(item, 6) if isinstance(item, float) else item for key, item in rounded.items()}


@dataclass
class Place:
    """The target of a request: the gateway, or one replica."""

    name: str
    url: str
    model: str
    slots: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    in_flight: int = 0


def place_of(one: Mapping[str, Any], environment: Mapping[str, str]) -> Place:
    """The target in the settings, with its key from the environment."""
    key = environment.get(one["key"], "")
    header = {one["key_header"]: key} if one["key_header"] else {"Authorization": f"Bearer {key}"}
    return Place(one["name"], one["url"], one["model"], one["slots"], header if key else {})


def open_session() -> requests.Session:
    """A session for many concurrent requests, without proxies of the environment."""
    session = requests.Session()
    session.trust_env = False
    adapter = requests.adapters.HTTPAdapter(pool_connections=64, pool_maxsize=MOST_CONNECTIONS)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def body_of(kind: str, model: str, said: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    """The body for a pool of this kind: the whole conversation for chat, else its last message."""
    if kind == "chat":
        usage = {"include_usage": True}
        return {
            "model": model, "messages": list(said), "max_tokens": max_tokens, "stream": True, "stream_options": usage,
        }  # fmt: skip
    text = said[-1]["content"]
    if kind == "image":
        return {"model": model, "prompt": text, "size": "512x512", "n": 1, "response_format": "b64_json"}
    return {"model": model, "input": text}


class _BrokenStreamError(Exception):
    """The answer was incomplete."""


def ask(session: requests.Session, place: Place, found: Measured, body: dict[str, Any], timeout_s: float) -> str:
    """Sends one request and records the result; returns the answer's text."""
    began = time.monotonic() - found.lag_s
    path = "chat/completions" if "messages" in body else "embeddings" if "input" in body else "images/generations"
    found.replica = place.name
    try:
        with session.post(
            f"{place.url}/{path}", json=body, headers=place.headers, timeout=timeout_s, stream=True
        ) as answer:
            found.status = answer.status_code
            found.replica = next((answer.headers[name] for name in WHO if name in answer.headers), place.name)
            if answer.status_code != OK:
                found.says_when = "retry-after" in answer.headers
                found.detail = answer.text[:200]
                found.error = "refused" if answer.status_code == TOO_MANY else f"status {answer.status_code}"
                return ""
            if "messages" in body:
                return _read_stream(answer, found, began, timeout_s)
            _read_whole(answer, found)
            return ""
    except _BrokenStreamError as error:
        found.error = "broken stream"
        found.detail = str(error)
    except requests.Timeout:
        found.error = "timeout"
    except requests.RequestException as error:
        is_late, is_cut = "timed out" in str(error), found.status == OK
        found.error = "timeout" if is_late else "broken stream" if is_cut else "connection"
        found.detail = type(error).__name__
    except ValueError as error:
        found.error = "broken stream"
        found.detail = f"no JSON: {error}"[:200]
    finally:
        found.e2e_s = time.monotonic() - began
    return ""


def _read_stream(answer: requests.Response, found: Measured, began: float, timeout_s: float) -> str:
    """Reads server-sent events as they arrive."""
    pieces: list[str] = []
    last, is_complete = 0.0, False
    # Without a chunk size, what has come is handed on at once; with one, first tokens wait for others.
    for line in answer.iter_lines(chunk_size=None):  # type: ignore[call-overload]
        now = time.monotonic()
        if now - began > timeout_s:
            raise requests.Timeout
        text = line.decode(errors="replace").removeprefix("data:").strip()
        if not text or text.startswith(":"):
            continue
        if text == "[DONE]":
            break
        event = json.loads(text)
        if "error" in event:
            raise _BrokenStreamError(json.dumps(event["error"])[:200])
        usage = event.get("usage") or {}
        found.tokens_in = usage.get("prompt_tokens", found.tokens_in)
        found.tokens_out = usage.get("completion_tokens", found.tokens_out)
        for choice in event.get("choices", []):
            is_complete = is_complete or bool(choice.get("finish_reason"))
            delta = choice.get("delta", {})
            content = delta.get("content") or delta.get("reasoning_content")
            if content:
                if pieces:
                    found.gaps_s.append(now - last)
                else:
                    found.ttft_s = now - began
                pieces.append(content)
                last = now
    if not is_complete:
        raise _BrokenStreamError("no finish_reason")
    found.tokens_out = found.tokens_out or len(pieces)
    return "".join(pieces)


def _read_whole(answer: requests.Response, found: Measured) -> None:
    """Reads and validates an embedding or an image."""
    data = answer.json()
    items = data.get("data") or []
    vector = items[0].get("embedding") if items else None
    if isinstance(vector, str):
        vector = base64.b64decode(vector)
    if not items or not (vector or items[0].get("b64_json") or items[0].get("url")):
        raise _BrokenStreamError("an answer without content")
    found.tokens_in = (data.get("usage") or {}).get("prompt_tokens", 0)
