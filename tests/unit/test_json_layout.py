"""JSON that is committed: the same data, in lines of 120 columns where it can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.json_layout import WIDTH, laid_out

ROOT = Path(__file__).resolve().parents[2]
WORD = "word" * 10

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40),
    lambda below: st.lists(below) | st.dictionaries(st.text(max_size=20), below),
    max_leaves=40,
)


@pytest.mark.slow
@given(values)
def test_the_data_stay_the_same(value: object) -> None:
    assert json.loads(laid_out(value)) == value


@pytest.mark.slow
@given(st.recursive(st.just("short"), lambda below: st.lists(below, min_size=1, max_size=9), max_leaves=99))
def test_no_line_is_wider_than_it_has_to_be(value: object) -> None:
    assert max(map(len, laid_out(value).splitlines())) <= WIDTH


def test_what_fits_stands_on_one_line() -> None:
    assert laid_out({"a": [1, {"b": None}]}) == '{"a": [1, {"b": null}]}\n'


def test_members_that_fit_share_lines_and_long_objects_follow_each_other() -> None:
    panel = {"id": 1, "kind": "x", "legend": WORD, "targets": [WORD, WORD], "unit": "s"}
    assert laid_out({"panels": [panel, panel]}).splitlines() == [
        "{",
        ' "panels": [{',
        f'  "id": 1, "kind": "x", "legend": "{WORD}",',
        f'  "targets": ["{WORD}", "{WORD}"], "unit": "s"',
        " }, {",
        f'  "id": 1, "kind": "x", "legend": "{WORD}",',
        f'  "targets": ["{WORD}", "{WORD}"], "unit": "s"',
        " }]",
        "}",
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/benchmarks/*.json")), ids=lambda path: path.name)
def test_committed_results_are_laid_out(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert laid_out(json.loads(text)) == text
