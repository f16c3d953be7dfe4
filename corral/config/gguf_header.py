"""A GGUF file's header from any stream of bytes: a file, or the beginning of a download.

The `gguf` package reads whole files only and takes 17 s for a large vocabulary; of it, the tables of types are used.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corral.config.model_lock import Gguf

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ITEMS = 2**24
MAX_TEXT = 2**27
# Longer lists (tokens, merges, scores) are only counted.
KEPT_ITEMS = 4096
CHUNK = 1 << 20
FREE_TOKENS = 5

# Gives up to that many of the next bytes; empty at the end.
Read = Callable[[int], bytes]


class HeaderError(ValueError):
    """The bytes are no GGUF header; the message completes `the file …`."""


@dataclass(frozen=True, slots=True)
class Long:
    """A list that is only counted."""

    length: int
    # Checksum of a list of texts, from its sixth on.
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its name, its type in words, and how large it is."""

    name: str
    type: str
    elements: int
    bytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """Keys, values and tensors of a GGUF file."""

    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    data_start: int

    @property
    def file_size(self) -> int:
        """Bytes that the whole file must have at least."""
        return self.data_start + max((tensor.offset + tensor.bytes for tensor in self.tensors), default=0)


@dataclass(slots=True)
class _Stream:
    """Takes values off the beginning of a stream."""

    read: Read
    piece: io.BytesIO = field(default_factory=io.BytesIO)
    position: int = 0

    def take(self, length: int) -> bytes:
        if length > MAX_TEXT:
            raise HeaderError("has a text of impossible length in its header")
        taken = bytearray(self.piece.read(length))
        while len(taken) < length:
            piece = self.read(max(CHUNK, length - len(taken)))
            if not piece:
                raise HeaderError("ends inside its header")
            self.piece = io.BytesIO(piece)
            taken += self.piece.read(length - len(taken))
        self.position += length
        return bytes(taken)

    def number(self, code: str = "<Q") -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number()).decode(errors="replace")


# By the number of the type in the file; 8 is a text, 9 a list.
SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")
TEXT, LIST = 8, 9


def read_header(read: Read) -> Header:
    """The header of a GGUF file; raises HeaderError when the bytes are none."""
    stream = _Stream(read)
    if stream.take(4) != MAGIC:
        raise HeaderError("is not a GGUF file; llama.cpp reads no other format")
    version = stream.number("<I")
    if version not in VERSIONS:
        raise HeaderError(f"is GGUF version {version}; {' and '.join(map(str, VERSIONS))} can be read")
    tensors, keys = stream.number(), stream.number()
    if max(tensors, keys) > MAX_ITEMS:
        raise HeaderError("has an impossible number of tensors")
    values = {}
    for _ in range(keys):
        name = stream.text()
        values[name] = _value(stream, stream.number("<I"))
    found = tuple(_tensor(stream) for _ in range(tensors))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise HeaderError("has an impossible alignment")
    return Header(values, found, -(-stream.position // alignment) * alignment)


def _value(stream: _Stream, kind: int, depth: int = 0) -> Any:
    if kind == TEXT:
        return stream.text()
    if kind == LIST:
        return _list(stream, depth)
    if kind >= len(SCALARS):
        raise HeaderError(f"has a value of the unknown type {kind}")
    return stream.number(SCALARS[kind])


def _list(stream: _Stream, depth: int) -> Any:
    kind, length = stream.number("<I"), stream.number()
    if length > MAX_ITEMS or depth > 2:  # noqa: PLR2004 - no model nests lists
        raise HeaderError("has an impossible list")
    if length <= KEPT_ITEMS:
        return [_value(stream, kind, depth + 1) for _ in range(length)]
    if kind == TEXT:
        return Long(length, mark_of(stream.take(stream.number()) for _ in range(length)))
    if kind < len(SCALARS) and kind != LIST:
        size = struct.calcsize(SCALARS[kind])
        for start in range(0, length, CHUNK):
            stream.take(size * min(CHUNK, length - start))
    else:
        raise HeaderError("has an impossible list")
    return Long(length)


def _tensor(stream: _Stream) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = stream.text()
    dimensions = stream.number("<I")
    if dimensions > 8:  # noqa: PLR2004 - llama.cpp has four
        raise HeaderError(f"has an impossible tensor {name}")
    elements = 1
    for _ in range(dimensions):
        elements *= stream.number()
    kind, offset = stream.number("<I"), stream.number()
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise HeaderError(f"has a tensor of the unknown type {kind}") from None
    return Tensor(name, GGMLQuantizationType(kind).name, elements, elements // block * size, offset)


# --- what memory depends on ------------------------------------------------------------------------------------------

# Architectures whose pattern llama.cpp knows by itself: every n-th layer looks at everything, the others slide.
EVERY = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "gpt-oss": 2, "llama4": 4, "exaone4": 4, "olmo2": 4}
# Bytes of a number in a recurrent state.
FLOAT = 4


def facts_of(headers: Iterable[Header]) -> Gguf:
    """What a model says of itself; several headers are the parts of one that is split over files."""
    found = list(headers)
    values = found[0].values
    tensors = [tensor for header in found for tensor in header.tensors]
    architecture = str(values.get("general.architecture", ""))
    if not architecture:
        raise HeaderError("does not say its architecture")
    return _facts(_Keys(architecture, values), tensors)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Values of a header by their names without the architecture."""

    architecture: str
    values: Mapping[str, Any]

    def get(self, name: str, default: Any = 0) -> Any:
        return self.values.get(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: int = 0) -> int:
        value = self.get(name, default)
        value = max(value, default=0) if isinstance(value, list) else value
        return int(value) if isinstance(value, int | float) else default

    def each(self, name: str, layers: int, default: int = 0) -> tuple[int, ...]:
        value = self.get(name, default)
        if isinstance(value, list):
            return tuple(int(item) for item in [*value, *[0] * layers][:layers])
        return (int(value),) * layers


def _facts(keys: _Keys, tensors: Sequence[Tensor]) -> Gguf:
    shares = _shares(tensors, keys.number("block_count"))
    layers = len(shares.layers)
    heads = keys.each("attention.head_count", layers)
    kv_heads = keys.each("attention.head_count_kv", layers, max(heads, default=0))
    embedding = keys.number("embedding_length")
    head = embedding // max(1, *heads) if heads else 0
    window = keys.number("attention.sliding_window")
    recurrent = _recurrent(layers, {tensor.name for tensor in tensors})
    tokens = keys.values.get("tokenizer.ggml.tokens")
    latent = keys.number("attention.kv_lora_rank")
    return Gguf(
        architecture=keys.architecture,
        quantization=_quantization(keys.values.get("general.file_type"), tensors),
        parameters=sum(tensor.elements for tensor in tensors),
        context=keys.number("context_length"),
        vocabulary=_length(tokens) or keys.number("vocab_size"),
        tokens=_mark(tokens),
        embedding=embedding,
        feed_forward=keys.each("feed_forward_length", layers),
        heads=heads,
        kv_heads=kv_heads,
        key_length=keys.number("attention.key_length", head),
        value_length=keys.number("attention.value_length", head),
        key_length_sliding=keys.number("attention.key_length_swa"),
        value_length_sliding=keys.number("attention.value_length_swa"),
        sliding_window=window,
        sliding=_sliding(keys, layers) if window else (),
        latent=latent if keys.get("attention.key_length_mla") or not latent else 0,
        rope=keys.number("rope.dimension_count", head),
        recurrent=recurrent if any(recurrent) else (),
        state_bytes=_state_bytes(keys, embedding) if any(recurrent) else 0,
        experts=keys.number("expert_count"),
        experts_used=keys.number("expert_used_count"),
        expert_feed_forward=keys.number("expert_feed_forward_length"),
        is_causal=bool(keys.get("attention.causal", default=True)),
        input_bytes=shares.input,
        output_bytes=shares.output,
        layer_bytes=shares.layers,
        other_bytes=shares.other,
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    input: int
    output: int
    other: int
    layers: tuple[int, ...]


def _shares(tensors: Iterable[Tensor], blocks: int) -> _Shares:
    """Bytes of the weights by where llama.cpp puts them."""
    layers: dict[int, int] = defaultdict(int)
    input_bytes = output = other = 0
    for tensor in tensors:
        first, _, rest = tensor.name.partition(".")
        number = rest.partition(".")[0]
        if first == "blk" and number.isdecimal():
            layers[int(number)] += tensor.bytes
        elif first in ("token_embd", "token_types", "position_embd", "token_embd_norm", "per_layer_token_embd"):
            input_bytes += tensor.bytes
        elif first in ("output", "output_norm", "cls"):
            output += tensor.bytes
        else:
            other += tensor.bytes
    count = max([blocks, *(number + 1 for number in layers)])
    return _Shares(input_bytes, output, other, tuple(layers[number] for number in range(count)))


def _length(value: Any) -> int:
    return value.length if isinstance(value, Long) else len(value) if isinstance(value, list) else 0


def mark_of(texts: Iterable[bytes]) -> str:
    """Checksum of texts from the sixth on: those before are control tokens, which may differ (as llama.cpp has it)."""
    found = hashlib.sha256()
    for text in itertools.islice(texts, FREE_TOKENS, None):
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()


def _mark(tokens: Any) -> str:
    if isinstance(tokens, Long):
        return tokens.mark
    return mark_of(str(token).encode() for token in tokens) if isinstance(tokens, list) else ""


def _quantization(file_type: Any, tensors: Sequence[Tensor]) -> str:
    """The name of the file's mixture, else the type of most of its weights."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        by_type: Counter[str] = Counter()
        for tensor in tensors:
            by_type[tensor.type] += tensor.bytes
        return by_type.most_common(1)[0][0] if by_type else ""


def _sliding(keys: _Keys, layers: int) -> tuple[int, ...]:
    """Which layers have a sliding window: the file says it layer by layer or as a period, or llama.cpp knows."""
    pattern = keys.get("attention.sliding_window_pattern", EVERY.get(keys.architecture, 1))
    if isinstance(pattern, list):
        return tuple(int(bool(item)) for item in [*pattern, *[0] * layers][:layers])
    every = int(pattern)
    return tuple(int(every <= 1 or index % every < every - 1) for index in range(layers))


def _recurrent(layers: int, names: set[str]) -> tuple[int, ...]:
    """Which layers keep a state instead of a cache: those that have the tensors of one."""
    marks = ("ssm_conv1d.weight", "ssm_a", "time_mix_w1.weight", "shortconv.conv.weight")
    return tuple(int(any(f"blk.{layer}.{mark}" in names for mark in marks)) for layer in range(layers))


def _state_bytes(keys: _Keys, embedding: int) -> int:
    """Bytes of one recurrent layer's state: of its convolution and of the state itself, as llama.cpp counts them."""
    head = keys.number("wkv.head_size")
    if head:
        return FLOAT * (2 * embedding + embedding * head)
    short = keys.number("shortconv.l_cache")
    if short:
        return FLOAT * embedding * (short - 1)
    inner, state, groups = (keys.number(f"ssm.{name}") for name in ("inner_size", "state_size", "group_count"))
    convolution = max(0, keys.number("ssm.conv_kernel") - 1) * (inner + 2 * groups * state)
    return FLOAT * (convolution + state * inner)
