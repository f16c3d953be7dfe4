"""`models ls | pull | verify | inspect`: every model file that the farm's servers read, and what is known of it.

Files of hosts that are this machine go straight into their models folder; for a host reached by ssh they are fetched
into a store on this machine and copied there, so that the host needs neither the internet nor a login. What is found
out goes into the lock beside the inventory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from corral.build import Plan
from corral.config.file_names import is_below
from corral.config.gguf_header import Header, HeaderError, facts_of, read_header
from corral.config.inventory import Model, file_of, folder_of
from corral.config.model_lock import Gguf, LockedFile, ModelLock, lock_of, read_lock, write_lock
from corral.contributions import Contributions
from corral.errors import CorralError, UsageError, did_you_mean
from corral.files import write_atomically
from corral.plan.site import Site
from corral.runtime.hosts import ComposeHost
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.verbs.models import fetch as net
from corral.verbs.models.far_files import FarFolder

PULL_LOCK = ".models-pull.lock"
STAMPS = ".corral-verified.json"
JOBS = 3
ASKERS = 8
# Stays free on a disk that files are fetched to.
SPARE_BYTES = 256 << 20
GGUF = ".gguf"
QUANTIZATION = re.compile(r"(?i)(?<![a-z0-9])(i?q\d(?:_[a-z0-9]+)*|tq\d_\d|mxfp4|bf16|f16|fp16|f32)(?![a-z0-9])")
WEIGHTS = ".safetensors"
# Files of a repository that are fetched: data, and no pickles (.bin, .pt, .ckpt), which run code when loaded.
TAKEN = (WEIGHTS, ".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt")
# Says that a repository is a diffusers pipeline: its weights lie in folders, those beside it are duplicates.
PIPELINE = "model_index.json"
State = Literal["verified", "there", "not pinned", "missing", "wrong size", "damaged", "unknown"]
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file that servers read: what the lock calls it, and who wants it where."""

    key: str
    source: str
    revision: str
    models: tuple[str, ...]
    hosts: tuple[str, ...]
    # What the inventory says that its checksum is.
    sha256: str = ""
    # The repository that it is a file of, when all of it is served.
    repository: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A host's models folder: on this machine, or behind ssh."""

    host: str
    folder: Path | None = None
    far: FarFolder | None = None

    def __str__(self) -> str:
        """The folder as people find it."""
        return str(self.folder or self.far)


@dataclass(slots=True)
class Shelf:
    """All files, all folders, and the lock."""

    site: Site
    out: Path
    lock_path: Path
    talk: Console
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    net: net.Net = field(default_factory=lambda: net.Net(net.open_client()))
    lock: ModelLock = field(default_factory=ModelLock)
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.lock = read_lock(self.lock_path)

    def learn(self, key: str, **facts: Any) -> None:
        """Puts what was found out of a file into the lock, on disk at once."""
        with self.mutex:
            known = self.lock.get(key) or LockedFile(file=_file(key))
            changed = known.model_copy(update={name: fact for name, fact in facts.items() if fact})
            if changed != self.lock.get(key):
                self.lock = self.lock.with_file(key, changed)
                write_lock(self.lock_path, self.lock)

    def file(self, key: str) -> str:
        """The file's name in a models folder."""
        known = self.lock.get(key)
        return known.file if known else _file(key)

    def place(self, host: str) -> Place:
        """The models folder of a host."""
        facts = self.site.host(host)
        if facts.ssh is not None:
            there = ComposeHost(Plan(self.site, Contributions()), host, self.out)
            return Place(host, far=FarFolder(there, there.models_folder))
        return Place(host, folder=Path(os.path.normpath(self.out / host / facts.models_dir)))


def _file(key: str) -> str:
    return file_of(key.rpartition("@")[0] if key.startswith(net.HUB) and "@" in key else key)


def open_shelf(site: Site, inventory: Path, out: Path, talk: Console) -> Shelf:
    """All model files of a site."""
    return Shelf(site, out, lock_of(inventory), talk)


def wanted_files(
    site: Site, names: Sequence[str] = (), hosts: Iterable[str] | None = None, lock: ModelLock | None = None
) -> list[Wanted]:
    """Every file that servers read, in the order of models; only of the given models and hosts if any are given.

    Args:
        site: the resolved site.
        names: models; all when empty.
        hosts: hosts; all when absent.
        lock: says what files a repository has; the site's own when absent.

    Raises:
        UsageError: there is no such model.
    """
    lock = lock or site.lock
    models = site.inventory.models
    for name in names:
        if name not in models:
            raise UsageError(f'no model named "{name}"; {did_you_mean(name, models)}')
    chosen = None if hosts is None else set(hosts)
    users: dict[str, tuple[Wanted, ...]] = {}
    for name, weights in models.items():
        if names and name not in names:
            continue
        where = {replica.host for replica in site.replicas if name in replica.models}
        where = where if chosen is None else where & chosen
        for found in _files_of(weights, lock):
            wanted = replace(found, models=(name,), hosts=tuple(sorted(where)))
            users[found.key] = (*users.get(found.key, ()), wanted)
    return [_joined(found) for found in users.values()]


def _files_of(weights: Model, lock: ModelLock) -> Iterator[Wanted]:
    """A model's own files, or those that its repositories have by the lock."""
    for source in weights.sources if weights.served_by.reads_files else ():
        sha256 = weights.sha256_of(source)
        yield Wanted(weights.key(source), source, weights.revision_of(source), (), (), sha256)
    for source in weights.repositories:
        revision = weights.revision_of(source)
        for key in lock.members(source, revision):
            yield Wanted(key, key.rpartition("@")[0], revision, (), (), repository=source)


def _joined(found: Sequence[Wanted]) -> Wanted:
    models = tuple(name for item in found for name in item.models)
    sha256 = max(item.sha256 for item in found)
    hosts = tuple(sorted({host for item in found for host in item.hosts}))
    return replace(found[0], models=models, hosts=hosts, sha256=sha256)


# --- what lies in a folder -------------------------------------------------------------------------------------------


def _stamps(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / STAMPS).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def remember(path: Path, sha256: str, mutex: threading.Lock) -> None:
    """Notes beside the files that one was read and had this checksum; an empty one forgets it."""
    with mutex:
        stamps = _stamps(path.parent)
        stamps.pop(path.name, None)
        if sha256:
            stamps[path.name] = [*_stamp(path), sha256, round(time.time())]
        write_atomically(path.parent / STAMPS, (json.dumps(stamps, indent=1, sort_keys=True) + "\n").encode(), 0o644)


def state_of(path: Path, known: LockedFile | None) -> State:
    """What a look at a file tells without reading it: whether it is there and was verified since it last changed."""
    if not path.is_file():
        return "missing"
    if known is None or not known.sha256:
        return "not pinned"
    if known.size and path.stat().st_size != known.size:
        return "wrong size"
    found = _checked(path)
    return "there" if found is None else "verified" if found[0] == known.sha256 else "damaged"


def _checked(path: Path) -> tuple[str, float | None] | None:
    """The checksum that a file had when it was read, and when that was; None if it has changed since."""
    with suppress(OSError):
        match _stamps(path.parent).get(path.name):
            case [size, changed, str(sha256), *when] if [size, changed] == _stamp(path):
                return sha256, float(when[0]) if when else None
    return None


def checked_at(row: Row) -> float | None:
    """When a file on this machine was last read from its first to its last byte, in seconds since 1970."""
    found = _checked(Path(row.folder) / row.file)
    return found[1] if found else None


# --- work side by side -----------------------------------------------------------------------------------------------


def bars(talk: Console) -> Progress:
    """Progress of files: bytes, speed, time that is left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(), console=talk,
    )  # fmt: skip


@contextmanager
def _workers(shelf: Shelf, count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that end at once when the person or a failure ends the block."""
    with Interrupts(), ThreadPoolExecutor(max_workers=count) as pool:
        try:
            yield pool
        except BaseException:
            shelf.net.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _all(
    shelf: Shelf, jobs: int, work: Mapping[str, Callable[[Callable[[int], None]], Done]], sizes: Mapping[str, int]
) -> tuple[dict[str, Done], list[CorralError]]:
    """Results of all pieces of work by their names, and what went wrong; a progress bar for each."""
    done: dict[str, Done] = {}
    problems: list[CorralError] = []
    if not work:
        return done, problems
    with bars(shelf.talk) as shown, _workers(shelf, jobs) as pool:
        tasks = {name: shown.add_task(name, total=sizes.get(name) or None, start=False) for name in work}
        running = {pool.submit(_one, shown, tasks[name], job): name for name, job in work.items()}
        waiting: set[Future[Done]] = set(running)
        while waiting:
            ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in ended:
                try:
                    done[running[future]] = future.result()
                except CorralError as error:
                    problems.append(error)
                    shown.stop_task(tasks[running[future]])
    return done, problems


def _one(bars: Progress, task: TaskID, job: Callable[[Callable[[int], None]], Done]) -> Done:
    bars.start_task(task)
    return job(lambda there: bars.update(task, completed=there))


def _raise(problems: Sequence[CorralError], words: str) -> None:
    if problems:
        raise CorralError("\n".join([*dict.fromkeys(map(str, problems)), words]))


# --- pull ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """How to pull."""

    names: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    # Folder that files are taken from instead of the network.
    offline: Path | None = None
    # Quantization to take where the wanted one is not to be had.
    fallback: str = ""
    # Take what the source has now, and pin that.
    update: bool = False
    jobs: int = JOBS
    # Folder on this machine for files of far hosts.
    store: Path | None = None


@dataclass(slots=True)
class _Order:
    """One file that is to be fetched, and the folders that lack it."""

    item: Wanted
    origin: net.Origin
    expected: net.Remote
    # Its place in a models folder.
    name: str
    target: Path
    lacking: list[Place] = field(default_factory=list)


def pull(shelf: Shelf, choice: Choice) -> None:
    """Every file is in every folder that needs it, checked; raises CorralError with all that could not be done."""
    _say_skipped(shelf, choice)
    with alone(shelf.lock_path.parent / PULL_LOCK, "models pull"):
        _list_repositories(shelf, choice)
        found = wanted_files(shelf.site, choice.names, choice.hosts, shelf.lock)
        items = [item for item in found if item.hosts]
        if not choice.update:
            _refuse_other_pins(shelf, items)
        lacking, problems = _look_around(shelf, items, choice)
        orders, unknown = _orders(shelf, items, lacking, choice)
        _check_room(orders)
        _, failed = _all(
            shelf, choice.jobs,
            {order.name: partial(_fetch, shelf, order) for order in orders.values()},
            {order.name: order.expected.size for order in orders.values()},
        )  # fmt: skip
        problems += unknown + failed + _hand_out(shelf, orders, choice)
    _raise(problems, "what is there is whole; run it again, it goes on where it stopped")
    count = len({shelf.file(item.key) for item in items})
    shelf.talk.print(f"{count} files are there and as {shelf.lock_path.name} says; {len(orders)} were fetched")


def _say_skipped(shelf: Shelf, choice: Choice) -> None:
    for name, weights in shelf.site.inventory.models.items():
        if weights.served_by.reads_files or (choice.names and name not in choice.names):
            continue
        for source in weights.sources:
            if source not in weights.repositories:
                words = f"put the folder {source} into the models folder of its hosts"
                shelf.talk.print(Text(f"{name}: {words}", "dim"))


def _list_repositories(shelf: Shelf, choice: Choice) -> None:
    """Puts the files of repositories into the lock that are not there yet, each with its place in a models folder."""
    for name, weights in shelf.site.inventory.models.items():
        if choice.names and name not in choice.names:
            continue
        for source in weights.repositories:
            revision = weights.revision_of(source)
            if not shelf.lock.members(source, revision):
                _list_repository(shelf, source, revision, choice)


def _list_repository(shelf: Shelf, source: str, revision: str, choice: Choice) -> None:
    there = net.listing(source, revision, shelf.environment, choice.offline)
    folder, taken = folder_of(source, revision), chosen_files(there)
    strange = [path for path in taken if not is_below(f"{folder}/{path}")]
    if strange:
        raise net.FetchError(f"{source}: names a file {strange[0]!r}, which may lead outside of its folder")
    if not any(path.endswith(WEIGHTS) for path in taken):
        words = "pickled weights (.bin, .pt, .ckpt) run code when they are loaded, and are not taken"
        raise net.FetchError(f"{source}: has no {WEIGHTS} files at {revision[:12]}; {words}: name another repository")
    files = {
        f"{source}/{path}@{revision}": LockedFile(
            file=f"{folder}/{path}", size=there[path][0], sha256=there[path][1], commit=revision
        )
        for path in taken
    }
    with shelf.mutex:  # all at once: a part of the list would pass for the whole
        shelf.lock = shelf.lock.model_copy(update={"files": {**shelf.lock.files, **files}})
        write_lock(shelf.lock_path, shelf.lock)


def chosen_files(paths: Iterable[str]) -> list[str]:
    """Which files of a repository are fetched: weights in safetensors and the text that belongs to them."""
    is_pipeline = PIPELINE in (found := list(paths))
    return [
        path
        for path in sorted(found)
        if path.endswith(TAKEN) and not (is_pipeline and path.endswith(WEIGHTS) and "/" not in path)
        if not re.search(r"(^|/)\.[^./]", path)
    ]


def _refuse_other_pins(shelf: Shelf, items: Sequence[Wanted]) -> None:
    """Raises ChecksumError when the inventory and the lock want different files."""
    for item in items:
        known = shelf.lock.get(item.key)
        if item.sha256 and known is not None and known.sha256 not in {"", item.sha256}:
            words = f"sha256 in the inventory is not what {shelf.lock_path.name} says"
            raise net.ChecksumError(f"{item.source}: {words}; look into it, then take it with: models pull --update")


def _look_around(
    shelf: Shelf, items: Sequence[Wanted], choice: Choice
) -> tuple[dict[str, list[Place]], list[CorralError]]:
    """The folders that lack a file, by its key. Files that are there are read unless an earlier run has read them."""
    lacking: dict[str, list[Place]] = defaultdict(list)
    work: dict[str, Callable[[Callable[[int], None]], bool]] = {}
    asked: dict[str, tuple[Wanted, Place]] = {}
    sizes: dict[str, int] = {}
    for item in items:
        for place in map(shelf.place, item.hosts):
            name = f"{shelf.file(item.key)} on {place.host}"
            if place.folder and state_of(place.folder / shelf.file(item.key), shelf.lock.get(item.key)) == "verified":
                continue
            asked[name] = item, place
            sizes[name] = (shelf.lock.get(item.key) or LockedFile(file="x")).size
            work[name] = partial(_is_good, shelf, item, place)
    found, problems = _all(shelf, choice.jobs, work, sizes)
    for name, is_good in found.items():
        item, place = asked[name]
        if not is_good:
            lacking[item.key].append(place)
    return lacking, problems


def _is_good(shelf: Shelf, item: Wanted, place: Place, told: Callable[[int], None]) -> bool:
    """Whether the file lies there and is the pinned one; a file without a pin is accepted if it is complete."""
    known = shelf.lock.get(item.key)
    name = shelf.file(item.key)
    if place.far:
        return bool(known and known.sha256) and place.far.checksum(name) == (known and known.sha256)
    path = (place.folder or Path()) / name
    if state_of(path, known) in ("missing", "wrong size"):
        return False
    found = net.checksum(path, shelf.net.stop, told)
    if known is None or not known.sha256:
        return net.origin_of(item.source, item.revision, {}) is None and _adopt(shelf, item, path, found)
    if found.sha256 == known.sha256:
        remember(path, found.sha256, shelf.mutex)
        return True
    shelf.talk.print(Text(f"{path}: is damaged or another file; fetching it again", "yellow"))
    return False


def _adopt(shelf: Shelf, item: Wanted, path: Path, found: net.Fetched) -> bool:
    """Pins a file that a person has put there; raises ChecksumError when the inventory wants another one."""
    if item.sha256 and item.sha256 != found.sha256:
        raise net.ChecksumError(f"{path}: its checksum is {found.sha256}, and sha256 in the inventory is another")
    facts = local_facts(path)
    shelf.learn(item.key, size=found.size, sha256=found.sha256, gguf=facts)
    remember(path, found.sha256, shelf.mutex)
    return True


def _orders(
    shelf: Shelf, items: Sequence[Wanted], lacking: Mapping[str, list[Place]], choice: Choice
) -> tuple[dict[str, _Order], list[CorralError]]:
    """What is to be fetched, with what its source says of it."""
    wanted = {item.key: item for item in items if lacking.get(item.key) or _may_be_new(item, choice)}
    found, problems = _each(shelf, wanted, lambda item: _order(shelf, item, lacking.get(item.key, []), choice))
    return {key: order for key, order in found.items() if order is not None}, problems


def _may_be_new(item: Wanted, choice: Choice) -> bool:
    return choice.update and net.origin_of(item.source, item.revision, {}) is not None


def _each(
    shelf: Shelf, items: Mapping[str, Wanted], work: Callable[[Wanted], Done]
) -> tuple[dict[str, Done], list[CorralError]]:
    """Short questions about files, several at once: the answers, and what went wrong."""
    done: dict[str, Done] = {}
    problems: list[CorralError] = []
    with _workers(shelf, max(1, min(ASKERS, len(items)))) as pool:
        futures = {key: pool.submit(work, item) for key, item in items.items()}
        for key, future in futures.items():
            try:
                done[key] = future.result()
            except CorralError as error:
                problems.append(error)
    return done, problems


def _order(shelf: Shelf, item: Wanted, lacking: list[Place], choice: Choice) -> _Order | None:
    """How to fetch a file; None when it is everywhere and still the one that its source has."""
    known = shelf.lock.get(item.key)
    pinned = net.Remote(0, item.sha256)
    if known is not None and not choice.update:
        pinned = net.Remote(known.size, known.sha256 or item.sha256, known.commit)
    source = known.taken if known and known.taken and not choice.update else item.source
    try:
        origin, said = _ask(shelf, item, source, pinned, choice)
    except net.MissingError:
        wants_other = bool(choice.fallback) and not item.repository
        source = _with_quantization(item.source, choice.fallback) if wants_other else ""
        if not source or source == item.source:
            raise
        pinned = net.Remote()
        origin, said = _ask(shelf, item, source, pinned, choice)
        shelf.talk.print(Text(f"{item.source} is not to be had; taking {file_of(source)} for it", "yellow"))
        shelf.learn(item.key, file=file_of(source), taken=source, size=said.size, sha256=said.sha256)
    if pinned.sha256 and said.sha256 and pinned.sha256 != said.sha256:
        raise net.ChecksumError(
            f"{item.source}: the source has another file now than {shelf.lock_path.name} (or sha256 in the inventory) "
            "says; look into it, then take it with: models pull --update"
        )
    if not lacking:
        if known and known.sha256 == said.sha256:
            return None
        lacking = [shelf.place(host) for host in item.hosts]
    local = next((place.folder for place in lacking if place.folder), None)
    name = shelf.file(item.key) if item.repository else file_of(source)
    target = (local or choice.store or default_store(shelf.environment)) / name
    return _Order(item, origin, pinned.filled(said), name, target, lacking)


def _ask(shelf: Shelf, item: Wanted, source: str, pinned: net.Remote, choice: Choice) -> tuple[net.Origin, net.Remote]:
    if choice.offline is not None:
        origin = _offline(source, choice.offline, is_member=bool(item.repository))
    else:
        found = net.origin_of(source, pinned.commit or item.revision, shelf.environment)
        if found is None:
            folders = ", ".join(str(shelf.place(host)) for host in item.hosts)
            raise net.FetchError(f"{item.source}: is a bare file name and not there; put it into {folders}")
        origin = found
    return origin, net.look(origin, shelf.net)


def _offline(source: str, folder: Path, *, is_member: bool) -> net.Origin:
    """The file in a folder that a person has brought: by its name, or as in the repository."""
    parts = source.partition(":")[2].split("/") if ":" in source else [source]
    names = [folder.joinpath(*[part for part in parts if part])]
    names = names if is_member else [folder / file_of(source), *names]
    path = next((name for name in names if name.is_file()), None)
    if path is None:
        raise net.MissingError(f"{source.partition('?')[0]}: {file_of(source)} is not in {folder}")
    return net.Origin(source, path=path)


def _with_quantization(source: str, wanted: str) -> str:
    """The same model in another quantization; empty when the file's name does not tell its own."""
    start, slash, name = source.rpartition("/")
    found = QUANTIZATION.search(name)
    return f"{start}{slash}{name[: found.start()]}{wanted}{name[found.end() :]}" if found else ""


def default_store(environment: Mapping[str, str]) -> Path:
    """Folder on this machine for files that other hosts need."""
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "corral" / "models"


def _check_room(orders: Mapping[str, _Order]) -> None:
    """Raises CorralError when the files do not all fit on their disks, before the first byte is fetched."""
    wanted: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    copies = [(place.folder, order) for order in orders.values() for place in order.lacking if place.folder]
    firsts = [(order.target.parent, order) for order in orders.values()]
    for folder, order in {(str(folder), order.item.key): (folder, order) for folder, order in copies + firsts}.values():
        there = _existing(folder)
        device = there.stat().st_dev
        folders.setdefault(device, there)
        part = net.part_of(folder / order.name)
        wanted[device] += order.expected.size - (part.stat().st_size if part.is_file() else 0)
    for device, size in wanted.items():
        free = shutil.disk_usage(folders[device]).free - SPARE_BYTES
        if size > free:
            largest = max(orders.values(), key=lambda order: order.expected.size)
            raise CorralError(
                f"{folders[device]}: {_gib(size)} GiB are to be fetched, {_gib(max(0, free))} GiB are free: "
                f"{_gib(size - free)} GiB are missing; nothing was fetched. Free some, set models_dir to another disk, "
                "or take a smaller quantization; "
                f"the largest is {largest.name} ({_gib(largest.expected.size)} GiB)"
            )
    for order in orders.values():
        for place in order.lacking:
            room = place.far.free() if place.far else None
            if room is not None and order.expected.size > room:
                words = f"{order.name} has {_gib(order.expected.size)} GiB, {_gib(room)} GiB are free"
                raise CorralError(f"{place}: {words}; nothing was fetched")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _fetch(shelf: Shelf, order: _Order, told: Callable[[int], None]) -> net.Fetched:
    """Fetches a file, checks that it is whole, pins it, and gives it its name: in that order."""
    known = shelf.lock.get(order.item.key)
    if state_of(order.target, known) in ("there", "verified"):  # the store has it from an earlier run
        found = net.checksum(order.target, shelf.net.stop, told)
        if known and found.sha256 == known.sha256:
            return found
    found = net.fetch(order.origin, order.target, order.expected, shelf.net, told)
    facts = _whole(net.part_of(order.target), found.size, net.shown(order.origin))
    shelf.learn(
        order.item.key, file=order.name, size=found.size, sha256=found.sha256,
        commit=order.expected.commit, gguf=facts,
    )  # fmt: skip
    net.settle(order.target)
    remember(order.target, found.sha256, shelf.mutex)
    return found


def _whole(part: Path, size: int, name: str) -> Gguf | None:
    """What a GGUF file says of itself; removes it and raises FetchError when it ends too early or is something else."""
    if not name.endswith(GGUF):
        return None
    try:
        with part.open("rb") as file:
            return _facts([_complete(read_header(file.read), size)])
    except HeaderError as error:
        part.unlink()
        raise net.FetchError(f"{name}: the file {error}; what was fetched is removed") from None


def _complete(header: Header, size: int) -> Header:
    """The header of a file of that many bytes; HeaderError when its tensors need more."""
    if header.file_size > size:
        raise HeaderError(f"is cut off: it has {size} bytes of {header.file_size}")
    return header


def _facts(headers: Sequence[Header]) -> Gguf | None:
    """Facts of a header; None for the later parts of a split model, which have tensors only."""
    with suppress(HeaderError):
        return facts_of(headers)
    return None


def local_facts(path: Path) -> Gguf | None:
    """What a GGUF file on this machine says of itself; None for other files."""
    if path.suffix != GGUF:
        return None
    try:
        with path.open("rb") as file:
            return _facts([_complete(read_header(file.read), path.stat().st_size)])
    except HeaderError as error:
        raise CorralError(f"{path}: the file {error}") from None


def _hand_out(shelf: Shelf, orders: Mapping[str, _Order], choice: Choice) -> list[CorralError]:
    """Copies what was fetched into the other folders that need it."""
    work: dict[str, Callable[[Callable[[int], None]], None]] = {}
    sizes: dict[str, int] = {}
    for order in orders.values():
        known = shelf.lock.get(order.item.key)
        if known is None or not known.sha256 or not order.target.is_file():
            continue
        for place in order.lacking:
            if place.folder and place.folder / order.name == order.target:
                continue
            name = f"{order.name} to {place.host}"
            sizes[name] = known.size
            work[name] = partial(_copy, shelf, order, place, known)
    return _all(shelf, choice.jobs, work, sizes)[1]


def _copy(shelf: Shelf, order: _Order, place: Place, known: LockedFile, told: Callable[[int], None]) -> None:
    if place.far:
        with order.target.open("rb") as file:
            watched = cast("IO[bytes]", _Watched(file, shelf.net, told))
            place.far.send(watched, order.name, known.size, known.sha256)
        return
    target = (place.folder or Path()) / order.name
    origin = net.Origin(order.item.source, path=order.target)
    net.fetch(origin, target, net.Remote(known.size, known.sha256), shelf.net, told)
    net.settle(target)
    remember(target, known.sha256, shelf.mutex)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A file whose reading is told, and ends when everything is to end."""

    file: IO[bytes]
    net: net.Net
    told: Callable[[int], None]

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def read(self, count: int) -> bytes:
        self.net.check()
        piece = self.file.read(count)
        self.told(self.file.tell())
        return piece


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect(shelf: Shelf, names: Sequence[str] = (), hosts: Iterable[str] | None = None) -> None:
    """Puts into the lock what every file says of itself, read from the beginning of it, here or at its source."""
    items = [item for item in wanted_files(shelf.site, names, hosts, shelf.lock) if not item.repository]
    with alone(shelf.lock_path.parent / PULL_LOCK, "models pull"):
        _, problems = _each(shelf, {item.key: item for item in items}, lambda item: _inspect(shelf, item))
    _raise(problems, "the others were inspected")
    shelf.talk.print(f"{len(items)} files are described in {shelf.lock_path}; look with: ./generate.py plan")


def _inspect(shelf: Shelf, item: Wanted) -> None:
    name = shelf.file(item.key)
    for place in map(shelf.place, item.hosts):
        if place.folder and (place.folder / name).is_file():
            path = place.folder / name
            shelf.learn(item.key, size=path.stat().st_size, gguf=local_facts(path))
            return
    known = shelf.lock.get(item.key)
    origin = net.origin_of(
        (known.taken if known else "") or item.source,
        (known.commit if known else "") or item.revision,
        shelf.environment,
    )
    if origin is None:
        folders = ", ".join(str(shelf.place(host)) for host in item.hosts) or "a host's models folder"
        raise net.FetchError(f"{item.source}: is a bare file name and not there; put it into {folders}")
    said = net.look(origin, shelf.net)
    facts = None
    if name.endswith(GGUF):
        try:
            with net.stream(origin, shelf.net) as read:
                facts = _facts([read_header(read)])
        except HeaderError as error:
            raise net.FetchError(f"{net.shown(origin)}: the file {error}") from None
    shelf.learn(item.key, size=said.size, sha256=said.sha256, commit=said.commit, gguf=facts)


# --- verify and ls ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One file in one folder."""

    model: str
    file: str
    host: str
    folder: str
    state: State
    size: int
    quantization: str
    context: int
    trained: int
    sha256: str
    used_by: tuple[str, ...]
    source: str


def rows(shelf: Shelf, names: Sequence[str] = (), hosts: Iterable[str] | None = None) -> list[Row]:
    """Every file in every folder that needs it, with what a look at it tells."""
    found = []
    for item in wanted_files(shelf.site, names, hosts, shelf.lock):
        known = shelf.lock.get(item.key)
        for host in item.hosts or ("",):
            place = shelf.place(host) if host else None
            found.append(_row(shelf, item, known, place, _state(shelf, item, known, place)))
    return found


def _state(shelf: Shelf, item: Wanted, known: LockedFile | None, place: Place | None) -> State:
    name = shelf.file(item.key)
    if place is None:
        return "unknown"
    if place.folder:
        return state_of(place.folder / name, known)
    size = place.far.size(name) if place.far else None
    if size is None:
        return "missing"
    if known is None or not known.sha256:
        return "not pinned"
    return "there" if size == known.size else "wrong size"


def _row(shelf: Shelf, item: Wanted, known: LockedFile | None, place: Place | None, state: State) -> Row:
    gguf = known.gguf if known else None
    weights: Model = shelf.site.inventory.models[item.models[0]]
    host = place.host if place else ""
    pools = {
        replica.pool
        for replica in shelf.site.replicas
        if replica.host == host and not set(item.models).isdisjoint(replica.models)
    }
    return Row(
        model=", ".join(item.models), file=shelf.file(item.key), host=host, folder=str(place or ""), state=state,
        size=known.size if known else 0, quantization=gguf.quantization if gguf else "", context=weights.context,
        trained=gguf.context if gguf else 0, sha256=known.sha256 if known else "", used_by=tuple(sorted(pools)),
        source=item.source,
    )  # fmt: skip


def verify(shelf: Shelf, names: Sequence[str] = (), hosts: Iterable[str] | None = None, jobs: int = JOBS) -> list[Row]:
    """Every file in every folder after it was read from its first to its last byte."""
    items = wanted_files(shelf.site, names, hosts, shelf.lock)
    work: dict[str, Callable[[Callable[[int], None]], Row]] = {}
    sizes: dict[str, int] = {}
    for item in items:
        for place in map(shelf.place, item.hosts):
            name = f"{shelf.file(item.key)} on {place.host}"
            sizes[name] = (shelf.lock.get(item.key) or LockedFile(file="x")).size
            work[name] = partial(_verified, shelf, item, place)
    done, problems = _all(shelf, jobs, work, sizes)
    _raise(problems, "the others were read")
    return [done[name] for name in work]


def _verified(shelf: Shelf, item: Wanted, place: Place, told: Callable[[int], None]) -> Row:
    known = shelf.lock.get(item.key)
    state = _state(shelf, item, known, place)
    if state not in ("there", "verified", "damaged") or known is None:
        return _row(shelf, item, known, place, state)
    if place.far:
        is_good = place.far.checksum(known.file) == known.sha256
    else:
        path = (place.folder or Path()) / known.file
        found = net.checksum(path, shelf.net.stop, told).sha256
        is_good = found == known.sha256
        remember(path, found, shelf.mutex)
    return _row(shelf, item, known, place, "verified" if is_good else "damaged")
