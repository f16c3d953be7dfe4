"""Keys and their changes, as tables for people and as data for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from corral.build import Plan
from corral.config.client_names import all_aliases
from corral.gateway.keys import NO_MODELS, KeyChange, words_of
from corral.tables import new_table
from corral.verbs.keys.gateway import USAGE
from corral.verbs.keys.keys import FOLDER, USAGE_DAYS

# A key as `listed` returns it.
Row = dict[str, Any]
STYLES = {"create": "green", **dict.fromkeys(("update", "adopt", "replace"), "yellow")}
STYLES |= dict.fromkeys(("revoke", "taken"), "red")


def changes_as_data(plan: Plan, out: Path, changes: Iterable[KeyChange]) -> list[dict[str, Any]]:
    """For programs: what is or would be done about each key."""
    return [
        {
            "action": change.action,
            "name": change.name,
            "changes": {
                name: {"from": _jsonable(old), "to": _jsonable(new)} for name, (old, new) in change.changes.items()
            },
            "file": _file_of(plan, out, change),
        }
        for change in changes
    ]


def _jsonable(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _file_of(plan: Plan, out: Path, change: KeyChange) -> str | None:
    is_in_file = change.wanted is not None and not change.wanted.value and not change.is_lost
    if not is_in_file or change.action in {"expired", "taken"}:
        return None
    return str(out / plan.inventory.gateway.host / FOLDER / change.name)


def show_changes(plan: Plan, out: Path, changes: Sequence[KeyChange], console: Console, talk: Console) -> None:
    """For people: a line for every key that changes or needs attention."""
    kept = [change for change in changes if change.action == "keep"]
    for change in changes:
        words = "; ".join(words_of(change))
        if change.action == "create":
            words = _file_of(plan, out, change) or f"from {change.wanted.secret if change.wanted else ''}"
        if change.action != "keep":
            style = STYLES.get(change.action, "dim")
            console.print(Text.assemble((f"{change.action:>8}", style), f"  {change.name}  {words}"))
    for change in changes:
        if change.is_lost and change.action in {"keep", "update", "adopt"}:
            words = f"{change.name}: its key is not in the files here (it stays valid; keys rotate makes a new one)"
            talk.print(Text(words, style="yellow"))
    if len(kept) == len(changes):
        words = f"nothing to do: {len(kept)} keys are as in the inventory"
        talk.print(words if kept else "the inventory has no consumers")


def show_keys(plan: Plan, rows: Iterable[Row], console: Console) -> None:
    """A table of all keys; aliases are left out, as a key for a pool is a key for its aliases."""
    table = new_table("key", "by", "opens", "per minute", ">at once", ">USD", ">of", "until", "state")
    aliases = all_aliases(plan.inventory)
    for row in rows:
        limits = row["limits"]
        models = [name for name in row["pools"] if name not in aliases]
        table.add_row(
            escape(row["name"] or row["key"]), "sync" if row["managed"] else "hand",
            "metrics" if models == [NO_MODELS] else "\n".join(map(escape, models)) or "all pools",
            "\n".join(f"{limits[name]} {unit}" for name, unit in (("rpm", "req"), ("tpm", "tok")) if limits[name]),
            str(limits["parallel"] or ""), f"{row['spend_usd']:.4f}", _budget(row), _minute(row["expires"]),
            row["state"],
        )  # fmt: skip
    console.print(table)


def show_spend(rows: Sequence[Row], console: Console) -> None:
    """A table of the spending of keys, and of their requests and tokens in the last days."""
    table = new_table("key", ">spent, USD", ">budget, USD", "resets", ">requests", ">tokens in", ">tokens out")
    for row in rows:
        resets = row["budget"]["resets"]
        until = f"{_minute(resets)} UTC" if resets else ""
        counts = (f"{count:,}" for count in row["usage_30d"].values())
        table.add_row(escape(row["name"] or row["key"]), f"{row['spend_usd']:.6f}", _budget(row), until, *counts)
    table.add_section()
    keys = [row for row in rows if "token" in row]  # the others are teams, whose spending is that of their keys
    sums = (f"{sum(row['usage_30d'][name] for row in keys):,}" for name in USAGE)
    table.add_row("total", f"{sum(row['spend_usd'] for row in keys):.6f}", "", "", *sums)
    console.print(table)
    console.print(
        f"requests and tokens: of the last {USAGE_DAYS} days, both lanes; LiteLLM writes them every few seconds"
    )


def _budget(row: Row) -> str:
    budget = row["budget"]["max_usd"]
    return "" if budget is None else f"{budget:g}"


def _minute(moment: str | None) -> str:
    return (moment or "")[:16].replace("T", " ")
