"""What the committed dashboards ask: every query of every panel and variable."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tools.dashboards import FOLDER

LEGEND_LABEL = re.compile(r"\{\{(\w+)\}\}")
VARIABLE_QUERY = re.compile(r"label_values\((.+), (\w+)\)")
RANGE = "1h"
RATE = "5m"


@dataclass(frozen=True)
class Asked:
    """One query, where it stands, and the labels that its panel shows."""

    where: str
    expression: str
    labels: frozenset[str]

    @property
    def plain(self) -> str:
        """As Grafana sends it when a person has chosen everything."""
        return plain(self.expression)


def plain(expression: str) -> str:
    """An expression whose variables have values: everything, the last hour."""
    expression = expression.replace("$__rate_interval", RATE).replace("$__range", RANGE)
    return re.sub(r"\$\w+", ".*", expression)


@cache
def dashboards() -> dict[str, dict[str, Any]]:
    """The committed dashboards by file name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a dashboard, without the headings of its rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def asked(*files: str) -> Iterator[Asked]:
    """Every query of these dashboards, or of all."""
    for name, board in dashboards().items():
        if files and name not in files:
            continue
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = VARIABLE_QUERY.fullmatch(variable["query"]["query"])
                assert found, f"{name}: ${variable['name']} asks {variable['query']['query']}"
                yield Asked(f"{name}: ${variable['name']}", found[1], frozenset({found[2]}))
        for panel in panels(board):
            for target in panel.get("targets", ()):
                labels = frozenset(LEGEND_LABEL.findall(target["legendFormat"]))
                yield Asked(f"{name}: {panel['title']} {target['refId']}", target["expr"], labels)


def troubles(query: Asked, ask: Callable[[str], list[dict[str, Any]]]) -> Iterator[str]:
    """What a person would see of a query that does not work: no data, no number, a legend with a hole."""
    series = ask(query.plain)
    if not series:
        yield f"{query.where}: no data: {query.plain}"
    for found in series:
        if not math.isfinite(float(found["value"][1])):
            yield f"{query.where}: {found['metric']} is {found['value'][1]}"
        if missing := query.labels - found["metric"].keys():
            yield f"{query.where}: {found['metric']} has no label {', '.join(sorted(missing))}"
