"""Every metric and label that a rule names is one that a program has, or that another rule makes (B9)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tests.trees import CASES, tree_of
from tools.catalogue import FOLDER, TARGET_LABELS, one_metric_a_line
from tools.objectives import text as objectives

RULES = Path(__file__).resolve().parents[2] / "monitoring" / "rules"
# What Prometheus itself knows of a target, and of an alert.
OWN = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity", "about"}}
CATALOGUES = {
    *("alertmanager", "corral", "dcgm-exporter", "fast-lane", "gpu-exporter", "haproxy", "jobs", "litellm", "llama"),
    *("localai", "node", "postgres", "prometheus", "valkey", "vllm"),
}


@cache
def catalogue() -> dict[str, set[str]]:
    """Labels of every known metric; programs may share a name."""
    known: dict[str, set[str]] = {}
    for path in FOLDER.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in (*found["metrics"].items(), *found.get("from_source", {}).items()):
            known.setdefault(name, set()).update(entry["labels"])
    return known


@cache
def shipped() -> tuple[tuple[str, dict[str, Any]], ...]:
    """Every rule with the file that it stands in."""
    return tuple(
        (path.name, rule)
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    )


@cache
def made() -> frozenset[str]:
    """Names that rules make, those of the inventory's figures among them."""
    names = {rule["record"] for _, rule in shipped() if "record" in rule}
    for case in CASES:
        for path, data in tree_of(case).items():
            if path.endswith("rules/inventory.yml"):
                names |= {rule["record"] for group in yaml.safe_load(data)["groups"] for rule in group["rules"]}
    return frozenset(names)


def selectors(node: Any) -> Iterator[promql.VectorSelector]:
    """Every selector below a node of a parsed expression."""
    if isinstance(node, promql.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        below = getattr(node, name, None)
        if below is not None and not isinstance(below, str):
            yield from selectors(below)
    for below in getattr(node, "args", ()) or ():
        yield from selectors(below)


def unknown(expression: str) -> Iterator[str]:
    """What an expression names that nobody has."""
    for selector in selectors(promql.parse(expression)):
        name = selector.name
        if name in made() or name in OWN:
            continue
        if name not in catalogue():
            yield f"no metric {name}"
            continue
        labels = catalogue()[name] | TARGET_LABELS
        yield from (
            f"{name} has no label {item.name}" for item in selector.matchers.matchers if item.name not in labels
        )


def test_every_program_has_a_catalogue_with_its_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == CATALOGUES
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        assert text == one_metric_a_line(found)
        assert found["program"]
        assert found["how"].startswith(("read from the running program", "read in the source: "))
        assert found["metrics"]


@pytest.mark.parametrize("file", sorted(path.name for path in RULES.glob("*.yml")))
def test_a_rule_names_only_what_there_is(file: str) -> None:
    rules = [rule for name, rule in shipped() if name == file]
    assert rules
    assert [found for rule in rules for found in unknown(rule["expr"])] == []


def test_a_metric_or_label_outside_the_catalogue_is_found() -> None:
    assert list(unknown("rate(llamacpp:kv_cache_usage_ratio[5m])")) == ["no metric llamacpp:kv_cache_usage_ratio"]
    wrong = 'sum(rate(haproxy_server_status{colour="red"}[5m])) / on () group_left () (nonsense > 1)'
    assert list(unknown(wrong)) == ["haproxy_server_status has no label colour", "no metric nonsense"]


def test_the_rules_about_objectives_are_fresh() -> None:
    assert (RULES / "objectives.yml").read_text(encoding="utf-8") == objectives(), "write it again with: make rules"
