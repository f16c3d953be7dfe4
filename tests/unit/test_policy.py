"""The security baseline: a good project and a bad one for each rule, as they are written and as Compose prints them."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.checks.policy import TEXTS, check_project, check_tree, exceptions_of, project_of
from corral.errors import Finding
from tests.reference import policy_reference
from tests.trees import CASES, ROOT, each_case, hosts_of, plan_of, put, tree_of

FOLDER = ROOT / "tests" / "policy"
REFERENCE = ROOT / "docs" / "reference" / "policy.md"
ADDRESS = "192.0.2.10"
GOOD: dict[str, Any] = yaml.safe_load((FOLDER / "good.yaml").read_text())
BAD: dict[str, list[dict[str, Any]]] = yaml.safe_load((FOLDER / "bad.yaml").read_text())
DEADLINE_S = 60
# Images of golden cases whose tag a person of flesh and blood might well choose.
QUESTIONABLE = {"registry.example.com/llama:pascal"}


def bad_project(change: dict[str, Any]) -> dict[str, Any]:
    """The good project with one service changed."""
    project = copy.deepcopy(GOOD)
    merged = project["services"]["app"] | change
    project["services"]["app"] = {key: value for key, value in merged.items() if value is not None}
    return project


def each_bad() -> Iterator[Any]:
    for rule, cases in BAD.items():
        for number, case in enumerate(cases, start=1):
            yield pytest.param(rule, case, id=f"{rule}-{number}")


def as_compose_prints_it(project: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compose's own model of a project, values left out."""
    (folder / "compose.yaml").write_text(yaml.safe_dump(project), encoding="utf-8")
    return compose_model(folder)


def compose_model(folder: Path, *files: str) -> dict[str, Any]:
    options = [word for file in files or ("compose.yaml",) for word in ("-f", str(folder / file))]
    command = ["docker", "compose", *options, "config", "--no-interpolate", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    model: dict[str, Any] = json.loads(done.stdout)
    return model


# --- rule by rule ----------------------------------------------------------------------------------------------------


def test_the_good_project_keeps_every_rule() -> None:
    assert check_project(GOOD, ADDRESS) == []


def test_every_rule_has_a_bad_project() -> None:
    assert sorted(BAD) == sorted(TEXTS.rows)


@pytest.mark.parametrize(("rule", "case"), each_bad())
def test_a_bad_project_is_found(rule: str, case: dict[str, Any]) -> None:
    found = check_project(bad_project(case["change"]), ADDRESS)
    assert [(finding.where, finding.rule, finding.message) for finding in found if finding.rule == rule] == [
        ("app", rule, case["finds"])
    ]


@pytest.mark.needs("docker-compose")
@pytest.mark.parametrize(("rule", "case"), each_bad())
def test_a_bad_project_is_found_in_what_compose_prints(rule: str, case: dict[str, Any], tmp_path: Path) -> None:
    model = as_compose_prints_it(bad_project(case["change"]), tmp_path)
    messages = [finding.message for finding in check_project(model, ADDRESS) if finding.rule == rule]
    assert messages == [case.get("compose", case["finds"])]


@pytest.mark.needs("docker-compose")
def test_what_compose_prints_of_the_good_project_is_good(tmp_path: Path) -> None:
    assert check_project(as_compose_prints_it(GOOD, tmp_path), ADDRESS) == []


@pytest.mark.parametrize(
    "change",
    [
        {"image": "app@sha256:" + "0" * 64},
        {"image": "ghcr.io/example/app:server-b11347"},
        {"cap_drop": ["all"]},
        {"cpu_shares": None, "cpus": 0.5},
        {"logging": {"driver": "local"}},
        {"mem_limit": None, "memswap_limit": None, "deploy": {"resources": {"limits": {"memory": "1g", "pids": 5}}}},
        {"network_mode": "none", "networks": None, "ports": None},
        {"security_opt": ["no-new-privileges=true"]},
        {"volumes": [{"type": "tmpfs", "target": "/scratch", "tmpfs": {"size": 1048576}}]},
        {"volumes": ["/home/somebody/models:/models:ro", "/usrlocal:/models2:ro"]},
        {"environment": ["APP_KEY_FILE=/run/secrets/API_KEY", "FROM_OUTSIDE"]},
        {"ports": ["[::1]:4000:4000"]},
        {"networks": {"farm": None}},
    ],
)
def test_other_good_ways(change: dict[str, Any]) -> None:
    assert check_project(bad_project(change), ADDRESS) == []


# --- exceptions ------------------------------------------------------------------------------------------------------


def judged(change: dict[str, Any], exceptions: dict[str, str]) -> list[Finding]:
    return check_project(bad_project(change), ADDRESS, {"app": exceptions})


def test_an_exception_with_a_reason_passes() -> None:
    assert judged({"read_only": None}, {"read-only": "it writes beside its code"}) == []


def test_an_exception_covers_its_own_rule_only() -> None:
    found = judged({"read_only": None, "user": None}, {"read-only": "it writes beside its code"})
    assert [finding.rule for finding in found] == ["non-root"]


# --- what the kit renders --------------------------------------------------------------------------------------------


@each_case
def test_every_case_keeps_the_baseline(case: str) -> None:
    findings = [finding for found in check_tree(plan_of(case), tree_of(case)).values() for finding in found]
    images = {service.name: service.image for service in plan_of(case).contributions.services}
    assert [str(finding) for finding in findings if finding.level == "error"] == []
    assert {images[finding.where] for finding in findings if finding.rule == "image-pinned"} <= QUESTIONABLE


@pytest.mark.needs("docker-compose")
@each_case
def test_compose_and_the_rendering_are_judged_alike(case: str, tmp_path: Path) -> None:
    folder = put(tree_of(case), tmp_path)
    before = check_tree(plan_of(case), tree_of(case))
    for host in hosts_of(case, "compose"):
        address = plan_of(case).site.host(host).address
        found = check_project(compose_model(folder / host), address, exceptions_of(plan_of(case), host))
        assert sorted(map(str, found)) == sorted(map(str, before[host]))


@pytest.mark.needs("docker-compose")
@each_case
def test_the_override_for_machines_without_cards(case: str, tmp_path: Path) -> None:
    folder = put(tree_of(case), tmp_path)
    for host in hosts_of(case, "compose"):
        on_cards = {service.name for service in plan_of(case).services_of(host) if service.gpus}
        assert (f"{host}/compose.cpu.yaml" in tree_of(case)) == bool(on_cards)
        if not on_cards:
            continue
        plain, cpu = compose_model(folder / host), compose_model(folder / host, "compose.yaml", "compose.cpu.yaml")
        assert "nvidia" in json.dumps(plain)
        assert "nvidia" not in json.dumps([body.get("deploy") for body in cpu["services"].values()])
        assert {name for name, body in cpu["services"].items() if body != plain["services"][name]} == on_cards
        assert not [body["image"] for body in cpu["services"].values() if "cuda" in body["image"]]
        found = check_project(cpu, plan_of(case).site.host(host).address, exceptions_of(plan_of(case), host))
        assert [str(finding) for finding in found if finding.level == "error"] == []


def stated_exceptions() -> set[tuple[str, str]]:
    """Rule and reason of every exception that a case states."""
    return {
        item
        for case in CASES
        for host in hosts_of(case, "compose")
        for stated in exceptions_of(plan_of(case), host).values()
        for item in stated.items()
    }


@each_case
def test_every_exception_is_needed(case: str) -> None:
    for host in hosts_of(case, "compose"):
        found = check_project(project_of(tree_of(case), host), plan_of(case).site.host(host).address)
        broken = {(finding.where, finding.rule) for finding in found}
        stated = exceptions_of(plan_of(case), host)
        assert [(name, rule) for name in stated for rule in stated[name] if (name, rule) not in broken] == []


def test_what_is_excepted_is_told_in_the_documentation() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    stated = stated_exceptions()
    assert stated
    assert all(reason.strip() for _, reason in stated)
    assert {rule for rule, _ in stated} <= TEXTS.rows.keys()
    assert [(rule, reason) for rule, reason in sorted(stated) if f"| `{rule}` | {reason} |" not in text] == []


def test_the_reference_is_fresh(*, update_golden: bool) -> None:
    if update_golden:
        REFERENCE.write_text(policy_reference(), encoding="utf-8")
    assert REFERENCE.read_text(encoding="utf-8") == policy_reference(), "write it again with --update-golden"
