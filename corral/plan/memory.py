"""What one llama-server takes, computed from what its model file says of itself. Pure.

Formulas follow llama.cpp as pinned: which tensors lie where, how cache cells are rounded, which intermediate results
are alive at the same time. `tools/bench_memory.py` compares them with llama-server's own reports
(docs/benchmarks/memory.json).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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


@dataclass(frozen=True, slots=True)
class Use:
    """How a model is served, as far as memory depends on it."""

    slots: int
    # Tokens of one slot.
    context: int
    batch: int
    ubatch: int
    cache_type: str = "f16"
    flash_attention: Literal["on", "off", "auto"] = "auto"
    # Layers on cards; 0: all of it in host memory.
    gpu_layers: int | Literal["all"] = "all"
    # Whether it gives vectors of all tokens instead of one next token (embedding and rerank servers).
    embeds: bool = False
    # Cards that it is split over.
    cards: int = 1


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

    @property
    def device(self) -> int:
        """Bytes on cards, without what the driver takes."""
        return self.weights + self.cache + self.state + self.compute + self.converted

    @property
    def host(self) -> int:
        """Bytes in host memory, mapped weights included."""
        return self.host_weights + self.host_cache + self.host_compute + self.output

    def locked(self, *, is_locked: bool) -> int:
        """Bytes of host memory that cannot be given back: mapped weights can, unless they are locked."""
        return self.host if is_locked else self.host - self.host_weights

    @property
    def total(self) -> int:
        """All of it."""
        return self.device + self.host

    def __add__(self, other: Memory) -> Memory:
        """Both, in one server."""
        return Memory(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def memory_of(model: Gguf, use: Use) -> Memory:
    """What a server takes with that model in that use."""
    offloaded = _offloaded(model, use)
    first = model.layers - offloaded
    is_on_card = offloaded > 0
    weights = _weights(model, use, first)
    caches = [_cache_bytes(model, use, layer) for layer in range(model.layers)]
    states = [_state_bytes(model, use, layer) for layer in range(model.layers)]
    compute = compute_bytes(model, use)
    everything = sum(model.layer_bytes) + model.input_bytes + model.output_bytes + model.other_bytes
    tied = model.input_bytes if _is_tied(model) and weights else 0
    return Memory(
        weights=weights,
        cache=sum(caches[first:]) if is_on_card else 0,
        state=sum(states[first:]) if is_on_card else 0,
        compute=compute * use.cards if is_on_card else 0,
        output=use.slots * (model.vocabulary if not use.embeds or model.is_causal else model.embedding) * FLOAT,
        host_weights=everything - weights + tied,
        host_cache=sum(caches[:first]) + sum(states[:first]),
        host_compute=_input_bytes(model, use) if is_on_card and not first else compute,
        converted=_converted(model, use) if is_on_card else 0,
    )


def _offloaded(model: Gguf, use: Use) -> int:
    """Layers on cards; llama.cpp takes the last ones."""
    return model.layers if use.gpu_layers == "all" else min(model.layers, use.gpu_layers)


def _weights(model: Gguf, use: Use, first: int) -> int:
    """Bytes of weights on cards: the last layers, and the output when one layer more is asked for."""
    if first == model.layers:
        return 0
    has_output = use.gpu_layers == "all" or use.gpu_layers > model.layers
    output = model.output_bytes + (model.input_bytes if _is_tied(model) else 0)
    return sum(model.layer_bytes[first:]) + model.other_bytes + (output if has_output else 0)


def _is_tied(model: Gguf) -> bool:
    """Whether the table that turns tokens into vectors also turns vectors into tokens; a card has its own copy."""
    return model.is_causal and model.output_bytes < model.vocabulary * model.embedding // 8


# --- caches ----------------------------------------------------------------------------------------------------------


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _cells(model: Gguf, use: Use, layer: int) -> int:
    """Cache cells of one layer for one slot."""
    full = _padded(use.context)
    if model.sliding and model.sliding[layer]:
        return min(full, _padded(model.sliding_window + use.ubatch))
    return full


def _cache_bytes(model: Gguf, use: Use, layer: int) -> int:
    """Bytes of one layer's K and V for all slots."""
    if not model.is_causal or _is_recurrent(model, layer):
        return 0
    each = BLOCK_BYTES[use.cache_type] * _cells(model, use, layer) * use.slots
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


def _state_bytes(model: Gguf, use: Use, layer: int) -> int:
    return model.state_bytes * use.slots if _is_recurrent(model, layer) else 0


def _converted(model: Gguf, use: Use) -> int:
    if use.cache_type in ("f16", "bf16", "f32") or not model.is_causal:
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
    if use.embeds and model.is_causal:
        phases.append(model.vocabulary * tokens * FLOAT + 5 * hidden)
    return _mask_bytes(model, use, tokens) + max(phases) + tokens * INDEX * 4


def _feed_forward_bytes(model: Gguf, tokens: int, hidden: int) -> int:
    """Gate, up and their product, with the vectors that wait beside them."""
    inner = max(model.feed_forward, default=0)
    if model.experts:
        inner = max(model.expert_feed_forward or inner, 1) * max(1, model.experts_used)
        chosen = hidden * max(1, model.experts_used)
        return max(3 * inner * tokens * FLOAT + 5 * hidden, inner * tokens * FLOAT + chosen + 5 * hidden)
    if not model.is_causal:
        return 2 * inner * tokens * FLOAT + 3 * hidden
    return 3 * inner * tokens * FLOAT + 5 * hidden


def _attention_bytes(model: Gguf, use: Use, tokens: int, hidden: int) -> int:
    """Queries, keys, values and what they give; without flash attention every head's scores as well."""
    widest = 0
    for layer in range(model.layers):
        key, value = _head_lengths(model, layer)
        queries = model.heads[layer] * key * tokens * FLOAT
        pairs = model.kv_heads[layer] * (key + value) * tokens * FLOAT
        turned = 4 if model.is_causal else 3
        scores = 0 if _has_flash(use) else model.heads[layer] * _pairs(model, use, layer, tokens) * FLOAT
        widest = max(widest, 2 * hidden + turned * queries + pairs + scores)
    return widest


def _has_flash(use: Use) -> bool:
    return use.flash_attention != "off"


def _pairs(model: Gguf, use: Use, layer: int, tokens: int) -> int:
    """Pairs of a new token and one that it looks at, in one physical batch over all slots."""
    if not model.is_causal:
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
