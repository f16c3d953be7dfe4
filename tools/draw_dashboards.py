"""Pages of Grafana as pictures, drawn from a real Prometheus where no Grafana is at hand: to see what people will see.

    python -m tools.draw_dashboards                              # or: make pictures; the tests' recorded farm
    python -m tools.draw_dashboards --prometheus URL --to FOLDER farm gpu host

Places, titles, units, colours, thresholds, legends and what does not fit are those of the page's JSON and of Grafana's
usual sizes, as far as needed to read a page. It is not Grafana: fonts, ticks and rounding are this program's.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools.dashboards import FOLDER
from tools.panels import TOKENS

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
SHOWN = ("farm", "gpu")
WIDTH, DPI, COLOURS = 1600, 100, 256
UNIT_PX, GAP_PX, COLUMNS = 38, 8, 24
"""Grafana's grid: a unit of height is 30 pixels and a gap of 8."""
HEAD_PX, LINE_PX, PAD_PX, COLUMN_PX = 30, 20, 10, 84
LEGEND_SHARE = 0.35
"""Of a panel's height; what does not fit can be scrolled to in Grafana."""
STEP_S, RATE = 30, "2m"
INK, PALE, PAPER, PANEL, EDGE = "#24292e", "#6e7680", "#f4f5f5", "#ffffff", "#d8d9da"
NAMED = {"green": "#56a64b", "orange": "#e0751a", "red": "#d6303f", "blue": "#3274d9"}
PALETTE = ("#56a64b", "#d9a600", "#3274d9", "#e0751a", "#d6303f", "#8f3bb8", "#0a7ea4", "#7a5c3e", "#57606a", "#bf3989")
FINGERPRINT = "Drawn from"
"""The word in a picture's file beside which the fingerprint of its page stands."""

Panel = Mapping[str, Any]


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One series: its name in the legend, its query's letter, its labels and points."""

    name: str
    query: str
    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """The newest value; not a number if there is none."""
        return self.points[-1][1] if self.points else math.nan

    @property
    def most(self) -> float:
        """The greatest value."""
        return max((value for _, value in self.points), default=math.nan)


@dataclass(frozen=True)
class Figures:
    """A Prometheus, the moment that is the present, and the page that asks."""

    url: str
    now: float
    page: Mapping[str, Any]

    @property
    def span_s(self) -> float:
        """How far the page looks back."""
        return 3600 * float(self.page["time"]["from"].removeprefix("now-").removesuffix("h"))

    def of(self, panel: Panel) -> list[Series]:
        """What a panel shows."""
        return [series for target in panel.get("targets", ()) for series in self._asked(target)]

    def _asked(self, target: Mapping[str, Any]) -> Iterator[Series]:
        own = {"__rate_interval": RATE, "__range": f"{self.span_s:.0f}s"}
        chosen = {item["name"]: item.get("allValue", "") for item in self.page["templating"]["list"]}
        words: dict[str, Any] = {"query": _filled(target["expr"], chosen | own)}
        if target["instant"]:
            path, words["time"] = "query", self.now
        else:
            path = "query_range"
            words |= {"start": self.now - self.span_s, "end": self.now, "step": STEP_S}
        got = httpx.get(f"{self.url}/api/v1/{path}", params=words, timeout=60, trust_env=False)
        for found in got.raise_for_status().json()["data"]["result"]:
            labels = found["metric"]
            points = [(float(when), float(value)) for when, value in found.get("values") or [found["value"]]]
            name = _named(target["legendFormat"], labels)
            yield Series(name, target["refId"], labels, [point for point in points if math.isfinite(point[1])])


def _filled(expression: str, variables: Mapping[str, str]) -> str:
    found = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")
    return found.sub(lambda match: variables.get(match[1] or match[2], match[0]), expression)


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


SCALES: dict[str, Sequence[tuple[float, str]]] = {
    "s": ((60, " min"), (1, " s"), (1e-3, " ms"), (1e-6, " µs")),
    "bytes": ((1 << 40, " TiB"), (1 << 30, " GiB"), (1 << 20, " MiB"), (1 << 10, " KiB"), (1, " B")),
    "Bps": ((1e9, " GB/s"), (1e6, " MB/s"), (1e3, " kB/s"), (1, " B/s")),
    "hertz": ((1e9, " GHz"), (1e6, " MHz"), (1e3, " kHz"), (1, " Hz")),
    "watt": ((1e3, " kW"), (1, " W")),
    "percentunit": ((0.01, "%"),),
    "celsius": ((1, " °C"),),
    "reqps": ((1, " req/s"),),
    "ops": ((1, " ops/s"),),
    "currencyUSD": ((1, " $"),),
    TOKENS: ((1, " tok/s"),),
    "none": ((1, ""),),
}
"""Of each unit: how large a step of it is, and how it is written."""


def formatted(value: float, unit: str) -> str:
    """A value as a person reads it."""
    if not math.isfinite(value):
        return "-"
    scale = SCALES[unit]
    size, word = next(((size, word) for size, word in scale if abs(value) >= size), scale[-1])
    if not value and unit not in {"percentunit", "none"}:
        size, word = 1, dict(scale).get(1, "")
    number = value / size
    digits = 0 if number == round(number) or abs(number) >= 100 else 1 if abs(number) >= 10 else 2  # noqa: PLR2004
    text = f"{number:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + word


# --- what is drawn on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A place on the picture, in pixels from its upper left corner."""

    x: float
    y: float
    w: float
    h: float

    def inside(self, left: float, top: float, right: float = 0, bottom: float = 0) -> Box:
        """What is left of it without these margins."""
        return Box(self.x + left, self.y + top, self.w - left - right, self.h - top - bottom)


@dataclass
class Canvas:
    """A picture that is being drawn."""

    height: float
    figure: Figure = field(init=False)
    agg: FigureCanvasAgg = field(init=False)

    def __post_init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI), dpi=DPI, facecolor=PAPER)
        self.agg = FigureCanvasAgg(self.figure)

    def write(self, x: float, y: float, text: str, size: float = 13, **looks: Any) -> None:
        """Text whose middle line is at y."""
        given = {"color": INK, "va": "center_baseline", "ha": "left", **looks}
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=_points(size), parse_math=False, **given)

    def fill(self, box: Box, colour: str, edge: str = "none") -> None:
        """A rectangle."""
        low = (box.x / WIDTH, 1 - (box.y + box.h) / self.height)
        patch = Rectangle(
            low, box.w / WIDTH, box.h / self.height, facecolor=colour, edgecolor=edge, linewidth=0.8,
            transform=self.figure.transFigure, zorder=-1,
        )  # fmt: skip
        self.figure.add_artist(patch)

    def axes(self, box: Box) -> Axes:
        """Axes there."""
        low = 1 - (box.y + box.h) / self.height
        return self.figure.add_axes((box.x / WIDTH, low, box.w / WIDTH, box.h / self.height))

    def width(self, text: str, size: float = 13) -> float:
        """How wide a text is, in pixels."""
        renderer = self.agg.get_renderer()  # type: ignore[no-untyped-call]
        found = renderer.get_text_width_height_descent(text, FontProperties(size=_points(size)), ismath=False)
        return float(found[0])

    def fitting(self, text: str, room: float, size: float = 13) -> str:
        """The text, cut where it does not fit."""
        if self.width(text, size) <= room:
            return text
        while text and self.width(f"{text}…", size) > room:
            text = text[:-1]
        return f"{text}…"

    def save(self, to: Path, fingerprint: str) -> None:
        """Writes a PNG with few colours."""
        raw = io.BytesIO()
        self.figure.savefig(raw, format="png", dpi=DPI)
        notes = PngInfo()
        notes.add_text(FINGERPRINT, fingerprint)
        image = Image.open(raw).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        image.save(to, optimize=True, pnginfo=notes)


def _points(pixels: float) -> float:
    return pixels * 72 / DPI


# --- panels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One panel on its place, with its series."""

    canvas: Canvas
    panel: Panel
    box: Box
    series: Sequence[Series]
    span: tuple[float, float]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What the panel says of all its fields."""
        found: Mapping[str, Any] = self.panel["fieldConfig"]["defaults"]
        return found

    def said(self, value: float) -> str:
        """A value with its unit, or the word for it."""
        for mapping in self.defaults["mappings"]:
            if (found := mapping["options"].get(f"{value:g}")) is not None:
                return str(found["text"])
        return formatted(value, self.defaults["unit"])

    def judged(self, value: float) -> str:
        """The colour of a value: that of its threshold, or the one for all."""
        if self.defaults["color"]["mode"] == "fixed":
            return NAMED[self.defaults["color"]["fixedColor"]]
        steps = self.defaults["thresholds"]["steps"]
        passed = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
        return NAMED[passed[-1]]


def _stat(at: Drawing) -> None:
    part = at.box.w / len(at.series)
    for number, series in enumerate(at.series):
        middle = at.box.x + part * (number + 0.5)
        text = at.said(series.last)
        colour = at.judged(series.last)
        room = part - 2 * PAD_PX
        size = min(44.0, 44 * room / max(room, at.canvas.width(text, 44)))
        at.canvas.write(middle, at.box.y + 16, at.canvas.fitting(series.name, room), color=PALE, ha="center")
        at.canvas.write(middle, at.box.y + at.box.h * 0.62, text, size, color=colour, ha="center", weight="bold")


def _bargauge(at: Drawing) -> None:
    most = float(at.defaults.get("max") or max(series.last for series in at.series))
    names = min(max(at.canvas.width(series.name) for series in at.series) + PAD_PX, at.box.w * 0.4)
    texts = max(at.canvas.width(at.said(series.last), 16) for series in at.series) + PAD_PX
    part = min(at.box.h / len(at.series), 56)
    for number, series in enumerate(at.series):
        y = at.box.y + part * number
        bar = Box(at.box.x + names, y + part * 0.15, at.box.w - names - texts, part * 0.7)
        share = min(1.0, max(0.0, series.last / most if most else 0))
        colour = at.judged(series.last)
        at.canvas.fill(bar, "#e9edf2")
        at.canvas.fill(Box(bar.x, bar.y, bar.w * share, bar.h), colour)
        at.canvas.write(at.box.x, y + part / 2, at.canvas.fitting(series.name, names - PAD_PX))
        at.canvas.write(at.box.x + at.box.w, y + part / 2, at.said(series.last), 16, color=colour, ha="right")


def _timeseries(at: Drawing) -> None:
    colours = {number: PALETTE[number % len(PALETTE)] for number in range(len(at.series))}
    is_beside = at.panel["options"]["legend"]["placement"] == "right"
    room_px = at.box.h * (1 if is_beside else LEGEND_SHARE)
    shown = min(len(at.series), max(1, int(room_px / LINE_PX) - 1))
    high = (shown + 1) * LINE_PX
    names = max(at.canvas.width(series.name) for series in at.series) + 30
    wide = min(at.box.w * 0.6, names + 2 * COLUMN_PX) if is_beside else 0
    axes = at.canvas.axes(at.box.inside(72, 8, wide + 20, 28 if is_beside else high + 28))
    styled = {item["matcher"]["options"]: item for item in at.panel["fieldConfig"]["overrides"]}
    custom = at.defaults["custom"]
    below: dict[float, float] = {}
    for number, series in enumerate(at.series):
        points = dict(series.points)
        times, values = list(points), list(points.values())
        if custom["stacking"]["mode"] == "normal":
            low = [below.get(when, 0.0) for when in times]
            values = [value + under for value, under in zip(values, low, strict=True)]
            below |= dict(zip(times, values, strict=True))
            axes.fill_between(times, low, values, color=colours[number], alpha=custom["fillOpacity"] / 100, linewidth=0)
        looks: dict[str, Any] = {"color": colours[number], "linewidth": custom["lineWidth"] * 0.8, "clip_on": False}
        if series.query in styled:
            dash, gap = styled[series.query]["properties"][0]["value"]["dash"]
            looks["dashes"] = (dash / 2, gap / 2)
        axes.plot(times, [value if _is_on(at, value) else math.nan for value in values], **looks)
    _frame(at, axes)
    if custom["thresholdsStyle"]["mode"] == "dashed":
        _, top = axes.get_ylim()
        for step in at.defaults["thresholds"]["steps"]:
            if step["value"] is not None and step["value"] <= top:
                axes.axhline(step["value"], color=NAMED[step["color"]], linewidth=1.2, linestyle=(0, (5, 4)))
    _legend(at, colours, shown, at.box.inside(at.box.w - wide, 0) if is_beside else at.box.inside(0, at.box.h - high))


def _is_on(at: Drawing, value: float) -> bool:
    """Whether the scale shows a value at all."""
    return bool(at.defaults.get("min", value) <= value <= at.defaults.get("max", value))


def _frame(at: Drawing, axes: Axes) -> None:
    """Axes as Grafana has them: thin lines, times below, units at the left."""
    unit = at.defaults["unit"]
    _, top = axes.get_ylim()
    lowest = min((value for series in at.series for _, value in series.points), default=0)
    least = at.defaults.get("min", min(lowest, at.defaults["custom"].get("axisSoftMin", lowest)))
    axes.set_ylim(bottom=least, top=at.defaults.get("max", top if top > least else least + 1))
    if unit == "bytes":
        axes.set_yticks(list(_stepped(axes.get_ylim(), 2 ** math.ceil(math.log2((axes.get_ylim()[1] - least) / 4)))))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit)))
    _times(axes, at.span)
    axes.grid(visible=True, color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _times(axes: Axes, span: tuple[float, float]) -> None:
    axes.set_xlim(*span)
    axes.set_xticks(list(_stepped(span, 600)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda when, _: f"{datetime.fromtimestamp(when, UTC):%H:%M}"))
    axes.tick_params(length=0, pad=6, labelsize=_points(12), labelcolor=PALE)


def _stepped(span: tuple[float, float], step: float) -> Iterator[float]:
    when = math.ceil(span[0] / step) * step
    while when <= span[1]:
        yield when
        when += step


def _legend(at: Drawing, colours: Mapping[int, str], shown: int, box: Box) -> None:
    """A table of the series; says how many a person has to scroll to."""
    right = box.x + box.w
    for number, word in enumerate(("Max", "Last")):
        at.canvas.write(right - COLUMN_PX * number, box.y + LINE_PX / 2, word, 12, color=PALETTE[2], ha="right")
    if shown < len(at.series):
        more = f"{len(at.series) - shown} more below"
        at.canvas.write(box.x, box.y + LINE_PX / 2, more, 12, color=NAMED["red"], style="italic")
    for number, series in enumerate(at.series[:shown]):
        middle = box.y + LINE_PX * (number + 1.5)
        at.canvas.fill(Box(box.x, middle - 2, 14, 4), colours[number])
        at.canvas.write(box.x + 20, middle, at.canvas.fitting(series.name, box.w - 2 * COLUMN_PX - 22))
        at.canvas.write(right - COLUMN_PX, middle, at.said(series.last), ha="right")
        at.canvas.write(right, middle, at.said(series.most), ha="right")


def _state_timeline(at: Drawing) -> None:
    names = min(max(at.canvas.width(series.name, 12) for series in at.series) + PAD_PX, at.box.w * 0.4)
    box = at.box.inside(names, 0, 20, 28)
    axes = at.canvas.axes(box)
    axes.set_ylim(len(at.series), 0)
    axes.set_yticks([])
    _times(axes, at.span)
    for spine in axes.spines.values():
        spine.set_visible(False)
    part = box.h / len(at.series)
    for number, series in enumerate(at.series):
        at.canvas.write(
            box.x - PAD_PX, box.y + part * (number + 0.5), at.canvas.fitting(series.name, names, 12), 12, ha="right"
        )
        for begin, end, value in _runs(series.points):
            axes.barh(number + 0.5, end - begin, 0.8, begin, color=at.judged(value), alpha=0.7)
            word = at.said(value)
            room = (end - begin) / (at.span[1] - at.span[0]) * box.w
            if part >= 12 and at.canvas.width(word, 12) < room:  # noqa: PLR2004
                axes.text(begin, number + 0.5, f" {word}", fontsize=_points(12), va="center", color=INK)


def _runs(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float, float]]:
    """From when until when a value was the same."""
    begin = 0
    for index in range(1, len(points) + 1):
        if index == len(points) or points[index][1] != points[begin][1]:
            yield points[begin][0], points[min(index, len(points) - 1)][0], points[begin][1]
            begin = index


def _table(at: Drawing) -> None:
    organized = next(item["options"] for item in at.panel["transformations"] if item["id"] == "organize")
    there = {"Value"}.union(*(series.labels for series in at.series))
    columns = [name for name in sorted(organized["indexByName"], key=organized["indexByName"].get) if name in there]
    part = at.box.w / len(columns)
    for number, name in enumerate(columns):
        x = at.box.x + part * number
        title = organized["renameByName"].get(name, name)
        at.canvas.write(x, at.box.y + 14, at.canvas.fitting(title, part - PAD_PX), color=PALETTE[2])
        for line, series in enumerate(at.series):
            y = at.box.y + 14 + 30 * (line + 1)
            if y > at.box.y + at.box.h:
                break
            text = at.said(series.last) if name == "Value" else series.labels.get(name, "")
            at.canvas.write(x, y, at.canvas.fitting(text, part - PAD_PX))


DRAWERS: Mapping[str, Callable[[Drawing], None]] = {
    "stat": _stat,
    "bargauge": _bargauge,
    "timeseries": _timeseries,
    "state-timeline": _state_timeline,
    "table": _table,
}


# --- pages -----------------------------------------------------------------------------------------------------------


def draw(page: Mapping[str, Any], url: str, now: float, to: Path) -> list[str]:
    """Draws a page as PNG; gives the titles of the panels that had nothing to show."""
    figures = Figures(url, now, page)
    top = UNIT_PX + GAP_PX
    canvas = Canvas(top + UNIT_PX * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in page["panels"]))
    canvas.write(GAP_PX + PAD_PX, top / 2, page["title"], 18, weight="bold")
    canvas.write(WIDTH - GAP_PX, top / 2, page["description"], 13, color=PALE, ha="right")
    span = (now - figures.span_s, now)
    empty = []
    for panel in page["panels"]:
        box = _place(panel["gridPos"], top)
        if panel["type"] == "row":
            canvas.write(box.x + PAD_PX, box.y + box.h / 2, f"▾ {panel['title']}", 15, weight="bold")
            continue
        canvas.fill(box, PANEL, EDGE)
        title = canvas.fitting(panel["title"], box.w - 2 * PAD_PX, 14)
        canvas.write(box.x + PAD_PX, box.y + 16, title, 14)
        inner = box.inside(PAD_PX, HEAD_PX, PAD_PX, GAP_PX)
        if panel["type"] == "text":
            canvas.write(inner.x, inner.y + LINE_PX, canvas.fitting(panel["options"]["content"], inner.w))
            continue
        series = figures.of(panel)
        if series:
            DRAWERS[panel["type"]](Drawing(canvas, panel, inner, series, span))
        else:
            empty.append(panel["title"])
            canvas.write(box.x + box.w / 2, box.y + box.h / 2, "No data", 16, color=PALE, ha="center")
    canvas.save(to, fingerprint(page))
    return empty


def _place(grid: Mapping[str, int], top: float) -> Box:
    column = (WIDTH - GAP_PX) / COLUMNS
    return Box(
        GAP_PX + grid["x"] * column,
        top + grid["y"] * UNIT_PX,
        grid["w"] * column - GAP_PX,
        grid["h"] * UNIT_PX - GAP_PX,
    )


def fingerprint(page: Mapping[str, Any]) -> str:
    """What tells whether a picture shows this page as it is now."""
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of(picture: Path) -> str:
    """The fingerprint of the page that a picture shows."""
    with Image.open(picture) as image:
        return str(image.info.get(FINGERPRINT, ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws pages; says which of their panels were empty."""
    parser = argparse.ArgumentParser(description="Pages of Grafana as pictures, from a Prometheus.")
    parser.add_argument("pages", nargs="*", default=list(SHOWN), help="names of pages; farm and gpu if none")
    parser.add_argument("--prometheus", default="", help="address of a Prometheus; the tests' recorded farm if none")
    parser.add_argument("--at", type=float, default=0, help="seconds since 1970 that are the present; now if none")
    parser.add_argument("--to", type=Path, default=PICTURES, help="folder of the pictures")
    given = parser.parse_args(arguments)
    given.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, _prometheus(given.prometheus, given.at, Path(folder)) as (url, now):
        for name in given.pages:
            page = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            for title in draw(page, url, now, given.to / f"{name}.png"):
                print(f"{name}: {title}: no data")
    return 0


def _prometheus(url: str, at: float, folder: Path) -> AbstractContextManager[tuple[str, float]]:
    if url:
        return nullcontext((url.rstrip("/"), at or time.time()))
    from tests.monitoring.recorded import busy_farm

    return busy_farm(folder)


if __name__ == "__main__":
    sys.exit(main())
