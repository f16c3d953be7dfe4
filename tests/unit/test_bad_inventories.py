"""Every wrong inventory gets its exact message; the table is bad_inventories.yaml."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.config.messages import FOREIGN
from corral.config.schema import schema_text
from corral.errors import SiteError

TABLE = Path(__file__).with_name("bad_inventories.yaml")
NAME = "inventory.yaml"
JARGON = re.compile(
    r"pydantic|Input should|\b(dict|dictionary|tuple|str|int|bool|NoneType|None|True|False|integer|literal)\b"
    r"|Traceback|Error\b|<class|ctx=|instance of|valid_"
)

_table: dict[str, Any] = yaml.safe_load(TABLE.read_text())
BASE: str = _table["base"]
CASES: list[dict[str, Any]] = _table["cases"]


def text_of(case: dict[str, Any]) -> str:
    text: str = case.get("text", BASE)
    for old, new in case.get("replace", {}).items():
        assert old in text, f"{case['what']}: the base has no {old!r}"
        text = text.replace(old, new, 1)
    return text


def told(path: Path) -> list[str]:
    """The messages of an inventory, as `check` prints them, from beside the file."""
    with pytest.raises(SiteError) as caught:
        build_plan(load_inventory(path))
    return [str(problem).replace(str(path), NAME) for problem in caught.value.problems]


@pytest.mark.parametrize("case", CASES, ids=[case["what"] for case in CASES])
def test_the_message_is_exact(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text(text_of(case), encoding="utf-8")

    assert told(path) == case["says"]


def test_the_base_is_fine(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text(BASE)

    assert build_plan(load_inventory(path)).warnings == ()


def test_the_table_is_large_and_every_case_is_there_once() -> None:
    names = [case["what"] for case in CASES]

    assert len(names) >= 150
    assert len(set(names)) == len(names)


def test_messages_are_short_and_in_plain_words() -> None:
    for line in (line for case in CASES for line in case["says"]):
        words = re.sub(r"^inventory\.yaml:(\d+:\d+:)? ", "", line)
        assert len(words) <= 260, line
        assert not JARGON.search(re.sub(r'"[^"]*"', "", words)), line
        assert not words.endswith((".", "!", " ")), line


BYTES = {
    "Latin-1": ("name: Größe\n".encode("latin-1"), "1:9: not UTF-8 text; save the file as UTF-8"),
    "Latin-1 in a later line": (b"a: 1\n\nb: caf\xe9\n", "3:7: not UTF-8 text; save the file as UTF-8"),
    "UTF-16": ("name: farm\n".encode("utf-16"), "1:1: not UTF-8 text but UTF-16; save the file as UTF-8"),
    "UTF-16 without its mark": (
        "name: farm\n".encode("utf-16-le"),
        "1:2: the invisible character U+0000 is not allowed; remove it",
    ),
    "a zero byte": (b"a: 1\nb: x\0y\n", "2:5: the invisible character U+0000 is not allowed; remove it"),
    "an escape character": (b"a: \x1b[31m\n", "1:4: the invisible character U+001B is not allowed; remove it"),
    "a byte order mark in the middle": (
        b"a: 1\n\xef\xbb\xbfb: 2\n",
        "2:1: the invisible character U+FEFF is not allowed; remove it",
    ),
    "10 MB": (b"# x\n" * 2_500_000, " larger than 4 MiB, which no inventory is; is this the right file?"),
    "10 000 brackets": (b"a: " + b"[" * 10_000, "1:67: nested deeper than 64 levels; is a bracket missing?"),
    "2 000 levels of indentation": (
        b"".join(b" " * level + b"a:\n" for level in range(2_000)),
        "65:65: nested deeper than 64 levels; is a bracket missing?",
    ),
    "a bomb of aliases": (
        b"a: &a [1,2,3,4,5,6,7,8,9]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(ord("a"), ord("i"))),
        "6:26: more than 500000 values; aliases multiply what they stand for",
    ),
    "depth by aliases": (
        b"a0: &a0 []\n" + b"".join(b"a%d: &a%d [[[*a%d]]]\n" % (n, n, n - 1) for n in range(1, 100)),
        "23:14: nested deeper than 64 levels; aliases put too much into each other",
    ),
}


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_inventory(what: str, tmp_path: Path) -> None:
    content, expected = BYTES[what]
    path = tmp_path / NAME
    path.write_bytes(content)

    assert told(path) == [f"{NAME}:{expected}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.rstrip(b"\n"),
        lambda data: b"---\n" + data + b"...\n",
        lambda data: b"%YAML 1.2\n---\n" + data,
    ],
    ids=["byte order mark", "Windows line ends", "no last line end", "document marks", "YAML directive"],
)
def test_harmless_differences_are_fine(change: Any, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(change(BASE.encode()))

    build_plan(load_inventory(path))


def test_a_line_number_counts_windows_line_ends_once(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(BASE.replace("gateway: {host: pi}", "gateway: {host: pie}").replace("\n", "\r\n").encode())

    assert told(path) == [f'{NAME}:23:11: gateway.host: no host named "pie"; did you mean "pi"? [role-host-exists]']


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "cannot be read: Is a directory; name a file in it"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda _path: None, "cannot be read: No such file or directory"),
        (
            lambda path: path.symlink_to("/dev/zero"),
            "larger than 4 MiB, which no inventory is; is this the right file?",
        ),
    ],
    ids=["a folder", "a link to itself", "nothing", "an endless file"],
)
def test_paths_that_are_no_file(make: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    make(path)

    assert told(path) == [f"{NAME}: {expected}"]


def test_every_word_of_other_programs_leads_to_a_key_that_exists() -> None:
    schema = json.loads(schema_text())
    for place in FOREIGN["keys"]:
        kinds = [schema]
        for part in place.split("."):
            kinds = [below for kind in kinds for below in _below(schema, kind, part)]
            assert kinds, place
    choices = set(re.findall(r'"([a-z.]+)"', json.dumps([item["enum"] for item in _enums(schema)])))
    assert set(FOREIGN["values"]) <= choices


def _below(schema: Any, kind: Any, part: str) -> list[Any]:
    """What a schema has at a key; `…` is any key."""
    if "$ref" in kind:
        return _below(schema, schema["$defs"][kind["$ref"].rpartition("/")[2]], part)
    found = [below for key in ("anyOf", "oneOf") for one in kind.get(key, ()) for below in _below(schema, one, part)]
    if "items" in kind:
        found += _below(schema, kind["items"], part)
    if part == "…":
        return [*found, *kind.get("patternProperties", {}).values(), *filter(None, [kind.get("additionalProperties")])]
    return found + ([kind["properties"][part]] if part in kind.get("properties", {}) else [])


def _enums(node: Any) -> list[Any]:
    """Every choice in a schema."""
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    own = [node] if isinstance(node, dict) and isinstance(node.get("enum"), list) else []
    return [*own, *(found for item in items for found in _enums(item))]
