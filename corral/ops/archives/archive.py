"""A backup as one file: a compressed tar archive with a manifest, which knows the checksum of everything else in it.

The first member is the manifest, the last one the manifest's checksum: an archive that was cut off has no end. With a
passphrase all of it is sealed (`envelope`), or, where it is to stay readable, a sealed checksum of the
manifest is its second member. It is made beside its place under another name, mode 0600, and gets its name when all of
it is on the disk.
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
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from corral.errors import CorralError
from corral.file_names import PathBelow
from corral.inventory import Name
from corral.ops.archives import envelope
from corral.ops.archives.passphrase import seal, unseal
from corral.ops.archives.tarball import MOST_MEMBERS, Part, Readable, members
from corral.output import locked, write_file
from corral.validation import from_json

MANIFEST = "manifest.json"
SEAL = "manifest.sealed"
END = "manifest.sha256"
INVENTORY = "inventory.yaml"
RENDERING = "rendering/"
SECRETS = "secrets.sealed"
CHUNK = 1 << 20
LARGEST_MANIFEST = 8 << 20
LARGEST_FILE = 64 << 20
LARGEST_FILES = 256 << 20
"""Bytes of what is read into memory, one file and all of them: everything but the states of services."""
LONGEST_END = 1 << 20
"""Bytes after the last member; tar fills its last record up."""
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

    host: Name
    service: Name
    name: str
    purpose: str
    image: str
    member: PathBelow


def _few(value: Any) -> Any:
    """A mapping of no more members than are read, before each of them is looked at."""
    if isinstance(value, Mapping) and len(value) > MOST_MEMBERS:
        raise ValueError(f"has more than {MOST_MEMBERS} files")
    return value


class Manifest(Strict):
    """What a backup is of, and what is in it."""

    format: Literal["corral-backup/1", "corral-backup/2"]
    """1: what was sealed of it were the secrets alone."""
    corral: str
    site: str
    made: datetime
    hosts: Annotated[tuple[Name, ...], FailFast()]
    has_secrets: bool
    secret_names: Mapping[Name, tuple[str, ...]]
    """Names by host; the values are in the sealed member, if anywhere."""
    images: Mapping[str, Mapping[str, str]]
    """Id of every image by name and host."""
    states: Annotated[tuple[SavedState, ...], FailFast()]
    members: Annotated[Mapping[PathBelow, Member], BeforeValidator(_few)]

    @property
    def state_members(self) -> frozenset[str]:
        """The members that are states of services."""
        return frozenset(state.member for state in self.states)


@dataclass(frozen=True, slots=True)
class Backup:
    """An archive that is whole, and what is in it but the states of services."""

    path: Path
    manifest: Manifest
    mark: str
    """The manifest's checksum: another one is another backup."""
    is_authentic: bool
    """Whether all of it is authenticated by the passphrase."""
    files: Mapping[str, bytes]
    states: Mapping[str, Path] = field(default_factory=dict)
    """Where the states of services were laid, by member."""

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


def receive(source: IO[bytes] | Part, path: Path) -> Member:
    """Puts all of a stream into a new file that only its owner reads; returns its size and checksum."""
    total, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := source.read(CHUNK):
            total.update(chunk)
            size += len(chunk)
            file.write(chunk)
    return Member(sha256=total.hexdigest(), size=size)


@dataclass(frozen=True, slots=True)
class Sealing:
    """How an archive is kept from others."""

    passphrase: str
    is_plain: bool = False
    """Whether it stays readable without the passphrase; what it says is sealed all the same."""


def write_archive(
    target: Path, place: Path, manifest: Manifest, parts: Mapping[str, Path], sealing: Sealing | None
) -> None:
    """Makes the archive of these files, by their names in it, and gives it its name when it is on the disk.

    Raises:
        OSError: the disk refuses; the target is not there then.
        CorralError: the target has come into being meanwhile.
    """
    draft = place / "archive"
    text = manifest.model_dump_json(indent=1).encode() + b"\n"
    digest = hashlib.sha256(text).hexdigest()
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if sealing is None or sealing.is_plain:
            token = seal(digest.encode(), sealing.passphrase) if sealing else b""
            _write_members(file, manifest, text, parts, token)
        else:
            with envelope.closing(file, digest, sealing.passphrase) as inside:
                _write_members(inside, manifest, text, parts, b"")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, target)  # unlike a renaming, never over a file that is there
    except FileExistsError:
        raise CorralError(f"{target}: is there already; name another file") from None
    sync_folder(target.parent)


def _write_members(file: IO[bytes], manifest: Manifest, text: bytes, parts: Mapping[str, Path], token: bytes) -> None:
    with (
        gzip.GzipFile("", "wb", SPEED_NOT_SIZE, file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        _add(archive, MANIFEST, io.BytesIO(text), len(text))
        if token:
            _add(archive, SEAL, io.BytesIO(token), len(token))
        for name, path in parts.items():
            with path.open("rb") as part:
                _add(archive, name, part, manifest.members[name].size)
        end = hashlib.sha256(text).hexdigest().encode() + b"\n"
        _add(archive, END, io.BytesIO(end), len(end))


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


Asking = Callable[[], str]
"""Gets the passphrase, when an archive wants one."""


def read_backup(path: Path, ask: Asking, folder: Path | None = None) -> Backup:
    """The backup in a file, every byte of it checked.

    Args:
        path: what `backup` made.
        ask: gets the passphrase; not called for archives that have none, or whose secrets alone are sealed.
        folder: where the states of services are laid as they are checked; without one they are only checked.

    Raises:
        WrongPassphraseError: it does not open with this passphrase.
        CorralError: it is damaged, cut off, too large or no backup.
    """
    with _in_plain_words(path), path.open("rb") as file:
        if file.readline(len(envelope.MARK)) != envelope.MARK:
            file.seek(0)
            return _Reading(path, ask, folder).read(file)
        with envelope.opened(file, ask()) as (digest, inside):
            return _Reading(path, ask, folder, digest).read(inside)


@dataclass(slots=True)
class _Reading:
    """An archive that is being read."""

    path: Path
    ask: Asking
    folder: Path | None
    digest: str = ""
    """The manifest's checksum, as it was sealed; empty as long as no sealed one was seen."""
    files: dict[str, bytes] = field(default_factory=dict)
    states: dict[str, Path] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    last: str = ""

    def read(self, file: IO[bytes]) -> Backup:
        """All of it, from its first to its last byte."""
        with gzip.GzipFile(fileobj=file) as zipped:
            if file.peek(1) == b"":  # type: ignore[attr-defined]
                raise _foreign(self.path)
            parts = members(zipped)
            text = _manifest_text(self.path, next(parts, None))
            manifest, found = _parsed(self.path, text), hashlib.sha256(text).hexdigest()
            self._check_sizes(manifest)
            for part in parts:
                self._take(manifest, found, part)
            self._check_end(zipped)
        if self.last != END:
            raise _damaged(self.path, "its end is missing")
        missing = sorted(set(manifest.members) - self.seen)
        if missing:
            raise _damaged(self.path, f"{missing[0]} is not in it")
        if self.digest and self.digest != found:
            raise _damaged(self.path, "its manifest is not the one that was sealed with the passphrase")
        return Backup(self.path, manifest, found, bool(self.digest), self.files, self.states)

    def _check_sizes(self, manifest: Manifest) -> None:
        """Raises CorralError when there is no room for what the manifest announces, before any of it is read."""
        states = manifest.state_members
        files = [member.size for name, member in manifest.members.items() if name not in states]
        if max(files, default=0) > LARGEST_FILE or sum(files) > LARGEST_FILES:
            words = f"at most {LARGEST_FILE >> 20} MiB each and {LARGEST_FILES >> 20} MiB together are read"
            raise _damaged(self.path, f"its files are too large: {words}")
        wanted = sum(member.size for name, member in manifest.members.items() if name in states)
        if self.folder is not None and wanted > shutil.disk_usage(self.folder).free:
            words = f"the data in it takes {wanted >> 20} MiB, which {self.folder} has not free"
            raise CorralError(f"{self.path}: {words}; nothing was changed")

    def _take(self, manifest: Manifest, found: str, part: Part) -> None:
        """Checks a member and keeps it: in memory, or the state of a service in the folder."""
        if part.name in self.seen:
            raise _damaged(self.path, f"{part.name} is in it twice")
        if self.last == END:
            raise _damaged(self.path, "something follows its end")
        if part.name == END:
            if part.read(CHUNK).strip() != found.encode():
                raise _damaged(self.path, "its manifest is not the one that it was made with")
        elif part.name == SEAL and not self.seen:
            self.digest = self.digest or unseal(part.read(CHUNK), self.ask()).decode(errors="replace")
        else:
            self._take_listed(manifest, part)
        self.seen.add(part.name)
        self.last = part.name

    def _take_listed(self, manifest: Manifest, part: Part) -> None:
        expected = manifest.members.get(part.name)
        if expected is None:
            raise _damaged(self.path, f"{part.name} is not in its manifest")
        if part.size != expected.size:
            raise _changed(self.path, part.name)
        if part.name not in manifest.state_members:
            data = part.read()
            self.files[part.name], sha256 = data, hashlib.sha256(data).hexdigest()
        elif self.folder is not None:
            place = self.states[part.name] = self.folder / str(len(self.states))
            sha256 = receive(part, place).sha256
        else:
            sha256 = _sha256(part)
        if sha256 != expected.sha256:
            raise _changed(self.path, part.name)

    def _check_end(self, zipped: Readable) -> None:
        """What follows the last member has to be as it was written, too: the checksum of it all is at the end."""
        if len(zipped.read(LONGEST_END + 1)) > LONGEST_END:
            raise _damaged(self.path, "something follows its end")


def _sha256(part: Part) -> str:
    total = hashlib.sha256()
    while chunk := part.read(CHUNK):
        total.update(chunk)
    return total.hexdigest()


def feed_states(backup: Backup, wanted: Mapping[str, Callable[[IO[bytes]], None]]) -> None:
    """Hands the wanted members to those who want them, one after the other."""
    for name, path in backup.states.items():
        if name in wanted:
            with path.open("rb") as data:
                wanted[name](data)


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
        raise CorralError(f"{path}: cannot be read: {error.strerror or error}; nothing was changed") from None


def _manifest_text(path: Path, part: Part | None) -> bytes:
    if part is None or part.name != MANIFEST:
        raise _foreign(path)
    if part.size > LARGEST_MANIFEST:
        raise _damaged(path, "its manifest has no end")
    return part.read()


def _parsed(path: Path, text: bytes) -> Manifest:
    try:
        return from_json(Manifest, text)
    except ValueError as error:
        raise CorralError(
            f"{path}: its manifest cannot be read ({error}); it is damaged, or a newer corral made it"
        ) from None


def _changed(path: Path, name: str) -> CorralError:
    return _damaged(path, f"{name} is not what it was when the backup was made")


def _damaged(path: Path, why: str) -> CorralError:
    return CorralError(f"{path}: damaged: {why}; use another backup")


def _foreign(path: Path) -> CorralError:
    return CorralError(f"{path}: is no backup that corral made")
