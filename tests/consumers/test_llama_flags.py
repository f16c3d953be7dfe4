"""Flags that the kit renders or lets through, read by llama-server's own parser (in the wheel xllamacpp)."""

from __future__ import annotations

import configparser
import functools
import re
from pathlib import Path

import pytest
import xllamacpp
import yaml

from corral.components.llama import COMPONENT as LLAMA
from corral.components.llama import HTTP, NO_PAGE
from corral.components.llama.flags import ENDS, GONE, IDLE, NOT_ENOUGH, SET, TABLE, troubles
from tests.consumers.test_rendered import llama_servers
from tests.trees import CASES, services_of, tree_of
from tools.llama_flags import Flag, flags, parsed, table
from xllama import OPTIONS


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


def test_the_parser_reads_shared_servers_and_the_files_of_their_models(tmp_path: Path) -> None:
    """000-19, 002-02: a preset file's keys are flags without their dashes, and the same parser reads them."""
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    shared = [item for item in services_of("shared") if item.component == LLAMA]
    lines = [list(service.args) for service in shared]
    for words in lines:
        words[words.index("--api-key-file") + 1] = str(keys)
    presets = [read_preset(tree_of("shared")[f"box/llama/{service.name}.ini"].decode()) for service in shared]
    switches = {name for flag in real() for name in flag.names if not flag.values}
    for settings in (model for preset in presets for model in preset.values()):
        pairs = [(f"--{key}", value) for key, value in settings.items()]
        assert {value for name, value in pairs if name in switches} <= {"on"}
        lines.append([word for name, value in pairs for word in ((name,) if name in switches else (name, value))])

    assert [set(preset) for preset in presets] == [{"quick", "clever", "coder"}, {"embed", "rerank", "words"}]
    assert parsed(*lines) == [""] * 8
    assert parsed(["--models-most", "1"]) != [""], "it refuses what it does not know"


def test_a_preset_says_what_the_command_line_of_a_server_of_its_own_would_say() -> None:
    """Model, slots, context, idle sleep and further flags of each model; name, address and key are the router's."""
    coder = read_preset(tree_of("shared")["box/llama/turns.ini"].decode())["coder"]

    assert coder["model"] == "/models/coder-14b-q4_k_m.gguf"
    assert (coder["parallel"], coder["ctx-size"], coder["sleep-idle-seconds"]) == ("2", "16384", "60")
    assert (coder["no-context-shift"], coder["temp"], coder["jinja"]) == ("on", "0.2", "on")
    assert not {"alias", "host", "port", "api-key-file", "offline", "metrics"} & set(coder)


def read_preset(text: str) -> dict[str, dict[str, str]]:
    """Settings by model."""
    reader = configparser.RawConfigParser(delimiters="=")
    reader.read_string(f"[top]\n{text}")
    return {name: dict(reader[name]) for name in reader.sections() if name != "top"}


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
    """A flag of the rendered command lines stands in SET, is judged by its value, or gives way to the user's."""
    owned = {name for names in SET for given in names.split() for name in group(given)}
    rendered = {
        word
        for case in CASES
        for service, replica in llama_servers(case)
        for word in service.args[: len(service.args) - len(replica.engine.extra_args or ())]
        if word in every_name()
    }

    assert rendered - {*NOT_ENOUGH, HTTP, NO_PAGE} <= owned


def group(name: str) -> tuple[str, ...]:
    return next(flag.names for flag in real() if name in flag.names)


def test_the_local_server_takes_nothing_that_the_real_one_refuses() -> None:
    values = {name: flag.values for flag in real() for name in flag.names}
    for name, option in OPTIONS.items():
        assert values[name] == int(option.takes_value), name


@pytest.mark.parametrize("name", ENDS)
def test_flags_that_end_the_server_are_not_let_through(name: str) -> None:
    assert [trouble.hint for trouble in troubles([name])] == ["leave it out"]
