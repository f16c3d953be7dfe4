"""Whatever stands in an inventory, there is a plan or a list of problems, never a traceback."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.build import build_plan
from corral.config.inventory import (
    Gateway,
    Host,
    Inventory,
    Limits,
    Model,
    Monitoring,
    Node,
    Placement,
    Pool,
    Queue,
    ServerSettings,
)
from corral.config.load import validate
from corral.config.source import parse
from corral.errors import SiteError
from corral.render.tree import render
from tests.unit.test_bad_inventories import BASE, JARGON

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [BASE, *(path.read_text() for path in sorted([ROOT / "inventory.yaml", *ROOT.glob("inventories/*.yaml")]))]
SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MODELS = (Inventory, Host, Node, Model, Pool, Placement, ServerSettings, Gateway, Monitoring, Limits, Queue)
KEYS = sorted({key for model in MODELS for key in model.model_fields})
SNIPPETS = [
    *(
        "\t",
        "  ",
        "\n",
        "\n\n",
        ": ",
        ":",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "{}",
        "[]",
        "'",
        '"',
        "#",
        " #",
        "&a ",
        "*a",
        "<<: *a",
    ),
    *(
        "!!str ",
        "!x ",
        "|",
        ">",
        "%",
        "@",
        "`",
        "?",
        ",",
        "---\n",
        "...\n",
        "null",
        "~",
        "true",
        "-1",
        "0",
        "1e999",
        ".5",
    ),
    *(
        "99999999999999999999",
        "1-3",
        "3-1",
        "../",
        "$",
        "%(here)s",
        "é",
        "😀",
        "\u2028",
        "\x85",
        "\xa0",
        "\ufeff",
        "\x00",
    ),
    *("sk-abcdefghijkl", "http://a:b@c", *KEYS),
]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        " ",
        "x",
        "1-3",
        "3-1",
        "0",
        "é",
        "a\nb",
        "a" * 300,
        "../x",
        "$x",
        "{{ x }}",
        "os.environ/X",
    ),
    *("hf:", "hf:a/b", "hf:a/b/c", "http://x", "http://[::1", "GPU-12345678", "127.0.0.1", "::1", "all", "q8_0", "off"),
    *(0, 1, -1, 3, 65535, 10**17, -(10**17), 0.5, 1e300, [], {}, [None], [[]], ["x"], ["x", "x"], [1], {"x": None}),
    *(
        {"x": {}},
        {"": 1},
        {"host": "box"},
        [{"node": "mac"}],
        {"a": {"b": {"c": [1, {"d": 2}]}}},
        [{"host": "box"}] * 3,
    ),
    *("local", "direct", "image", "rerank", "embedding", "cloud", "ollama", "least-busy"),
]


def must_be_told_or_planned(text: str) -> None:
    try:
        plan = build_plan(validate(parse(text, "inventory.yaml")))
    except SiteError as error:
        problems = error.problems
    else:
        render(plan)
        return
    assert problems
    for problem in problems:
        line = str(problem)
        assert "\n" not in line
        assert line.isprintable(), repr(line)
        assert problem.message
        assert not JARGON.search(problem.message.partition('"')[0]), line
        assert 0 < problem.line <= text.count("\n") + 2 or not text.strip("\ufeff \n") or "empty" in problem.message, (
            line
        )


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """A good inventory with a few places cut, doubled, moved or overwritten."""
    text = draw(st.sampled_from(EXAMPLES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 8, 40])))
        lines = text.splitlines(keepends=True) or [""]
        line = draw(st.integers(0, len(lines) - 1))
        text = draw(
            st.sampled_from(
                [
                    text[:start] + draw(st.sampled_from(SNIPPETS)) + text[end:],
                    text[:start] + text[end:],
                    text[:start] + text[start:end] * 2 + text[end:],
                    "".join(lines[:line] + lines[line + 1 :]),
                    "".join([*lines[:line], lines[line], *lines[line:]]),
                    "".join([*lines[:line], "  " + lines[line], *lines[line + 1 :]]),
                    text[:start],
                ]
            )
        )
    return text


@SETTINGS
@given(text=mutated_texts())
def test_mutated_examples(text: str) -> None:
    must_be_told_or_planned(text)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything below a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [below for key, child in children for below in ((*path, key), *paths_of(child, (*path, key)))]


@st.composite
def mutated_inventories(draw: st.DrawFn) -> dict[str, Any]:
    """A good inventory with a few values replaced by odd ones, and odd keys added."""
    data: dict[str, Any] = parse(draw(st.sampled_from(EXAMPLES)), "example").data
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(paths_of(data)))
        holder: Any = data
        for key in parents:
            holder = holder[key]
        if isinstance(holder, dict) and draw(st.booleans()):
            last = draw(st.sampled_from(KEYS))
        holder[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return data


@SETTINGS
@given(data=mutated_inventories())
def test_odd_values_in_good_inventories(data: dict[str, Any]) -> None:
    must_be_told_or_planned(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


SCALARS = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(KEYS))
NAMES = st.one_of(st.sampled_from(KEYS), st.sampled_from(["x-a", "box", "chat", "<<", "é"]), st.text(max_size=4))
STRUCTURES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@SETTINGS
@given(data=st.dictionaries(st.one_of(st.sampled_from(sorted(Inventory.model_fields)), NAMES), STRUCTURES, max_size=8))
def test_random_structures(data: dict[str, Any]) -> None:
    must_be_told_or_planned(yaml.safe_dump({"schema_version": 1, "name": "x", **data}, sort_keys=False))


@SETTINGS
@given(text=st.text(st.sampled_from(list("ab:-[]{}&*!|>'\"%@#, \n\t?~1.\\<")), max_size=60))
def test_random_signs(text: str) -> None:
    must_be_told_or_planned(text)


@SETTINGS
@given(raw=st.binary(max_size=60))
def test_random_bytes(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    from corral.config.load import load_inventory

    path = tmp_path_factory.getbasetemp() / "inventory.yaml"
    path.write_bytes(raw)
    with pytest.raises(SiteError):
        load_inventory(path)
