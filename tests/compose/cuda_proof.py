"""The proof that gpu-server/Dockerfile compiles for NVIDIA's cards: what its commands have made of the locked source.

CUDA's compiler is too large for CI, and two architectures take hours on two cores. A person runs this on a machine with
`nvcc`, `cuobjdump`, `objdump` and CMake, and commits the proof. A test compares it with the inputs of today:

    python -m tests.compose.cuda_proof FOLDER    # of llama.cpp's source, from the sdist of the locked xllamacpp
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.compose.own_image_proof import ROOT, inputs

PROOF = Path(__file__).with_name("cuda_image.json")
# Pascal, as in the cards of the first farm, and Hopper.
ARCHITECTURES = ("61", "90")
# Registers of AVX, and AVX's form of instructions on SSE's registers.
AVX = re.compile(r"%[yz]mm|\tv(?:add|sub|mul|div|mov|fmadd|xor|broadcast)\w* ")


def main(source: Path) -> None:
    """Compiles with the Dockerfile's own commands, looks at the result, and writes the proof."""
    arguments = {
        "BACKEND": "cuda",
        "CUDA_ARCH": ";".join(ARCHITECTURES),
        "CPU_FLAGS": "",
        "CMAKE_ARGS": "",
        "LLAMA_BUILD": "0",
    }
    subprocess.run(["sh", "-eu", "-c", commands()], cwd=source, env=arguments | os.environ, check=True)
    write(source / "build" / "bin")


def write(built: Path) -> None:
    """Looks at what was compiled with these commands, in this folder, and writes the proof."""
    proof: dict[str, Any] = {
        "inputs": inputs(),
        "compiled": dt.datetime.now(dt.UTC).date().isoformat(),
        "compiler": _said("nvcc", "--version").splitlines()[-1],
        "kernels": dict(
            sorted(
                Counter(
                    re.findall(r"\.(sm_\w+)\.cubin", _said("cuobjdump", "--list-elf", str(built / "libggml-cuda.so")))
                ).items()
            )
        ),
        "avx": {
            path.name: len(AVX.findall(_said("objdump", "-d", "--no-show-raw-insn", str(path))))
            for path in sorted([*built.glob("lib*.so"), built / "llama-server"])
        },
    }
    PROOF.write_text(json.dumps(proof, indent=1) + "\n")


def commands() -> str:
    """The command of the Dockerfile that compiles."""
    text = (ROOT / "gpu-server" / "Dockerfile").read_text()
    found = re.search(r"^RUN (set --; .*?)\n(?=RUN)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, "the Dockerfile has no command that compiles"
    return found[1]


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
