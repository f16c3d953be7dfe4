"""What a passphrase protects: where it comes from, small secrets, and whole archives (docs/decisions/0006-backup.md).

scrypt derives a key from the passphrase and Fernet encrypts with it; both are recipes of the `cryptography` package. An
archive of any size is an age file (https://age-encryption.org) for a key of its own, which lies before it, encrypted
with the passphrase: age encrypts and authenticates a stream in pieces, and a new one cannot be written without the key.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import sys
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from corral.errors import CorralError, UsageError

VARIABLE = "CORRAL_PASSPHRASE"
# Characters of a new passphrase, at least: an attacker who has the archive can try without limit.
SHORTEST = 12
# A generated passphrase: five groups of four out of 32 characters, which are 100 bits.
GROUPS, CHARACTERS = 5, "abcdefghijkmnpqrstuvwxyz23456789"
# Of scrypt, as a power of two: 128 MiB of memory and about half a second for each guess.
COST = 17
MARK = b"corral-backup/3 sealed\n"
# First lines of encrypted archives that this version reads.
MARKS = (MARK, b"corral-backup/2 sealed\n")
LONGEST_LINE = 4096
_HEADER = re.compile(rb"corral-sealed/1 scrypt 2\^(1[4-9]|20) 8 1 ([A-Za-z0-9_-]{22}==)\n")


class WrongPassphraseError(CorralError):
    """The passphrase does not open what it is to open."""


# --- small secrets ---------------------------------------------------------------------------------------------------


def seal(data: bytes, passphrase: str) -> bytes:
    """Encrypt and authenticate `data` with a key derived from the passphrase."""
    from cryptography.fernet import Fernet

    salt = secrets.token_bytes(16)
    header = b"corral-sealed/1 scrypt 2^%d 8 1 %s\n" % (COST, urlsafe_b64encode(salt))
    return header + Fernet(_key(passphrase, salt, COST)).encrypt(data) + b"\n"


def unseal(sealed: bytes, passphrase: str) -> bytes:
    """Decrypt what `seal` made.

    Raises:
        WrongPassphraseError: the passphrase is another one.
        CorralError: `seal` did not make this.
    """
    from cryptography.fernet import Fernet, InvalidToken

    header, end, token = sealed.partition(b"\n")
    match = _HEADER.fullmatch(header + end)
    if match is None:
        raise CorralError("the secrets were sealed in a way that this version of corral does not know")
    try:
        salt, body = _decoded(match[2]), _decoded(token.strip())
        return Fernet(_key(passphrase, salt, int(match[1]))).decrypt(urlsafe_b64encode(body))
    except ValueError:
        raise CorralError("the sealed secrets are damaged: that is not what was written") from None
    except InvalidToken:
        raise WrongPassphraseError("the passphrase is wrong: the secrets do not open with it") from None


def _decoded(text: bytes) -> bytes:
    """Decode base64; ValueError when the text is not the canonical one, as after a change of unused bits."""
    data = urlsafe_b64decode(text)
    if urlsafe_b64encode(data) != text:
        raise ValueError("not as it was written")
    return data


def _key(passphrase: str, salt: bytes, cost: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return urlsafe_b64encode(Scrypt(salt=salt, length=32, n=2**cost, r=8, p=1).derive(passphrase.encode()))


# --- whole archives --------------------------------------------------------------------------------------------------


def encrypt(archive: IO[bytes], file: IO[bytes], passphrase: str) -> None:
    """Write a stream into a file, encrypted and authenticated as a whole; raises OSError when it cannot be written."""
    from pyrage import EncryptError, encrypt_io
    from pyrage.x25519 import Identity

    identity = Identity.generate()
    file.write(MARK + seal(json.dumps({"identity": str(identity)}).encode(), passphrase))
    try:
        encrypt_io(archive, file, [identity.to_public()])
    except EncryptError as error:
        raise OSError(errno.EIO, str(error).rpartition("] ")[2]) from None  # it has the system's words only


@contextmanager
def decrypted(file: IO[bytes], passphrase: str) -> Iterator[IO[bytes]]:
    """The archive behind the mark of an encrypted file, as a stream.

    Raises:
        WrongPassphraseError: the passphrase is another one.
        CorralError: the file is damaged; raised at the end of the block, too, instead of what the block raises.
    """
    from pyrage import decrypt_io
    from pyrage.x25519 import Identity

    key = json.loads(unseal(file.readline(LONGEST_LINE) + file.readline(LONGEST_LINE), passphrase))
    identity = Identity.from_str(key["identity"])
    source, sink = os.pipe()

    def decrypt() -> None:
        with os.fdopen(sink, "wb", 0) as writer:
            decrypt_io(file, writer, [identity])

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(decrypt)
        try:
            with os.fdopen(source, "rb") as stream:
                yield stream
        finally:
            failure = work.exception()
            if failure is not None and not isinstance(failure, BrokenPipeError):  # the block did not read to the end
                message = f"damaged: it does not open to its end ({failure}); use another backup"
                raise CorralError(f"{file.name}: {message}") from None


# --- the passphrase --------------------------------------------------------------------------------------------------


def find_passphrase(file: Path | None, *, is_new: bool) -> str:
    """The passphrase from a file, from the environment, or from the terminal (asked twice when it is new).

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
        others = f" (such as {made_up()}), or leave the secrets out: --without-secrets" if is_new else ""
        raise UsageError(f"a passphrase is needed: set {VARIABLE}, or name a file: --passphrase-file FILE{others}")
    if is_new and len(passphrase) < SHORTEST:
        message = f"a passphrase has at least {SHORTEST} characters; {where} has {len(passphrase)}"
        raise UsageError(f"{message}; a random one: {made_up()}")
    return passphrase


def made_up() -> str:
    """A new random passphrase."""
    return "-".join("".join(secrets.choice(CHARACTERS) for _ in range(4)) for _ in range(GROUPS))


def _first_line(file: Path) -> str:
    try:
        return (file.read_text(encoding="utf-8").splitlines() or [""])[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {getattr(error, 'strerror', 'not UTF-8 text')}") from None


def _asked(*, is_new: bool) -> str:
    from getpass import getpass

    offer = made_up() if is_new else ""
    passphrase = getpass(f"passphrase (or Enter, to use {offer}): " if is_new else "passphrase: ")
    if is_new and getpass("once more: ") != passphrase:
        raise UsageError("passphrases do not match")
    return passphrase or offer
