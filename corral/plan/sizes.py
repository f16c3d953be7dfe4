"""Rough sizes in MiB, for models whose file was not read yet: declared, else from the words in the file's name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from corral.config.inventory import Model, ServerSettings
from corral.config.source import plain_yaml
from corral.plan.memory import BLOCK_BYTES

USUAL: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
# Cache of one token at 16 bits in small models: 28 layers, 8 KV heads of 128 (Qwen3 0.6B, Llama 3.2 3B).
KV_KIB_PER_TOKEN = 112.0
# Cache of one token at 16 bits, times the root of the billions: 128 KiB at 8B, 256 at 32B, 376 at 70B (really 320).
KV_KIB_PER_TOKEN_AND_ROOT = 45.0
# Size of a billion parameters, where only the size of the file is known.
MIB_PER_BILLION = 700
# What reads images, with the buffers in which it works; usual for models of 3 to 30 billion parameters.
PROJECTOR_MIB = 1024
# A LoRA adapter; usual for rank 16 to 32 of models of 7 to 14 billion parameters.
ADAPTER_MIB = 128
# Parameters of 8x7B are fewer than 56 billion: attention is there only once.
EXPERTS_SHARE = 0.83
# Of a mixture of experts, the experts' share of the weights; usual from 20 billion parameters on.
EXPERTS_WEIGHTS = 0.95
# Layers of most mixtures of experts, which are wide.
MOE_LAYERS = 48
# Layers of a model: about 31 at 8 billion parameters, 55 at 32, 78 at 70.
LAYERS, LAYERS_POWER = 12.5, 0.43

_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d{1,2})?)([bm])(?![a-z0-9])", re.IGNORECASE)
_QUANTIZATION = re.compile(r"(?<![a-z0-9])(iq[1-4]|tq[12]|q[2-8]|mxfp4|bf16|fp16|f16|f32)(?![0-9])", re.IGNORECASE)


def billions(model: Model) -> float | None:
    """Parameters in billions as the file's name tells, or None."""
    found = _PARAMETERS.search(model.file) or _PARAMETERS.search(model.source)
    if not found:
        return None
    experts, number, unit = found.groups()
    each = float(number) / (1000 if unit in "mM" else 1)
    return int(experts) * each * EXPERTS_SHARE if experts else each


def weights_mib(model: Model) -> int:
    """Size of the weights: declared, else parameters times bits, else the usual size of the kind."""
    if model.size_gib is not None:
        return round(model.size_gib * 1024)
    projector = PROJECTOR_MIB if model.projector else 0
    return _estimated_mib(model) + projector + ADAPTER_MIB * len(model.adapters)


def _estimated_mib(model: Model) -> int:
    parameters, quantization = billions(model), _QUANTIZATION.search(model.file)
    if parameters is None:
        return round(float(USUAL["gib"][model.kind]) * 1024)
    bits = USUAL["bits_per_weight"][quantization.group(1).lower()] if quantization else 16.0
    return round(parameters * 1e9 * bits / 8 / 1024**2)


def kv_cache_mib(model: Model, engine: ServerSettings) -> int:
    """Size of the K and V cache for all slots; embedding, rerank and image models keep none worth counting."""
    if model.kind != "chat":
        return 0
    parameters = billions(model) or weights_mib(model) / MIB_PER_BILLION
    of_type = BLOCK_BYTES[engine.cache_type or "f16"] / 2
    kib = max(KV_KIB_PER_TOKEN, KV_KIB_PER_TOKEN_AND_ROOT * math.sqrt(parameters)) * of_type
    return round(kib * model.context * (1 if engine.kv_unified else engine.slots or 1) / 1024)


def host_weights_mib(model: Model, engine: ServerSettings) -> int:
    """Weights that stay in host memory, by the share of layers: all layers are taken for equal."""
    layers = max(1, round(LAYERS * (billions(model) or weights_mib(model) / MIB_PER_BILLION) ** LAYERS_POWER))
    off = 0 if engine.gpu_layers in (None, "all") else max(0, 1 - int(engine.gpu_layers or 0) / layers)
    experts = 0.0
    if engine.cpu_moe is not None:
        experts = EXPERTS_WEIGHTS * (1 if engine.cpu_moe == "all" else min(1, engine.cpu_moe / min(layers, MOE_LAYERS)))
    return round(weights_mib(model) * max(off, experts))


def replica_mib(model: Model, engine: ServerSettings) -> int:
    """What one replica takes on its cards: weights, cache, overhead."""
    weights = weights_mib(model) - host_weights_mib(model, engine)
    return weights + kv_cache_mib(model, engine) + int(USUAL["overhead_mib"][model.kind])


def worst(sizes: Iterable[int], count: int) -> int:
    """What the largest so many take together."""
    return sum(sorted(sizes, reverse=True)[:count])
