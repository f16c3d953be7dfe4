"""Inventories of another format than the present one are refused."""

from __future__ import annotations

import pytest

from corral.config.load import validate
from corral.config.source import parse
from corral.errors import SiteError

NEWER = "this inventory is written for a newer corral (version 3); this one knows up to 1; update corral"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("3", f"f:2:1: schema_version: {NEWER}"),
        ("0", "f:2:1: schema_version: there is no schema_version 0; the present one is 1"),
        ("-1000000000000", "f:2:1: schema_version: there is no schema_version -1000000000000; the present one is 1"),
    ],
)
def test_other_versions_are_refused(version: str, expected: str) -> None:
    with pytest.raises(SiteError) as caught:
        validate(parse(f"a: 1\nschema_version: {version}\n", "f"))
    assert str(caught.value) == expected


@pytest.mark.parametrize("version", ['"1"', "1.5", "true", "one", "null", "[1]"])
def test_what_is_no_version_is_one_problem_among_all(version: str) -> None:
    with pytest.raises(SiteError) as caught:
        validate(parse(f"schema_version: {version}\nnmae: x\n", "f"))
    assert "schema_version" in str(caught.value)
    assert 'unknown key "nmae"' in str(caught.value)
