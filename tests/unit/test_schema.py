"""The JSON Schema that editors use: fresh, described, and of one mind with the loader."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from corral.config.load import load_inventory
from corral.config.schema import inventory_schema, schema_text
from corral.config.source import read_source
from corral.errors import SiteError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "inventory.schema.json"
INVENTORIES = sorted(
    [ROOT / "inventory.yaml", *ROOT.glob("inventories/*.yaml"), *ROOT.glob("tests/golden/*/inventory.yaml")]
)
MODELINE = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")

each_inventory = pytest.mark.parametrize("path", INVENTORIES, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_committed_schema_is_fresh() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == schema_text(), "run: make schema"


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(inventory_schema())


def test_every_field_is_described() -> None:
    assert [place for place, has in fields(inventory_schema()) if not has] == []


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Every field of every model, and whether it, or what it leads to, says what it is."""
    for name, model in {"Inventory": schema, **schema["$defs"]}.items():
        for key, field in model.get("properties", {}).items():
            target = schema["$defs"].get(str(field.get("$ref", "")).rpartition("/")[2], {})
            yield f"{name}.{key}", bool(field.get("description") or target.get("description"))


@each_inventory
def test_examples_hold(path: Path) -> None:
    jsonschema.Draft202012Validator(inventory_schema()).validate(read_source(path).data)


@each_inventory
def test_examples_tell_editors_where_the_schema_is(path: Path) -> None:
    found = MODELINE.match(path.read_text(encoding="utf-8"))
    assert found is not None
    assert (path.parent / found[1]).resolve() == COMMITTED


def example() -> dict[str, Any]:
    data: dict[str, Any] = copy.deepcopy(read_source(ROOT / "inventories" / "heartcode.yaml").data)
    return data


def errors_of(data: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(inventory_schema()).iter_errors(data)]


def test_own_keys_are_allowed_and_others_are_not() -> None:
    assert errors_of(example() | {"x-notes": {"any": ["thing"]}}) == []
    assert errors_of(example() | {"gatway": {}}) != []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("gateway", "port"), 70000),
        (("gateway", "port"), "4000"),
        (("gateway", "balancing"), "random"),
        (("hosts", "pea", "ram_gib"), "32GB"),
        (("hosts", "Pea!"), {}),
        (("pools", "heartcode-image", "limits"), {"rpm": 0}),
        (("pools", "heartcode-image", "speed"), 3),
        (("pools", "heartcode-image", "on"), []),
        (("models", "ssd-1b", "kind"), "picture"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(path: tuple[str, ...], value: object, tmp_path: Path) -> None:
    data = example()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "inventory.yaml"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SiteError, match=r"inventory\.yaml:1:"):
        load_inventory(file)
    assert errors_of(data) != []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("hosts", "pea", "gpus"), [{"card": "p104-100"}] * 8),
        (("hosts", "pea", "gpus"), {"card": "p104-100", "count": 8}),
        (("pools", "heartcode-image", "on"), {"host": "pea", "gpus": 8}),
        (("pools", "heartcode-image", "on"), [{"host": "pea", "gpus": "8"}]),
        (("pools", "heartcode-image", "on"), {"host": "pea", "gpus": [8]}),
    ],
)
def test_the_schema_takes_every_short_form(path: tuple[str, ...], value: object, tmp_path: Path) -> None:
    data = example()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "inventory.yaml"
    file.write_text(json.dumps(data), encoding="utf-8")
    load_inventory(file)
    assert errors_of(data) == []
