"""`watch`: what the farm does at the moment, from its own Prometheus; on the screen, as CSV or as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from corral.build import Plan
from corral.contributions import Service
from corral.errors import CorralError
from corral.runtime.board import redraw
from corral.runtime.hosts import CommandError, ComposeHost

LIMIT_S = 10.0
COLUMNS = ("time", "about", "name", "figure", "value", "unit")
MONITORING = "prometheus"


@dataclass(frozen=True, slots=True)
class Figure:
    """One recorded figure: how it is asked for, headed and written."""

    name: str
    record: str
    heading: str
    unit: str
    digits: int = 0
    factor: float = 1.0


POOLS = (
    Figure("busy", "pool:in_flight", "busy", "requests"),
    Figure("slots", "pool:slots", "slots", "requests"),
    Figure("queue", "pool:queue", "waiting", "requests"),
    Figure("requests", "pool:requests:rate5m", "requests/min", "1/min", 1, 60),
    Figure("refused", "pool:refused:rate5m", "refused/min", "1/min", 1, 60),
    Figure("failures", "pool:failures:rate5m", "errors/min", "1/min", 1, 60),
    Figure("tokens", "pool:generated_tokens:rate5m", "tokens/s", "1/s", 1),
    Figure("first_token", "pool:first_token:p95_5m", "first token p95, s", "s", 2),
    Figure("answer", "pool:answer:p95_5m", "answer p95, s", "s", 2),
)
CARDS = (
    Figure("utilization", "gpu:utilization:ratio", "busy, %", "%", 0, 100),
    Figure("temperature", "gpu:temperature:celsius", "°C", "celsius"),
    Figure("power", "gpu:power:watts", "W", "watts"),
    Figure("memory_used", "gpu:memory_used:bytes", "memory, GiB", "GiB", 1, 1 / 1024**3),
    Figure("memory_total", "gpu:memory_total:bytes", "of", "GiB", 1, 1 / 1024**3),
    Figure("throttled", "gpu:throttled", "throttled", "1 = yes"),
)
# What there is to see: the figures of each kind, and the labels that name one of it.
KINDS = {"pool": (POOLS, ("pool",)), "gpu": (CARDS, ("host", "gpu"))}
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


class WatchError(CorralError):
    """There is no Prometheus, or it does not answer."""


# --- finding out -----------------------------------------------------------------------------------------------------


def asking(plan: Plan, out: Path) -> Ask:
    """How to ask the site's Prometheus: on loopback, or inside its container over ssh. WatchError if there is none."""
    monitoring = plan.inventory.monitoring
    if monitoring is None:
        raise WatchError("this site has no `monitoring:` and so no figures; `status --watch` needs none")
    if not plan.site.host(monitoring.host).ssh:
        return _on_loopback(monitoring.port)
    service = next(item for item in plan.services_of(monitoring.host) if item.component == MONITORING)
    return _over_ssh(ComposeHost(plan, monitoring.host, out), service, monitoring.port)


def _on_loopback(port: int) -> Ask:
    def ask(query: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query"
        try:
            with httpx.Client(timeout=LIMIT_S, trust_env=False) as client:
                return _result(client.get(url, params={"query": query}).raise_for_status().text)
        except httpx.HTTPError as error:
            raise WatchError(f"Prometheus does not answer at 127.0.0.1:{port} ({error}); see: status") from error

    return ask


def _over_ssh(host: ComposeHost, service: Service, port: int) -> Ask:
    def ask(query: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query?query={quote(query)}"
        words = ["docker", "exec", service.container_name, "wget", "-q", "-O", "-", url]
        try:
            return _result(host.run(words, limit_s=LIMIT_S).out)
        except CommandError as error:
            raise WatchError(f"Prometheus on {host.name} does not answer: {error}") from error

    return ask


def _result(text: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(text)["data"]["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise WatchError("what answers on Prometheus' port is not Prometheus; see: status") from error
    return found


def look(ask: Ask) -> list[Row]:
    """Every pool and every card with what is known of it, in one question."""
    records = {figure.record: figure for figures, _ in KINDS.values() for figure in figures}
    series = ask('{__name__=~"' + "|".join(records) + '"}')
    rows: dict[tuple[str, str], Row] = {}
    for about, (figures, naming) in KINDS.items():
        mine = {figure.record for figure in figures}
        for one in series:
            labels = one["metric"]
            if labels["__name__"] not in mine or not all(label in labels for label in naming):
                continue
            name = " ".join(labels[label] for label in naming)
            row = rows.setdefault((about, name), Row(about, name, {}, labels.get("card", "")))
            figure = records[labels["__name__"]]
            value = float(one["value"][1]) * figure.factor
            if value == value:  # noqa: PLR0124 - no time of an answer where there was none: NaN
                row.values[figure.name] = max(value, row.values.get(figure.name, value))
    return [rows[key] for key in sorted(rows, key=lambda key: (list(KINDS).index(key[0]), key[1]))]


# --- showing ---------------------------------------------------------------------------------------------------------


def view(rows: Sequence[Row]) -> RenderableType:
    """The figures for a person's eyes; the hottest card is named."""
    if not rows:
        return Text("Prometheus has no figures of pools or cards yet; it takes a minute after a start", "yellow")
    blocks: list[RenderableType] = []
    for about, (figures, _) in KINDS.items():
        mine = [row for row in rows if row.about == about]
        if mine:
            blocks += [Text(), _table(about, figures, mine)] if blocks else [_table(about, figures, mine)]
    if hottest := max((row for row in rows if "temperature" in row.values), key=_heat, default=None):
        blocks += [
            Text(),
            Text.assemble("hottest card: ", (f"{hottest.name}, {_heat(hottest):.0f} °C", _style(hottest))),
        ]
    return Group(*blocks)


def _heat(row: Row) -> float:
    return row.values["temperature"]


def _style(row: Row) -> str:
    heat = row.values.get("temperature", 0)
    if heat >= HOT_C or row.values.get("failures", 0) > 0:
        return "red"
    return "yellow" if heat >= WARM_C or row.values.get("throttled") or row.values.get("queue") else ""


def _table(about: str, figures: Sequence[Figure], rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("GPU" if about == "gpu" else about, no_wrap=True)
    for figure in figures:
        table.add_column(figure.heading, justify="right")
    for row in rows:
        cells = [
            f"{row.values[figure.name]:.{figure.digits}f}" if figure.name in row.values else "-" for figure in figures
        ]
        name = f"{row.name} {row.note}".rstrip()
        table.add_row(Text(name, _style(row)), *cells)
    return table


def as_data(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The figures as plain data."""
    return [{"about": row.about, "name": row.name, **row.values} for row in rows]


def csv_lines(rows: Iterable[Row], moment: datetime, *, with_header: bool) -> str:
    """A line for every figure: time (UTC), what it is about, its name, the figure, value and unit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if with_header:
        writer.writerow(COLUMNS)
    for row in rows:
        for figure in KINDS[row.about][0]:
            if figure.name in row.values:
                value = f"{row.values[figure.name]:.6g}"
                writer.writerow([f"{moment:%Y-%m-%dT%H:%M:%SZ}", row.about, row.name, figure.name, value, figure.unit])
    return text.getvalue()


def watch(ask: Ask, console: Console, every_s: float, *, looks: int = 0, csv_file: Path | None = None) -> None:
    """Looks again and again until Ctrl-C, or so many times; every look is appended to the CSV file at once."""
    redraw(console, _views(ask, csv_file), every_s, count=looks)


def _views(ask: Ask, csv_file: Path | None) -> Iterator[RenderableType]:
    while True:
        rows = look(ask)
        if csv_file:
            _append(csv_file, rows, datetime.now(UTC))
        yield view(rows)


def _append(path: Path, rows: Iterable[Row], moment: datetime) -> None:
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8") as file:
        file.write(csv_lines(rows, moment, with_header=is_new))
