"""How a pool's servers are set: what every level of the inventory says, and the memory that follows from it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corral.config.inventory import Inventory, Model, ServerSettings
from corral.config.model_lock import Gguf, ModelLock
from corral.config.source import plain_yaml
from corral.errors import KeyPath
from corral.plan.memory import CARD_MIB, MIB, Memory, Use, memory_of
from corral.plan.sizes import kv_cache_mib, replica_mib, weights_mib

DEFAULTS: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
# Least limit of a picture server in MiB; half of it is for the program.
PICTURES_MIB = 4096
# Kinds whose server refuses an input that does not fit into one physical batch (`--ubatch-size`).
WHOLE_INPUT = ("embedding", "rerank")


def merged_engine(inventory: Inventory, pool: str, card: str) -> ServerSettings:
    """Engine settings of a pool on a kind of card: kind, card, model and pool have their say, in that order."""
    weights = inventory.models[inventory.pools[pool].model or ""]
    merged: dict[str, Any] = {**DEFAULTS["all"], **DEFAULTS[weights.kind], **weights.served_by.defaults}
    if weights.kind in WHOLE_INPUT:
        merged |= {"batch": max(merged["batch"], weights.context), "ubatch": max(merged["ubatch"], weights.context)}
    for _, level in _engine_levels(inventory, pool, card):
        merged.update({key: value for key, value in level if value is not None})
    return ServerSettings(**merged)


def engine_place(inventory: Inventory, pool: str, card: str, key: str) -> KeyPath:
    """Where in the inventory an engine setting is said, or would be said for the pool alone."""
    places = [path for path, level in _engine_levels(inventory, pool, card) if getattr(level, key) is not None]
    return (*(places[-1] if places else ("pools", pool, "engine")), key)


def _engine_levels(inventory: Inventory, pool: str, card: str) -> Iterator[tuple[KeyPath, ServerSettings]]:
    """What the inventory says about a pool's engine on a kind of card, and where; the last word counts."""
    model = inventory.pools[pool].model or ""
    weights = inventory.models[model]
    if weights.kind in inventory.defaults:
        yield ("defaults", weights.kind), inventory.defaults[weights.kind]
    if card in inventory.cards:
        yield ("cards", card, "engine"), inventory.cards[card].engine
    yield ("models", model, "engine"), weights.engine
    yield ("pools", pool, "engine"), inventory.pools[pool].engine


# --- memory ----------------------------------------------------------------------------------------------------------


def draft_of(inventory: Inventory, weights: Model) -> Model | None:
    """The model that drafts for another, as it is served: with the other's context."""
    if weights.draft is None:
        return None
    return inventory.models[weights.draft.model].model_copy(update={"context": weights.context, "draft": None})


def memory_of_replica(
    weights: Model, lock: ModelLock, engine: ServerSettings, cards: int, draft: Model | None = None
) -> Memory | None:
    """What a server takes, from what its model files say; None while the lock does not know one of them."""
    own = _memory_of_model(weights, lock, engine, cards)
    if draft is None or weights.draft is None:
        return own
    settings = engine.model_copy(update={"gpu_layers": weights.draft.gpu_layers})
    more = _memory_of_model(draft.model_copy(update={"context": weights.context}), lock, settings, cards)
    return own + more if own and more else None


def _memory_of_model(weights: Model, lock: ModelLock, engine: ServerSettings, cards: int) -> Memory | None:
    gguf = gguf_of(weights, lock) if weights.reads_files else None
    if gguf is None:
        return None
    use = Use(
        slots=engine.slots or 1, context=weights.context, batch=engine.batch or 2048, ubatch=engine.ubatch or 512,
        cache_type=engine.cache_type or "f16", flash_attention=engine.flash_attention or "auto",
        gpu_layers=(engine.gpu_layers if engine.gpu_layers is not None else "all") if cards else 0,
        embeds=weights.kind in WHOLE_INPUT, cards=max(1, cards),
    )  # fmt: skip
    return memory_of(gguf, use)


def gguf_of(weights: Model, lock: ModelLock) -> Gguf | None:
    """What a model's file says of itself; the first of several speaks, further parts and a projector add bytes.

    None while the lock does not know all of them.
    """
    files = [lock.get(weights.key(source)) for source in weights.sources]
    first = files[0].gguf if files[0] else None
    if first is None or len(files) == 1:
        return first
    if not all(known and known.size for known in files):
        return None
    spoken = sum(first.layer_bytes) + first.input_bytes + first.output_bytes + first.other_bytes
    more = max(0, sum(known.size for known in files if known) - spoken)
    return first.model_copy(update={"other_bytes": first.other_bytes + more})


def vram_mib(weights: Model, engine: ServerSettings, memory: Memory | None, draft: Model | None, cards: int) -> int:
    """MiB that a server takes on all its cards together: what its files say, else what their names do."""
    if memory is not None:
        return -(-memory.device // MIB) + CARD_MIB * cards
    is_on_card = draft is not None and weights.draft is not None and weights.draft.gpu_layers != 0
    more = _guessed_mib(draft, engine) if is_on_card else 0
    return replica_mib(weights, engine.slots or 1, engine.cache_type or "f16") + more


def host_mib(
    weights: Model, engine: ServerSettings, memory: Memory | None, draft: Model | None, *, is_on_gpu: bool
) -> int:
    """Container limit in MiB: the program and its prompt cache; on the CPU the weights and the KV cache as well."""
    if weights.kind == "image":
        # Weights pass through host memory on their way to the card; on the processor diffusers computes in 32 bits.
        times = 1 if is_on_gpu or weights.reads_files else 2
        return max(PICTURES_MIB, PICTURES_MIB // 2 + times * weights_mib(weights))
    if is_on_gpu:
        return 2048 if weights.kind == "chat" else 768
    if memory is not None:
        return -(-memory.host // MIB) + 1024
    return _guessed_mib(weights, engine) + _guessed_mib(draft, engine) + 1024


def _guessed_mib(model: Model | None, engine: ServerSettings) -> int:
    """Weights and cache of a model in MiB, from the name of its file."""
    if model is None:
        return 0
    return weights_mib(model) + kv_cache_mib(model, engine.slots or 1, engine.cache_type or "f16")
