"""A sealed archive: a key under the passphrase, in three lines of text, then the archive as an age file for that key.

age (https://age-encryption.org) encrypts and authenticates a stream piece by piece, so an archive of many GB needs no
memory, and one that was changed, cut off or put together anew is noticed. The key is new for every archive and known to
nobody but those who have the passphrase; with it the checksum of the archive's manifest is sealed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from corral.errors import CorralError
from corral.ops.archives.passphrase import seal, unseal

MARK = b"corral-backup/2 sealed\n"
LONGEST_LINE = 4096


@contextmanager
def closing(file: IO[bytes], digest: str, passphrase: str) -> Iterator[IO[bytes]]:
    """A stream: what is written to it arrives sealed in the file.

    Args:
        file: where it goes.
        digest: the checksum of the archive's manifest.
        passphrase: what opens it.

    Raises:
        OSError: the file cannot be written.
    """
    from pyrage import encrypt_io
    from pyrage.x25519 import Identity

    identity = Identity.generate()
    key = json.dumps({"identity": str(identity), "manifest": digest}).encode()
    file.write(MARK + seal(key, passphrase))
    sink = _Sink(file)
    reader, writer = _pipe()
    try:
        with _beside(lambda: encrypt_io(reader, sink, [identity.to_public()]), reader, writer):
            yield writer
    except _WorkError as error:
        raise sink.failure or CorralError(f"the archive cannot be sealed: {error}") from None


@contextmanager
def opened(file: IO[bytes], passphrase: str) -> Iterator[tuple[str, IO[bytes]]]:
    """What lies behind the mark in a sealed file: the sealed checksum of the manifest, and the archive as a stream.

    Raises:
        WrongPassphraseError: it does not open with this passphrase.
        CorralError: it is damaged.
    """
    from pyrage import decrypt_io
    from pyrage.x25519 import Identity

    key = json.loads(unseal(file.readline(LONGEST_LINE) + file.readline(LONGEST_LINE), passphrase))
    identity = Identity.from_str(key["identity"])
    reader, writer = _pipe()
    try:
        with _beside(lambda: decrypt_io(file, writer, [identity]), writer, reader):
            yield key["manifest"], reader
    except _WorkError as error:
        raise CorralError(f"{file.name}: damaged: it does not open to its end ({error}); use another backup") from None


class _WorkError(Exception):
    """What age said when it could not go on."""


class _Sink:
    """A file that remembers why it could not be written: age tells it as a text only."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes all of it."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        """Nothing to do: who opened the file brings it to the disk."""


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return os.fdopen(reader, "rb"), os.fdopen(writer, "wb")


@contextmanager
def _beside(work: Callable[[], object], theirs: IO[bytes], ours: IO[bytes]) -> Iterator[None]:
    """Work beside the block, with a pipe between them, each of whose ends is closed when its side is done.

    A failure of the work is told as _WorkError, whatever the block raises; that the block stopped to read is none.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits for it
            failures.append(error)
        finally:
            with suppress(OSError):
                theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):
            ours.close()
        thread.join()
        for failure in failures:
            if not isinstance(failure, BrokenPipeError):
                raise _WorkError(str(failure)) from failure
