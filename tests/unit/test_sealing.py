"""What is sealed opens with its passphrase and nothing else; where the passphrase comes from."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from corral.errors import CorralError, UsageError
from corral.verbs.archives import passphrase as sealing
from corral.verbs.archives.passphrase import VARIABLE, WrongPassphraseError, find_passphrase, seal, unseal

PASSPHRASE = "correct horse battery"
VALUE = b"LITELLM_MASTER_KEY=sk-marker\n"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "COST", 14)
    monkeypatch.delenv(VARIABLE, raising=False)


def test_what_was_sealed_opens_again_and_shows_nothing() -> None:
    sealed = seal(VALUE, PASSPHRASE)
    assert b"marker" not in sealed
    assert unseal(sealed, PASSPHRASE) == VALUE
    assert seal(VALUE, PASSPHRASE) != sealed


@pytest.mark.parametrize("passphrase", ["", "correct horse batterx", PASSPHRASE + " "])
def test_another_passphrase_is_named_as_the_reason(passphrase: str) -> None:
    with pytest.raises(WrongPassphraseError, match="passphrase is wrong"):
        unseal(seal(VALUE, PASSPHRASE), passphrase)


def test_a_change_anywhere_is_noticed() -> None:
    sealed = seal(VALUE, PASSPHRASE)
    for place in range(0, len(sealed) - 1, 7):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(CorralError):
            unseal(bytes(changed), PASSPHRASE)


@pytest.mark.parametrize(
    "other", [b"", b"hello\n", b"corral-sealed/2 x\n", b"corral-sealed/1 scrypt 2^40 8 1 " + b"A" * 22]
)
def test_what_we_did_not_seal_is_refused_and_costs_no_memory(other: bytes) -> None:
    with pytest.raises(CorralError, match="does not know"):
        unseal(other, PASSPHRASE)


def test_passphrase_of_a_file_is_its_first_line_and_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "from the environment")
    assert find_passphrase(None, is_new=True) == "from the environment"
    file = tmp_path / "passphrase"
    file.write_text(f"{PASSPHRASE}\nnot this\n")
    assert find_passphrase(file, is_new=True) == PASSPHRASE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("short\n", "at least 12 characters"),
        ("eleven sign\n", r"at least 12 characters; .* has 11"),
        ("", "at least 12 characters"),
    ],
)
def test_a_new_passphrase_is_not_short(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        find_passphrase(file, is_new=True)
    assert find_passphrase(file, is_new=False) == text.strip()


def test_without_a_terminal_it_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError, match=f"set {VARIABLE}, or name a file: .*--without-secrets"):
        find_passphrase(None, is_new=True)
    with pytest.raises(UsageError, match=r"gone: cannot be read: No such file"):
        find_passphrase(tmp_path / "gone", is_new=False)


def test_a_short_one_is_answered_with_one_that_nobody_guesses(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text("short\n")
    offers = set()
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            find_passphrase(file, is_new=True)
        offers.add(str(caught.value).rpartition(" ")[2])
    assert len(offers) == 2
    for offer in offers:
        file.write_text(f"{offer}\n")
        assert find_passphrase(file, is_new=True) == offer


def test_enter_at_the_terminal_takes_the_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def enter(words: str) -> str:
        asked.append(words)
        return ""

    monkeypatch.setattr("getpass.getpass", enter)
    assert find_passphrase(None, is_new=True) in asked[0]
