"""Estimated against reported and measured memory on real cards.

python tools/gpu_memory_check.py PATH/TO/llama-server [MODEL.gguf …] [--json OUT]: starts a CUDA build of llama-server
with each model (made here when none is given), all layers on the first card, and compares three figures: what
corral/plan/memory.py computes, what the server reports for its buffers, and what nvidia-smi says the process takes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from corral.config.gguf_header import facts_of, read_header  # noqa: E402 - after the path to it
from corral.plan.memory import CARD_MIB, MIB, Use, memory_of  # noqa: E402
from tests.model_files import NAMES, make_random_model  # noqa: E402
from tools.bench_memory import Case, cases_of, reported  # noqa: E402

DEADLINE_S = 300
PORT = 18999


def used_mib() -> int:
    """MiB in use on the first card, by whatever runs there."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0])


def measure(server: str, path: Path, name: str, case: Case) -> dict[str, Any]:
    """One model in one use."""
    embeds = name in ("bert", "bert-wide", "rerank")
    kind = ["--reranking"] if name == "rerank" else ["--embeddings"] if embeds else []
    words = [
        server, "--model", str(path), "--port", str(PORT), "--fit", "off", "--n-gpu-layers", "all", "--verbose",
        "--cache-ram", "0", "--ctx-size", str(case.context * case.slots), "--parallel", str(case.slots),
        "--batch-size", "2048", "--ubatch-size", str(case.ubatch), "--flash-attn", case.flash_attention,
        "--cache-type-k", case.cache_type, "--cache-type-v", case.cache_type, *kind,
    ]  # fmt: skip
    before = used_mib()
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        )
        try:
            text = _wait_loaded(process, Path(log.name))
            taken = used_mib() - before
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    with path.open("rb") as file:
        model = facts_of(read_header(file.read))
    use = Use(case.slots, case.context, 2048, case.ubatch, case.cache_type, case.flash_attention, "all", embeds)
    memory = memory_of(model, use)
    buffers = reported(text)
    on_card = sum(size for key, size in buffers.items() if key.startswith("CUDA") and not key.startswith("CUDA_Host"))
    ours = (memory.device - memory.converted) / MIB
    return {
        "model": name, "case": [case.slots, case.context, case.ubatch, case.cache_type, case.flash_attention],
        "reported_mib": buffers, "reported_on_card_mib": round(on_card, 1), "estimated_buffers_mib": round(ours, 1),
        "nvidia_smi_mib": taken, "plan_mib": -(-memory.device // MIB) + CARD_MIB,
        "buffers_error_percent": round((ours / on_card - 1) * 100, 2) if on_card else None,
        "plan_error_percent": round(((memory.device / MIB + CARD_MIB) / taken - 1) * 100, 2) if taken else None,
    }  # fmt: skip


def _wait_loaded(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        text = log.read_text(errors="replace")
        if "all slots are idle" in text or "server is listening" in text:
            return text
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {text[-3000:]}")
        time.sleep(0.2)
    raise RuntimeError("the server was not ready in time")


def main() -> int:
    """Measures and prints a line for each model and use."""
    parser = argparse.ArgumentParser(description="Estimated, reported and measured memory on a real card.")
    parser.add_argument("server", help="a CUDA build of llama-server")
    parser.add_argument("models", nargs="*", type=Path, help="GGUF files; models made here when absent")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models or NAMES:
            path = name if isinstance(name, Path) else Path(folder) / f"{name}.gguf"
            if not isinstance(name, Path):
                make_random_model(name, path)
            for case in cases_of(str(name)):
                row = measure(arguments.server, path, str(name), case)
                found.append(row)
                print(json.dumps({key: value for key, value in row.items() if key != "reported_mib"}), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
