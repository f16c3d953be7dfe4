"""How long rendering takes, and how it grows: farms of 8, 80, 800 and 8 000 GPUs, each in a process of its own.

Prints a table and writes docs/benchmarks/render.json. `--gpus 8 80` measures other sizes, `--no-write` writes nothing.
"""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from corral.build import build_plan  # noqa: E402
from corral.config.load import load_inventory  # noqa: E402 - the checkout is not installed
from corral.json_layout import laid_out  # noqa: E402
from corral.render.output import compare, write  # noqa: E402
from corral.render.tree import render  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "render.json"
SIZES = (8, 80, 800, 8000)
PER_HOST = 8
POOLS_PER_KIND = 10
# Set aside for benchmarks (RFC 2544).
NETWORK = ipaddress.ip_network("198.18.0.0/15")
STAGES = ("load", "plan", "render", "write", "again")


def farm(gpus: int) -> dict[str, Any]:
    """An inventory with eight cards a host, each with a chat and an embedding server, in pools across hosts."""
    hosts = [f"host-{number}" for number in range(1, gpus // PER_HOST + 1)]
    facts = {"ram_gib": 64, "gpus": {"card": "rtx-3090", "count": PER_HOST}}
    machines = {name: {"address": str(NETWORK[number]), **facts} for number, name in enumerate(hosts, start=2)}
    pools = min(len(hosts), POOLS_PER_KIND)
    return {
        "schema_version": 1,
        "name": "bench",
        "hosts": machines | {"gate": {"address": str(NETWORK[1])}},
        "models": {
            "chat": {"source": "hf:owner/Chat-8B-GGUF/Chat-8B-Q4_K_M.gguf", "kind": "chat", "context": 8192},
            "embed": {"source": "hf:owner/embed/embed.gguf", "kind": "embedding", "context": 2048, "size_gib": 0.14},
        },
        "pools": {
            f"{model}-{number}": {
                "model": model,
                "on": [{"host": name, "gpus": f"1-{PER_HOST}"} for name in hosts[number::pools]],
                "aliases": [f"{model}-alias-{number}"],
                "limits": {"rpm": 1000},
                "engine": {"memory_mib": 2048},
            }
            for number in range(pools)
            for model in ("chat", "embed")
        },
        "gateway": {"host": "gate"},
        "monitoring": {"host": "gate"},
    }  # fmt: skip


def measure(gpus: int) -> dict[str, Any]:
    """Seconds of every stage, size of the result and peak memory; meant for a fresh process."""
    times: dict[str, float] = {}
    cpu_before = time.process_time()

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        times[stage] = round(time.perf_counter() - begun, 3)

    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        path, out = Path(folder) / "inventory.yaml", Path(folder) / "compose"
        path.write_text(yaml.safe_dump(farm(gpus), sort_keys=False), encoding="utf-8")
        with timed("load"):
            loaded = load_inventory(path)
        with timed("plan"):
            plan = build_plan(loaded)
        with timed("render"):
            tree = render(plan)
        with timed("write"):
            write(tree, out)
        with timed("again"):
            compare(tree, out)
    total = sum(times[stage] for stage in STAGES if stage != "again")
    return {
        "gpus": gpus,
        "services": len(plan.contributions.services),
        "files": len(tree),
        "mib": round(sum(map(len, tree.values())) / 2**20, 2),
        "seconds": {**times, "total": round(total, 3)},
        "cpu_seconds": round(time.process_time() - cpu_before, 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def in_own_process(gpus: int) -> dict[str, Any]:
    """A measurement that no other one can have warmed up."""
    done = subprocess.run([sys.executable, __file__, "--one", str(gpus)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def with_growth(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements, each with how much more processor time it took than the one before, per tenfold of GPUs."""
    for before, run in itertools.pairwise(runs):
        tenfolds = run["gpus"] / before["gpus"] / 10
        run["growth_per_tenfold"] = round(run["cpu_seconds"] / before["cpu_seconds"] / tenfolds, 2)
    return runs


def machine() -> dict[str, Any]:
    """The machine in words that say nothing of who owns it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30),
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def print_row(run: dict[str, Any]) -> None:
    """One line of the table."""
    cells = [f"{run['gpus']:>6}", f"{run['services']:>9}", f"{run['files']:>6}", f"{run['mib']:>7.2f}"]
    cells += [f"{run['seconds'][stage]:>7.2f}" for stage in (*STAGES[:-1], "total", "again")]
    cells += [f"{run['cpu_seconds']:>7.2f}", f"{run['peak_memory_mib']:>8}", f"{run.get('growth_per_tenfold', ''):>7}"]
    print(" ".join(cells), flush=True)


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=SIZES, help="sizes of the farms")
    parser.add_argument("--no-write", action="store_true", help="only print")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    print(
        "  GPUs  services  files     MiB    load    plan  render   write   total   again     cpu peak MiB x per 10",
        flush=True,
    )
    runs: list[dict[str, Any]] = []
    for gpus in arguments.gpus:
        runs = with_growth([*runs, in_own_process(gpus)])
        print_row(runs[-1])
    if not arguments.no_write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(laid_out({"machine": machine(), "runs": runs}), encoding="utf-8")
        print(
            f"written to {RESULT.relative_to(ROOT)}; times in seconds, `again` is a second run that finds nothing to do"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
