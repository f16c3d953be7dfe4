"""Pages of Grafana as pictures: those in docs show the pages of today, and every panel of every page can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.monitoring import figures
from tests.monitoring.boards import dashboards
from tools.draw_dashboards import PICTURES, SHOWN, UNIT_PX, WIDTH, draw, fingerprint, fingerprint_of, formatted

BUSY = figures.END - figures.SPAN_S // 4
MOST_BYTES = 300 * 1024


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_in_docs_show_the_pages_of_today(name: str) -> None:
    picture = PICTURES / f"{name}.png"
    assert fingerprint_of(picture) == fingerprint(dashboards()[f"{name}.json"]), "draw them again with: make pictures"
    assert picture.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.8764, "percentunit", "87.6%"),
        (0, "percentunit", "0%"),
        (0.0004, "s", "400 µs"),
        (0, "s", "0 s"),
        (90, "s", "1.5 min"),
        (6.5 * 2**30, "bytes", "6.5 GiB"),
        (1.7e9, "hertz", "1.7 GHz"),
        (78, "celsius", "78 °C"),
        (123.4, "suffix:tok/s", "123 tok/s"),
        (float("nan"), "watt", "-"),
    ],
)
def test_values_have_their_units(value: float, unit: str, text: str) -> None:
    assert formatted(value, unit) == text


@pytest.mark.needs("prometheus", "promtool")
@pytest.mark.parametrize("file", sorted(dashboards()))
def test_every_panel_of_every_page_can_be_drawn(file: str, prometheus: str, tmp_path: Path) -> None:
    page = dashboards()[file]
    assert draw(page, prometheus, BUSY, tmp_path / "page.png") == []
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == WIDTH
        assert image.height > UNIT_PX * max(panel["gridPos"]["y"] for panel in page["panels"])


@pytest.mark.needs("prometheus", "promtool")
def test_an_empty_panel_is_named(prometheus: str, tmp_path: Path) -> None:
    page = json.loads(json.dumps(dashboards()["farm.json"]).replace("pool:queue_time:seconds", "no_such_metric"))
    assert draw(page, prometheus, BUSY, tmp_path / "page.png") == ["Time in the queue"]
