"""Rendered trees on disk: what would change, and writing it so that a killed run loses nothing.

Every host folder has a manifest of what the kit wrote there. Files that differ from it were edited by hand: they are
reported and kept, unless forced. A write is staged first, then recorded in a journal, then put in place; a journal
found at the next start is carried out to its end, so the tree is the old one or the new one. Symbolic links below the
output folder are never followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from corral.errors import CorralError
from corral.file_names import is_below

MANIFEST = ".manifest.json"
JOURNAL = ".corral-journal.json"
STAGING = ".corral-staging"
WRITERS = 16
"""Files that are brought to the disk at the same time: a file system takes about as long for one as for many."""
Action = Literal["create", "update", "identical", "remove", "edited"]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one file; `edited` means that somebody else changed or made it."""

    action: Action
    path: str
    old: bytes | None = None
    new: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Journal:
    """A decided change: staged files with the places they go to, and what goes away."""

    moves: tuple[tuple[str, str], ...]
    removals: tuple[str, ...]


# --- what a caller asks for ------------------------------------------------------------------------------------------


def compare(tree: Mapping[str, bytes], out: Path, hosts: set[str] | None = None) -> list[Change]:
    """What writing the tree would do to every file below `out`; only for the given hosts if any are given."""
    wanted = {path: data for path, data in tree.items() if hosts is None or _host_of(path) in hosts}
    known = _manifests(out, hosts)
    paths = sorted(wanted.keys() | known.keys())
    _refuse_links(out, paths)
    changes = [_change(out, path, wanted.get(path), known.get(path)) for path in paths]
    return [change for change in changes if change is not None]


def write(tree: Mapping[str, bytes], out: Path, hosts: set[str] | None = None, *, force: bool = False) -> list[Change]:
    """Makes the disk agree with the tree and returns what was done; edited files stay unless forced.

    Raises:
        CorralError: the folder cannot be written, somebody else is writing, or the kit's own records are damaged.
    """
    with _explained(out):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _recover(out)
            changes = compare(tree, out, hosts)
            kept = {change.path for change in changes if change.action == "edited" and not force}
            todo = {
                change.path: change.new
                for change in changes
                if change.action != "identical" and change.path not in kept
            }
            todo |= _manifest_changes(tree, out, hosts, kept)
            if todo:
                _commit(out, todo)
    return changes


def finish_interrupted(out: Path) -> bool:
    """Carries out what a killed run had already decided; whether there was something."""
    if not (out / JOURNAL).exists() and not (out / STAGING).exists():
        return False
    with _explained(out), locked(out):
        return _recover(out)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer at a time below a folder; raises CorralError at once when there is another one."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CorralError(f"{out}: another corral is writing here; wait for it to end") from None
    finally:
        os.close(descriptor)


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# --- comparing -------------------------------------------------------------------------------------------------------


def _change(out: Path, path: str, new: bytes | None, recorded: str | None) -> Change | None:
    old = _read(out / path)
    if old == new:
        return None if new is None else Change("identical", path, old, new)
    if old is None:
        return Change("create", path, None, new)
    if digest(old) != recorded:
        return Change("edited", path, old, new)
    return Change("remove" if new is None else "update", path, old, new)


def _read(path: Path) -> bytes | None:
    """A file's content; a symbolic link's is where it points to, so that it never passes for a rendered file."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return f"symbolic link to {path.readlink()}\n".encode(errors="surrogateescape")
        if stat.S_ISREG(mode):
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CorralError(f"{path}: cannot be read: {error.strerror}") from None
    what = "a folder" if stat.S_ISDIR(mode) else "something that is not a file"
    raise CorralError(f"{path}: {what} stands where a file is rendered; move it away")


def _refuse_links(out: Path, paths: Iterable[str]) -> None:
    """Raises CorralError when a folder between `out` and one of the paths is a symbolic link."""
    for folder in sorted(_folders(paths)):
        if (out / folder).is_symlink():
            raise CorralError(f"{out / folder}: a symbolic link stands where a folder is rendered; move it away")


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder that the paths lie in, relative like them."""
    found: set[str] = set()
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


def _host_of(path: str) -> str:
    return path.partition("/")[0]


# --- manifests -------------------------------------------------------------------------------------------------------


def _manifests(out: Path, hosts: set[str] | None) -> dict[str, str]:
    """Hash of every file that the kit wrote, by path below `out`."""
    found: dict[str, str] = {}
    for manifest in sorted(out.glob(f"*/{MANIFEST}")):
        host = manifest.parent.name
        if hosts is None or host in hosts:
            found |= {f"{host}/{path}": value for path, value in _read_manifest(manifest).items()}
    return found


def _read_manifest(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())
    except OSError as error:
        raise CorralError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        files = None
    if not isinstance(files, dict) or not all(isinstance(value, str) and is_below(key) for key, value in files.items()):
        raise CorralError(f"{path}: damaged; restore it from git, or remove it and render with --force")
    return files


def _manifest_changes(
    tree: Mapping[str, bytes], out: Path, hosts: set[str] | None, kept: set[str]
) -> dict[str, bytes | None]:
    """Manifests that have to be written, or removed with the last file of their host.

    Files that are kept as they are keep their old entry, so that they stay known as edited.
    """
    known = _manifests(out, hosts)
    entries: dict[str, dict[str, str]] = {_host_of(path): {} for path in known}
    for path, data in tree.items():
        if path not in kept and (hosts is None or _host_of(path) in hosts):
            entries.setdefault(_host_of(path), {})[path.partition("/")[2]] = digest(data)
    for path in kept & known.keys():
        entries[_host_of(path)][path.partition("/")[2]] = known[path]
    wanted = {f"{host}/{MANIFEST}": _manifest_text(files) for host, files in entries.items()}
    return {path: data for path, data in wanted.items() if _read(out / path) != data}


def _manifest_text(files: Mapping[str, str]) -> bytes | None:
    return (json.dumps(files, indent=0, sort_keys=True) + "\n").encode() if files else None


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns failures of the file system into words that say what state the tree is in."""
    try:
        yield
    except OSError as error:
        place = error.filename or out
        state = "run the same command again to finish" if (out / JOURNAL).exists() else "nothing was changed"
        raise CorralError(f"{place}: cannot be written: {error.strerror}; {state}") from None


def _commit(out: Path, todo: Mapping[str, bytes | None]) -> None:
    """Carries out a change: contents to write by path, None for files that go."""
    contents = {path: data for path, data in todo.items() if data is not None}
    new_folders: list[Path] = []
    try:
        for folder in _missing_folders(out, contents):
            folder.mkdir()
            new_folders.append(folder)
        moves = _stage(out / STAGING, contents)
        removals = [path for path, data in todo.items() if data is None]
        write_atomically(out / JOURNAL, json.dumps({"moves": moves, "removals": removals}).encode(), 0o644)
    except BaseException:
        if not (out / JOURNAL).exists():
            _discard(out, reversed(new_folders))
        raise
    try:
        _recover(out)
    except KeyboardInterrupt:
        _recover(out)  # it takes a moment; stopping here would leave half of each tree until the next run
        raise


def _missing_folders(out: Path, paths: Iterable[str]) -> Iterator[Path]:
    """Folders that are wanted and not there yet, outer ones first; once they are made only renames are left to do."""
    for folder in sorted(_folders(paths)):
        place = out / folder
        if not place.is_dir():
            yield place
        elif not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def _stage(staging: Path, contents: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Brings the contents to the disk beside the tree and returns which staged file goes where."""
    staging.mkdir()
    numbered = list(enumerate(contents.items()))

    def store(item: tuple[int, tuple[str, bytes]]) -> None:
        number, (_, data) = item
        write_file(staging / str(number), data, 0o755 if data.startswith(b"#!") else 0o644)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(store, numbered))
    return [(str(number), path) for number, (path, _) in numbered]


def _discard(out: Path, folders: Iterable[Path] = ()) -> None:
    """Removes what is left of a change that was not decided, or is done; what cannot be removed does no harm."""
    shutil.rmtree(out / STAGING, ignore_errors=True)
    with contextlib.suppress(OSError):
        _draft_of(out / JOURNAL).unlink()
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _recover(out: Path) -> bool:
    """Carries out the journal if there is one, and leaves nothing but the tree; whether there was one."""
    found = _read_journal(out)
    if found is not None:
        _apply(out, found)
    _discard(out)
    return found is not None


def _apply(out: Path, journal: _Journal) -> None:
    _refuse_links(out, [path for _, path in journal.moves] + list(journal.removals))
    for name, path in journal.moves:
        staged = out / STAGING / name
        if staged.exists():  # else it is in place already
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(out / path)
    for path in journal.removals:
        (out / path).unlink(missing_ok=True)
        _remove_empty_folders(out, (out / path).parent)
    (out / JOURNAL).unlink()


def _read_journal(out: Path) -> _Journal | None:
    path = out / JOURNAL
    try:
        found = json.loads(path.read_bytes())
        moves = tuple((str(int(name)), str(target)) for name, target in found["moves"])
        removals = tuple(map(str, found["removals"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        moves, removals = (), ("",)
    if not all(map(is_below, [*(target for _, target in moves), *removals])):
        raise CorralError(f"{path}: damaged; remove it and {out / STAGING}, then render again")
    return _Journal(moves, removals)


def _remove_empty_folders(out: Path, folder: Path) -> None:
    while folder != out:
        try:
            folder.rmdir()
        except OSError:  # not empty, or gone
            return
        folder = folder.parent


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Writes a new file and waits until it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Writes a file so that readers see the old content or the new one; a failure leaves the old one alone."""
    draft = _draft_of(path)
    try:
        write_file(draft, data, mode)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")
