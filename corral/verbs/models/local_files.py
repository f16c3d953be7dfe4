"""Model files in a folder of this machine, and the checksums that they had when they were last read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from corral.config.model_lock import LockedFile
from corral.errors import CorralError
from corral.files import write_atomically
from corral.verbs.models import fetch

# File beside the models: size, time of the last change, checksum and time of the reading, by name.
STAMPS = ".corral-verified.json"
# Stays free on a disk that files are fetched to.
SPARE_BYTES = 256 << 20
_WRITING = threading.Lock()


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A models folder of this machine. A whole path as a name is a file in a store, which stays as it is."""

    path: Path

    def __str__(self) -> str:
        """The folder as people find it."""
        return str(self.path)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there, CorralError when this user may not look."""
        path = self.path / name
        try:
            return path.stat().st_size if path.is_file() else None
        except PermissionError:
            words = "this user may not look there, nor would servers; chmod -R o+rX its folder, or join its group"
            raise CorralError(f"{path}: {words}") from None

    def last_read(self, name: str) -> tuple[str, float | None] | None:
        """The checksum that a file had when it was read, and when that was; None if it has changed since."""
        path = self.path / name
        with suppress(OSError):
            folder, key = self._note(name)
            match _stamps(folder).get(key):
                case [size, changed, str(sha256), *when] if [size, changed] == _stamp(path):
                    return sha256, float(when[0]) if when else None
        return None

    def checksum(self, name: str, net: fetch.Net, progress: fetch.Progress) -> str:
        """The sha256 of a file, read from its first to its last byte and remembered."""
        digest = hashlib.sha256()
        for piece in fetch.pieces(self.path / name, net, progress):
            digest.update(piece)
        self.remember(name, digest.hexdigest())
        return digest.hexdigest()

    def remember(self, name: str, sha256: str) -> None:
        """Notes that a file was read and had this checksum; a folder that cannot be written has no notes."""
        folder, key = self._note(name)
        with _WRITING, suppress(OSError, CorralError):
            folder.mkdir(parents=True, exist_ok=True)
            stamps = {**_stamps(folder), key: [*_stamp(self.path / name), sha256, round(time.time())]}
            text = json.dumps(stamps, indent=1, sort_keys=True) + "\n"
            write_atomically(folder / STAMPS, text.encode(), 0o644)

    def _note(self, name: str) -> tuple[Path, str]:
        """In which folder's notes a file is, and under which name: stores have no notes of ours."""
        path = self.path / name
        return (self.path, name) if name.startswith("/") else (path.parent, path.name)

    def text(self, name: str) -> str:
        """What a small file says; empty when it cannot be read."""
        with suppress(OSError, UnicodeDecodeError):
            return (self.path / name).read_text()
        return ""

    def real(self, name: str) -> str:
        """Where a file lies once every link is followed."""
        return os.path.realpath(self.path / name)

    @contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """A file, to be read from its beginning; raises CorralError when it cannot be read."""
        try:
            file = (self.path / name).open("rb")
        except OSError as error:
            raise CorralError(f"{self.path / name}: cannot be read: {error.strerror}") from None
        with file:
            yield file

    def disk(self) -> tuple[str, int]:
        """Which disk it is on, and how many bytes are free there, all but a reserve."""
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        return str(there.stat().st_dev), max(0, shutil.disk_usage(there).free - SPARE_BYTES)

    def put(self, source: Path, known: LockedFile, net: fetch.Net, progress: fetch.Progress) -> None:
        """Copies a file here, checked as a download is; raises FetchError."""
        target = self.path / known.file
        fetch.fetch(
            fetch.Origin(str(source), path=source), target, fetch.Content(known.size, known.sha256), net, progress
        )
        fetch.settle(target)
        self.remember(known.file, known.sha256)


def _stamps(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / STAMPS).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]
