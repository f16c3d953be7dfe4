"""A backup's file: what its manifest says, how it is written, and how every byte of it is checked.

With a passphrase the whole file is encrypted. Where it is to stay readable (`--plain`), the encrypted checksum of
`SHA256SUMS` is its second member instead.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tarfile import ReadError
from typing import IO, Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast
from rich.text import Text

from corral.config.file_names import PathBelow
from corral.config.inventory import Name
from corral.errors import CorralError
from corral.files import new_file, sync_folder
from corral.verbs.archives import container
from corral.verbs.archives.container import MANIFEST, SUMS, ArchiveFolder, Member, Part, Strict, receive
from corral.verbs.archives.passphrase import MARK, MARKS, decrypted, encrypt, seal, unseal

RENDERING = "rendering/"
STATES = "states/"
SECRETS = "secrets.sealed"
SEAL = "SHA256SUMS.sealed"
# Of formats 1 and 2: the encrypted checksum of the manifest, and the last member, which has that checksum, too.
OLD_SEAL, OLD_END = "manifest.sealed", "manifest.sha256"
# Bytes after the last member: tar fills up its last record.
LONGEST_END = 1 << 20
LONGEST_SEAL = 64 << 10
SPEED_NOT_SIZE = 6


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
    if isinstance(value, Mapping) and len(value) > container.MOST_MEMBERS:
        raise ValueError(f"has more than {container.MOST_MEMBERS} files")
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
    parts.add(MANIFEST, manifest.model_dump_json(indent=1, exclude={"members"}).encode() + b"\n")
    parts.add(SUMS, container.sums_text(parts.sums))
    first = [SUMS]
    if sealing is not None and sealing.is_plain:
        parts.add(SEAL, seal(parts.sums[SUMS].encode(), sealing.passphrase))
        first.append(SEAL)
    draft, sealed = parts.folder / ".archive", parts.folder / ".archive.sealed"
    with new_file(draft, 0o600) as file, gzip.GzipFile("", "wb", SPEED_NOT_SIZE, file, mtime=0) as zipped:
        parts.pack(zipped, *first)
    for name in parts.sums:  # room for the encrypted copy
        (parts.folder / name).unlink()
    if sealing is not None and not sealing.is_plain:
        with draft.open("rb") as archive, new_file(sealed, 0o600) as file:
            encrypt(archive, file, sealing.passphrase)
        sealed.replace(draft)
    try:
        os.link(draft, target)  # unlike a renaming, never over a file that is there
    except FileExistsError:
        raise CorralError(f"{target}: is there already; name another file") from None
    sync_folder(target.parent)


# --- reading one -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Backup:
    """An archive, of which every byte is checked while it is read."""

    path: Path
    # Whether all of it is authenticated by the passphrase.
    is_authentic: bool = False
    # The checksum of the list of checksums: another backup has another one.
    mark: str = ""
    sums: Mapping[str, str] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    # The content of all but the states of services.
    files: dict[str, bytes] = field(default_factory=dict)
    # Where the states of services were laid, by member.
    states: dict[str, Path] = field(default_factory=dict)
    # Bytes of further files that are read into memory.
    room: int = container.LARGEST_FILES
    manifest: Manifest = field(init=False)

    def summary(self) -> Text:
        """One line about what is whole."""
        manifest = self.manifest
        secrets = "with secrets" if manifest.has_secrets else "without secrets"
        trust = "; NOT AUTHENTICATED: a program that could write to the file may have changed it"
        message = (
            f"{self.path}: whole; site {manifest.site} ({', '.join(manifest.hosts)}), made "
            f"{manifest.made:%Y-%m-%d %H:%M:%S} UTC by corral {manifest.corral}, {secrets}"
        )
        return Text(message) if self.is_authentic else Text(f"{message}{trust}", "yellow")


def read_backup(path: Path, ask: Callable[[], str], folder: Path | None = None) -> Backup:
    """The backup in a file, every byte of it checked.

    Args:
        path: what `backup` made.
        ask: gets the passphrase; not called for archives without any, or of which only the secrets are encrypted.
        folder: where the states of services are laid as they are checked; without one they are only checked.

    Raises:
        WrongPassphraseError: it does not open with this passphrase.
        CorralError: it is damaged, cut off, too large or no backup.
    """
    backup = Backup(path)
    with container.readable(path, "backup", "use another backup"), path.open("rb") as file:
        if file.readline(len(MARK)) in MARKS:
            with decrypted(file, ask()) as inside:
                _read(backup, inside, ask, folder)
            backup.is_authentic = True
        else:
            file.seek(0)
            _read(backup, file, ask, folder)
    return backup


def _read(backup: Backup, file: IO[bytes], ask: Callable[[], str], folder: Path | None) -> None:
    with gzip.GzipFile(fileobj=file) as zipped:
        parts = container.members(zipped)
        _take_list(backup, next(parts, None))
        for part in parts:
            if part.name in {SEAL, OLD_SEAL}:
                if unseal(part.data.read(LONGEST_SEAL), ask()) != backup.mark.encode():
                    raise ReadError("its list of checksums is not the one that was sealed with the passphrase")
                backup.is_authentic = True
            else:
                _take(backup, part, folder)
        if len(zipped.read(LONGEST_END + 1)) > LONGEST_END:  # reading it checks the checksum of all
            raise ReadError("something follows its end")
    backup.manifest = _whole_manifest(backup)


def _take_list(backup: Backup, part: Part | None) -> None:
    """Read the first member, which has the checksums of all others."""
    if part is None or part.name not in {SUMS, MANIFEST}:
        raise ReadError(f"it does not begin with {SUMS}")
    text = part.data.read(container.LARGEST_MANIFEST + 1)
    backup.mark = hashlib.sha256(text).hexdigest()
    if part.name == SUMS:
        backup.sums = container.sums_of(text)
        return
    backup.members[MANIFEST] = Member(sha256=backup.mark, size=part.size)
    backup.files[MANIFEST] = text
    listed = {name: member.sha256 for name, member in container.parsed(Manifest, text).members.items()}
    backup.sums = listed | {OLD_END: hashlib.sha256(f"{backup.mark}\n".encode()).hexdigest()}


def _take(backup: Backup, part: Part, folder: Path | None) -> None:
    """Check a member and keep it: in memory, or the state of a service in the folder."""
    if part.name in backup.members:
        raise ReadError(f"{part.name} is in it twice")
    if part.name.startswith(STATES):
        member = _take_state(backup, part, folder)
    else:
        backup.room -= part.size
        if part.size > container.LARGEST_FILE or backup.room < 0:
            most = f"{container.LARGEST_FILE >> 20} MiB each and {container.LARGEST_FILES >> 20} MiB together"
            raise ReadError(f"its files are too large: at most {most} are read")
        data = backup.files[part.name] = part.data.read()
        member = Member(sha256=hashlib.sha256(data).hexdigest(), size=part.size)
    if backup.sums.get(part.name) != member.sha256:
        raise ReadError(f"{part.name} is not what its list of checksums says")
    backup.members[part.name] = member


def _take_state(backup: Backup, part: Part, folder: Path | None) -> Member:
    if folder is None:
        return receive(part.data)
    if part.size > shutil.disk_usage(folder).free:
        message = f"{part.name} in it takes {container.amount(part.size)}, which {folder} has not free"
        raise CorralError(f"{backup.path}: {message}; nothing was changed")
    place = backup.states[part.name] = folder / str(len(backup.states))
    with new_file(place, 0o600) as file:
        return receive(part.data, file)


def _whole_manifest(backup: Backup) -> Manifest:
    """The manifest with all members; raises ReadError when one that it or the list of checksums has is not there."""
    manifest = container.parsed(Manifest, backup.files.get(MANIFEST, b""))
    states = {name for name in backup.members if name.startswith(STATES)}
    lost = (backup.sums.keys() - backup.members.keys()) | ({state.member for state in manifest.states} - states)
    if lost:
        raise ReadError(f"{min(lost)} is not in it")
    members = {name: member for name, member in backup.members.items() if name not in {MANIFEST, OLD_END}}
    return manifest.model_copy(update={"members": members})
