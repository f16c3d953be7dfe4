"""Files that are whole or not there: written beside their place, flushed, and renamed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from corral.errors import CorralError


@contextmanager
def new_file(path: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file that gets its name at the end of the block, when it is on the disk; a failure leaves the old one alone."""
    draft = draft_of(path)
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Writes a file so that readers see the old content or the new one; a failure leaves the old one alone."""
    with new_file(path, mode) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """Where a file is written before it gets its name; a killed run leaves it there."""
    return path.with_name(f".{path.name}.new")


def private_folder(path: Path) -> Path:
    """Make a folder that only this user may enter; raises CorralError if another user could change what is in it."""
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or not stat.S_ISDIR(facts.st_mode):
        raise CorralError(f"{path}: not a folder of yours alone; remove it")
    return path
