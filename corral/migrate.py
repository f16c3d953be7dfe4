"""Older inventories brought to the present format, one small step for each version."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from corral.errors import Problem, SiteError
from corral.inventory import SCHEMA_VERSION
from corral.yamlsource import Source

Step = Callable[[dict[str, Any]], dict[str, Any]]

STEPS: dict[int, Step] = {}
"""`STEPS[n]` turns the data of version n into version n + 1; each has a fixture pair in tests/migrate."""


def migrate(
    data: dict[str, Any], source: Source, steps: Mapping[int, Step] | None = None, to: int = SCHEMA_VERSION
) -> dict[str, Any]:
    """A copy of the data in the present format; raises SiteError when its version is newer or unknown.

    A version that is missing or no whole number is left for the validator, which finds everything else as well.
    """
    version = data.get("schema_version")
    migrated = copy.deepcopy(data)
    if type(version) is not int:
        return migrated
    known = STEPS if steps is None else steps
    if version > to:
        words = f"this inventory is written for a newer corral (version {version}); this one knows up to {to}"
        raise SiteError([source.locate(Problem(words, ("schema_version",), "update corral"))])
    for number in range(version, to):
        if number not in known:
            words = f"there is no schema_version {version}"
            raise SiteError([source.locate(Problem(words, ("schema_version",), f"the present one is {to}"))])
        migrated = {**known[number](migrated), "schema_version": number + 1}
    return migrated
