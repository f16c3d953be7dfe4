"""A server that an installed package adds, in a real engine: `status` and `doctor` know it and its log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.components.installed import INVENTORY, corral, python
from tests.compose.project import docker
from tests.processes.helpers import wait_until

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

LIMIT_S = 60
NAME = "corral-test-toy-tb"
STARTED = ("play-1", "haproxy")


@pytest.fixture(scope="module")
def out(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The rendered site, with its server and its balancer running."""
    folder = tmp_path_factory.mktemp("toy")
    place = ("--inventory", str(INVENTORY), "--out", str(folder))
    made = [python("-m", "tests.compose.images.build", str(INVENTORY)), corral("render", *place)]
    made.append(corral("secrets", "init", *place))
    assert [done.stderr for done in made if done.returncode] == []
    (folder / "tb" / "models" / "fun").mkdir(parents=True)
    (folder / "tb" / "models" / "fun" / "spring").touch()
    project = ("compose", "--project-name", NAME, "--file", str(folder / "tb" / "compose.yaml"))
    try:
        docker(*project, "up", "--detach", "--wait", *STARTED)
        yield folder
    finally:
        docker(*project, "down", "--volumes", "--timeout", "1")


def asked(out: Path, verb: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(corral(verb, "--json", "--inventory", str(INVENTORY), "--out", str(out)).stdout)[
        "hosts"
    ]["tb"]
    return found


def finding(out: Path, check: str) -> str:
    """What a check of `doctor` finds; the remedy after an arrow."""
    found = [item for item in asked(out, "doctor")["findings"] if item["check"] == check]
    return "\n".join(f"{item['what']} → {item['remedy']}" for item in found)


def test_status_shows_it_and_the_balancer_has_it(out: Path) -> None:
    rows = {row["service"]: row for row in asked(out, "status")["services"]}
    server = rows["play-1"]
    assert (server["health"], server["well"], server["pool"], server["model"], server["slots"]) == (
        "healthy", True, "play", "fun", 2,
    )  # fmt: skip


def test_doctor_says_what_its_log_means(out: Path) -> None:
    assert "play-1" not in finding(out, "running")
    spring = out / "tb" / "models" / "fun" / "spring"
    spring.unlink()
    try:
        docker("restart", "--time", "1", "tb-play-1")
        wait_until(lambda: "no spring" in finding(out, "running"), LIMIT_S, "the toy's own words")
        assert "the toy has no spring) → put a file named spring into the model's folder" in finding(out, "running")
    finally:
        spring.touch()
