"""The callback that makes workers forget keys, without a database; with one in tests/processes/test_workers.py."""

from __future__ import annotations

from pathlib import Path

import litellm

from tests.callbacks import load_callback

callback = load_callback("corral_revocation")


def test_a_key_is_forgotten_when_it_is_new_or_gone_and_twice_when_it_has_changed() -> None:
    known = callback.Known()
    asked = [
        ({"a": "1"}, ["a"]),
        ({"a": "1"}, []),
        ({"a": "2"}, ["a"]),
        ({"a": "2"}, ["a"]),
        ({"a": "2"}, []),
        ({}, ["a"]),
        ({}, ["a"]),
        ({}, ["a"]),
    ]
    assert [known.outdated(["a"], digests) for digests, _ in asked] == [found for _, found in asked]


def test_the_columns_that_requests_change_are_columns_of_keys() -> None:
    schema = (Path(litellm.__file__).parent / "proxy" / "schema.prisma").read_text(encoding="utf-8")
    columns = schema.partition("model LiteLLM_VerificationToken {")[2].partition("\n}")[0].split()
    assert set(callback.COUNTED) <= set(columns)
