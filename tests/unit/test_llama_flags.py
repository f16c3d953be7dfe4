"""Words that people write for llama-server: what they are told."""

import pytest

from corral.components.llama.flags import FORK, troubles

MLOCK = "write mlock: true in engine, which lets the container lock memory, too"
NGRAM = "use the respective --spec-ngram-*-size-n or --spec-ngram-mod-n-match"
ALL = f"leave it out; {FORK}; corral/components/llama/flags.yaml has all that it knows"


@pytest.mark.parametrize(
    "words",
    [
        "--temp 0.5 --no-warmup -s -1",
        "--log_colors off --chat_template_kwargs {}",
        "--control-vector-layer-range 1 2 --no-perf",
        "",
    ],
)
def test_flags_that_there_are_pass(words: str) -> None:
    assert list(troubles(words.split())) == []


@pytest.mark.parametrize(
    ("words", "index", "message", "hint"),
    [
        ("--parrallel 2", 0, 'llama-server has no flag "--parrallel"', 'did you mean "--parallel"?'),
        ("--perf --zzz", 1, 'llama-server has no flag "--zzz"', ALL),
        ("--mlock", 0, "--mlock was removed from llama-server", MLOCK),
        ("-lm mmap+mlock", 0, "-lm is set by the kit", "write load_mode: or mlock: in engine"),
        ("--n-cpu-moe 20", 0, "--n-cpu-moe is set by the kit", "write cpu_moe: in engine"),
        ("--no-mmap", 0, "--no-mmap was removed from llama-server", "write load_mode: none in engine"),
        ("--spec-ngram-size-n 4", 0, "--spec-ngram-size-n was removed from llama-server", NGRAM),
        ("--temp 1 -c 512", 2, "-c is set by the kit", "write context: of the model, for one slot"),
        ("--ctx_size 512", 0, "--ctx-size is set by the kit", "write context: of the model, for one slot"),
        ("--no-jinja", 0, "--no-jinja is set by the kit", "write jinja: in engine"),
        ("--list-devices", 0, "--list-devices prints something and ends the server", "leave it out"),
        ("-dt 1", 0, "-dt is read by llama-server and ignored", "leave it out: it does nothing any more"),
        ("--temp=1", 0, '"--temp=1" is one word', "write --temp and its value as two words of the list"),
        ("--temp", 0, "--temp lacks its value", "write it as the next word of the list"),
        ("0.5 --perf", 0, '"0.5" stands where llama-server wants a flag', "write a flag before it, or remove it"),
    ],
)
def test_a_wrong_word_is_told_with_its_remedy(words: str, index: int, message: str, hint: str) -> None:
    assert [tuple(trouble) for trouble in troubles(words.split())] == [(index, message, hint)]


def test_all_wrong_words_are_told_at_once() -> None:
    found = troubles(["--zzz", "1", "2", "--yyy", "-c", "512", "--temp", "0.5"])

    assert [trouble.number for trouble in found] == [0, 3, 4]


def test_a_flag_and_its_value_in_one_word_are_told_apart() -> None:
    assert [trouble.message for trouble in troubles(["--temp 1"])] == ['"--temp 1" is one word']


def test_of_another_build_only_what_the_kit_sets_is_known() -> None:
    found = troubles(["--brand-new", "3", "--mlock", "--port", "1"], is_pinned=False)

    assert [trouble.message for trouble in found] == ["--port is set by the kit"]
