"""Tiny models: answers are cut into tokens that no prompt has, and the demo's model is the one that is made now."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests import tiny_models
from tests.tiny_models import DEMO_MODEL, KNOWN_ANSWER, make_demo_model


def text_of(spelled: str) -> str:
    """Text from its spelling in GPT-2's byte alphabet."""
    byte_of = {letter: byte for byte, letter in tiny_models._byte_alphabet().items()}
    return bytes(byte_of[letter] for letter in spelled).decode()


@pytest.mark.parametrize(
    "answer",
    [
        KNOWN_ANSWER,
        "a",
        " the",
        "the the the the",
        "word word word. word",
        "Grüße, 世界! 🙂 the end",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "two\n\nparagraphs\t \n",
        "  leading",
    ],
)
def test_answer_is_cut_into_different_tokens_that_no_prompt_has(answer: str) -> None:
    vocabulary = tiny_models.chat_vocabulary(answer)
    pieces = [vocabulary.tokens[token] for token in vocabulary.answer]
    assert text_of("".join(pieces)) == answer
    assert len(set(pieces)) == len(pieces)
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens)
    merged = {merge.replace(" ", "", 1) for merge in vocabulary.merges}
    assert len(pieces) == 1 or not merged & set(pieces)


def test_the_model_of_the_demo_is_fresh(tmp_path: Path, *, update_golden: bool) -> None:
    """But for the last digits, in which processors differ."""
    if update_golden:
        make_demo_model(DEMO_MODEL)
    make_demo_model(tmp_path / "model.gguf")
    wanted, found = (gguf.GGUFReader(path) for path in (tmp_path / "model.gguf", DEMO_MODEL))
    fields = [{key: item.contents() for key, item in reader.fields.items()} for reader in (wanted, found)]
    assert fields[0] == fields[1]
    for ours, theirs in zip(wanted.tensors, found.tensors, strict=True):
        assert ours.name == theirs.name
        one, other = (gguf.quants.dequantize(item.data, item.tensor_type) for item in (ours, theirs))
        np.testing.assert_allclose(one, other, atol=0.05 * float(np.abs(one).max()))
