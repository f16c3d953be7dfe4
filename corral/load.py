"""An inventory file in, a validated Inventory out, or every problem at once with its place and remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from corral.errors import CorralError, Problem, SiteError, shown
from corral.inventory import Inventory
from corral.migrate import migrate
from corral.model_lock import LOCK_FILE, ModelLock, lock_of, read_lock
from corral.validation import problems_of
from corral.yamlsource import Source, parse, read_source

START = "start from inventory.yaml"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid inventory together with the text it came from."""

    inventory: Inventory
    source: Source
    lock: ModelLock = field(default_factory=ModelLock)
    """What is known of the model files."""


def load_inventory(path: Path) -> Loaded:
    """The inventory of a file, with the lock beside it; raises SiteError with all its problems, located."""
    return replace(validate(read_source(path)), lock=read_lock(lock_of(path)))


def load_texts(inventory: bytes, lock: bytes | None, name: str) -> Loaded:
    """Like load_inventory, from what a backup or a bundle has of the two files; `name` is the inventory's place."""
    loaded = validate(parse(inventory.decode("utf-8", errors="replace"), name))
    try:
        return replace(loaded, lock=ModelLock.model_validate_json(lock)) if lock is not None else loaded
    except ValidationError:
        raise CorralError(f"{LOCK_FILE} beside the inventory cannot be read; did a newer corral make it?") from None


def validate(source: Source) -> Loaded:
    """Like load_inventory, from YAML that has been read."""
    if source.data is None:
        raise SiteError([Problem("the file is empty", hint=START, file=source.file)])
    if not isinstance(source.data, dict):
        words = f"an inventory is a mapping (key: value), not {shown(source.data)}"
        raise SiteError([source.locate(Problem(words, hint=START))])
    data = migrate(source.data, source)
    try:
        return Loaded(Inventory.model_validate(data), source)
    except ValidationError as error:
        raise SiteError(_once(source.locate(problem) for problem in problems_of(error))) from None


def _once(problems: Iterable[Problem]) -> Iterable[Problem]:
    """Problems without those that say the same of the same place: equal cards are one line of the file."""
    return {(problem.line, problem.column, problem.message): problem for problem in problems}.values()
