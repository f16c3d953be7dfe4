"""Pieces that dashboards are made of: panels, queries, variables, and how they stand on a page of Grafana.

Plain dictionaries of Grafana's classic dashboard format. Every piece wants a unit and a description, so no panel is
without them; what a threshold's colour says, a line, a word or the number says too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

COLUMNS = 24
# Of every page: Grafana itself finds by it the other pages that there are.
TAG = "corral"
# Of Grafana 12; newer ones read it and bring it to their own.
SCHEMA = 41
SOURCE = {"type": "prometheus", "uid": "${source}"}
Step = tuple[float | None, str]
FINE = "green"
LOOK = "orange"
BAD = "red"
# Of what is neither good nor bad.
PLAIN = "blue"
ALL = ".*"
# A line goes on over a gap that is no longer.
SPAN_MS = 120_000
# The unit of tokens per second: Grafana has none of its own.
TOKENS = "suffix:tok/s"
# A panel this wide has its legend at its side, where a dozen series have room; below it there is room for three.
BESIDE_WIDTH = 12
LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}

Panel = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and how its series are called in the legend."""

    expression: str
    legend: str
    # A series that is told from its neighbours by its line, too: Grafana's pattern of dash and gap, as `10,10`.
    dashes: str = ""


@dataclass(frozen=True, slots=True)
class Variable:
    """What a person chooses at the top of a page: values of a label of a metric."""

    name: str
    title: str
    metric: str
    label: str
    # Variables that narrow this one's values.
    chosen_by: tuple[str, ...] = ()

    @property
    def selector(self) -> str:
        """The series whose label has the values."""
        matchers = ", ".join(f'{name}=~"${name}"' for name in self.chosen_by)
        return f"{self.metric}{{{matchers}}}" if matchers else self.metric

    @property
    def query(self) -> str:
        """The query of the variable in Grafana's words."""
        return f"label_values({self.selector}, {self.label})"


@dataclass(frozen=True, slots=True)
class Page:
    """One dashboard: rows of panels under a heading each."""

    uid: str
    title: str
    description: str
    rows: Mapping[str, Iterable[Panel]]
    variables: tuple[Variable, ...] = ()
    hours: int = 1
    tags: tuple[str, ...] = (TAG,)


# --- panels ----------------------------------------------------------------------------------------------------------


class Looks(TypedDict, total=False):
    """What a panel need not say."""

    # Of 24 columns.
    width: int
    # The greatest value that there can be.
    top: float
    # Where a scale begins as long as no value is smaller; without it every scale begins at 0, whatever is below.
    low: float
    # From which value on it is how good.
    steps: tuple[Step, ...]
    # What a value means.
    words: Mapping[str, str]
    is_stacked: bool


def lines(title: str, description: str, unit: str, *queries: Query, **looks: Unpack[Looks]) -> Panel:
    """Series over time. `steps` are drawn as lines, not only as colours."""
    made = _panel("timeseries", (title, description, unit), queries, {"width": 8, **looks})
    is_stacked = looks.get("is_stacked", False)
    made["fieldConfig"]["defaults"] |= ({} if "low" in looks else {"min": 0}) | (
        {"max": looks["top"]} if "top" in looks else {}
    )
    made["fieldConfig"]["defaults"]["custom"] = {
        "drawStyle": "line", "lineWidth": 2, "fillOpacity": 30 if is_stacked else 5, "showPoints": "never",
        "spanNulls": SPAN_MS, "thresholdsStyle": {"mode": "dashed" if "steps" in looks else "off"},
        "stacking": {"mode": "normal" if is_stacked else "none"},
    } | ({"axisSoftMin": looks["low"]} if "low" in looks else {})  # fmt: skip
    made["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byFrameRefID", "options": _letter(index)},
            "properties": [{"id": "custom.lineStyle", "value": {"fill": "dash", "dash": _pattern(query.dashes)}}],
        }
        for index, query in enumerate(queries)
        if query.dashes
    ]
    placement = "right" if made["gridPos"]["w"] >= BESIDE_WIDTH else "bottom"
    made["options"] = {
        "legend": {"displayMode": "table", "placement": placement, "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return made


def number(title: str, description: str, unit: str, query: Query, **looks: Unpack[Looks]) -> Panel:
    """One big figure as of now."""
    made = _as_of_now("stat", (title, description, unit), (query,), {"width": 4, **looks})
    made["gridPos"]["h"] = 4
    made["options"] = {
        "colorMode": "value", "graphMode": "none", "textMode": "value_and_name", "justifyMode": "auto",
        "reduceOptions": LAST,
    }  # fmt: skip
    return made


def bars(title: str, description: str, unit: str, *queries: Query, **looks: Unpack[Looks]) -> Panel:
    """A bar for each series as of now, with its figure written at the end."""
    made = _as_of_now("bargauge", (title, description, unit), queries, {"width": 8, **looks})
    most = {"max": looks.get("top", 1)} if unit == "percentunit" else {}
    made["fieldConfig"]["defaults"] |= {"min": 0, **most}
    made["options"] = {
        "displayMode": "basic", "orientation": "horizontal", "valueMode": "text", "namePlacement": "left",
        "showUnfilled": True, "reduceOptions": LAST,
    }  # fmt: skip
    return made


def states(title: str, description: str, query: Query, **looks: Unpack[Looks]) -> Panel:
    """A strip for each series that says in `words` how it was when."""
    made = _panel("state-timeline", (title, description, "none"), (query,), {"width": 12, **looks})
    made["fieldConfig"]["defaults"]["custom"] = {"lineWidth": 0, "fillOpacity": 70}
    made["options"] = {
        "showValue": "always", "mergeValues": True, "rowHeight": 0.8,
        "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "single"},
    }  # fmt: skip
    return made


def table(title: str, what: tuple[str, str], query: Query, columns: Mapping[str, str], **looks: Unpack[Looks]) -> Panel:
    """A line for each series as of now: these labels under these headings, and the figure under `Value`.

    `what` is the description and the unit.
    """
    made = _as_of_now("table", (title, *what), (query,), {"width": 12, **looks})
    made["options"] = {"showHeader": True, "cellHeight": "sm"}
    for target in made["targets"]:
        target["format"] = "table"
    order = {name: index for index, name in enumerate([*columns, "Value"])}
    made["transformations"] = [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(order)}}},
        {"id": "organize", "options": {"indexByName": order, "renameByName": dict(columns), "excludeByName": {}}},
    ]
    return made


def words_only(title: str, text: str, *, width: int = 24, height: int = 4) -> Panel:
    """A piece of text."""
    return {
        "type": "text", "title": title, "description": "", "options": {"mode": "markdown", "content": text},
        "gridPos": {"w": width, "h": height},
    }  # fmt: skip


def _as_of_now(kind: str, what: tuple[str, str, str], queries: Iterable[Query], looks: Looks) -> Panel:
    made = _panel(kind, what, queries, looks)
    made["targets"] = [target | {"instant": True, "range": False} for target in made["targets"]]
    return made


def _panel(kind: str, what: tuple[str, str, str], queries: Iterable[Query], looks: Looks) -> Panel:
    title, description, unit = what
    steps = looks.get("steps", ((None, FINE),))
    words = looks.get("words", {})
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"w": looks["width"], "h": 8},
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "color": _colour(kind, has_steps="steps" in looks),
                "thresholds": {
                    "mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps],
                },
                "mappings": [
                    {"type": "value", "options": {value: {"text": text} for value, text in words.items()}}
                ] if words else [],
            },
            "overrides": [],
        },
        "targets": [
            {
                "refId": _letter(index), "datasource": SOURCE, "editorMode": "code", "expr": query.expression,
                "legendFormat": query.legend, "instant": False, "range": True,
            }
            for index, query in enumerate(queries)
        ],
    }  # fmt: skip


def _colour(kind: str, *, has_steps: bool) -> dict[str, str]:
    """Lines are told from each other by colours; elsewhere only what is judged may look good or bad."""
    if kind == "timeseries":
        return {"mode": "palette-classic"}
    return {"mode": "thresholds"} if has_steps else {"mode": "fixed", "fixedColor": PLAIN}


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _pattern(dashes: str) -> list[int]:
    return [int(part) for part in dashes.split(",")]


# --- pages -----------------------------------------------------------------------------------------------------------


def page(made: Page) -> dict[str, Any]:
    """The dashboard as Grafana reads it, with links to those of the other pages that are there."""
    return {
        "uid": made.uid,
        "title": made.title,
        "description": made.description,
        "tags": list(made.tags),
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": f"now-{made.hours}h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards", "title": "Pages", "url": "", "keepTime": True, "includeVars": False,
                "targetBlank": False, "icon": "dashboard", "tooltip": "", "tags": [TAG], "asDropdown": False,
            }
        ],
        "templating": {"list": [_source(), *map(_variable, made.variables)]},
        "annotations": {"list": []},
        "panels": list(_placed(made.rows)),
    }  # fmt: skip


def _source() -> dict[str, Any]:
    return {
        "type": "datasource", "name": "source", "label": "Figures", "query": "prometheus", "hide": 0, "regex": "",
        "current": {"text": "prometheus", "value": "prometheus"}, "refresh": 1, "multi": False, "includeAll": False,
        "options": [],
    }  # fmt: skip


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "type": "query", "name": variable.name, "label": variable.title, "datasource": SOURCE, "hide": 0,
        "query": {"query": variable.query, "refId": f"variable-{variable.name}"}, "definition": variable.query,
        "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ALL, "regex": "", "options": [],
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _placed(rows: Mapping[str, Iterable[Panel]]) -> Iterator[Panel]:
    """Panels from left to right, as many as fit, under the heading of their row."""
    number_of, y = 1, 0
    for title, panels in rows.items():
        yield {
            "id": number_of, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
        }  # fmt: skip
        number_of, y = number_of + 1, y + 1
        x = height = 0
        for panel in panels:
            size = panel["gridPos"]
            if x + size["w"] > COLUMNS:
                x, y, height = 0, y + height, 0
            yield _finished(panel, number_of, x, y)
            number_of, x, height = number_of + 1, x + size["w"], max(height, size["h"])
        y += height


def _finished(panel: Panel, number_of: int, x: int, y: int) -> Panel:
    return {"id": number_of, **panel, "gridPos": {"x": x, "y": y, **panel["gridPos"]}}
