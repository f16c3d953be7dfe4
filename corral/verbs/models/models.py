"""`models ls | pull | verify | inspect`: every model file that the farm's servers read, and what is known of it.

Files of hosts that are this machine go straight into their models folder; for a host reached by ssh they are fetched
into a store on this machine and copied there, so that the host needs neither the internet nor a login. What is found
out goes into the lock beside the inventory.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from corral.build import Plan, load_site
from corral.config.file_names import file_of, is_below, tag_of
from corral.config.gguf_header import HeaderError, facts_of, read_header
from corral.config.inventory import OWN_FOLDER, Model, folder_of
from corral.config.load import load_inventory
from corral.config.model_lock import Gguf, LockedFile, ModelLock
from corral.config.model_paths import path_on
from corral.contributions import Contributions
from corral.errors import CorralError, UsageError, did_you_mean
from corral.plan.site import Site
from corral.runtime.hosts import ComposeHost
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.verbs.models import fetch as net
from corral.verbs.models.far_files import FarFolder
from corral.verbs.models.local_files import LocalFolder
from corral.verbs.models.stores import Found, find

# Files of a repository that are no models by themselves, and those that belong to a first part.
_NO_MODEL = re.compile(r"(?i)(^|/)(mmproj|imatrix)|mmproj[^/]*\.gguf$|imatrix\.gguf$")
_LATER = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
MOST_SHOWN = 12
PULL_LOCK = ".models-pull.lock"
JOBS = 3
ASKERS = 8
GGUF = ".gguf"
QUANTIZATION = re.compile(r"(?i)(?<![a-z0-9])(i?q\d(?:_[a-z0-9]+)*|tq\d_\d|mxfp4|bf16|f16|fp16|f32)(?![a-z0-9])")
WEIGHTS = ".safetensors"
# Files of a repository that are fetched: data, and no pickles (.bin, .pt, .ckpt), which run code when loaded.
TAKEN = (WEIGHTS, ".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt")
# Says that a repository is a diffusers pipeline: its weights lie in folders, those beside it are duplicates.
PIPELINE = "model_index.json"
State = Literal["verified", "there", "not pinned", "missing", "wrong size", "damaged", "unknown"]
Folder = LocalFolder | FarFolder
Done = TypeVar("Done")
# A piece of work; it is given what hears how many bytes of how many are done.
Work = Callable[[net.Progress], Done]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file that servers read: what the lock calls it, and who wants it where."""

    key: str
    source: str
    revision: str
    models: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    # What the inventory says that its checksum is.
    sha256: str = ""
    # The repository that it is a file of, when all of it is served.
    repository: str = ""

    @property
    def is_fetchable(self) -> bool:
        """Whether it is fetched; else a person puts it into the models folder."""
        return net.origin_of(self.source, "", {}) is not None


@dataclass(slots=True)
class Store:
    """All model files of a site, and what fetching them needs: the lock, the network, and where progress is shown."""

    site: Site
    inventory: Path
    out: Path
    talk: Console
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    net: net.Net = field(default_factory=lambda: net.Net(net.open_client()))
    lock: ModelLock = field(init=False)
    mutex: threading.RLock = field(default_factory=threading.RLock)
    # Paths in a models folder of files that got another one in this run.
    moved: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = ModelLock.read(self.lock_path)

    @property
    def lock_path(self) -> Path:
        """Where the lock lies."""
        return ModelLock.beside(self.inventory)

    def known(self, key: str) -> LockedFile:
        """What is known of a file, at least its path in a models folder."""
        path = self.moved.get(key) or self.site.paths.get(key)
        if found := self.lock.get(key):
            return found.model_copy(update={"file": path}) if path else found
        source = key.rpartition("@")[0] if key.startswith(net.HUB) and "@" in key else key
        return LockedFile(file=path or file_of(source))

    def known_on(self, key: str, host: str) -> LockedFile:
        """The same, with its path on a host: a whole one where it lies in a store."""
        known = self.known(key)
        path = path_on(host, self.site.host(host), known, known.file)
        return known.model_copy(update={"file": path})

    def learn(self, key: str, **facts: Any) -> None:
        """Puts what was found out of a file into the lock, on disk at once."""
        with self.mutex:
            if facts.get("file"):
                self.moved[key] = facts["file"]
            changed = self.known(key).model_copy(update={name: fact for name, fact in facts.items() if fact})
            if changed != self.lock.get(key):
                self.write(self.lock.with_files({key: changed}))

    def put(self, host: str, places: Mapping[str, str], **facts: Any) -> None:
        """Notes at which places of a host files lie; an empty one: in its models folder, by the path that all have."""
        with self.mutex:
            changed: dict[str, LockedFile] = {}
            for key, place in places.items():
                known = self.known(key)
                others = {name: there for name, there in known.places.items() if name != host}
                new = known.model_copy(update={"places": others | ({host: place} if place else {}), **facts})
                changed |= {key: new} if new != known else {}
            if changed:
                self.write(self.lock.with_files(changed))

    def write(self, lock: ModelLock) -> None:
        """Takes another lock, and puts it on the disk."""
        with self.mutex:
            self.lock = lock
            lock.write(self.lock_path)

    def folder(self, host: str) -> Folder:
        """The models folder of a host."""
        facts = self.site.host(host)
        if facts.ssh is None:
            return LocalFolder(Path(os.path.normpath(self.out / host / facts.models_dir)))
        there = ComposeHost(Plan(self.site, Contributions()), host, self.out)
        return FarFolder(there, there.models_folder)

    def root(self, host: str, name: str) -> str:
        """One of a host's folders with model files, as its `Folder` takes the beginning of a name."""
        if name != OWN_FOLDER:
            return self.site.host(host).model_stores[name]
        folder = self.folder(host)
        return str(folder.path.absolute()) if isinstance(folder, LocalFolder) else "."

    def wanted(self, names: Sequence[str] = (), hosts: Iterable[str] | None = None) -> list[Wanted]:
        """The files of some models (all if none) that some hosts need (all if None), in the order of models.

        Raises:
            UsageError: there is no such model.
        """
        models = self.site.inventory.models
        for name in names:
            if name not in models:
                raise UsageError(f'no model named "{name}"; {did_you_mean(name, models)}')
        chosen = set(self.site.inventory.hosts if hosts is None else hosts)
        found: dict[str, Wanted] = {}
        for name in (name for name in models if not names or name in names):
            where = {item.host for item in self.site.replicas if name in item.models and item.host in chosen}
            for item in _files_of(models[name], self.lock):
                old = found.get(item.key, item)
                found[item.key] = replace(
                    item,
                    models=(*old.models, name),
                    hosts=tuple(sorted({*old.hosts, *where})),
                    sha256=max(old.sha256, item.sha256),
                )
        return list(found.values())


def _files_of(weights: Model, lock: ModelLock) -> Iterator[Wanted]:
    """A model's own files, or those that its repositories have by the lock."""
    for source in weights.sources if weights.reads_files else ():
        yield Wanted(weights.key(source), source, weights.revision_of(source), sha256=weights.sha256_of(source))
    for source in weights.repositories:
        revision = weights.revision_of(source)
        for key in lock.members(source, revision):
            yield Wanted(key, key.rpartition("@")[0], revision, repository=source)


# --- work side by side -----------------------------------------------------------------------------------------------


def side_by_side(store: Store, jobs: int, work: Mapping[str, Work[Done]]) -> tuple[list[Done], list[CorralError]]:
    """Results of all pieces of work in their order, and what went wrong; each has a progress bar once it has begun.

    All end at once when the person interrupts them or one of them fails in another way than by a CorralError.
    """
    done: dict[str, Done] = {}
    problems: list[CorralError] = []
    bars = Progress(*net.COLUMNS, console=store.talk)
    with Interrupts(), ThreadPoolExecutor(jobs) as pool:
        try:
            names = {pool.submit(job, _bar(bars, name)): name for name, job in work.items()}
            for future in as_completed(names):
                try:
                    done[names[future]] = future.result()
                except CorralError as error:
                    problems.append(error)
        except BaseException:
            store.net.end()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            if bars.live.is_started:
                bars.stop()
    return [done[name] for name in work if name in done], problems


def _bar(bars: Progress, name: str) -> net.Progress:
    """Shows a piece of work once it says how far it is."""
    tasks: list[TaskID] = []

    def tell(there: int, total: int) -> None:
        if not tasks:
            bars.start()
            tasks.append(bars.add_task(name))
        bars.update(tasks[0], completed=there, total=total or None)

    return tell


def _raise(problems: Sequence[CorralError], words: str) -> None:
    if problems:
        raise CorralError("\n".join([*dict.fromkeys(map(str, problems)), words]))


# --- what lies in a folder -------------------------------------------------------------------------------------------


def state_of(folder: Folder, known: LockedFile) -> State:
    """What a look at a file tells without reading it: whether it is there and was verified since it last changed."""
    size = folder.size(known.file)
    if size is None:
        return "missing"
    if not known.sha256:
        return "not pinned"
    if known.size and size != known.size:
        return "wrong size"
    last = folder.last_read(known.file)
    return "there" if last is None else "verified" if last[0] == known.sha256 else "damaged"


def _read(store: Store, known: LockedFile, folder: Folder, progress: net.Progress) -> State:
    """The same after the file was read from its first to its last byte, unless a look was enough."""
    state = state_of(folder, known)
    if state not in ("there", "verified", "damaged"):
        return state
    return "verified" if folder.checksum(known.file, store.net, progress) == known.sha256 else "damaged"


# --- where files come from -------------------------------------------------------------------------------------------


def _name_tags(store: Store, choice: Choice) -> None:
    """Puts into the lock which files are meant by quantizations (`hf:owner/repo:Q4_K_M`) that it does not know yet."""
    models = load_inventory(store.inventory).inventory.models
    chosen = [models[name] for name in models if name in choice.names or not choice.names]
    tags = {
        weights.key(source): (weights, source) for weights in chosen for source in weights.sources if tag_of(source)
    }
    found = {
        key: _file_with_tag(store, source, weights.revision_of(source), choice)
        for key, (weights, source) in tags.items()
        if choice.update or key not in store.lock.tags
    }
    if found != {key: store.lock.tags.get(key) for key in found}:
        store.write(store.lock.model_copy(update={"tags": {**store.lock.tags, **found}}))
        store.site = load_site(load_inventory(store.inventory))


def _file_with_tag(store: Store, source: str, revision: str, choice: Choice) -> str:
    """The file of a repository that has a quantization; raises FetchError with those that there are."""
    tag, repository = tag_of(source), source.rpartition(":")[0]
    offline = choice.offline
    if offline is not None and not (offline / repository.removeprefix(net.HUB)).is_dir():
        paths = sorted(path.name for path in offline.iterdir())
    else:
        paths = sorted(net.listing(repository, revision or "main", store.environment, offline))
    files = [path for path in paths if path.endswith(GGUF) and not _NO_MODEL.search(path) and not _LATER.search(path)]
    word = re.compile(rf"(?i)(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9_])")
    fitting = [path for path in files if word.search(PurePosixPath(path).name)]
    # Unsloth's own mixtures have the name of what they are made from behind `UD-`.
    plain = [path for path in fitting if not re.search(rf"(?i)UD-{re.escape(tag)}", path)] or fitting
    if len(plain) == 1:
        store.talk.print(Text(f"{source} is {plain[0]}", "dim"))
        return f"{repository}/{plain[0]}"
    words = f"fits {len(plain)} files" if plain else "fits no file"
    shown = ", ".join((plain or files)[:MOST_SHOWN]) or "no .gguf files at all"
    raise net.FetchError(f"{source}: {tag} {words}; name one as {repository}/…: the repository has {shown}")


def _find_places(store: Store, choice: Choice) -> None:
    """Puts into the lock which files hosts have in their stores, or elsewhere in their models folder."""
    items = {item.key: item for item in store.wanted(choice.names, choice.hosts)}
    models = store.site.inventory.models
    groups = {tuple(map(model.key, group)) for model in models.values() if model.reads_files for group in model.groups}
    folders = ((source, model.revision_of(source)) for model in models.values() for source in model.repositories)
    groups |= {tuple(store.lock.members(*folder)) for folder in folders}
    work = {
        f"{keys[0]} on {host}": partial(_find_on, store, [items[key] for key in keys], host, choice)
        for keys in sorted(groups)
        if keys and keys[0] in items
        for host in items[keys[0]].hosts
    }
    _raise(side_by_side(store, ASKERS, work)[1], "the others were looked for")


def _find_on(store: Store, items: Sequence[Wanted], host: str, choice: Choice, _progress: net.Progress) -> None:
    """Finds files that belong into one folder, all in the same store, unless the models folder has them."""
    folder = store.folder(host)
    if all(folder.size(store.known(item.key).file) is not None for item in items):
        store.put(host, dict.fromkeys((item.key for item in items), ""))
        return
    for name in store.site.host(host).model_folders:
        found = [_in_store(store, item, host, name, choice) for item in items]
        if all(found):
            for item, there in zip(items, filter(None, found), strict=True):
                _note_place(store, item, host, f"{name}/{there.path}", there, choice)
            return
    store.put(host, dict.fromkeys((item.key for item in items), ""))


def _in_store(store: Store, item: Wanted, host: str, name: str, choice: Choice) -> Found | None:
    """The file in a store of a host, if it is the pinned one as far as that can be told without reading it."""
    folder, root, known = store.folder(host), store.root(host, name), store.known(item.key)
    if item.source.startswith(net.FOLDER) and isinstance(folder, FarFolder):
        return None  # it names a file of this machine
    there = find(folder, root, item.source, item.revision, "" if choice.update else known.commit)
    if there and there.outside and not store.site.is_local(host):
        words = f"is a link to {there.outside}, outside of the folder that servers see; it is not used"
        store.talk.print(Text(f"{host}: {root}/{there.path}: {words}", "yellow"))
        return None
    wanted = item.sha256 or ("" if choice.update else known.sha256)
    return there if there and (not there.sha256 or wanted in ("", there.sha256)) else None


def _note_place(store: Store, item: Wanted, host: str, place: str, there: Found, choice: Choice) -> None:
    """Puts into the lock where a host has a file, and what the store and the file say of it."""
    known = store.known(item.key)
    is_new = choice.update or not known.sha256
    facts = {"sha256": there.sha256, "commit": there.commit} if is_new and there.sha256 != known.sha256 else {}
    store.put(host, {item.key: place}, **facts)
    if facts or not (known.gguf or known.size):
        _learn_there(store, item.key, host)


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


@dataclass(frozen=True, slots=True)
class Order:
    """One file that is to be fetched: from where, what it must be, into which folder and under which name."""

    key: str
    origin: net.Origin
    expected: net.Content
    folder: LocalFolder
    name: str
    # The folders that lack it.
    lacking: Sequence[Folder]


def pull(store: Store, choice: Choice) -> None:
    """Every file is in every folder that needs it, checked; raises CorralError with all that could not be done."""
    with alone(store.lock_path.parent / PULL_LOCK, "models pull"):
        _name_tags(store, choice)
        _list_repositories(store, choice)
        _find_places(store, choice)
        items = [item for item in store.wanted(choice.names, choice.hosts) if item.hosts]
        if not choice.update:
            _refuse_other_pins(store, items)
        found, problems = side_by_side(
            store, choice.jobs, {item.key: partial(_order, store, item, choice) for item in items}
        )
        orders = [order for order in found if order is not None]
        _check_room(orders)
        _, failed = side_by_side(store, choice.jobs, {order.name: partial(_bring, store, order) for order in orders})
    _raise([*problems, *failed], "what is there is whole; run it again, it goes on where it stopped")
    count = len({store.known(item.key).file for item in items})
    store.talk.print(f"{count} files are there and as {store.lock_path.name} says; {len(orders)} were fetched")


def _list_repositories(store: Store, choice: Choice) -> None:
    """Puts the files of repositories into the lock that are not there yet; folders are left to the person."""
    for name, weights in store.site.inventory.models.items():
        if weights.reads_files or (choice.names and name not in choice.names):
            continue
        for source in weights.sources:
            revision = weights.revision_of(source)
            if source not in weights.repositories:
                words = f"put the folder {source} into the models folder of its hosts"
                store.talk.print(Text(f"{name}: {words}", "dim"))
            elif not store.lock.members(source, revision):
                _list_repository(store, source, revision, choice)


def _list_repository(store: Store, source: str, revision: str, choice: Choice) -> None:
    """Puts the files of one into the lock, all at once, each with its place in a models folder."""
    there = net.listing(source, revision, store.environment, choice.offline)
    folder, taken = folder_of(source, revision), chosen_files(there)
    strange = [path for path in taken if not is_below(f"{folder}/{path}")]
    if strange:
        raise net.FetchError(f"{source}: names a file {strange[0]!r}, which may lead outside of its folder")
    if not any(path.endswith(WEIGHTS) for path in taken):
        words = "pickled weights (.bin, .pt, .ckpt) run code when they are loaded, and are not taken"
        raise net.FetchError(f"{source}: has no {WEIGHTS} files at {revision[:12]}; {words}: name another repository")
    files = {
        f"{source}/{path}@{revision}": LockedFile(
            file=f"{folder}/{path}", size=there[path].size, sha256=there[path].sha256, commit=revision
        )
        for path in taken
    }
    store.write(store.lock.with_files(files))  # a part of the list would pass for the whole


def chosen_files(paths: Iterable[str]) -> list[str]:
    """Which files of a repository are fetched: weights in safetensors and the text that belongs to them."""
    is_pipeline = PIPELINE in (found := list(paths))
    return [
        path
        for path in sorted(found)
        if path.endswith(TAKEN) and not (is_pipeline and path.endswith(WEIGHTS) and "/" not in path)
        if not re.search(r"(^|/)\.[^./]", path)
    ]


def _refuse_other_pins(store: Store, items: Sequence[Wanted]) -> None:
    """Raises ChecksumError when the inventory and the lock want different files."""
    for item in items:
        if item.sha256 and store.known(item.key).sha256 not in {"", item.sha256}:
            words = f"sha256 in the inventory is not what {store.lock_path.name} says"
            raise net.ChecksumError(f"{item.source}: {words}; look into it, then take it with: models pull --update")


def _lacks(store: Store, item: Wanted, host: str, progress: net.Progress) -> bool:
    """Whether the pinned file is not there. It is read unless an earlier run did; one that cannot be fetched is pinned.

    A file that has its checksum for its name, as in a Hugging Face cache, is not read before `verify`.
    """
    folder, known = store.folder(host), store.known_on(item.key, host)
    is_placed = host in known.places
    last = folder.last_read(known.file)
    if last and last[0] == known.sha256:
        return False
    is_told = is_placed and bool(known.sha256) and known.sha256 in folder.real(known.file)
    state = state_of(folder, known) if is_told else _read(store, known, folder, progress)
    if state in ("damaged", "wrong size") and (is_placed or not item.is_fetchable):
        words = (
            f"is not the file that {store.lock_path.name} has; look into it, then take it with: models pull --update"
        )
        raise net.ChecksumError(f"{shown_path(folder, known.file)}: {words}")
    if state == "damaged":
        words = "is damaged or another file; fetching it again"
        store.talk.print(Text(f"{shown_path(folder, known.file)}: {words}", "yellow"))
    if state == "not pinned" and (is_placed or not item.is_fetchable):
        _adopt(store, item, host, progress)
        return False
    return state not in ("verified", *(("there",) if is_told else ()))


def shown_path(folder: Folder | str, file: str) -> str:
    """A file of a folder as people find it."""
    return file if file.startswith("/") else f"{folder}/{file}"


def _adopt(store: Store, item: Wanted, host: str, progress: net.Progress) -> None:
    """Pins a file that a person has put there; raises ChecksumError when the inventory wants another one."""
    folder, name = store.folder(host), store.known_on(item.key, host).file
    found = folder.checksum(name, store.net, progress)
    if item.sha256 not in ("", found):
        words = f"its checksum is {found}, and sha256 in the inventory is another"
        raise net.ChecksumError(f"{shown_path(folder, name)}: {words}")
    _learn_there(store, item.key, host, found)


def _order(store: Store, item: Wanted, choice: Choice, progress: net.Progress) -> Order | None:
    """How to fetch a file; None when it is everywhere and, for an update, still the one that its source has."""
    lacking = [store.folder(host) for host in item.hosts if _lacks(store, item, host, progress)]
    if not lacking and not (choice.update and item.is_fetchable):
        return None
    known = LockedFile(file=store.known(item.key).file) if choice.update else store.known(item.key)
    pinned = net.Content(known.size, known.sha256 or item.sha256, known.commit)
    source = known.taken or item.source
    try:
        origin, said = _ask(store, item, source, pinned.commit, choice.offline)
    except net.MissingError:
        source = "" if item.repository else _with_quantization(item.source, choice.fallback)
        if source in ("", item.source):
            raise
        pinned = net.Content()
        origin, said = _ask(store, item, source, "", choice.offline)
        store.talk.print(Text(f"{item.source} is not to be had; taking {file_of(source)} for it", "yellow"))
        path = str(PurePosixPath(known.file).with_name(file_of(source)))
        store.learn(item.key, file=path, taken=source, size=said.size, sha256=said.sha256)
    if pinned.sha256 and said.sha256 not in ("", pinned.sha256):
        raise net.ChecksumError(
            f"{item.source}: the source has another file now than {store.lock_path.name} (or sha256 in the inventory) "
            "says; look into it, then take it with: models pull --update"
        )
    if not lacking and said.sha256 and store.known(item.key).sha256 == said.sha256:
        return None
    if not lacking:
        for host in item.hosts:
            store.put(host, {item.key: ""})
        lacking = [store.folder(host) for host in item.hosts]
    passing = LocalFolder(choice.store or default_store(store.environment))
    target = next((folder for folder in lacking if isinstance(folder, LocalFolder)), passing)
    return Order(item.key, origin, pinned.filled(said), target, store.known(item.key).file, lacking)


def _ask(
    store: Store, item: Wanted, source: str, commit: str, offline: Path | None = None
) -> tuple[net.Origin, net.Content]:
    """Where a file comes from, and what its source says of it; raises FetchError when it is not to be had."""
    if offline is not None:
        origin = _offline(source, offline, is_member=bool(item.repository))
    elif (found := net.origin_of(source, commit or item.revision, store.environment)) is not None:
        origin = found
    elif source.startswith("ollama:"):
        name = source.removeprefix("ollama:").partition("#")[0]
        words = f"is in no store of {', '.join(item.hosts)}; fetch it there: ollama pull {name}; and name "
        words += "Ollama's folder in model_stores, such as /usr/share/ollama/.ollama/models"
        raise net.FetchError(f"{source}: {words}")
    else:
        folders = ", ".join(str(store.folder(host)) for host in item.hosts) or "a host's models folder"
        raise net.FetchError(f"{source}: is not there; put it into {folders}, or name its folder in model_stores")
    return origin, net.look(origin, store.net)


def _offline(source: str, folder: Path, *, is_member: bool) -> net.Origin:
    """The file in a folder that a person has brought: by its name, or as in the repository."""
    below = source.partition(":")[2] if ":" in source else source
    names = [*([] if is_member else [file_of(source)]), "/".join(filter(None, below.split("/")))]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise net.MissingError(f"{source.partition('?')[0]}: {file_of(source)} is not in {folder}")
    return net.Origin(source, path=path)


def _with_quantization(source: str, wanted: str) -> str:
    """The same model in another quantization; empty when none is wanted or the file's name does not tell its own."""
    start, slash, name = source.rpartition("/")
    found = QUANTIZATION.search(name) if wanted else None
    return f"{start}{slash}{name[: found.start()]}{wanted}{name[found.end() :]}" if found else ""


def default_store(environment: Mapping[str, str]) -> Path:
    """Folder on this machine for files that other hosts need."""
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "corral" / "models"


def _check_room(orders: Sequence[Order]) -> None:
    """Raises CorralError when the files do not all fit on their disks, before the first byte is fetched."""
    wanted: dict[str, int] = defaultdict(int)
    disks: dict[str, tuple[str, int | None]] = {}
    for order in orders:
        for name, folder in {str(folder): folder for folder in (order.folder, *order.lacking)}.items():
            disks[name] = disks.get(name) or folder.disk()
            begun = folder.size(f"{order.name}.part") if isinstance(folder, LocalFolder) else 0
            wanted[disks[name][0]] += order.expected.size - (begun or 0)
    for name, (disk, free) in disks.items():
        if free is not None and wanted[disk] > free:
            largest = max(orders, key=lambda order: order.expected.size)
            raise CorralError(
                f"{name}: {_gib(wanted[disk])} GiB are to be fetched, {_gib(free)} GiB are free: "
                f"{_gib(wanted[disk] - free)} GiB are missing; nothing was fetched. Free some, set models_dir to "
                "another disk, or take a smaller quantization; "
                f"the largest is {largest.name} ({_gib(largest.expected.size)} GiB)"
            )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _bring(store: Store, order: Order, progress: net.Progress) -> None:
    """Fetches a file, and copies it into the other folders that lack it."""
    known = store.known(order.key)
    is_pinned = known.sha256 == order.expected.sha256
    if not is_pinned or _read(store, known, order.folder, progress) != "verified":  # of an earlier run
        _fetch(store, order, progress)
    for folder in order.lacking:
        if folder != order.folder:
            folder.put(order.folder.path / order.name, store.known(order.key), store.net, progress)


def _fetch(store: Store, order: Order, progress: net.Progress) -> None:
    """Fetches a file, checks that it is whole, pins it, and gives it its name: in that order."""
    target = order.folder.path / order.name
    found = net.fetch(order.origin, target, order.expected, store.net, progress)
    part = net.part_of(target)
    try:
        with part.open("rb") as file:
            facts = facts_in(file.read, str(order.origin), found.size)
    except net.FetchError as error:
        part.unlink()
        raise net.FetchError(f"{error}; what was fetched is removed") from None
    commit = order.expected.commit
    store.learn(order.key, file=order.name, size=found.size, sha256=found.sha256, commit=commit, gguf=facts)
    net.settle(target)
    order.folder.remember(order.name, found.sha256)


# --- what a file says of itself --------------------------------------------------------------------------------------


def facts_in(read: Callable[[int], bytes], name: str, size: int = 0, *, is_gguf: bool = False) -> Gguf | None:
    """What a GGUF file says of itself; None for other files, and those that say no architecture.

    Args:
        read: gives its bytes from the beginning.
        name: its place or source, for messages.
        size: its bytes, if it has to be whole.
        is_gguf: it is a GGUF file, although its name does not say so.

    Raises:
        FetchError: it is something else, or too short for its tensors.
    """
    if not (is_gguf or name.endswith(GGUF)):
        return None
    try:
        header = read_header(read)
    except HeaderError as error:
        raise net.FetchError(f"{name}: the file {error}") from None
    if size and header.file_size > size:
        raise net.FetchError(f"{name}: the file is cut off: it has {size} bytes of {header.file_size}")
    with suppress(HeaderError):
        return facts_of(header)
    return None


def _learn_there(store: Store, key: str, host: str, sha256: str = "") -> None:
    """Puts into the lock what a file on a host says of itself."""
    folder, name = store.folder(host), store.known_on(key, host).file
    size = folder.size(name) or 0
    with folder.opened(name) as file:
        facts = facts_in(file.read, shown_path(folder, name), size, is_gguf=store.known(key).file.endswith(GGUF))
    store.learn(key, size=size, sha256=sha256, gguf=facts)


def inspect(store: Store, names: Sequence[str] = ()) -> None:
    """Puts into the lock what every file says of itself, read from the beginning of it, here or at its source."""
    with alone(store.lock_path.parent / PULL_LOCK, "models pull"):
        _name_tags(store, Choice(tuple(names)))
        _find_places(store, Choice(tuple(names)))
        items = [item for item in store.wanted(names, None) if not item.repository]
        _, problems = side_by_side(store, ASKERS, {item.key: partial(_inspect, store, item) for item in items})
    _raise(problems, "the others were inspected")
    store.talk.print(f"{len(items)} files are described in {store.lock_path}; look with: ./generate.py plan")


def _inspect(store: Store, item: Wanted, _progress: net.Progress) -> None:
    known = store.known(item.key)
    for host in item.hosts:
        if store.folder(host).size(store.known_on(item.key, host).file) is not None:
            _learn_there(store, item.key, host)
            return
    origin, said = _ask(store, item, known.taken or item.source, known.commit)
    with net.stream(origin, store.net) as read:
        facts = facts_in(read, str(origin))
    store.learn(item.key, size=said.size, sha256=said.sha256, commit=said.commit, gguf=facts)


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


def rows(
    store: Store, names: Sequence[str] = (), hosts: Iterable[str] | None = None, *, reads: bool = False
) -> list[Row]:
    """Every file in every folder that needs it; `reads`: after it was read from its first to its last byte."""
    work = {
        f"{item.key} on {host}": partial(_row, store, item, host, reads)
        for item in store.wanted(names, hosts)
        for host in item.hosts or ("",)
    }
    found, problems = side_by_side(store, JOBS if reads else ASKERS, work)
    _raise(problems, "the others were read")
    return found


def _row(store: Store, item: Wanted, host: str, reads: bool, progress: net.Progress) -> Row:  # noqa: FBT001
    known = store.known_on(item.key, host) if host else store.known(item.key)
    folder = store.folder(host) if host else None
    state: State = "unknown"
    if folder:
        state = _read(store, known, folder, progress) if reads else state_of(folder, known)
    gguf = known.gguf or Gguf(architecture="")
    pools = {
        replica.pool
        for replica in store.site.replicas
        if replica.host == host and not set(item.models).isdisjoint(replica.models)
    }
    return Row(
        model=", ".join(item.models), file=known.file, host=host, folder=str(folder or ""), state=state,
        size=known.size, quantization=gguf.quantization,
        context=store.site.inventory.models[item.models[0]].context,
        trained=gguf.context, sha256=known.sha256, used_by=tuple(sorted(pools)), source=item.source,
    )  # fmt: skip
