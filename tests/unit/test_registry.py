"""The registry of checks: what a check finds has its rule, level and remedy."""

from collections.abc import Iterator

import pytest

from corral.checks import registry
from corral.checks.registry import Stage, check, checks, findings
from corral.errors import Finding, Level


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CHECKS", {"plan": {}, "inventory": {}})


def register(stage: Stage, rule: str, *found: Finding, level: Level = "error") -> None:
    @check(stage, rule, level=level)
    def _find(_subject: str) -> Iterator[Finding]:
        """Something must
        hold."""
        yield from found


def test_findings_get_the_rule_and_the_level_of_their_check() -> None:
    register("plan", "one", Finding("wrong", ("pools", "chat"), "mend it"), Finding("odd", level="hint"))
    register("plan", "two", Finding("doubtful"), level="warning")
    register("inventory", "three", Finding("elsewhere"))
    assert [(item.rule, item.level, item.message, item.remedy) for item in findings("plan", "x")] == [
        ("one", "error", "wrong", "mend it"),
        ("one", "hint", "odd", ""),
        ("two", "warning", "doubtful", ""),
    ]


def test_checks_are_in_their_order_and_say_what_they_demand() -> None:
    register("plan", "b")
    register("plan", "a")
    assert [(rule, item.demand) for rule, item in checks("plan").items()] == [
        ("b", "Something must hold."), ("a", "Something must hold."),
    ]  # fmt: skip


def test_a_second_check_of_an_id_is_refused() -> None:
    register("plan", "one")
    register("inventory", "one")
    with pytest.raises(ValueError, match="one: a second check"):
        register("plan", "one")


def test_a_finding_outside_the_inventory_names_its_place() -> None:
    assert str(Finding("runs as root", remedy="set user", rule="non-root", where="box: web")) == (
        "box: web: runs as root; set user [non-root]"
    )
