"""One file from a server or a folder, so that it is whole or not there at all.

Bytes go into `<name>.part`, and a note beside it says what they belong to. A broken download goes on where it stopped
if the server still has the same content; the file gets its name only after length and checksum were right and the
bytes are on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

import httpx
from filelock import lock_descriptor

from corral.errors import CorralError
from corral.files import write_atomically

HUB = "hf:"
FOLDER = "file:"
HUB_ENDPOINT = "https://huggingface.co"
TOKEN = "HF_TOKEN"  # noqa: S105 - its name
CHUNK = 1 << 20
CONNECT_S, SILENCE_S = 10.0, 60.0
# So many attempts in a row may bring nothing before a download is given up.
ATTEMPTS = 5
LONGEST_PAUSE_S = 30.0
# Answers after which it is worth asking again.
BUSY = (408, 425, 429, 500, 502, 503, 504)
PARTIAL, GONE_RANGE = 206, 416
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


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


@dataclass(frozen=True, slots=True)
class Remote:
    """What a server says of a file before it is fetched."""

    # Bytes; 0: it does not say.
    size: int = 0
    sha256: str = ""
    commit: str = ""

    def filled(self, other: Remote) -> Remote:
        """The same, with what the other says where this one says nothing."""
        return Remote(self.size or other.size, self.sha256 or other.sha256, self.commit or other.commit)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that has arrived."""

    size: int
    sha256: str


@dataclass(slots=True)
class Net:
    """How files are fetched: one client for all, and the signal to stop."""

    client: httpx.Client
    stop: threading.Event = field(default_factory=threading.Event)
    # Pause before the second attempt, in seconds; it doubles.
    pause_s: float = 1.0

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
        endpoint = (environment.get("HF_ENDPOINT") or HUB_ENDPOINT).rstrip("/")
        url = f"{endpoint}/{owner}/{repository}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"
        return Origin(source, url, headers=_login(endpoint, environment))
    if source.startswith(FOLDER):
        return Origin(source, path=Path(source.removeprefix(FOLDER)))
    return Origin(source, source) if "://" in source else None


def _login(endpoint: str, environment: Mapping[str, str]) -> dict[str, str]:
    token = environment.get(TOKEN, "").strip()
    parts = urlsplit(endpoint)
    is_safe = parts.scheme == "https" or parts.hostname in _LOOPBACK
    return {"Authorization": f"Bearer {token}"} if token and is_safe else {}


def listing(
    source: str, revision: str, environment: Mapping[str, str], offline: Path | None = None
) -> dict[str, tuple[int, str]]:
    """Size in bytes and sha256 of every file of a repository at a commit, by path; no sha256 for small text files.

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
        found = {path: offline / name / path for path in _paths_below(offline / name)}
        if not found:
            raise MissingError(f"{source}: there are no files in {offline / name}")
        return {path: (place.stat().st_size, "") for path, place in found.items()}
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    endpoint = (environment.get("HF_ENDPOINT") or HUB_ENDPOINT).rstrip("/")
    token = environment.get(TOKEN, "").strip() if _login(endpoint, environment) else ""
    try:
        tree = list(HfApi(endpoint, token=token or False).list_repo_tree(name, revision=revision, recursive=True))
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        words = f"its files cannot be listed ({_first_line(error)}); is the commit right, and does HF_TOKEN open it?"
        raise FetchError(f"{source}: {words} Without network: --from DIR with {name} in it") from None
    files = [item for item in tree if isinstance(item, RepoFile)]
    return {item.path: (item.size, item.lfs.sha256 if item.lfs else "") for item in files}


def _paths_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def shown(origin: Origin) -> str:
    """A source as it may stand in a message: without query, which may hold a signature."""
    return origin.source.partition("?")[0]


def look(origin: Origin, net: Net) -> Remote:
    """What the source says of the file: size, and checksum where it knows one; raises FetchError."""
    if origin.path is not None:
        return Remote(size=_local_size(origin))
    for number in range(ATTEMPTS):
        try:
            with _answer(origin, net, {"Range": "bytes=0-0"}) as response:
                return _remote(response)
        except _Broken as broken:
            _wait(net, number, broken, shown(origin))
    raise AssertionError


def _local_size(origin: Origin) -> int:
    path = origin.path or Path()
    try:
        if path.is_dir():
            raise MissingError(f"{origin.source}: is a folder; name the file in it")
        return path.stat().st_size
    except FileNotFoundError:
        raise MissingError(f"{origin.source}: there is no such file") from None
    except OSError as error:
        raise FetchError(f"{origin.source}: cannot be read: {error.strerror}") from None


@contextmanager
def stream(origin: Origin, net: Net) -> Iterator[Callable[[int], bytes]]:
    """The file's bytes from its beginning, as many as are asked for; raises FetchError."""
    if origin.path is not None:
        _local_size(origin)
        with origin.path.open("rb") as file:
            yield file.read
        return
    with _answer(origin, net, {"Range": "bytes=0-"}) as response:
        pieces = response.iter_raw()
        yield lambda _length: next(pieces, b"")


def _remote(response: httpx.Response) -> Remote:
    hops = [*response.history, response]
    said = {name: hop.headers[name] for hop in reversed(hops) for name in hop.headers}
    linked = said.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
    size = said.get("x-linked-size", "")
    return Remote(
        size=int(size) if size.isdecimal() else _total(response),
        sha256=linked if _SHA256.fullmatch(linked) else "",
        commit=said.get("x-repo-commit", ""),
    )


def _total(response: httpx.Response) -> int:
    """Bytes of the whole file; 0 when the server does not say."""
    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code == PARTIAL:
        return int(found[3]) if found and found[3] != "*" else 0
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


@contextmanager
def _answer(origin: Origin, net: Net, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """The server's good answer; _Broken when another attempt is worth it, FetchError when none is."""
    net.check()
    try:
        with net.client.stream("GET", origin.url, headers={**origin.headers, **headers}) as response:
            _refuse(origin, response)
            yield response
    except httpx.ConnectError as error:
        raise _Broken(f"cannot be reached ({_first_line(error)})") from None
    except httpx.TimeoutException:
        raise _Broken("does not answer in time") from None
    except httpx.TransportError as error:
        raise _Broken(f"broke off ({_first_line(error)})") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"{shown(origin)}: {_first_line(error)}") from None


def _refuse(origin: Origin, response: httpx.Response) -> None:
    code = response.status_code
    open_hops = [hop.url for hop in (*response.history, response) if hop.url.scheme != "https"]
    if origin.url.startswith("https:") and open_hops:
        words = f"it leads on to {open_hops[0].host} over http, where nothing protects the file"
        raise FetchError(f"{shown(origin)}: {words}; name a source that stays on https")
    if code in BUSY:
        after = response.headers.get("retry-after", "")
        raise _Broken(f"answers {code}", min(LONGEST_PAUSE_S, float(after)) if after.isdecimal() else 0.0)
    if code in (401, 403):
        words = "its owner wants a login: accept the terms on its page, then set HF_TOKEN"
        raise MissingError(f"{shown(origin)}: {words if origin.source.startswith(HUB) else f'answers {code}'}")
    if code in (404, 410):
        raise MissingError(f"{shown(origin)}: the source has no such file; its page has the names")
    if code not in (200, PARTIAL, GONE_RANGE):
        raise FetchError(f"{shown(origin)}: the server answers {code}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _wait(net: Net, number: int, broken: _Broken, name: str) -> None:
    """Pauses before the next attempt; raises FetchError after the last one."""
    if number + 1 >= ATTEMPTS:
        raise FetchError(
            f"{name}: {broken}; check the network (HTTPS_PROXY, HF_ENDPOINT), "
            "or fetch it elsewhere and use --from DIR; run again, it goes on where it stopped"
        )
    pause = max(broken.pause_s, min(LONGEST_PAUSE_S, net.pause_s * 2**number))
    end = time.monotonic() + pause
    if net.stop.wait(max(0.0, end - time.monotonic())):
        raise KeyboardInterrupt


# --- fetching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Note:
    """What the bytes of an unfinished file belong to."""

    source: str
    size: int = 0
    sha256: str = ""
    # The server's word for this content (a strong ETag, or the time of its last change), for `If-Range`.
    validator: str = ""

    def fits(self, source: str, expected: Remote) -> bool:
        """Whether bytes with this note can be the beginning of what is expected from the source."""
        return (
            self.source == source
            and (not self.size or expected.size in {0, self.size})
            and (not self.sha256 or expected.sha256 in {"", self.sha256})
            and bool(self.validator or expected.sha256)
        )


def part_of(target: Path) -> Path:
    """Where an unfinished file lies."""
    return target.with_name(target.name + ".part")


def note_of(target: Path) -> Path:
    """Where it is said what an unfinished file belongs to."""
    return target.with_name(target.name + ".part.json")


def fetch(
    origin: Origin, target: Path, expected: Remote, net: Net, progress: Callable[[int], None] = lambda _bytes: None
) -> Fetched:
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
    target.parent.mkdir(parents=True, exist_ok=True)
    with _own(part_of(target)) as part:
        for is_last in (False, True):
            run = _Transfer(origin, target, expected, net, progress, part)
            try:
                had = run.take_back()
                return _complete(run)
            except ChecksumError:
                run.restart()
                if is_last or not had:  # bytes of an earlier run were mixed in: once more from the beginning
                    raise
    raise AssertionError


def settle(target: Path) -> None:
    """Gives a fetched file its name; before this, nothing with that name is there or the old one still is."""
    part = part_of(target)
    part.chmod(0o644)  # the server in its container is another user
    part.replace(target)
    note_of(target).unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextmanager
def _own(part: Path) -> Iterator[IO[bytes]]:
    """The unfinished file, opened for this run alone; removed if it stays empty."""
    try:
        file = part.open("a+b")
    except OSError as error:
        raise FetchError(f"{part}: cannot be written: {error.strerror}") from None
    with file:
        if not lock_descriptor(file.fileno(), blocking=False):
            raise FetchError(f"{part}: another process is fetching it; wait for it or end it")
        try:
            yield file
        except OSError as error:
            raise FetchError(f"{part}: cannot be written: {error.strerror}; run again, it goes on") from None
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Transfer:
    """A file on its way."""

    origin: Origin
    target: Path
    expected: Remote
    net: Net
    progress: Callable[[int], None]
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
        note = _note(self.target)
        if not had or note is None or not note.fits(self.origin.source, self.expected) or 0 < self.expected.size < had:
            self.restart()
            return False
        self.validator = note.validator
        self.part.seek(0)
        while piece := self.part.read(CHUNK):
            self._count(piece)
        return True

    def add(self, piece: bytes) -> None:
        """Takes what has just come."""
        self.part.write(piece)
        self._count(piece)

    def _count(self, piece: bytes) -> None:
        self.net.check()
        self.digest.update(piece)
        self.there += len(piece)
        self.progress(self.there)


def _note(target: Path) -> _Note | None:
    with suppress(OSError, ValueError, TypeError):
        return _Note(**json.loads(note_of(target).read_text()))
    return None


def _complete(run: _Transfer) -> Fetched:
    """Brings the file to its end and checks it."""
    run.size = run.expected.size
    if run.origin.path is not None:
        _copy(run, run.origin.path)
    else:
        _download(run)
    run.part.flush()
    os.fsync(run.part.fileno())
    name = shown(run.origin)
    if run.size and run.there != run.size:
        raise ChecksumError(f"{name}: has {run.there} bytes, not {run.size}; what was fetched is removed")
    found = run.digest.hexdigest()
    if run.expected.sha256 and found != run.expected.sha256:
        words = f"sha256 is {found[:16]}…, expected {run.expected.sha256[:16]}…"
        raise ChecksumError(f"{name}: {words}: damaged on the way, or another file; what was fetched is removed")
    return Fetched(run.there, found)


def _copy(run: _Transfer, path: Path) -> None:
    run.size = _local_size(run.origin)
    if run.expected.size and run.size != run.expected.size:
        raise ChecksumError(f"{run.origin.source}: has {run.size} bytes, expected {run.expected.size}")
    run.restart()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            run.add(piece)


def _download(run: _Transfer) -> None:
    number, furthest = 0, run.there
    while not (run.size and run.there >= run.size):
        try:
            _receive(run)
            return
        except _Broken as broken:
            number = 0 if run.there > furthest else number + 1
            furthest = max(furthest, run.there)
            run.part.flush()
            _wait(run.net, number, broken, shown(run.origin))


def _receive(run: _Transfer) -> None:
    """One request, from where the file ends; _Broken when it ends too early."""
    headers = {"Range": f"bytes={run.there}-"} if run.there else {}
    if run.there and run.validator:
        headers["If-Range"] = run.validator
    with _answer(run.origin, run.net, headers) as response:
        if response.status_code == GONE_RANGE:
            run.restart()
            raise _Broken("has another length than before")
        _take_start(run, response)
        for piece in response.iter_raw():
            run.add(piece)
    if run.size and run.there < run.size:
        raise _Broken(f"broke off after {run.there} of {run.size} bytes")


def _take_start(run: _Transfer, response: httpx.Response) -> None:
    """Goes on where the answer begins: at the end of what is there, or at the beginning."""
    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
    start = 0 if response.status_code != PARTIAL else int(found[1]) if found else -1
    if start != run.there:
        run.restart()
        if start != 0:
            raise _Broken("sends another part than was asked for")
    total = _total(response)
    if total and run.expected.size and total != run.expected.size:
        raise ChecksumError(f"{shown(run.origin)}: the server has {total} bytes, expected {run.expected.size}")
    if total and run.there and run.size and total != run.size:
        run.restart()
        raise _Broken("has another length than before")
    run.size = run.expected.size or total
    if not run.there:
        etag = response.headers.get("etag", "")
        run.validator = "" if etag.startswith("W/") else etag
        run.validator = run.validator or response.headers.get("last-modified", "")
        note = _Note(run.origin.source, run.size, run.expected.sha256, run.validator)
        write_atomically(note_of(run.target), (json.dumps(asdict(note)) + "\n").encode(), 0o644)


# --- checksums of files that are there -------------------------------------------------------------------------------


def checksum(path: Path, net_stop: threading.Event, progress: Callable[[int], None] = lambda _bytes: None) -> Fetched:
    """Size and sha256 of a file; KeyboardInterrupt when the event is set."""
    digest, there = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            if net_stop.is_set():
                raise KeyboardInterrupt
            digest.update(piece)
            there += len(piece)
            progress(there)
    return Fetched(there, digest.hexdigest())
