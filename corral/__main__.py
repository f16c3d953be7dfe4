"""The command `corral` of an installed wheel, and `python -m corral`. A checkout starts with `./generate.py`."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from corral.declarations import IS_CHECKOUT

# What messages call a command, and what an installation calls it.
NAMES = {
    "./generate.py": "corral",
    "make demo-down": "corral demo --down",
    "make demo": "corral demo",
    " MODEL=": " --model ",
}


class Renaming:
    """A text stream that writes an installation's names of commands."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """All that it does not change is the stream's."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text with the names replaced."""
        for name, ours in NAMES.items():
            text = text.replace(name, ours)
        return self._stream.write(text)


def main() -> int:
    """Runs the command line and returns its exit code."""
    from corral.cli import main as run

    if not IS_CHECKOUT:
        sys.stdout, sys.stderr = Renaming(sys.stdout), Renaming(sys.stderr)
    try:
        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
