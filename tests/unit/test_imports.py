"""Files of others, in the shapes in which people publish them, as inventories: `import`.

tests/imports has the sources, by kind, and what is expected of each: `NAME.expected` has every finding on a line
(`line path sign words`) and the inventory. `--update-golden` writes them again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import build_plan
from corral.cli import main
from corral.components.llama.flags import SET, known_flags
from corral.components.vllm.flags import SET as VLLM_SET
from corral.config.load import load_text
from corral.declarations import read_yaml
from corral.errors import SiteError, dotted
from corral.verbs.imports.commands import _rows
from corral.verbs.imports.reader import Imported, lines_to_complete, read
from corral.verbs.imports.sources import KINDS, TABLES, Leaf, read_text
from corral.verbs.imports.writing import report, text_of

FOLDER = Path(__file__).parents[1] / "imports"
SOURCES = [path for path in sorted(FOLDER.glob("*/*")) if path.suffix != ".expected"]
# Secrets in the sources; no report and no inventory may have one.
SECRET = re.compile(r"verysecret\d|pw123456")
# Sites of several files.
SITES = {
    "seed-004": ("compose/seed-004.yaml", "litellm/seed-004.yaml", "dotenv/seed-004-models.dotenv"),
    "ollama": ("compose/ollama-webui.yaml", "litellm/ollama-service.yaml"),
}

each = pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")


def imported(*paths: Path, card: str = "") -> Imported:
    names = [path.name if len(paths) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    texts = [path.read_text() for path in paths]
    return read([read_text(text, name, "/srv/site") for text, name in zip(texts, names, strict=True)], card=card)


def leaves_of(found: Imported) -> Iterator[Leaf]:
    return (leaf for document in found.documents for leaf in document.leaves)


def compact(found: Imported) -> str:
    lines = [
        f"{leaf.line} {dotted(leaf.path)} {KINDS['signs'][told.sort]} {told.words}"
        for leaf in leaves_of(found)
        for told in leaf.findings
    ]
    return "\n".join([*lines, "---", text_of(found)])


def values_of(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value of a file, found another way than the importer's."""
    if isinstance(data, dict) and data:
        for key, item in data.items():
            yield from values_of(item, (*path, str(key)))
    elif isinstance(data, list) and data:
        for number, item in enumerate(data):
            yield from values_of(item, (*path, number))
    else:
        yield path, data


def test_there_are_as_many_sources_as_promised() -> None:
    assert len(SOURCES) >= 40
    assert {path.parent.name for path in SOURCES} == set(KINDS["titles"])


@each
def test_a_source_becomes_what_is_expected(path: Path, *, update_golden: bool) -> None:
    expected = path.with_name(f"{path.name}.expected")
    found = compact(imported(path))
    if update_golden:
        expected.write_text(found)
    assert found == expected.read_text(), "look at the difference, then: --update-golden"


@each
def test_its_kind_is_recognised(path: Path) -> None:
    assert imported(path).documents[0].kind == path.parent.name


@each
def test_every_value_has_a_finding_that_is_more_than_a_remark(path: Path) -> None:
    found = imported(path)
    told = {leaf.path: {item.sort for item in leaf.findings} for leaf in leaves_of(found)}
    assert all(sorts - {"look"} for sorts in told.values())
    if path.suffix == ".yaml":
        assert set(told) == {place for place, _ in values_of(yaml.safe_load(path.read_text()))}
    else:
        begins = re.compile(r"(?i)^(export\s+)?[A-Z_][A-Z0-9_]*(=|\s)")
        known = ("FROM", "PARAMETER", "SYSTEM", "TEMPLATE", "LICENSE", "MESSAGE", "ADAPTER")
        lines = [line for line in path.read_text().splitlines() if begins.match(line)]
        if path.parent.name == "modelfile":
            lines = [line for line in lines if line.split()[0].upper() in known and line != "FROM nowhere"]
        assert len(told) == len(lines)


@each
def test_the_plan_takes_the_inventory(path: Path) -> None:
    """What is left to complete stands in lines of it, and all rules hold already."""
    found = imported(path)
    text = text_of(found)
    build_plan(load_text(text, Path("inventory.yaml")))
    lines = lines_to_complete(text, found.draft.complete)
    assert len(lines) == len(found.draft.complete)
    assert [number for number, _ in lines] == [
        number for number, line in enumerate(text.splitlines(), 1) if "# COMPLETE: " in line
    ]


@each
def test_no_secret_leaves_its_file(path: Path) -> None:
    found = imported(path)
    said = "\n".join([*report(found), text_of(found)])
    assert not SECRET.search(said)
    for leaf in leaves_of(found):
        if isinstance(leaf.value, str) and SECRET.search(leaf.value) and len(leaf.findings) == 1:
            pytest.fail(f"{leaf.place}: nothing tells of this secret")


@each
def test_what_is_carried_over_is_in_the_inventory(path: Path) -> None:
    found = imported(path)
    text = text_of(found)
    known = {re.sub(r"\[\d+\]", "", dotted(path)) for path in load_text(text, Path("i.yaml")).source.marks}
    for leaf in leaves_of(found):
        for told in leaf.findings:
            target = told.words.rpartition(": ")[2] if told.words.startswith("-") else told.words
            if told.sort == "becomes" and not re.search("nodes: this|on: the server|….|matrix|shared", told.words):
                assert target in known, f"{leaf.place}: {told.words}"
            if told.sort == "becomes" and target.endswith("extra_args"):
                assert told.words.partition(":")[0] in text.partition("\npools:")[2], told.words


@pytest.mark.parametrize("site", SITES)
def test_several_files_are_one_site(site: str, *, update_golden: bool) -> None:
    found = imported(*(FOLDER / name for name in SITES[site]), card="p104-100")
    expected = FOLDER / f"{site}.expected"
    if update_golden:
        expected.write_text(text_of(found))
    assert text_of(found) == expected.read_text()
    build_plan(load_text(text_of(found), Path("inventory.yaml")))


JUNK = [
    *(
        None,
        "",
        0,
        -1,
        True,
        [],
        {},
        [1, "a"],
        {"a": {"b": [1]}},
        "x y",
        "${A}",
        "os.environ/B",
        "http://[bad",
        "a:b:c",
    ),
    *("'open", "999999999999", "*", "é", "--port", "${", "none"),
]


def test_no_value_is_so_odd_that_it_makes_a_traceback() -> None:
    """Wrong values in right places: an inventory or a located message, and still a finding for every value."""
    rnd = random.Random(7)  # noqa: S311 - the same every time
    texts = [path.read_text() for path in SOURCES if path.suffix == ".yaml"]
    for _ in range(120):
        data = yaml.safe_load(rnd.choice(texts))
        *above, last = rnd.choice([path for path, _ in values_of(data)])
        target = data
        for key in above:
            target = target[key]
        target[last] = rnd.choice(JUNK)
        try:
            found = read([read_text(yaml.safe_dump(data, sort_keys=False), "odd.yaml", "/srv/site")])
        except SiteError:
            continue
        assert all({item.sort for item in leaf.findings} - {"look"} for leaf in leaves_of(found))
        assert list(report(found))
        assert text_of(found)


def test_every_flag_that_the_kit_sets_has_a_row() -> None:
    """A new key of the inventory for a flag of llama-server or vLLM is one that `import` has to know."""
    rows = _rows("llama")
    for names in SET:
        for name in names.split():
            for other in known_flags()[name].names:
                assert other in rows or f"--no-{other.removeprefix('--')}" in rows or "no-" in other, name
    assert {name for names in VLLM_SET for name in names.split()} <= set(_rows("vllm"))


def test_every_row_of_a_table_can_be_read() -> None:
    known = {"kit", "left", "never", "look", "to", "as", "value", "adds", "do", "of", "flag", "flags", "cards",
             "maker", "variable", "secret", "own", "told", "drops"}  # fmt: skip
    for name in ("litellm", "compose", "llama_swap", "modelfile", "dotenv"):
        for pattern, row in read_yaml(TABLES / f"{name}.yaml").items():
            if isinstance(row, dict) and pattern not in ("services", "others", "environment"):
                assert set(row) <= known, pattern


def test_the_table_of_sources_is_in_the_documentation() -> None:
    """docs/import.md says how many files of each kind were tried, with their values and findings."""
    lines = [f"| {KINDS['titles'][kind]} | {' | '.join(map(str, counts))} |" for kind, counts in figures().items()]
    text = (FOLDER.parents[1] / "docs" / "import.md").read_text()
    assert "\n".join(lines) in text, "docs/import.md: put these lines there:\n" + "\n".join(lines)


def figures() -> dict[str, list[int]]:
    """By kind: files, values, and findings of each sort."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS["titles"]}
    for path in SOURCES:
        found = imported(path)
        kind = counts[path.parent.name]
        kind.update({"files": 1, "values": sum(1 for _ in leaves_of(found))})
        kind.update(told.sort for leaf in leaves_of(found) for told in leaf.findings)
    return {kind: [count[key] for key in ("files", "values", *KINDS["signs"])] for kind, count in counts.items()}


# --- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["import", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_report_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "--report", str(FOLDER / "litellm/dead-keys.yaml"))
    assert code == 0
    assert "dead-keys.yaml:6: router_settings.model_rate_limits.chat.rpm × LiteLLM does not know this key" in out
    assert not list(tmp_path.iterdir())


def test_an_inventory_is_written_once_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(FOLDER / "compose/vllm.yaml")
    code, _, err = run(capsys, source, "--card", "rtx-3090")
    line = next(n for n, text in enumerate(Path("inventory.yaml").read_text().splitlines(), 1) if "revision" in text)
    assert code == 0
    assert f"inventory.yaml:{line}: write the commit of Qwen/Qwen3-8B" in err
    assert main(["check"]) == 0
    before = Path("inventory.yaml").read_bytes()
    code, _, err = run(capsys, source)
    assert code == 2
    assert "not overwritten; name another file with --output" in err
    assert Path("inventory.yaml").read_bytes() == before


def test_what_the_rules_refuse_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card that is not in the catalogue."""
    monkeypatch.chdir(tmp_path)
    source = str(FOLDER / "compose/moe.yaml")
    code, _, err = run(capsys, source, "--card", "odd-card", "--output", "farm.yaml")
    assert code == 1
    assert re.search(r"farm\.yaml:\d+:\d+: .*\[card-known\]", err)
    assert "wrote farm.yaml; change the lines above" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n", "known are LiteLLM's"),
        ("x: [\n", "not valid YAML"),
        ("schema_version: 1\nmodels: {}\n", "this is an inventory already"),
    ],
)
def test_another_file_is_refused_with_its_name(text: str, words: str) -> None:
    with pytest.raises(SiteError, match=r"strange\.yaml") as refused:
        read_text(text, "strange.yaml")
    assert words in str(refused.value)


def test_files_without_a_model_make_no_inventory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("compose.yaml").write_text("services: {web: {image: nginx}}\n")
    code, _, err = run(capsys, "compose.yaml")
    assert code == 1
    assert "nothing that clients could call" in err
    assert not Path("inventory.yaml").exists()
