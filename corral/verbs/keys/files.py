"""Key files: one for each consumer, readable by its owner only."""

from __future__ import annotations

from pathlib import Path

from corral.errors import CorralError
from corral.files import sync_folder, write_atomically

# Ends the name of a hidden file with the new key of a rotation that has not ended.
NEXT = ".next"


class KeyFiles:
    """A folder (mode 0700) with one file (0600) for each key; a file holds the key and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The file of a key."""
        return self.folder / name

    def next_path(self, name: str) -> Path:
        """The file of the new key while a rotation runs."""
        return self.folder / f".{name}{NEXT}"

    def values(self) -> dict[str, str]:
        """The keys by name."""
        return {path.name: _read(path) for path in self._files() if not path.name.startswith(".")}

    def begun(self) -> dict[str, str]:
        """New keys of rotations that have not ended, by name."""
        found = {path.name[1:].removesuffix(NEXT): path for path in self._files()}
        return {name: _read(path) for name, path in found.items() if path == self.next_path(name)}

    def write(self, path: Path, value: str) -> None:
        """Writes a key; it is on the disk when this returns."""
        self._files()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            write_atomically(path, value.encode(), 0o600)
            sync_folder(self.folder)
        except OSError as error:
            raise CorralError(f"{path}: cannot be written: {error.strerror}; no key was made") from None

    def finish(self, name: str) -> None:
        """Replaces a key's file by that of its successor."""
        self.next_path(name).replace(self.path(name))
        sync_folder(self.folder)

    def _files(self) -> list[Path]:
        if self.folder.is_symlink():
            raise CorralError(f"{self.folder}: the folder of keys is a symbolic link; move it away")
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise CorralError(f"{path}: cannot be read as a key; remove it") from None
