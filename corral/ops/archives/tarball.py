"""Tar archives from outside, read member by member: plain files under safe names, and nothing without a bound.

`tarfile` keeps every header and reads extended headers and sparse maps of any length into memory. Here a member is what
the kit itself writes: a regular file, perhaps with a short extended header for a long name or a large size.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from corral.file_names import is_below

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
MOST_MEMBERS = 100_000
LONGEST_HEADER = 16 << 10
"""Bytes of an extended header."""
LARGEST = 1 << 60
"""Bytes of a member that no disk holds."""


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, count: int, /) -> bytes:
        """The next bytes; fewer, or none, at the end."""
        ...

    def seekable(self) -> bool:
        """Whether `seek` works."""
        ...

    def seek(self, offset: int, whence: int = ..., /) -> int:
        """Goes to another place."""
        ...


@dataclass(slots=True)
class Part:
    """A member: its name, its size, and its content, to be read before the next member is asked for."""

    name: str
    size: int
    left: int
    file: Readable

    def read(self, count: int = -1) -> bytes:
        """The next bytes, none at the end; raises tarfile.ReadError when the archive ends before."""
        wanted = self.left if count < 0 else min(count, self.left)
        data = _exactly(self.file, wanted)
        self.left -= wanted
        return data

    def skip(self) -> None:
        """Leaves the rest unread."""
        rest = self.left + -self.size % BLOCK
        if rest > CHUNK and self.file.seekable():
            self.file.seek(rest, 1)
            rest = 0
        while rest:
            rest -= len(_exactly(self.file, min(rest, CHUNK)))
        self.left = 0


def members(file: Readable, most: int = MOST_MEMBERS) -> Iterator[Part]:
    """Every member in order; raises tarfile.ReadError for what is no archive of plain files with safe names."""
    count = 0
    while part := _next(file):
        count += 1
        if count > most:
            raise tarfile.ReadError(f"it has more than {most} files")
        yield part
        part.skip()


def _next(file: Readable) -> Part | None:
    """The next member; None at the archive's end."""
    extra: dict[str, str] = {}
    info = _header(file)
    if info is not None and info.type == tarfile.XHDTYPE:
        extra = _extended(info, file)
        info = _header(file)
    if info is None:
        return None
    name, size = extra.get("path", info.name), int(extra.get("size", info.size))
    is_plain = info.isreg() and not any(key.startswith("GNU.sparse") for key in extra)
    if not is_plain or not 0 <= size < LARGEST or not is_below(name):
        raise tarfile.ReadError(f"{name!r} is no file with a safe name")
    return Part(name, size, size, file)


def _header(file: Readable) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(_exactly(file, BLOCK), "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        raise tarfile.ReadError(str(error)) from None


def _extended(info: tarfile.TarInfo, file: Readable) -> dict[str, str]:
    """What an extended header says of the member that follows."""
    if not 0 <= info.size <= LONGEST_HEADER:
        raise tarfile.ReadError("it has a header without end")
    data = _exactly(file, info.size + -info.size % BLOCK)[: info.size]
    found: dict[str, str] = {}
    while data:
        length = data.partition(b" ")[0]
        record = data[: int(length)] if re.fullmatch(rb"[0-9]{1,5}", length) else b""
        key, equals, value = record[len(length) + 1 : -1].decode(errors="surrogateescape").partition("=")
        if not equals or (key == "size" and not re.fullmatch(r"[0-9]{1,19}", value)):
            raise tarfile.ReadError("it has a header that cannot be read")
        found[key] = value
        data = data[len(record) :]
    return found


def _exactly(file: Readable, count: int) -> bytes:
    """That many bytes; raises tarfile.ReadError when there are fewer."""
    data = file.read(count)
    while len(data) < count:
        more = file.read(count - len(data))
        if not more:
            raise tarfile.ReadError("it was cut off")
        data += more
    return data
