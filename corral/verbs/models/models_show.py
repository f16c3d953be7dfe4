"""Model files as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from corral.declarations import read_yaml
from corral.tables import new_table
from corral.verbs.models.models import Row, State, shown_path

# Words, style and remedy of each state.
STATES: Mapping[State, tuple[str, str, str]] = read_yaml(Path(__file__).with_name("states.yaml"))


def show_rows(found: Sequence[Row], console: Console) -> None:
    """Prints a line for every file in every folder."""
    table = new_table("model and file", ">GiB", "type", ">context", "sha256", "used by")
    for row in found:
        words, style, _ = STATES[row.state]
        table.add_row(
            Text.assemble(row.model, "\n", (row.file, "dim")), f"{row.size / 2**30:.2f}" if row.size else "?",
            row.quantization or "?", f"{row.context}\nof {row.trained}" if row.trained else str(row.context),
            Text.assemble(row.sha256[:8] or "not known", "\n", (words, style)),
            "\n".join(row.used_by) + (f" on {row.host}" if row.host else ""),
        )  # fmt: skip
    console.print(table)


def show_verdict(found: Sequence[Row], console: Console) -> None:
    """Prints a line for every file that was read, and what helps where it is not as pinned."""
    for row in found:
        words, style, remedy = STATES[row.state]
        line = Text.assemble(
            (f"{words:<12}", style), f" {shown_path(row.folder, row.file)}", f"; {remedy}" if remedy else ""
        )
        console.print(line)
    good = sum(row.state == "verified" for row in found)
    console.print(f"{good} of {len(found)} files are as pinned, to the last bit")
