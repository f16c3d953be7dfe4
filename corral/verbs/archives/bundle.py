"""`bundle`: all that a site needs on machines without internet, in a folder or one tar file; no secrets.

Images as the hosts' Docker engines have them, model files as the hosts have them, the rendering, and the kit with its
Python wheels. Large files lie in `blobs/sha256/` under their own checksums; the next run does not fetch them again.
`SHA256SUMS` is written last: without it a bundle is not complete.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from corral import __version__
from corral.build import Plan, build_plan
from corral.config.image_lock import IMAGE_LOCK, ImageLock, LockedImage, image_lock_text
from corral.config.load import load_texts, locks_beside
from corral.errors import CorralError, UsageError
from corral.render.output import locked
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.verbs.archives.bundle_folder import RECORDS, BundleFolder
from corral.verbs.archives.container import INVENTORY, SUMS, amount, explained, files_below
from corral.verbs.archives.load import SIGNATURE, HostParts, Image, Manifest, ModelFile
from corral.verbs.archives.signing import sign
from corral.verbs.models.far_files import FarFolder
from corral.verbs.up.survey import check_engine
from corral.verbs.up.up import PULL_LIMIT_S, check_rendering

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "templates" / "_bundle" / "README.txt"
# The parts of the checkout that are needed to run it elsewhere.
KIT = (
    "generate.py", "corral", "templates", "gpu-server", "haproxy", "langfuse", "litellm", "monitoring", "load-tests",
    "tools", "docs",
    "inventory.schema.json", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "LICENSE",
    "requirements.in", "requirements.txt", "requirements-dev.in", "requirements-dev.txt", "requirements-uv.in",
    "requirements-uv.txt",
)  # fmt: skip
LOCKS = ("requirements.txt", "requirements-dev.txt", "requirements-uv.txt")
GO_ON = "the bundle is not complete, run the same command again to go on"


@dataclass(frozen=True, slots=True)
class _Held:
    """An image of a host's Docker engine."""

    host: ComposeHost
    image: Image


@dataclass(frozen=True, slots=True)
class _Group:
    """Images that the same hosts need: one `docker save`, which stores layers that they share once."""

    host: ComposeHost
    images: tuple[Image, ...]

    @property
    def record(self) -> str:
        """The file of the bundle that says under which checksum the archive of these images lies."""
        ids = "\n".join(sorted(image.id for image in self.images))
        return f"{RECORDS}/{hashlib.sha256(ids.encode()).hexdigest()[:16]}"


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
    chosen = compose_hosts(plan, out, hosts)
    is_file = to.suffix == ".tar"
    folder = to.with_name(f".{to.name}.parts") if is_file else to
    _check_place(to, folder)
    check_rendering(plan, out, {host.name for host in chosen})
    for host in chosen:
        check_engine(host)
    with Interrupts(), explained(to, GO_ON):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for name in (SUMS, SIGNATURE):
                (folder / name).unlink(missing_ok=True)  # from here on it is not complete
            target = BundleFolder(folder)
            held = [image for host in chosen for image in _images(host, talk)]
            models = {host.name: _models(host, talk) for host in chosen}
            groups = _groups(held)
            _check_space(target, groups, models, 2 if is_file else 1)
            images = [image for group in groups for image in _add_images(target, group, talk)]
            for host in chosen:
                _add_models(target, host, models[host.name], talk)
            _add_site(target, plan, {host.name for host in chosen}, held)
            if with_kit:
                _add_kit(target, talk)
            made = _manifest(plan, held, images, models, is_with_kit=with_kit)
            digest = target.finish(made, partial(sign, key=key) if key else None)
        if is_file:
            target.finish_file(to)
    size = to.stat().st_size if is_file else sum(path.stat().st_size for path in files_below(to))
    count = f"{len(images)} images, {sum(map(len, models.values()))} model files"
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


def _images(host: ComposeHost, talk: Console) -> list[_Held]:
    """The host's images, one entry for each id; fetched first where they are not there."""
    references = sorted({service.image for service in host.plan.services_of(host.name)})
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name in references:
        facts = _inspected(host, name, talk)
        found.setdefault(str(facts["Id"]), []).append((name.partition("@")[0], facts))
    return [_Held(host, _image([name for name, _ in entries], entries[0][1])) for entries in found.values()]


def _inspected(host: ComposeHost, name: str, talk: Console) -> dict[str, Any]:
    done = host.run(["docker", "image", "inspect", name], check=False)
    if done.code != 0:
        talk.print(Text(f"{host.name}: fetching {name}"))
        pulled = host.run(["docker", "pull", "--quiet", name], check=False, limit_s=PULL_LIMIT_S)
        if pulled.code != 0:
            raise CorralError(f"{host.name}: the image {name} is not there and cannot be fetched: {pulled.words}")
        done = host.run(["docker", "image", "inspect", name])
    facts: dict[str, Any] = json.loads(done.out)[0]
    return facts


def _image(references: Sequence[str], facts: Mapping[str, Any]) -> Image:
    return Image(
        id=str(facts["Id"]),
        references=tuple(references),
        digests=tuple(sorted(facts.get("RepoDigests") or [])),
        platform=f"{facts['Os']}/{facts['Architecture']}",
        size=int(facts["Size"]),
    )


def _groups(held: Iterable[_Held]) -> list[_Group]:
    """Every image once, with the references of every host, together with those that the same hosts need."""
    users: dict[str, list[_Held]] = {}
    for item in held:
        users.setdefault(item.image.id, []).append(item)
    groups: dict[tuple[str, ...], _Group] = {}
    for items in users.values():
        references = tuple(sorted({name for item in items for name in item.image.references}))
        image = items[0].image.model_copy(update={"references": references})
        hosts = tuple(item.host.name for item in items)
        known = groups.get(hosts, _Group(items[0].host, ()))
        groups[hosts] = replace(known, images=(*known.images, image))
    return list(groups.values())


def _models(host: ComposeHost, talk: Console) -> list[ModelFile]:
    """The host's model files with their checksums; raises CorralError with all that are not there."""
    sources = host.model_sources
    if not sources:
        return []
    talk.print(Text(f"{host.name}: checksums of {len(sources)} model files"))
    folder = FarFolder(host, host.models_folder)
    sums = {file: folder.checksum(file) for file in sources}
    missing = [f"  {folder.folder}/{file}  from {source}" for file, source in sources.items() if not sums[file]]
    if missing:
        raise CorralError(f"{host.name}: model files are not there:\n" + "\n".join(missing))
    return [
        ModelFile(file=file, source=source, sha256=sums[file], size=folder.size(file) or 0)
        for file, source in sources.items()
    ]


def _check_space(
    target: BundleFolder, groups: Sequence[_Group], models: Mapping[str, list[ModelFile]], times: int
) -> None:
    """Raise CorralError when the disk is certainly too small."""
    groups = [group for group in groups if not target.recorded(group.record)]
    images = sum(max(image.size for image in group.images) for group in groups)  # the others may share all layers
    files = {model.sha256: model.size for found in models.values() for model in found}
    missing = {sha256: size for sha256, size in files.items() if not target.has(sha256, size)}
    needed = times * (images + sum(missing.values()))
    free = shutil.disk_usage(target.folder).free
    if needed > free:
        raise CorralError(
            f"{target.folder}: the disk has {amount(free)} free and at least {amount(needed)} are needed; "
            "nothing was fetched: name a larger disk with --to"
        )


# --- taking it -------------------------------------------------------------------------------------------------------


def _add_images(target: BundleFolder, group: _Group, talk: Console) -> list[Image]:
    """The images of a group, whose archive is a blob of the bundle now."""
    sha256 = target.recorded(group.record)
    if not sha256:
        for image in group.images:
            size = f"{amount(image.size)} with shared layers"
            talk.print(Text(f"{group.host.name}: {', '.join(image.references)} ({size})"))
        words = ["docker", "save", *(image.id for image in group.images)]
        sha256 = target.save_blob(partial(group.host.stream, words))
    target.add_file(group.record, f"{sha256}\n".encode(), 0o644)
    return [image.model_copy(update={"archive": sha256}) for image in group.images]


def _add_models(target: BundleFolder, host: ComposeHost, models: Sequence[ModelFile], talk: Console) -> None:
    for model in models:
        if target.has(model.sha256, model.size):
            continue
        talk.print(Text(f"{host.name}: {model.file} ({amount(model.size)})"))
        path = f"{host.models_folder}/{model.file}"
        target.fetch_blob(
            model.sha256,
            model.size,
            lambda count, path=path: host.stream(["tail", "-c", f"+{count + 1}", path]),  # type: ignore[misc]
        )


def _add_site(target: BundleFolder, plan: Plan, hosts: set[str], held: Sequence[_Held]) -> None:
    """The inventory with its locks, and the rendering that they give: engines without a registry know no digests."""
    source = Path(plan.source_file)
    locks = {**locks_beside(source), IMAGE_LOCK: image_lock_text(_ids_of(held)).encode()}
    there = build_plan(load_texts(source.read_bytes(), locks, str(source)))
    target.add_file(INVENTORY, source.read_bytes(), 0o644)
    for name, data in locks.items():
        target.add_file(name, data, 0o644)
    for path, data in render(there).items():
        if path.partition("/")[0] in hosts:
            target.add_file(f"compose/{path}", data, 0o644)
    target.add_file("README.txt", README.read_bytes(), 0o644)


def _ids_of(held: Iterable[_Held]) -> ImageLock:
    """The lock of a site whose images come from this bundle."""
    ids: dict[str, set[str]] = {}
    for item in held:
        for name in item.image.references:
            ids.setdefault(name, set()).add(item.image.id)
    return ImageLock(images={name: LockedImage(ids=tuple(sorted(found))) for name, found in ids.items()})


def _add_kit(target: BundleFolder, talk: Console) -> None:
    """The kit's own files, and wheels of all that it needs, for this machine's system and Python."""
    for name in KIT:
        place = ROOT / name
        for path in [place] if place.is_file() else files_below(place):
            if "__pycache__" not in path.parts:
                mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                target.add_file(f"kit/{path.relative_to(ROOT)}", path.read_bytes(), mode)
    talk.print(Text("the kit's Python wheels"))
    wheels = target.folder / "wheels"
    locks = [word for lock in LOCKS for word in ("--requirement", str(ROOT / lock))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary"]
    done = subprocess.run(
        [*command, ":all:", "--require-hashes", "--no-deps", "--dest", str(wheels), *locks],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise CorralError(f"the kit's wheels cannot be fetched: {words}; without them: --without-kit")
    for path in sorted(wheels.glob("*.whl")):
        target.note(f"wheels/{path.name}")


def _manifest(
    plan: Plan,
    held: Sequence[_Held],
    images: Sequence[Image],
    models: Mapping[str, list[ModelFile]],
    *,
    is_with_kit: bool,
) -> Manifest:
    version = ".".join(platform.python_version_tuple()[:2])
    parts = {
        name: HostParts(images=tuple(item.image.id for item in held if item.host.name == name), models=tuple(found))
        for name, found in models.items()
    }
    return Manifest(
        format="corral-bundle/2",
        corral=__version__,
        site=plan.inventory.name,
        made=datetime.now(UTC).replace(microsecond=0),
        platform=f"{platform.system()} {platform.machine()}, Python {version}" if is_with_kit else "",
        hosts=parts,
        images=tuple(images),
    )
