"""Leaves out, and says so, what this machine cannot test; with CORRAL_TEST_EVERYTHING=1 leaves out nothing."""

import gc
import os
from collections import Counter
from collections.abc import Generator

import pytest

from tests.compose import own_image_proof
from tests.engine_groups import group_of
from tests.needs import NEEDS, why_missing

EVERYTHING = "CORRAL_TEST_EVERYTHING"
LEFT_OUT = "left out for want of"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the expected trees instead of comparing")
    parser.addoption("--compile", action="store_true", help="compile llama.cpp although its inputs are as last proven")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to write the expected trees (`make golden`) instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))


def tests_everything() -> bool:
    """Whether a test that cannot run here is a failure."""
    return os.environ.get(EVERYTHING, "") not in {"", "0"}


def needs_of(item: pytest.Item) -> list[str]:
    """The names of what a test needs, from all its `needs` marks, in the order written."""
    return list(dict.fromkeys(name for mark in item.iter_markers("needs") for name in mark.args))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses unknown needs, derives the marks that `-m` selects by and that pytest-xdist divides by."""
    if own_image_proof.is_fresh() and not config.getoption("--compile"):
        items[:] = [item for item in items if not item.get_closest_marker("compiles")]
    for item in items:
        names = needs_of(item)
        unknown = [name for name in names if name not in NEEDS]
        if unknown:
            message = (
                f"{item.nodeid} needs {unknown[0]!r}, which tests/needs.py does not know; known: {', '.join(NEEDS)}"
            )
            raise pytest.UsageError(message)
        if names:
            item.add_marker("programs")
        if "docker-engine" in names:
            item.add_marker("engine")
        if "processes" in item.path.parts and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # what a module starts, one worker starts once
        if "consumers" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("consumers"))  # one worker imports LiteLLM
        if "compose" in item.path.parts and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group_of(item.path.stem)))


def pytest_collection_finish() -> None:
    """Spares what is collected by now, hundreds of thousands of objects, from being looked at again and again."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves a test out before its fixtures start anything."""
    for name in needs_of(item):
        reason = why_missing(name)
        if reason:
            item.user_properties.append((LEFT_OUT, name))  # travels from pytest-xdist's workers with the report
            pytest.skip(f"needs {NEEDS[name].title}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns every skip into a failure where everything is to be tested."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and tests_everything():
        report.outcome = "failed"
        report.longrepr = f"{EVERYTHING} is set, so nothing may be left out. {reason_of(report)}"
    return report


def reason_of(report: pytest.TestReport) -> str:
    """A skipped test's own words."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def left_out_lines(skipped: list[pytest.TestReport]) -> list[str]:
    """Plain words for the end of a run: what was left out here, why, and what would change that."""
    if not skipped:
        return ["Nothing was left out."]
    wants = Counter(str(name) for report in skipped for mark, name in report.user_properties if mark == LEFT_OUT)
    others = Counter(reason_of(report) for report in skipped if LEFT_OUT not in dict(report.user_properties))
    lines = [f"Left out on this machine: {_tests(len(skipped))}."]
    for name, count in sorted(wants.items()):
        need = NEEDS[name]
        lines.append(f"  {_tests(count)} need{'s' * (count == 1)} {need.title}: {why_missing(name)}")
        lines.append(f"      to run {'it' if count == 1 else 'them'}: {need.remedy}")
    lines.extend(f"  {_tests(count)}: {reason}" for reason, count in sorted(others.items()))
    return lines


def _tests(count: int) -> str:
    return f"{count} test{'s' * (count != 1)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left out and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.ensure_newline()
    for line in left_out_lines([report for report in skipped if isinstance(report, pytest.TestReport)]):
        terminalreporter.write_line(line)
