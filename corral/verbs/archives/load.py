"""`bundle load`: what a bundle holds, on machines without internet: images, model files, inventory, rendering.

A signature says who made it, or the operator accepts an unsigned one. Every file is checked before anything is changed,
and only what the plan of its inventory asks for is taken; the rendering is made here. What is there already is left as
it is: a load that was cut off goes on when it is run again.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tarfile import BLOCKSIZE, ReadError, TarInfo
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.text import Text

from corral.build import Plan
from corral.checks.policy import refuse_weak
from corral.config.file_names import PathBelow
from corral.config.inventory import Name, Word
from corral.config.load import LOCKS
from corral.config.model_lock import Sha256
from corral.errors import CorralError, UsageError, on_one_line
from corral.render.secrets import ENV_FILE
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.verbs.archives import container
from corral.verbs.archives.container import CHUNK, INVENTORY, MANIFEST, SUMS, Strict, amount
from corral.verbs.archives.target import Site, Target
from corral.verbs.models.far_files import Chunks, FarFolder
from corral.verbs.up.survey import check_engine, image_ids

SIGNATURE = "SHA256SUMS.sig"
BLOBS = "blobs/sha256"
# What a bundle is called in messages, and what helps when it is damaged.
KIND = ("bundle", "copy the bundle again, or make it again (it goes on)")
# Purpose of a signature; one that was made for another purpose is refused.
NAMESPACE = "corral-bundle"
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

    def summary(self) -> Text:
        """One line about what is whole."""
        return Text(
            f"whole; site {self.site} ({', '.join(self.hosts)}), {len(self.images)} images, {len(self.models)} model "
            f"files, made {self.made:%Y-%m-%d %H:%M:%S} UTC by corral {self.corral}"
        )

    @property
    def models(self) -> dict[str, ModelFile]:
        """Every model file by its checksum."""
        return {model.sha256: model for parts in self.hosts.values() for model in parts.models}


@dataclass(slots=True)
class Stored:
    """A file of a bundle: one of a folder, or a part of a tar file."""

    name: str
    path: Path
    size: int
    start: int = 0
    # What it has to have; empty as long as that is not known.
    sha256: str = ""

    def chunks(self, skip: int = 0) -> Iterator[bytes]:
        """Its content after the first `skip` bytes; all of it raises ReadError before its end if it is another one."""
        total, last, left = hashlib.sha256(), b"", self.size - skip
        with self.path.open("rb") as file:
            file.seek(self.start + skip)
            while chunk := file.read(max(0, min(CHUNK, left))):
                left -= len(chunk)
                total.update(chunk)
                yield last
                last = chunk
        if self.sha256 and not skip and total.hexdigest() != self.sha256:
            raise ReadError(f"{self.name} is not what {SUMS} says")
        yield last

    def read(self) -> bytes:
        """Its content, as `chunks`; raises ReadError when it is too large."""
        if self.size > container.LARGEST_FILE:
            raise ReadError(f"{self.name} is too large: more than {amount(container.LARGEST_FILE)}")
        return b"".join(self.chunks())


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that is complete and as it was made."""

    path: Path
    manifest: Manifest
    stored: Mapping[str, Stored]
    # The content of the inventory and its locks.
    files: Mapping[str, bytes]

    def image_archive(self, image: Image) -> Iterator[bytes]:
        """What `docker load` reads; of format 1 put together from its files."""
        if image.archive:
            yield from self.stored[f"{BLOBS}/{image.archive}"].chunks()
            return
        for name, sha256 in image.files.items():
            blob, member = self.stored[f"{BLOBS}/{sha256}"], TarInfo(name)
            member.size = blob.size
            yield member.tobuf()
            yield from blob.chunks()
            yield bytes(-member.size % BLOCKSIZE)
        yield bytes(2 * BLOCKSIZE)


def read_bundle(path: Path, talk: Console, signers: Path | None) -> Bundle:
    """The bundle in a folder or file, every byte of it checked; prints who made it.

    `signers` is a file of allowed signers, one of whom has to have signed it; without it, it may be unsigned.

    Raises:
        CorralError: it is not signed by an allowed signer, damaged, not complete, or no bundle.
    """
    talk.print(Text(f"{path}: checking every file"))
    columns = TextColumn("checked"), BarColumn(), DownloadColumn()
    bar = Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal)
    with container.readable(path, *KIND), bar:
        found = _stored(path)
        if SUMS not in found:
            remedy = "run ./generate.py bundle again, it goes on where it stopped"
            raise CorralError(f"{path}: has no {SUMS}: it is not complete, or no bundle; {remedy}")
        text = found[SUMS].read()
        sums = container.sums_of(text)
        talk.print(_maker(path, text, found.get(SIGNATURE), signers))
        task = bar.add_task("", total=sum(file.size for file in found.values()))
        for name, sha256 in sums.items():
            if name not in found:
                raise ReadError(f"{name} is not in it")
            found[name].sha256 = sha256
            for chunk in found[name].chunks():
                bar.advance(task, len(chunk))
        manifest = _manifest(found[MANIFEST].read(), sums)
        files = {name: found[name].read() for name in (INVENTORY, *LOCKS) if name in sums}
    return Bundle(path, manifest, found, files)


def _stored(path: Path) -> dict[str, Stored]:
    """The files of a folder (links are left out) or of a tar file, by name."""
    if path.is_dir():
        files = [file for file in container.files_below(path) if not file.is_symlink()]
        found = [Stored(str(file.relative_to(path)), file, file.stat().st_size) for file in files]
    else:
        with path.open("rb") as file:
            found = [Stored(part.name, path, part.size, part.start) for part in container.members(file)]
    return {item.name: item for item in found}


def _maker(path: Path, listed: bytes, signature: Stored | None, signers: Path | None) -> Text:
    """Who made a bundle; raises CorralError when no key in the file of signers made the signature."""
    if signers is None:
        digest = hashlib.sha256(listed).hexdigest()
        return Text(f"{path}: no signature is checked; sha256 of {SUMS}: {digest}", "yellow")
    if signature is None:
        remedy = (
            "make it again with --sign KEYFILE; or, if its sha256 was compared with the maker's, load it --unsigned"
        )
        raise CorralError(f"{path}: is not signed; nothing was changed: {remedy}")
    return Text(f"{path}: signed by {on_one_line(signer_of(listed, signature.read(), signers))}")


def _manifest(text: bytes, sums: Mapping[str, str]) -> Manifest:
    """The manifest; raises ReadError when it names a blob that is not there."""
    manifest = container.parsed(Manifest, text)
    blobs = {sha256 for image in manifest.images for sha256 in (*image.files.values(), image.archive) if sha256}
    for sha256 in blobs | manifest.models.keys():
        if sums.get(f"{BLOBS}/{sha256}") != sha256:
            raise ReadError(f"{BLOBS}/{sha256} is not in {SUMS}")
    return manifest


# --- who made it: signatures by OpenSSH's `ssh-keygen -Y`, whose keys people have for ssh ----------------------------


def sign(text: bytes, key: Path) -> bytes:
    """The signature of a text by a private ssh key (or by the agent's, if the file is its public half).

    Raises:
        UsageError: there is no such key file.
        CorralError: ssh-keygen does not sign with it; the message has its reason.
    """
    if not key.is_file():
        raise UsageError(f"{key}: no such file; name an ssh key: --sign ~/.ssh/id_ed25519")
    return _keygen(["sign", "-q", "-f", str(key), "-n", NAMESPACE], text, f"{key}: cannot sign with it")


def signer_of(text: bytes, signature: bytes, allowed: Path) -> str:
    """Who signed a text, by the name in a file of allowed signers (see `man ssh-keygen`).

    Raises:
        UsageError: there is no such file.
        CorralError: no key in that file signed this text; the message has ssh-keygen's reason.
    """
    if not allowed.is_file():
        raise UsageError(f"{allowed}: no such file; its lines are: NAME ssh-ed25519 AAAA…")
    failure = f"nothing was changed: no key in {allowed} made the signature, or it is of another text"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "signature"
        file.write_bytes(signature)
        found = _keygen(["find-principals", "-s", str(file), "-f", str(allowed)], b"", failure)
        name = (found.decode(errors="replace").splitlines() or [""])[0]
        _keygen(["verify", "-f", str(allowed), "-I", name, "-n", NAMESPACE, "-s", str(file)], text, failure)
    return name


def _keygen(arguments: Sequence[str], text: bytes, failure: str) -> bytes:
    try:
        done = subprocess.run(["ssh-keygen", "-Y", *arguments], input=text, capture_output=True, check=False)
    except FileNotFoundError:
        raise CorralError("ssh-keygen is not installed on this machine; it belongs to the OpenSSH client") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no answer"]
        raise CorralError(f"{failure}: {said[-1]}")
    return done.stdout


# --- loading it ------------------------------------------------------------------------------------------------------


def load(path: Path, talk: Console, target: Target, signers: Path | None) -> None:
    """Bring what a bundle holds to its hosts, and print the next command; `signers` as for `read_bundle`.

    Raises:
        UsageError: the place has another inventory or rendering; nothing was changed.
        CorralError: the bundle is damaged, brings what its inventory does not ask for, or is not signed by an
            allowed signer (nothing was changed); or a host does not take something; run it again to go on.
    """
    with Interrupts(), container.readable(path, *KIND):
        bundle = read_bundle(path, talk, signers)
        talk.print(bundle.manifest.summary())
        plan = target.plan_of(bundle.files)
        names = target.hosts_of(bundle.manifest.hosts, "bundle")
        _refuse_unasked(bundle, compose_hosts(plan, target.out, bundle.manifest.hosts))
        hosts = compose_hosts(plan, target.out, names)
        for host in hosts:
            check_engine(host)
        _lay_out(bundle, plan, target, talk)
        for host in hosts:
            _load_images(bundle, host, talk)
            _copy_models(bundle, host, talk)
    talk.print(Text(_next(plan, target, hosts)))


def _refuse_unasked(bundle: Bundle, hosts: Sequence[ComposeHost]) -> None:
    """Raise CorralError when a bundle brings an image or a model file that no service of its inventory reads."""
    manifest = bundle.manifest
    images = {name for image in manifest.images for name in image.references}
    foreign = [f"the image {name}" for name in sorted(images - {s.image for host in hosts for s in host.services})]
    for host in hosts:
        sources, models = host.model_sources, manifest.hosts[host.name].models
        foreign += [f"{item.file} for {host.name}" for item in models if sources.get(item.file) != item.source]
    if foreign:
        raise CorralError(
            f"{bundle.path}: nothing was changed: it brings {', '.join(foreign[:4])}, which its inventory does not ask "
            f"for; it was made by corral {manifest.corral}: load it with that version, or make it again"
        )


def _lay_out(bundle: Bundle, plan: Plan, target: Target, talk: Console) -> None:
    """Inventory, locks, and the rendering as this kit makes it; what the bundle has rendered is for people to read."""
    hosts = tuple(bundle.manifest.hosts)
    tree = {path: data for path, data in render(plan).items() if path.partition("/")[0] in hosts}
    refuse_weak(plan, tree)
    site = Site(plan, bundle.files, hosts, tree, {})
    conflicts = target.conflicts(site, {"edited"})
    if conflicts:
        remedy = "move that away, or name other places: --inventory FILE --out FOLDER"
        raise UsageError(f"nothing was changed; the bundle differs from: {'; '.join(conflicts)}\n{remedy}")
    target.fill(site, talk, force=False)


# --- images and model files ------------------------------------------------------------------------------------------


def _load_images(bundle: Bundle, host: ComposeHost, talk: Console) -> None:
    ids = set(bundle.manifest.hosts[host.name].images)
    wanted = [image for image in bundle.manifest.images if image.id in ids]
    there = image_ids(host, [name for image in wanted for name in image.references])
    missing = [image for image in wanted if {there[name] for name in image.references} != {image.id}]
    for image in wanted:
        state = "loading" if image in missing else "is there"
        talk.print(Text(f"{host.name}: {', '.join(image.references)}: {state}"))
    for image in {image.archive or image.id: image for image in missing}.values():
        host.feed(["docker", "load", "--quiet"], Chunks(bundle.image_archive(image)))
    for image in missing:
        _tag(host, image)


def _tag(host: ComposeHost, image: Image) -> None:
    for name in image.references:
        host.run(["docker", "tag", image.id, name], check=False)
    for name, found in image_ids(host, image.references).items():
        if found != image.id:
            raise CorralError(
                f"{host.name}: {name} has the id {found or 'of nothing'} after loading, not {image.id}; "
                "do both engines keep images in the same way (docker info: containerd snapshotter)?"
            )


def _copy_models(bundle: Bundle, host: ComposeHost, talk: Console) -> None:
    models = bundle.manifest.hosts[host.name].models
    folder = FarFolder(host, host.models_folder)
    missing = [model for model in models if folder.checksum(model.file) != model.sha256]
    needed = sum(model.size for model in missing)
    free = folder.free() if missing else None
    if free is not None and needed > free:
        message = f"the disk has {amount(free)} free and {amount(needed)} are needed; no model file was copied"
        raise CorralError(f"{host.name}: {host.models_folder}: {message}")
    for model in models:
        state = f"copying {amount(model.size)}" if model in missing else "is there"
        talk.print(Text(f"{host.name}: {model.file}: {state}"))
        if model in missing:
            folder.send(bundle.stored[f"{BLOBS}/{model.sha256}"].chunks, model.file, model.size, model.sha256)


def _next(plan: Plan, target: Target, hosts: Sequence[ComposeHost]) -> str:
    places = container.options_of(target.inventory, target.out)
    names = [host.name for host in hosts if plan.secrets_of(host.name)]
    is_ready = all((target.out / name / ENV_FILE).is_file() for name in names)
    return f"next: {'' if is_ready else f'./generate.py secrets init{places} && '}./generate.py up{places}"
