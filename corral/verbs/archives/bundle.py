"""`bundle`: all that a site needs on machines without internet, in a folder or one tar file; no secrets.

Images as the hosts' Docker engines have them, model files as the hosts have them, the rendering, and the kit with its
Python wheels. Large files lie in `blobs/sha256/` under their own checksums; the next run does not fetch them again.
`SHA256SUMS` is written last: without it a bundle is not complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from corral import __version__
from corral.build import Plan, build_plan
from corral.config.file_names import is_file_name
from corral.config.image_lock import IMAGE_LOCK, ImageLock, LockedImage
from corral.config.load import load_texts, locks_beside
from corral.config.model_lock import ModelLock
from corral.declarations import checkout, shipped
from corral.errors import CorralError, UsageError
from corral.files import new_file, sync_folder
from corral.render.output import locked
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.units import grouped
from corral.verbs.archives import container
from corral.verbs.archives.container import INVENTORY, SUMS, amount, files_below, receive
from corral.verbs.archives.load import BLOBS, SIGNATURE, HostParts, Image, Manifest, ModelFile, sign
from corral.verbs.models.far_files import FarFolder
from corral.verbs.models.models import shown_path
from corral.verbs.up.survey import check_engine
from corral.verbs.up.up import PULL_LIMIT_S, check_rendering

# The parts of the checkout that are needed to run it elsewhere.
KIT = Path(__file__).with_name("kit.txt").read_text(encoding="utf-8").split()
RECORDS = "images"
# Folders that hold nothing but the bundle's files.
OWN = ("blobs", "compose", RECORDS, "kit", "wheels")


# --- its folder ------------------------------------------------------------------------------------------------------


class BundleFolder(container.ArchiveFolder):
    """A bundle that is being filled; blobs that are there already are not fetched again."""

    def blob(self, sha256: str) -> Path:
        """Where the content of that checksum lies, or will."""
        return self.folder / BLOBS / sha256

    def has(self, sha256: str, size: int | None = None) -> bool:
        """Whether a blob is there, of that size if one is given; then it is part of the bundle."""
        path = self.blob(sha256)
        is_there = path.is_file() and size in {None, path.stat().st_size}
        if is_there:
            self.sums[f"{BLOBS}/{sha256}"] = sha256
        return is_there

    def recorded(self, name: str) -> str:
        """The checksum that an earlier run noted in a file, if the blob is there; else an empty text."""
        path = self.folder / name
        sha256 = path.read_text(errors="replace").strip() if path.is_file() else ""
        return sha256 if is_file_name(sha256) and self.has(sha256) else ""

    def fetch(self, host: ComposeHost, source: str | Sequence[str], sha256: str = "") -> str:
        """Take in a blob from a host; returns its checksum.

        Args:
            host: where it is.
            source: a file there, or a command that prints it.
            sha256: the checksum of a file: then it goes on where an earlier run stopped.

        Raises:
            CorralError: it has another checksum; the next run begins anew.
        """
        draft = self.blob(f"{sha256 or 'new'}.part")
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("a+b" if sha256 else "w+b") as file:
            command = ["tail", "-c", f"+{file.tell() + 1}", source] if isinstance(source, str) else source
            file.seek(0)
            with host.stream(command) as data:
                found = receive(data, file, hashlib.file_digest(file, "sha256")).sha256
            file.flush()
            os.fsync(file.fileno())
        if found != (sha256 or found):
            draft.unlink()
            message = "is not what was announced; was it changed meanwhile? Run the same command again"
            raise CorralError(f"{self.blob(sha256)}: {message}")
        draft.replace(self.blob(found))
        self.sums[f"{BLOBS}/{found}"] = found
        return found

    def finish(self, manifest: Manifest, key: Path | None = None) -> str:
        """Write the list of checksums, signed if there is a key; returns the list's own checksum.

        From now on the bundle is complete. What earlier runs left over is deleted.
        """
        self.add(container.MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n", 0o644)
        for path in [path for name in OWN for path in files_below(self.folder / name)]:
            if str(path.relative_to(self.folder)) not in self.sums:
                path.unlink()
        listed = container.sums_text(self.sums)
        (self.folder / SIGNATURE).unlink(missing_ok=True)
        if key is not None:
            self.add(SIGNATURE, sign(listed, key), 0o644)
        self.add(SUMS, listed, 0o644)
        sync_folder(self.folder)
        return self.sums[SUMS]

    def finish_file(self, target: Path) -> None:
        """Turn the complete folder into one tar file; the folder goes when the file is on the disk."""
        with new_file(target, 0o644) as file:
            self.pack(file, SUMS)
        sync_folder(target.parent)
        shutil.rmtree(self.folder)


# --- the verb --------------------------------------------------------------------------------------------------------


def bundle(  # noqa: PLR0913 - keyword arguments, an option each
    plan: Plan,
    out: Path,
    talk: Console,
    *,
    hosts: Iterable[str] | None = None,
    to: Path,
    with_kit: bool = True,
    key: Path | None = None,
) -> None:
    """Make a bundle, or complete one.

    Args:
        plan: what the inventory says; the rendering on disk must agree with it.
        out: the folder of renderings.
        talk: where progress goes.
        hosts: hosts to make it for; all with services when absent.
        to: a folder, or a file whose name ends in .tar.
        with_kit: whether the kit and its wheels are to be in it.
        key: the ssh key that signs it; none leaves it unsigned.

    Raises:
        DriftError: the rendering differs from the inventory.
        CorralError: something cannot be had or written; what was fetched stays for the next run.
    """
    root = checkout("a bundle that contains the kit") if with_kit else None
    chosen = compose_hosts(plan, out, hosts)
    is_file = to.suffix == ".tar"
    folder = to.with_name(f".{to.name}.parts") if is_file else to
    _check_place(to, folder)
    check_rendering(plan, out, {host.name for host in chosen})
    for host in chosen:
        check_engine(host)
    with Interrupts(), container.explained(to, "the bundle is not complete, run the same command again to go on"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            (folder / SUMS).unlink(missing_ok=True)  # from here on it is not complete
            target = BundleFolder(folder)
            wanted = _gather(plan, chosen, talk, is_with_kit=with_kit)
            _check_space(target, wanted, 2 if is_file else 1)
            made = _add_images(target, wanted, chosen, talk)
            _add_models(target, made, chosen, talk)
            _add_site(target, plan, made)
            if root:
                _add_kit(target, root, talk)
            digest = target.finish(made, key)
        if is_file:
            target.finish_file(to)
    size = sum(path.stat().st_size for path in ([to] if is_file else files_below(to)))
    count = f"{len(made.images)} images, {len(made.models)} model files"
    talk.print(Text(f"{to}: complete, {count}, {amount(size)}; sha256 of {SUMS}: {digest}"))
    trust = "--signer ALLOWED-SIGNERS" if key else "--unsigned, once that sha256 was compared"
    talk.print(Text(f"carry it over, then: ./generate.py bundle load {to.name} {trust}"))


def _check_place(to: Path, folder: Path) -> None:
    if folder != to and to.exists():
        raise CorralError(f"{to}: is there already; name another file")
    is_foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / "blobs").is_dir()
    if is_foreign or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder}: is there and is no bundle; name an empty folder, a new one, or FILE.tar")


# --- what there is to take -------------------------------------------------------------------------------------------


def _gather(plan: Plan, hosts: Sequence[ComposeHost], talk: Console, *, is_with_kit: bool) -> Manifest:
    """What the bundle is of: every image once, by its id and with its references on all hosts, and the model files."""
    images: dict[str, Image] = {}
    parts: dict[str, HostParts] = {}
    for host in hosts:
        found = [_image(host, name, talk) for name in sorted({service.image for service in host.services})]
        for image in found:
            known = images.get(image.id, image)
            references = tuple(sorted({*known.references, *image.references}))
            images[image.id] = known.model_copy(update={"references": references})
        ids = dict.fromkeys(image.id for image in found)
        parts[host.name] = HostParts(images=tuple(ids), models=tuple(_models(host, talk)))
    version = ".".join(platform.python_version_tuple()[:2])
    return Manifest(
        format="corral-bundle/2",
        corral=__version__,
        site=plan.inventory.name,
        made=datetime.now(UTC).replace(microsecond=0),
        platform=f"{platform.system()} {platform.machine()}, Python {version}" if is_with_kit else "",
        hosts=parts,
        images=tuple(images.values()),
    )


def _image(host: ComposeHost, name: str, talk: Console) -> Image:
    """What the host's engine says of an image, which is fetched first where it is not there."""
    done = host.run(["docker", "image", "inspect", name], check=False)
    if done.code != 0:
        talk.print(Text(f"{host.name}: fetching {name}"))
        host.run(["docker", "pull", "--quiet", name], limit_s=PULL_LIMIT_S)
        done = host.run(["docker", "image", "inspect", name])
    facts: dict[str, Any] = json.loads(done.out)[0]
    return Image(
        id=str(facts["Id"]),
        references=(name.partition("@")[0],),
        digests=tuple(sorted(facts.get("RepoDigests") or [])),
        platform=f"{facts['Os']}/{facts['Architecture']}",
        size=int(facts["Size"]),
    )


def _models(host: ComposeHost, talk: Console) -> list[ModelFile]:
    """The host's model files with their checksums; raises CorralError with all that are not there."""
    files = host.files_without_stores
    if not files:
        return []
    talk.print(Text(f"{host.name}: checksums of {len(files)} model files"))
    folder = FarFolder(host, host.models_folder)
    sums = {place: folder.checksum(place) for place, _ in files.values()}
    missing = [
        f"  {shown_path(folder.folder, place)}  from {source}" for place, source in files.values() if not sums[place]
    ]
    if missing:
        raise CorralError(f"{host.name}: model files are not there:\n" + "\n".join(missing))
    return [
        ModelFile(file=file, source=source, sha256=sums[place], size=folder.size(place) or 0)
        for file, (place, source) in files.items()
    ]


def _groups(wanted: Manifest) -> dict[tuple[str, ...], list[Image]]:
    """The images that the same hosts need, by the names of these hosts."""
    hosts = wanted.hosts.items()
    return grouped((tuple(host for host, parts in hosts if it.id in parts.images), it) for it in wanted.images)


def _check_space(target: BundleFolder, wanted: Manifest, times: int) -> None:
    """Raise CorralError when the disk is certainly too small."""
    missing = [images for images in _groups(wanted).values() if not target.recorded(_record(images))]
    needed = sum(model.size for model in wanted.models.values() if not target.has(model.sha256, model.size))
    needed += sum(max(image.size for image in images) for images in missing)  # the others may share all its layers
    needed *= times
    free = shutil.disk_usage(target.folder).free
    if needed > free:
        raise CorralError(
            f"{target.folder}: the disk has {amount(free)} free and at least {amount(needed)} are needed; "
            "nothing was fetched: name a larger disk with --to"
        )


# --- taking it -------------------------------------------------------------------------------------------------------


def _record(images: Iterable[Image]) -> str:
    """The file of the bundle that says under which checksum the archive of these images lies."""
    ids = "\n".join(sorted(image.id for image in images))
    return f"{RECORDS}/{hashlib.sha256(ids.encode()).hexdigest()[:16]}"


def _add_images(target: BundleFolder, wanted: Manifest, hosts: Sequence[ComposeHost], talk: Console) -> Manifest:
    """Add one `docker save` for all images that the same hosts need, which stores layers that they share once."""
    by_name = {host.name: host for host in hosts}
    added: list[Image] = []
    for names, images in _groups(wanted).items():
        sha256 = target.recorded(_record(images))
        if not sha256:
            for image in images:
                size = f"{amount(image.size)} with shared layers"
                talk.print(Text(f"{names[0]}: {', '.join(image.references)} ({size})"))
            sha256 = target.fetch(by_name[names[0]], ["docker", "save", *(image.id for image in images)])
        target.add(_record(images), f"{sha256}\n".encode(), 0o644)
        added += [image.model_copy(update={"archive": sha256}) for image in images]
    return wanted.model_copy(update={"images": tuple(added)})


def _add_models(target: BundleFolder, wanted: Manifest, hosts: Sequence[ComposeHost], talk: Console) -> None:
    for host in hosts:
        places = host.files_without_stores
        for model in wanted.hosts[host.name].models:
            if not target.has(model.sha256, model.size):
                talk.print(Text(f"{host.name}: {model.file} ({amount(model.size)})"))
                target.fetch(host, shown_path(host.models_folder, places[model.file][0]), model.sha256)


def _add_site(target: BundleFolder, plan: Plan, wanted: Manifest) -> None:
    """The inventory with its locks, and the rendering that they give: engines without a registry know no digests."""
    source = Path(plan.source_file)
    ids = grouped((name, image.id) for image in wanted.images for name in image.references)
    lock = ImageLock(images={name: LockedImage(ids=tuple(sorted(found))) for name, found in ids.items()})
    locks = {**locks_beside(source), IMAGE_LOCK: lock.text()}
    if ModelLock.file_name in locks:
        locks[ModelLock.file_name] = plan.site.lock.without_places().text()
    rendered = render(build_plan(load_texts(source.read_bytes(), locks, str(source))))
    files = {
        INVENTORY: source.read_bytes(),
        **locks,
        "README.txt": shipped("templates/_bundle/README.txt").read_bytes(),
    }
    files |= {f"compose/{path}": data for path, data in rendered.items() if path.partition("/")[0] in wanted.hosts}
    for name, data in files.items():
        target.add(name, data, 0o644)


def _add_kit(target: BundleFolder, root: Path, talk: Console) -> None:
    """The kit's own files, and wheels of all that it needs, for this machine's system and Python."""
    for path in [path for name in KIT for path in files_below(root / name) or [root / name]]:
        if "__pycache__" not in path.parts:
            mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            target.add(f"kit/{path.relative_to(root)}", path.read_bytes(), mode)
    talk.print(Text("the kit's Python wheels"))
    wheels = target.folder / "wheels"
    locks = [
        f"--requirement={root / name}" for name in KIT if name.startswith("requirements") and name.endswith(".txt")
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary"]
    done = subprocess.run(
        [*command, ":all:", "--require-hashes", "--no-deps", "--dest", str(wheels), *locks],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise CorralError(f"the kit's wheels cannot be fetched: {reason}; without them: --without-kit")
    for path in sorted(wheels.glob("*.whl")):
        with path.open("rb") as file:
            target.sums[f"wheels/{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
