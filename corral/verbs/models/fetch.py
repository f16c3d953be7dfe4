"""Resumable download of one file, with a check of its length and checksum and an atomic rename.

Bytes go into `<name>.part`, and a note beside it says what they belong to. A broken download goes on where it stopped
if the server still has the same content; the file gets its name only after length and checksum were right and the
bytes are on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from rich.progress import DownloadColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from corral.errors import CorralError
from corral.files import sync_folder, write_atomically
from corral.runtime.lock import alone

HUB, FOLDER = "hf:", "file:"
HUB_ENDPOINT = "https://huggingface.co"
TOKEN = "HF_TOKEN"  # noqa: S105 - its name
CHUNK = 1 << 20
CONNECT_S, SILENCE_S = 10.0, 60.0
# So many attempts in a row may bring nothing before a download is given up.
ATTEMPTS = 5
LONGEST_PAUSE_S = 30.0
# Answers after which it is worth asking again.
BUSY = (408, 425, 429, 500, 502, 503, 504)
OK, PARTIAL, GONE_RANGE = 200, 206, 416
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What is shown of a download.
COLUMNS = (*Bars.get_default_columns(), DownloadColumn(binary_units=True), TransferSpeedColumn())
Found = TypeVar("Found")
# Hears how many bytes are there, and how many it will be; 0: not known.
Progress = Callable[[int, int], None]


class FetchError(CorralError):
    """A file cannot be had; the message names it and says what to do."""


class MissingError(FetchError):
    """The source has no such file."""


class ChecksumError(FetchError):
    """The content is not the one that was expected."""


class _Broken(Exception):
    """A transfer ended too early; worth another attempt."""

    def __init__(self, words: str, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        super().__init__(words)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file comes from."""

    source: str
    # Address on the web; empty for a file on this machine.
    url: str = ""
    # Place on this machine.
    path: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """The source as it may stand in a message: without query, which may hold a signature."""
        return self.source.partition("?")[0]


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of a file's content."""

    # Bytes; 0: not known.
    size: int = 0
    sha256: str = ""
    # Commit of the repository that it was taken from.
    commit: str = ""

    def filled(self, other: Content) -> Content:
        """The same, with what the other says where this one says nothing."""
        return Content(self.size or other.size, self.sha256 or other.sha256, self.commit or other.commit)


@dataclass(slots=True)
class Net:
    """How files are fetched: one client for all, and the signal to stop."""

    client: httpx.Client
    stop: threading.Event = field(default_factory=threading.Event)
    # Pause before the second attempt, in seconds; it doubles.
    pause_s: float = 1.0
    # Connections on which an answer arrives.
    _links: set[socket.socket] = field(default_factory=set)

    def end(self) -> None:
        """Has all downloads end now, also one whose server says nothing."""
        self.stop.set()
        for link in tuple(self._links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def reading(self, response: httpx.Response) -> Iterator[None]:
        """The block reads an answer; `end` breaks it off."""
        link = response.extensions["network_stream"].get_extra_info("socket")
        self._links.add(link)
        try:
            self.check()
            yield
        finally:
            self._links.discard(link)

    def check(self) -> None:
        """Raises KeyboardInterrupt when everything is to end."""
        if self.stop.is_set():
            raise KeyboardInterrupt


def open_client() -> httpx.Client:
    """A client that follows redirects and asks for bytes as they are; httpx sends no login to another host."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
        headers={"Accept-Encoding": "identity", "User-Agent": "corral"},
    )


# --- sources ---------------------------------------------------------------------------------------------------------


def origin_of(source: str, revision: str, environment: Mapping[str, str]) -> Origin | None:
    """Where a source is to be had: on the Hugging Face Hub or its mirror (HF_ENDPOINT), on the web, on this machine.

    None for a bare file name, which a person puts into the models folder. A Hub login (HF_TOKEN) goes to the Hub's own
    host only, never in the clear.
    """
    if source.startswith(HUB):
        owner, repository, file = source.removeprefix(HUB).split("/", 2)
        endpoint, token = _hub(environment)
        url = f"{endpoint}/{owner}/{repository}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"
        return Origin(source, url, headers={"Authorization": f"Bearer {token}"} if token else {})
    if source.startswith(FOLDER):
        return Origin(source, path=Path(source.removeprefix(FOLDER)))
    return Origin(source, source) if "://" in source else None


def _hub(environment: Mapping[str, str]) -> tuple[str, str]:
    """Address of the Hub or its mirror, and the login that may be sent there; an empty one where it may not."""
    from huggingface_hub import get_token

    endpoint = (environment.get("HF_ENDPOINT") or HUB_ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    is_safe = parts.scheme == "https" or parts.hostname in _LOOPBACK
    return endpoint, (environment.get(TOKEN, "").strip() or get_token() or "") if is_safe else ""


def listing(
    source: str, revision: str, environment: Mapping[str, str], offline: Path | None = None
) -> dict[str, Content]:
    """Every file of a repository at a commit, by path; no sha256 for small text files.

    Args:
        source: `hf:owner/repo`.
        revision: the commit.
        environment: HF_ENDPOINT and HF_TOKEN are taken from it.
        offline: a folder with `owner/repo` in it, to be read instead of asking the Hub.

    Raises:
        FetchError: it is not to be had.
    """
    name = source.removeprefix(HUB)
    if offline is not None:
        folder = offline / name
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if not found:
            raise MissingError(f"{source}: there are no files in {folder}")
        return {str(path.relative_to(folder)): Content(path.stat().st_size, "", revision) for path in found}
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    endpoint, token = _hub(environment)
    try:
        tree = list(HfApi(endpoint, token=token or False).list_repo_tree(name, revision=revision, recursive=True))
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        words = f"its files cannot be listed ({_first_line(error)}); is the commit right, and does your login open it"
        words += " (hf auth login, or HF_TOKEN)?"
        raise FetchError(f"{source}: {words} Without network: --from DIR with {name} in it") from None
    files = [item for item in tree if isinstance(item, RepoFile)]
    return {item.path: Content(item.size, item.lfs.sha256 if item.lfs else "", revision) for item in files}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a source begins to send."""

    said: Content
    # Place in the file of the first byte that comes; -1: it has no bytes at the place that was asked for.
    start: int
    # Bytes of the whole file; 0: not known.
    total: int
    # The server's word for this content (a strong ETag, or the time of its last change), for `If-Range`.
    validator: str
    pieces: Iterator[bytes]


def look(origin: Origin, net: Net) -> Content:
    """What the source says of the file: size, and checksum where it knows one; raises FetchError."""

    def ask() -> Content:
        with _asked(origin, net, {"Range": "bytes=0-0"}) as answer:
            return answer.said

    return _patiently(origin, net, ask)


@contextmanager
def stream(origin: Origin, net: Net) -> Iterator[Callable[[int], bytes]]:
    """The file's bytes from its beginning, some with each call; raises FetchError."""
    with _asked(origin, net, {"Range": "bytes=0-"}) as answer:
        yield lambda _length: next(answer.pieces, b"")


@contextmanager
def _asked(origin: Origin, net: Net, headers: Mapping[str, str]) -> Iterator[_Answer]:
    """The source's good answer; _Broken when another attempt is worth it, FetchError when none is."""
    net.check()
    if origin.path is not None:
        with _opened(origin, origin.path) as file:
            size = os.fstat(file.fileno()).st_size
            yield _Answer(Content(size), 0, size, "", iter(lambda: file.read(CHUNK), b""))
        return
    try:
        with net.client.stream("GET", origin.url, headers={**origin.headers, **headers}) as response:
            _refuse(origin, response)
            with net.reading(response):
                yield _answer_of(response)
    except httpx.ConnectError as error:
        raise _Broken(f"cannot be reached ({_first_line(error)})") from None
    except httpx.TimeoutException:
        raise _Broken("does not answer in time") from None
    except httpx.TransportError as error:
        raise _Broken(f"broke off ({_first_line(error)})") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"{origin}: {_first_line(error)}") from None


def _opened(origin: Origin, path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except IsADirectoryError:
        raise MissingError(f"{origin}: is a folder; name the file in it") from None
    except FileNotFoundError:
        raise MissingError(f"{origin}: there is no such file") from None
    except OSError as error:
        raise FetchError(f"{origin}: cannot be read: {error.strerror}") from None


def _refuse(origin: Origin, response: httpx.Response) -> None:
    code = response.status_code
    open_hops = [hop.url for hop in (*response.history, response) if hop.url.scheme != "https"]
    if origin.url.startswith("https:") and open_hops:
        words = f"it leads on to {open_hops[0].host} over http, where nothing protects the file"
        raise FetchError(f"{origin}: {words}; name a source that stays on https")
    if code in BUSY:
        after = response.headers.get("retry-after", "")
        raise _Broken(f"answers {code}", min(LONGEST_PAUSE_S, float(after)) if after.isdecimal() else 0.0)
    if code in (401, 403):
        words = "its owner wants a login: accept the terms on its page, then: hf auth login (or set HF_TOKEN)"
        raise MissingError(f"{origin}: {words if origin.source.startswith(HUB) else f'answers {code}'}")
    if code in (404, 410):
        raise MissingError(f"{origin}: the source has no such file; its page has the names")
    if code not in (OK, PARTIAL, GONE_RANGE):
        raise FetchError(f"{origin}: the server answers {code}")


def _answer_of(response: httpx.Response) -> _Answer:
    hops = [*response.history, response]
    said = {name: hop.headers[name] for hop in reversed(hops) for name in hop.headers}
    linked = said.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
    own = response.headers
    start, total = 0, own.get("content-length", "")
    if response.status_code != OK:
        found = _RANGE.fullmatch(own.get("content-range", ""))
        start, total = (int(found[1]), found[2]) if found else (-1, "")
    etag = own.get("etag", "")
    return _Answer(
        Content(
            _number(said.get("x-linked-size", "")) or _number(total),
            linked if _SHA256.fullmatch(linked) else "",
            said.get("x-repo-commit", ""),
        ),
        start,
        _number(total),
        (not etag.startswith("W/") and etag) or own.get("last-modified", ""),
        response.iter_raw(),
    )


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _patiently(origin: Origin, net: Net, ask: Callable[[], Found], there: Callable[[], int] = lambda: 0) -> Found:
    """Asks until there is an answer; raises FetchError after ATTEMPTS in a row that brought no further bytes."""
    number, furthest = 0, there()
    while True:
        try:
            return ask()
        except _Broken as broken:
            number = 0 if there() > furthest else number + 1
            furthest = max(furthest, there())
            if number + 1 >= ATTEMPTS:
                raise FetchError(
                    f"{origin}: {broken}; check the network (HTTPS_PROXY, HF_ENDPOINT), "
                    "or fetch it elsewhere and use --from DIR; run again, it goes on where it stopped"
                ) from None
            if net.stop.wait(max(broken.pause_s, min(LONGEST_PAUSE_S, net.pause_s * 2**number))):
                raise KeyboardInterrupt from None


# --- fetching --------------------------------------------------------------------------------------------------------


def part_of(target: Path) -> Path:
    """Where an unfinished file lies."""
    return target.with_name(target.name + ".part")


def note_of(target: Path) -> Path:
    """Where it is said what an unfinished file belongs to."""
    return target.with_name(target.name + ".part.json")


def fetch(
    origin: Origin, target: Path, expected: Content, net: Net, progress: Progress = lambda _there, _size: None
) -> Content:
    """Fetches a file beside its target as `.part`; `settle` then gives it its name.

    Args:
        origin: where it comes from.
        target: where it shall lie.
        expected: what it must be: size and checksum, as far as they are known.
        net: the client, and the signal to stop.
        progress: told how many bytes are there, each time that changes.

    Raises:
        MissingError: the source does not have it.
        ChecksumError: it is not what was expected; what has arrived is removed.
        FetchError: it cannot be had now; a later call goes on where this one stopped.
        KeyboardInterrupt: `net.stop` was set.
    """
    part = part_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(part.with_suffix(".part.lock"), "models pull"), part.open("a+b") as file:
            try:
                return _fetched(_Transfer(origin, target, expected, net, progress, file))
            finally:
                if not os.fstat(file.fileno()).st_size:
                    part.unlink(missing_ok=True)
    except OSError as error:
        raise FetchError(f"{part}: cannot be written: {error.strerror}; run again, it goes on") from None


def _fetched(run: _Transfer) -> Content:
    had = run.take_back()
    try:
        return run.complete()
    except ChecksumError:
        run.restart()
        if not had:
            raise
    return _fetched(run)  # bytes of an earlier run were mixed in: once more from the beginning


def settle(target: Path) -> None:
    """Gives a fetched file its name; before this, nothing with that name is there or the old one still is."""
    part = part_of(target)
    part.chmod(0o644)  # the server in its container is another user
    part.replace(target)
    note_of(target).unlink(missing_ok=True)
    sync_folder(target.parent)


def pieces(path: Path, net: Net, progress: Progress, start: int = 0) -> Iterator[bytes]:
    """A file from a byte on; KeyboardInterrupt when everything is to end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(start)
        while piece := file.read(CHUNK):
            net.check()
            progress(file.tell(), size)
            yield piece


@dataclass(slots=True)
class _Transfer:
    """A file on its way."""

    origin: Origin
    target: Path
    expected: Content
    net: Net
    progress: Progress
    part: IO[bytes]
    there: int = 0
    # Bytes of the whole file; 0: not known.
    size: int = 0
    validator: str = ""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def restart(self) -> None:
        """Begins again with an empty file."""
        note_of(self.target).unlink(missing_ok=True)
        self.part.truncate(0)
        self.there = 0
        self.digest = hashlib.sha256()

    def take_back(self) -> bool:
        """Takes what an earlier run left into the checksum, if it can be the beginning of this file; whether it did."""
        had = os.fstat(self.part.fileno()).st_size
        if not had or 0 < self.expected.size < had or not self._is_vouched_for():
            self.restart()
            return False
        self.part.seek(0)
        while piece := self.part.read(CHUNK):
            self._count(piece)
        return True

    def _is_vouched_for(self) -> bool:
        """Whether the server or a checksum will tell if the bytes that are there are the beginning of this file."""
        try:
            source, sha256, self.validator = json.loads(note_of(self.target).read_text())
        except (OSError, ValueError, TypeError):
            return False
        is_same = source == self.origin.source and (not sha256 or self.expected.sha256 in ("", sha256))
        return is_same and bool(self.validator or self.expected.sha256)

    def _count(self, piece: bytes) -> None:
        self.net.check()
        self.digest.update(piece)
        self.there += len(piece)
        self.progress(self.there, self.size)

    def complete(self) -> Content:
        """Brings the file to its end and checks it."""
        self.size = self.expected.size
        if not self.size or self.there < self.size:
            _patiently(self.origin, self.net, self._receive, lambda: self.there)
        self.part.flush()
        os.fsync(self.part.fileno())
        if self.size and self.there != self.size:
            raise ChecksumError(f"{self.origin}: has {self.there} bytes, not {self.size}; what was fetched is removed")
        found, wanted = self.digest.hexdigest(), self.expected.sha256
        if wanted and found != wanted:
            words = f"sha256 is {found[:16]}…, expected {wanted[:16]}…: damaged on the way, or another file"
            raise ChecksumError(f"{self.origin}: {words}; what was fetched is removed")
        return Content(self.there, found)

    def _receive(self) -> None:
        """One request, from where the file ends; _Broken when it ends too early."""
        headers = {"Range": f"bytes={self.there}-"} if self.there else {}
        if self.there and self.validator:
            headers["If-Range"] = self.validator
        try:
            with _asked(self.origin, self.net, headers) as answer:
                self._begin(answer)
                for piece in answer.pieces:
                    self.part.write(piece)
                    self._count(piece)
        finally:
            self.part.flush()
        if self.size and self.there < self.size:
            raise _Broken(f"broke off after {self.there} of {self.size} bytes")

    def _begin(self, answer: _Answer) -> None:
        """Goes on where the answer begins: at the end of what is there, or at the beginning."""
        if answer.total and self.expected.size not in (0, answer.total):
            raise ChecksumError(f"{self.origin}: has {answer.total} bytes, expected {self.expected.size}")
        if answer.start != self.there or (self.size and answer.total not in (0, self.size)):
            self.restart()
            if answer.start != 0:
                raise _Broken("sends another part than was asked for")
        self.size = self.expected.size or answer.total
        if not self.there:
            self.validator = answer.validator
            note = json.dumps([self.origin.source, self.expected.sha256, self.validator])
            write_atomically(note_of(self.target), f"{note}\n".encode(), 0o644)
