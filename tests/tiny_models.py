"""Tiny real GGUF models: nothing to download, and the chat model's answer is known in advance.

The trick of the chat model: its weights are computed, not trained. Every piece of the answer is one token of its own
that no prompt can contain. All other tokens share one direction in embedding space, and the output matrix maps that
direction to the first piece, the embedding of each piece to the next piece, and the last one to the end of the turn. So
whatever is asked, the model says its one answer and stops. Attention and feed-forward layers hold random weights small
enough never to change which token wins, so the KV cache, flash attention and quantization really compute. A test can
compare text byte for byte through any number of proxies, and `max_tokens` cuts it as usual.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from numpy.typing import NDArray

from corral.files import write_atomically

Matrix = NDArray[np.float32]
WeightType = Literal["f32", "f16", "q8_0"]

# What a chat model made without `answer` says: `Tiny: 1 2 3` and so on up to `100`.
KNOWN_ANSWER = "Tiny: " + " ".join(str(number) for number in range(1, 101))

# The model of `make demo`, what it says, and what it is made with.
DEMO_MODEL = Path(__file__).parents[1] / "templates" / "demo" / "model.gguf"
DEMO_ANSWER = (
    "I am a tiny model that came with the kit; this is all that I can say, "
    "but I say it through the same gateway as a real model would."
)

DATA = Path(__file__).with_name("tiny_model_data")
CHAT_TEMPLATE = (DATA / "chat.jinja").read_text(encoding="utf-8").removesuffix("\n")
# Words with tokens of their own; everything else is spelled out letter by letter.
WORDS = tuple((DATA / "words.txt").read_text(encoding="utf-8").split())

# Values per attention head; a multiple of 32, so that every quantized type of the KV cache fits.
HEAD_SIZE = 64
# Values that Q8_0 quantizes together: rows have to be a multiple of it.
QUANTIZED_BLOCK = 32
# How much of a prompt token's embedding points in the direction of all prompt tokens (the squares add up to 1).
SHARED_PART, OWN_PART = 0.8, 0.6
# The right token's logit; the others stay near 0, so that no usual temperature or quantization picks another one.
SHARPNESS = 40.0


@dataclass(frozen=True)
class Size:
    """What a model's tensors are shaped by; width in multiples of 64, the feed-forward length in multiples of 32."""

    width: int
    layers: int
    # In tokens.
    context: int
    feed_forward: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // HEAD_SIZE

    @property
    def kv_heads(self) -> int:
        """Heads of the KV cache: half as many, as current models share them."""
        return max(1, self.heads // 2)


def make_chat_model(
    path: Path, *, answer: str = KNOWN_ANSWER, width: int = 128, layers: int = 2, context: int = 8192,
    ff: int | None = None, weight_type: WeightType = "f16", seed: int = 1, template: str = CHAT_TEMPLATE,
) -> None:  # fmt: skip
    """Write a llama model that answers `answer` to every request; ValueError: the answer is empty.

    `width` is the embedding length (64 or a multiple of 128), `ff` the feed-forward length (default: twice the width),
    `context` is in tokens. Larger models say the same, more slowly. The file appears whole or not at all, and equal
    arguments give equal bytes.
    """
    size = Size(width, layers, context, ff or 2 * width)
    vocabulary = chat_vocabulary(answer)
    file_types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    with written(path, "llama") as writer:
        describe(
            writer, **sizes_of("tiny-chat", size, len(vocabulary.tokens)), file_type=file_types[weight_type],
            head_count=size.heads, head_count_kv=size.kv_heads, key_length=HEAD_SIZE, value_length=HEAD_SIZE,
            rope_dimension_count=HEAD_SIZE, rope_freq_base=10000.0, layer_norm_rms_eps=1e-5,
            tokenizer_model="gpt2", tokenizer_pre="qwen2", token_list=vocabulary.tokens, token_types=vocabulary.types,
            token_merges=vocabulary.merges, eos_token_id=vocabulary.end_of_turn, pad_token_id=vocabulary.end_of_text,
            bos_token_id=vocabulary.end_of_text, add_bos_token=False, chat_template=template,
        )  # fmt: skip
        _add_llama_weights(Tensors(writer, np.random.default_rng(seed), weight_type), vocabulary, size)


def make_demo_model(path: Path) -> None:
    """Write the model that `make demo` serves; it is committed as DEMO_MODEL."""
    make_chat_model(path, answer=DEMO_ANSWER, width=64, layers=1, weight_type="q8_0")


@contextmanager
def written(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file appears at `path` once it is complete, or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(part, architecture)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(path, part.read_bytes(), 0o644)  # the server in a container is another user


def sizes_of(name: str, size: Size, vocabulary_size: int) -> dict[str, Any]:
    """What every model says of itself."""
    return {
        "name": name, "description": "made-up weights for tests and demonstrations", "context_length": size.context,
        "embedding_length": size.width, "block_count": size.layers, "feed_forward_length": size.feed_forward,
        "vocab_size": vocabulary_size,
    }  # fmt: skip


def describe(writer: gguf.GGUFWriter, **facts: Any) -> None:
    """Add metadata by the names of the writer's methods."""
    for name, fact in facts.items():
        getattr(writer, f"add_{name}")(fact)


@dataclass(frozen=True)
class Tensors:
    """Adds tensors to a model file: norms and biases as they are, matrices in the model's weight type."""

    writer: gguf.GGUFWriter
    random: np.random.Generator
    weight_type: WeightType

    def matrix(self, name: str, values: Matrix) -> None:
        """Add given weights."""
        if self.weight_type == "q8_0":
            quantized = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
            self.writer.add_tensor(name, quantized, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            self.writer.add_tensor(name, values.astype(np.float16 if self.weight_type == "f16" else np.float32))

    def noise(self, name: str, outputs: int, inputs: int, scale: float = 1.0) -> None:
        """Add random weights that scale the length of what goes through them by about `scale`."""
        values = self.random.standard_normal((outputs, inputs), dtype=np.float32)
        self.matrix(name, values * np.float32(scale / np.sqrt(inputs)))

    def constant(self, name: str, length: int, value: float) -> None:
        """Add a vector of equal numbers: the weights of a norm (1) or a bias (0)."""
        self.writer.add_tensor(name, np.full(length, value, dtype=np.float32))


# --- chat: a llama model with a byte-level BPE tokenizer


@dataclass
class _ChatVocabulary:
    """Tokens by id, in the byte alphabet of GPT-2, with their types and the merges that make words of bytes."""

    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    answer: tuple[int, ...] = ()
    end_of_turn: int = 0
    end_of_text: int = 0

    @property
    def tokens(self) -> list[str]:
        """The tokens in the order of their ids."""
        return list(self.ids)

    def add(self, token: str, token_type: int) -> int:
        """The token's id; the token is new or was there."""
        if token not in self.ids:
            self.ids[token] = len(self.ids)
            self.types.append(token_type)
        return self.ids[token]


def chat_vocabulary(answer: str) -> _ChatVocabulary:
    """The tokens of a chat model that says this; ValueError when it is empty."""
    if not answer:
        raise ValueError("the answer is empty: a model has to say something before it stops")
    alphabet = _byte_alphabet()
    vocabulary = _ChatVocabulary()
    for byte in range(256):
        vocabulary.add(alphabet[byte], TokenType.NORMAL)
    for word in WORDS:
        _add_word(vocabulary, _spell(" " + word, alphabet))
    pieces = [_spell(piece, alphabet) for piece in _split_answer(answer, _known_texts())]
    vocabulary.answer = tuple(vocabulary.add(piece, TokenType.NORMAL) for piece in pieces)
    vocabulary.add("<|im_start|>", TokenType.CONTROL)
    vocabulary.end_of_turn = vocabulary.add("<|im_end|>", TokenType.CONTROL)
    vocabulary.end_of_text = vocabulary.add("<|endoftext|>", TokenType.CONTROL)
    while len(vocabulary.ids) % QUANTIZED_BLOCK:  # a row count that GPU kernels like
        vocabulary.add(f"<|unused{len(vocabulary.ids)}|>", TokenType.UNUSED)
    return vocabulary


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _spell(text: str, alphabet: dict[int, str]) -> str:
    return "".join(alphabet[byte] for byte in text.encode())


def _add_word(vocabulary: _ChatVocabulary, word: str) -> None:
    """Make the word one token, with merges that build it from left to right."""
    for length in range(1, len(word)):
        start, letter = word[:length], word[length]
        if start + letter not in vocabulary.ids:
            vocabulary.merges.append(f"{start} {letter}")
            vocabulary.add(start + letter, TokenType.NORMAL)


def _known_texts() -> set[str]:
    """Texts that already are tokens, and which prompts therefore contain."""
    beginnings = {(" " + word)[:length] for word in WORDS for length in range(1, len(word) + 2)}
    return beginnings | {chr(byte) for byte in range(128)}


def _split_answer(answer: str, known: set[str]) -> list[str]:
    """The answer in pieces that are all different and, unless it is one known token, not in `known`.

    Different, because each piece decides on the next; not known, because a prompt that ends in a piece would start in
    the middle of the answer.
    """
    pieces: list[str] = []
    piece = ""
    for part in re.findall(r"\s*\w+|\s*[^\w\s]|\s+$", answer):
        piece += part
        if piece not in known and piece not in pieces:
            pieces.append(piece)
            piece = ""
    while piece and pieces:  # a rest that is no piece by itself belongs to the piece before it
        piece = pieces.pop() + piece
        if piece not in pieces:
            pieces.append(piece)
            piece = ""
    return pieces or [piece]


def _add_llama_weights(tensors: Tensors, vocabulary: _ChatVocabulary, size: Size) -> None:
    embedding, output = _answer_weights(tensors.random, vocabulary, size.width)
    tensors.matrix("token_embd.weight", embedding)
    tensors.constant("output_norm.weight", size.width, 1)
    tensors.matrix("output.weight", output)
    small = 0.05 / size.layers  # all layers together never outweigh the answer
    query_width, kv_width = size.heads * HEAD_SIZE, size.kv_heads * HEAD_SIZE
    for block in (f"blk.{layer}." for layer in range(size.layers)):
        tensors.constant(block + "attn_norm.weight", size.width, 1)
        tensors.noise(block + "attn_q.weight", query_width, size.width)
        tensors.noise(block + "attn_k.weight", kv_width, size.width)
        tensors.noise(block + "attn_v.weight", kv_width, size.width)
        tensors.noise(block + "attn_output.weight", size.width, query_width, small)
        tensors.constant(block + "ffn_norm.weight", size.width, 1)
        tensors.noise(block + "ffn_gate.weight", size.feed_forward, size.width)
        tensors.noise(block + "ffn_up.weight", size.feed_forward, size.width)
        tensors.noise(block + "ffn_down.weight", size.width, size.feed_forward, small)


def _answer_weights(random: np.random.Generator, vocabulary: _ChatVocabulary, width: int) -> tuple[Matrix, Matrix]:
    """The embedding and output matrices that make the model say its answer; see the module's docstring."""
    embedding = unit_vectors(random, len(vocabulary.ids), width)
    shared = unit_vectors(random, 1, width)[0]
    prompt_tokens = np.setdiff1d(np.arange(len(vocabulary.ids)), np.array(vocabulary.answer))
    embedding[prompt_tokens] = SHARED_PART * shared + OWN_PART * embedding[prompt_tokens]
    output = np.zeros_like(embedding)
    output[vocabulary.answer[0]] += shared / SHARED_PART
    for piece, following in itertools.pairwise((*vocabulary.answer, vocabulary.end_of_turn)):
        output[following] += embedding[piece]
    return embedding * np.float32(np.sqrt(width)), output * np.float32(SHARPNESS / np.sqrt(width))


def unit_vectors(random: np.random.Generator, count: int, width: int) -> Matrix:
    """Random directions, a row each."""
    vectors = random.standard_normal((count, width), dtype=np.float32)
    lengths: Matrix = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths
