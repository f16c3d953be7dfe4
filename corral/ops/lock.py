"""One at a time: a lock that its holder's death releases and that leaves no file behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from corral.errors import CorralError


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Runs the block while nobody else does; raises CorralError that names the other one, as `what`."""
    file = _locked(path, what)
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same, only without a name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # there is something else in it
            path.parent.rmdir()


def _locked(path: Path, what: str) -> TextIO:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another one has just put its lock away, and the folder with it
            continue
        except OSError as error:
            raise CorralError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            file.close()
            raise CorralError(
                f"{what} is at work here already{f' (pid {pid})' if pid else ''}; wait for it or interrupt it"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # its holder removed it between our opening and our locking
