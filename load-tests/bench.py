"""`./generate.py bench VERB`: load tests with Locust, capacity measurements, and limits derived from them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

if "_assets" not in Path(__file__).parts:  # in a wheel `corral` is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # the folder that has `corral`

import apply
import compare
import report
import run
import sweep
import verify
from corral.cli.context import JsonOption, SiteOptions, exit_code_of, plain, print_json, shared, talk, verbs
from corral.whatif.measured import bench_folder
from target import Target

app = verbs("Send load, measure capacity, derive limits.")

DirectOption = Annotated[bool, typer.Option("--direct", help="Send to the replicas, not to the gateway.")]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Maximum length of an answer.")]
LongOption = Annotated[float | None, typer.Option("--long-share", min=0, max=1, help="Share of long prompts.")]
PoolsOption = Annotated[list[str] | None, typer.Option("--pool", help="Only this pool; may be given several times.")]


@app.command("run")
@shared("inventory", "out")
def run_verb(
    site: SiteOptions,
    scenario: Annotated[str, typer.Argument(help="stress, mixed, soak, single, conversation or burst.")],
    pool: PoolsOption = None,
    direct: DirectOption = False,
    replica: Annotated[str, typer.Option("--replica", help="Only this replica, by its container's name.")] = "",
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="Requests per second (open loop).")] = None,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Clients, or requests in a burst.")] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", min=1, help="Seconds; the scenario's if absent.")
    ] = None,
    max_tokens: TokensOption = None,
    long_share: LongOption = None,
    web: Annotated[str, typer.Option("--web", help="HOST:PORT for Locust's web interface; stop with Ctrl-C.")] = "",
    to: Annotated[Path | None, typer.Option("--to", help="Folder for raw data and results.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Run one scenario with Locust; exit code 1 if the farm did not meet the scenario's criteria."""
    target = Target(site.plan(), site.out, direct, replica, max_tokens, long_share)
    data = run.run(target, run.Wanted(scenario, tuple(pool or ()), rate, users, duration, web, to), talk)
    if as_json:
        print_json(data)
    else:
        run.show(data, plain())
    return 1 if data["broken"] else 0


RunOption = Annotated[str, typer.Option("--run", help="Name or folder of a run; the newest if absent.")]


@app.command("sweep")
@shared("inventory", "out")
def sweep_verb(
    site: SiteOptions,
    pool: PoolsOption = None,
    direct: DirectOption = False,
    steps: Annotated[str, typer.Option("--steps", help="Rates, relative to the full pool's throughput.")] = (
        "0.3,0.5,0.7,0.8,0.9,1.0,1.1,1.3"
    ),
    step_s: Annotated[float, typer.Option("--step-s", min=1, help="Minimum seconds of a step.")] = 300,
    step_requests: Annotated[int, typer.Option("--step-requests", min=1, help="Minimum requests of a step.")] = 100,
    warm_s: Annotated[float, typer.Option("--warm-s", min=1, help="Seconds of warm-up with all slots in use.")] = 60,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=20, help="Number of repeats of all steps.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum length of an answer.")] = 128,
    long_share: LongOption = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds after which an answer is a failure.")
    ] = 120,
    resume: Annotated[str, typer.Option("--resume", help="Continue this run with its settings.")] = "",
    to: Annotated[Path | None, typer.Option("--to", help="Folder of the run.")] = None,
) -> None:
    """Measure the capacity of every pool: knee, safe rate, N-1; prints the folder with the report."""
    plan = site.plan()
    if resume:
        folder = sweep.find_run(plan, resume, is_whole=False)
        wanted = sweep.read_wanted(folder)
    else:
        folder = to or bench_folder(plan) / sweep.new_run()
        shares = sweep.parse_shares(steps)
        wanted = sweep.Wanted(
            tuple(pool or ()), shares, step_s, step_requests, warm_s, repeats, max_tokens, long_share, timeout, direct
        )
    sweep.sweep(Target(plan, site.out), wanted, folder, talk)
    report.write_report(folder)
    sys.stdout.write(f"{folder}\n")


@app.command("report")
@shared("inventory")
def report_verb(site: SiteOptions, run: RunOption = "") -> None:
    """Regenerate the report of a run: HTML, Markdown, CSV."""
    for path in report.write_report(sweep.find_run(site.plan(), run)):
        sys.stdout.write(f"{path}\n")


@app.command("compare")
@shared("inventory")
def compare_verb(
    site: SiteOptions,
    before: Annotated[str, typer.Argument(help="Name or folder of the earlier run.")],
    after: Annotated[str, typer.Argument(help="Name or folder of the later run; the newest if absent.")] = "",
    as_json: JsonOption = False,
) -> int:
    """Compare two runs; exit code 1 if a pool's capacity dropped by more than the noise."""
    plan = site.plan()
    found = compare.compare_runs(sweep.find_run(plan, before), sweep.find_run(plan, after))
    if as_json:
        print_json([asdict(item) for item in found])
    for item in found if not as_json else ():
        sys.stdout.write(f"{item.words}\n")
    return 1 if any(item.verdict == "worse" for item in found) else 0


@app.command("apply")
@shared("inventory")
def apply_verb(
    site: SiteOptions,
    run: RunOption = "",
    basis: Annotated[str, typer.Option("--basis", help="safe, n-1 (a card may be lost) or knee.")] = "safe",
    tokens: Annotated[bool, typer.Option("--tokens", help="Also limit tokens per minute.")] = False,
    to_file: Annotated[bool, typer.Option("--write", help="Change the inventory.")] = False,
) -> None:
    """Show the limits of a run as a diff of the inventory; --write applies it."""
    folder = sweep.find_run(site.plan(), run)
    sys.stdout.write(apply.apply(site.inventory, folder, basis, with_tokens=tokens, is_written=to_file))
    talk.print("next: ./generate.py up --render, then bench verify" if to_file else "--write makes this change")


@app.command("verify")
@shared("inventory", "out")
def verify_verb(
    site: SiteOptions,
    pool: PoolsOption = None,
    at_s: Annotated[float, typer.Option("--at-s", min=1, help="Seconds at the limit.")] = 60,
    above_s: Annotated[float, typer.Option("--above-s", min=1, help="Seconds at three times the limit.")] = 60,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Maximum length of an answer, as in the sweep.")
    ] = 128,
    long_share: LongOption = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for raw data and results.")] = None,
) -> int:
    """Verify that pools meet their objective at their limits and answer 429 above; exit code 1 if not."""
    plan = site.plan()
    wanted = verify.Wanted(tuple(pool or ()), at_s, above_s, max_tokens)
    data = verify.verify(
        Target(plan, site.out, long_share=long_share), wanted, to or bench_folder(plan) / "verify", talk
    )
    for words in data["broken"]:
        talk.print(Text(words, style="red"))
    return 1 if data["broken"] else 0


if __name__ == "__main__":
    sys.exit(exit_code_of(app, sys.argv[1:], "generate.py bench"))
