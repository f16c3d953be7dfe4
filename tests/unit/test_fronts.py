"""The address at which clients inside find the gateway, in every mode."""

from __future__ import annotations

import pytest

from corral.build import build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.verbs.keys.gateway import client_address, gateway_address

INVENTORY = """
schema_version: 1
name: site
hosts: {box: {address: 192.0.2.10}}
nodes: {mac: {url: "http://192.0.2.9:8080", engine: mlx, model: m}}
pools: {chat: {on: {node: mac}}}
"""


@pytest.mark.parametrize(
    ("gateway", "address"),
    [
        ("", "192.0.2.10"),
        (", address: 198.51.100.7", "198.51.100.7"),
        (", entrance: {port: 8443}", "127.0.0.1"),
        (", balancing: direct", "192.0.2.10"),
        (", balancing: direct, address: 198.51.100.7", "198.51.100.7"),
    ],
)
def test_the_gateways_port_is_published_where_clients_are_told(gateway: str, address: str) -> None:
    plan = build_plan(validate(parse(f"{INVENTORY}gateway: {{host: box{gateway}}}\n", "inventory.yaml")))
    published = {
        port.publish for service in plan.contributions.services for port in service.ports if port.number == 4000
    }
    assert published == {address}
    assert client_address(plan) == f"http://{address}:4000"
    is_bare = "direct" in gateway
    assert gateway_address(plan) == (f"http://{address}:4000" if is_bare else "http://127.0.0.1:4002")


@pytest.mark.parametrize(("runtime", "ports"), [("compose", [4001, 4001, 4001]), ("local", [4001, 4003, 4004])])
def test_every_worker_has_a_port_that_is_free_where_it_runs(runtime: str, ports: list[int]) -> None:
    text = INVENTORY.replace("192.0.2.10}", f"127.0.0.1, runtime: {runtime}}}")
    plan = build_plan(validate(parse(f"{text}gateway: {{host: box, workers: 3}}\n", "inventory.yaml")))
    workers = [service for service in plan.contributions.services if service.component == "litellm"]
    assert [service.name for service in workers] == ["litellm", "litellm-2", "litellm-3"]
    assert [service.health.port for service in workers] == ports
    assert [len(service.after) for service in workers] == [2, 3, 3]
