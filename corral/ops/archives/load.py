"""`bundle load`: what a bundle holds, on machines without internet: images, model files, inventory, rendering.

A signature says who made it, or the operator says that nobody has to. Every file is checked before anything is changed,
and only what the plan of its inventory asks for is taken; the rendering is made here. What is there already is left as
it is, so that a load that was cut off is simply run again.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.text import Text

from corral.errors import CorralError, UsageError, on_one_line
from corral.load import LOCKS, load_texts
from corral.ops.archives.backup import amount
from corral.ops.archives.parcel import PART, SUMS, Bundle, Image, ModelFile, opened
from corral.ops.archives.signing import signer_of
from corral.ops.hosts import CommandError, ComposeHost, compose_hosts
from corral.ops.interrupts import Interrupts
from corral.ops.setup import model_sources, models_folder
from corral.ops.survey import check_engine, image_ids
from corral.output import compare, write, write_atomically
from corral.plan import Plan, build_plan
from corral.policy import refuse_weak
from corral.render import refuse_other_site, render
from corral.secrets import ENV_FILE

INVENTORY = "inventory.yaml"
HASH_LIMIT_S = 3600
FACTS = """
for file; do
    if [ -r "$file" ]; then set -- $(sha256sum <"$file"); echo "$1"; else echo -; fi
done
"""
PARTLY = 'mkdir -p "${1%/*}" && { wc -c <"$1" 2>/dev/null || echo 0; }'
APPEND = 'umask 022 && cat >>"$1"'
FINISH = 'set -- "$1" "$2" $(sha256sum <"$1") && [ "$3" = "$2" ] && sync "$1" && mv -f "$1" "${1%.part}"'
FREE_KIB = 'while [ ! -d "$1" ]; do set -- "$(dirname "$1")"; done; df -Pk "$1" | awk "END { print \\$4 }"'


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where a bundle goes, and who has to have made it."""

    inventory: Path
    out: Path
    hosts: frozenset[str] | None = None
    signers: Path | None = None
    """File of allowed signers; None: unsigned bundles are taken."""


def load(path: Path, talk: Console, wanted: Wanted) -> None:
    """Brings what a bundle holds to its hosts, and says what to type next.

    Raises:
        UsageError: the place has another inventory or rendering; nothing was changed.
        CorralError: the bundle is damaged, brings what its inventory does not ask for, or is not signed by whom it
            should be (nothing was changed); or a host does not take something; run it again to go on.
    """
    talk.print(Text(f"{path}: checking every file"))
    bar = Progress(TextColumn("checked"), BarColumn(), DownloadColumn(), console=talk, transient=True)
    with Interrupts(), bar if talk.is_terminal else nullcontext():
        task = bar.add_task("checked", total=_total(path))
        vouch = partial(_vouch, path, talk, wanted.signers)
        with opened(path, vouch, lambda count: bar.advance(task, count)) as bundle:
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
    """Says who made the bundle; raises CorralError when it is not whom the file of signers names."""
    if signers is None:
        digest = hashlib.sha256(listed).hexdigest()
        talk.print(Text(f"{path}: nobody is asked to vouch for it; sha256 of {SUMS}: {digest}", "yellow"))
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
    """Raises CorralError when a bundle brings an image or a model file that no service of its inventory reads."""
    manifest = bundle.manifest
    images = {name for image in manifest.images for name in image.references}
    asked = {service.image for service in plan.contributions.services}
    foreign = [f"the image {name}" for name in sorted(images - asked)]
    for host in compose_hosts(plan, wanted.out, set(manifest.hosts)):
        sources = model_sources(host)
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
    for image in bundle.manifest.images:
        if image.id in ids:
            _load_image(bundle, host, image, talk)


def _load_image(bundle: Bundle, host: ComposeHost, image: Image, talk: Console) -> None:
    names = ", ".join(image.references)
    if set(image_ids(host, image.references).values()) == {image.id}:
        talk.print(Text(f"{host.name}: {names}: is there"))
        return
    talk.print(Text(f"{host.name}: {names}: loading"))
    try:
        host.feed(["docker", "load", "--quiet"], bundle.image_archive(image))
    except CommandError as error:
        raise CorralError(f"{host.name}: {names}: the engine does not take it: {error.done.words}") from None
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
    missing = _missing(host, models)
    needed = sum(model.size for model in missing)
    free = _free(host)
    if missing and free is not None and needed > free:
        words = f"{amount(free)} free and {amount(needed)} are needed"
        raise CorralError(f"{host.name}: {models_folder(host)}: the disk has {words}; no model file was copied")
    for model in models:
        if model in missing:
            _copy_model(bundle, host, model, talk)
        else:
            talk.print(Text(f"{host.name}: {model.file}: is there"))


def _missing(host: ComposeHost, models: Sequence[ModelFile]) -> list[ModelFile]:
    if not models:
        return []
    paths = [f"{models_folder(host)}/{model.file}" for model in models]
    found = host.run(["sh", "-c", FACTS, "sh", *paths], limit_s=HASH_LIMIT_S).out.split()
    return [model for model, sha256 in zip(models, found, strict=True) if sha256 != model.sha256]


def _free(host: ComposeHost) -> int | None:
    """Free bytes where the models go; None when the host does not say."""
    words = host.run(["sh", "-c", FREE_KIB, "sh", models_folder(host)], check=False).out.strip()
    return int(words) * 1024 if words.isdecimal() else None


def _copy_model(bundle: Bundle, host: ComposeHost, model: ModelFile, talk: Console) -> None:
    """Goes on with what an earlier run has brought; the file gets its name when its checksum is right there."""
    talk.print(Text(f"{host.name}: {model.file}: copying {amount(model.size)}"))
    draft = f"{models_folder(host)}/{model.file}{PART}"
    try:
        there = int(host.run(["sh", "-c", PARTLY, "sh", draft]).out.strip())
        if there > model.size:
            host.run(["rm", "-f", draft])
            there = 0
        with bundle.blob(model.sha256) as data:
            data.seek(there)
            host.feed(["sh", "-c", APPEND, "sh", draft], data)
    except CommandError as error:
        words = error.done.words
        raise CorralError(f"{host.name}: {draft}: cannot be written: {words}; run it again to go on") from None
    done = host.run(["sh", "-c", FINISH, "sh", draft, model.sha256], limit_s=HASH_LIMIT_S, check=False)
    if done.code != 0:
        host.run(["rm", "-f", draft])
        raise CorralError(
            f"{host.name}: {model.file}: was not copied as it is: {done.words or 'other checksum'}; again"
        )


def _next(plan: Plan, wanted: Wanted, hosts: Sequence[ComposeHost]) -> str:
    places = "" if wanted.inventory == Path(INVENTORY) else f" --inventory {shlex.quote(str(wanted.inventory))}"
    places += "" if wanted.out == Path("compose") else f" --out {shlex.quote(str(wanted.out))}"
    names = [host.name for host in hosts if plan.secrets_of(host.name)]
    if all((wanted.out / name / ENV_FILE).is_file() for name in names):
        return f"next: ./generate.py up{places}"
    return f"next: ./generate.py secrets init{places} && ./generate.py up{places}"
