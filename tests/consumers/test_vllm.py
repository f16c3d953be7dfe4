"""The rendered command lines as vLLM reads them.

vLLM is too large to be installed for a test. Its own parser (0.33.0) was asked by `tools/vllm_flags.py WORDS…` about
the very words that stand here; a change of them has to be shown to it again. In between, a parser made of the table
that was taken from it says whether every flag exists and has as many words behind it as it wants.
"""

from __future__ import annotations

import argparse
import shlex

import pytest
import yaml

from corral.components import vllm
from corral.components.vllm.flags import TABLE
from corral.contributions import Service
from tests.trees import CASES, plan_of

# What vLLM's parser took: model_tag, served_model_name, lora_modules by name and path, and every number as said.
#
# It was asked when `chat-1` still had its repositories by name, with `--revision main`; since then their folders stand
# there, as in `calm-3`.
ASKED = {
    "chat-1": "/models/Qwen--Qwen3-32B-AWQ--111111111111 --served-model-name chat --host 0.0.0.0 --port 8101 "
    "--max-model-len 16384 --max-num-seqs 16 --tensor-parallel-size 2 --gpu-memory-utilization 0.9 --enable-lora "
    "--max-loras 2 --max-lora-rank 32 --lora-modules chat:sql=/models/owner--qwen3-32b-sql--222222222222 "
    "chat:law=/models/qwen3-32b-law "
    "--enable-auto-tool-choice --tool-call-parser hermes",
    "calm-3": "/models/qwen3-8b --served-model-name calm --host 0.0.0.0 --port 8103 --max-model-len 8192 "
    "--max-num-seqs 8 --tensor-parallel-size 1 --gpu-memory-utilization 0.85",
}


def servers() -> list[Service]:
    found = [service for case in CASES for service in plan_of(case).contributions.services]
    return [service for service in found if service.component == vllm.COMPONENT]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Of the table: flags with no word, with one, with several."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    made.add_argument("model")
    for names in table["switches"]:
        made.add_argument(*names.split(), action="store_true")
    for names in table["values"]:
        made.add_argument(*names.split())
    for names in table["lists"]:
        made.add_argument(*names.split(), nargs="+")
    return made


def test_the_rendered_words_are_those_that_vllm_was_asked_about() -> None:
    assert {service.name: shlex.join(service.args) for service in servers()} == ASKED


@pytest.mark.parametrize("name", ASKED)
def test_every_flag_exists_and_has_its_words(parser: argparse.ArgumentParser, name: str) -> None:
    known, unknown = parser.parse_known_args(shlex.split(ASKED[name]))
    assert unknown == []
    assert known.model == shlex.split(ASKED[name])[0]


def test_a_wrong_flag_is_noticed(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_known_args(["model", "--max-model-length", "5"])[1]
    with pytest.raises(argparse.ArgumentError):
        parser.parse_known_args(["model", "--max-model-len"])


def test_the_table_is_of_the_pinned_version() -> None:
    version = vllm.IMAGE.rpartition(":v")[2]
    assert f"# {version}, read by" in TABLE.read_text(encoding="utf-8")
