"""Tables for people: one look for every command."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def new_table(*columns: str, is_compact: bool = False) -> Table:
    """An empty table with these columns; `>` in front of a heading is for numbers, `!` for text that is never broken.

    A compact one is for what is redrawn: wide gaps, no frame, and text that is too long ends with an ellipsis.
    """
    look: dict[str, Any] = {"show_edge": False, "padding": (0, 2, 0, 0)} if is_compact else {}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", **look)
    for column in columns:
        marks = column[: len(column) - len(column.lstrip(">!"))]
        table.add_column(
            column.lstrip(">!"),
            justify="right" if ">" in marks else "left",
            no_wrap="!" in marks,
            overflow="ellipsis" if is_compact else "fold",
        )
    return table
