"""Every rule has an inventory that keeps it and one that breaks it and nothing else."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from corral.checks import references, rules
from corral.checks.references import check_references
from corral.checks.registry import checks
from corral.checks.rules import check_plan
from corral.components import gather
from corral.config.inventory import Inventory
from corral.config.load import load_inventory
from corral.contributions import Contributions, Port, Service
from corral.errors import Finding
from corral.plan.site import resolve
from tests.reference import rules_reference

HERE = Path(__file__).parent
LOOKS = {**checks("inventory"), **checks("plan")}
DEMANDS = references.TEXTS.demands | rules.TEXTS.demands
RULES = sorted({*DEMANDS, *LOOKS})


def problems_in(path: Path) -> list[Finding]:
    """Everything that an inventory's rules find, located; `x-services` are added as a component would."""
    loaded = load_inventory(path)
    found = check_references(loaded.inventory)
    if not found:
        site = resolve(loaded.inventory, loaded.lock)
        contributions = gather(site)
        _add_services(loaded.inventory, contributions)
        found = check_plan(site, contributions)
    return [loaded.source.locate(problem) for problem in found]


def _add_services(inventory: Inventory, contributions: Contributions) -> None:
    services: list[Mapping[str, Any]] = inventory.notes.get("x-services", [])
    for service in services:
        contributions.add(Service(**{**service, "ports": tuple(Port(**port) for port in service["ports"])}))


@pytest.mark.parametrize("rule", RULES)
def test_an_inventory_that_keeps_the_rule_has_no_problem(rule: str) -> None:
    assert [str(problem) for problem in problems_in(HERE / rule / "pass.yaml")] == []


@pytest.mark.parametrize("rule", RULES)
def test_an_inventory_that_breaks_the_rule_breaks_nothing_else(rule: str) -> None:
    found = problems_in(HERE / rule / "fail.yaml")

    assert {problem.rule for problem in found} == {rule}
    for problem in found:
        assert problem.line > 1, "located in the file"
        assert problem.remedy, "says what to do"
        assert not problem.message.endswith(".")


def test_every_fixture_belongs_to_a_rule() -> None:
    assert sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__") == RULES


def test_every_rule_says_what_it_demands() -> None:
    for demand in (*(demand for demand, _ in DEMANDS.values()), *(look.demand for look in LOOKS.values())):
        assert demand.endswith("."), demand


@pytest.mark.parametrize("module", [references, rules])
def test_every_text_of_a_finding_is_used_and_known(module: ModuleType) -> None:
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    rows: Mapping[str, Mapping[str, str]] = module.TEXTS.rows
    known = {f"{rule}/{key}" for rule, row in rows.items() for key in row.keys() - {"demand", "level"}}
    assert set(re.findall(r'"([a-z-]+/[a-z0-9-]+)"', source)) == known


def test_the_page_of_rules_is_fresh(*, update_golden: bool) -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "rules.md"
    if update_golden:
        page.parent.mkdir(exist_ok=True)
        page.write_text(rules_reference())

    assert page.read_text() == rules_reference(), "write it again with: pytest tests/rules --update-golden"
