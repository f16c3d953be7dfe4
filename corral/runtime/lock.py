"""Advisory lock of a folder's commands, released when its process ends, in whatever way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from corral.errors import CorralError, on_one_line

AT_WORK = "is at work here already"


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Run the block as `what` while no other process does; the lock's file and its empty folder are gone afterwards.

    Raises:
        CorralError: another command is at work, which the message names; or the file cannot be written.
    """
    lock = FileLock(path, timeout=0)
    try:
        _acquire(lock, path)
        with suppress(OSError):  # a full disk: the lock holds all the same, only without a name
            path.write_text(f"{what} {AT_WORK} (pid {os.getpid()})\n", encoding="utf-8")
        yield
    finally:
        if lock.is_locked:  # also when Ctrl-C came just after it was acquired
            path.unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):  # there is something else in it
                path.parent.rmdir()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise CorralError(f"{_told(path)}; wait for it or interrupt it") from None
    except OSError as error:
        raise CorralError(f"{path}: cannot be written: {error.strerror}") from None


def _told(path: Path) -> str:
    """What the holder says of itself; its file is empty when the disk is full."""
    with suppress(OSError, UnicodeDecodeError):
        if said := on_one_line(path.read_text(encoding="utf-8").strip()):
            return said
    return f"another corral {AT_WORK}"
