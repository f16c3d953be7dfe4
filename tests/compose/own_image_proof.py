"""The proof that gpu-server/Dockerfile compiles: which inputs the tests of test_own_image.py have last passed with.

They compile llama.cpp, which takes longer than most of the other tests together. So they run where their inputs have
changed since, or with `--compile`; `make own-image` runs them and writes the proof.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROOF = Path(__file__).with_name("own_image.json")
REMEDY = "run: make own-image"


def locked_source() -> str:
    """The lines of requirements.txt that lock xllamacpp, in whose sdist llama.cpp's source is."""
    text = (ROOT / "requirements.txt").read_text()
    found = re.search(r"^xllamacpp==.*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, "requirements.txt does not lock xllamacpp"
    return found[0]


def inputs() -> str:
    """SHA-256 of all that decides what is compiled: the Dockerfile and the locked source."""
    return hashlib.sha256((ROOT / "gpu-server" / "Dockerfile").read_bytes() + locked_source().encode()).hexdigest()


def is_fresh() -> bool:
    """Whether the tests have passed with these inputs."""
    return PROOF.exists() and json.loads(PROOF.read_text())["inputs"] == inputs()


def main() -> None:
    """Writes the proof; for `make own-image`, after the tests."""
    proof = {"inputs": inputs(), "compiled": dt.datetime.now(dt.UTC).date().isoformat()}
    PROOF.write_text(json.dumps(proof, indent=1) + "\n")


if __name__ == "__main__":
    main()
