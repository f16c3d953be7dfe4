"""corral's command line with the package `toy` installed: its metadata and its code are on Python's path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INVENTORY = HERE / "toy.yaml"
COMMAND_LIMIT_S = 300


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """What a Python program prints when the package is installed."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "NO_COLOR": "1"}
    command = [sys.executable, *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False
    )


def corral(*words: str) -> subprocess.CompletedProcess[str]:
    """What a verb prints when the package is installed."""
    return python(str(HERE.parents[1] / "generate.py"), *words)
