"""A backup as one file: a compressed tar archive with a manifest, which knows the checksum of everything else in it.

The first member is the manifest, the last one the manifest's checksum: an archive that was cut off has no end. It is
made beside its place under another name, mode 0600, and gets its name when all of it is on the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corral.errors import CorralError
from corral.output import is_below, locked, write_file
from corral.validation import first_words

MANIFEST = "manifest.json"
END = "manifest.sha256"
INVENTORY = "inventory.yaml"
RENDERING = "rendering/"
SECRETS = "secrets.sealed"
CHUNK = 1 << 20
LARGEST_MANIFEST = 64 << 20
LARGEST_FILE = 256 << 20
"""Of what is read into memory: everything but the states of services."""
SPEED_NOT_SIZE = 6


class Strict(BaseModel):
    """Data from a file that may be anything."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(Strict):
    """One file in an archive."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class SavedState(Strict):
    """A service's state and the member that holds it."""

    host: str
    service: str
    name: str
    purpose: str
    image: str
    member: str


class Manifest(Strict):
    """What a backup is of, and what is in it."""

    format: Literal["corral-backup/1"]
    corral: str
    site: str
    made: datetime
    hosts: tuple[str, ...]
    has_secrets: bool
    secret_names: Mapping[str, tuple[str, ...]]
    """Names by host; the values are in the sealed member, if anywhere."""
    images: Mapping[str, Mapping[str, str]]
    """Id of every image by name and host."""
    states: tuple[SavedState, ...]
    members: Mapping[str, Member]


@dataclass(frozen=True, slots=True)
class Backup:
    """An archive that is whole, and what is in it but the states of services."""

    path: Path
    manifest: Manifest
    mark: str
    """The manifest's checksum: another one is another backup."""
    files: Mapping[str, bytes]

    @property
    def rendering(self) -> dict[str, bytes]:
        """The rendered tree by path, as `render` makes it."""
        return {name.removeprefix(RENDERING): data for name, data in self.files.items() if name.startswith(RENDERING)}


# --- making one ------------------------------------------------------------------------------------------------------


@contextmanager
def workshop(folder: Path, site: str) -> Iterator[Path]:
    """A folder beside the archive's place for what it is made of, gone afterwards; a killed run's is cleared away.

    Raises:
        CorralError: it cannot be written to, or somebody else is at work in it.
    """
    place = folder / f".{site}.backup.part"
    with explained(folder):
        place.mkdir(mode=0o700, exist_ok=True)
        with locked(place):
            try:
                _clear(place)
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)


def _clear(place: Path) -> None:
    for path in place.iterdir():
        path.unlink()


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Says in plain words what the disk refused."""
    try:
        yield
    except OSError as error:
        words = f"{error.filename or place}: cannot be written: {error.strerror}"
        raise CorralError(f"{words}; there is no backup of this run") from None


def receive(source: IO[bytes], path: Path) -> Member:
    """Puts all of a stream into a new file that only its owner reads; returns its size and checksum."""
    total, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := source.read(CHUNK):
            total.update(chunk)
            size += len(chunk)
            file.write(chunk)
    return Member(sha256=total.hexdigest(), size=size)


def write_archive(target: Path, place: Path, manifest: Manifest, parts: Mapping[str, Path]) -> None:
    """Makes the archive of these files, by their names in it, and gives it its name when it is on the disk.

    Raises:
        OSError: the disk refuses; the target is not there then.
        CorralError: the target has come into being meanwhile.
    """
    draft = place / "archive"
    text = manifest.model_dump_json(indent=1).encode() + b"\n"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with (
            gzip.GzipFile("", "wb", SPEED_NOT_SIZE, file, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w") as archive,
        ):
            _add(archive, MANIFEST, io.BytesIO(text), len(text))
            for name, path in parts.items():
                with path.open("rb") as part:
                    _add(archive, name, part, manifest.members[name].size)
            end = hashlib.sha256(text).hexdigest().encode() + b"\n"
            _add(archive, END, io.BytesIO(end), len(end))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, target)  # unlike a renaming, never over a file that is there
    except FileExistsError:
        raise CorralError(f"{target}: is there already; name another file") from None
    sync_folder(target.parent)


def _add(archive: tarfile.TarFile, name: str, data: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    archive.addfile(member, data)


def sync_folder(folder: Path) -> None:
    """Returns when the folder's list of names is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_part(path: Path, data: bytes) -> Member:
    """Like `receive`, of what is in memory."""
    write_file(path, data, 0o600)
    return Member(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


# --- reading one -----------------------------------------------------------------------------------------------------


def read_backup(path: Path) -> Backup:
    """The backup in a file, every byte of it checked; raises CorralError when it is damaged, cut off or no backup."""
    with _in_plain_words(path):
        return _read(path)


def _read(path: Path) -> Backup:
    files: dict[str, bytes] = {}
    seen: list[str] = []
    text = b""
    manifest: Manifest | None = None
    for name, size, data in _members(path):
        if not seen:
            text = _manifest_text(path, name, data)
            manifest = _parsed(path, text)
        elif manifest is not None and name != END:
            files |= _checked(path, manifest, name, size, data)
        elif data.read(CHUNK).strip() != hashlib.sha256(text).hexdigest().encode():
            raise _damaged(path, "its manifest is not the one that it was made with")
        if name in seen:
            raise _damaged(path, f"{name} is in it twice")
        seen.append(name)
    if manifest is None:
        raise _foreign(path)
    if seen[-1] != END:
        raise _damaged(path, "its end is missing")
    missing = sorted(set(manifest.members) - set(seen))
    if missing:
        raise _damaged(path, f"{missing[0]} is not in it")
    return Backup(path, manifest, hashlib.sha256(text).hexdigest(), files)


def feed_states(backup: Backup, wanted: Mapping[str, Callable[[IO[bytes]], None]]) -> None:
    """Hands the wanted members to those who want them, one after the other."""
    with _in_plain_words(backup.path):
        for name, _, data in _members(backup.path):
            if name in wanted:
                wanted[name](data)


def _members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Every member in order; the stream is to be read before the next one is asked for."""
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as zipped:
        if raw.peek(1) == b"":
            raise _foreign(path)
        with tarfile.open(fileobj=zipped, mode="r|") as archive:
            for member in archive:
                data = archive.extractfile(member) if member.isfile() else None
                if data is None:
                    raise _damaged(path, f"{member.name} is no file")
                yield member.name, member.size, data
        while zipped.read(CHUNK):  # what follows has to be as it was written, too: the checksum is at the end
            pass


@contextmanager
def _in_plain_words(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CorralError(f"{path}: no such file") from None
    except gzip.BadGzipFile as error:
        is_other = "Not a gzipped file" in str(error)
        raise (_foreign(path) if is_other else _damaged(path, "its checksum is wrong")) from None
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise _damaged(path, "it was cut off" if isinstance(error, EOFError) else str(error)) from None
    except OSError as error:
        raise CorralError(f"{path}: cannot be read: {error.strerror or error}") from None


def _manifest_text(path: Path, name: str, data: IO[bytes]) -> bytes:
    if name != MANIFEST:
        raise _foreign(path)
    text = data.read(LARGEST_MANIFEST + 1)
    if len(text) > LARGEST_MANIFEST:
        raise _damaged(path, "its manifest has no end")
    return text


def _parsed(path: Path, text: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise CorralError(
            f"{path}: its manifest cannot be read ({first_words(error)}); it is damaged, or a newer corral made it"
        ) from None


def _checked(path: Path, manifest: Manifest, name: str, size: int, data: IO[bytes]) -> dict[str, bytes]:
    """A member with its content, which is left out for a service's state; raises CorralError when it is another one."""
    expected = manifest.members.get(name)
    if expected is None or not is_below(name):
        raise _damaged(path, f"{name} is not in its manifest")
    is_state = name in {state.member for state in manifest.states}
    if not is_state and size > LARGEST_FILE:
        raise _damaged(path, f"{name} is too large")
    total, kept = hashlib.sha256(), bytearray()
    while chunk := data.read(CHUNK):
        total.update(chunk)
        if not is_state:
            kept += chunk
    if size != expected.size or total.hexdigest() != expected.sha256:
        raise _damaged(path, f"{name} is not what it was when the backup was made")
    return {} if is_state else {name: bytes(kept)}


def _damaged(path: Path, why: str) -> CorralError:
    return CorralError(f"{path}: damaged: {why}; use another backup")


def _foreign(path: Path) -> CorralError:
    return CorralError(f"{path}: is no backup that corral made")
