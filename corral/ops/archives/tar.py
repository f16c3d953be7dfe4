"""The container of backups, bundles and the history: a tar archive of regular files with safe names.

`tarfile` keeps every header, and reads extended headers and sparse maps of any length into memory. Archives may come
from an attacker, so what it reads between two files is bounded here.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from corral.file_names import is_below

CHUNK = 1 << 20
MOST_MEMBERS = 100_000
# Bytes of all headers between two files.
LONGEST_HEADERS = 16 << 10
# Bytes of a member; no disk holds as many.
LARGEST = 1 << 60
# Bytes of all files together that `unpacked` reads into memory.
LARGEST_UNPACKED = 256 << 20


class Part(NamedTuple):
    """A member: read it before the next one is asked for."""

    name: str
    size: int
    data: IO[bytes]
    # Where its content begins in the archive.
    start: int


class _Bounded:
    """A file of which `tarfile` reads at most `left` bytes; GzipFile cannot skip a part of a pipe, so it is read."""

    def __init__(self, file: IO[bytes]) -> None:
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
        """Go to a place; forwards only where the file is compressed."""
        while isinstance(self.file, gzip.GzipFile) and self.at < place:
            self.at += len(self.file.read(min(CHUNK, place - self.at))) or LARGEST
        if self.at != place:
            self.at = self.file.seek(place)


def members(file: IO[bytes], most: int = MOST_MEMBERS) -> Iterator[Part]:
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


def pack(file: IO[bytes], files: Mapping[str, Path]) -> None:
    """Write an archive of these files, by their names in it."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, path in files.items():
            archive.add(path, name, recursive=False, filter=_of_nobody)


def _of_nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    return info.replace(uid=0, gid=0, uname="", gname="", mode=info.mode & 0o755, deep=False)


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
    """The files of an archive, by path; raises tarfile.TarError when `packed` did not make it, or it is too large."""
    found: dict[str, bytes] = {}
    room = LARGEST_UNPACKED
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as zipped:
            for part in members(zipped):
                room -= part.size
                if room < 0:
                    raise tarfile.ReadError(f"its files are larger than {LARGEST_UNPACKED >> 20} MiB together")
                found[part.name] = part.data.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise tarfile.ReadError(str(error)) from None
    return found
