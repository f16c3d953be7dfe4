"""The rendered trees of the golden cases: as expected, tidy, whole and without secrets."""

from __future__ import annotations

import ast
import configparser
import difflib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.render.output import MANIFEST, compare
from corral.render.secrets import initialise
from corral.render.templates import Tree
from corral.render.tree import render
from tests import expected
from tests.expected import expected_of, write_expected
from tests.trees import (
    CASES,
    GOLDEN,
    ROOT,
    compose_files,
    each_case,
    hosts_of,
    inventory_of,
    plan_of,
    put,
    services_of,
    tree_of,
)

UPDATE = "after reading it, accept it with: make golden"
SHOWN = 400  # lines of a difference
MARKER = "m4rk3r"
# Files with templates of the program that reads them.
HAS_BRACES = re.compile(r"/prometheus/rules/|/alertmanager\.yml$|/grafana/pages/")
SOURCE_NAMED = re.compile(
    r"^(?:[#;]|--) Change the inventory or (\S+), then run: \./generate\.py render$", re.MULTILINE
)


# --- expected trees ---------------------------------------------------------------------------------------------------


@each_case
def test_golden_tree(case: str, *, update_golden: bool) -> None:
    if update_golden:
        write_expected(case)
    else:
        refuse(difference(expected_of(case), tree_of(case), case))


@pytest.mark.parametrize("path", sorted((ROOT / "inventories").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_worked_example_renders_and_is_listed_for_readers(path: Path) -> None:
    assert render(build_plan(load_inventory(path)))
    assert f"| `{path.name}` |" in (ROOT / "docs" / "inventory.md").read_text()


def test_golden_cases_are_the_folders_that_are_there() -> None:
    assert sorted(CASES) == sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def test_a_worked_example_has_no_second_inventory() -> None:
    both = [case for case in CASES if (ROOT / "inventories" / f"{case}.yaml").exists()]
    assert both
    assert [case for case in both if (GOLDEN / case / "inventory.yaml").exists()] == []


def test_the_committed_rendering_is_fresh() -> None:
    tree = render(build_plan(load_inventory(ROOT / "inventory.yaml")))
    changes = [change for change in compare(tree, ROOT / "compose") if change.action != "identical"]
    found = {change.path: change.old for change in changes if change.old is not None}
    wanted = {change.path: change.new for change in changes if change.new is not None}
    refuse(difference(found, wanted, "compose", "write it again with: ./generate.py render --force"))
    assert [change.path for change in changes] == []


def difference(old: Tree, new: Tree, name: str, remedy: str = UPDATE) -> str:
    lines: list[str] = []
    for path in sorted(old.keys() | new.keys()):
        before, after = lines_of(old.get(path)), lines_of(new.get(path))
        lines += difflib.unified_diff(before, after, f"expected/{name}/{path}", f"rendered/{name}/{path}", lineterm="")
    rest = [f"… and {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *rest, remedy]) if lines else ""


def refuse(text: str) -> None:
    if text:
        pytest.fail(text, pytrace=False)


def lines_of(data: bytes | None) -> list[str]:
    """Different for different bytes; an empty file has one empty line, an absent one has none."""
    return [] if data is None else data.decode().split("\n")


def test_a_difference_is_shown_with_its_remedy() -> None:
    text = difference({"a": b"one\n", "gone": b"x\n"}, {"a": b"two\n"}, "case")
    assert "--- expected/case/a" in text
    assert "-one\n+two" in text
    assert "+++ rendered/case/gone" in text
    assert text.endswith(UPDATE)


@pytest.mark.parametrize(("old", "new"), [(b"a\n", b"a"), (b"a\n", b"a\r\n"), (b"", None), (None, b"")])
def test_every_other_byte_is_a_difference(old: bytes | None, new: bytes | None) -> None:
    before, after = ({} if data is None else {"a": data} for data in (old, new))
    assert difference(before, after, "case").startswith("--- expected/case/a\n+++ rendered/case/a\n")


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (
            lambda folder: swap(folder / "expected.txt", "= haproxy/fair.lua", "= haproxy/request_gate.lua"),
            "haproxy/fair.lua",
        ),
        (lambda folder: swap(folder / "expected.txt", "box/.gitignore\n", "box/compose.yaml\n"), "/.gitignore"),
        (lambda folder: swap(folder / "expected.txt", "gateway/.gitignore", "gateway/.other"), "gateway/.other"),
        (lambda folder: swap(folder / "expected/gateway/haproxy/haproxy.cfg.delta", "+", "+ "), "haproxy/haproxy.cfg"),
        (lambda folder: swap(folder / "expected/gateway/haproxy/haproxy.cfg.delta", "copy ", "copy 1"), "haproxy.cfg"),
        (lambda folder: (folder / "expected/gateway/haproxy/haproxy.cfg.delta").unlink(), "haproxy/haproxy.cfg"),
        (lambda folder: (folder / "expected/gateway/new").write_text(""), "gateway/new"),
    ],
    ids=["another asset", "another file", "another path", "a changed line", "shifted", "missing", "left over"],
)
def test_an_expectation_that_is_not_met_is_found(
    change: Callable[[Path], object], seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert difference(expected_of("dragon"), tree_of("dragon"), "dragon") == ""  # and the cases before it are read
    shutil.copytree(GOLDEN / "dragon", tmp_path / "dragon")
    monkeypatch.setattr(expected, "GOLDEN", tmp_path)
    change(tmp_path / "dragon")
    assert seen in difference(expected_of.__wrapped__("dragon"), tree_of("dragon"), "dragon")


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@given(
    old=st.lists(st.sampled_from(["", "a", "+", "@ back 1, copy 1"])), new=st.lists(st.sampled_from(["", "a", "+b"]))
)
def test_a_delta_makes_one_text_of_another(old: list[str], new: list[str]) -> None:
    before, after = "\n".join(old).encode(), "\n".join(new).encode()
    assert expected.changed(before, expected.delta_of(before, after)) == after


# --- tidiness ---------------------------------------------------------------------------------------------------------


@each_case
def test_text_is_tidy(case: str) -> None:
    assert [problem for path, data in tree_of(case).items() for problem in untidiness(path, data.decode())] == []


def untidiness(path: str, text: str) -> Iterator[str]:
    if not text.endswith("\n") or text.endswith("\n\n"):
        yield f"{path}: ends otherwise than with one line end"
    if "\r" in text or "\t" in text:
        yield f"{path}: carriage return or tab"
    # Python code has two blank lines between functions, and its sources are read by the linter anyway.
    if not path.endswith(".py") and "\n\n\n" in text:
        yield f"{path}: two blank lines in a row"
    for number, line in enumerate(text.splitlines(), start=1):
        if line != line.rstrip():
            yield f"{path}:{number}: spaces at the end"
        if not path.endswith(".py") and not HAS_BRACES.search(path) and ("{{" in line or "{%" in line or "{#" in line):
            yield f"{path}:{number}: left-over template braces"


# Where files come from that are the shipped ones byte by byte: dashboards have no comments, and browsers read the page.
SHIPPED = {".json": "monitoring/dashboards", ".css": "haproxy", ".html": "haproxy", ".js": "haproxy"}


@each_case
def test_every_file_says_where_it_comes_from(case: str) -> None:
    for path, data in tree_of(case).items():
        if (folder := SHIPPED.get(PurePosixPath(path).suffix)) is not None:
            assert data == (ROOT / folder / path.rpartition("/")[2]).read_bytes(), path
            continue
        lines = data.decode().splitlines()
        head = lines[1:3] if lines[0].startswith("#!") else lines[:2]
        assert f'Rendered by corral from the inventory "{plan_of(case).inventory.name}"' in head[0], path
        assert f"host {path.partition('/')[0]};" in head[0], path
        source = SOURCE_NAMED.search("\n".join(head))
        assert source is not None, path
        assert (ROOT / source[1]).is_file(), f"{path} names {source[1]}, which is not there"


@each_case
def test_rendering_twice_gives_the_same_bytes(case: str) -> None:
    again = render(build_plan(load_inventory(inventory_of(case))))
    assert again == tree_of(case)
    assert list(again) == list(tree_of(case))


@each_case
def test_nothing_of_this_machine_or_this_moment(case: str) -> None:
    for path, data in tree_of(case).items():
        text = data.decode()
        assert str(ROOT) not in text, path
        assert str(Path.home()) not in text, path
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b", text), f"{path} has a date or a time"


# --- parsing ----------------------------------------------------------------------------------------------------------


@each_case
def test_every_file_parses(case: str) -> None:
    for path, data in tree_of(case).items():
        parse(path, data.decode())


def parse(path: str, text: str) -> None:
    name = path.rpartition("/")[2]
    if name.endswith((".yaml", ".yml")):
        assert isinstance(yaml.load(text, Loader=UniqueKeys), dict)  # noqa: S506 - a SafeLoader
    elif name.endswith(".py"):
        ast.parse(text)
    elif name.endswith(".json"):
        json.loads(text)
    elif name.endswith(".conf"):
        configparser.RawConfigParser(inline_comment_prefixes=(";", "#")).read_string(text)
    elif name.endswith(".ini"):
        configparser.RawConfigParser(delimiters="=").read_string(f"[top]\n{text}")  # llama.cpp has keys before sections
    elif name == ".env.example":
        assert all(
            not line or line.startswith("#") or re.fullmatch(r"[A-Z][A-Z0-9_]*=", line) for line in text.splitlines()
        )
    elif name.endswith(".sh"):
        assert subprocess.run(["sh", "-n"], input=text, text=True, check=False).returncode == 0
    else:
        assert name in {"haproxy.cfg", "sshd_config", ".gitignore", "README"} or name.endswith(
            (".service", ".timer", ".lua", ".css", ".html", ".js")
        ), f"nothing here can read {path}"


class UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that has a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - as PyYAML has it
        mapping = super().construct_mapping(node, deep)
        assert len(mapping) == len(node.value), f"a key is there twice at {node.start_mark}"
        return mapping


UniqueKeys.add_constructor("!reset", lambda _loader, _node: None)  # Compose's own: takes a key away


# --- references -------------------------------------------------------------------------------------------------------


@each_case
def test_every_reference_resolves(case: str) -> None:
    for host in hosts_of(case, "compose"):
        parts = {path: data for path, data in compose_files(case) if path.startswith(f"{host}/")}
        root = parts.pop(f"{host}/compose.yaml")
        assert sorted(f"{host}/{path}" for path in root["include"]) == sorted(parts)
        services = {name: (path, body) for path, part in parts.items() for name, body in part["services"].items()}
        used = {secret for _, body in services.values() for secret in body.get("secrets", [])}
        assert used == set(root.get("secrets", {}))
        for secret in used:
            assert root["secrets"][secret] == {"file": f"./secrets/{secret}"}
        for name, (path, body) in services.items():
            assert set(body.get("networks", ())) <= set(root["networks"]), name
            assert ("networks" in body) != (body.get("network_mode") == "host"), name
            assert set(body.get("depends_on", {})) <= set(services), name
            check_mounts(case, path, body.get("volumes", []), set(parts[path].get("volumes", {})))


def check_mounts(case: str, path: str, mounts: list[str], volumes: set[str]) -> None:
    """Files that are mounted are rendered beside, volumes declared, and none is left over."""
    folder = path.rpartition("/")[0]
    for mount in mounts:
        source = mount.rpartition(":")[0].rpartition(":")[0] if mount.endswith(":ro") else mount.partition(":")[0]
        if source.startswith("./"):
            assert f"{folder}/{source[2:]}" in tree_of(case), mount
        elif not source.startswith(("/", "../")):
            assert source in volumes, mount


@each_case
def test_every_rendered_secret_has_a_source(case: str) -> None:
    for host in hosts_of(case, "compose") + hosts_of(case, "local"):
        provided = {secret.name for secret in plan_of(case).secrets_of(host)}
        wanted = {name for service in services_of(case) if service.host == host for name in service.secrets}
        assert wanted <= provided
        stored = {secret.name for secret in plan_of(case).secrets_of(host) if secret.is_stored}
        example = tree_of(case)[f"{host}/.env.example"].decode()
        assert set(re.findall(r"^([A-Z][A-Z0-9_]*)=$", example, re.MULTILINE)) == stored


@each_case
def test_files_of_local_programs_are_rendered(case: str) -> None:
    for host in hosts_of(case, "local"):
        text = tree_of(case)[f"{host}/supervisord.conf"].decode()
        rendered = re.findall(r"%\(here\)s/([\w-]+/[\w.-]+\.(?:sh|yaml|yml|cfg))", text)
        assert rendered
        for path in rendered:
            assert f"{host}/{path}" in tree_of(case), path


# --- secrets ----------------------------------------------------------------------------------------------------------


@each_case
def test_no_secret_value_is_rendered(case: str, tmp_path: Path) -> None:
    plan = plan_of(case)
    needed = {host: plan.secrets_of(host) for host in plan.inventory.hosts if plan.secrets_of(host)}
    names = {secret.name for secrets in needed.values() for secret in secrets if secret.is_stored}
    for host in needed:
        (tmp_path / host).mkdir()
        (tmp_path / host / ".env").write_text("".join(f"{name}={MARKER}-{name}\n" for name in sorted(names)))
    reports = initialise(needed, tmp_path)
    assert reports
    assert not {name for report in reports for name in (*report.made, *report.missing)} & names
    put(render(build_plan(load_inventory(inventory_of(case)))), tmp_path)
    holders = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and MARKER.encode() in path.read_bytes()
    }
    assert all(re.fullmatch(r"[^/]+/(\.env|secrets/[A-Z0-9_]+)", path) for path in holders), holders
    assert holders


def test_every_rendered_folder_keeps_its_secrets_out_of_git(tmp_path: Path) -> None:
    folder = put(tree_of("heartcode"), tmp_path)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for path in ("pea/.env", "pea/..env.new", "pea/secrets/LLAMA_API_KEY", "prod/.env", "pea/data/x"):
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=folder, check=False)
        assert done.returncode == 0, path
    for path in ("pea/.env.example", "pea/compose.yaml", f"pea/{MANIFEST}"):
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=folder, check=False)
        assert done.returncode == 1, path


# --- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_times_the_farm_is_at_most_twelve_times_the_work(tmp_path: Path) -> None:
    small, large = (work_of(gpus, tmp_path) for gpus in (80, 800))
    assert large / small <= 12, f"{small} calls for 80 GPUs, {large} for 800"


def work_of(gpus: int, folder: Path) -> int:
    """Calls of Python functions and built-ins from inventory to rendered tree."""
    import cProfile
    import pstats

    from tools.bench_render import farm

    path = folder / f"{gpus}.yaml"
    path.write_text(json.dumps(farm(gpus)), encoding="utf-8")
    profile = cProfile.Profile()
    profile.enable()
    render(build_plan(load_inventory(path)))
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_other_way_of_balancing_several_hosts_grows_no_faster(tmp_path: Path) -> None:
    from tools.bench_render import farm

    def calls(gpus: int) -> int:
        import sys

        path = tmp_path / f"{gpus}.yaml"
        path.write_text(
            json.dumps(farm(gpus) | {"gateway": {"host": "gate", "balancing": "least-busy"}}), encoding="utf-8"
        )
        count = 0

        def counted(_frame: object, event: str, _argument: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(counted)
        try:
            render(build_plan(load_inventory(path)))
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) / calls(40) <= 12
