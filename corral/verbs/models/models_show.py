"""Model files as a person and as a program read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.verbs.models.models import Row

STYLES = {
    "verified": "green", "there": "", "not pinned": "yellow", "missing": "yellow",
    "wrong size": "red", "damaged": "bold red", "unknown": "dim",
}  # fmt: skip
WORDS = {
    "verified": "verified",
    "there": "there, not verified since",
    "not pinned": "there, not pinned",
    "missing": "not there",
    "wrong size": "wrong size",
    "damaged": "DAMAGED",
    "unknown": "no pool uses it",
}
REMEDY = {
    "not pinned": "pin it with: ./generate.py models pull",
    "missing": "fetch it with: ./generate.py models pull",
    "wrong size": "fetch it again with: ./generate.py models pull",
    "damaged": "fetch it again with: ./generate.py models pull; if it comes back, test the disk and the memory",
}


def show_rows(found: Sequence[Row], console: Console) -> None:
    """Prints a line for every file in every folder."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("model and file", "GiB", "type", "context", "sha256", "used by"):
        table.add_column(column, justify="right" if column in ("GiB", "context") else "left", overflow="fold")
    for row in found:
        context = f"{row.context}\nof {row.trained}" if row.trained else str(row.context)
        state = Text(WORDS[row.state], STYLES[row.state])
        table.add_row(
            Text.assemble(row.model, "\n", (row.file, "dim")), f"{row.size / 2**30:.2f}" if row.size else "?",
            row.quantization or "?", context, Text.assemble(row.sha256[:8] or "not known", "\n", state),
            "\n".join(row.used_by) + (f" on {row.host}" if row.host else ""),
        )  # fmt: skip
    console.print(table)


def show_verdict(found: Sequence[Row], console: Console) -> None:
    """Prints a line for every file that was read, and what helps where it is not as pinned."""
    for row in found:
        line = Text.assemble((f"{WORDS[row.state]:<12}", STYLES[row.state]), f" {row.folder}/{row.file}")
        console.print(line.append(f"; {REMEDY[row.state]}" if row.state in REMEDY else ""))
    good = sum(row.state == "verified" for row in found)
    console.print(f"{good} of {len(found)} files are as pinned, to the last bit")


def as_data(found: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [asdict(row) for row in found]
