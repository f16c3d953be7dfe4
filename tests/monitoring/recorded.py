"""A real Prometheus that holds recorded figures and what the shipped recording rules make of them."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import yaml

from tests.monitoring import figures
from tests.monitoring.boards import asked
from tests.monitoring.test_catalogue import selectors, shipped
from tests.needs import program
from tests.processes.fakes import LOOPBACK
from tests.processes.helpers import Process, wait_http

DEADLINE_S = 120
# Rules for programs that the recorded farm does not have.
OTHER_EXPORTERS = {"gpu_dcgm.yml", "localai.yml", "vllm.yml"}


@contextmanager
def recorded(folder: Path, text: str) -> Iterator[str]:
    """The address of a Prometheus with these figures; rules that need others' results come after them."""
    source = folder / "figures.txt"
    source.write_text(text, encoding="utf-8")
    data = folder / "data"
    _promtool("tsdb", "create-blocks-from", "openmetrics", str(source), str(data))
    for rules in levels():
        file = folder / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "recorded", "rules": list(rules)}]}, width=10_000))
        with _running(folder) as url:
            _promtool(
                "tsdb", "create-blocks-from", "rules", f"--start={figures.BEGIN}", f"--end={figures.END}",
                f"--url={url}", f"--output-dir={data}", f"--eval-interval={figures.STEP_S}s", str(file),
            )  # fmt: skip
    with _running(folder) as url:
        yield url


@contextmanager
def _running(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    config = folder / "prometheus.yml"
    config.write_text("{}\n")
    command = [
        str(program("prometheus")), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=100y", f"--web.listen-address={LOOPBACK}:{port}", "--log.level=warn",
    ]  # fmt: skip
    url = f"http://{LOOPBACK}:{port}"
    with Process(command, folder / "prometheus.log"):
        wait_http(f"{url}/-/ready")
        yield url


def _promtool(*arguments: str) -> None:
    command = [str(program("promtool")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@cache
def levels() -> tuple[tuple[Mapping[str, Any], ...], ...]:
    """The recording rules behind the dashboards, each after those whose results it reads."""
    rules = [rule for file, rule in shipped() if "record" in rule and file not in OTHER_EXPORTERS]
    makers: dict[str, list[Mapping[str, Any]]] = {}
    for rule in rules:
        makers.setdefault(rule["record"], []).append(rule)

    def depth(name: str) -> int:
        return 1 + max((depth(below) for rule in makers[name] for below in _read(rule) if below in makers), default=0)

    wanted: set[str] = set()
    new = {name for query in asked() for name in names_in(query.plain)}
    while new := {name for name in new if name in makers} - wanted:
        wanted |= new
        new = {below for name in new for rule in makers[name] for below in _read(rule)}
    found: dict[int, list[Mapping[str, Any]]] = {}
    for name in sorted(wanted):
        found.setdefault(depth(name), []).extend(makers[name])
    return tuple(tuple(found[level]) for level in sorted(found))


def _read(rule: Mapping[str, Any]) -> Iterable[str]:
    return names_in(rule["expr"])


def names_in(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    return {selector.name for selector in selectors(promql.parse(expression)) if selector.name}


def answer(url: str, expression: str, when: float) -> list[dict[str, Any]]:
    """The series of an expression at a time; AssertionError with Prometheus' words if it does not understand it."""
    got = httpx.get(f"{url}/api/v1/query", params={"query": expression, "time": when}, trust_env=False, timeout=60)
    assert got.is_success, f"{expression}: {got.text}"
    data = got.json()["data"]
    assert data["resultType"] == "vector", expression
    result: list[dict[str, Any]] = data["result"]
    return result
