"""What looking after a farm costs: time from nothing to ready, changing replicas, stopping, and what figures cost.

Brings up a small farm (three llama-servers, HAProxy, LiteLLM, Prometheus, node-exporter) in this machine's Docker
engine, with the stand-in images of the tests and through the command line as a person would. Prints a table and writes
docs/benchmarks/operations.json: the median of all rounds, and how far apart the rounds were. About seven minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from corral.json_layout import laid_out  # noqa: E402
from tests.compose.conftest import engine_alone  # noqa: E402 - the checkout is not installed
from tests.compose.site_up import HOST, RUN_LIMIT_S, Site, site_in  # noqa: E402
from tests.needs import why_missing  # noqa: E402
from tests.processes.helpers import wait_until  # noqa: E402
from tools.bench_render import machine  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "operations.json"
NEEDED = ("docker-engine", "mmdebstrap")
CLIENTS = 2
WATCHED_S = 30.0
WARM_S = 60.0
MONITORING = ("prometheus", "node-exporter")
MEANING = {
    "up_s": "`up` from nothing until every service is healthy, images and weights being there",
    "up_again_s": "`up` when there is nothing to do",
    "change_idle_s": "`up` after a change of all three replicas, one after the other: drained, made anew, back",
    "change_busy_s": "the same while two clients ask without a pause",
    "drain_ratio": "busy to idle: what waiting for answers in flight adds",
    "failed_requests": "requests of those clients that failed, all rounds together",
    "down_s": "`down`",
    "monitoring_cpu_ms_per_s": "processor time of Prometheus and the exporter, every 15 s one reading",
    "scraped_cpu_ratio": "processor time of an idle farm with Prometheus to without: what being read costs",
}


@contextmanager
def crowd(site: Site, failures: list[str]) -> Iterator[None]:
    """Clients that ask without a pause for as long as the block lasts."""
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            answer = site.client.chat("chat")
            if answer.status_code != 200:  # noqa: PLR2004 - OK
                failures.append(f"{answer.status_code} {answer.text[:200]}")

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def processor_seconds(site: Site) -> dict[str, float]:
    """Processor time that every container has used since it started, by its control group (version 2, or 1)."""
    return {name: _used_s(site.project.inspect(name)["State"]["Pid"]) for name in site.ids()}


def _used_s(pid: int) -> float:
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    for pattern, file, name, unit in (
        (r"^0::(.*)$", "cpu.stat", r"usage_usec (\d+)", 1e6),
        (r"^\d+:[^:]*\bcpuacct\b[^:]*:(.*)$", "cpuacct.usage", r"(\d+)", 1e9),
    ):
        for path in re.findall(pattern, groups, re.MULTILINE):
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/unified"):
                text = _text_of(Path(f"{root}{path}") / file)
                if found := re.search(name, text):
                    return int(found[1]) / unit
    raise RuntimeError(f"no control group counts the processor time of process {pid}")


def _text_of(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def per_second(site: Site) -> dict[str, float]:
    """Milliseconds of processor time that every container uses in a second of doing nothing."""
    before, begin = processor_seconds(site), time.perf_counter()
    time.sleep(WATCHED_S)
    after, passed = processor_seconds(site), time.perf_counter() - begin
    return {name: 1000 * (after[name] - before[name]) / passed for name in before}


def corral(site: Site, *words: str) -> None:
    """A command as a person starts it: Python's start counts."""
    with site.start(*words) as process:
        code = process.wait(RUN_LIMIT_S)
    if code:
        raise SystemExit(f"{words} ended with {code}:\n{process.output}")


def changed(site: Site, number: int) -> float:
    """Seconds that a change of every replica takes."""
    old = site.inventory.read_text()
    site.inventory.write_text(re.sub(r"threads: 1(, batch: \d+)?", f"threads: 1, batch: {512 + number}", old))
    return seconds(lambda: corral(site, "up", "--render"))


def one_round(site: Site, number: int, failures: list[str]) -> dict[str, float]:
    """Everything once."""
    found = {"up_s": seconds(lambda: corral(site, "up", "--render"))}
    wait_until(lambda: site.client.chat("chat").status_code == 200, WARM_S, "the first answer")  # noqa: PLR2004
    found["up_again_s"] = seconds(lambda: corral(site, "up"))
    idle = per_second(site)
    own = {name: value for name, value in idle.items() if name.removeprefix(f"{HOST}-") in MONITORING}
    found["monitoring_cpu_ms_per_s"] = sum(own.values())
    for name in own:
        site.project.docker("pause", name)
    quiet = per_second(site)
    for name in own:
        site.project.docker("unpause", name)
    served = [name for name in idle if name not in own]
    found["scraped_cpu_ratio"] = sum(idle[name] for name in served) / sum(quiet[name] for name in served)
    found["change_idle_s"] = changed(site, 2 * number)
    with crowd(site, failures):
        found["change_busy_s"] = changed(site, 2 * number + 1)
    found["drain_ratio"] = found["change_busy_s"] / found["change_idle_s"]
    found["down_s"] = seconds(lambda: corral(site, "down"))
    return found


def main() -> int:
    """Measures, prints and writes; 1 where there is no engine to measure with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is done")
    parser.add_argument("--no-write", action="store_true", help="only print")
    arguments = parser.parse_args()
    missing = [f"{name}: {reason}" for name in NEEDED if (reason := why_missing(name))]
    if missing:
        print("cannot measure: " + "; ".join(missing), file=sys.stderr)
        return 1
    about, failures = machine() | {"load_before": round(os.getloadavg()[0], 1)}, list[str]()
    with (
        engine_alone(),
        tempfile.TemporaryDirectory(prefix="corral-bench-") as folder,
        site_in(Path(folder)) as site,
    ):
        site.edit(", node_exporter: false", "")
        site.corral("render", "--quiet")
        site.corral("secrets", "init")
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(one_round(site, number, failures))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {}
    for name, meaning in MEANING.items():
        values = [one[name] for one in rounds if name in one] or [float(len(failures))]
        figures[name] = {
            "value": round(statistics.median(values), 3),
            "lowest": round(min(values), 3),
            "highest": round(max(values), 3),
            "meaning": meaning,
        }
        print(f"{name:26}{figures[name]['value']:>10} ({min(values):.3f} to {max(values):.3f})  {meaning}")
    for failure in failures[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    if not arguments.no_write:
        text = laid_out({"machine": about, "rounds": arguments.rounds, "figures": figures})
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
