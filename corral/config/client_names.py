"""Names that clients may call beside the pools' own: aliases, names that wait, names of editors, names of `auto`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from corral.config.inventory import Adapter, Inventory, Kind
from corral.config.source import plain_yaml
from corral.errors import KeyPath

# Default model names of editors, SDKs and published examples.
EDITOR_NAMES: Mapping[Kind, list[str]] = plain_yaml(Path(__file__).with_name("editor_names.yaml").read_bytes())


def kinds_of(inventory: Inventory, pool: str) -> tuple[Kind, ...]:
    """What a pool does; more than one thing only where the inventory is wrong, nothing where it is incomplete."""
    found = inventory.pools[pool]
    models = [inventory.models[found.model].kind] if found.model in inventory.models else []
    nodes = [node.kind for place in found.on if (node := inventory.node_of(place))]
    return tuple(dict.fromkeys([*models, *nodes]))


def kind_of(inventory: Inventory, pool: str) -> Kind | None:
    """What a pool does; None when nothing in the inventory says it."""
    return next(iter(kinds_of(inventory, pool)), None)


def aliases_of(inventory: Inventory, pool: str) -> tuple[str, ...]:
    """Further names of a pool, or of `auto`, each once: its own, then the names of editors that no other pool has."""
    auto = inventory.gateway.auto
    if auto is not None and pool == auto.name:
        return auto.aliases
    if pool not in inventory.pools:
        return ()
    found = inventory.pools[pool]
    kind = kind_of(inventory, pool)
    own = (*found.aliases, *found.background, *(name for name, _ in _adapters(inventory, pool)))
    if not found.editor_names or kind is None:
        return own
    claimed = {name for name, _, _ in routed_names(inventory)} | set(inventory.pools)
    return (*own, *(name for name in EDITOR_NAMES[kind] if name not in claimed))


def adapter_name(pool: str, adapter: Adapter) -> str:
    """The name under which clients call a pool with one of its model's adapters in force."""
    return f"{pool}:{adapter.name}"


def _adapters(inventory: Inventory, pool: str) -> Iterator[tuple[str, KeyPath]]:
    """Names of a pool's adapters, and where each stands."""
    model = inventory.pools[pool].model or ""
    if model in inventory.models:
        for index, adapter in enumerate(inventory.models[model].adapters):
            yield adapter_name(pool, adapter), ("models", model, "adapters", index, "name")


def all_aliases(inventory: Inventory) -> dict[str, str]:
    """What every further name leads to: a pool, or the name of `auto`."""
    auto = inventory.gateway.auto
    names = [*inventory.pools, *([auto.name] if auto else [])]
    return {alias: name for name in names for alias in aliases_of(inventory, name)}


def added_models(inventory: Inventory) -> Iterator[tuple[str, KeyPath]]:
    """Names of the models that `gateway.extra` adds, and where each stands."""
    models = inventory.gateway.extra.get("model_list")
    for index, item in enumerate(models if isinstance(models, list) else ()):
        name = item.get("model_name") if isinstance(item, Mapping) else None
        if isinstance(name, str):
            yield name, ("gateway", "extra", "model_list", index, "model_name")


def routed_names(inventory: Inventory) -> Iterator[tuple[str, str, KeyPath]]:
    """Every further name that the inventory writes out: the name, what it leads to, and where it stands."""
    for pool_name, pool in inventory.pools.items():
        for key in ("aliases", "background"):
            for index, alias in enumerate(getattr(pool, key)):
                yield alias, pool_name, ("pools", pool_name, key, index)
        for name, path in _adapters(inventory, pool_name):
            yield name, pool_name, path
    auto = inventory.gateway.auto
    if auto is not None:
        yield auto.name, auto.name, ("gateway", "auto", "name")
        for index, alias in enumerate(auto.aliases):
            yield alias, auto.name, ("gateway", "auto", "aliases", index)


def poller_key(name: str) -> str:
    """The name of the secret with which a poller fetches jobs."""
    return f"JOBS_POLLER_{re.sub('[._-]', '_', name).upper()}"
