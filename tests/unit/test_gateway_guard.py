"""What the gateway's callback makes of requests that came in by the guarded entrance (004-F9)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from fastapi import HTTPException

from tests.callbacks import load_callback


@pytest.fixture(scope="module")
def gateway() -> ModuleType:
    return load_callback("corral_gateway")


LIMITS = {"messages": 2, "message_kib": 1, "tokens": 64, "choices": 1}


def request(*texts: str, **fields: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts], **fields}


def test_what_is_within_the_limits_passes_and_says_how_long_its_answer_may_be(gateway: ModuleType) -> None:
    data = request("a", "b", max_tokens=10)
    gateway.keep_within(data, LIMITS)
    assert data == request("a", "b", max_tokens=10)
    unsaid = request("a")
    gateway.keep_within(unsaid, LIMITS)
    assert unsaid["max_tokens"] == 64


@pytest.mark.parametrize("texts", [("a", "b", "c"), ("x" * 1024,)])
def test_too_many_or_too_long_messages_are_refused(gateway: ModuleType, texts: tuple[str, ...]) -> None:
    with pytest.raises(HTTPException) as refused:
        gateway.keep_within(request(*texts), LIMITS)
    assert refused.value.status_code == 413


def test_more_tokens_or_answers_than_allowed_are_lowered(gateway: ModuleType) -> None:
    data = request("a", max_completion_tokens=9999, n=8)
    gateway.keep_within(data, LIMITS)
    assert (data["max_completion_tokens"], data["n"]) == (64, 1)
    assert "max_tokens" not in data


def test_requests_that_came_another_way_have_no_limits(gateway: ModuleType) -> None:
    data = request(*"abc", n=8)
    gateway.keep_within(data, gateway._guard(data))
    assert data == request(*"abc", n=8)


def test_limits_are_read_from_the_entrances_header(gateway: ModuleType) -> None:
    headers = {"X-Corral-Guard": "messages=5 message_kib=32 choices=1"}
    found = gateway._guard({"proxy_server_request": {"headers": headers}})
    assert found == {"messages": 5, "message_kib": 32, "choices": 1}
