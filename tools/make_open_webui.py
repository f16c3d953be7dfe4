"""Makes `.venv-open-webui`, in which tests start the real Open WebUI: `python -m tools.make_open_webui [--lock]`.

Its packages want other versions than the kit's, so they have an environment of their own, from a lock of their own:
tests/open-webui.txt, a line for each wheel for Python 3.11 on Linux with an x86-64 processor. `--lock` writes it again.
Left out is what runs models in the program itself, five of its seven gigabytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.make_env import Pip, settings_of_pip

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-open-webui"
LOCK = ROOT / "tests" / "open-webui.txt"
# Written last: the lock that the environment was made from.
COMPLETE = FOLDER / "corral-complete"
WANTED = "open-webui[postgres]==0.12.4"
LEFT_OUT = (
    "accelerate", "colbert-ai", "faster-whisper", "opencv-python-headless", "sentence-transformers", "torch",
    "transformers",
)  # fmt: skip
PYTHON = "3.11"
UV = Path(sys.executable).with_name("uv")


def is_made() -> bool:
    """Whether the environment is there, made from the lock as it is now."""
    return COMPLETE.is_file() and COMPLETE.read_bytes() == LOCK.read_bytes()


def make() -> None:
    """Makes the environment anew."""
    COMPLETE.unlink(missing_ok=True)
    _run([UV, "--no-config", "venv", "--quiet", "--clear", "--python", PYTHON, FOLDER])
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--compile-bytecode", "--requirements", LOCK]
    _run([UV, "--no-config", "pip", "install", "--quiet", "--python", FOLDER, *options])
    COMPLETE.write_bytes(LOCK.read_bytes())


def lock() -> None:
    """Writes the lock: uv chooses the versions, pip says which wheel each of them is here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.txt").write_text(f"{WANTED}\n")
        (folder / "without.txt").write_text("".join(f'{name} ; sys_platform == "never"\n' for name in LEFT_OUT))
        chosen, report = folder / "chosen.txt", folder / "report.json"
        files = ["--override", folder / "without.txt", "--output-file", chosen, folder / "in.txt"]
        _run(
            [UV, "--no-config", "pip", "compile", "--quiet", "--python-version", PYTHON, "--no-emit-index-url", *files]
        )
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", report]
        _run([sys.executable, "-m", "pip", "install", "--quiet", *options, "--requirement", chosen])
        found = json.loads(report.read_bytes())["install"]
    LOCK.write_text("".join(sorted(map(_line, found))))


def _line(item: dict[str, dict[str, Any]]) -> str:
    about, hashes = item["metadata"], item["download_info"]["archive_info"]["hashes"]
    name = str(about["name"]).lower().replace("_", "-")
    return f"{name}=={about['version']} --hash=sha256:{hashes['sha256']}\n"


def _run(command: Sequence[object]) -> None:
    """Runs a command; uv uses the package index that pip is set up for."""
    known = {**os.environ, **settings_of_pip(Pip([sys.executable, "-m", "pip"], {}))}
    subprocess.run(list(map(str, command)), check=True, env=known)


if __name__ == "__main__":
    if "--lock" in sys.argv[1:]:
        lock()
    if not is_made():
        make()
