"""Where the page about the farm is shown, and what it is told."""

from __future__ import annotations

import json

import pytest

from corral.config.inventory import Inventory
from corral.config.load import validate
from corral.config.source import parse
from corral.gateway import page

INVENTORY = """
schema_version: 1
name: site
hosts: {box: {address: 192.0.2.10}}
nodes: {mac: {url: "http://192.0.2.9:8080", engine: mlx, model: m}, far: {engine: cloud, model: openai/gpt-5}}
pools: {chat: {on: {node: mac}, aliases: [talk]}, cloud: {on: {node: far}}}
gateway: {host: box, entrance: {port: 443}, page: {shown: SHOWN, links: {"it's Grafana": "http://192.0.2.7:3000"}}}
"""
QUEUES = [{"name": "chat", "pool": "chat", "pools": ["chat"], "is_lease": False, "servers": [{"name": "mac"}]}]


def inventory_of(shown: str, aliases: str = "talk") -> Inventory:
    return validate(parse(INVENTORY.replace("SHOWN", shown).replace("talk", aliases), "inventory.yaml")).inventory


@pytest.mark.parametrize(
    ("shown", "is_inside", "has_page"),
    [
        ("inside", True, True),
        ("inside", False, False),
        ("everywhere", False, True),
        ("nowhere", True, False),
        ("nowhere", False, False),
    ],
)
def test_the_page_is_where_the_inventory_says(shown: str, *, is_inside: bool, has_page: bool) -> None:
    inventory = inventory_of(shown)
    assert bool(page.data(inventory, QUEUES, is_inside=is_inside)) == has_page
    assert page.data(inventory, [], is_inside=is_inside) == ""


def test_a_page_that_is_too_long_leaves_out_aliases() -> None:
    inventory = inventory_of("inside", ", ".join(f"alias-{number}" for number in range(2000)))
    assert [pool["aliases"] for pool in json.loads(page.data(inventory, QUEUES, is_inside=True))["pools"]] == [[], []]
    assert page.data(inventory, [QUEUES[0] | {"servers": [{"name": "mac"}] * 9000}], is_inside=True) == ""


def test_the_page_knows_pools_inside_only_and_no_quote_ends_its_text() -> None:
    inventory = inventory_of("everywhere")
    inside, outside = (page.data(inventory, QUEUES, is_inside=side) for side in (True, False))
    assert "'" not in inside + outside
    assert json.loads(outside) == {
        "admin": 0, "name": "site", "pools": [], "links": [["it's Grafana", "http://192.0.2.7:3000"]],
    }  # fmt: skip
    assert json.loads(inside)["admin"] == inventory.gateway.admin_port
    chat, cloud = json.loads(inside)["pools"]
    assert chat == {"name": "chat", "kind": "chat", "aliases": ["talk"], "queue": "chat", "replicas": ["mac"]}
    assert (cloud["queue"], cloud["replicas"]) == ("", [])
