"""What one llama-server takes, computed from what its model file says of itself. Pure.

Formulas follow llama.cpp as pinned: which tensors lie where, how cache cells are rounded, which intermediate results
are alive at the same time. tests/processes/test_accounting.py compares them with llama.cpp's own accounting, of which
no card and no weights are needed; `tools/bench_memory.py` with the buffers of a running server.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, zip_longest
from typing import Literal

from corral.config.model_lock import Gguf

MIB = 1 << 20
# Cache cells come in multiples of this.
CELLS = 256
FLOAT, HALF, INDEX = 4, 2, 8
# Bytes of one number in the cache, with its share of the block's scales.
BLOCK_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "iq4_nl": 18 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip
# One process on one NVIDIA card before any model: context, kernels, cuBLAS workspaces.
CARD_MIB = 420
# What `--n-cpu-moe` leaves in host memory, as llama.cpp names it.
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
# Models that look in both directions and keep no cache; not all of them say it in their file.
BOTH_WAYS = re.compile(r"bert|^gemma-embedding|^llama-embed$|^t5encoder$")
# Of them, those that cannot turn vectors into tokens.
ENCODERS = re.compile(r"bert|^t5encoder$")
# With several cards and all layers on them, llama.cpp works on this many batches at once: so many copies of what goes
# in, and twelve more vectors between layers.
COPIES, HIDDEN_COPIES = 4, 12


@dataclass(frozen=True, slots=True)
class Use:
    """How a model is served, as far as memory depends on it."""

    slots: int
    # Tokens of one slot; with `is_unified`, of all of them together.
    context: int
    batch: int
    ubatch: int
    cache_type: str = "f16"
    flash_attention: Literal["on", "off", "auto"] = "auto"
    # Layers on cards, the output counted as one more as `--n-gpu-layers` does; 0: all of it in host memory.
    gpu_layers: int | Literal["all"] = "all"
    # Whether it gives vectors of all tokens instead of one next token (embedding and rerank servers).
    embeds: bool = False
    # Shares of the cards that it is split over (`--tensor-split`).
    split: tuple[float, ...] = (1,)
    # Patterns of tensors that stay in host memory (`--override-tensor`).
    on_host: tuple[str, ...] = ()
    # Whether all slots share one context.
    is_unified: bool = False
    # Whether the cache is on the cards as the layers are.
    has_cache_on_cards: bool = True
    # Whether layers with a sliding window keep everything.
    is_window_ignored: bool = False

    @property
    def streams(self) -> int:
        """Caches that are kept apart."""
        return 1 if self.is_unified else self.slots


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one server, by what they are for."""

    weights: int
    cache: int
    state: int
    compute: int
    output: int
    host_weights: int
    host_cache: int
    host_compute: int
    # A quantized cache turned to 16 bits for one layer, while attention works.
    converted: int
    # What a slot remembers of one moment of its conversation: states, and caches of sliding windows.
    checkpoint: int = 0
    # Bytes on each card, without what the driver takes.
    cards: tuple[int, ...] = ()

    @property
    def device(self) -> int:
        """Bytes on cards, without what the driver takes."""
        return self.weights + self.cache + self.state + self.compute + self.converted

    @property
    def host(self) -> int:
        """Bytes in host memory, mapped weights included."""
        return self.host_weights + self.host_cache + self.host_compute + self.output

    def locked(self, *, is_mapped: bool) -> int:
        """Bytes of host memory that cannot be given back: weights that are only mapped can."""
        return self.host - self.host_weights if is_mapped else self.host

    @property
    def total(self) -> int:
        """All of it."""
        return self.device + self.host

    def __add__(self, other: Memory) -> Memory:
        """Both, in one server."""
        sums = [getattr(self, item.name) + getattr(other, item.name) for item in fields(self) if item.name != "cards"]
        return replace(Memory(*sums), cards=tuple(map(sum, zip_longest(self.cards, other.cards, fillvalue=0))))


def memory_of(model: Gguf, use: Use) -> Memory:
    """What a server takes with that model in that use."""
    places, parts = _places(model, use), [_part(model, use, layer) for layer in range(model.layers)]
    *of_layers, end = places
    on_cards = [(card, part) for card, part in zip(of_layers, parts, strict=True) if card is not None]
    used = sorted({card for card in places if card is not None})
    output = _output_bytes(model) if end is not None else 0
    weights = sum(part.weights for _, part in on_cards) + output
    cached = [part for _, part in on_cards] if use.has_cache_on_cards else []
    cache, state = sum(part.cache for part in cached), sum(part.state for part in cached)
    everything = sum(model.layer_bytes) + model.input_bytes + model.output_bytes + model.other_bytes
    tied = _table_bytes(model) if _is_tied(model) and end is not None else 0
    compute, is_whole = compute_bytes(model, use), None not in places
    pipelined = _pipelined(model, use) if is_whole else 0
    converted = _converted(model, use) if on_cards else 0
    copied = _copied(model, of_layers, parts) if used else 0
    cards = [(compute + pipelined + converted) * (card in used) for card in range(len(use.split))]
    for card, part in on_cards:
        cards[card] += part.weights + (part.cache + part.state) * use.has_cache_on_cards
    if end is not None:
        cards[end] += output
    if used:
        cards[used[0]] += copied
    return Memory(
        weights=weights,
        cache=cache,
        state=state,
        compute=(compute + pipelined) * len(used) + copied,
        output=use.slots * (model.vocabulary if not use.embeds or is_causal(model) else model.embedding) * FLOAT,
        host_weights=everything - weights + tied,
        host_cache=sum(part.cache + part.state for part in parts) - cache - state,
        host_compute=_input_bytes(model, use) + pipelined if is_whole else compute,
        converted=converted * len(used),
        checkpoint=sum(part.checkpoint for part in parts) // use.slots,
        cards=tuple(cards),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of one layer."""

    # Weights on the card where the layer is, and those of it that stay in host memory, the largest first.
    weights: int
    kept: tuple[int, ...]
    cache: int
    state: int
    # Of cache and state what a checkpoint has.
    checkpoint: int


def _part(model: Gguf, use: Use, layer: int) -> _Part:
    kept = tuple(sorted(_on_host(model, use, layer), reverse=True))
    cache, state = _cache_bytes(model, use, layer), model.state_bytes * use.slots * _is_recurrent(model, layer)
    is_sliding = bool(model.sliding and model.sliding[layer])
    return _Part(model.layer_bytes[layer] - sum(kept), kept, cache, state, state + cache * is_sliding)


def _on_host(model: Gguf, use: Use, layer: int) -> Iterator[int]:
    """Bytes of a layer's tensors that stay in host memory whatever is on cards."""
    for name, sizes in model.tensors.items() if use.on_host else ():
        if sizes[layer] and any(re.search(pattern, f"blk.{layer}.{name}") for pattern in use.on_host):
            yield sizes[layer]


def _places(model: Gguf, use: Use) -> list[int | None]:
    """The card of every layer, and of the output after them; None: in host memory. llama.cpp takes the last ones."""
    count = model.layers + model.unused_layers + 1
    chosen = count if use.gpu_layers == "all" else min(count, use.gpu_layers)
    total = sum(use.split)
    ends = [end / total for end in accumulate(use.split)]
    cards = [min(bisect_right(ends, place / chosen), len(ends) - 1) for place in range(chosen)]
    found = [*[None] * (count - chosen), *cards]
    return [*found[: model.layers], found[-1]]


def _output_bytes(model: Gguf) -> int:
    """Bytes of what turns vectors into tokens, and of tensors that are of no layer."""
    return model.output_bytes + model.other_bytes + (_table_bytes(model) if _is_tied(model) else 0)


def _table_bytes(model: Gguf) -> int:
    """Bytes of the table that turns tokens into vectors."""
    return model.table_bytes or model.input_bytes


def _is_tied(model: Gguf) -> bool:
    """Whether the table that turns tokens into vectors also turns vectors into tokens; a card has its own copy."""
    has_output = not ENCODERS.search(model.architecture)
    return has_output and model.output_bytes < model.vocabulary * model.embedding // 8


def is_causal(model: Gguf) -> bool:
    """Whether a model keeps a cache of what it read; those that look in both directions keep none."""
    return model.is_causal and not BOTH_WAYS.search(model.architecture)


def _copied(model: Gguf, places: Sequence[int | None], parts: Sequence[_Part]) -> int:
    """Bytes of weights in host memory that llama.cpp copies onto the first card, one tensor after the other.

    With experts in every layer and a recurrent state in some, two of those that `on_host` means are there at a time.
    """
    has_experts = any(all(sizes) for name, sizes in model.tensors.items() if "_exps" in name)
    count = 2 if any(model.recurrent) and has_experts else 1
    kept = [sum(part.kept[:count]) if place is not None else 0 for place, part in zip(places, parts, strict=True)]
    far = [_largest(model, layer) for layer, place in enumerate(places) if place is None]
    return max([*kept, *far], default=0)


def _largest(model: Gguf, layer: int) -> int:
    """Bytes of a layer's largest tensor; a third of the layer where its tensors are not known."""
    return max((sizes[layer] for sizes in model.tensors.values()), default=model.layer_bytes[layer] // 3)


def _pipelined(model: Gguf, use: Use) -> int:
    """Bytes more on each of several cards that have all of a model, for batches that are worked on at the same time."""
    if len(use.split) == 1 or use.on_host or not use.has_cache_on_cards:
        return 0
    tokens = min(use.ubatch, use.batch)
    return (COPIES - 1) * _mask_bytes(model, use, tokens) + HIDDEN_COPIES * model.embedding * tokens * FLOAT


# --- caches ----------------------------------------------------------------------------------------------------------


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _cells(model: Gguf, use: Use, layer: int) -> int:
    """Cache cells of one layer for one slot, or for all of them when they share a context."""
    full = _padded(use.context)
    if model.sliding and model.sliding[layer] and not use.is_window_ignored:
        windows = use.slots if use.is_unified else 1
        return min(full, _padded(model.sliding_window * windows + use.ubatch))
    return full


def _cache_bytes(model: Gguf, use: Use, layer: int) -> int:
    """Bytes of one layer's K and V for all slots."""
    if not is_causal(model) or _is_recurrent(model, layer) or layer >= model.layers - model.shared_caches:
        return 0
    each = BLOCK_BYTES[use.cache_type] * _cells(model, use, layer) * use.streams
    if model.latent:
        return round(each * (model.latent + model.rope))
    key, value = _head_lengths(model, layer)
    return round(each * model.kv_heads[layer] * (key + value))


def _head_lengths(model: Gguf, layer: int) -> tuple[int, int]:
    if model.sliding and model.sliding[layer]:
        return model.key_length_sliding or model.key_length, model.value_length_sliding or model.value_length
    return model.key_length, model.value_length


def _is_recurrent(model: Gguf, layer: int) -> bool:
    return bool(model.recurrent and model.recurrent[layer])


def _converted(model: Gguf, use: Use) -> int:
    if use.cache_type in ("f16", "bf16", "f32") or not is_causal(model):
        return 0
    widest = max((model.kv_heads[layer] * sum(_head_lengths(model, layer)) for layer in range(model.layers)), default=0)
    return widest * _padded(use.context) * HALF


# --- intermediate results --------------------------------------------------------------------------------------------


def compute_bytes(model: Gguf, use: Use) -> int:
    """The compute buffer: inputs, and the most that is alive at one time between two layers."""
    tokens = min(use.ubatch, use.batch)
    hidden = model.embedding * tokens * FLOAT
    phases = [
        _attention_bytes(model, use, tokens, hidden),
        _feed_forward_bytes(model, tokens, hidden),
    ]
    if use.embeds and is_causal(model):
        phases.append(model.vocabulary * tokens * FLOAT + 5 * hidden)
    return _mask_bytes(model, use, tokens) + max(phases) + tokens * INDEX * 4


def _feed_forward_bytes(model: Gguf, tokens: int, hidden: int) -> int:
    """Gate, up and their product, with the vectors that wait beside them."""
    inner = max(model.feed_forward, default=0)
    if model.experts:
        inner = max(model.expert_feed_forward or inner, 1) * max(1, model.experts_used)
        chosen = hidden * max(1, model.experts_used)
        return max(3 * inner * tokens * FLOAT + 5 * hidden, inner * tokens * FLOAT + chosen + 5 * hidden)
    if not is_causal(model):
        return 2 * inner * tokens * FLOAT + 3 * hidden
    return 3 * inner * tokens * FLOAT + 5 * hidden


def _attention_bytes(model: Gguf, use: Use, tokens: int, hidden: int) -> int:
    """Queries, keys, values and what they give; without flash attention every head's scores as well."""
    widest = 0
    for layer in range(model.layers):
        key, value = _head_lengths(model, layer)
        queries = model.heads[layer] * key * tokens * FLOAT
        pairs = model.kv_heads[layer] * (key + value) * tokens * FLOAT
        turned = 4 if is_causal(model) else 3
        scores = 0 if _has_flash(use) else model.heads[layer] * _pairs(model, use, layer, tokens) * FLOAT
        widest = max(widest, 2 * hidden + turned * queries + pairs + scores)
    return widest


def _has_flash(use: Use) -> bool:
    return use.flash_attention != "off"


def _pairs(model: Gguf, use: Use, layer: int, tokens: int) -> int:
    """Pairs of a new token and one that it looks at, in one physical batch over all slots."""
    if not is_causal(model):
        return tokens * tokens
    return _cells(model, use, layer) * tokens


def _mask_bytes(model: Gguf, use: Use, tokens: int) -> int:
    """Who may look at whom: one mask for full attention, one for sliding windows."""
    size = HALF if _has_flash(use) else FLOAT
    sorts = {(bool(model.sliding and model.sliding[layer])): layer for layer in range(model.layers)}
    if model.recurrent and all(model.recurrent):
        return 0
    return sum(_pairs(model, use, layer, tokens) * size for layer in sorts.values())


def _input_bytes(model: Gguf, use: Use) -> int:
    """What stays in pinned host memory when all layers are on cards: masks and token vectors."""
    tokens = min(use.ubatch, use.batch)
    return _mask_bytes(model, use, tokens) + 2 * model.embedding * tokens * FLOAT
