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
OF: dict[str, float] = USUAL["numbers"]
_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d{1,2})?)([bm])(?![a-z0-9])", re.IGNORECASE)
_QUANTIZATION = re.compile(r"(?<![a-z0-9])(iq[1-4]|tq[12]|q[2-8]|mxfp4|bf16|fp16|f16|f32)(?![0-9])", re.IGNORECASE)


def billions(model: Model) -> float | None:
    """Parameters in billions as the file's name tells, or None."""
    found = _PARAMETERS.search(model.file) or _PARAMETERS.search(model.source)
    if not found:
        return None
    experts, number, unit = found.groups()
    each = float(number) / (1000 if unit in "mM" else 1)
    return int(experts) * each * OF["experts_share"] if experts else each


def weights_mib(model: Model) -> int:
    """Size of the weights: declared, else parameters times bits, else the usual size of the kind."""
    if model.size_gib is not None:
        return round(model.size_gib * 1024)
    projector = int(OF["projector_mib"]) if model.projector else 0
    return _estimated_mib(model) + projector + int(OF["adapter_mib"]) * len(model.adapters)


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
    parameters = billions(model) or weights_mib(model) / OF["mib_per_billion"]
    of_type = BLOCK_BYTES[engine.cache_type or "f16"] / 2
    kib = max(OF["kv_kib_least"], OF["kv_kib_per_root"] * math.sqrt(parameters)) * of_type
    return round(kib * model.context * (1 if engine.kv_unified else engine.slots or 1) / 1024)


def host_weights_mib(model: Model, engine: ServerSettings) -> int:
    """Weights that stay in host memory, by the share of layers: all layers are taken for equal."""
    parameters = billions(model) or weights_mib(model) / OF["mib_per_billion"]
    layers = max(1, round(OF["layers"] * math.pow(parameters, OF["layers_power"])))
    off = 0 if engine.gpu_layers in (None, "all") else max(0, 1 - int(engine.gpu_layers or 0) / layers)
    most = min(layers, OF["moe_layers"])
    share = min(1, (most if engine.cpu_moe == "all" else engine.cpu_moe or 0) / most)
    return round(weights_mib(model) * max(off, OF["experts_weights"] * share))


def replica_mib(model: Model, engine: ServerSettings) -> int:
    """What one replica takes on its cards: weights, cache, overhead."""
    weights = weights_mib(model) - host_weights_mib(model, engine)
    return weights + kv_cache_mib(model, engine) + int(USUAL["overhead_mib"][model.kind])


def worst(sizes: Iterable[int], count: int) -> int:
    """What the largest so many take together."""
    return sum(sorted(sizes, reverse=True)[:count])
