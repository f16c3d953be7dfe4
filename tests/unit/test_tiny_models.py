"""Tiny models: the same bytes for the same arguments, whole files only, and files that gguf's own reader takes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests import tiny_models
from tests.model_files import make_embedding_model, make_rerank_model
from tests.tiny_models import DEMO_MODEL, KNOWN_ANSWER, WeightType, make_chat_model, make_demo_model

MAKERS: dict[str, Callable[..., None]] = {
    "chat": make_chat_model,
    "embed": make_embedding_model,
    "rerank": make_rerank_model,
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def field(reader: gguf.GGUFReader, name: str) -> object:
    found = reader.get_field(name)
    assert found is not None, name
    contents: object = found.contents()
    return contents


def text_of(spelled: str) -> str:
    """Text from its spelling in GPT-2's byte alphabet."""
    byte_of = {letter: byte for byte, letter in tiny_models._byte_alphabet().items()}
    return bytes(byte_of[letter] for letter in spelled).decode()


def test_known_answer_counts_to_a_hundred() -> None:
    assert KNOWN_ANSWER.startswith("Tiny: 1 2 3 4 ")
    assert KNOWN_ANSWER.endswith(" 98 99 100")
    assert len(KNOWN_ANSWER.split()) == 101


@pytest.mark.parametrize("kind", MAKERS)
def test_same_arguments_give_same_bytes(kind: str, tmp_path: Path) -> None:
    first, second, other = tmp_path / "first.gguf", tmp_path / "second.gguf", tmp_path / "other.gguf"
    MAKERS[kind](first)
    MAKERS[kind](second)
    MAKERS[kind](other, seed=2)
    assert digest(first) == digest(second)
    assert digest(first) != digest(other)


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    here, there = tmp_path / "here.gguf", tmp_path / "there.gguf"
    make_chat_model(here, width=64, layers=1, weight_type="q8_0")
    code = f"""
from pathlib import Path
from tests.tiny_models import make_chat_model
make_chat_model(Path({str(there)!r}), width=64, layers=1, weight_type="q8_0")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(tiny_models.__file__).parents[1])
    assert digest(here) == digest(there)


@pytest.mark.parametrize("weight_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_chat_model_opens_and_has_its_sizes(weight_type: WeightType, width: int, tmp_path: Path) -> None:
    path = tmp_path / "chat.gguf"
    make_chat_model(path, width=width, layers=3, context=4096, ff=96, weight_type=weight_type)
    reader = gguf.GGUFReader(path)
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "llama.embedding_length") == width
    assert field(reader, "llama.block_count") == 3
    assert field(reader, "llama.context_length") == 4096
    assert field(reader, "llama.feed_forward_length") == 96
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert len(types) == 3 + 3 * 9
    assert types["blk.2.ffn_down.weight"] == types["token_embd.weight"] == weight_type
    assert types["output_norm.weight"] == "f32"


@pytest.mark.parametrize("kind", ["embed", "rerank"])
def test_bert_models_open_and_have_their_pooling(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    MAKERS[kind](path, width=192, layers=1, context=64)
    reader = gguf.GGUFReader(path)
    assert field(reader, "general.architecture") == "bert"
    assert field(reader, "bert.embedding_length") == 192
    assert field(reader, "bert.context_length") == 64
    pooling = {"embed": gguf.PoolingType.MEAN, "rerank": gguf.PoolingType.RANK}[kind]
    assert field(reader, "bert.pooling_type") == pooling
    assert ("cls.output.weight" in {tensor.name for tensor in reader.tensors}) == (kind == "rerank")


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


def test_model_may_be_made_over_an_old_one_and_is_readable_to_all(tmp_path: Path) -> None:
    path = tmp_path / "chat.gguf"
    path.write_bytes(b"old")
    make_chat_model(path, width=64, layers=1)
    assert path.read_bytes()[:4] == b"GGUF"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


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
