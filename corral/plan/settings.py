"""How a pool's servers are set: what every level of the inventory says, and the memory that follows from it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corral.config.inventory import Inventory, Model, ServerSettings
from corral.config.model_lock import Gguf, ModelLock
from corral.config.source import plain_yaml
from corral.errors import KeyPath
from corral.plan.memory import CARD_MIB, EXPERTS, MIB, Memory, Use, memory_of
from corral.plan.sizes import host_weights_mib, kv_cache_mib, replica_mib, weights_mib

DEFAULTS: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
# Least limit of a picture server in MiB; half of it is for the program.
PICTURES_MIB = 4096
# Kinds whose server refuses an input that does not fit into one physical batch (`--ubatch-size`).
WHOLE_INPUT = ("embedding", "rerank")
# Words of `extra_args` that leave the cache in host memory.
CACHE_ON_HOST = ("--no-kv-offload", "-nkvo")
# How GGUF files write that the last token's vector is the embedding.
LAST_POOLING = 3
# llama-server's own number of checkpoints for each slot, and the host memory that they may take.
CHECKPOINTS, CHECKPOINTS_MIB = 32, 1024


def merged_engine(inventory: Inventory, pool: str, card: str, gguf: Gguf | None = None) -> ServerSettings:
    """Engine settings of a pool on a kind of card: kind, card, model and pool have their say, in that order.

    What a known model file says of itself counts where they say nothing.
    """
    weights = inventory.models[inventory.pools[pool].model or ""]
    merged: dict[str, Any] = {**DEFAULTS["all"], **DEFAULTS[weights.kind], **weights.served_by.defaults}
    said: dict[str, Any] = {}
    for _, level in _engine_levels(inventory, pool, card):
        said.update({key: value for key, value in level if value is not None})
    if weights.kind in WHOLE_INPUT and not takes_parts(said.get("pooling"), gguf):
        merged |= {"batch": max(merged["batch"], weights.context), "ubatch": max(merged["ubatch"], weights.context)}
    return ServerSettings(**merged | said)


def takes_parts(pooling: str | None, gguf: Gguf | None) -> bool:
    """Whether an embedding server may take a long input in several physical batches: the last token's vector does."""
    return pooling == "last" if pooling else gguf is not None and gguf.pooling == LAST_POOLING


def with_flash_attention(engine: ServerSettings, gguf: Gguf | None) -> ServerSettings:
    """The settings with flash attention where llama-server's `auto` may turn it off for a model partly on a card.

    It does when attention and the rest of a layer lie apart, which hybrids lead to; scores then take 2 GiB and more.
    """
    is_partial = engine.gpu_layers not in (None, "all") or not set(CACHE_ON_HOST).isdisjoint(engine.extra_args or ())
    if engine.flash_attention == "auto" and is_partial and gguf is not None and any(gguf.recurrent):
        return engine.model_copy(update={"flash_attention": "on"})
    return engine


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
    weights: Model, lock: ModelLock, engine: ServerSettings, split: tuple[float, ...], draft: Model | None = None
) -> Memory | None:
    """What a server takes, from what its model files say; None while the lock does not know one of them.

    Args:
        weights: its model.
        lock: what is known of model files.
        engine: its settings.
        split: shares of its cards; none: it runs on the processor.
        draft: the model that drafts for it.
    """
    own = _memory_of_model(weights, lock, engine, split)
    if draft is None or weights.draft is None:
        return own
    settings = engine.model_copy(update={"gpu_layers": weights.draft.gpu_layers, "cpu_moe": None, "host_tensors": None})
    more = _memory_of_model(draft.model_copy(update={"context": weights.context}), lock, settings, split)
    return own + more if own and more else None


def _memory_of_model(
    weights: Model, lock: ModelLock, engine: ServerSettings, split: tuple[float, ...]
) -> Memory | None:
    gguf = gguf_of(weights, lock) if weights.served_by.reads_files else None
    if gguf is None:
        return None
    words = set(engine.extra_args or ())
    if "draft-mtp" in words:
        gguf = gguf.model_copy(update={"other_bytes": gguf.other_bytes + gguf.unused_bytes, "unused_bytes": 0})
    use = Use(
        slots=engine.slots or 1, context=weights.context, batch=engine.batch or 2048, ubatch=engine.ubatch or 512,
        cache_type=engine.cache_type or "f16", flash_attention=engine.flash_attention or "auto",
        gpu_layers=(engine.gpu_layers if engine.gpu_layers is not None else "all") if split else 0,
        embeds=weights.kind in WHOLE_INPUT, split=split or (1,), on_host=host_patterns(engine),
        is_unified=bool(engine.kv_unified), has_cache_on_cards=words.isdisjoint(CACHE_ON_HOST),
        is_window_ignored="--swa-full" in words,
    )  # fmt: skip
    return memory_of(gguf, use)


def host_patterns(engine: ServerSettings) -> tuple[str, ...]:
    """Patterns of tensors that stay in host memory."""
    layers, own = engine.cpu_moe, engine.host_tensors or ()
    if not layers:
        return own
    first = "" if layers == "all" else rf"blk\.({'|'.join(map(str, range(layers)))})"
    return (f"{first}{EXPERTS}", *own)


def checkpoints(engine: ServerSettings, memory: Memory | None) -> int | None:
    """States that each slot keeps in host memory; None when the model has none, or it is not known."""
    if memory is None or not memory.checkpoint:
        return None
    if engine.checkpoints is not None:
        return engine.checkpoints
    return max(1, min(CHECKPOINTS, CHECKPOINTS_MIB * MIB // (memory.checkpoint * (engine.slots or 1))))


def gguf_of(weights: Model, lock: ModelLock) -> Gguf | None:
    """What a model's file says of itself; further parts add their tensors, a projector and adapters their bytes.

    None while the lock does not know all of them.
    """
    files = [lock.get(weights.key(source)) for source in weights.sources]
    found = files[0].gguf if files[0] else None
    if found is None or len(files) == 1:
        return found
    if not all(known and known.size for known in files):
        return None
    for known in files[1:]:
        if known and known.gguf and not known.gguf.architecture:
            found = found.with_part(known.gguf)
    more = max(0, sum(known.size for known in files if known) - found.bytes)
    return found.model_copy(update={"other_bytes": found.other_bytes + more})


def card_mib(
    weights: Model, engine: ServerSettings, memory: Memory | None, draft: Model | None, split: tuple[float, ...]
) -> tuple[int, ...]:
    """MiB that a server takes on each of its cards: what its files say, else what their names do."""
    if memory is not None:
        return tuple(-(-size // MIB) + CARD_MIB if size else 0 for size in memory.cards) if split else ()
    is_on_card = draft is not None and weights.draft is not None and weights.draft.gpu_layers != 0
    more = _guessed_mib(draft, engine) if is_on_card else 0
    return shared_out(replica_mib(weights, engine) + more, split)


def shared_out(mib: int, split: tuple[float, ...]) -> tuple[int, ...]:
    """A size in MiB by shares of cards."""
    return tuple(round(mib * share / (sum(split) or 1)) for share in split)


def host_mib(
    weights: Model, engine: ServerSettings, memory: Memory | None, draft: Model | None, *, is_on_gpu: bool
) -> int:
    """Container limit in MiB: the program and its prompt cache, and all weights and caches that are not on cards."""
    if weights.kind == "image":
        # Weights pass through host memory on their way to the card; on the processor diffusers computes in 32 bits.
        times = 1 if is_on_gpu or weights.reads_files else 2
        return max(PICTURES_MIB, PICTURES_MIB // 2 + times * weights_mib(weights))
    least = {"chat": 2048}.get(weights.kind, 768) if is_on_gpu else 0
    if memory is not None:
        kept = (checkpoints(engine, memory) or 0) * memory.checkpoint * (engine.slots or 1)
        return max(least, -(-(memory.host + kept) // MIB) + 1024)
    if is_on_gpu:
        return least + host_weights_mib(weights, engine)
    return _guessed_mib(weights, engine) + _guessed_mib(draft, engine) + 1024


def _guessed_mib(model: Model | None, engine: ServerSettings) -> int:
    """Weights and cache of a model in MiB, from the name of its file."""
    if model is None:
        return 0
    return weights_mib(model) + kv_cache_mib(model, engine)
