"""What backups and bundles have in common: files and `SHA256SUMS`, which lists the checksum of each of them.

A bundle is a folder of these files, or a tar file of it; a backup is a compressed tar file, encrypted as a whole
(`passphrase`). `SHA256SUMS` is the first member of a tar file; whatever vouches for it vouches for every file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated

from pydantic import BaseModel, ConfigDict, Field

from corral.errors import CorralError
from corral.file_names import is_below
from corral.ops.archives.tar import CHUNK, LARGEST, MOST_MEMBERS, members
from corral.output import locked

SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
INVENTORY = "inventory.yaml"
LARGEST_SUMS = 16 << 20
LARGEST_MANIFEST = 8 << 20
# Bytes of a file that is read into memory.
LARGEST_FILE = 64 << 20
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
UNITS = ("bytes", "KiB", "MiB", "GiB")
STEP = 1024
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


class Strict(BaseModel):
    """Data from a file of unknown origin."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(Strict):
    """A file in an archive."""

    sha256: Sha256
    size: int = Field(ge=0)


def sums_text(sums: Mapping[str, str]) -> bytes:
    """`SHA256SUMS` of these checksums by name, as `sha256sum --check` reads it."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())).encode()


def sums_of(text: bytes) -> dict[str, str]:
    """Checksums by name; raises ValueError when `sums_text` did not make this."""
    lines = text.decode("utf-8", errors="replace").splitlines() if text.count(b"\n") <= MOST_MEMBERS else []
    found = {match[2]: match[1] for line in lines if (match := _SUM.fullmatch(line))}
    is_whole = text.endswith(b"\n") and len(found) == len(lines)
    if not is_whole or MANIFEST not in found or not all(map(is_below, found)):
        raise ValueError(f"{SUMS} is not as it was made")
    return found


# --- files on the disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or the part of a tar file that holds one."""

    path: Path
    size: int
    start: int = 0

    def chunks(self, skip: int = 0, most: int = LARGEST) -> Iterator[bytes]:
        """Its content after the first `skip` bytes, `most` bytes of it at most."""
        left = min(self.size - skip, most)
        with self.path.open("rb") as file:
            file.seek(self.start + skip)
            while data := file.read(max(0, min(CHUNK, left))):
                left -= len(data)
                yield data


def pieces_of(path: Path) -> dict[str, Piece]:
    """The files of a folder (links are left out) or of a tar file, by name.

    Raises:
        OSError: it cannot be read.
        tarfile.TarError: it is neither a folder nor a tar file of regular files.
    """
    if path.is_dir():
        files = [file for file in files_below(path) if not file.is_symlink()]
        return {str(file.relative_to(path)): Piece(file, file.stat().st_size) for file in files}
    with path.open("rb") as file:
        return {part.name: Piece(path, part.size, part.start) for part in members(file)}


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its folders, sorted; folders that are links are left out."""
    found = os.walk(folder)
    return sorted(path for place, _, names in found for name in names if (path := Path(place, name)).is_file())


def chunks_in(source: IO[bytes]) -> Iterator[bytes]:
    """What is left in a stream."""
    return iter(partial(source.read, CHUNK), b"")


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file that only its owner reads, which is on the disk at the end of the block."""
    with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def receive(chunks: Iterable[bytes], file: IO[bytes] | None = None) -> Member:
    """Write bytes into a file, if there is one; returns their size and checksum."""
    total, size = hashlib.sha256(), 0
    for chunk in chunks:
        total.update(chunk)
        size += len(chunk)
        if file is not None:
            file.write(chunk)
    return Member(sha256=total.hexdigest(), size=size)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def emptied(place: Path) -> Iterator[None]:
    """A folder for this run alone: what a killed run left in it goes at the start, the folder itself at the end.

    Raises:
        CorralError: another run is at work in it.
    """
    with locked(place):
        try:
            for path in place.iterdir():
                path.unlink()
            yield
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def explained(place: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError of the block into a CorralError with its reason and this remedy."""
    try:
        yield
    except OSError as error:
        words = f"{error.filename or place}: cannot be written: {error.strerror}"
        raise CorralError(f"{words}; {remedy}") from None


def amount(size: float) -> str:
    """A number of bytes in words: `3.4 MiB`."""
    unit = 0
    while size >= STEP and unit < len(UNITS) - 1:
        size, unit = size / STEP, unit + 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"
