"""Words that people write for vLLM: what they are told."""

import pytest

from corral.components.vllm.flags import SET, table, troubles

EAGER = 'did you mean "--enforce-eager" or "--no-enforce-eager"?'
ALL = "leave it out; corral/components/vllm/flags.yaml has all that it knows"


@pytest.mark.parametrize(
    "words",
    [
        "--enable-auto-tool-choice --tool-call-parser hermes",
        "--reasoning_parser=qwen3 --seed -1",
        "--compilation-config.mode 3 --dtype half",
        "",
    ],
)
def test_flags_that_there_are_pass(words: str) -> None:
    assert list(troubles(words.split())) == []


@pytest.mark.parametrize(
    ("words", "index", "message", "hint"),
    [
        ("--seed 1 --enforce-eagr", 2, 'vLLM has no flag "--enforce-eagr"', EAGER),
        ("--zzzzz", 0, 'vLLM has no flag "--zzzzz"', ALL),
        ("-tp 2", 0, "-tp is set by the kit", "write gpus_per_replica: where the pool is"),
        ("--max_num_seqs=4", 0, "--max-num-seqs is set by the kit", "write slots: in engine"),
        ("--disable-lora", 0, "--disable-lora is set by the kit", "write adapters: of the model"),
        ("hermes --seed 1", 0, '"hermes" stands where vLLM wants a flag', "write a flag before it"),
    ],
)
def test_a_wrong_word_is_told_with_its_remedy(words: str, index: int, message: str, hint: str) -> None:
    assert [tuple(trouble) for trouble in troubles(words.split())] == [(index, message, hint)]


def test_of_another_version_only_what_the_kit_sets_is_known() -> None:
    assert [trouble.number for trouble in troubles(["--zzzzz", "--port", "1"], is_pinned=False)] == [1]


def test_what_the_kit_sets_is_a_flag_of_it() -> None:
    assert {name for names in SET for name in names.split()} <= table().keys()
