"""Converts data points into chart coordinates for the template. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
TICKS = 5
COLOURS = ("#1f6feb", "#d1480f", "#1a7f37", "#8250df", "#9a6700", "#bf3989", "#0a7ea4", "#57606a")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One series in chart coordinates."""

    name: str
    colour: str
    points: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        """The points for SVG's polyline."""
        return " ".join(f"{x},{y}" for x, y in self.points)


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart: series, ticks with their positions, and marker lines."""

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    uprights: tuple[tuple[float, str], ...] = ()
    levels: tuple[tuple[float, str], ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(
    titles: tuple[str, str, str],
    series: Mapping[str, Points],
    *,
    uprights: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Chart:
    """A chart of these series; titles are its own, the x axis's and the y axis's."""
    xs = [x for points in series.values() for x, _ in points] + list((uprights or {}).values())
    ys = [y for points in series.values() for _, y in points] + list((levels or {}).values())
    x_ticks, y_ticks = _ticks(0.0, max(xs, default=1.0)), _ticks(0.0, max(ys, default=1.0))
    x_most, y_most = x_ticks[-1], y_ticks[-1]

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / x_most, 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_most, 1)

    lines = (
        Line(name, COLOURS[number % len(COLOURS)], tuple((across(x), down(y)) for x, y in sorted(points)))
        for number, (name, points) in enumerate(series.items())
    )
    return Chart(
        *titles,
        tuple(lines),
        tuple((across(x), f"{x:g}") for x in x_ticks),
        tuple((down(y), f"{y:g}") for y in y_ticks),
        tuple((across(x), name) for name, x in (uprights or {}).items()),
        tuple((down(y), name) for name, y in (levels or {}).items()),
    )


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers from least to at least most."""
    span = (most - least) or 1.0
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    count = math.ceil(span / step - 1e-9)
    return [round(least + step * number, 10) for number in range(count + 1)]
