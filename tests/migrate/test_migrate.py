"""Older inventories are brought to the present format step by step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.errors import SiteError
from corral.inventory import SCHEMA_VERSION
from corral.migrate import STEPS, Step, migrate
from corral.yamlsource import Source, parse, read_source

HERE = Path(__file__).parent


def _zero_to_one(data: dict[str, Any]) -> dict[str, Any]:
    """An artificial step: what was called machines is called hosts."""
    data["hosts"] = data.pop("machines")
    return data


def _one_to_two(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "pools": {name: {"replicas": pool} for name, pool in data["pools"].items()}}


ARTIFICIAL: dict[int, Step] = {0: _zero_to_one, 1: _one_to_two}


def source_of(name: str) -> Source:
    return read_source(HERE / name)


@pytest.mark.parametrize(("to", "expected"), [(1, "after-one-step.yaml"), (2, "after-two-steps.yaml")])
def test_steps_follow_each_other(to: int, expected: str) -> None:
    source = source_of("artificial.yaml")

    assert migrate(source.data, source, ARTIFICIAL, to) == yaml.safe_load((HERE / expected).read_text())


def test_the_input_stays_as_it_is() -> None:
    source = source_of("artificial.yaml")
    before = copy.deepcopy(source.data)

    migrate(source.data, source, ARTIFICIAL, 2)

    assert source.data == before


def test_a_step_cannot_change_what_the_data_shares_with_the_input() -> None:
    source = parse("schema_version: 0\na: {b: [1]}\n", "f")

    migrated = migrate(source.data, source, {0: lambda data: data}, 1)
    migrated["a"]["b"].append(2)

    assert source.data == {"schema_version": 0, "a": {"b": [1]}}


def test_the_present_version_needs_no_step() -> None:
    source = parse(f"schema_version: {SCHEMA_VERSION}\na: 1\n", "f")

    assert migrate(source.data, source) == source.data


@pytest.mark.parametrize("version", ['"1"', "1.0", "true", "one", "null", "[1]"])
def test_what_is_no_version_is_left_for_the_validator(version: str) -> None:
    source = parse(f"schema_version: {version}\n", "f")

    assert migrate(source.data, source, ARTIFICIAL, 2) == source.data


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (
            3,
            ("f:2:1: schema_version: this inventory is written for a newer corral (version 3); "
            "this one knows up to 2; update corral"),
        ),
        (-1, "f:2:1: schema_version: there is no schema_version -1; the present one is 2"),
        (-1000000000000, "f:2:1: schema_version: there is no schema_version -1000000000000; the present one is 2"),
    ],
)  # fmt: skip
def test_other_versions_are_refused(version: int, expected: str) -> None:
    source = parse(f"a: 1\nschema_version: {version}\n", "f")

    with pytest.raises(SiteError) as caught:
        migrate(source.data, source, ARTIFICIAL, 2)

    assert str(caught.value) == expected


def test_a_gap_in_the_steps_is_no_crash() -> None:
    source = parse("schema_version: 0\npools: {}\n", "f")

    with pytest.raises(SiteError, match="there is no schema_version 0"):
        migrate(source.data, source, {1: _one_to_two}, 2)


def test_there_is_a_step_for_every_older_version() -> None:
    assert sorted(STEPS) == list(range(1, SCHEMA_VERSION))


def test_every_step_has_a_pair_of_fixtures() -> None:
    for version in STEPS:
        source = source_of(f"v{version}.yaml")
        migrated = migrate(source.data, source, STEPS, version + 1)
        assert migrated == yaml.safe_load((HERE / f"v{version}-migrated.yaml").read_text())
