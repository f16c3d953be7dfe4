"""A backup's file: what its manifest says, how it is written, and how every byte of it is checked.

With a passphrase the whole file is encrypted. Where it is to stay readable (`--plain`), the encrypted checksum of
`SHA256SUMS` is its second member instead.
"""

from __future__ import annotations

import gzip
import hashlib
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

from pydantic import BeforeValidator, FailFast

from corral.config.file_names import PathBelow
from corral.config.inventory import Name
from corral.config.messages import from_json
from corral.errors import CorralError
from corral.verbs.archives import legacy
from corral.verbs.archives.container import (
    LARGEST_FILE,
    LARGEST_MANIFEST,
    MANIFEST,
    MOST_MEMBERS,
    SUMS,
    ArchiveFolder,
    Member,
    Part,
    Strict,
    members,
    new_file,
    receive,
    sums_of,
    sums_text,
    sync_folder,
)
from corral.verbs.archives.passphrase import MARK, MARKS, decrypted, encrypt, seal, unseal

RENDERING = "rendering/"
STATES = "states/"
SECRETS = "secrets.sealed"
SEAL = "SHA256SUMS.sealed"
# Bytes of all files that are read into memory: everything but the states of services.
LARGEST_FILES = 256 << 20
# Bytes after the last member: tar fills up its last record.
LONGEST_END = 1 << 20
LONGEST_SEAL = 64 << 10
SPEED_NOT_SIZE = 6
_LISTS = {SUMS: "list of checksums", MANIFEST: "manifest"}


class SavedState(Strict):
    """A service's state and the member that holds it."""

    host: Name
    service: Name
    name: str
    purpose: str
    image: str
    member: PathBelow


def _few(value: Any) -> Any:
    """Refuse a mapping of too many members before each of them is looked at."""
    if isinstance(value, Mapping) and len(value) > MOST_MEMBERS:
        raise ValueError(f"has more than {MOST_MEMBERS} files")
    return value


class Manifest(Strict):
    """What a backup is of, and what is in it."""

    format: Literal["corral-backup/1", "corral-backup/2", "corral-backup/3"]
    """1: only the secrets are encrypted. 1 and 2: the manifest is the first member and has the checksums."""
    corral: str
    site: str
    made: datetime
    hosts: Annotated[tuple[Name, ...], FailFast()]
    has_secrets: bool
    secret_names: Mapping[Name, tuple[str, ...]]
    """Names by host; the values are in the encrypted member, if anywhere."""
    images: Mapping[str, Mapping[str, str]]
    """Id of every image by name and host."""
    states: Annotated[tuple[SavedState, ...], FailFast()]
    members: Annotated[Mapping[PathBelow, Member], BeforeValidator(_few)] = {}
    """Every file; added while an archive of format 3 is read."""


@dataclass(frozen=True, slots=True)
class Backup:
    """An archive that is whole, and what is in it."""

    path: Path
    manifest: Manifest
    # The checksum of the list of checksums: another backup has another one.
    mark: str
    # Whether all of it is authenticated by the passphrase.
    is_authentic: bool
    files: Mapping[str, bytes]
    # Where the states of services were laid, by member.
    states: Mapping[str, Path] = field(default_factory=dict)

    @property
    def rendering(self) -> dict[str, bytes]:
        """The rendered tree by path, as `render` makes it."""
        return {name.removeprefix(RENDERING): data for name, data in self.files.items() if name.startswith(RENDERING)}


@dataclass(frozen=True, slots=True)
class Sealing:
    """How an archive is protected."""

    passphrase: str
    # Whether it stays readable without the passphrase; what it says is authenticated all the same.
    is_plain: bool = False


# --- writing one -----------------------------------------------------------------------------------------------------


def write_archive(target: Path, parts: ArchiveFolder, manifest: Manifest, sealing: Sealing | None) -> None:
    """Make the archive of gathered files, and give it its name when it is on the disk.

    Args:
        target: the archive's name, on the disk of the gathered files.
        parts: the files, without the archive's own records; they are deleted.
        manifest: what it says of them.
        sealing: what protects it.

    Raises:
        OSError: the disk refuses; the target is not there then.
        CorralError: the target has come into being meanwhile.
    """
    parts.add_file(MANIFEST, manifest.model_dump_json(indent=1, exclude={"members"}).encode() + b"\n")
    listed = sums_text(parts.sums)
    parts.add_file(SUMS, listed)
    first = [SUMS]
    if sealing is not None and sealing.is_plain:
        parts.add_file(SEAL, seal(hashlib.sha256(listed).hexdigest().encode(), sealing.passphrase))
        first.append(SEAL)
    draft, sealed = parts.folder / ".archive", parts.folder / ".archive.sealed"
    with new_file(draft) as file, gzip.GzipFile("", "wb", SPEED_NOT_SIZE, file, mtime=0) as zipped:
        parts.pack(zipped, *first)
    for name in parts.sums:  # room for the encrypted copy
        (parts.folder / name).unlink()
    if sealing is not None and not sealing.is_plain:
        with draft.open("rb") as archive, new_file(sealed) as file:
            encrypt(archive, file, sealing.passphrase)
        sealed.replace(draft)
    try:
        os.link(draft, target)  # unlike a renaming, never over a file that is there
    except FileExistsError:
        raise CorralError(f"{target}: is there already; name another file") from None
    sync_folder(target.parent)


# --- reading one -----------------------------------------------------------------------------------------------------


# Gets the passphrase, when an archive wants one.
Asking = Callable[[], str]


def read_backup(path: Path, ask: Asking, folder: Path | None = None) -> Backup:
    """The backup in a file, every byte of it checked.

    Args:
        path: what `backup` made.
        ask: gets the passphrase; not called for archives without any, or of which only the secrets are encrypted.
        folder: where the states of services are laid as they are checked; without one they are only checked.

    Raises:
        WrongPassphraseError: it does not open with this passphrase.
        CorralError: it is damaged, cut off, too large or no backup.
    """
    with _in_plain_words(path), path.open("rb") as file:
        if file.readline(len(MARK)) not in MARKS:
            file.seek(0)
            return _Reading(path, ask, folder).read(file)
        with decrypted(file, ask()) as inside:
            return _Reading(path, ask, folder, is_authentic=True).read(inside)


@dataclass(slots=True)
class _Reading:
    """An archive that is being read."""

    path: Path
    ask: Asking
    folder: Path | None
    is_authentic: bool = False
    sums: Mapping[str, str] = field(default_factory=dict)
    mark: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    states: dict[str, Path] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    room: int = LARGEST_FILES

    def read(self, file: IO[bytes]) -> Backup:
        """All of it, from its first to its last byte."""
        with gzip.GzipFile(fileobj=file) as zipped:
            if file.peek(1) == b"":  # type: ignore[attr-defined]
                raise _foreign(self.path)
            parts = members(zipped)
            self._take_list(next(parts, None))
            for part in parts:
                self._take(part)
            if len(zipped.read(LONGEST_END + 1)) > LONGEST_END:  # reading it checks the checksum of all
                raise _damaged(self.path, "something follows its end")
        return self._backup()

    def _backup(self) -> Backup:
        missing = sorted(self.sums.keys() - self.members.keys())
        if missing:
            raise _damaged(self.path, f"{missing[0]} is not in it")
        manifest = self._parsed(self.files.pop(MANIFEST))
        states = {name for name in self.members if name.startswith(STATES)}
        lost = [state.member for state in manifest.states if state.member not in states]
        if lost:
            raise _damaged(self.path, f"{lost[0]} is not in it")
        listed = {name: member for name, member in self.members.items() if name not in {MANIFEST, legacy.END}}
        manifest = manifest.model_copy(update={"members": listed})
        return Backup(self.path, manifest, self.mark, self.is_authentic, self.files, self.states)

    def _take_list(self, part: Part | None) -> None:
        """Read the first member, which has the checksums of all others."""
        if part is None or part.name not in _LISTS:
            raise _foreign(self.path)
        if part.size > LARGEST_MANIFEST:
            raise _damaged(self.path, f"its {_LISTS[part.name]} has no end")
        text = part.data.read()
        self.mark = hashlib.sha256(text).hexdigest()
        if part.name == MANIFEST:
            self.files[MANIFEST], self.members[MANIFEST] = text, Member(sha256=self.mark, size=len(text))
            self.sums = legacy.backup_sums(self._parsed(text), self.mark)
            return
        try:
            self.sums = sums_of(text)
        except ValueError as error:
            raise _damaged(self.path, str(error)) from None

    def _parsed(self, text: bytes) -> Manifest:
        if len(text) > LARGEST_MANIFEST:
            raise _damaged(self.path, "its manifest has no end")
        try:
            return from_json(Manifest, text)
        except ValueError as error:
            words = f"its manifest cannot be read ({error}); it is damaged, or a newer corral made it"
            raise CorralError(f"{self.path}: {words}") from None

    def _take(self, part: Part) -> None:
        """Check a member and keep it: in memory, or the state of a service in the folder."""
        if part.name in {SEAL, legacy.SEAL} and not self.is_authentic:
            if unseal(part.data.read(LONGEST_SEAL), self.ask()) != self.mark.encode():
                raise _damaged(self.path, "its manifest is not the one that was sealed with the passphrase")
            self.is_authentic = True
            return
        if part.name in self.members:
            raise _damaged(self.path, f"{part.name} is in it twice")
        if part.name not in self.sums:
            raise _damaged(self.path, f"{part.name} is not in its manifest")
        member = self._state(part) if part.name.startswith(STATES) else self._file(part)
        if member.sha256 != self.sums[part.name]:
            raise _damaged(self.path, f"{part.name} is not what it was when the backup was made")
        self.members[part.name] = member

    def _file(self, part: Part) -> Member:
        self.room -= part.size
        if part.size > LARGEST_FILE or self.room < 0:
            words = f"at most {LARGEST_FILE >> 20} MiB each and {LARGEST_FILES >> 20} MiB together are read"
            raise _damaged(self.path, f"its files are too large: {words}")
        data = self.files[part.name] = part.data.read()
        return Member(sha256=hashlib.sha256(data).hexdigest(), size=part.size)

    def _state(self, part: Part) -> Member:
        if self.folder is None:
            return receive(part.data)
        if part.size > shutil.disk_usage(self.folder).free:
            words = f"{part.name} in it takes {part.size >> 20} MiB, which {self.folder} has not free"
            raise CorralError(f"{self.path}: {words}; nothing was changed")
        place = self.states[part.name] = self.folder / str(len(self.states))
        with new_file(place) as file:
            return receive(part.data, file)


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


def _damaged(path: Path, why: str) -> CorralError:
    return CorralError(f"{path}: damaged: {why}; use another backup")


def _foreign(path: Path) -> CorralError:
    return CorralError(f"{path}: is no backup that corral made")
