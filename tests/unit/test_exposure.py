"""`doctor` on a site that is open to strangers: the checklist of docs/internet.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from corral.build import build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.runtime.docker import Container
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import Snapshot
from corral.verbs.doctor.case import Case
from corral.verbs.doctor.report import CHECKS, findings

REPOSITORY = Path(__file__).resolve().parent.parent.parent
INVENTORY = """
schema_version: 1
name: open
hosts: {box: {address: 198.51.100.7}}
nodes: {mac: {url: "http://192.0.2.9:8080", engine: mlx, model: m}}
pools: {chat: {on: {node: mac}}}
"""
CARELESS = "gateway: {host: box, entrance: {port: 443}}\nconsumers: {everybody: {}}\n"
CAREFUL = """
gateway: {host: box, entrance: {port: 443, certificate: /etc/farm/tls/farm.pem, max_tokens: 1024}}
consumers: {ann: {pools: [chat], limits: {parallel: 4}}}
monitoring: {host: box, receivers: [{name: phone, kind: ntfy, secret: NTFY_URL}]}
"""
PORTS = (("198.51.100.7", 443), ("127.0.0.1", 4000), ("127.0.0.1", 4002))


def found(tmp_path: Path, more: str, *published: tuple[str, int]) -> set[str]:
    """Ids of the checks of exposure that find something."""
    plan = build_plan(validate(parse(INVENTORY + more, "inventory.yaml")))
    seen = Container("1", "box-haproxy", "open-box", "haproxy", "haproxy", "running", published=(*PORTS, *published))
    case = Case(ComposeHost(plan, "box", tmp_path), Snapshot("box", containers=(seen,)))
    return {item.rule for item in findings(case) if CHECKS[item.rule].section == "exposure"}


def test_what_is_missing_before_strangers_may_come_is_named(tmp_path: Path) -> None:
    assert found(tmp_path, CARELESS) == {"entrance-tls", "consumers-bounded", "answers-bounded", "told"}
    assert found(tmp_path, CAREFUL) == set()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "198.51.100.7"])  # noqa: S104 - as the engine says it
def test_what_else_is_published_there_is_named(tmp_path: Path, address: str) -> None:
    assert found(tmp_path, CAREFUL, (address, 8080)) == {"ports-exposed"}
    assert found(tmp_path, CAREFUL, ("192.0.2.1", 8080)) == set()


def test_the_checklist_names_checks_that_there_are() -> None:
    named = set(re.findall(r"\(`([a-z-]+)`\)", (REPOSITORY / "docs" / "internet.md").read_text()))
    assert named <= set(CHECKS)
    assert {name for name, item in CHECKS.items() if item.section == "exposure"} <= named
