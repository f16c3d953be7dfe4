"""Where each model file lies: by the one rule that servers, `models`, doctor and bundles share.

A file keeps the place that the lock says. Others get the plain name of their file in the models folder, or, where two
would have the same name, a folder of their own there.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from corral.config.file_names import file_of
from corral.config.inventory import OWN_FOLDER, Host, Inventory, Model
from corral.config.model_lock import LockedFile, ModelLock

SHORT = 12
COMMIT = re.compile(r"[0-9a-f]{40}")


def model_paths(models: Iterable[Model], lock: ModelLock) -> dict[str, str]:
    """Path in a models folder of every file that is named by itself, by what the lock calls it."""
    # Every group of files with one folder, once: what the lock calls them, and their sources.
    sources = {tuple(map(model.key, group)): group for model in models if model.reads_files for group in model.groups}
    groups = [dict(zip(keys, group, strict=True)) for keys, group in sources.items()]
    claims = _claims(groups, lock)
    found: dict[str, str] = {}
    for group in groups:
        known = {key: item.file for key in group if (item := lock.get(key))}
        if len(known) == len(group) and not any(_is_taken(claims, key, file, lock) for key, file in known.items()):
            found |= known
        else:
            names = {key: _plain(source) for key, source in group.items()}
            is_shared = any(claims[name] - {key} for key, name in names.items())
            key, source = next(iter(group.items()))
            # A source that is a path says where the file is.
            folder = _folder(key, source) if is_shared and ":" in source else ""
            found |= {key: folder + name for key, name in names.items()}
    return found


def _plain(source: str) -> str:
    """Where a file lies that has its name for itself."""
    return file_of(source) if ":" in source else source


def _claims(groups: Iterable[Mapping[str, str]], lock: ModelLock) -> Mapping[str, set[str]]:
    """Which files would have a path in a models folder, or have it by the lock."""
    claims: dict[str, set[str]] = defaultdict(set)
    for key, source in (item for group in groups for item in group.items()):
        claims[_plain(source)].add(key)
        if known := lock.get(key):
            claims[known.file].add(key)
    return claims


def _is_taken(claims: Mapping[str, set[str]], key: str, path: str, lock: ModelLock) -> bool:
    """Whether the path that the lock has for a file is that of another content, or a source in itself."""
    own = lock.files[key]
    for other in claims[path] - {key}:
        known = lock.get(other)
        if known is None and ":" in key and ":" not in other:
            return True
        if known and known.file == path and (not own.sha256 or own.sha256 != known.sha256):
            return True
    return False


def _folder(key: str, source: str) -> str:
    """The folder of a file whose name another one has as well: that of its repository and revision, or its source."""
    if not source.startswith("hf:"):
        return f"{source.partition(':')[0]}--{hashlib.sha256(source.encode()).hexdigest()[:SHORT]}/"
    revision = key.removeprefix(source).removeprefix("@")
    short = revision[:SHORT] if COMMIT.fullmatch(revision) else revision.replace("/", "--")
    repository = "--".join(source.removeprefix("hf:").partition(":")[0].split("/")[:2])
    return f"{repository}--{short}/" if short else f"{repository}/"


def path_on(host: str, facts: Host, known: LockedFile | None, own: str) -> str:
    """Path of a file on a host: below its models folder, or a whole path in a store that has the file.

    Args:
        host: the host's name.
        facts: what the inventory says of it.
        known: what the lock knows of the file.
        own: its path in a models folder.
    """
    store, _, path = known.places.get(host, "").partition("/") if known else ("", "", "")
    if store == OWN_FOLDER:
        return path
    return f"{facts.model_stores[store]}/{path}" if store in facts.model_stores else own


def with_files_of_tags(inventory: Inventory, lock: ModelLock) -> Inventory:
    """The inventory with the file that the lock has for every source that names a quantization instead of a file.

    Picture models from files get the size that the lock knows, where the inventory says none.
    """
    return inventory.model_copy(
        update={"models": {key: _known(model, lock) for key, model in inventory.models.items()}}
    )


def _known(model: Model, lock: ModelLock) -> Model:
    if found := dict(_tagged(model, lock)):
        model = model.model_copy(update=found)
    if model.kind != "image" or model.size_gib is not None or not model.reads_files:
        return model
    sizes = [known.size if (known := lock.get(model.key(source))) else 0 for source in model.sources]
    return model.model_copy(update={"size_gib": sum(sizes) / 2**30}) if all(sizes) else model


def _tagged(model: Model, lock: ModelLock) -> Iterator[tuple[str, Any]]:
    if any(model.key(source) in lock.tags for source in model.components.values()):
        yield "components", {role: lock.tags.get(model.key(item), item) for role, item in model.components.items()}
    for field in ("source", "projector"):
        source = getattr(model, field)
        if source and (file := lock.tags.get(model.key(source))):
            yield field, file
    if any(model.key(adapter.source) in lock.tags for adapter in model.adapters):
        sources = ((item, lock.tags.get(model.key(item.source), item.source)) for item in model.adapters)
        yield "adapters", tuple(item.model_copy(update={"source": source}) for item, source in sources)
