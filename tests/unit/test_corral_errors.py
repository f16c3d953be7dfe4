"""What clients are told of an error, from texts as LiteLLM makes them."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from corral.render.templates import environment
from tests.callbacks import load_callback


@pytest.fixture(scope="module")
def errors() -> ModuleType:
    return load_callback("corral_errors")


def test_haproxy_has_the_same_types_and_codes(errors: ModuleType) -> None:
    template = '{% from "haproxy/errors.j2" import refusal %}{{ refusal(status, kind, "words") }}'
    refusal = environment().from_string(template)
    for status, (kind, code) in errors.BY_STATUS.items():
        _, error = errors.described(status, "words")
        assert json.loads(refusal.render(status=status, kind=kind)) == {"type": "error", "error": error}
        assert error["code"] == code


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("litellm.AuthenticationError: AuthenticationError: OpenAIException - Incorrect API key", "Incorrect API key"),
        ("OpenAIException - {\"error\": {\"message\": \"{'error': {'message': 'no'}}\"}}", "no"),
        ("litellm.NotFoundError: Hosted_vllmException - gone. Received Model Group=chat\nAvailable …", "gone."),
        ("No. See https://docs.litellm.ai/docs/proxy", "No."),
        (f"key {'0123456789abcdef' * 4} is blocked", "key … is blocked"),
        ("a text with {braces} and 'error': none", "a text with {braces} and 'error': none"),
    ],
)
def test_a_message_is_without_its_wrapping(errors: ModuleType, text: str, told: str) -> None:
    assert errors.plain(text) == told


@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        (
            {"error": {"message": "maximum context length is 8192", "code": "400"}},
            400,
            "context_length_exceeded",
        ),
        ({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429, "insufficient_quota"),
        ({"detail": {"error": "something"}}, 500, "server_error"),
        ({"detail": [{"loc": ["body", "file"], "msg": "Field required"}]}, 500, "server_error"),
        ("Internal Server Error", 500, "server_error"),
    ],
)
def test_every_body_has_a_code(errors: ModuleType, payload: object, status: int, code: str) -> None:
    got, error = errors.described(500, payload)
    assert (got, error["code"]) == (status, code)
    assert error["message"]
