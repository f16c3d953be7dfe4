"""Every alert fires when it should and stays silent when it should, in Prometheus' own rule tester.

`alerts.yaml` has figures with which each fires and stays silent. From them come: the metric that is absent, the counter
that starts again from 0, and the metric that was renamed, with which the test of firing must fail.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.needs import program

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "monitoring" / "rules"
RUNBOOKS = ROOT / "docs" / "runbooks"
TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text(encoding="utf-8"))
FACTS: dict[str, float] = TABLE.pop("facts")
DEADLINE_S = 120
DEFAULT_AT = "15m"
# Files whose recording rules another file's alerts look at; promtool evaluates all that it is given.
USED_BY = {"gpu.yml": ("gpu_nvidia.yml",), "farm.yml": ("haproxy.yml", "litellm.yml", "llama.yml")}
RESET = re.compile(r"0\+([0-9.]+)x(\d+)")

Case = dict[str, Any]


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """Every shipped alert by its name."""
    return {name: rule for path in sorted(RULES.glob("*.yml")) for name, rule in alerts_in(path.name).items()}


@cache
def alerts_in(file: str) -> dict[str, dict[str, Any]]:
    """The alerts of one shipped file."""
    groups = yaml.safe_load((RULES / file).read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


FILES = [path.name for path in sorted(RULES.glob("*.yml")) if alerts_in(path.name)]


def rules_for(file: str, folder: Path) -> list[str]:
    """The rules without annotations, which promtool would want to be repeated letter by letter."""
    made = []
    for name in (file, *USED_BY.get(file, ())):
        loaded = yaml.safe_load((RULES / name).read_text())
        for group in loaded["groups"]:
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (folder / name).write_text(yaml.safe_dump(loaded))
        made.append(str(folder / name))
    return made


def case_of(name: str, alert: str, series: dict[str, str], *, fires: bool) -> Case:
    entry = TABLE[alert]
    known = [{"series": key, "values": f"{value}x500"} for key, value in FACTS.items()]
    labels = alerts()[alert]["labels"] | entry.get("labels", {})
    expected = {"eval_time": entry.get("at", DEFAULT_AT), "alertname": alert}
    if fires:
        expected["exp_alerts"] = [{"exp_labels": labels}]
    return {
        "name": f"{alert}: {name}",
        "interval": "1m",
        "input_series": [*known, *({"series": key, "values": value} for key, value in series.items())],
        "alert_rule_test": [expected],
    }


def verdict(rules: list[str], cases: list[Case], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": cases}, width=10_000))
    command = [str(program("promtool")), "test", "rules", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)


def after_a_reset(values: str) -> str:
    """The same counter, whose program was started again half way."""
    return RESET.sub(lambda found: f"0+{found[1]}x{int(found[2]) // 2} 0+{found[1]}x{int(found[2]) // 2}", values)


def test_every_alert_has_cases_and_a_runbook() -> None:
    assert sorted(TABLE) == sorted(alerts())
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md") if path.stem != "README") == sorted(alerts())


@pytest.mark.parametrize("alert", sorted(alerts()))
def test_an_alert_says_what_it_is_about_and_how_bad(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"].keys() == {"severity", "about"}
    assert rule["labels"]["severity"] in {"critical", "warning", "watchdog"}
    assert rule["annotations"].keys() == {"summary", "description"}
    assert "$labels" in rule["annotations"]["summary"] or TABLE[alert].get("is_constant")


@pytest.mark.parametrize("alert", sorted(alerts()))
def test_a_runbook_says_what_it_means_and_what_to_type(alert: str) -> None:
    text = (RUNBOOKS / f"{alert}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {alert}\n")
    assert "\n## What it means\n" in text
    assert "\n## What to do\n" in text
    assert "\n    " in text.partition("\n## What to do\n")[2], "nothing to type"


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("file", FILES)
def test_every_alert_fires_and_stays_silent(file: str, tmp_path: Path) -> None:
    cases: list[Case] = []
    for alert in alerts_in(file):
        entry = TABLE[alert]
        cases.append(case_of("fires", alert, entry["fires"], fires=True))
        if entry.get("is_constant"):
            continue
        cases.append(case_of("stays silent", alert, entry["silent"], fires=False))
        cases.append(case_of("metric absent", alert, {}, fires=False))
        again = {key: after_a_reset(value) for key, value in entry["silent"].items()}
        if again != entry["silent"]:
            cases.append(case_of("counter reset", alert, again, fires=False))
    done = verdict(rules_for(file, tmp_path), cases, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.needs("promtool")
@pytest.mark.parametrize(("proxy", "is_bad"), [("Full:chat", True), ("chat", False)])
@pytest.mark.parametrize(("alert", "file"), [("ObjectiveBurnsFast", "objectives.yml"), ("PoolErrorsHigh", "farm.yml")])
def test_what_is_refused_at_the_door_counts_and_other_answers_of_the_balancers_do_not(
    alert: str, file: str, proxy: str, tmp_path: Path, *, is_bad: bool
) -> None:
    """LiteLLM never hears of those; what pools refuse behind it, it has counted itself (004-F7)."""
    entry = TABLE[alert]
    door = f'haproxy_backend_http_responses_total{{pool="chat",proxy="{proxy}",code="4xx"}}'
    answered = 'litellm_proxy_total_requests_metric_total{pool="chat",status_code="200"}'
    case = case_of("at the door", alert, {answered: "0+10x120", door: "0+50x120"}, fires=is_bad)
    assert entry["labels"]["pool"] == "chat"
    done = verdict(rules_for(file, tmp_path), [case], tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("file", FILES)
def test_a_renamed_metric_makes_the_test_of_its_alert_fail(file: str, tmp_path: Path) -> None:
    """Each alert's last metric under another name: one that fired all the same would not depend on it."""
    cases = []
    for alert in alerts_in(file):
        fires: dict[str, str] = TABLE[alert]["fires"]
        if fires:
            metric = next(reversed(fires)).partition("{")[0]
            renamed = {re.sub(rf"^{metric}\b", "renamed_metric", key): value for key, value in fires.items()}
            cases.append(case_of("renamed", alert, renamed, fires=True))
    done = verdict(rules_for(file, tmp_path), cases, tmp_path)
    assert done.returncode != 0
    for case in cases:
        assert f"name: {case['name']}" in done.stdout + done.stderr, f"{case['name']} did not fail"
