"""Writes what a command shows on a terminal as SVG: `python -m tools.terminal_picture FILE.svg COMMAND…`."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

WIDTH = 104
# Rich's SVG names a font on another host, which no page of ours may load.
FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def shown(command: list[str]) -> str:
    """What a command prints on a terminal of this width, with colours."""
    os.environ |= {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    output = io.BytesIO()

    def read(terminal: int) -> bytes:
        output.write(data := os.read(terminal, 4096))
        return data

    pty.spawn(command, read)
    return output.getvalue().decode().replace("\r", "").rstrip()


def main(file: str, *command: str) -> None:
    """Runs the command and writes the picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}", "bold"))
    console.print(Text.from_ansi(shown(list(command))))
    picture = console.export_svg(title="corral", theme=MONOKAI, unique_id="corral")
    lines = FONTS.sub("", picture).splitlines()
    Path(file).write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
