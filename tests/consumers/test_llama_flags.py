"""Flags that the kit renders or lets through, read by llama-server's own parser (in the wheel xllamacpp)."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import xllamacpp
import yaml

from corral.llama_flags import ENDS, GONE, IDLE, NOT_ENOUGH, SET, TABLE, troubles
from corral.xllama import OPTIONS
from tests.consumers.test_rendered import llama_servers
from tests.trees import CASES
from tools.llama_flags import Flag, flags, parsed, table


@functools.cache
def real() -> tuple[Flag, ...]:
    return tuple(flags())


def every_name() -> set[str]:
    return {name for flag in real() for name in flag.names}


def test_the_table_is_what_the_parser_says() -> None:
    assert len(real()) > 200
    assert TABLE.read_text() == table(real(), xllamacpp.__version__), "write it again with: make flags"


def test_the_parser_reads_every_rendered_command_line(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    servers = [(case, service) for case in CASES for service, _ in llama_servers(case)]
    lines = [list(service.args) for _, service in servers]
    for words in lines:
        words[words.index("--api-key-file") + 1] = str(keys)

    verdicts = parsed(*lines)

    refused = [(case, service.name, said) for (case, service), said in zip(servers, verdicts, strict=True) if said]
    assert refused == []


def test_the_parser_refuses_what_the_kit_calls_gone() -> None:
    removed = yaml.safe_load(TABLE.read_text())["removed"]
    gone = [name for names in (*GONE, *removed) for name in names.split()]
    for name, said in zip(gone, parsed(*([name, "1"] for name in gone)), strict=True):
        assert re.search(rf"invalid argument: {name}$|{name}[^-\w].*has been removed", said, re.DOTALL), (name, said)
    (ignored,) = parsed([*IDLE, "1"])
    assert ignored == ""


def test_every_flag_that_a_remedy_names_exists() -> None:
    removed = yaml.safe_load(TABLE.read_text())["removed"]
    for hint in (*GONE.values(), *removed.values()):
        for name in re.findall(r"--[a-z][a-z-]+[a-z](?!-?\*|-\w)", hint.replace("--spec-ngram-*", "")):
            assert name in every_name(), hint


def test_what_the_kit_sets_is_what_it_renders() -> None:
    """A flag of the rendered command lines stands in SET, or is judged by its value."""
    owned = {name for names in SET for given in names.split() for name in group(given)}
    rendered = {
        word
        for case in CASES
        for service, replica in llama_servers(case)
        for word in service.args[: len(service.args) - len(replica.engine.extra_args or ())]
        if word in every_name()
    }

    assert rendered - set(NOT_ENOUGH) <= owned


def group(name: str) -> tuple[str, ...]:
    return next(flag.names for flag in real() if name in flag.names)


def test_the_local_server_takes_nothing_that_the_real_one_refuses() -> None:
    values = {name: flag.values for flag in real() for name in flag.names}
    for option in OPTIONS:
        for name in (*option.names, *option.opposites):
            assert values[name] == int(bool(option.value)), name


@pytest.mark.parametrize("name", ENDS)
def test_flags_that_end_the_server_are_not_let_through(name: str) -> None:
    assert [trouble.hint for trouble in troubles([name])] == ["leave it out"]
