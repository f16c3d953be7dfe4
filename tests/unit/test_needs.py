"""What a test needs and this machine lacks: left out and said so, or a failure where everything is to be tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import NEEDS, find_program, why_missing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOME_TESTS = """
import pytest

@pytest.fixture
def started(tmp_path_factory):
    raise AssertionError("a fixture of a test that is left out must not start")

@pytest.mark.needs("haproxy", "redis")
def test_one(started): ...

@pytest.mark.needs("haproxy")
def test_two(): ...

@pytest.mark.needs("prisma-engine")
def test_three(): ...

def test_four():
    pytest.skip("no moon tonight")

@pytest.mark.xfail
def test_five():
    assert False

def test_six(): ...
"""

NO_DAEMONS = """
import tests.needs
from tests.conftest import *

tests.needs.EXTRA_FOLDERS = ()
"""


def run_tests(folder: Path, text: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs these tests under the project's own settings and conftest, on a machine with no programs at all."""
    (folder / "test_sample.py").write_text(text, encoding="utf-8")
    (folder / "conftest.py").write_text(NO_DAEMONS, encoding="utf-8")
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments, str(folder)],
        cwd=ROOT,
        env={"PATH": str(folder), "HOME": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_the_summary_says_what_is_left_out_and_why(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_tests(tmp_path, SOME_TESTS, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = """
Left out on this machine: 4 tests.
  2 tests need HAProxy: haproxy is not on PATH
      to run them: apt install haproxy
  1 test needs Prisma's query engine: PRISMA_QUERY_ENGINE_BINARY is not set
      to run it: run `prisma generate` in .venv and point PRISMA_QUERY_ENGINE_BINARY at the engine
  1 test: no moon tonight
"""
    assert expected.strip() in done.stdout


def test_where_everything_is_to_be_tested_a_skip_is_a_failure(tmp_path: Path) -> None:
    done = run_tests(tmp_path, SOME_TESTS, CORRAL_TEST_EVERYTHING="1")
    assert done.returncode == 1
    assert "nothing may be left out. needs HAProxy: haproxy is not on PATH" in done.stdout
    assert "nothing may be left out. no moon tonight" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 failed, 1 passed, 1 xfailed, 3 errors")


def test_nothing_left_out_is_said_too(tmp_path: Path) -> None:
    assert "Nothing was left out." in run_tests(tmp_path, "def test_fine(): ...").stdout


def test_an_unknown_need_is_refused(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "import pytest\n@pytest.mark.needs('haproxi')\ndef test_fine(): ...")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "needs 'haproxi', which tests/needs.py does not know; known: alertmanager, amtool, " in done.stderr


@pytest.mark.parametrize(("mark", "count"), [("engine", 1), ("programs", 2), ("not programs", 1)])
def test_the_marks_to_select_by_follow_from_the_needs(tmp_path: Path, mark: str, count: int) -> None:
    text = """
import pytest

@pytest.mark.needs("docker-engine")
def test_engine(): ...
@pytest.mark.needs("haproxy")
def test_program(): ...
def test_plain(): ...
"""
    done = run_tests(tmp_path, text, "-m", mark, "--collect-only")
    assert done.stdout.count("::test_") == count


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_every_need_answers_with_none_or_a_reason(name: str) -> None:
    reason = why_missing(name)
    assert reason is None or (reason and "\n" not in reason)


def test_a_hanging_docker_is_a_reason_and_not_a_hanging_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexec sleep 30\n", encoding="utf-8")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("tests.needs.ANSWER_DEADLINE_S", 0.2)
    assert NEEDS["docker-compose"].why_missing() == "docker compose version gave no answer within 0.2 s"


def test_a_program_is_found_where_daemons_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = tmp_path / "valkey-server"
    daemon.write_text("#!/bin/sh\n", encoding="utf-8")
    daemon.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("tests.needs.EXTRA_FOLDERS", (str(tmp_path),))
    assert find_program("redis-server", "valkey-server") == daemon


@pytest.mark.slow
def test_with_several_workers_what_starts_the_same_programs_stays_together(tmp_path: Path) -> None:
    """pytest 9.2 with pytest-xdist 3.8 divides silently as if there were no groups (its issue 1386)."""
    (tmp_path / "processes").mkdir()
    text = "import pytest\n\n@pytest.mark.parametrize('n', range(6))\ndef test_{name}(n): ...\n"
    for name in ("one", "two"):
        (tmp_path / "processes" / f"test_{name}.py").write_text(text.format(name=name), encoding="utf-8")
    result = run_tests(tmp_path, "", "-n", "2", "--dist", "loadgroup", "-vv")
    workers = {
        name: set(re.findall(rf"\[(gw\d)\] .* PASSED .*test_{name}\[\d\]@test_{name}\b", result.stdout))
        for name in ("one", "two")
    }
    assert result.returncode == 0, result.stdout
    assert [len(found) for found in workers.values()] == [1, 1], result.stdout
