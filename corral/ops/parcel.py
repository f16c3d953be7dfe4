"""A bundle's format: a folder (or that folder as one tar file) whose `SHA256SUMS` knows every file in it.

Large things (layers of images, model files) lie in `blobs/sha256/` under their own checksums, each once, however many
images or hosts share them. `SHA256SUMS` is written last: without it a bundle is not complete. `sha256sum -c` reads it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Literal, Protocol

from pydantic import Field, ValidationError

from corral.errors import CorralError
from corral.ops.archive import CHUNK, Strict, sync_folder
from corral.output import is_below, write_file
from corral.validation import first_words

SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
BLOBS = "blobs/sha256"
OWN = ("blobs", "compose", "images", "kit", "wheels")
"""Folders in which nothing is anybody else's."""
PART = ".part"
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Image(Strict):
    """An image as `docker save` gave it: the files of that archive by name, each a blob."""

    id: str = Field(pattern="^sha256:[0-9a-f]{64}$")
    references: tuple[str, ...]
    digests: tuple[str, ...]
    """Of the registry that it came from, where the engine knows one."""
    platform: str
    size: int
    files: Mapping[str, str]


class ModelFile(Strict):
    """A model file of a host, whose content is a blob."""

    file: str
    source: str
    sha256: str = Sha256
    size: int = Field(ge=0)


class HostParts(Strict):
    """What one host needs."""

    images: tuple[str, ...]
    """Ids."""
    models: tuple[ModelFile, ...]


class Manifest(Strict):
    """What a bundle is of."""

    format: Literal["corral-bundle/1"]
    corral: str
    site: str
    made: datetime
    platform: str
    """For which the Python wheels are, as `Linux x86_64, Python 3.11`; empty without the kit."""
    hosts: Mapping[str, HostParts]
    images: tuple[Image, ...]


# --- making one ------------------------------------------------------------------------------------------------------


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Says in plain words what the disk refused; what is there already is used by the next run."""
    try:
        yield
    except OSError as error:
        words = f"{error.filename or place}: cannot be written: {error.strerror}"
        raise CorralError(f"{words}; the bundle is not complete, run the same command again to go on") from None


@dataclass(slots=True)
class Packer:
    """A bundle that is being filled; blobs that are there already are not fetched again."""

    folder: Path
    sums: dict[str, str] = field(default_factory=dict)

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

    def add_file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A small file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data, mode)
        self.sums[name] = hashlib.sha256(data).hexdigest()

    def note(self, name: str) -> None:
        """A file that somebody else has put there."""
        total = hashlib.sha256()
        with (self.folder / name).open("rb") as file:
            _feed(total, file)
        self.sums[name] = total.hexdigest()

    def add_blob(self, data: IO[bytes], size: int, announced: str = "") -> str:
        """Takes a blob in and returns its checksum; raises CorralError when it is not the one that was announced."""
        draft = self._draft(announced or "new")
        draft.unlink(missing_ok=True)
        return self._keep(draft, _take(draft, data, hashlib.sha256()), announced, size)

    def fetch_blob(self, sha256: str, size: int, start: Callable[[int], AbstractContextManager[IO[bytes]]]) -> None:
        """Takes in a blob of which an earlier run may have got a part; `start` opens it at a number of bytes."""
        draft = self._draft(sha256)
        total = hashlib.sha256()
        if draft.exists() and draft.stat().st_size < size:
            with draft.open("rb") as file:
                _feed(total, file)
        else:
            draft.unlink(missing_ok=True)
        with start(draft.stat().st_size if draft.exists() else 0) as data:
            found = _take(draft, data, total)
        self._keep(draft, found, sha256, size)

    def _draft(self, name: str) -> Path:
        draft = self.folder / BLOBS / f"{name}{PART}"
        draft.parent.mkdir(parents=True, exist_ok=True)
        return draft

    def _keep(self, draft: Path, found: str, announced: str, size: int) -> str:
        """Puts a written draft in its place, on the disk."""
        if draft.stat().st_size != size or found != (announced or found):
            draft.unlink()
            words = "is not what was announced; was it changed meanwhile? Run the same command again"
            raise CorralError(f"{self.blob(announced)}: {words}")
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(self.blob(found))
        self.sums[f"{BLOBS}/{found}"] = found
        return found

    def finish(self, manifest: Manifest) -> None:
        """Writes the list of checksums; from now on the bundle is complete. What earlier runs left over goes."""
        self.add_file(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
        for path in [path for name in OWN for path in (self.folder / name).rglob("*")]:
            if path.is_file() and str(path.relative_to(self.folder)) not in self.sums:
                path.unlink()
        text = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(self.sums.items()))
        draft = self.folder / f"{SUMS}{PART}"
        write_file(draft, text.encode(), 0o644)
        draft.replace(self.folder / SUMS)
        sync_folder(self.folder)


def _take(draft: Path, data: IO[bytes], total: hashlib._Hash) -> str:
    """Appends a stream to a file; returns the checksum of all that the file then holds."""
    with draft.open("ab") as file:
        while chunk := data.read(CHUNK):
            total.update(chunk)
            file.write(chunk)
    return total.hexdigest()


def _feed(total: hashlib._Hash, file: IO[bytes]) -> None:
    while chunk := file.read(CHUNK):
        total.update(chunk)


def pack(folder: Path, target: Path) -> None:
    """A complete bundle's folder as one tar file; the folder goes when the file is on the disk."""
    draft = target.with_name(f"{target.name}{PART}")
    with draft.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(folder / SUMS, SUMS)
            for path in sorted(folder.rglob("*")):
                name = str(path.relative_to(folder))
                if path.is_file() and name != SUMS:
                    archive.add(path, name)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)
    sync_folder(target.parent)
    shutil.rmtree(folder)


# --- reading one -----------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where the files of a bundle are read."""

    def open(self, name: str) -> IO[bytes]:
        """A file's content; raises KeyError when there is none of that name."""
        ...


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A bundle as a folder."""

    path: Path

    def open(self, name: str) -> IO[bytes]:
        """A file's content; links are not followed out of the bundle."""
        place = self.path / name
        if not place.is_file() or place.is_symlink():
            raise KeyError(name)
        return place.open("rb")


@dataclass(frozen=True, slots=True)
class TarSource:
    """A bundle as one tar file."""

    archive: tarfile.TarFile
    names: Mapping[str, tarfile.TarInfo]

    def open(self, name: str) -> IO[bytes]:
        """A member's content."""
        data = self.archive.extractfile(self.names[name])
        if data is None:
            raise KeyError(name)
        return data


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that is complete and as it was made."""

    source: Source
    manifest: Manifest
    names: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """A small file."""
        with self.source.open(name) as file:
            return file.read()

    def below(self, folder: str) -> dict[str, bytes]:
        """Small files of a folder, by their names in it."""
        return {name.removeprefix(folder): self.read(name) for name in self.names if name.startswith(folder)}

    def blob(self, sha256: str) -> IO[bytes]:
        """A blob's content."""
        return self.source.open(f"{BLOBS}/{sha256}")

    def image_archive(self, image: Image) -> IO[bytes]:
        """What `docker load` reads, put together while it is read."""
        return io.BufferedReader(_Joined(self._image_parts(image)), CHUNK)

    def _image_parts(self, image: Image) -> Iterator[IO[bytes]]:
        for name, sha256 in image.files.items():
            with self.blob(sha256) as blob:
                member = tarfile.TarInfo(name)
                member.size = blob.seek(0, os.SEEK_END)
                blob.seek(0)
                yield io.BytesIO(member.tobuf())
                yield blob
                yield io.BytesIO(bytes(-member.size % tarfile.BLOCKSIZE))
        yield io.BytesIO(bytes(2 * tarfile.BLOCKSIZE))


class _Joined(io.RawIOBase):
    """Streams read one after the other."""

    def __init__(self, parts: Iterator[IO[bytes]]) -> None:
        self._parts = parts
        self._part: IO[bytes] | None = next(parts, None)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes; none at the end."""
        while self._part is not None:
            data = self._part.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._part = next(self._parts, None)
        return 0


@contextmanager
def opened(path: Path, progress: Callable[[int], None] = lambda _count: None) -> Iterator[Bundle]:
    """The bundle in a folder or file, every byte of it checked.

    Args:
        path: what `bundle` made.
        progress: told of every number of bytes that was checked.

    Raises:
        CorralError: it is damaged, not complete, or no bundle; the message says which file.
    """
    try:
        if path.is_dir():
            yield _checked(path, FolderSource(path), progress)
            return
        with tarfile.open(path, "r:") as archive:
            names = {member.name: member for member in archive.getmembers()}
            yield _checked(path, TarSource(archive, names), progress)
    except FileNotFoundError:
        raise CorralError(f"{path}: no such file or folder") from None
    except tarfile.TarError:
        raise CorralError(f"{path}: is no bundle that corral made, or was cut off") from None


def _checked(path: Path, source: Source, progress: Callable[[int], None]) -> Bundle:
    sums = _sums(path, source)
    damaged = [name for name, sha256 in sums.items() if _sha256(source, name, progress) != sha256]
    if damaged:
        names = ", ".join(damaged[:4]) + (" …" if damaged[4:] else "")
        raise CorralError(f"{path}: damaged: {names}; copy the bundle again, or make it again (it goes on)")
    with source.open(MANIFEST) as file:
        manifest = _manifest(path, file.read())
    wanted = {sha256 for image in manifest.images for sha256 in image.files.values()}
    wanted |= {model.sha256 for parts in manifest.hosts.values() for model in parts.models}
    known = {match[1] for name in sums if (match := _BLOB.fullmatch(name))}
    if wanted - known:
        raise CorralError(f"{path}: damaged: {BLOBS}/{min(wanted - known)} is not in {SUMS}")
    return Bundle(source, manifest, tuple(sums))


def _sums(path: Path, source: Source) -> dict[str, str]:
    try:
        with source.open(SUMS) as file:
            text = file.read().decode("utf-8", errors="replace")
    except KeyError:
        words = "is not complete, or no bundle; run ./generate.py bundle again, it goes on where it stopped"
        raise CorralError(f"{path}: has no {SUMS}: it {words}") from None
    found = {match[2]: match[1] for line in text.splitlines() if (match := _SUM.fullmatch(line))}
    if len(found) != len(text.splitlines()) or MANIFEST not in found or not all(map(is_below, found)):
        raise CorralError(f"{path}: damaged: {SUMS} is not as it was made")
    return found


def _sha256(source: Source, name: str, progress: Callable[[int], None]) -> str:
    """A file's checksum; empty when it is not there."""
    total = hashlib.sha256()
    try:
        with source.open(name) as file:
            while chunk := file.read(CHUNK):
                total.update(chunk)
                progress(len(chunk))
    except (KeyError, tarfile.TarError):
        return ""
    return total.hexdigest()


def _manifest(path: Path, text: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise CorralError(
            f"{path}: {MANIFEST} cannot be read ({first_words(error)}); did a newer corral make it?"
        ) from None
