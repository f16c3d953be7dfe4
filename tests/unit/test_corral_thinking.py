"""What the callback that hides thoughts makes of an answer, however it is cut into pieces (000-12)."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.callbacks import load_callback

thinking = load_callback("corral_thinking")
TAG = re.compile(r"</?think(ing)?>")

PIECES = ["<think>", "</think>", "<thinking>", "</thinking>", "<", ">", "<th", "ink>", "</", " ", "\n", "a", "ß🦙"]
pieces = st.sampled_from(PIECES)
texts = st.lists(pieces | st.text(max_size=5), max_size=14).map("".join)


def said(parts: list[str]) -> str:
    thoughts = thinking.ThoughtFilter()
    return "".join([*map(thoughts.feed, parts), thoughts.finish()])


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@given(texts, st.lists(st.integers(0, 200), max_size=12))
def test_cutting_changes_nothing(text: str, places: list[int]) -> None:
    assert said(cut(text, places)) == said(list(text)) == said([text])


@given(texts.filter(lambda text: not TAG.search(text)), st.lists(st.integers(0, 200), max_size=12))
def test_text_without_tags_stays_as_it_is(text: str, places: list[int]) -> None:
    assert said(cut(text, places)) == text


@given(texts)
def test_nothing_is_held_back_that_cannot_become_a_tag(text: str) -> None:
    thoughts = thinking.ThoughtFilter()
    first = thoughts.feed(text)
    rest = thoughts.finish()
    assert any(tag.startswith(rest) for tag in thinking.TAGS)
    assert first + rest == said([text])


@given(st.text(alphabet="ab \n<>/", max_size=8), st.text(alphabet="cd \n<>/", max_size=8), st.integers(1, 4))
def test_a_thought_is_gone_and_the_rest_stays(thought: str, answer: str, depth: int) -> None:
    text = "<think>" * depth + thought + "</think>" * depth + answer
    assert said(list(text)) == answer.lstrip()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>a</think>\n\nb", "b"),
        ("<think>\n\n</think>\n\n  b ", "b "),
        ("\n<think>a</think>b", "\nb"),
        ("b <think>a</think> c", "b  c"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<thinking>a</thinking>b", "b"),
        ("<think>a", ""),
        ("b<think>a", "b"),
        ("a</think>b", "ab"),
        ("<think", "<think"),
        ("<", "<"),
        ("1 < 2 <b>bold</b> <thick>", "1 < 2 <b>bold</b> <thick>"),
        ("<<think>a</think>b", "<b"),
        ("<th<think>a</think>b", "<thb"),
        ("<think>a</think>b</think>c", "bc"),
        ("", ""),
    ],
)
def test_every_way_of_cutting_in_two(text: str, wanted: str) -> None:
    for place in range(len(text) + 1):
        assert said([text[:place], text[place:]]) == wanted
    assert said(list(text)) == wanted


@given(texts)
def test_no_tag_is_left_of_a_whole_answer_but_one_that_the_rest_forms(text: str) -> None:
    """Taking a tag out may put two halves of another together; nobody writes that but a test."""
    whole = thinking.without_thoughts(text)
    if "</" not in text.replace("</think>", "").replace("</thinking>", ""):
        assert "</think>" not in whole
    if text.count("<think") == text.count("</think") == 0:
        assert whole == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("the template has opened it</think>\n\nb", "b"),
        (" is < allowed.\n</think>\n\nThe <think>x</think>answer", "The answer"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("plain\n", "plain\n"),
        ("<think>a", ""),
    ],
)
def test_whole_answer(text: str, wanted: str) -> None:
    assert thinking.without_thoughts(text) == wanted
