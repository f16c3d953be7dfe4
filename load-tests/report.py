"""The report of a sweep as a single HTML file, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from charts import Chart, chart
from corral.files import write_atomically
from corral.whatif.measured import RESULT_FILE

FORMATS = ("html", "md")
COLUMNS = (
    "pool", "step", "due_at", "lag_s", "in_flight", "status", "error", "ttft_s", "e2e_s", "tokens_in", "tokens_out",
    "replica",
)  # fmt: skip
PERCENTILES = ("p50", "p90", "p95", "p99")


def write_report(folder: Path) -> list[Path]:
    """Writes report.html, report.md, steps.csv and requests.csv into a run's folder and returns their paths."""
    result = json.loads((folder / RESULT_FILE).read_text())
    texts = {f"report.{kind}": _page(result, kind) for kind in FORMATS}
    texts |= {"steps.csv": _steps_csv(result), "requests.csv": _requests_csv(result, folder)}
    for name, text in texts.items():
        write_atomically(folder / name, text.encode(), 0o644)
    return [folder / name for name in texts]


def _page(result: Mapping[str, Any], kind: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=kind == "html",  # noqa: S701 - Markdown is not HTML
    )  # fmt: skip
    environment.filters["number"] = number
    pools = {name: _values(name, item) for name, item in result["pools"].items()}
    return environment.get_template(f"report.{kind}.j2").render(result=result, pools=pools)


def number(value: float | None, digits: int = 1) -> str:
    """A number for people; a dash if there is none."""
    return "-" if value is None else f"{value:,.{digits}f}".replace(",", "\u202f")


def _values(name: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a pool for the templates."""
    capacity, steps = item["capacity"], item["steps"]
    per_request = capacity["tokens_per_request"]
    rows = [("knee", "knee_rpm"), ("safe (80 %)", "safe_rpm"), ("N-1 (computed)", "survives_rpm")]
    errors: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    for step in steps:
        errors.update(step["figures"]["errors"])
        shares.update(step["figures"]["replicas"])
    return {
        "name": name, "kind": item["kind"], "hardware": item["hardware"], "mark": item["mark"], "capacity": capacity,
        "objective": item["objective"], "long_share": item["long_share"], "steps": steps,
        "rates": [(title, capacity[key], None if capacity[key] is None else capacity[key] * per_request)
                  for title, key in rows],
        "errors": errors.most_common(), "replicas": _bars(shares), "charts": _charts(item),
        "lag_s": max(step["figures"]["lag_p99_s"] for step in steps),
        "has_telemetry": bool(item["telemetry"]),
    }  # fmt: skip


def _bars(shares: Counter[str]) -> list[tuple[str, int, float]]:
    """Answers of each replica, and the length of its bar in percent of the longest."""
    most = max(shares.values(), default=1)
    return [(name, count, round(100 * count / most, 1)) for name, count in sorted(shares.items())]


def _charts(item: Mapping[str, Any]) -> list[Chart]:
    """The charts: times and answers by rate, and metrics from Prometheus."""
    steps, capacity, objective = item["steps"], item["capacity"], item["objective"]
    knee, safe = capacity["knee_rpm"], capacity["safe_rpm"]
    uprights = {"knee": knee, "safe": safe}
    found = [
        chart(
            (title, "requests a minute", "seconds"), series, uprights=uprights, levels={"objective": objective[limit]}
        )
        for title, key, limit in (
            ("time to the first token", "ttft_s", "first_token_s"),
            ("time to the whole answer", "e2e_s", "answer_s"),
        )
        if any((series := {name: _against_rate(steps, key, name) for name in ("p50", "p95")}).values())
    ]
    answered = {
        "answered": [(60 * step["figures"]["sent_per_s"], 60 * step["figures"]["answered_per_s"]) for step in steps],
        "in time": [(60 * step["figures"]["sent_per_s"], 60 * step["figures"]["goodput_per_s"]) for step in steps],
    }
    found.append(chart(("answers", "requests a minute", "answers a minute"), answered, uprights=uprights))
    began = min(step["began"] for step in steps)
    for title, seen in item["telemetry"].items():
        series = {
            name: [((at - began) / 60, float(value)) for at, value in points] for name, points in seen["series"].items()
        }
        found.append(chart((title, "minutes", seen["unit"]), series))
    return found


def _against_rate(steps: list[Any], key: str, name: str) -> list[tuple[float, float]]:
    return [
        (60 * step["figures"]["sent_per_s"], step["figures"][key][name])
        for step in steps
        if name in step["figures"][key]
    ]


def _steps_csv(result: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    times = [f"{key}_{name}" for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s") for name in PERCENTILES]
    plain = ["requests", "answered", "in_time", "sent_per_s", "answered_per_s", "goodput_per_s", "tokens_per_s"]
    writer.writerow(["pool", "repeat", "share", "holds", *plain, *times, "lag_p99_s"])
    for pool, item in result["pools"].items():
        for step in item["steps"]:
            figures = step["figures"]
            values = [
                figures[key].get(name, "") for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s") for name in PERCENTILES
            ]
            head = [pool, step["repeat"], step["share"], step["holds"]]
            writer.writerow([*head, *(figures[name] for name in plain), *values, figures["lag_p99_s"]])
    return buffer.getvalue()


def _requests_csv(result: Mapping[str, Any], folder: Path) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for pool in result["pools"]:
        for file in sorted((folder / pool).glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if "end" not in row:
                    writer.writerow(row | {"step": file.stem})
    return buffer.getvalue()
