"""`watch`: what the farm does at the moment, from its own Prometheus; on the screen, as CSV or as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf, isnan
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.text import Text

from corral.build import Plan
from corral.config.source import plain_yaml
from corral.errors import CorralError
from corral.runtime.board import redraw
from corral.runtime.hosts import ComposeHost, refuse_swarm
from corral.tables import new_table

LIMIT_S = 10.0
COLUMNS = ("time", "about", "name", "figure", "value", "unit")


@dataclass(frozen=True, slots=True)
class Figure:
    """One recorded figure: how it is asked for, headed and written."""

    name: str
    record: str
    heading: str
    unit: str
    digits: int = 0
    factor: float = 1.0


# What there is to see: the figures of each kind, and the labels that name one of it.
KINDS = {
    about: ([Figure(**figure) for figure in row["figures"]], row["labels"])
    for about, row in plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes()).items()
}
# Degrees Celsius for the colours; alerts have limits for each card (`GpuWarm`, `GpuHot`).
WARM_C, HOT_C = 80, 85

# Answers an instant query with Prometheus' result vector.
Ask = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One pool or card and its figures by name; one that was not measured is missing."""

    about: str
    name: str
    values: dict[str, float]
    note: str = ""


# --- finding out -----------------------------------------------------------------------------------------------------


def asking(plan: Plan, out: Path) -> Ask:
    """How to ask the site's Prometheus, on its host's loopback; CorralError if there is none."""
    monitoring = plan.inventory.monitoring
    if monitoring is None:
        raise CorralError("this site has no `monitoring:` and so no figures; `status --watch` needs none")
    refuse_swarm(plan)  # its Prometheus has no port on loopback
    host, port = ComposeHost(plan, monitoring.host, out), monitoring.port
    return lambda query: answered(host, port, query)


def answered(host: ComposeHost, port: int, query: str) -> list[dict[str, Any]]:
    """What the Prometheus on a port of a host's loopback answers to a query; CorralError when it does not."""
    try:
        with host.forwarded(port) as place, httpx.Client(timeout=LIMIT_S, trust_env=False) as client:
            answer = client.get(f"{place}/api/v1/query", params={"query": query})
            return result_in(answer.raise_for_status().text)
    except httpx.HTTPError as error:
        words = f"Prometheus on {host.name} does not answer at 127.0.0.1:{port} ({error}); see: status"
        raise CorralError(words) from error


def result_in(text: str) -> list[dict[str, Any]]:
    """The result vector in Prometheus' answer; CorralError when it is none."""
    try:
        found: list[dict[str, Any]] = json.loads(text)["data"]["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorralError("what answers on Prometheus' port is not Prometheus; see: status") from error
    return found


def rows_now(ask: Ask) -> list[Row]:
    """Every pool and every card with what is known of it, in one question."""
    known = {item.record: (about, item, names) for about, (items, names) in KINDS.items() for item in items}
    rows: dict[tuple[int, str], Row] = {}
    for one in ask('{__name__=~"' + "|".join(known) + '"}'):
        labels, value = one["metric"], float(one["value"][1])
        about, figure, names = known[labels["__name__"]]
        if not all(label in labels for label in names):
            continue
        key = (list(KINDS).index(about), " ".join(labels[label] for label in names))
        row = rows.setdefault(key, Row(about, key[1], {}, labels.get("card", "")))
        if not isnan(value):  # a time where there was no answer
            row.values[figure.name] = max(value * figure.factor, row.values.get(figure.name, -inf))
    return [rows[key] for key in sorted(rows)]


# --- showing ---------------------------------------------------------------------------------------------------------


def view(rows: Sequence[Row]) -> RenderableType:
    """The figures for a person's eyes; the hottest card is named."""
    if not rows:
        return Text("Prometheus has no figures of pools or cards yet; it takes a minute after a start", "yellow")
    blocks: list[RenderableType] = []
    for about in KINDS:
        mine = [row for row in rows if row.about == about]
        blocks += [_table(about, mine), Text()] if mine else []
    if hottest := max((row for row in rows if "temperature" in row.values), key=_heat, default=None):
        words = f"{hottest.name}, {_heat(hottest):.0f} °C"
        blocks += [Text.assemble("hottest card: ", (words, _style(hottest))), Text()]
    return Group(*blocks[:-1])


def _heat(row: Row) -> float:
    return row.values.get("temperature", 0)


def _style(row: Row) -> str:
    if _heat(row) >= HOT_C or row.values.get("failures", 0) > 0:
        return "red"
    return "yellow" if _heat(row) >= WARM_C or row.values.get("throttled") or row.values.get("queue") else ""


def _table(about: str, rows: Sequence[Row]) -> RenderableType:
    figures = KINDS[about][0]
    table = new_table(
        f"!{'GPU' if about == 'gpu' else about}", *(f">{figure.heading}" for figure in figures), is_compact=True
    )
    for row in rows:
        values = [(row.values.get(figure.name), figure.digits) for figure in figures]
        cells = ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
        table.add_row(Text(f"{row.name} {row.note}".rstrip(), _style(row)), *cells)
    return table


def as_data(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The figures as plain data."""
    return [{"about": row.about, "name": row.name, **row.values} for row in rows]


def append(path: Path, rows: Iterable[Row], moment: datetime) -> None:
    """Writes a line for every figure: time (UTC), what it is about, its name, the figure, value and unit."""
    with path.open("a", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(COLUMNS)
        for row in rows:
            for figure in (item for item in KINDS[row.about][0] if item.name in row.values):
                value = f"{row.values[figure.name]:.6g}"
                writer.writerow([f"{moment:%Y-%m-%dT%H:%M:%SZ}", row.about, row.name, figure.name, value, figure.unit])


def watch(ask: Ask, console: Console, every_s: float, *, looks: int = 0, csv_file: Path | None = None) -> None:
    """Looks again and again until Ctrl-C, or so many times; every look is appended to the CSV file at once."""

    def views() -> Iterator[RenderableType]:
        while True:
            rows = rows_now(ask)
            if csv_file:
                append(csv_file, rows, datetime.now(UTC))
            yield view(rows)

    redraw(console, views(), every_s, count=looks)
