"""The rendered systemd units: read by systemd itself, and their commands run with a card driver of straw."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from corral.plan.site import Card
from corral.render.compose import POWER_UNIT, figure_units, metrics_hosts, unit_names
from corral.render.tree import render
from tests.needs import program
from tests.trees import CASES, each_case, hosts_of, plan_of, put, tree_of

DEADLINE_S = 60
DOCKER = Path("/usr/bin/docker")
SMI = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in *"-i $FAILS "*) echo "No devices were found" >&2; exit 6 ;; esac
"""


def units_of(case: str) -> list[tuple[str, str]]:
    """Host and name of every unit that is rendered for a case."""
    return [(host, name) for host in hosts_of(case, "compose") for name in unit_names(plan_of(case), host)]


def timers_of(case: str) -> list[tuple[str, str]]:
    """Host and name of what writes figures every minute."""
    return [(host, name) for host in hosts_of(case, "compose") for name in figure_units(plan_of(case), host)]


def verify(folder: Path, *units: Path) -> str:
    """What systemd has to say of units; nothing when they are right."""
    # A colon at the end: and where systemd looks anyway, for docker.service and the targets.
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{folder}:"}
    command: list[str | Path] = [program("systemd-analyze"), "verify", "--man=no", *units]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    said: str = done.stdout + done.stderr
    return said + (f"exit code {done.returncode}" if done.returncode else "")


@pytest.mark.needs("systemd", "docker-engine")
@each_case
def test_systemd_takes_every_unit(case: str, tmp_path: Path) -> None:
    put(tree_of(case), tmp_path)
    for host in hosts_of(case, "compose"):
        folder = tmp_path / host / "systemd"
        compose = folder / unit_names(plan_of(case), host)[-1]
        drop_in = folder / f"{compose.name}.d" / "folder.conf"
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nWorkingDirectory=/srv/corral/with spaces\n")
        assert verify(folder, *sorted(folder.glob("*.service")), *sorted(folder.glob("*.timer"))) == ""


@pytest.mark.needs("systemd")
@pytest.mark.parametrize(("good", "bad"), [("Type=oneshot", "Type=oneshoot"), ("TimeoutStartSec", "TimeoutStartSecs")])
def test_systemd_would_say_so_if_a_unit_were_wrong(good: str, bad: str, tmp_path: Path) -> None:
    text = tree_of("heartcode")[f"pea/systemd/{POWER_UNIT}"].decode()
    assert good in text
    (tmp_path / POWER_UNIT).write_text(text.replace(good, bad))
    assert verify(tmp_path, tmp_path / POWER_UNIT) != ""


@each_case
def test_units_are_rendered_for_docker_hosts_and_power_only_with_nvidia_cards(case: str) -> None:
    rendered = {path for path in tree_of(case) if "/systemd/" in path}
    assert rendered == {f"{host}/systemd/{name}" for host, name in (*units_of(case), *timers_of(case))}
    for host in hosts_of(case, "compose"):
        has_nvidia = any(card.vendor == "nvidia" for card in plan_of(case).site.cards[host])
        assert (f"{host}/systemd/{POWER_UNIT}" in rendered) == has_nvidia


def test_there_are_cases_with_and_without_cards() -> None:
    names = [name for case in CASES for _, name in units_of(case)]
    assert POWER_UNIT in names
    assert len(names) > names.count(POWER_UNIT) * 2


# --- what the units do -----------------------------------------------------------------------------------------------


def values(text: str, key: str) -> list[str]:
    """Values of a unit's key; lines that end in a backslash go on, `$$` is a dollar sign, as systemd has it."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.partition("=")[2].replace("$$", "$") for line in lines if line.startswith(f"{key}=")]


def run_power_unit(text: str, folder: Path, fails: str = "none") -> tuple[int, list[str]]:
    """Exit code of the power unit's command, and the calls of nvidia-smi that it made."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(SMI)
    smi.chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    (command,) = values(text, "ExecStart")
    environment = {"PATH": f"{smi.parent}:/usr/bin:/bin", "CALLS": str(calls), "FAILS": fails}
    done = subprocess.run(shlex.split(command), env=environment, capture_output=True, check=False, timeout=DEADLINE_S)
    return done.returncode, calls.read_text().splitlines()


def test_004_21_persistence_mode_and_ninety_watts_for_each_card(tmp_path: Path) -> None:
    text = tree_of("heartcode")[f"pea/systemd/{POWER_UNIT}"].decode()
    code, calls = run_power_unit(text, tmp_path)
    assert (code, calls) == (0, ["-pm 1", *(f"-i {index} -pl 90" for index in range(8))])


def test_a_card_that_refuses_does_not_keep_the_others_from_their_limits(tmp_path: Path) -> None:
    text = tree_of("heartcode")[f"pea/systemd/{POWER_UNIT}"].decode()
    code, calls = run_power_unit(text, tmp_path, fails="3")
    assert code == 1
    assert calls[-1] == "-i 7 -pl 90"
    assert len(calls) == 9


def test_cards_are_named_as_they_are_pinned_and_those_without_a_limit_left_alone(tmp_path: Path) -> None:
    plan = plan_of("everything-on")
    for host in hosts_of("everything-on", "compose"):
        cards = [card for card in plan.site.cards[host] if card.vendor == "nvidia"]
        if cards:
            text = render(plan)[f"{host}/systemd/{POWER_UNIT}"].decode()
            wanted = [f"-i {card.device} -pl {card.power_limit_w}" for card in cards if card.power_limit_w]
            assert run_power_unit(text, tmp_path) == (0, ["-pm 1", *wanted])


@each_case
def test_the_project_is_started_after_docker_and_stopped_without_losing_logs(case: str) -> None:
    for host, name in units_of(case):
        text = tree_of(case)[f"{host}/systemd/{name}"].decode()
        if name == POWER_UNIT:
            assert values(text, "Before") == ["docker.service"]
            continue
        assert values(text, "ExecStart") == [f"{DOCKER} compose up --detach"]
        assert values(text, "ExecStop") == [f"{DOCKER} compose stop"]
        after = values(text, "After")[0].split()
        assert {"docker.service", *([POWER_UNIT] if POWER_UNIT in unit_names(plan_of(case), host) else [])} <= set(
            after
        )
        assert values(text, "Requires") == ["docker.service"]


@each_case
def test_units_hold_no_secret_and_no_path_of_the_rendering(case: str) -> None:
    for host, name in (*units_of(case), *timers_of(case)):
        text = tree_of(case)[f"{host}/systemd/{name}"].decode()
        assert not values(text, "Environment")
        assert not values(text, "EnvironmentFile")
        assert not values(text, "WorkingDirectory")


# --- figures, every minute -------------------------------------------------------------------------------------------


@each_case
def test_figures_are_written_where_the_kit_is_and_for_every_far_host_once(case: str) -> None:
    plan = plan_of(case)
    told: list[str] = []
    for host in hosts_of(case, "compose"):
        names = figure_units(plan, host)
        if not names:
            continue
        service, timer = (tree_of(case)[f"{host}/systemd/{name}"].decode() for name in names)
        (command,) = values(service, "ExecStart")
        words = shlex.split(command)
        assert words[:5] == ["/usr/bin/env", ".venv/bin/python", "generate.py", "figures", "--scheduled"]
        assert words[6::2] == metrics_hosts(plan, host)
        assert (values(timer, "OnCalendar"), values(timer, "WantedBy")) == (["minutely"], ["timers.target"])
        told += metrics_hosts(plan, host)
    assert len(told) == len(set(told))
    if told:
        assert set(told) == set(hosts_of(case, "compose"))


def test_there_are_cases_with_and_without_figures() -> None:
    with_figures = {case for case in CASES if timers_of(case)}
    assert with_figures
    assert with_figures != set(CASES)


# --- how cards are pinned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uuid", "pci", "device", "pinned_by"),
    [
        ("GPU-0a1b2c3d-0000-0000-0000-000000000000", "01:00.0", "GPU-0a1b2c3d-0000-0000-0000-000000000000", "UUID"),
        ("", "01:00.0", "0000:01:00.0", "PCI slot"),
        ("", "0001:0b:00.0", "0001:0b:00.0", "PCI slot"),
        ("", "00000000:0b:00.0", "00000000:0b:00.0", "PCI slot"),
        ("", "", "2", "index"),
    ],
)
def test_a_card_is_pinned_by_uuid_then_slot_then_index(uuid: str, pci: str, device: str, pinned_by: str) -> None:
    card = Card("box", 3, "rtx-3060", 12288, "nvidia", (8, 6), 2, uuid=uuid, pci=pci)
    assert (card.device, card.pinned_by) == (device, pinned_by)
