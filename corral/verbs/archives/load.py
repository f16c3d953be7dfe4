"""`bundle load`: what a bundle holds, on machines without internet: images, model files, inventory, rendering.

A signature says who made it, or the operator accepts an unsigned one. Every file is checked before anything is changed,
and only what the plan of its inventory asks for is taken; the rendering is made here. What is there already is left as
it is: a load that was cut off goes on when it is run again.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.text import Text

from corral.build import Plan, build_plan
from corral.checks.policy import refuse_weak
from corral.config.file_names import PathBelow
from corral.config.inventory import Name, Word
from corral.config.load import LOCKS, load_texts
from corral.config.messages import from_json
from corral.errors import CorralError, UsageError, on_one_line
from corral.files import write_atomically
from corral.render.output import compare, write
from corral.render.secrets import ENV_FILE
from corral.render.tree import refuse_other_site, render
from corral.runtime.hosts import CommandError, ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.verbs.archives import legacy
from corral.verbs.archives.container import (
    INVENTORY,
    LARGEST_FILE,
    LARGEST_MANIFEST,
    LARGEST_SUMS,
    MANIFEST,
    SUMS,
    Sha256,
    StoredFile,
    Strict,
    amount,
    options_of,
    stored_files,
    sums_of,
)
from corral.verbs.archives.signing import signer_of
from corral.verbs.models.far_files import FarFolder
from corral.verbs.up.survey import check_engine, image_ids

SIGNATURE = "SHA256SUMS.sig"
BLOBS = "blobs/sha256"
PART = ".part"
LARGEST_SIGNATURE = 64 << 10
ImageId = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]


# --- a bundle --------------------------------------------------------------------------------------------------------


class Image(Strict):
    """An image of a host's Docker engine."""

    id: ImageId
    references: tuple[Word, ...]
    digests: tuple[str, ...]
    """Of the registry that it came from, where the engine knows one."""
    platform: str
    size: int
    archive: Sha256 | None = None
    """The blob that `docker load` reads: this image and others that the same hosts need."""
    files: Mapping[PathBelow, Sha256] = {}
    """Format 1: the files of that archive by name, each a blob."""

    @property
    def blobs(self) -> frozenset[str]:
        """Every blob that it needs."""
        return frozenset(self.files.values()) | ({self.archive} if self.archive else set())


class ModelFile(Strict):
    """A model file of a host, whose content is a blob."""

    file: PathBelow
    source: Word
    sha256: Sha256
    size: int = Field(ge=0)


class HostParts(Strict):
    """What one host needs."""

    images: tuple[ImageId, ...]
    models: tuple[ModelFile, ...]


class Manifest(Strict):
    """What a bundle is of."""

    format: Literal["corral-bundle/1", "corral-bundle/2"]
    corral: str
    site: str
    made: datetime
    platform: str
    """For which the Python wheels are, as `Linux x86_64, Python 3.11`; empty without the kit."""
    hosts: Mapping[Name, HostParts]
    images: tuple[Image, ...]


@dataclass(frozen=True)
class _Files:
    """The files of a bundle, with the checksums that they have to have."""

    path: Path
    stored: Mapping[str, StoredFile]
    sums: Mapping[str, str]

    def read(self, name: str, largest: int = LARGEST_FILE) -> bytes:
        """A small file; raises CorralError when it is too large, or not what was checked before."""
        if self.stored[name].size > largest:
            raise CorralError(f"{self.path}: {name} is too large: more than {largest >> 20} MiB")
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content; raises CorralError before its last chunk when it is not what was checked before."""
        total, last = hashlib.sha256(), b""
        for chunk in self.stored[name].chunks():
            total.update(chunk)
            yield last
            last = chunk
        if total.hexdigest() != self.sums[name]:
            words = f"{name} was changed while it was read; copy the bundle again, then run this again"
            raise CorralError(f"{self.path}: {words}")
        yield last


@dataclass(frozen=True)
class Bundle(_Files):
    """A bundle that is complete and as it was made."""

    manifest: Manifest

    def image_archive(self, image: Image) -> Stream:
        """What `docker load` reads, checked as `chunks`."""
        blob = f"{BLOBS}/{image.archive}"
        return Stream(self.chunks(blob) if image.archive else legacy.image_archive(self, image.files))


class Stream:
    """Chunks, as `ComposeHost.feed` reads them."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = filter(None, chunks)

    def read(self, _count: int = -1) -> bytes:
        """The next chunk, whatever its length; none at the end."""
        return next(self._chunks, b"")


class Content(Stream):
    """What a stored file holds, read from any place on."""

    def __init__(self, file: StoredFile) -> None:
        super().__init__(file.chunks())
        self._file = file

    def seek(self, place: int) -> None:
        """Go on at this byte."""
        self._chunks = filter(None, self._file.chunks(place))


# Gets the list of checksums and its signature, if there is one; raises CorralError for a bundle that is not wanted.
Vouch = Callable[[bytes, bytes | None], None]


def read_bundle(path: Path, vouch: Vouch, progress: Callable[[int], object] = lambda _count: None) -> Bundle:
    """The bundle in a folder or file, every byte of it checked.

    Args:
        path: what `bundle` made.
        vouch: asked first whether the list of checksums is authentic.
        progress: gets every number of bytes that was checked.

    Raises:
        CorralError: it is damaged, not complete, or no bundle; the message says which file.
    """
    with _explained(path):
        stored = stored_files(path)
        sums = _sums(path, stored, vouch)
        damaged = [name for name, sha256 in sums.items() if _sha256(stored.get(name), progress) != sha256]
        if damaged:
            names = ", ".join(damaged[:4]) + (" …" if damaged[4:] else "")
            raise CorralError(f"{path}: damaged: {names}; copy the bundle again, or make it again (it goes on)")
        manifest = _manifest(path, _Files(path, stored, sums).read(MANIFEST, LARGEST_MANIFEST))
    wanted = {sha256 for image in manifest.images for sha256 in image.blobs}
    wanted |= {model.sha256 for parts in manifest.hosts.values() for model in parts.models}
    lost = sorted(sha256 for sha256 in wanted if sums.get(f"{BLOBS}/{sha256}") != sha256)
    if lost:
        raise CorralError(f"{path}: damaged: {BLOBS}/{lost[0]} is not in {SUMS}")
    return Bundle(path, stored, sums, manifest)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the disk or `tarfile` says of a bundle into a CorralError."""
    try:
        yield
    except FileNotFoundError:
        raise CorralError(f"{path}: no such file or folder") from None
    except OSError as error:
        words = f"{error.filename or path}: cannot be read: {error.strerror or error}"
        raise CorralError(f"{words}; run the same command again to go on") from None
    except tarfile.TarError as error:
        raise CorralError(f"{path}: is no bundle that corral made, or is damaged: {error}") from None


def _sums(path: Path, stored: Mapping[str, StoredFile], vouch: Vouch) -> dict[str, str]:
    """The checksum of every file, from a list that `vouch` accepts."""
    if SUMS not in stored:
        words = "is not complete, or no bundle; run ./generate.py bundle again, it goes on where it stopped"
        raise CorralError(f"{path}: has no {SUMS}: it {words}")
    text = b"".join(stored[SUMS].chunks(most=LARGEST_SUMS))
    try:
        sums = sums_of(text)
    except ValueError as error:
        raise CorralError(f"{path}: damaged: {error}") from None
    vouch(text, b"".join(stored[SIGNATURE].chunks(most=LARGEST_SIGNATURE)) if SIGNATURE in stored else None)
    return sums


def _sha256(file: StoredFile | None, progress: Callable[[int], object]) -> str:
    """A file's checksum; empty when it is not there."""
    total = hashlib.sha256()
    for chunk in file.chunks() if file else ():
        total.update(chunk)
        progress(len(chunk))
    return total.hexdigest() if file else ""


def _manifest(path: Path, text: bytes) -> Manifest:
    try:
        return from_json(Manifest, text)
    except ValueError as error:
        raise CorralError(f"{path}: {MANIFEST} cannot be read ({error}); did a newer corral make it?") from None


# --- loading it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where a bundle goes, and who has to have made it."""

    inventory: Path
    out: Path
    hosts: frozenset[str] | None = None
    # File of allowed signers; None: unsigned bundles are accepted.
    signers: Path | None = None


def load(path: Path, talk: Console, wanted: Wanted) -> None:
    """Bring what a bundle holds to its hosts, and print the next command.

    Raises:
        UsageError: the place has another inventory or rendering; nothing was changed.
        CorralError: the bundle is damaged, brings what its inventory does not ask for, or is not signed by an
            allowed signer (nothing was changed); or a host does not take something; run it again to go on.
    """
    talk.print(Text(f"{path}: checking every file"))
    bar = Progress(TextColumn("checked"), BarColumn(), DownloadColumn(), console=talk, transient=True)
    with Interrupts(), _explained(path), bar if talk.is_terminal else nullcontext():
        task = bar.add_task("checked", total=_total(path))
        vouch = partial(_vouch, path, talk, wanted.signers)
        bundle = read_bundle(path, vouch, lambda count: bar.advance(task, count))
        if talk.is_terminal:
            bar.stop()
        talk.print(Text(_summary(bundle)))
        plan = _plan(bundle, wanted)
        hosts = _hosts(bundle, plan, wanted)
        _refuse_unasked(bundle, plan, wanted)
        for host in hosts:
            check_engine(host)
        _lay_out(bundle, plan, wanted, talk)
        for host in hosts:
            _load_images(bundle, host, talk)
            _copy_models(bundle, host, talk)
    talk.print(Text(_next(plan, wanted, hosts)))


def _vouch(path: Path, talk: Console, signers: Path | None, listed: bytes, signature: bytes | None) -> None:
    """Print who made the bundle; raises CorralError when no key in the file of signers made the signature."""
    if signers is None:
        digest = hashlib.sha256(listed).hexdigest()
        talk.print(Text(f"{path}: no signature is checked; sha256 of {SUMS}: {digest}", "yellow"))
    elif signature is None:
        words = "make it again with --sign KEYFILE; or, if its sha256 was compared with the maker's, load it --unsigned"
        raise CorralError(f"{path}: is not signed; nothing was changed: {words}")
    else:
        try:
            talk.print(Text(f"{path}: signed by {on_one_line(signer_of(listed, signature, signers))}"))
        except CorralError as error:
            raise CorralError(f"{path}: nothing was changed: {error}") from None


def _total(path: Path) -> int | None:
    try:
        return sum(item.stat().st_size for item in path.rglob("*")) if path.is_dir() else path.stat().st_size
    except OSError:
        return None


def _summary(bundle: Bundle) -> str:
    manifest = bundle.manifest
    models = {model.sha256 for parts in manifest.hosts.values() for model in parts.models}
    return (
        f"whole; site {manifest.site} ({', '.join(manifest.hosts)}), {len(manifest.images)} images, "
        f"{len(models)} model files, made {manifest.made:%Y-%m-%d %H:%M:%S} UTC by corral {manifest.corral}"
    )


def _plan(bundle: Bundle, wanted: Wanted) -> Plan:
    locks = {name: bundle.read(name) for name in LOCKS if name in bundle.sums}
    return build_plan(load_texts(bundle.read(INVENTORY), locks, str(wanted.inventory)))


def _hosts(bundle: Bundle, plan: Plan, wanted: Wanted) -> list[ComposeHost]:
    known = bundle.manifest.hosts
    unknown = sorted((wanted.hosts or frozenset()) - set(known))
    if unknown:
        raise UsageError(f'no host named "{unknown[0]}" in the bundle; there are {", ".join(known)}')
    return compose_hosts(plan, wanted.out, wanted.hosts or set(known))


def _refuse_unasked(bundle: Bundle, plan: Plan, wanted: Wanted) -> None:
    """Raise CorralError when a bundle brings an image or a model file that no service of its inventory reads."""
    manifest = bundle.manifest
    images = {name for image in manifest.images for name in image.references}
    asked = {service.image for service in plan.contributions.services}
    foreign = [f"the image {name}" for name in sorted(images - asked)]
    for host in compose_hosts(plan, wanted.out, set(manifest.hosts)):
        sources = host.model_sources
        models = manifest.hosts[host.name].models
        foreign += [f"{item.file} for {host.name}" for item in models if sources.get(item.file) != item.source]
    if foreign:
        raise CorralError(
            f"{bundle.path}: nothing was changed: it brings {', '.join(foreign[:4])}, which its inventory does not ask "
            f"for; it was made by corral {manifest.corral}: load it with that version, or make it again"
        )


# --- inventory and rendering -----------------------------------------------------------------------------------------


def _lay_out(bundle: Bundle, plan: Plan, wanted: Wanted, talk: Console) -> None:
    """Inventory, locks, and the rendering as this kit makes it; what the bundle has rendered is for people to read."""
    hosts, inventory = set(bundle.manifest.hosts), wanted.inventory
    tree = {path: data for path, data in render(plan).items() if path.partition("/")[0] in hosts}
    refuse_weak(plan, tree)
    places = {INVENTORY: inventory, **{name: inventory.parent / name for name in LOCKS}}
    texts = {place: bundle.read(name) for name, place in places.items() if name in bundle.sums}
    for place, data in texts.items():
        if place.exists() and place.read_bytes() != data:
            raise UsageError(
                f"nothing was changed: {place} is another one than the bundle's; move it away, "
                "or name other places: --inventory FILE --out FOLDER"
            )
    refuse_other_site(plan, wanted.out)
    edited = [change.path for change in compare(tree, wanted.out, hosts) if change.action == "edited"]
    if edited:
        raise UsageError(f"nothing was changed: {wanted.out / edited[0]} was edited by hand; move it away")
    try:
        inventory.parent.mkdir(parents=True, exist_ok=True)
        for place, data in texts.items():
            write_atomically(place, data, 0o644)
    except OSError as error:
        raise CorralError(f"{error.filename or inventory}: cannot be written: {error.strerror}") from None
    write(tree, wanted.out, hosts)
    talk.print(Text(f"{inventory} and {len(tree)} rendered files are in place"))


# --- images ----------------------------------------------------------------------------------------------------------


def _load_images(bundle: Bundle, host: ComposeHost, talk: Console) -> None:
    ids = set(bundle.manifest.hosts[host.name].images)
    wanted = [image for image in bundle.manifest.images if image.id in ids]
    there = image_ids(host, [name for image in wanted for name in image.references])
    missing = []
    for image in wanted:
        is_there = {there[name] for name in image.references} == {image.id}
        talk.print(Text(f"{host.name}: {', '.join(image.references)}: {'is there' if is_there else 'loading'}"))
        missing += [] if is_there else [image]
    for image in {image.archive or image.id: image for image in missing}.values():
        _load_archive(bundle, host, image)
    for image in missing:
        _tag(host, image)


def _load_archive(bundle: Bundle, host: ComposeHost, image: Image) -> None:
    try:
        host.feed(["docker", "load", "--quiet"], bundle.image_archive(image))
    except CommandError as error:
        words = f"{host.name}: {', '.join(image.references)}: the engine does not take it: {error.done.words}"
        raise CorralError(words) from None


def _tag(host: ComposeHost, image: Image) -> None:
    for name in image.references:
        host.run(["docker", "tag", image.id, name], check=False)
    other = {name: found for name, found in image_ids(host, image.references).items() if found != image.id}
    if other:
        name, found = next(iter(other.items()))
        raise CorralError(
            f"{host.name}: {name} has the id {found or 'of nothing'} after loading, not {image.id}; "
            "do both engines keep images in the same way (docker info: containerd snapshotter)?"
        )


# --- model files -----------------------------------------------------------------------------------------------------


def _copy_models(bundle: Bundle, host: ComposeHost, talk: Console) -> None:
    models = bundle.manifest.hosts[host.name].models
    folder = FarFolder(host, host.models_folder)
    missing = [model for model in models if folder.checksum(model.file) != model.sha256]
    needed = sum(model.size for model in missing)
    free = folder.free() if missing else None
    if free is not None and needed > free:
        words = f"{amount(free)} free and {amount(needed)} are needed"
        raise CorralError(f"{host.name}: {host.models_folder}: the disk has {words}; no model file was copied")
    for model in models:
        if model not in missing:
            talk.print(Text(f"{host.name}: {model.file}: is there"))
            continue
        talk.print(Text(f"{host.name}: {model.file}: copying {amount(model.size)}"))
        data = Content(bundle.stored[f"{BLOBS}/{model.sha256}"])
        folder.send(data, model.file, model.size, model.sha256)


def _next(plan: Plan, wanted: Wanted, hosts: Sequence[ComposeHost]) -> str:
    places = options_of(wanted.inventory, wanted.out)
    names = [host.name for host in hosts if plan.secrets_of(host.name)]
    if all((wanted.out / name / ENV_FILE).is_file() for name in names):
        return f"next: ./generate.py up{places}"
    return f"next: ./generate.py secrets init{places} && ./generate.py up{places}"
