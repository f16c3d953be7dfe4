"""Rendered trees on disk: what would change, and writing it so that a killed run loses nothing.

Every host folder has a manifest of what the kit wrote there. Files that differ from it were edited by hand: they are
reported and kept, unless forced. A write first records the old and the new hash of what it changes, then replaces one
file after the other, each at once, then records the new hashes alone. Running a killed command again does what is left.
Symbolic links below the output folder are never followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from filelock import lock_descriptor

from corral.config.file_names import is_below
from corral.errors import CorralError
from corral.files import draft_of, write_atomically

MANIFEST = ".manifest.json"
# Files that are brought to the disk at the same time: a file system takes about as long for one as for many.
WRITERS = 16
Action = Literal["create", "update", "identical", "remove", "edited"]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one file; `edited` means that it was changed or made by hand."""

    action: Action
    path: str
    old: bytes | None = None
    new: bytes | None = None


# --- what a caller asks for ------------------------------------------------------------------------------------------


def compare(tree: Mapping[str, bytes], out: Path, hosts: set[str] | None = None) -> list[Change]:
    """What writing the tree would do to every file below `out`; only for the given hosts if any are given."""
    return _changes(out, _of_hosts(tree, hosts), _manifests(out, hosts))


def _of_hosts(tree: Mapping[str, bytes], hosts: set[str] | None) -> Mapping[str, bytes]:
    return tree if hosts is None else {path: data for path, data in tree.items() if _host_of(path) in hosts}


def _changes(out: Path, wanted: Mapping[str, bytes], known: Mapping[str, str]) -> list[Change]:
    """What writing the wanted files would do, where the manifests know these."""
    paths = sorted(wanted.keys() | known.keys())
    for folder in sorted(_folders(paths)):
        if (out / folder).is_symlink():
            raise CorralError(f"{out / folder}: a symbolic link stands where a folder is rendered; move it away")
    changes = (_change(out, path, wanted.get(path), known.get(path, "")) for path in paths)
    return [change for change in changes if change is not None]


def write(tree: Mapping[str, bytes], out: Path, hosts: set[str] | None = None, *, force: bool = False) -> list[Change]:
    """Makes the disk agree with the tree and returns what was done; edited files stay unless forced.

    Raises:
        CorralError: the folder cannot be written, another run is writing, or the kit's own records are damaged.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            wanted, known = _of_hosts(tree, hosts), _manifests(out, hosts)
            changes = _changes(out, wanted, known)
            kept = {change.path for change in changes if change.action == "edited" and not force}
            todo = {item.path: item.new for item in changes if item.action != "identical" and item.path not in kept}
            _put(out, known, todo, _recorded(wanted, known, kept))
    except OSError as error:
        words = f"cannot be written: {error.strerror}; then run the same command again"
        raise CorralError(f"{error.filename or out}: {words}") from None
    return changes


def refuse_unfinished(out: Path) -> None:
    """Raises CorralError when a killed run has left a part of its files below the folder."""
    if any(BOTH in value for value in _manifests(out, None).values()):
        raise CorralError(f"{out}: a command was interrupted while it wrote here; run ./generate.py render first")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer at a time below a folder; raises CorralError at once when there is another one."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not lock_descriptor(descriptor, blocking=False):
            raise CorralError(f"{out}: another corral is writing here; wait for it to end")
        yield
    finally:
        os.close(descriptor)


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# --- comparing -------------------------------------------------------------------------------------------------------


def _change(out: Path, path: str, new: bytes | None, recorded: str) -> Change | None:
    old = _read(out / path)
    if old == new:
        return None if new is None else Change("identical", path, old, new)
    if old is None:
        return Change("create", path, None, new)
    if digest(old) not in recorded.split():
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


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder that the paths lie in, relative like them."""
    nearest = {path.rpartition("/")[0] for path in paths} - {""}
    return {folder for path in nearest for folder in accumulate(path.split("/"), "{}/{}".format)}


def _host_of(path: str) -> str:
    return path.partition("/")[0]


# --- manifests -------------------------------------------------------------------------------------------------------

# Between the old and the new hash of a file that is being written; one is empty where there is no such file.
BOTH = " "


def _manifests(out: Path, hosts: set[str] | None) -> dict[str, str]:
    """Hash of every file that the kit wrote, by path below `out`; both hashes of one that a killed run was to write."""
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


def _recorded(wanted: Mapping[str, bytes], known: Mapping[str, str], kept: set[str]) -> dict[str, str]:
    """Hash of every file that is to be there; those that are kept as edited keep their old one, and so stay known."""
    return {path: digest(data) for path, data in wanted.items() if path not in kept} | {
        path: known[path].rpartition(BOTH)[2] for path in kept & known.keys()
    }


def _put_manifests(out: Path, hosts: Iterable[str], recorded: Mapping[str, str]) -> None:
    """Writes the manifests of these hosts, and removes those without a file."""
    for host in sorted(hosts):
        files = {path.partition("/")[2]: value for path, value in recorded.items() if _host_of(path) == host}
        data = (json.dumps(files, indent=0, sort_keys=True) + "\n").encode() if files else None
        if _read(out / host / MANIFEST) != data:
            _put_file(out, f"{host}/{MANIFEST}", data)


# --- writing ---------------------------------------------------------------------------------------------------------


def _put(out: Path, known: Mapping[str, str], todo: Mapping[str, bytes | None], recorded: Mapping[str, str]) -> None:
    """Carries out a change: contents to write by path, None for files that go."""
    hosts = {_host_of(path) for path in (*known, *recorded)}
    _remove_drafts(out, known)
    if todo:
        both = {path: f"{known.get(path, '')}{BOTH}{recorded.get(path, '')}" for path in todo}
        _make_folders(out, [path for path, data in todo.items() if data is not None])
        _put_manifests(out, hosts, {**known, **recorded, **both})
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda item: _put_file(out, *item), todo.items()))
    _put_manifests(out, hosts, recorded)


def _remove_drafts(out: Path, known: Mapping[str, str]) -> None:
    """Removes what a killed run has not finished."""
    for path in (path for path, value in known.items() if BOTH in value):
        draft_of(out / path).unlink(missing_ok=True)
    for draft in out.glob(f"*/{draft_of(Path(MANIFEST))}"):
        draft.unlink()


def _make_folders(out: Path, paths: Iterable[str]) -> None:
    """Makes the folders of the paths; where one cannot be made, none stay."""
    made = [out / folder for folder in sorted(_folders(paths)) if not (out / folder).is_dir()]
    try:
        for place in made:
            place.mkdir()
    except BaseException:
        for place in reversed(made):
            with suppress(OSError):
                place.rmdir()
        raise


def _put_file(out: Path, path: str, data: bytes | None) -> None:
    """Writes one file, or removes it with the folders that it leaves empty."""
    place = out / path
    if data is not None:
        write_atomically(place, data, 0o755 if data.startswith(b"#!") else 0o644)
        return
    place.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or gone
        for folder in place.parents[: path.count("/")]:
            folder.rmdir()
