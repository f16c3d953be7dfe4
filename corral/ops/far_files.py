"""Model files on a host behind ssh: looked at, read and written with what every Linux has; nothing of ours is there."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from corral.errors import CorralError
from corral.ops.hosts import ComposeHost

CHUNK = 1 << 20
READ_LIMIT_S = 7200
SPARE_KIB = 256 * 1024

_SIZE = 'cd "$1" 2>/dev/null && [ -f "$2" ] && wc -c <"$2"; exit 0'
_SUM = 'cd "$1" 2>/dev/null && [ -f "$2" ] && sha256sum -b -- "$2"; exit 0'
_ROOM = """
folder=$1
while [ ! -d "$folder" ]; do
  case $folder in
    /*/*|[!/]*/*) folder=${folder%/*} ;;
    /*) folder=/ ;;
    *) folder=. ;;
  esac
done
df -Pk -- "$folder" | tail -n 1
"""
_SEND = 'umask 022; mkdir -p -- "$1" && cd "$1" && mkdir -p -- "$(dirname -- "$2")" && cat >>"$2"'
_SETTLE = """
cd "$1" || exit 1
found=$(sha256sum -b -- "$2") || exit 1
if [ "${found%% *}" != "$4" ]; then rm -f -- "$2"; echo "its checksum is ${found%% *}" >&2; exit 3; fi
sync -- "$2" 2>/dev/null || sync
mv -f -- "$2" "$3" && { sync -- . 2>/dev/null || sync; }
"""


@dataclass(frozen=True, slots=True)
class FarFolder:
    """The models folder of a host behind ssh."""

    host: ComposeHost
    folder: str

    def __str__(self) -> str:
        """The folder as people find it."""
        return f"{self.host.ssh}:{self.folder}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        words = self._ask(_SIZE, name).strip()
        return int(words) if words.isdecimal() else None

    def checksum(self, name: str, stop: threading.Event) -> str:
        """The sha256 of a file, computed there; empty when it is not there."""
        if stop.is_set():
            raise KeyboardInterrupt
        return self._ask(_SUM, name, limit_s=READ_LIMIT_S).partition(" ")[0]

    def check_room(self, size: int, name: str) -> None:
        """Raises CorralError when a file of that many bytes does not fit."""
        fields = self._ask(_ROOM, "").split()
        is_told = len(fields) > 3 and fields[3].isdecimal()  # noqa: PLR2004 - the fourth column says what is free
        free = (int(fields[3]) - SPARE_KIB) * 1024 if is_told else size
        if size > free:
            words = f"{name} has {size / 2**30:.1f} GiB, {max(0, free) / 2**30:.1f} GiB are free"
            raise CorralError(f"{self}: {words}; nothing was fetched")

    def send(self, path: Path, name: str, sha256: str, stop: threading.Event, told: Callable[[int], None]) -> None:
        """Brings a file there, on from where an earlier call stopped; it gets its name after its checksum was right."""
        folder, slash, last = name.rpartition("/")
        part = f"{folder}{slash}.{last}.{sha256[:16]}.part"
        there = self.size(part) or 0
        if there > path.stat().st_size:
            self._ask('rm -f -- "$1/$2"', part)
            there = 0
        self._stream(path, part, there, stop, told)
        done = self.host.run(
            ["sh", "-c", _SETTLE, "-", self.folder, part, name, sha256], check=False, limit_s=READ_LIMIT_S
        )
        if done.code != 0:
            raise CorralError(f"{self}: {name} did not arrive whole: {done.words}; run it again")

    def _stream(self, path: Path, part: str, there: int, stop: threading.Event, told: Callable[[int], None]) -> None:
        words = self.host.argv(["sh", "-c", _SEND, "-", self.folder, part])
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe) as far:
            _pour(path, there, far, stop, told)
            said = far.stderr.read().decode(errors="replace").strip() if far.stderr else ""
            code = far.wait()
        if stop.is_set():
            raise KeyboardInterrupt
        if code != 0:
            raise CorralError(f"{self}: {path.name} cannot be written: {said}; run it again, it goes on")

    def _ask(self, script: str, name: str, *, limit_s: float = 120) -> str:
        return self.host.run(["sh", "-c", script, "-", self.folder, name], limit_s=limit_s).out


def _pour(
    path: Path, there: int, far: subprocess.Popen[bytes], stop: threading.Event, told: Callable[[int], None]
) -> None:
    """Writes a file from a place on into a program, until its end, the program's end, or the signal to stop."""
    assert far.stdin is not None  # noqa: S101 - it was asked for
    with suppress(BrokenPipeError), far.stdin, path.open("rb") as file:
        file.seek(there)
        while not stop.is_set() and (piece := file.read(CHUNK)):
            far.stdin.write(piece)
            there += len(piece)
            told(there)
