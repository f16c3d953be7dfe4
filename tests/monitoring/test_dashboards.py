"""Every dashboard asks only for what there is, says what it shows, and shows something (004-52..54, F13)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from corral.components import litellm
from tests.monitoring import figures
from tests.monitoring.boards import asked, dashboards, panels, plain, troubles
from tests.monitoring.recorded import answer, names_in, recorded
from tests.monitoring.test_catalogue import OWN, catalogue, made, shipped, unknown
from tools.catalogue import TARGET_LABELS
from tools.dashboards import FOLDER, texts
from tools.panels import TOKENS

BOARDS = sorted(path.name for path in FOLDER.glob("*.json"))
IN_A_WORD = {
    "reqps",
    "percentunit",
    "s",
    "bytes",
    "Bps",
    "celsius",
    "watt",
    "hertz",
    "ops",
    "currencyUSD",
    "none",
    TOKENS,
}
RENAMED = "haproxy_backend_current_queue"
BEHIND_IT = {"farm.json: Queue A", "gateway.json: Sessions B", "pool.json: Queue A"}


def test_the_committed_dashboards_are_fresh() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")} == texts(), (
        "write them again with: make dashboards"
    )


def test_queries_name_only_what_there_is() -> None:
    assert [f"{query.where}: {found}" for query in asked() for found in unknown(query.plain)] == []


def test_a_name_outside_the_catalogue_is_found() -> None:
    assert list(unknown(plain('rate(llamacpp:kv_cache_usage_ratio{pool=~"$pool"}[$__rate_interval])'))) == [
        "no metric llamacpp:kv_cache_usage_ratio"
    ]


def test_the_gateway_keeps_the_figures_that_somebody_looks_at_and_no_others() -> None:
    """LiteLLM pays for each figure with every request; one that is left out of its list would be an empty panel."""
    expressions = [*(rule["expr"] for _, rule in shipped()), *(query.plain for query in asked())]
    names = {name for expression in expressions for name in names_in(expression) if name.startswith("litellm_")}
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names} == set(litellm.METRICS)


def test_recorded_figures_are_such_as_programs_have() -> None:
    wrong = []
    for series in figures.series():
        if series.name in made() or series.name in OWN:
            continue
        strange = set(series.labels) - catalogue().get(series.name, set()) - TARGET_LABELS
        if series.name not in catalogue() or strange:
            wrong.append(f"{series}: {sorted(strange) or 'no such metric'}")
    assert wrong == []


# --- what a linter for dashboards looks for --------------------------------------------------------------------------


def findings(board: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a dashboard that a person could see without any figures."""
    if board["editable"]:
        yield "can be edited in Grafana, where the next start would undo it"
    if board["templating"]["list"][0]["type"] != "datasource":
        yield "has no choice of the data source"
    names = {variable["name"] for variable in board["templating"]["list"]}
    ids = [panel["id"] for panel in board["panels"]]
    if len(ids) != len(set(ids)):
        yield "gives a number to two panels"
    for panel in panels(board):
        yield from (f"{panel['title']}: {found}" for found in _findings(panel, names))
    used = {name for panel in panels(board) for target in panel.get("targets", ()) for name in _used(target["expr"])}
    yield from (f"variable {name} changes nothing" for name in names - used - {"source"})


def _used(expression: str) -> set[str]:
    return {name for name in re.findall(r"\$(\w+)", expression) if not name.startswith("__")}


def _findings(panel: dict[str, Any], variables: set[str]) -> Iterator[str]:
    if panel["type"] == "text":
        return
    if not panel["title"] or len(panel["description"]) < 8:
        yield "says too little about itself"
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["unit"] not in IN_A_WORD:
        yield f"unit {defaults['unit']}"
    if not panel["targets"]:
        yield "asks nothing"
    for target in panel["targets"]:
        if target["datasource"]["uid"] != "${source}":
            yield "has a data source of its own"
        if not target["legendFormat"] and panel["type"] != "table":
            yield "has a series without a name"
        if strange := _used(target["expr"]) - variables:
            yield f"uses {sorted(strange)}, which nobody can choose"
        yield from _about_counters(target["expr"])
    steps = defaults["thresholds"]["steps"]
    if len(steps) > 1 and not _says_it_without_colour(panel):
        yield "colour alone says that a threshold is passed"


def _says_it_without_colour(panel: dict[str, Any]) -> bool:
    """A line where the threshold is, or the value itself or a word for it in letters."""
    options, defaults = panel["options"], panel["fieldConfig"]["defaults"]
    says: dict[str, bool] = {
        "timeseries": defaults.get("custom", {}).get("thresholdsStyle", {}).get("mode") != "off",
        "stat": options.get("textMode") == "value_and_name",
        "bargauge": options.get("valueMode") == "text",
        "state-timeline": options.get("showValue") == "always" and bool(defaults["mappings"]),
        "table": True,
    }
    return says[panel["type"]]


def _about_counters(expression: str) -> Iterator[str]:
    """A counter is only ever looked at through rate or increase, and in a window that fits the page."""
    for name in names_in(plain(expression)):
        is_counter = name.endswith("_total") and name in catalogue() and not name.startswith("ALERTS")
        rated = re.search(rf"(rate|increase|changes)\({re.escape(name)}\b", expression)
        if is_counter and not rated:
            yield f"looks at the counter {name} without rate"
    for window in re.findall(r"\brate\([^\[]*\[([^\]]+)\]", expression):
        if window != "$__rate_interval":
            yield f"rate over {window}"


@pytest.mark.parametrize("file", BOARDS)
def test_a_dashboard_can_be_read(file: str) -> None:
    assert list(findings(dashboards()[file])) == []


def test_the_linter_finds_what_is_wrong() -> None:
    board = dict(dashboards()["farm.json"], editable=True)
    number, *_ = panels(board)
    bad = number | {
        "description": "",
        "options": {"textMode": "none"},
        "targets": [number["targets"][0] | {"expr": 'rate(haproxy_backend_retry_warnings_total{a="$x"}[1m]) + up'}],
    }
    counter = number | {"targets": [number["targets"][0] | {"expr": "litellm_requests_metric_total"}]}
    found = list(findings(board | {"panels": [bad, counter]}))
    assert found == [
        "can be edited in Grafana, where the next start would undo it",
        "gives a number to two panels",
        "Firing alerts: says too little about itself",
        "Firing alerts: uses ['x'], which nobody can choose",
        "Firing alerts: rate over 1m",
        "Firing alerts: colour alone says that a threshold is passed",
        "Firing alerts: looks at the counter litellm_requests_metric_total without rate",
    ]


def test_panels_of_a_page_do_not_lie_upon_each_other() -> None:
    for file, board in dashboards().items():
        cells: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            covered = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & covered, f"{file}: {panel['title']}"
            assert place["x"] + place["w"] <= 24, f"{file}: {panel['title']}"
            cells |= covered


def test_links_lead_to_pages_that_there_are() -> None:
    """A site has the pages of its components only: Grafana looks by tag which others there are."""
    for board in dashboards().values():
        assert [(link["type"], link["tags"]) for link in board["links"]] == [("dashboards", board["tags"])]
    assert {tuple(board["tags"]) for board in dashboards().values()} == {("corral",)}


# --- with figures ----------------------------------------------------------------------------------------------------


@pytest.mark.needs("prometheus", "promtool")
@pytest.mark.parametrize("file", BOARDS)
def test_every_query_returns_figures(file: str, prometheus: str) -> None:
    """On recorded figures, in a real Prometheus, at the height of the load."""
    ask = partial(answer, prometheus, when=figures.END - figures.SPAN_S // 3)
    assert [trouble for query in asked(file) for trouble in troubles(query, ask)] == []


@pytest.mark.needs("prometheus", "promtool")
def test_a_renamed_metric_empties_panels(tmp_path: Path) -> None:
    """What an upgrade of a program does to public dashboards; here exactly the panels behind that name are found."""
    with recorded(tmp_path, figures.text(renamed=RENAMED)) as url:
        ask = partial(answer, url, when=figures.END - figures.SPAN_S // 3)
        found = [trouble for query in asked() for trouble in troubles(query, ask)]
    assert {re.sub(r": no data: .*", "", trouble) for trouble in found} == BEHIND_IT


def test_every_expression_can_be_parsed() -> None:
    for query in asked():
        promql.parse(query.plain)
