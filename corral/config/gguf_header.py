"""A GGUF file's header from any stream of bytes: a file, or the beginning of a download.

The `gguf` package reads whole files only and takes 17 s for a large vocabulary; of it, the tables of types are used.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.config.model_lock import Gguf
from corral.config.source import plain_yaml

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ITEMS = 2**24
MAX_TEXT = 2**27
# No model nests lists; llama.cpp's tensors have four dimensions.
MAX_DEPTH, MAX_DIMENSIONS = 2, 8
# Longer lists (scores, types of tokens) are only counted, and lists of texts (tokens, merges).
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

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            return self._list(depth)
        if kind >= len(SCALARS):
            raise HeaderError(f"has a value of the unknown type {kind}")
        return self.number(SCALARS[kind])

    def _list(self, depth: int) -> Any:
        kind, length = self.number("<I"), self.number()
        if length > MAX_ITEMS or depth > MAX_DEPTH or (length > KEPT_ITEMS and kind == LIST):
            raise HeaderError("has an impossible list")
        if kind == TEXT:
            return Long(length, mark_of(self.take(self.number()) for _ in range(length)))
        if length <= KEPT_ITEMS or kind >= len(SCALARS):
            return [self.value(kind, depth + 1) for _ in range(length)]
        for start in range(0, length, CHUNK):
            self.take(struct.calcsize(SCALARS[kind]) * min(CHUNK, length - start))
        return Long(length)


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
    values = {stream.text(): stream.value(stream.number("<I")) for _ in range(keys)}
    found = tuple(_tensor(stream) for _ in range(tensors))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise HeaderError("has an impossible alignment")
    return Header(values, found, -(-stream.position // alignment) * alignment)


def _tensor(stream: _Stream) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dimensions = stream.text(), stream.number("<I")
    if dimensions > MAX_DIMENSIONS:
        raise HeaderError(f"has an impossible tensor {name}")
    elements = math.prod(stream.number() for _ in range(dimensions))
    kind, offset = stream.number("<I"), stream.number()
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise HeaderError(f"has a tensor of the unknown type {kind}") from None
    return Tensor(name, GGMLQuantizationType(kind).name, elements, elements // block * size, offset)


def mark_of(texts: Iterable[bytes]) -> str:
    """Checksum of texts from the sixth on: those before are control tokens, which may differ (as llama.cpp has it)."""
    found = hashlib.sha256()
    for text in itertools.islice(texts, FREE_TOKENS, None):
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()


# --- what memory depends on ------------------------------------------------------------------------------------------

KEYS: dict[str, Any] = plain_yaml(Path(__file__).with_name("gguf_keys.yaml").read_bytes())
# Bytes of a number in a recurrent state.
FLOAT = 4


def facts_of(header: Header) -> Gguf:
    """What a model says of itself; a later part of a split one has tensors only, and no architecture.

    Raises:
        HeaderError: it does not say its architecture.
    """
    architecture = str(header.values.get("general.architecture", ""))
    if not architecture and not header.values.get("split.no"):
        raise HeaderError("does not say its architecture")
    keys = _Keys(architecture, header.values)
    numbers: dict[str, Any] = {name: keys.number(key) for name, key in KEYS["numbers"].items()}
    shares = _shares(header.tensors, keys)
    layers = len(shares["layer_bytes"])
    heads = keys.each("attention.head_count", layers)
    head = numbers["embedding"] // max(1, *heads) if heads else 0
    names = {tensor.name for tensor in header.tensors}
    recurrent = tuple(int(any(f"blk.{layer}.{mark}" in names for mark in KEYS["recurrent"])) for layer in range(layers))
    latent = keys.number("attention.kv_lora_rank")
    found = header.values.get("tokenizer.ggml.tokens")
    tokens = found if isinstance(found, Long) else Long(0)
    return Gguf(
        architecture=architecture,
        quantization=_quantization(header),
        parameters=sum(tensor.elements for tensor in header.tensors),
        vocabulary=tokens.length or keys.number("vocab_size"),
        tokens=tokens.mark,
        feed_forward=keys.each("feed_forward_length", layers),
        heads=heads,
        kv_heads=keys.each("attention.head_count_kv", layers, max(heads, default=0)),
        key_length=keys.number("attention.key_length", head),
        value_length=keys.number("attention.value_length", head),
        sliding=_sliding(keys, layers) if numbers["sliding_window"] else (),
        latent=latent if keys.get("attention.key_length_mla") or not latent else 0,
        rope=keys.number("rope.dimension_count", head),
        recurrent=recurrent if any(recurrent) else (),
        state_bytes=_state_bytes(keys, numbers["embedding"]),
        is_causal=bool(keys.get("attention.causal", default=True)),
        **numbers,
        **shares,
    )


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


def _shares(tensors: Iterable[Tensor], keys: _Keys) -> dict[str, Any]:
    """Bytes of the weights by where llama.cpp puts them; layers that only predict further tokens are left out."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    others: Counter[str] = Counter(input_bytes=0, output_bytes=0, other_bytes=0, table_bytes=0)
    for tensor in tensors:
        first, _, rest = tensor.name.partition(".")
        number, _, name = rest.partition(".")
        if first == "blk" and number.isdecimal():
            found[name][int(number)] += tensor.bytes
        else:
            where = "input" if first in KEYS["inputs"] else "output" if first in KEYS["outputs"] else "other"
            others[f"{where}_bytes"] += tensor.bytes
            others["table_bytes"] += tensor.bytes if first == "token_embd" else 0
    count = max([keys.number("block_count"), *(number + 1 for sizes in found.values() for number in sizes)])
    unused = keys.number("nextn_predict_layers")
    layers = range(count - unused)
    per_layer = {name: tuple(sizes[layer] for layer in layers) for name, sizes in sorted(found.items())}
    used = {name: sizes for name, sizes in per_layer.items() if any(sizes)}
    layer_bytes = tuple(map(sum, zip(*used.values(), strict=True))) or (0,) * len(layers)
    left_out = sum(size for sizes in found.values() for size in sizes.values()) - sum(layer_bytes)
    return {**others, "layer_bytes": layer_bytes, "tensors": used, "unused_layers": unused, "unused_bytes": left_out}


def _quantization(header: Header) -> str:
    """The name of the file's mixture, else the type of most of its weights."""
    from gguf import LlamaFileType

    with suppress(ValueError):
        name = LlamaFileType(header.values.get("general.file_type", -1)).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    by_type: Counter[str] = Counter()
    for tensor in header.tensors:
        by_type[tensor.type] += tensor.bytes
    return by_type.most_common(1)[0][0] if by_type else ""


def _sliding(keys: _Keys, layers: int) -> tuple[int, ...]:
    """Which layers have a sliding window: the file says it layer by layer or as a period, or llama.cpp knows."""
    pattern = keys.get("attention.sliding_window_pattern", KEYS["every"].get(keys.architecture, 1))
    if isinstance(pattern, list):
        return tuple(int(bool(item)) for item in [*pattern, *[0] * layers][:layers])
    every = int(pattern)
    return tuple(int(every <= 1 or index % every < every - 1) for index in range(layers))


def _state_bytes(keys: _Keys, embedding: int) -> int:
    """Bytes of one recurrent layer's state: of its convolution and of the state itself, as llama.cpp counts them."""
    if head := keys.number("wkv.head_size"):
        return FLOAT * (2 * embedding + embedding * head)
    if short := keys.number("shortconv.l_cache"):
        return FLOAT * embedding * (short - 1)
    inner, state, groups = (keys.number(f"ssm.{name}") for name in ("inner_size", "state_size", "group_count"))
    convolution = max(0, keys.number("ssm.conv_kernel") - 1) * (inner + 2 * groups * state)
    return FLOAT * (convolution + state * inner)
