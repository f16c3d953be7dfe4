"""The inventory's own promises: what it accepts, and that every field and pattern has words."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from corral.config.inventory import PATTERNS, Host, Inventory, Pool, parse_gpu_numbers
from corral.config.schema import inventory_schema
from tests.reference import _models

MODELS = _models(Inventory)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_everything_is_described(model: type[BaseModel]) -> None:
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert (field.description or "").rstrip().endswith("."), f"{model.__name__}.{name}"


def patterns_in(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(patterns_in, node))
    if not isinstance(node, dict):
        return set()
    own = {node["pattern"]} if isinstance(node.get("pattern"), str) else set()
    return own.union(*map(patterns_in, node.values()))


def test_every_pattern_has_words() -> None:
    """`validation` explains a text by its pattern."""
    assert patterns_in(inventory_schema()) <= {pattern.expression for pattern in PATTERNS.values()}


def test_the_schema_is_plain_json() -> None:
    assert json.loads(json.dumps(inventory_schema()))["required"] == [
        "schema_version", "name", "hosts", "pools", "gateway",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        (3, (3,)), ("3", (3,)), ("1-3", (1, 2, 3)), ("1-3,5", (1, 2, 3, 5)), ("2, 4 ,6", (2, 4, 6)), ("7-7", (7,)),
        ([1, 3], (1, 3)), ("1024", (1024,)),
    ],
)  # fmt: skip
def test_gpu_numbers(written: Any, numbers: tuple[int, ...]) -> None:
    assert Pool.model_validate({"on": {"host": "x", "gpus": written}}).on[0].gpus == numbers


@pytest.mark.parametrize(
    "written", ["", "1-", "-1", "1--2", "a", "1;2", "\u0661", "1.5", 1.5, True, {}, "0-3", "1-1025"]
)
def test_what_is_no_gpu_number(written: Any) -> None:
    with pytest.raises(ValueError, match="GPU"):
        parse_gpu_numbers(written)


def test_one_place_is_a_list_of_one() -> None:
    assert Pool.model_validate({"on": {"host": "x"}}) == Pool.model_validate({"on": [{"host": "x"}]})


def test_equal_cards_are_written_once() -> None:
    short = Host.model_validate({"gpus": {"card": "l4", "count": 2, "power_limit_w": 60}})

    assert short == Host.model_validate({"gpus": [{"card": "l4", "power_limit_w": 60}] * 2})
    assert Host.model_validate({"gpus": {"card": "l4"}}) == Host.model_validate({"gpus": [{"card": "l4"}]})
    assert Host.model_validate({"gpus": {"card": "l4", "count": 0}}).gpus == ()


@pytest.mark.parametrize(
    ("address", "kept"),
    [("192.0.2.1", "192.0.2.1"), ("2001:DB8:0::1", "2001:db8::1"), ("127.0.0.1", "127.0.0.1"), ("::1", "::1")],
)
def test_addresses_are_kept_in_their_shortest_form(address: str, kept: str) -> None:
    assert Host.model_validate({"address": address}).address == kept


@pytest.mark.parametrize(
    "address", ["0" + ".0" * 3, "::", "224.0.0.1", "fe80::1%eth0", "localhost", "192.0.2.1/24", "1.2.3", " "]
)
def test_what_is_no_address_of_a_host(address: str) -> None:
    with pytest.raises(ValidationError):
        Host.model_validate({"address": address})


def test_notes_are_kept_apart() -> None:
    data: dict[str, Any] = {
        "schema_version": 1, "name": "x", "hosts": {"box": {}}, "gateway": {"host": "box"},
        "pools": {"p": {"on": {"host": "box"}}}, "x-mine": {"any": ["thing"]},
    }  # fmt: skip

    inventory = Inventory.model_validate(data)

    assert inventory.notes == {"x-mine": {"any": ["thing"]}}
    assert "x-mine" not in inventory.model_dump()
    assert inventory.model_copy().notes == inventory.notes
    assert "x-mine" in data
