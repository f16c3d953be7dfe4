"""Tables for people: one look for every command."""

from __future__ import annotations

from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.table import Table


def new_table(*columns: str, right: Collection[str] = ()) -> Table:
    """An empty table with these columns; those in `right` are aligned to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
