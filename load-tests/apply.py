"""`bench apply`: writes measured limits into the inventory and leaves the rest of the file unchanged."""

from __future__ import annotations

import difflib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corral.config.source import parse
from corral.errors import CorralError, UsageError
from corral.files import write_atomically
from corral.whatif.measured import RESULT_FILE

BASES = ("safe", "n-1", "knee")


def proposals(folder: Path, basis: str, *, with_tokens: bool = False) -> dict[str, dict[str, Any]]:
    """New settings of each pool of a run; raises CorralError for pools from which no limit can be derived.

    Args:
        folder: the run.
        basis: `knee`, `safe` or `n-1`, the rate that becomes the limit.
        with_tokens: whether tokens a minute are limited, too.
    """
    if basis not in BASES:
        raise UsageError(f"--basis {basis}: one of {', '.join(BASES)}")
    result = json.loads((folder / RESULT_FILE).read_text())
    found = {}
    for pool, item in result["pools"].items():
        capacity = item["capacity"]
        rates = {"knee": capacity["knee_rpm"], "safe": capacity["safe_rpm"], "n-1": capacity["survives_rpm"]}
        rate = min(rates["safe"], rates["n-1"] or 0) if basis == "n-1" else rates[basis]
        rpm = math.floor(rate or 0)
        if rpm < 1:
            why = "it has one replica" if basis == "n-1" and rates["n-1"] is None else "no step held"
            raise CorralError(f"{pool}: no limit above zero follows from run {folder.name} ({why})")
        limits: dict[str, Any] = {"rpm": rpm}
        if with_tokens:
            limits["tpm"] = max(1, math.floor(rpm * capacity["tokens_per_request"]))
        limits["measured"] = {"run": result["run"], "basis": basis, "mark": item["mark"]}
        queue = {"depth": capacity["queue_depth"], "timeout_s": capacity["queue_timeout_s"]}
        found[pool] = {"limits": limits, "queue": queue, "timeout_s": capacity["timeout_s"]}
    return found


def with_proposals(text: str, wanted: Mapping[str, Mapping[str, Any]]) -> str:
    """An inventory's text with these settings of its pools; comments and order stay."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(text)
    for pool, settings in wanted.items():
        _merge(data["pools"][pool], settings)
    buffer = io.StringIO()
    yaml.dump(data, buffer)
    return buffer.getvalue()


def _merge(there: Any, wanted: Mapping[str, Any]) -> None:
    from ruamel.yaml.comments import CommentedMap

    for key, value in wanted.items():
        if not isinstance(value, Mapping):
            there[key] = value
            continue
        if key not in there:
            there[key] = CommentedMap()
            there[key].fa.set_flow_style()
        _merge(there[key], value)


def apply(inventory: Path, folder: Path, basis: str, *, with_tokens: bool, is_written: bool) -> str:
    """The change as a diff; written on request, and only if the inventory stays valid."""
    from corral.config.load import validate

    old = inventory.read_text(encoding="utf-8")
    new = with_proposals(old, proposals(folder, basis, with_tokens=with_tokens))
    validate(parse(new, str(inventory)))
    if is_written and new != old:
        write_atomically(inventory, new.encode(), inventory.stat().st_mode & 0o777)
    lines = (old.splitlines(keepends=True), new.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*lines, str(inventory), f"{inventory} (run {folder.name})"))
