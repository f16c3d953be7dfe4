"""The order of messages that strict chat templates accept, with LiteLLM's own functions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.callbacks import load_callback

interfaces = load_callback("corral_interfaces")

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CALLED = [{"id": "1", "type": "function", "function": {"name": "f"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLED}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], []),
        ([turn("user", "a")], [turn("user", "a")]),
        ([turn("system", [text("a"), text("b")]), turn("developer", "c")], [turn("system", "a\n\nb\n\nc")]),
        ([turn("system", ""), turn("user", "a")], [turn("user", "a")]),
        ([turn("user", "a"), turn("user", [text("b"), PICTURE])], [turn("user", [text("a"), text("b"), PICTURE])]),
        ([turn("user", None), turn("user", "a")], [turn("user", "a")]),
        ([turn("user", "a"), CALL, RESULT, RESULT], [turn("user", "a"), CALL, RESULT, RESULT]),
    ],
)
def test_messages_for_strict_templates(given: list[Any], wanted: list[Any]) -> None:
    assert interfaces.in_strict_order(given) == wanted


def test_a_system_text_between_a_call_and_its_result_comes_after_the_result() -> None:
    made = interfaces.in_strict_order([turn("user", "a"), CALL, turn("developer", "now"), RESULT, turn("user", "b")])
    assert made[:3] == [turn("user", "a"), CALL, RESULT]
    [last] = made[3:]
    assert last["role"] == "user"
    assert last["content"].endswith("\n\nnow\n\nb")
