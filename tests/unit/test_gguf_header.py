"""Our reading of GGUF headers against the gguf package's, and against damage."""

from __future__ import annotations

import io
import random
import struct
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.config.gguf_header import HeaderError, Long, facts_of, read_header
from tests.model_files import make_embedding_model
from tests.tiny_models import make_chat_model


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("header") / "chat.gguf"
    make_chat_model(path, width=256, layers=3, weight_type="q8_0")
    return path


def test_it_reads_what_the_gguf_package_reads(chat: Path, tmp_path: Path) -> None:
    make_embedding_model(tmp_path / "embed.gguf")
    for path in (chat, tmp_path / "embed.gguf"):
        reader = gguf.GGUFReader(path)
        with path.open("rb") as file:
            header = read_header(file.read)
        assert header.data_start == reader.data_offset
        assert [(t.name, t.elements, t.bytes) for t in header.tensors] == [
            (t.name, int(t.n_elements), int(t.n_bytes)) for t in reader.tensors
        ]
        assert header.file_size == max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
        for name, value in header.values.items():
            theirs = reader.fields[name].contents()
            assert (value.length if isinstance(value, Long) else value) == (
                len(theirs) if isinstance(value, Long) else theirs
            ), name


def test_long_lists_are_counted_not_kept(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list([f"t{number}" for number in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (tmp_path / "m.gguf").open("rb") as file:
        header = read_header(file.read)
    tokens = header.values["tokenizer.ggml.tokens"]
    assert (tokens.length, len(tokens.mark)) == (5000, 64)
    assert header.values["tokenizer.ggml.scores"] == Long(5000)
    assert facts_of(header).vocabulary == 5000


def test_it_is_the_same_in_small_pieces(chat: Path) -> None:
    content = chat.read_bytes()
    random_source = random.Random(1)  # noqa: S311 - sizes of pieces
    stream = io.BytesIO(content)
    assert read_header(lambda _length: stream.read(random_source.randint(1, 700))) == read_header(
        io.BytesIO(content).read
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends inside its header"),
        (b"GGU", "ends inside its header"),
        (b"<html>", "is not a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "is GGUF version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0), "impossible number"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**60), "impossible length"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 99), "unknown type 99"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 4, 2**60), "impossible list"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"a", 1, 1, 9999, 0), "tensor of the unknown type"),
    ],
)
def test_damage_is_named(content: bytes, words: str) -> None:
    with pytest.raises(HeaderError, match=words):
        read_header(io.BytesIO(content).read)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_is_a_traceback(chat: Path, data: st.DataObject) -> None:
    content = bytearray(chat.read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    with suppress(HeaderError):
        facts_of(read_header(io.BytesIO(bytes(content)).read))
