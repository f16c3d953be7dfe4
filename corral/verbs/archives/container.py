"""What backups and bundles have in common: files and `SHA256SUMS`, which lists the checksum of each of them.

A bundle is a folder of these files, or a tar file of it; a backup is a compressed tar file, encrypted as a whole
(`passphrase`). `SHA256SUMS` is the first member of a tar file; what authenticates it authenticates every file.

`tarfile` keeps every header, and reads extended headers and sparse maps of any length into memory. Archives may come
from an attacker, so what it reads between two files is bounded here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corral.config.file_names import is_below
from corral.config.model_lock import Sha256, first_words
from corral.errors import CorralError
from corral.files import new_file
from corral.render.output import locked
from corral.runtime.hosts import without_owner

CHUNK = 1 << 20
MOST_MEMBERS = 100_000
# Bytes of all headers between two files.
LONGEST_HEADERS = 16 << 10
# Bytes of a member; no disk holds as many.
LARGEST = 1 << 60
# Bytes of a file that is read into memory, and of all such files of an archive together.
LARGEST_FILE = 64 << 20
LARGEST_FILES = 256 << 20
LARGEST_MANIFEST = 8 << 20
SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
INVENTORY = "inventory.yaml"
Checked = TypeVar("Checked", bound=BaseModel)
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
    """Checksums by name; raises tarfile.ReadError when `sums_text` did not make this."""
    lines = text.decode("utf-8", errors="replace").splitlines() if text.count(b"\n") <= MOST_MEMBERS else []
    found = {match[2]: match[1] for line in lines if (match := _SUM.fullmatch(line))}
    is_whole = text.endswith(b"\n") and len(found) == len(lines)
    if not is_whole or MANIFEST not in found or not all(map(is_below, found)):
        raise tarfile.ReadError(f"{SUMS} is not as it was made")
    return found


def receive(stream: IO[bytes], file: IO[bytes] | None = None, total: hashlib._Hash | None = None) -> Member:
    """Read a stream to its end; returns its size and checksum.

    Args:
        stream: what is read.
        file: what it is written into.
        total: the checksum of what lies before it.
    """
    total, size = total or hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        total.update(chunk)
        size += len(chunk)
        if file is not None:
            file.write(chunk)
    return Member(sha256=total.hexdigest(), size=size)


def parsed(model: type[Checked], text: bytes) -> Checked:
    """A manifest of this type; raises tarfile.ReadError when it cannot be read.

    It may be anything: Python's own reader of JSON takes a tenth of the memory that pydantic's takes.
    """
    if len(text) > LARGEST_MANIFEST:
        raise tarfile.ReadError("its manifest has no end")
    try:
        return model.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = first_words(error) if isinstance(error, ValidationError) else f"it: {error}"
        raise tarfile.ReadError(f"its manifest cannot be read ({reason}), or a newer corral made it") from None


# --- tar files -------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A member: read it before the next one is asked for."""

    name: str
    size: int
    data: IO[bytes]
    # Where its content begins in the archive.
    start: int


class _Bounded:
    """A file of which `tarfile` reads at most `left` bytes; GzipFile cannot seek in a pipe, so it is read forwards."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self.file, self.at, self.left = file, 0, LONGEST_HEADERS

    def read(self, count: int) -> bytes:
        """The next bytes."""
        self.left -= count
        if count < 0 or self.left < 0:
            raise tarfile.ReadError("it has a header without end")
        data = self.file.read(count)
        self.at += len(data)
        return data

    def tell(self) -> int:
        """The number of bytes before the next one."""
        return self.at

    def seek(self, place: int) -> None:
        """Go to a place; only forwards where the file is compressed."""
        if isinstance(self.file, gzip.GzipFile):
            while self.at < place and (data := self.file.read(min(CHUNK, place - self.at))):
                self.at += len(data)
        else:
            self.at = self.file.seek(place)


def members(file: IO[bytes] | gzip.GzipFile, most: int = MOST_MEMBERS) -> Iterator[Part]:
    """Every member in order; raises tarfile.ReadError for what is no archive of regular files with safe names."""
    bounded = _Bounded(file)
    try:
        archive = tarfile.open(fileobj=bounded, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115 - bounded
        for _ in range(most):
            info = archive.next()
            if info is None:
                return
            data = archive.extractfile(info) if _is_plain(archive, info) else None
            if data is None:
                raise tarfile.ReadError(f"{info.name!r} is no file with a safe name")
            bounded.left = LARGEST
            yield Part(info.name, info.size, data, info.offset_data)
            bounded.left = LONGEST_HEADERS
            archive.members.clear()
    except (ValueError, IndexError, RecursionError) as error:
        raise tarfile.ReadError(f"it has a header that cannot be read: {error}") from None
    raise tarfile.ReadError(f"it has more than {most} files")


def _is_plain(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bool:
    is_file = info.isreg() and not info.issparse() and not archive.pax_headers
    return is_file and 0 <= info.size < LARGEST and is_below(info.name)


def packed(files: Mapping[str, bytes]) -> bytes:
    """Files as a compressed archive; the same files give the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The files of an archive of our own, by path; raises tarfile.TarError when `packed` did not make it."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as zipped:
            return {part.name: part.data.read() for part in members(zipped)}
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise tarfile.ReadError(str(error)) from None


# --- files on the disk -----------------------------------------------------------------------------------------------


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its folders, sorted; folders that are links are left out."""
    found = os.walk(folder)
    return sorted(path for place, _, names in found for name in names if (path := Path(place, name)).is_file())


@dataclass(slots=True)
class ArchiveFolder:
    """A folder that is filled with the files of an archive."""

    folder: Path
    # The checksum of every file by name, as `SHA256SUMS` lists them.
    sums: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, data: bytes | IO[bytes], mode: int = 0o600) -> int:
        """Write a file; returns its size in bytes."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / name, mode) as file:
            member = receive(io.BytesIO(data) if isinstance(data, bytes) else data, file)
        self.sums[name] = member.sha256
        return member.size

    def pack(self, file: IO[bytes] | gzip.GzipFile, *first: str) -> None:
        """Write the archive: the files of these names first."""
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in (*first, *sorted(self.sums.keys() - set(first))):
                archive.add(self.folder / name, name, recursive=False, filter=without_owner)


@contextmanager
def work_folder(place: Path, remedy: str) -> Iterator[Path]:
    """A folder for this run alone, gone at the end; what a killed run left in it goes at the start.

    Raises:
        CorralError: it cannot be written, with this remedy, or another run is at work in it.
    """
    with explained(place, remedy):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(place):
            try:
                for path in place.iterdir():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)


@contextmanager
def explained(place: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError of the block into a CorralError with its reason and this remedy."""
    try:
        yield
    except OSError as error:
        message = f"{error.filename or place}: cannot be written: {error.strerror}"
        raise CorralError(f"{message}; {remedy}") from None


@contextmanager
def readable(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Turn what the disk, `gzip` or `tarfile` says of an archive into a CorralError with this remedy for damage."""
    try:
        yield
    except FileNotFoundError:
        raise CorralError(f"{path}: no such file or folder") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise CorralError(f"{path}: damaged, or no {kind} that corral made: {error}; {remedy}") from None
    except OSError as error:
        message = f"{error.filename or path}: cannot be read: {error.strerror or error}"
        raise CorralError(f"{message}; then run the same command again") from None


# --- messages --------------------------------------------------------------------------------------------------------


def options_of(inventory: Path, out: Path) -> str:
    """The options that name these places, for a command that is shown."""
    options = "" if inventory == Path(INVENTORY) else f" --inventory {shlex.quote(str(inventory))}"
    return options + ("" if out == Path("compose") else f" --out {shlex.quote(str(out))}")


def amount(size: float) -> str:
    """A number of bytes for people: `3.4 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004 - units of a power of two
            return f"{size:.{int(unit != 'bytes')}f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
