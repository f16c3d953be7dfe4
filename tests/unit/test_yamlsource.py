"""YAML as data with places: what words mean, where values stand, what is refused."""

from pathlib import Path
from typing import Any

import pytest

from corral.config.source import MAX_BYTES, Source, parse, read_source
from corral.errors import Finding, SiteError


def data_of(text: str) -> Any:
    return parse(text, "f").data


def told(text: str) -> str:
    with pytest.raises(SiteError) as caught:
        parse(text, "f")
    return str(caught.value)


@pytest.mark.parametrize(
    "word", ["on", "off", "yes", "no", "y", "n", "On", "OFF", "Yes", ".inf", ".nan", "1_000", "0b1"]
)
def test_words_of_older_yaml_are_texts(word: str) -> None:
    assert data_of(f"a: {word}\n") == {"a": word}


def test_on_is_a_key_like_any_other() -> None:
    assert data_of("on: {no: 1}\n") == {"on": {"no": 1}}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None),
        ("12", 12), ("-3", -3), ("+7", 7), ("010", 10), ("0o17", 15), ("0x1f", 31),
        ("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("1e3", 1000.0), ("-1.5E-2", -0.015),
        ("1-3", "1-3"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("0o8", "0o8"), ("1.2.3", "1.2.3"),
        ("1e999", "1e999"),
        ('"12"', "12"), ("'true'", "true"), ('""', ""), ("!!str 12", "12"), ("! 12", "12"), ("|\n  x\n", "x\n"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(word: str, value: object) -> None:
    found = data_of(f"a: {word}\n")["a"]

    assert found == value
    assert type(found) is type(value)


def test_keys_are_texts_as_they_are_written() -> None:
    assert data_of("true: 1\n8080: 2\n1.50: 3\n'x y': 4\n") == {"true": 1, "8080": 2, "1.50": 3, "x y": 4}


TEXT = """\
a: 1
b:
  c: [x, {d: 2}]
  e:
    - f: 3
      g: 4
"""


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), (1, 1)),
        (("a",), (1, 1)),
        (("b",), (2, 1)),
        (("b", "c"), (3, 3)),
        (("b", "c", 0), (3, 7)),
        (("b", "c", 1), (3, 10)),
        (("b", "c", 1, "d"), (3, 11)),
        (("b", "e", 0), (5, 7)),
        (("b", "e", 0, "g"), (6, 7)),
    ],
)
def test_every_value_has_its_place(path: tuple[str | int, ...], place: tuple[int, int]) -> None:
    assert parse(TEXT, "f").marks[path] == place


def located(source: Source, *path: str | int) -> str:
    return str(source.locate(Finding("x", path)))


def test_a_problem_is_put_at_the_nearest_place_that_exists() -> None:
    source = parse(TEXT, "f")

    assert located(source, "b", "e", 0, "g") == "f:6:7: b.e[0].g: x"
    assert located(source, "b", "new") == "f:2:1: b.new: x"
    assert located(source, "elsewhere") == "f:1:1: elsewhere: x"


def test_an_index_that_the_file_does_not_have_is_not_shown() -> None:
    """`on: {host: x}` stands for a list of one."""
    source = parse("on: {host: x}\n", "f")

    assert located(source, "on", 0, "host") == "f:1:6: on.host: x"
    assert located(source, "on", 0, "gpus") == "f:1:1: on.gpus: x"


def test_unusual_keys_are_quoted_in_paths() -> None:
    source = parse('"a b": {"c\\nd": 1}\n', "f")

    assert located(source, "a b", "c\nd") == 'f:1:9: ["a b"]["c\\u000ad"]: x'


def test_aliases_share_their_value_and_lead_to_where_it_is_written() -> None:
    source = parse("x: &x {a: {b: 1}}\ny: *x\n", "f")

    assert source.data["y"] == {"a": {"b": 1}}
    assert located(source, "y") == "f:2:1: y: x"
    assert located(source, "y", "a", "b") == "f:1:12: y.a.b: x"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("b: {<<: *a, k: 2}", {"k": 2, "l": [1]}),
        ("b: {k: 2, <<: *a}", {"k": 2, "l": [1]}),
        ("b: {<<: [*a, {m: 3, k: 4}]}", {"k": 1, "l": [1], "m": 3}),
        ("b: {<<: {m: 3}}", {"m": 3}),
        ("b: {<<: {<<: *a, m: 3}}", {"k": 1, "l": [1], "m": 3}),
    ],
)
def test_merge_keys(text: str, value: dict[str, Any]) -> None:
    assert data_of(f"a: &a {{k: 1, l: [1]}}\n{text}\n")["b"] == value


def test_merging_changes_nothing_at_the_anchor() -> None:
    assert data_of("a: &a {k: {m: 1}}\nb: {<<: *a, k: {m: 2}}\n")["a"] == {"k": {"m": 1}}


def test_merged_keys_lead_to_where_they_are_written() -> None:
    source = parse("a: &a {k: {m: 1}}\nb:\n  <<: *a\n", "f")

    assert located(source, "b", "k", "m") == "f:1:12: b.k.m: x"


def test_an_anchor_can_be_set_again() -> None:
    assert data_of("a: &x 1\nb: *x\nc: &x 2\nd: *x\n") == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_all_duplicate_keys_and_tags_are_told_at_once() -> None:
    assert told("a: 1\na: 2\nb: !t 3\nc: {d: 1, d: 2}\n").splitlines() == [
        'f:2:1: a: the key "a" is here twice; the first is in line 1; keep one',
        "f:3:4: the tag !t is not allowed; remove it",
        'f:4:11: c.d: the key "d" is here twice; the first is in line 4; keep one',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a [*a]", "f:1:8: a: the alias *a contains itself; remove it"),
        ("a: &a {b: {c: *a}}", "f:1:15: a.b: the alias *a contains itself; remove it"),
        ("? [a]\n: b", "f:1:3: a key must be a plain word; put it in quotes"),
        ("null: 1", "f:1:1: a key must be a plain word; put it in quotes"),
        ("a: 12345678901234567890", "f:1:4: a: the number 123456789012345678… is too large; put a text in quotes"),
        ("a: !!binary aGk=", "f:1:4: the tag !!binary is not allowed; remove it"),
        (
            "a: 1\n...\nb: 2",
            "f:3:1: not valid YAML: this stands after the end of the document; remove the line with `...`",
        ),
        ("a: - b", 'f:1:4: not valid YAML: a "- " is not allowed here; start the list on a line of its own'),
        ("a: |x\n  b", "f:1:5: not valid YAML: this cannot follow `|` or `>`; start the text on the next line"),
        (
            'a: "\\q"',
            ("f:1:5: not valid YAML: this escape is not known in double quotes; "
            "double the backslash or use single quotes"),
        ),
        ("a: }", "f:1:4: not valid YAML: expected a value here; put the text in quotes, or remove the sign"),
        ("a: &", "f:1:4: not valid YAML: a name is missing after this sign; put a text in quotes"),
        ("%YAML 3.0\n---\na: 1", "f:1:1: not valid YAML: tags and directives are not allowed; remove it"),
    ],
)  # fmt: skip
def test_refusals(text: str, expected: str) -> None:
    assert told(text) == expected


def test_many_values_are_fine() -> None:
    assert len(data_of("- 1\n" * 50_000)) == 50_000


def test_a_file_may_be_as_large_as_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: 1\n#".ljust(MAX_BYTES, b"x"))

    assert read_source(path).data == {"a": 1}
