"""Model files on a host: looked at, read and written with what every Linux has, over ssh or here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from corral.config.model_lock import LockedFile
from corral.errors import CorralError
from corral.runtime.hosts import CommandError, ComposeHost
from corral.verbs.models.fetch import Net, Progress, pieces

READ_LIMIT_S = 7200
SPARE_KIB = 256 * 1024

# Gets what is to be done, a folder, a name below it, and for `settle` the name that the file gets and its checksum.
SCRIPT = Path(__file__).with_name("far_folder.sh").read_text(encoding="utf-8")


class Chunks:
    """Pieces of bytes as a file that `ComposeHost.feed` reads."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = filter(None, pieces)

    def read(self, _count: int = -1) -> bytes:
        """The next piece, of any length; none at the end."""
        return next(self._pieces, b"")


@dataclass(frozen=True, slots=True)
class FarFolder:
    """The models folder of a host. A whole path as a name is a file in a store, which stays as it is."""

    host: ComposeHost
    folder: str

    def __str__(self) -> str:
        """The folder as people find it."""
        return f"{self.host.ssh}:{self.folder}" if self.host.ssh else self.folder

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        words = self._ask("size", name).strip()
        return int(words) if words.isdecimal() else None

    def last_read(self, _name: str) -> None:
        """Nothing: what was read on a host is not noted there."""

    def checksum(self, name: str, _net: Net | None = None, _progress: Progress | None = None) -> str:
        """The sha256 of a file, computed there; empty when it is not there."""
        return self._ask("sum", name, limit_s=READ_LIMIT_S).partition(" ")[0]

    def text(self, name: str) -> str:
        """What a small file says; empty when it cannot be read."""
        return self._ask("text", name)

    def real(self, name: str) -> str:
        """Where a file lies once every link is followed."""
        return self._ask("real", name).strip()

    @contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """A file, to be read from its beginning, and not to its end."""
        with suppress(CommandError), self.host.stream(self._words("all", name)) as data:
            yield data

    def free(self) -> int | None:
        """Bytes that are free on its disk, all but a reserve; None when the host does not say."""
        words = self._ask("room").strip()
        return max(0, int(words) - SPARE_KIB) * 1024 if words.isdecimal() else None

    def disk(self) -> tuple[str, int | None]:
        """Which disk it is on, and how many bytes are free there, all but a reserve."""
        return str(self), self.free()

    def put(self, source: Path, known: LockedFile, net: Net, progress: Progress) -> None:
        """Copies a file of this machine there; raises CorralError as `send` does."""
        self.send(partial(pieces, source, net, progress), known.file, known.size, known.sha256)

    def send(self, data: Callable[[int], Iterable[bytes]], name: str, size: int, sha256: str) -> None:
        """Brings a file there, on from where an earlier call stopped; it gets its name after its checksum was right.

        Args:
            data: what it holds from a byte on: the first one that is not there yet.
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
            self._ask("remove", part)
            there = 0
        try:
            self.host.feed(self._words("append", part), Chunks(data(there)))
        except CommandError as error:
            words = error.done.words
            raise CorralError(f"{self}: {name} cannot be written: {words}; run it again, it goes on") from None
        command = self._words("settle", part, name, sha256)
        done = self.host.run(command, check=False, limit_s=READ_LIMIT_S)
        if done.code != 0:
            raise CorralError(f"{self}: {name} did not arrive whole: {done.words}; run it again")

    def _ask(self, action: str, name: str = ".", *, limit_s: float = 120) -> str:
        return self.host.run(self._words(action, name), limit_s=limit_s).out

    def _words(self, action: str, name: str, *further: str) -> list[str]:
        folder = "/" if name.startswith("/") else self.folder
        return ["sh", "-c", SCRIPT, "-", action, folder, name, *further]
