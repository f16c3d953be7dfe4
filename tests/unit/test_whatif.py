"""`plan --what-if`: what may be changed, what that makes of pools, and where answer times come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.errors import UsageError
from corral.whatif.cases import KEYS, Case, Measured, cases, parse_changes
from corral.whatif.measured import fingerprint, measured_answers
from tests.trees import ROOT

CHAT = {"source": "hf:owner/repo/Chat-8B-Q4_K_M.gguf", "kind": "chat", "context": 4096, "size_gib": 4}
SITE: dict[str, Any] = {
    "schema_version": 1,
    "name": "lab",
    "hosts": {
        "box": {"address": "192.0.2.10", "ram_gib": 64, "gpus": {"card": "rtx-3090", "count": 8}},
        "gate": {"address": "192.0.2.11"},
    },
    "models": {"chat": CHAT, "large": CHAT},
    "nodes": {
        name: {"url": f"http://192.0.2.12:{port}", "engine": "openai", "model": "m", "slots": 2}
        for name, port in (("mac", 8080), ("phone", 8081))
    },
    "pools": {
        "chat": {
            "model": "chat", "on": [{"host": "box", "gpus": "1-3"}, {"node": "mac"}], "engine": {"slots": 4},
            "limits": {"rpm": 60}, "queue": {"depth": 7, "timeout_s": 30},
        },
        "large": {
            "model": "large", "on": {"host": "box", "gpus": "4-7", "gpus_per_replica": 2}, "engine": {"slots": 1},
        },
        "node": {"on": {"node": "phone"}},
    },
    "gateway": {"host": "gate"},
}  # fmt: skip


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site's inventory, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inventory.yaml"
    path.write_text(yaml.safe_dump(SITE, sort_keys=False))
    return path


@pytest.fixture
def plan(inventory: Path) -> Plan:
    return build_plan(load_inventory(inventory))


def case_of(plan: Plan, pool: str, *words: str, measured: Measured | None = None) -> Case:
    answers = {pool: measured} if measured else {}
    return {case.pool: case for case in cases(plan, parse_changes(words, plan), answers)}[pool]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gpus", "write [POOL.]KEY=VALUE, such as chat.gpus=4"),
        ("chat.gpu=4", 'no key "gpu"; did you mean "gpus"?'),
        ("chta.gpus=4", 'no pool named "chta"; did you mean "chat"?'),
        ("gpus=0", "gpus is a whole number from 1 to 100,000"),
        ("gpus=1.5", "gpus is a whole number from 1 to 100,000"),
        ("rpm=-1", "rpm is a number from 0.001 to 1,000,000,000"),
        ("answer_s=nan", "answer_s is a number from 0.001 to 86,400"),
        ("answer_cv=", "answer_cv is a number from 0 to 10"),
        ("node.gpus=2", "node has no replica on a card"),
        ("large.gpus=1", "a replica of large takes 2 cards"),
        ("=", 'no key ""'),
    ],
)
def test_what_cannot_be_read_is_told_with_a_remedy(plan: Plan, word: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_changes([word], plan)
    assert f'--what-if "{word}": {said}' in str(error.value)


def test_all_that_is_wrong_is_told_at_once(plan: Plan) -> None:
    with pytest.raises(UsageError) as error:
        parse_changes(["gpus=x", "rpm=5", "chat.slost=2", "rpm=6", "rpm=5"], plan)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "has been given another value before" in lines[2]


def test_a_change_for_a_pool_goes_before_one_for_all(plan: Plan) -> None:
    for words in (["chat.rpm=9", "rpm=5"], ["rpm=5", "chat.rpm=9"]):
        assert parse_changes(words, plan) == {"chat": {"rpm": 9}, "large": {"rpm": 5}, "node": {"rpm": 5}}


def test_cards_for_all_pools_are_for_those_that_have_any(plan: Plan) -> None:
    assert parse_changes(["gpus=6"], plan) == {"chat": {"gpus": 6}, "large": {"gpus": 6}, "node": {}}


# --- stations ---------------------------------------------------------------------------------------------------------


def test_a_pool_as_it_is(plan: Plan) -> None:
    now = case_of(plan, "chat", "chat.answer_s=5").now
    assert now is not None
    assert (now.slots, now.rate_per_s, now.answer_s, now.answer_cv) == (14, 1.0, 5.0, 1.0)
    assert (now.queue_depth, now.queue_timeout_s, now.limit_rpm) == (7, 30, 60)


@pytest.mark.parametrize(
    ("pool", "words", "slots"),
    [
        ("chat", ("gpus=4",), 18),  # the node's two stay
        ("chat", ("chat.gpus=1",), 6),
        ("chat", ("slots=3",), 12),
        ("chat", ("gpus=4", "slots=3"), 15),
        ("large", ("gpus=8", "rpm=1"), 4),
        ("large", ("gpus=5", "rpm=1"), 2),  # a replica takes two
        ("node", ("slots=5", "rpm=1"), 5),
    ],
)
def test_cards_and_slots_of_the_pool_that_would_be(plan: Plan, pool: str, words: tuple[str, ...], slots: int) -> None:
    then = case_of(plan, pool, *words, "answer_s=5").then
    assert then is not None
    assert then.slots == slots


def test_every_other_key_reaches_the_pool_that_would_be(plan: Plan) -> None:
    words = ("rpm=90", "limit_rpm=80", "answer_s=2", "answer_cv=0", "queue_depth=3", "queue_timeout_s=9")
    case = case_of(plan, "chat", *words, measured=Measured(5.0, "r"))
    assert case.then is not None
    assert case.now is not None
    assert (case.now.rate_per_s, case.now.answer_s, case.now.answer_cv) == (1.0, 5.0, 1.0)
    then = case.then
    assert (then.rate_per_s, then.limit_rpm, then.answer_s, then.answer_cv) == (1.5, 80, 2.0, 0.0)
    assert (then.queue_depth, then.queue_timeout_s) == (3, 9)
    assert {word.partition("=")[0] for word in words} | {"gpus", "slots"} == set(KEYS)


def test_what_is_lacking_is_told(plan: Plan) -> None:
    assert case_of(plan, "large").reason == (
        "nobody has said how many requests come (large.rpm=…) "
        "and how long an answer takes (large.answer_s=…, or bench sweep)"
    )
    assert case_of(plan, "chat").reason == "nobody has said how long an answer takes (chat.answer_s=…, or bench sweep)"


def test_without_the_balancer_there_is_no_queue_to_simulate(inventory: Path) -> None:
    data = yaml.safe_load(inventory.read_text())
    data["gateway"] = {"host": "box", "balancing": "direct"}
    del data["hosts"]["gate"]
    inventory.write_text(yaml.safe_dump(data))
    assert "direct" in case_of(build_plan(load_inventory(inventory)), "chat", "answer_s=5").reason


# --- measured answer times --------------------------------------------------------------------------------------------


def save_run(plan: Plan, name: str, pool: str, **changes: Any) -> None:
    capacity = {"in_flight": 6.0, "slots": 14, "knee_rpm": 120.0} | changes
    folder = Path(".corral") / "bench" / "lab" / name
    folder.mkdir(parents=True)
    mark = changes.get("mark") or fingerprint(plan, pool)
    (folder / "result.json").write_text(json.dumps({"pools": {pool: {"mark": mark, "capacity": capacity}}}))


def test_answers_take_what_the_newest_run_of_this_very_pool_measured(plan: Plan) -> None:
    save_run(plan, "20270101-000000", "chat", in_flight=2.0)
    save_run(plan, "20270102-000000", "chat")
    save_run(plan, "20270103-000000", "chat", mark="m000000000000")
    save_run(plan, "20270104-000000", "chat", knee_rpm=0)
    save_run(plan, "20270105-000000", "gone", mark="x")
    (Path(".corral") / "bench" / "lab" / "20270102-000000" / "steps.csv").touch()
    assert measured_answers(plan) == {"chat": Measured(3.0, "20270102-000000")}


def test_requests_in_the_queue_are_no_part_of_the_answer(plan: Plan) -> None:
    save_run(plan, "20270101-000000", "chat", in_flight=40.0)
    assert measured_answers(plan)["chat"].answer_s == 7.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pools": {"chat": 3}}', '{"pools": {"chat": {"capacity": {}}}}'])
def test_what_is_no_result_is_passed_over(plan: Plan, text: str) -> None:
    save_run(plan, "20270101-000000", "chat")
    folder = Path(".corral") / "bench" / "lab" / "20270102-000000"
    folder.mkdir()
    (folder / "result.json").write_text(text)
    assert measured_answers(plan)["chat"].run == "20270101-000000"


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_shows_now_and_then(inventory: Path) -> None:
    command = [sys.executable, str(ROOT / "generate.py"), "plan", "--what-if", "chat.gpus=1", "--what-if", "answer_s=8"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    lines = done.stdout.splitlines()
    now = next(line for line in lines if line.lstrip().startswith("chat ")).split()
    then = next(line for line in lines if "what if" in line).split()
    assert now[:4] == ["chat", "now", "14", "60"]
    assert then[:4] == ["what", "if", "6", "60"]
    assert "chat: answers of 8.0 s, given" in lines
    assert any(line.startswith("large: not simulated: nobody has said how many requests come") for line in lines)


def test_json_has_both_sides_and_reasons(plan: Plan, inventory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(plan, "20270101-000000", "chat")
    changes = ("chat.gpus=1", "chat.rpm=240", "chat.limit_rpm=300")
    assert main(["plan", "--json", *(word for change in changes for word in ("--what-if", change))]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == ["chat", "large", "node"]
    chat = data["chat"]
    assert (chat["reason"], chat["answer_s_from"]) == (None, "measured (run 20270101-000000)")
    assert chat["now"]["slots"] == 14
    assert chat["what_if"]["slots"] == 6
    assert chat["what_if"]["refused_share"] > 0.4 > chat["now"]["refused_share"]
    assert chat["what_if"]["answered_per_s"] == pytest.approx(2.0, rel=0.03)
    assert chat["what_if"]["limited_share"] == 0
    assert (data["large"]["now"], data["large"]["what_if"]) == (None, None)


def test_wrong_words_are_2_and_a_host_does_not_go_with_it(inventory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--what-if", "gpu=4", "--what-if", "chat.rpm=x"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("--what-if") == 2
    assert main(["plan", "--what-if", "gpus=4", "--host", "box"]) == 2
    assert "leave --host out" in capsys.readouterr().err
