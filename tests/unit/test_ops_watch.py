"""`watch` from what Prometheus answers: rows, the hottest card, CSV and clear words when nobody answers (004-56)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.errors import CorralError
from corral.runtime.hosts import ComposeHost
from corral.verbs.status import watch
from tests.trees import ROOT


def series(name: str, value: str, **labels: str) -> dict[str, Any]:
    """One of the results of an instant query."""
    return {"metric": {"__name__": name, **labels}, "value": [1_790_000_000.0, value]}


CARD = {"host": "pea", "card": "p104-100"}
ANSWER = [
    series("pool:in_flight", "3", pool="chat"),
    series("pool:slots", "4", pool="chat"),
    series("pool:queue", "2", pool="chat"),
    series("pool:requests:rate5m", "0.5", pool="chat"),
    series("pool:first_token:p95_5m", "NaN", pool="chat"),
    series("gpu:temperature:celsius", "71", gpu="1", **CARD),
    series("gpu:temperature:celsius", "86", gpu="2", **CARD),
    series("gpu:memory_used:bytes", str(6 * 1024**3), gpu="2", **CARD),
    series("gpu:utilization:ratio", "0.97", gpu="2", **CARD),
    series("gpu:throttled", "0", gpu="2", reason="power", **CARD),
    series("gpu:throttled", "1", gpu="2", reason="thermal", **CARD),
]


def shown(rows: list[watch.Row]) -> str:
    """What a person reads."""
    text = io.StringIO()
    Console(file=text, width=160, no_color=True).print(watch.view(rows))
    return text.getvalue()


def test_pools_and_cards_have_their_figures_in_units_that_people_use() -> None:
    rows = {(row.about, row.name): row.values for row in watch.rows_now(lambda _query: ANSWER)}
    assert rows["pool", "chat"] == {"busy": 3, "slots": 4, "queue": 2, "requests": 30}  # NaN: nobody was answered
    assert rows["gpu", "pea 2"] == {"temperature": 86, "memory_used": 6, "utilization": 97, "throttled": 1}


def test_everything_is_asked_in_one_question() -> None:
    asked: list[str] = []

    def ask(query: str) -> list[dict[str, Any]]:
        asked.append(query)
        return []

    assert watch.rows_now(ask) == []
    [query] = asked
    assert "gpu:temperature:celsius" in query
    assert "pool:queue" in query


def test_the_hottest_card_is_named_and_what_is_unknown_is_a_dash() -> None:
    text = shown(watch.rows_now(lambda _query: ANSWER))
    assert "hottest card: pea 2, 86 °C" in text
    [line] = [line for line in text.splitlines() if line.startswith("chat")]
    assert line.split() == ["chat", "3", "4", "2", "30.0", "-", "-", "-", "-", "-"]


def test_without_figures_it_says_so() -> None:
    assert "no figures of pools or cards yet" in shown([])


def test_csv_has_one_header_however_often_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    console = Console(file=io.StringIO())
    for _ in range(2):
        watch.watch(lambda _query: ANSWER, console, 0.01, looks=2, csv_file=path)
    lines = path.read_text().splitlines()
    assert lines[0] == "time,about,name,figure,value,unit"
    assert lines.count(lines[0]) == 1
    assert len(lines) == 1 + 4 * 9
    assert lines[1].split(",")[1:] == ["pool", "chat", "busy", "3", "requests"]


def test_a_site_without_monitoring_is_told_what_to_do_instead(tmp_path: Path) -> None:
    plan = build_plan(load_inventory(ROOT / "inventories" / "neural-farm.yaml"))
    with pytest.raises(CorralError, match="status --watch"):
        watch.asking(plan, tmp_path)


def test_who_is_not_there_or_not_prometheus_is_said(tmp_path: Path) -> None:
    plan = build_plan(load_inventory(ROOT / "inventory.yaml"))
    host = ComposeHost(plan, next(iter(plan.inventory.hosts)), tmp_path)
    with pytest.raises(CorralError, match="does not answer at"):
        watch.answered(host, 9, "up")
    with pytest.raises(CorralError, match="is not Prometheus"):
        watch.result_in("<html>")
