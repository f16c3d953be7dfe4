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
from typing import IO, Annotated, Literal, Protocol

from pydantic import Field

from corral.errors import CorralError
from corral.file_names import PathBelow, is_below
from corral.inventory import Name, Word
from corral.ops.archives.archive import CHUNK, LARGEST_MANIFEST, Strict, sync_folder
from corral.ops.archives.tarball import MOST_MEMBERS, members
from corral.output import write_file
from corral.validation import from_json

SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
MANIFEST = "manifest.json"
BLOBS = "blobs/sha256"
OWN = ("blobs", "compose", "images", "kit", "wheels")
"""Folders in which nothing is anybody else's."""
PART = ".part"
LARGEST_SUMS = 16 << 20
LARGEST_FILE = 64 << 20
"""Bytes of a file that is read into memory: everything but blobs."""
LARGEST_SIGNATURE = 64 << 10
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ImageId = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]


class Image(Strict):
    """An image as `docker save` gave it: the files of that archive by name, each a blob."""

    id: ImageId
    references: tuple[Word, ...]
    digests: tuple[str, ...]
    """Of the registry that it came from, where the engine knows one."""
    platform: str
    size: int
    files: Mapping[PathBelow, Sha256]


class ModelFile(Strict):
    """A model file of a host, whose content is a blob."""

    file: PathBelow
    source: Word
    sha256: Sha256
    size: int = Field(ge=0)


class HostParts(Strict):
    """What one host needs."""

    images: tuple[ImageId, ...]
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
    hosts: Mapping[Name, HostParts]
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

    def finish(self, manifest: Manifest, sign: Callable[[bytes], bytes] | None = None) -> str:
        """Writes the list of checksums, signed if `sign` is given; from now on the bundle is complete.

        What earlier runs left over goes. Returns the list's own checksum.
        """
        self.add_file(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
        for path in [path for name in OWN for path in (self.folder / name).rglob("*")]:
            if path.is_file() and str(path.relative_to(self.folder)) not in self.sums:
                path.unlink()
        text = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(self.sums.items())).encode()
        (self.folder / SIGNATURE).unlink(missing_ok=True)
        if sign is not None:
            write_file(self.folder / SIGNATURE, sign(text), 0o644)
        draft = self.folder / f"{SUMS}{PART}"
        write_file(draft, text, 0o644)
        draft.replace(self.folder / SUMS)
        sync_folder(self.folder)
        return hashlib.sha256(text).hexdigest()


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
        """A file's content; links are not followed."""
        place = self.path / name
        if not place.is_file() or place.resolve() != self.path.resolve() / name:
            raise KeyError(name)
        return place.open("rb")


@dataclass(frozen=True, slots=True)
class TarSource:
    """A bundle as one tar file."""

    path: Path
    places: Mapping[str, tuple[int, int]]
    """Where every file begins, and its size."""

    @classmethod
    def of(cls, path: Path) -> TarSource:
        """The files of a tar file; raises tarfile.ReadError when it is none, or not as `pack` makes them."""
        with path.open("rb") as file:
            return cls(path, {part.name: (file.tell(), part.size) for part in members(file)})

    def open(self, name: str) -> IO[bytes]:
        """A member's content."""
        start, size = self.places[name]
        return io.BufferedReader(_Slice(self.path.open("rb"), start, size), CHUNK)


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place in the part and returns it."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes; none at the end."""
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that is complete and as it was made."""

    path: Path
    source: Source
    manifest: Manifest
    sums: Mapping[str, str]
    """The checksum of every file."""

    def read(self, name: str) -> bytes:
        """A small file; raises CorralError when it is not what was checked before."""
        return _read(self.path, self.source, name, self.sums[name])

    def blob(self, sha256: str) -> IO[bytes]:
        """A blob's content, to be checked by who takes it."""
        return self.source.open(f"{BLOBS}/{sha256}")

    def image_archive(self, image: Image) -> IO[bytes]:
        """What `docker load` reads, put together and checked while it is read; a CorralError ends it too early."""
        return io.BufferedReader(_Joined(self._image_parts(image)), CHUNK)

    def _image_parts(self, image: Image) -> Iterator[IO[bytes]]:
        for name, sha256 in image.files.items():
            with self.blob(sha256) as blob:
                member = tarfile.TarInfo(name)
                member.size = blob.seek(0, os.SEEK_END)
                blob.seek(0)
                yield io.BytesIO(member.tobuf())
                total = hashlib.sha256()
                while chunk := blob.read(CHUNK):
                    total.update(chunk)
                    yield io.BytesIO(chunk)
                if total.hexdigest() != sha256:
                    raise _changed(self.path, f"{BLOBS}/{sha256}")
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


Vouch = Callable[[bytes, bytes | None], None]
"""Told the list of checksums and its signature, if there is one; raises CorralError for a bundle that is not wanted."""


@contextmanager
def opened(path: Path, vouch: Vouch, progress: Callable[[int], None] = lambda _count: None) -> Iterator[Bundle]:
    """The bundle in a folder or file, every byte of it checked.

    Args:
        path: what `bundle` made.
        vouch: asked first whether the list of checksums is to be believed.
        progress: told of every number of bytes that was checked.

    Raises:
        CorralError: it is damaged, not complete, or no bundle; the message says which file.
    """
    try:
        source = FolderSource(path) if path.is_dir() else TarSource.of(path)
        yield _checked(path, source, vouch, progress)
    except FileNotFoundError:
        raise CorralError(f"{path}: no such file or folder") from None
    except tarfile.TarError as error:
        raise CorralError(f"{path}: is no bundle that corral made, or is damaged: {error}") from None


def _checked(path: Path, source: Source, vouch: Vouch, progress: Callable[[int], None]) -> Bundle:
    text = _listed(path, source)
    sums = _sums(path, text)
    vouch(text, _signature(source))
    damaged = [name for name, sha256 in sums.items() if _sha256(source, name, progress) != sha256]
    if damaged:
        names = ", ".join(damaged[:4]) + (" …" if damaged[4:] else "")
        raise CorralError(f"{path}: damaged: {names}; copy the bundle again, or make it again (it goes on)")
    manifest = _manifest(path, _read(path, source, MANIFEST, sums[MANIFEST], LARGEST_MANIFEST))
    wanted = {sha256 for image in manifest.images for sha256 in image.files.values()}
    wanted |= {model.sha256 for parts in manifest.hosts.values() for model in parts.models}
    known = {match[1] for name, sha256 in sums.items() if (match := _BLOB.fullmatch(name)) and match[1] == sha256}
    if wanted - known:
        raise CorralError(f"{path}: damaged: {BLOBS}/{min(wanted - known)} is not in {SUMS}")
    return Bundle(path, source, manifest, sums)


def _listed(path: Path, source: Source) -> bytes:
    try:
        with source.open(SUMS) as file:
            return file.read(LARGEST_SUMS)
    except KeyError:
        words = "is not complete, or no bundle; run ./generate.py bundle again, it goes on where it stopped"
        raise CorralError(f"{path}: has no {SUMS}: it {words}") from None


def _sums(path: Path, text: bytes) -> dict[str, str]:
    lines = text.decode("utf-8", errors="replace").splitlines()
    found = {match[2]: match[1] for line in lines if (match := _SUM.fullmatch(line))}
    is_whole = text.endswith(b"\n") and len(found) == len(lines) <= MOST_MEMBERS
    if not is_whole or MANIFEST not in found or not all(map(is_below, found)):
        raise CorralError(f"{path}: damaged: {SUMS} is not as it was made")
    return found


def _signature(source: Source) -> bytes | None:
    try:
        with source.open(SIGNATURE) as file:
            return file.read(LARGEST_SIGNATURE)
    except KeyError:
        return None


def _read(path: Path, source: Source, name: str, sha256: str, largest: int = LARGEST_FILE) -> bytes:
    """A file's content, which is what its checksum says."""
    with source.open(name) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise CorralError(f"{path}: {name} is too large: more than {largest >> 20} MiB")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _changed(path, name)
    return data


def _changed(path: Path, name: str) -> CorralError:
    return CorralError(f"{path}: {name} was changed while it was read; copy the bundle again, then run this again")


def _sha256(source: Source, name: str, progress: Callable[[int], None]) -> str:
    """A file's checksum; empty when it is not there."""
    total = hashlib.sha256()
    try:
        with source.open(name) as file:
            while chunk := file.read(CHUNK):
                total.update(chunk)
                progress(len(chunk))
    except KeyError:
        return ""
    return total.hexdigest()


def _manifest(path: Path, text: bytes) -> Manifest:
    try:
        return from_json(Manifest, text)
    except ValueError as error:
        raise CorralError(f"{path}: {MANIFEST} cannot be read ({error}); did a newer corral make it?") from None
