"""The edge of a host: who may ask what for, and which hosts have one."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.components.edge import doors_of, server_name
from corral.config.load import load_inventory
from corral.contributions import Endpoint
from corral.render.tree import render

SITE = """
schema_version: 1
name: farm
hosts:
  gate: {{address: 192.0.2.1}}
  big.iron: {{address: 192.0.2.11, gpus: {{card: rtx-3090, count: 2}}, shared: {{turns: {{}}}}}}
  watch: {{address: 192.0.2.12}}
models:
  m: {{source: m-1b-q4_0.gguf, kind: chat, size_gib: 1}}
  v:
    {{source: "hf:owner/m", revision: "1111111111111111111111111111111111111111", kind: chat, server: vllm,
     size_gib: 1}}
pools:
  chat: {{model: v, on: {{host: big.iron, gpus: 1}}, ports: 9000}}
  a: {{model: m, on: {{host: big.iron, gpus: 2, shared: turns}}}}
  b: {{model: m, on: {{host: big.iron, gpus: 2, shared: turns}}}}
  near: {{model: m, on: {{host: gate}}}}
gateway: {{host: gate, database: {database}}}
monitoring: {{host: watch, gpu_exporter: none}}
"""


@pytest.fixture(params=["true", "false"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    path = tmp_path / "inventory.yaml"
    path.write_text(SITE.format(database=request.param))
    return build_plan(load_inventory(path))


def test_services_publish_nothing_for_other_hosts(plan: Plan) -> None:
    published = {
        (service.host, port.publish, port.number)
        for service in plan.contributions.services
        for port in service.ports
        if port.publish and port.publish != "127.0.0.1"
    }
    assert {item for item in published if item[0] != "watch"} == {
        ("gate", "192.0.2.1", 4000),
        ("gate", "192.0.2.1", 4443),
        ("big.iron", "192.0.2.11", 4443),
    }


def test_the_gateway_gets_servers_and_prometheus_gets_metrics(plan: Plan) -> None:
    doors = {door.service: door for door in doors_of(plan.site, plan.contributions, "big.iron")}
    assert set(doors) == {"chat-1", "turns", "node-exporter"}
    assert doors["chat-1"].paths["gateway"] == {"/v1/", "/health"}
    assert doors["turns"].paths["gateway"] == {"/v1/", "/health", "/models", "/models/load", "/models/unload"}
    assert {door.paths["monitoring"] for door in doors.values()} == {frozenset({"/metrics"})}
    assert "gateway" not in doors["node-exporter"].paths
    near = {door.service for door in doors_of(plan.site, plan.contributions, "gate")}
    assert {"haproxy", "litellm", "node-exporter"} <= near


def test_prometheus_elsewhere_has_no_key_of_anybody(plan: Plan) -> None:
    secrets = {secret.name for secret in plan.secrets_of("watch")}
    assert {"EDGE_AUTHORITY", "MONITORING_CERTIFICATE"} <= secrets
    assert not secrets & {"LITELLM_MASTER_KEY", "LITELLM_METRICS_KEY", "LLAMA_API_KEY", "VLLM_API_KEY"}
    config = render(plan)["watch/prometheus/prometheus.yml"].decode()
    assert "credentials_file: /run/secrets/L" not in config
    assert "__metrics_path__: /litellm/metrics/" in config


def test_the_gateway_sends_no_key_to_other_hosts(plan: Plan) -> None:
    config = render(plan)["gate/haproxy/haproxy.cfg"].decode()
    backends = {part.split()[0]: part for part in config.split("\nbackend ")[1:]}
    assert "del-header authorization" in backends["chat"]
    assert "del-header authorization" not in backends["near"]
    assert "sni str(chat-1.big.iron) check-sni chat-1.big.iron verifyhost big.iron" in backends["chat"]
    assert "ssl" not in backends["near"]
    assert "{ src 127.0.0.1 }" in config.partition("use_backend Shared.big.iron.turns")[2].splitlines()[0]


def test_a_dot_in_a_service_makes_no_further_label() -> None:
    assert server_name(Endpoint(80, "big.iron", "v1.5-1")) == "v1+5-1.big.iron"
