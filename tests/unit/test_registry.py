"""The registry of checks: what a check finds has its rule, level and remedy."""

from collections.abc import Iterator

import pytest

from corral.checks import registry
from corral.checks.registry import Stage, check, checks, findings
from corral.errors import Finding


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CHECKS", {"plan": {}, "running": {}})


def register(stage: Stage, rule: str, *found: Finding | str, **facts: str) -> None:
    @check(stage, rule, **facts)  # type: ignore[arg-type]
    def _find(_subject: str) -> Iterator[Finding | str]:
        """Something must
        hold."""
        yield from found


def test_findings_get_the_rule_and_the_level_of_their_check() -> None:
    register("plan", "one", Finding("wrong", ("pools", "chat"), "mend it"), Finding("odd", level="hint"))
    register("plan", "two", Finding("doubtful"), level="warning")
    register("running", "three", Finding("elsewhere"))
    assert [(item.rule, item.level, item.message, item.remedy) for item in findings("plan", "x")] == [
        ("one", "error", "wrong", "mend it"),
        ("one", "hint", "odd", ""),
        ("two", "warning", "doubtful", ""),
    ]


def test_a_message_alone_has_the_remedy_of_its_check() -> None:
    register("plan", "one", "wrong", remedy="mend it")
    assert [str(item) for item in findings("plan", "x")] == ["wrong; mend it [one]"]


def test_checks_are_in_their_order_and_say_what_they_demand() -> None:
    register("plan", "b", section="5.1")
    register("plan", "a")
    assert [(rule, item.section, item.demand) for rule, item in checks("plan").items()] == [
        ("b", "5.1", "Something must hold."),
        ("a", "", "Something must hold."),
    ]


def test_a_second_check_of_an_id_is_refused() -> None:
    register("plan", "one")
    register("running", "one")
    with pytest.raises(ValueError, match="one: a second check"):
        register("plan", "one")


def test_a_finding_outside_the_inventory_names_its_place() -> None:
    assert str(Finding("runs as root", remedy="set user", rule="non-root", where="box: web")) == (
        "box: web: runs as root; set user [non-root]"
    )
