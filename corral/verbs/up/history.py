"""Renderings that once came up well, kept so that one can go back: `<out>/.history/<host>/<number>-<hash>.tar.gz`.

Each has the inventory that it was made of. Neither contains secrets. The folder is not for git: it says what was done
from this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from corral.errors import CorralError
from corral.files import write_atomically
from corral.render.output import compare, digest
from corral.verbs.archives.container import packed, unpacked

FOLDER = ".history"
# When each host was last saved by `backup`, in seconds since 1970.
BACKUPS = "backups.json"
KEPT = 5
# Name of the inventory among a host's files.
INVENTORY = ".inventory.yaml"
_NAME = re.compile(r"(\d{6})-([0-9a-f]{16})\.tar\.gz")


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept rendering of a host."""

    number: int
    hash: str
    path: Path


def rendering_hash(files: Mapping[str, bytes]) -> str:
    """Short hash of a host's rendering: paths below the host's folder, and contents; the inventory does not count."""
    total = hashlib.sha256()
    for path, data in sorted(files.items()):
        if path != INVENTORY:
            total.update(f"{path}\0{digest(data)}\n".encode())
    return total.hexdigest()[:16]


def files_on_disk(out: Path, host: str) -> dict[str, bytes]:
    """A host's rendering as it lies there, by path below its folder; what was edited by hand among it."""
    known = compare({}, out, {host})
    return {change.path.removeprefix(f"{host}/"): change.old for change in known if change.old is not None}


def entries(out: Path, host: str) -> list[Entry]:
    """What is kept of a host, oldest first."""
    found = [(match, path) for path in (out / FOLDER / host).glob("*") if (match := _NAME.fullmatch(path.name))]
    return sorted((Entry(int(match[1]), match[2], path) for match, path in found), key=lambda entry: entry.number)


def record(out: Path, host: str, files: Mapping[str, bytes], inventory: str) -> Entry:
    """Keep a rendering and its inventory as the newest entry; of equal ones and of more than KEPT the oldest go."""
    known = entries(out, host)
    name = rendering_hash(files)
    if known and known[-1].hash == name:
        return known[-1]
    number = known[-1].number + 1 if known else 1
    entry = Entry(number, name, out / FOLDER / host / f"{number:06}-{name}.tar.gz")
    _write(out, entry.path, packed({**files, INVENTORY: inventory.encode()}))
    kept = [old for old in known if old.hash != name][1 - KEPT :]
    for old in known:
        if old not in kept:
            old.path.unlink(missing_ok=True)
    return entry


def note_backup(out: Path, hosts: Iterable[str], when: float) -> None:
    """Record when these hosts were backed up."""
    known = last_backups(out) | dict.fromkeys(hosts, when)
    _write(out, out / FOLDER / BACKUPS, (json.dumps(known, sort_keys=True) + "\n").encode())


def _write(out: Path, path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (out / FOLDER / ".gitignore").exists():
            write_atomically(out / FOLDER / ".gitignore", b"*\n", 0o644)
        write_atomically(path, data, 0o644)
    except OSError as error:
        raise CorralError(f"{error.filename or path}: cannot be written: {error.strerror}") from None


def last_backups(out: Path) -> dict[str, float]:
    """When each host was last saved; without those that never were."""
    with suppress(OSError, ValueError):
        found = json.loads((out / FOLDER / BACKUPS).read_bytes())
        if isinstance(found, dict):
            return {str(host): float(when) for host, when in found.items()}
    return {}


def before(out: Path, host: str, now: Mapping[str, bytes]) -> Entry | None:
    """The newest kept rendering that is not the one given; None when there is none."""
    name = rendering_hash(now)
    return next((entry for entry in reversed(entries(out, host)) if entry.hash != name), None)


def load(entry: Entry) -> dict[str, bytes]:
    """A kept rendering, with its inventory; raises CorralError when its file is damaged."""
    try:
        files = unpacked(entry.path.read_bytes())
    except (OSError, tarfile.TarError) as error:
        raise CorralError(f"{entry.path}: cannot be read: {error}") from None
    if rendering_hash(files) != entry.hash:
        raise CorralError(f"{entry.path}: damaged: its content is not what its name says")
    return files
