"""Model files on a host: looked at, read and written with what every Linux has, over ssh or here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from corral.errors import CorralError
from corral.runtime.hosts import CommandError, ComposeHost

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


class Content(Protocol):
    """Bytes that can be read from any place on."""

    def seek(self, place: int, /) -> object:
        """Go on at this byte."""

    def read(self, count: int = -1, /) -> bytes:
        """The next bytes; none at the end."""


@dataclass(frozen=True, slots=True)
class FarFolder:
    """The models folder of a host."""

    host: ComposeHost
    folder: str

    def __str__(self) -> str:
        """The folder as people find it."""
        return f"{self.host.ssh}:{self.folder}" if self.host.ssh else self.folder

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        words = self._ask(_SIZE, name).strip()
        return int(words) if words.isdecimal() else None

    def checksum(self, name: str) -> str:
        """The sha256 of a file, computed there; empty when it is not there."""
        return self._ask(_SUM, name, limit_s=READ_LIMIT_S).partition(" ")[0]

    def free(self) -> int | None:
        """Bytes that are free on its disk, all but a reserve; None when the host does not say."""
        fields = self._ask(_ROOM, "").split()
        is_told = len(fields) > 3 and fields[3].isdecimal()  # noqa: PLR2004 - the fourth column says what is free
        return max(0, int(fields[3]) - SPARE_KIB) * 1024 if is_told else None

    def send(self, data: Content, name: str, size: int, sha256: str) -> None:
        """Brings a file there, on from where an earlier call stopped; it gets its name after its checksum was right.

        Args:
            data: what it holds; read from the place on that is not there yet.
            name: its place in the folder.
            size: its bytes.
            sha256: its checksum.

        Raises:
            CorralError: it cannot be written, or arrives damaged, and is removed then.
        """
        folder, slash, last = name.rpartition("/")
        part = f"{folder}{slash}.{last}.{sha256[:16]}.part"
        there = self.size(part) or 0
        if there > size:
            self._ask('rm -f -- "$1/$2"', part)
            there = 0
        data.seek(there)
        try:
            self.host.feed(["sh", "-c", _SEND, "-", self.folder, part], data)
        except CommandError as error:
            words = error.done.words
            raise CorralError(f"{self}: {name} cannot be written: {words}; run it again, it goes on") from None
        done = self.host.run(
            ["sh", "-c", _SETTLE, "-", self.folder, part, name, sha256], check=False, limit_s=READ_LIMIT_S
        )
        if done.code != 0:
            raise CorralError(f"{self}: {name} did not arrive whole: {done.words}; run it again")

    def _ask(self, script: str, name: str, *, limit_s: float = 120) -> str:
        return self.host.run(["sh", "-c", script, "-", self.folder, name], limit_s=limit_s).out
