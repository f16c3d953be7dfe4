"""What LiteLLM's settings are worth: its processor time for a request, as rendered and with each of them taken back.

Prints a table and writes docs/benchmarks/litellm.json; takes six minutes of an idle machine. All run side by side
before one HAProxy and the same fakes, one is measured at a time, in an order that chance gives; each is compared with
the rendered one of the same round. `--quick` shows whether everything works, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from corral.components import litellm  # noqa: E402 - the checkout is not installed
from corral.json_layout import laid_out  # noqa: E402
from tools import bench_gateway as gateway  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "litellm.json"
ROUNDS = 40
REQUESTS = 40
CLIENTS = 4
# What LiteLLM counts and logs it does after the answer; that is its work, too.
SETTLE_S = 0.2
AS_RENDERED = "as rendered"

Configuration = dict[str, Any]
Environment = dict[str, str]


@dataclass(frozen=True)
class Variant:
    """One LiteLLM: what it does without, and how its configuration and environment differ for that."""

    name: str
    change: Callable[[Configuration, Environment], None]


def _through_the_library(_configuration: Configuration, environment: Environment) -> None:
    for name in litellm.DIRECT_CALLS:
        del environment[name]


def _prices_looked_up(configuration: Configuration, _environment: Environment) -> None:
    for deployment in configuration["model_list"]:
        for name in litellm.DATA["free"].get(deployment["model_info"]["mode"], {}):
            del deployment["model_info"][name]


def _second_log_line(_configuration: Configuration, environment: Environment) -> None:
    del environment["LITELLM_DISABLE_ACCESS_LOG_PATHS"]


def _all_figures(configuration: Configuration, _environment: Environment) -> None:
    del configuration["litellm_settings"]["prometheus_metrics_config"]


def _no_figures(configuration: Configuration, _environment: Environment) -> None:
    configuration["litellm_settings"]["callbacks"].remove("prometheus")


def _plain(ports: dict[str, int], configuration: Configuration, environment: Environment) -> None:
    for name in environment.keys() - {"LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_MODE", litellm.MASTER_KEY}:
        del environment[name]
    configuration.clear()
    configuration |= gateway.plain_configuration(ports)
    configuration["general_settings"]["master_key"] = f"os.environ/{litellm.MASTER_KEY}"


def _nothing(_configuration: Configuration, _environment: Environment) -> None:
    pass


VARIANTS = (
    Variant(AS_RENDERED, _nothing),
    Variant("calls through OpenAI's library", _through_the_library),
    Variant("prices looked up", _prices_looked_up),
    Variant("a second line in the log", _second_log_line),
    Variant("all seventy figures", _all_figures),
    Variant("no figures at all", _no_figures),
)


@contextmanager
def running() -> Iterator[list[tuple[gateway.Stack, int]]]:
    """Every variant with its process, healthy."""
    with gateway.farm() as bench, ExitStack() as started:
        service = next(item for item in bench.plan.services_of("here") if item.component == litellm.COMPONENT)
        as_in_004 = Variant("LiteLLM as seed 004 had it", partial(_plain, bench.ports))
        found = []
        for number, variant in enumerate((*VARIANTS, as_in_004)):
            folder = bench.folder / f"variant-{number}"
            shutil.copytree(bench.folder / "here" / litellm.COMPONENT, folder)
            path, environment = folder / "config.yaml", {**service.environment, litellm.MASTER_KEY: bench.key}
            configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
            variant.change(configuration, environment)
            path.write_text(yaml.safe_dump(configuration), encoding="utf-8")
            (port,) = gateway.free_ports(1)
            command = gateway.litellm_command(path, str(port))
            process = started.enter_context(gateway.process(command, folder / "log", **environment))
            urls = {"wide": f"http://{gateway.LOOPBACK}:{port}"}
            found.append((gateway.Stack(variant.name, urls, bench.key), process))
        asyncio.run(gateway.answering([stack for stack, _ in found]))
        yield found


def processor_s(process: int) -> float:
    """Seconds of processor time that all threads of a process have had, as Linux counts them to the nanosecond."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(thread.read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9


async def measure(found: list[tuple[gateway.Stack, int]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time for a request, round by round, of every variant."""
    chance = random.Random(gateway.SEED)  # noqa: S311 - no secret
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for stack, process in chance.sample(found, len(found)):
            before = processor_s(process)
            await _ask_all(stack)
            await asyncio.sleep(SETTLE_S)
            if number > 0:  # the first round loads what is loaded at the first request
                samples[stack.name].append(1000 * (processor_s(process) - before) / REQUESTS)
        gateway.tell(f"round {number} of {rounds}")
    return samples


async def _ask_all(stack: gateway.Stack) -> None:
    async with gateway.client() as session:

        async def some() -> None:
            for _ in range(REQUESTS // CLIENTS):
                answer = await gateway.ask(session, stack, "wide")
                if answer.status != gateway.OK:
                    raise ValueError(f"{stack.name}: a request got {answer.status}")

        await asyncio.gather(*(some() for _ in range(CLIENTS)))


def compared(samples: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Of every variant its milliseconds, and how they compare with the rendered one's of the same round; best first."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in samples.items():
        ratios = [own / rendered for own, rendered in zip(values, samples[AS_RENDERED], strict=True)]
        rows[name] = {
            "processor_ms": round(statistics.median(values), 2),
            "ratio": round(statistics.median(ratios), 4),
            "middle_half": gateway.middle_half(ratios),
        }
    return dict(sorted(rows.items(), key=lambda row: row[1]["ratio"]))


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, to see that it works; writes nothing")
    arguments = parser.parse_args()
    about = gateway.machine()
    with running() as found:
        rows = compared(asyncio.run(measure(found, 1 if arguments.quick else ROUNDS)))
    print(f"{'LiteLLM for a request':36}{'ms of a core':>14}{'ratio':>8}   half of the rounds")
    for name, row in rows.items():
        low, high = row["middle_half"]
        print(f"{name:36}{row['processor_ms']:>14}{row['ratio']:>8}   {low} to {high}")
    if not arguments.quick:
        RESULT.write_text(laid_out({"machine": about, "variants": rows}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
