"""A bundle's folder while it is filled, and the tar file that is made of it.

Large files lie in `blobs/sha256/` under their own checksums, so the next run knows which of them are there.
`SHA256SUMS` is written last: without it a bundle is not complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from corral.config.file_names import is_file_name
from corral.errors import CorralError
from corral.files import write_atomically, write_file
from corral.verbs.archives.container import (
    CHUNK,
    MANIFEST,
    SUMS,
    ArchiveFolder,
    files_below,
    receive,
    sums_text,
    sync_folder,
)
from corral.verbs.archives.load import BLOBS, PART, SIGNATURE, Manifest

RECORDS = "images"
# Folders that hold nothing but the bundle's files.
OWN = ("blobs", "compose", RECORDS, "kit", "wheels")


class BundleFolder(ArchiveFolder):
    """A bundle that is being filled; blobs that are there already are not fetched again."""

    def blob(self, sha256: str) -> Path:
        """Where the content of that checksum lies, or will."""
        return self.folder / BLOBS / sha256

    def has(self, sha256: str, size: int | None = None) -> bool:
        """Whether a blob is there, of that size if one is given; then it is part of the bundle."""
        path = self.blob(sha256)
        is_there = path.is_file() and size in {None, path.stat().st_size}
        if is_there:
            self.sums[f"{BLOBS}/{sha256}"] = sha256
        return is_there

    def recorded(self, name: str) -> str:
        """The checksum that an earlier run noted in a file, if the blob is there; else an empty text."""
        path = self.folder / name
        sha256 = path.read_text(errors="replace").strip() if path.is_file() else ""
        return sha256 if is_file_name(sha256) and self.has(sha256) else ""

    def note(self, name: str) -> None:
        """List a file that another program has put there."""
        with (self.folder / name).open("rb") as file:
            self.sums[name] = receive(file).sha256

    def save_blob(self, start: Callable[[], AbstractContextManager[IO[bytes]]]) -> str:
        """Take in a blob from its beginning; returns its checksum."""
        draft = self._draft("new")
        draft.unlink(missing_ok=True)
        with start() as data:
            found = _append(draft, data)
        return self._keep(draft, found)

    def fetch_blob(self, sha256: str, size: int, start: Callable[[int], AbstractContextManager[IO[bytes]]]) -> None:
        """Take in a blob of which an earlier run may have got a part; `start` opens it at a number of bytes."""
        draft = self._draft(sha256)
        there = draft.stat().st_size if draft.exists() else 0
        if there >= size:
            draft.unlink(missing_ok=True)
            there = 0
        with start(there) as data:
            found = _append(draft, data)
        if draft.stat().st_size != size or found != sha256:
            draft.unlink()
            words = "is not what was announced; was it changed meanwhile? Run the same command again"
            raise CorralError(f"{self.blob(sha256)}: {words}")
        self._keep(draft, found)

    def _draft(self, name: str) -> Path:
        draft = self.folder / BLOBS / f"{name}{PART}"
        draft.parent.mkdir(parents=True, exist_ok=True)
        return draft

    def _keep(self, draft: Path, sha256: str) -> str:
        """Put a written draft in its place, on the disk."""
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(self.blob(sha256))
        self.sums[f"{BLOBS}/{sha256}"] = sha256
        return sha256

    def finish(self, manifest: Manifest, sign: Callable[[bytes], bytes] | None = None) -> str:
        """Write the list of checksums, signed if `sign` is given; from now on the bundle is complete.

        What earlier runs left over is deleted. Returns the list's own checksum.
        """
        self.add_file(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n", 0o644)
        for path in [path for name in OWN for path in files_below(self.folder / name)]:
            if str(path.relative_to(self.folder)) not in self.sums:
                path.unlink()
        text = sums_text(self.sums)
        (self.folder / SIGNATURE).unlink(missing_ok=True)
        if sign is not None:
            write_file(self.folder / SIGNATURE, sign(text), 0o644)
        write_atomically(self.folder / SUMS, text, 0o644)
        sync_folder(self.folder)
        return hashlib.sha256(text).hexdigest()

    def finish_file(self, target: Path) -> None:
        """Turn the complete folder into one tar file; the folder goes when the file is on the disk."""
        draft = target.with_name(f"{target.name}{PART}")
        with draft.open("wb") as file:
            self.pack(file, SUMS, *([SIGNATURE] if (self.folder / SIGNATURE).exists() else []))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
        sync_folder(target.parent)
        shutil.rmtree(self.folder)


def _append(draft: Path, data: IO[bytes]) -> str:
    """Append a stream to a file; returns the checksum of all that the file then holds."""
    with draft.open("a+b") as file:
        file.seek(0)
        total = hashlib.file_digest(file, "sha256")
        while chunk := data.read(CHUNK):
            total.update(chunk)
            file.write(chunk)
    return total.hexdigest()
