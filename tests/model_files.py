"""Model files that only tests and benchmarks need: adapters, embedders, rerankers, and models of many architectures.

Embedders and rerankers are small BERT models with random weights: texts that share words come out nearer to each other.
The latter have random weights, a few MB each: they say nonsense, but take real memory. For checking what
`corral/plan/memory.py` computes against what llama-server reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import LlamaFileType, TokenType

from tests.tiny_models import (
    KNOWN_ANSWER,
    SHARED_PART,
    SHARPNESS,
    WORDS,
    Size,
    Tensors,
    chat_vocabulary,
    describe,
    sizes_of,
    unit_vectors,
    written,
)

PAD, UNKNOWN, START, SEPARATOR, MASK = range(5)
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# llama.cpp's own spelling of WordPiece: a mark where a word begins, none (no `##`) where it goes on.
WORD_START = "\u2581"
GEMMA_NORMS = ("post_attention_norm.weight", "post_ffw_norm.weight")


def make_adapter(
    path: Path, *, start: int, answer: str | None = None, width: int = 128, strength: float = 2.0, seed: int = 1
) -> None:
    """Write a LoRA adapter with which the chat model of these arguments begins its answer at piece `start`.

    One row in the output matrix is enough: what means "any prompt" now points at that piece as well, `strength` times
    as much as at the first one. The file appears whole or not at all.
    """

    vocabulary = chat_vocabulary(KNOWN_ANSWER if answer is None else answer)
    random = np.random.default_rng(seed)
    unit_vectors(random, len(vocabulary.tokens), width)
    shared = unit_vectors(random, 1, width)
    to_piece = np.zeros((len(vocabulary.tokens), 1), dtype=np.float32)
    to_piece[vocabulary.answer[start]] = strength * SHARPNESS / np.sqrt(width) / SHARED_PART
    with written(path, "llama") as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
        writer.add_tensor("output.weight.lora_a", shared)
        writer.add_tensor("output.weight.lora_b", to_piece)


def make_embedding_model(
    path: Path, *, width: int = 128, layers: int = 2, context: int = 512, ff: int | None = None, seed: int = 1
) -> None:
    """Write a BERT model with mean pooling that embeds texts in `width` dimensions.

    `ff` is the feed-forward length (default: twice the width). The file appears whole or not at all, and equal
    arguments give equal bytes.
    """
    _make_bert(path, Size(width, layers, context, ff or 2 * width), seed)


def make_rerank_model(path: Path, *, width: int = 128, layers: int = 2, context: int = 512, seed: int = 1) -> None:
    """Write a BERT model with a classification head (pooling `rank`); its scores are made up."""

    def add_head(tensors: Tensors) -> None:
        _add_linear(tensors, "cls", width, width)
        _add_linear(tensors, "cls.output", 1, width, 3.0)

    _make_bert(path, Size(width, layers, context, 2 * width), seed, add_head)


# --- embed and rerank: BERT models with a WordPiece tokenizer


def _make_bert(path: Path, size: Size, seed: int, add_head: Callable[[Tensors], None] | None = None) -> None:
    """Write a BERT model: with mean pooling, or with the head that `add_head` adds (pooling `rank`)."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    starts = [WORD_START + text for text in (*letters, *(word for word in WORDS if len(word) > 1))]
    special: list[int] = [TokenType.CONTROL] * len(BERT_SPECIAL_TOKENS)
    special[UNKNOWN] = TokenType.UNKNOWN
    tokens = [*BERT_SPECIAL_TOKENS, *letters, *starts]
    with written(path, "bert") as writer:
        describe(
            writer, **sizes_of("tiny-rerank" if add_head else "tiny-embed", size, len(tokens)),
            file_type=LlamaFileType.ALL_F32, head_count=size.heads, layer_norm_eps=1e-12, causal_attention=False,
            pooling_type=gguf.PoolingType.RANK if add_head else gguf.PoolingType.MEAN, token_type_count=2,
            tokenizer_model="bert", tokenizer_pre="jina-v2-en", token_list=tokens,
            token_types=special + [TokenType.NORMAL] * len(letters + starts), pad_token_id=PAD, unk_token_id=UNKNOWN,
            mask_token_id=MASK, bos_token_id=START, eos_token_id=SEPARATOR, sep_token_id=SEPARATOR, add_bos_token=True,
            add_eos_token=True,
        )  # fmt: skip
        tensors = Tensors(writer, np.random.default_rng(seed), "f32")
        _add_bert_embeddings(tensors, len(tokens), size)
        for layer in range(size.layers):
            _add_bert_layer(tensors, f"blk.{layer}.", size)
        if add_head:
            add_head(tensors)


def _add_bert_embeddings(tensors: Tensors, token_count: int, size: Size) -> None:
    words = tensors.random.standard_normal((token_count, size.width), dtype=np.float32)
    words[[START, SEPARATOR]] = 0  # every text has them; they would make all texts alike
    tensors.matrix("token_embd.weight", words)
    tensors.matrix("token_types.weight", np.zeros((2, size.width), dtype=np.float32))
    positions = tensors.random.standard_normal((size.context, size.width), dtype=np.float32)
    tensors.matrix("position_embd.weight", positions * np.float32(0.02))
    _add_norm(tensors, "token_embd_norm", size.width)


def _add_bert_layer(tensors: Tensors, block: str, size: Size) -> None:
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        _add_linear(tensors, block + name, size.width, size.width, 0.3)
    _add_norm(tensors, block + "attn_output_norm", size.width)
    _add_linear(tensors, block + "ffn_up", size.feed_forward, size.width)
    _add_linear(tensors, block + "ffn_down", size.width, size.feed_forward, 0.2)
    _add_norm(tensors, block + "layer_output_norm", size.width)


def _add_linear(tensors: Tensors, name: str, outputs: int, inputs: int, scale: float = 1.0) -> None:
    """Random weights of a linear layer, and its bias of nothing."""
    tensors.noise(name + ".weight", outputs, inputs, scale)
    tensors.constant(name + ".bias", outputs, 0)


def _add_norm(tensors: Tensors, name: str, width: int) -> None:
    tensors.constant(name + ".weight", width, 1)
    tensors.constant(name + ".bias", width, 0)


@dataclass(frozen=True)
class Shape:
    """What a decoder's tensors are shaped by."""

    architecture: str
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head: int = 32
    feed_forward: int = 768
    vocabulary: int = 8192
    context: int = 32768
    is_tied: bool = False
    has_biases: bool = False
    has_head_norms: bool = False
    norms: tuple[str, ...] = ()
    window: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward: int = 0
    is_quantized: bool = False


# Decoders by the names that reports use.
SHAPES: Mapping[str, Shape] = {
    "llama": Shape("llama", width=512, layers=6, head=64, feed_forward=2048, vocabulary=32768),
    "llama-q8_0": Shape("llama", width=512, layers=4, head=64, feed_forward=1536, is_quantized=True),
    "llama-wide": Shape("llama", width=512, layers=3, head=64, feed_forward=8192, vocabulary=1024),
    "qwen2": Shape("qwen2", has_biases=True),
    "qwen3": Shape("qwen3", head=64, has_head_norms=True, is_tied=True),
    "qwen3-moe": Shape("qwen3moe", has_head_norms=True, experts=16, experts_used=4, expert_feed_forward=256),
    "gemma2": Shape("gemma2", layers=6, is_tied=True, norms=GEMMA_NORMS, window=4096),
    "gemma3": Shape(
        "gemma3", layers=12, head=64, vocabulary=16384, is_tied=True, has_head_norms=True, norms=GEMMA_NORMS,
        window=1024,
    ),
}  # fmt: skip
EMBEDDERS = ("bert", "bert-wide", "rerank")
NAMES = (*SHAPES, *EMBEDDERS)


def make_random_model(name: str, path: Path) -> None:
    """Writes the model of that name; equal names give equal bytes."""
    if name == "bert":
        make_embedding_model(path, width=384, layers=6, context=2048)
    elif name == "bert-wide":
        make_embedding_model(path, width=384, layers=6, context=512, ff=4 * 384)
    elif name == "rerank":
        make_rerank_model(path, width=384, layers=6, context=512)
    else:
        _Decoder(SHAPES[name]).write(path)


@dataclass
class _Decoder:
    """Writes one decoder."""

    shape: Shape
    writer: gguf.GGUFWriter = field(init=False)
    random: np.random.Generator = field(init=False)

    def write(self, path: Path) -> None:

        self.writer = gguf.GGUFWriter(path, self.shape.architecture)
        self.random = np.random.default_rng(1)
        self._describe()
        self._add_tokenizer()
        self._matrix("token_embd.weight", self.shape.vocabulary, self.shape.width)
        self._ones("output_norm.weight", self.shape.width)
        if not self.shape.is_tied:
            self._matrix("output.weight", self.shape.vocabulary, self.shape.width)
        for layer in range(self.shape.layers):
            self._add_attention(f"blk.{layer}.")
            self._add_feed_forward(f"blk.{layer}.")
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def _describe(self) -> None:

        shape, writer = self.shape, self.writer
        file_type = gguf.LlamaFileType.MOSTLY_Q8_0 if shape.is_quantized else gguf.LlamaFileType.MOSTLY_F16
        numbers: Mapping[str, Any] = {
            "context_length": shape.context, "embedding_length": shape.width, "block_count": shape.layers,
            "feed_forward_length": shape.feed_forward, "attention.head_count": shape.heads,
            "attention.head_count_kv": shape.kv_heads, "attention.key_length": shape.head,
            "attention.value_length": shape.head, "rope.dimension_count": shape.head,
            "attention.sliding_window": shape.window, "expert_count": shape.experts,
            "expert_used_count": shape.experts_used, "expert_feed_forward_length": shape.expert_feed_forward,
        }  # fmt: skip
        writer.add_name("random")
        writer.add_file_type(file_type)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        for name, number in numbers.items():
            if number:
                writer.add_uint32(f"{shape.architecture}.{name}", number)

    def _add_tokenizer(self) -> None:
        writer, count = self.writer, self.shape.vocabulary
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(code) for code in printable] + [chr(256 + place) for place in range(256 - len(printable))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*letters, *(f"w{number}" for number in range(count - len(letters) - 1)), "<end>"])
        writer.add_token_types([1] * (count - 1) + [3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(count - 1)
        writer.add_bos_token_id(count - 1)
        writer.add_add_bos_token(value=False)

    def _add_attention(self, block: str) -> None:
        shape = self.shape
        sizes = {"q": shape.heads * shape.head, "k": shape.kv_heads * shape.head, "v": shape.kv_heads * shape.head}
        self._ones(block + "attn_norm.weight", shape.width)
        for name, size in sizes.items():
            self._matrix(f"{block}attn_{name}.weight", size, shape.width)
            if shape.has_biases:
                self._ones(f"{block}attn_{name}.bias", size)
        self._matrix(block + "attn_output.weight", shape.width, sizes["q"])
        for name in ("attn_q_norm.weight", "attn_k_norm.weight") if shape.has_head_norms else ():
            self._ones(block + name, shape.head)
        for name in shape.norms:
            self._ones(block + name, shape.width)

    def _add_feed_forward(self, block: str) -> None:
        shape = self.shape
        self._ones(block + "ffn_norm.weight", shape.width)
        if not shape.experts:
            for name in ("gate", "up"):
                self._matrix(f"{block}ffn_{name}.weight", shape.feed_forward, shape.width)
            self._matrix(block + "ffn_down.weight", shape.width, shape.feed_forward)
            return
        self._matrix(block + "ffn_gate_inp.weight", shape.experts, shape.width)
        for name in ("gate", "up"):
            self._matrix(f"{block}ffn_{name}_exps.weight", shape.experts, shape.expert_feed_forward, shape.width)
        self._matrix(block + "ffn_down_exps.weight", shape.experts, shape.width, shape.expert_feed_forward)

    def _matrix(self, name: str, *shape: int) -> None:

        values = self.random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if self.shape.is_quantized:
            quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            self.writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            self.writer.add_tensor(name, values.astype(np.float16))

    def _ones(self, name: str, length: int) -> None:

        self.writer.add_tensor(name, np.ones(length, dtype=np.float32))
