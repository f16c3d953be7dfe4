"""Estimated against reported memory, for models of many architectures made on the spot: docs/benchmarks/memory.json.

python tools/bench_memory.py [--check]: runs llama.cpp's server on the processor for every model and use, reads the
sizes of its buffers from its own log, and compares them with corral/plan/memory.py. --check writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from corral.config.gguf_header import facts_of, read_header  # noqa: E402 - after the path to it
from corral.json_layout import laid_out  # noqa: E402
from corral.plan.memory import MIB, Use, memory_of  # noqa: E402
from tests.model_files import EMBEDDERS, NAMES, make_random_model  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "memory.json"
# The aim: percent that an estimate may be below and above the report.
LOWEST, HIGHEST = -2.0, 10.0
DEADLINE_S = 120
REPORT = """
import signal, sys
sys.path.insert(0, "gpu-server/local")
from xllama import parse
import xllamacpp
parameters = parse(sys.argv[1:])
parameters.verbosity, parameters.warmup = 5, False
server = xllamacpp.Server(parameters)
signal.pause()
"""
# In the line after all sizes. llama.cpp logs from a thread of its own: a process that ends itself loses lines.
LOADED = "model loaded"
_BUFFER = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size =\s+([0-9.]+) MiB")


@dataclass(frozen=True)
class Case:
    """One way to serve a model."""

    slots: int
    context: int
    ubatch: int
    cache_type: str = "f16"
    flash_attention: Literal["on", "off", "auto"] = "auto"


CASES = (
    Case(slots=2, context=4096, ubatch=512),
    Case(slots=1, context=8192, ubatch=512, flash_attention="off"),
    Case(slots=4, context=4096, ubatch=64, cache_type="q8_0"),
    Case(slots=3, context=1000, ubatch=256),
)
EMBEDDING_CASES = (Case(4, 512, 512), Case(1, 512, 512, flash_attention="off"), Case(2, 256, 256))


def cases_of(name: str) -> tuple[Case, ...]:
    """How a model is served for the comparison."""
    return EMBEDDING_CASES if name in EMBEDDERS else CASES


def reported(text: str) -> dict[str, float]:
    """MiB of every buffer in a log of llama-server: `CPU compute` and so on."""
    found: dict[str, float] = {}
    for device, kind, size in _BUFFER.findall(text):
        found[f"{device} {kind}"] = found.get(f"{device} {kind}", 0.0) + float(size)
    return found


def log_until_loaded(command: Sequence[str]) -> str:
    """What a server says until its model is loaded, until it ends, or for as long as it may take; then it is ended."""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        deadline = threading.Timer(DEADLINE_S, server.kill)
        deadline.start()
        try:
            return "".join(itertools.takewhile(lambda line: LOADED not in line, server.stderr or ()))
        finally:
            deadline.cancel()
            server.kill()


def report_of(path: Path, name: str, case: Case) -> dict[str, float]:
    """What llama.cpp's server says on the processor."""
    kind = {"rerank": ["--reranking"]}.get(name, ["--embeddings"] if name in EMBEDDERS else [])
    words = [
        "--model", str(path), "--port", "0", "--fit", "off", "--n-gpu-layers", "0", "--threads", "1",
        "--cache-ram", "0", "--ctx-size", str(case.context * case.slots), "--parallel", str(case.slots),
        "--batch-size", "2048", "--ubatch-size", str(case.ubatch), "--flash-attn", case.flash_attention,
        "--cache-type-k", case.cache_type, "--cache-type-v", case.cache_type, *kind,
    ]  # fmt: skip
    text = log_until_loaded([sys.executable, "-c", REPORT, *words])
    found = reported(text)
    if not any(key.endswith("compute") for key in found):
        raise RuntimeError(f"{name}: no report: {text[-2000:]}")
    return found


def estimate_of(path: Path, name: str, case: Case) -> dict[str, float]:
    """What corral/plan/memory.py computes for the same, in MiB by kind of buffer."""
    with path.open("rb") as file:
        model = facts_of(read_header(file.read))
    use = Use(case.slots, case.context, 2048, case.ubatch, case.cache_type, case.flash_attention, 0, name in EMBEDDERS)
    memory = memory_of(model, use)
    return {
        "model": memory.host_weights / MIB,
        "cache": memory.host_cache / MIB,
        "compute": memory.host_compute / MIB,
        "output": memory.output / MIB,
    }


def compare(path: Path, name: str, case: Case) -> dict[str, Any]:
    """One row of the result."""
    report = report_of(path, name, case)
    kinds = {"model": ("model",), "cache": ("KV", "RS"), "compute": ("compute",), "output": ("output",)}
    said = {
        kind: round(sum(size for key, size in report.items() if key.rpartition(" ")[2] in words), 2)
        for kind, words in kinds.items()
    }
    ours = {kind: round(size, 2) for kind, size in estimate_of(path, name, case).items()}
    error = (sum(ours.values()) / sum(said.values()) - 1) * 100
    return {
        "model": name,
        **asdict(case),
        "reported_mib": said,
        "estimated_mib": ours,
        "error_percent": round(error, 2),
    }


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every model in every use."""
    for name in NAMES:
        path = folder / f"{name}.gguf"
        make_random_model(name, path)
        for case in cases_of(name):
            yield compare(path, name, case)
        path.unlink()


def main() -> int:
    """Measures, prints and writes; 1 when an estimate is beyond the aim."""
    parser = argparse.ArgumentParser(description="Estimated against reported memory.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    import xllamacpp

    console = Console()
    table = Table("model", "slots × context", "ubatch", "cache", "flash", "reported", "estimated", "error")
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(Path(folder)))
    for row in found:
        said, ours = sum(row["reported_mib"].values()), sum(row["estimated_mib"].values())
        table.add_row(
            row["model"], f"{row['slots']} × {row['context']}", str(row["ubatch"]), row["cache_type"],
            row["flash_attention"], f"{said:.1f}", f"{ours:.1f}", f"{row['error_percent']:+.2f} %",
        )  # fmt: skip
    console.print(table)
    if not arguments.check:
        data = {"unit": "MiB", "server": f"xllamacpp {xllamacpp.__version__}, on the processor", "rows": found}
        RESULT.write_text(laid_out(data), encoding="utf-8")
    beyond = [row for row in found if not LOWEST <= row["error_percent"] <= HIGHEST]
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
