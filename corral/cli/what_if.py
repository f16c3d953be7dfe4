"""`plan --what-if`: waits and refusals as they are and as they would be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corral.build import Plan
from corral.cli.context import print_json
from corral.cli.show import page
from corral.errors import UsageError
from corral.tables import new_table

if TYPE_CHECKING:
    from corral.whatif.cases import Result
    from corral.whatif.simulation import Outcome, Station


def show_changed(found: Plan, words: list[str], hosts: set[str] | None, *, as_json: bool) -> None:
    """Simulates the farm as it is and with these changes, and prints both."""
    from corral.whatif import cases as whatif
    from corral.whatif.measured import measured_answers

    if hosts:
        raise UsageError("--what-if is for whole pools; leave --host out")
    results = whatif.run(whatif.cases(found, whatif.parse_changes(words, found), measured_answers(found)))
    if as_json:
        print_json(whatif.as_data(results))
    else:
        _show(results, page())


def _show(results: Iterable[Result], console: Console) -> None:
    """Prints what the simulation says of every pool, as it is and as it would be."""
    table = new_table(
        "pool", "", "slots", "asked/min", "in use", "mean wait", "95 % wait", "answered/min", "refused", "by the limit"
    )
    lines = []
    for case, now, then in results:
        if case.reason:
            lines.append(f"{case.pool}: not simulated: {case.reason}")
            continue
        _add_side(table, case.pool, "now", case.now, now)
        _add_side(table, "", "what if", case.then, then)
        lines.append(f"{case.pool}: answers of {_seconds(case.now.answer_s if case.now else 0)}, {case.source}")
    if table.row_count:
        console.print(table)
    for line in lines:
        console.print(f"[dim]{escape(line)}[/]", soft_wrap=True)


def _add_side(table: Table, pool: str, side: str, station: Station | None, outcome: Outcome | None) -> None:
    if station is None or outcome is None:
        return
    table.add_row(
        pool, side, str(station.slots), f"{60 * station.rate_per_s:.4g}", f"{outcome.busy_share:.0%}",
        _seconds(outcome.mean_wait_s), _seconds(outcome.p95_wait_s), f"{60 * outcome.answered_per_s:.4g}",
        f"{outcome.refused_share:.1%}", f"{outcome.limited_share:.1%}",
    )  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"
