"""An inventory file in, a validated Inventory out, or every problem at once with its place and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from corral.config.image_lock import IMAGE_LOCK, ImageLock
from corral.config.inventory import SCHEMA_VERSION, Inventory
from corral.config.messages import FOREIGN, problems_of
from corral.config.model_lock import ModelLock
from corral.config.source import Source, parse, read_source
from corral.errors import Finding, SiteError, shown

START = "write one with: ./generate.py init --output NEW.yaml"
# Files beside the inventory that belong to it.
LOCKS = (ModelLock.file_name, IMAGE_LOCK)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid inventory together with the text it came from."""

    inventory: Inventory
    source: Source
    # What is known of the model files.
    lock: ModelLock = field(default_factory=ModelLock)
    # Which content the images have.
    image_lock: ImageLock = field(default_factory=ImageLock)


def load_inventory(path: Path) -> Loaded:
    """The inventory of a file, with the locks beside it; raises SiteError with all its problems, located."""
    return _with_locks(read_source(path), path)


def load_text(text: str, path: Path) -> Loaded:
    """Like load_inventory, from another text than the file has now."""
    return _with_locks(parse(text, str(path)), path)


def _with_locks(source: Source, path: Path) -> Loaded:
    loaded = validate(source)
    return replace(
        loaded, lock=ModelLock.read(ModelLock.beside(path)), image_lock=ImageLock.read(ImageLock.beside(path))
    )


def locks_beside(path: Path) -> dict[str, bytes]:
    """The locks that lie beside an inventory, by their names."""
    return {name: place.read_bytes() for name in LOCKS if (place := path.parent / name).is_file()}


def load_texts(inventory: bytes, files: Mapping[str, bytes], name: str) -> Loaded:
    """Like load_inventory, from what a backup or a bundle has: the inventory, and `files` with the locks among them.

    Args:
        inventory: its text.
        files: content by name; the locks are looked for among them.
        name: the inventory's place, for messages.
    """
    lock, image_lock = (files.get(name, b"{}") for name in LOCKS)
    return replace(
        validate(parse(inventory.decode("utf-8", errors="replace"), name)),
        lock=ModelLock.parsed(lock, Path(ModelLock.file_name)),
        image_lock=ImageLock.parsed(image_lock, Path(IMAGE_LOCK)),
    )


def validate(source: Source) -> Loaded:
    """Like load_inventory, from YAML that has been read."""
    if source.data is None:
        raise SiteError([Finding("the file is empty", remedy=START, file=source.file)])
    if not isinstance(source.data, dict):
        words = f"an inventory is a mapping (key: value), not {shown(source.data)}"
        raise SiteError([source.locate(Finding(words, remedy=START))])
    _check_version(source)
    _refuse_other_files(source)
    try:
        return Loaded(Inventory.model_validate(source.data), source)
    except ValidationError as error:
        found = map(source.locate, problems_of(error))
        # Equal cards are one line of the file: what says the same of the same place is said once.
        raise SiteError({(item.line, item.column, item.message): item for item in found}.values()) from None


def _refuse_other_files(source: Source) -> None:
    """Raises SiteError for a file of another program, which `import` reads."""
    key = next((key for key in source.data if key in FOREIGN["files"]), None)
    if key and not {"schema_version", "hosts"} & {*source.data}:
        words = f"this is {FOREIGN['files'][key]} and no inventory"
        remedy = f"carry it over with: ./generate.py import {source.file} --output NEW.yaml"
        raise SiteError([source.locate(Finding(words, (key,), remedy))])


def _check_version(source: Source) -> None:
    """Raises SiteError for an inventory of another format; what is no whole number is left for the validator."""
    version = source.data.get("schema_version")
    if type(version) is not int or version == SCHEMA_VERSION:
        return
    words, hint = f"there is no schema_version {version}", f"the present one is {SCHEMA_VERSION}"
    if version > SCHEMA_VERSION:
        words = f"this inventory is written for a newer corral (version {version}); "
        words, hint = words + f"this one knows up to {SCHEMA_VERSION}", "update corral"
    raise SiteError([source.locate(Finding(words, ("schema_version",), hint))])
