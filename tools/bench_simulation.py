"""How near the simulation is to the real balancer and gateway, and how long `plan --what-if` takes for 8 000 GPUs.

The same requests go at the same moments through HAProxy (once through LiteLLM, too) in front of fakes of known answer
times, and through the simulation. Prints a table and writes docs/benchmarks/simulation.json; takes about ten minutes of
a machine that does nothing else. `--lasts-s 20` is quicker and rougher, `--no-write` writes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from corral.json_layout import laid_out  # noqa: E402
from corral.whatif.simulation import Station  # noqa: E402 - the checkout is not installed
from tests.processes.farm import POOLS, Extras, Mode, inventory_of, running  # noqa: E402
from tests.processes.replaying import Way, compare, trace_of  # noqa: E402
from tools.bench_render import farm, machine  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "simulation.json"
LASTS_S = 60.0
ANSWER_S = 0.8
# Requests that may wait for each pool.
DEPTHS = {"even": 40, "mixed": 12}
AIM_PERCENT = 10.0
SEED = 7
GPUS = 8000
# Inventory (None: one of 8 000 GPUs) and changes.
WHAT_IFS = {
    "a site of 8 000 GPUs, ten pools alike for chat and ten for embeddings, with 2 000 more in one": (
        None, ("answer_s=30", "rpm=9000", "limit_rpm=10000", "chat-0.gpus=2800"),
    ),
    "one pool of three cards, if it had 8 000": (
        "heartcode.yaml", ("heartcode-chat-sfw.gpus=8000", "answer_s=12", "rpm=36000", "limit_rpm=40000"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One load of one pool."""

    pool: str
    # Of what the slots can do.
    load: float
    answer_cv: float = 1.0
    through_gateway: bool = False


CASES = (
    Case("even", 0.5), Case("even", 0.7), Case("even", 0.85), Case("even", 0.85, answer_cv=0.0),
    Case("mixed", 0.7), Case("mixed", 0.85), Case("even", 0.7, through_gateway=True), Case("mixed", 1.4),
)  # fmt: skip


def _inventory(mode: Mode, ports: dict[str, int], _extras: Extras) -> dict[str, Any]:
    """The tests' farm with nothing but gateway, balancer and fakes."""
    made = inventory_of(mode, ports, Extras())
    pools = {
        name: {"on": made["pools"][name]["on"], "queue": {"depth": depth, "timeout_s": 60}}
        for name, depth in DEPTHS.items()
    }
    nodes = {name: node for name, node in made["nodes"].items() if any(name in POOLS[pool] for pool in pools)}
    return made | {"pools": pools, "nodes": nodes, "models": {}}


def measure(cases: tuple[Case, ...], lasts_s: float) -> list[dict[str, Any]]:
    """The figures of each case, one after the other on one farm."""
    rows = []
    with running("slots", _inventory) as made:
        for case in cases:
            slots, depth = sum(POOLS[case.pool].values()), DEPTHS[case.pool]
            station = Station(case.pool, slots, case.load * slots / ANSWER_S, ANSWER_S, case.answer_cv, depth, 60.0)
            way = Way.to(made, case.pool, through_gateway=case.through_gateway)
            found = compare(way, station, trace_of(station, lasts_s, SEED))
            rows.append(
                {
                    "way": "LiteLLM and HAProxy" if case.through_gateway else "HAProxy",
                    "replicas": len(POOLS[case.pool]), "slots": slots, "load": case.load, "answer_cv": case.answer_cv,
                    "queue_depth": depth, "requests": found.requests,
                    "measured_wait_s": round(found.measured_wait_s, 4),
                    "simulated_wait_s": round(found.simulated_wait_s, 4),
                    "error_percent": round(100 * found.error, 1),
                    "measured_refused": round(found.measured_refused, 4),
                    "simulated_refused": round(found.simulated_refused, 4),
                    "overhead_ms": round(1000 * found.overhead_s, 1),
                    "held_ms": round(1000 * found.held_s, 1), "latest_ms": round(1000 * found.latest_s, 1),
                }
            )  # fmt: skip
            print_row(rows[-1])
    return rows


def time_what_ifs() -> list[dict[str, Any]]:
    """Seconds of whole `plan --what-if` runs, from start to end of the process."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        large = Path(folder) / "inventory.yaml"
        large.write_text(yaml.safe_dump(farm(GPUS), sort_keys=False), encoding="utf-8")
        for words, (example, changes) in WHAT_IFS.items():
            inventory = ROOT / "inventories" / example if example else large
            command = [sys.executable, str(ROOT / "generate.py"), "plan", "--json", "--inventory", str(inventory)]
            command += [word for change in changes for word in ("--what-if", change)]
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            taken = round(time.perf_counter() - begun, 1)
            if done.returncode != 0:
                sys.exit(done.stderr)
            pools = [pool for pool in json.loads(done.stdout).values() if pool["now"]]
            rows.append({"what": words, "pools": len(pools), "seconds": taken})
            print(f"{words}: {len(pools)} pools in {taken} s", flush=True)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    cells = [f"{row['way']:<20}", f"{row['slots']:>5}", f"{row['load']:>5.2f}", f"{row['answer_cv']:>4.1f}"]
    cells += [f"{row['requests']:>8}", f"{row['measured_wait_s']:>9.3f}", f"{row['simulated_wait_s']:>10.3f}"]
    cells += [f"{row['error_percent']:>+7.1f}", f"{row['measured_refused']:>8.1%}", f"{row['simulated_refused']:>9.1%}"]
    print(" ".join(cells), flush=True)


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lasts-s", type=float, default=LASTS_S, help="seconds of each load")
    parser.add_argument("--no-write", action="store_true", help="only print")
    arguments = parser.parse_args()
    what_ifs = time_what_ifs()
    print("way                  slots  load   cv requests  wait, s simulated error % refused simulated", flush=True)
    rows = measure(CASES, arguments.lasts_s)
    below = [abs(row["error_percent"]) for row in rows if row["load"] < 1]
    print(f"farthest below the knee: {max(below)} %, aim {AIM_PERCENT:g} %")
    if not arguments.no_write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "machine": machine(), "lasts_s": arguments.lasts_s, "answer_s": ANSWER_S, "aim_percent": AIM_PERCENT,
            "farthest_percent": max(below), "loads": rows, "what_ifs": what_ifs,
        }  # fmt: skip
        RESULT.write_text(laid_out(data), encoding="utf-8")
        print(f"written to {RESULT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
