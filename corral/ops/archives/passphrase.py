"""Secrets at rest outside their machine: sealed with a passphrase (docs/decisions/0006-backup.md).

scrypt makes the key, Fernet seals with it; both are recipes of the `cryptography` package. What comes out says how it
was made, so that newer kits can open what older ones sealed.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import sys
from pathlib import Path

from corral.errors import CorralError, UsageError

VARIABLE = "CORRAL_PASSPHRASE"
SHORTEST = 12
"""Signs of a new passphrase, at least: whoever has the archive can try as long as they like."""
GROUPS, SIGNS = 5, "abcdefghijkmnpqrstuvwxyz23456789"
"""Of a passphrase that is made up: five groups of four signs out of 32, which are 100 bits."""
SALT_BYTES = 16
COST = 17
"""Of scrypt, as a power of two: 128 MiB of memory and about half a second for each guess."""
_HEADER = re.compile(rb"corral-sealed/1 scrypt 2\^(1[4-9]|20) 8 1 ([A-Za-z0-9_-]{22}==)\n")


class WrongPassphraseError(CorralError):
    """What was sealed does not open with this passphrase."""


def seal(data: bytes, passphrase: str) -> bytes:
    """The data as nobody reads it without the passphrase, and nobody changes it unseen."""
    from cryptography.fernet import Fernet

    salt = secrets.token_bytes(SALT_BYTES)
    header = b"corral-sealed/1 scrypt 2^%d 8 1 %s\n" % (COST, base64.urlsafe_b64encode(salt))
    return header + Fernet(_key(passphrase, salt, COST)).encrypt(data) + b"\n"


def unseal(sealed: bytes, passphrase: str) -> bytes:
    """What was sealed.

    Raises:
        WrongPassphraseError: the passphrase is another one.
        CorralError: this is nothing that `seal` made.
    """
    from cryptography.fernet import Fernet, InvalidToken

    header, end, token = sealed.partition(b"\n")
    match = _HEADER.fullmatch(header + end)
    if match is None:
        raise CorralError("the secrets were sealed in a way that this version of corral does not know")
    try:
        salt, body = _decoded(match[2]), _decoded(token.strip())
        return Fernet(_key(passphrase, salt, int(match[1]))).decrypt(base64.urlsafe_b64encode(body))
    except ValueError:
        raise CorralError("the sealed secrets are damaged: that is not what was written") from None
    except InvalidToken:
        raise WrongPassphraseError("the passphrase is wrong: the secrets do not open with it") from None


def _decoded(text: bytes) -> bytes:
    """What base64 stands for; ValueError where another text stands for the same, as after a change of unused bits."""
    data = base64.urlsafe_b64decode(text)
    if base64.urlsafe_b64encode(data) != text:
        raise ValueError("not as it was written")
    return data


def _key(passphrase: str, salt: bytes, cost: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return base64.urlsafe_b64encode(Scrypt(salt=salt, length=32, n=2**cost, r=8, p=1).derive(passphrase.encode()))


def find_passphrase(file: Path | None, *, is_new: bool) -> str:
    """The passphrase from a file, from the environment, or from the person at the terminal (twice, for a new one).

    Raises:
        UsageError: there is none to be had, or it is too short for a new one.
    """
    if file is not None:
        passphrase, where = _first_line(file), str(file)
    elif os.environ.get(VARIABLE):
        passphrase, where = os.environ[VARIABLE], VARIABLE
    elif sys.stdin.isatty():
        passphrase, where = _asked(is_new=is_new), "it"
    else:
        way_out = f" (such as {made_up()}), or leave the secrets out: --without-secrets" if is_new else ""
        raise UsageError(f"a passphrase is needed: set {VARIABLE}, or name a file: --passphrase-file FILE{way_out}")
    if is_new and len(passphrase) < SHORTEST:
        words = f"a passphrase has at least {SHORTEST} signs; {where} has {len(passphrase)}"
        raise UsageError(f"{words}; one that nobody guesses: {made_up()}")
    return passphrase


def made_up() -> str:
    """A new passphrase that nobody guesses."""
    return "-".join("".join(secrets.choice(SIGNS) for _ in range(4)) for _ in range(GROUPS))


def _first_line(file: Path) -> str:
    try:
        return (file.read_text(encoding="utf-8").splitlines() or [""])[0]
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None


def _asked(*, is_new: bool) -> str:
    from getpass import getpass

    offer = made_up() if is_new else ""
    passphrase = getpass(f"passphrase (or Enter, to use {offer}): " if is_new else "passphrase: ")
    if is_new and getpass("once more: ") != passphrase:
        raise UsageError("these were not the same")
    return passphrase or offer
