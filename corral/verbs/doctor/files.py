"""Do inventory, rendering, the host's folder, secrets and models agree?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from corral.checks.registry import check
from corral.config.inventory import Thresholds
from corral.errors import CorralError, Finding
from corral.render.certificates import end_of
from corral.render.output import compare
from corral.render.secrets import ENV_FILE, FOLDER, read_env
from corral.render.tree import render
from corral.verbs.doctor.case import Case, error, hint, manifest, warning
from corral.verbs.status.certificates import certificate_files, understood_ends

GGUF = b"GGUF".hex()
SHOWN = 3
# Readable for all users: containers run under user ids of their own.
READABLE, ENTERABLE = 0o004, 0o001
PRIVATE = 0o077
INIT = "./generate.py secrets init"
files = partial(check, "running", section="files")


@files("rendered", remedy="./generate.py render")
def rendered(case: Case) -> Iterator[Finding]:
    """The rendered files are those of the inventory, and were not edited."""
    try:
        changes = compare(render(case.plan), case.host.out, {case.name})
    except CorralError as problem:
        yield error(str(problem))
        return
    actions = Counter(change.action for change in changes)
    if actions["create"] and not actions["identical"]:
        yield error("nothing is rendered for this host yet", "./generate.py render")
        return
    if edited := [change.path for change in changes if change.action == "edited"]:
        remedy = "move the change into the inventory, then ./generate.py render --force"
        yield warning(f"edited by hand: {_some(edited)}", remedy)
    if others := sum(actions[action] for action in ("create", "update", "remove")):
        words = f"{_number(others, 'file')} {'is' if others == 1 else 'are'} not as the inventory says"
        yield error(words, "./generate.py diff, then render and up")


@files("copied", remedy="./generate.py up copies the rendering to the host")
def copied(case: Case) -> Iterator[Finding]:
    """The files on a far host are those rendered here."""
    wanted = manifest(case.host) if case.host.ssh else {}
    different = [path for path in wanted if not _is_same(case, path)]
    if different and len(different) == len(wanted):
        yield hint("the rendering was not copied to the host yet", case.up)
    elif different:
        yield error(f"other files on the host than were rendered here: {_some(different)}", case.up)


def _is_same(case: Case, path: str) -> bool:
    """Whether a far host's file is as it is here."""
    return f"{path}: OK" in case.said("same").splitlines()


@files("running-as-rendered", "running", remedy="./generate.py up")
def running_as_rendered(case: Case) -> Iterator[Finding]:
    """Every container runs with the configuration that is rendered now."""
    if case.seen.hashes_problem:
        words = f"Compose cannot read the rendering: {case.seen.hashes_problem}"
        yield error(words, "./generate.py render, then secrets init")
    if old := [item.service for item in case.own if case.seen.is_older(item)]:
        yield warning(f"running with an older configuration: {_some(old)}", case.up)


@files("secrets", remedy=INIT)
def secrets(case: Case) -> Iterator[Finding]:
    """Every secret has a value and its file, and the host has the same as this machine."""
    wanted, folder = case.plan.secrets_of(case.name), case.host.rendered / FOLDER
    try:
        values = read_env(case.host.rendered / ENV_FILE)
    except CorralError as problem:
        yield error(str(problem))
        return
    laid_out = {item.name: (folder / item.name).read_bytes() for item in wanted if (folder / item.name).is_file()}
    if missing := [item.name for item in wanted if item.is_stored and not values.get(item.name)]:
        yield error(f"no value for {_some(missing)} in {case.host.rendered / ENV_FILE}", INIT)
    elif absent := [item.name for item in wanted if item.name not in laid_out]:
        yield error(f"no file for {_some(absent)} in {folder}", INIT)
    if other := [name for name, data in laid_out.items() if values.get(name) and values[name].encode() != data]:
        words = f"{ENV_FILE} and {FOLDER}/ disagree about {_some(other)}"
        yield error(words, f"{INIT}, then restart what uses it")
    far = [name for name in laid_out if not _is_same(case, f"{FOLDER}/{name}")]
    if case.host.ssh is not None and FOLDER in _modes(case) and far:
        yield error(f"the host has another value for {_some(far)} than this machine", case.up)


def _modes(case: Case) -> dict[str, int]:
    """Modes of the secrets on the host, by path below the rendered folder."""
    lines = (line.partition(" ") for line in case.said("modes").splitlines())
    return {path: int(mode, 8) for mode, _, path in lines}


@files("secrets-private", remedy="chmod 600 .env; chmod 700 secrets")
def secrets_private(case: Case) -> Iterator[Finding]:
    """Only their owner can read the secrets; containers can read the files that they are given."""
    modes = _modes(case)
    for path, wanted in ((ENV_FILE, "600"), (FOLDER, "700")):
        if modes.get(path, 0) & PRIVATE:
            remedy = f"chmod {wanted} {case.host.folder}/{path}"
            yield error(f"others can read {path} (mode {modes[path]:o})", remedy)
    if closed := [path for path, mode in modes.items() if path.startswith(f"{FOLDER}/") and not mode & READABLE]:
        yield error(f"containers cannot read {_some(closed)}", INIT)


class ModelFile(NamedTuple):
    """A model file, or their folder, as the host sees it."""

    mode: int
    size: int
    # Its first four bytes in hexadecimal.
    magic: str


def _model_files(case: Case) -> dict[str, ModelFile]:
    """By file name; the models folder itself as `.`."""
    rows = (line.split(maxsplit=3) for line in case.said("models").splitlines())
    return {name: ModelFile(int(mode, 8), int(size), magic) for mode, size, magic, name in rows}


@files("models", remedy="put the file into models_dir, readable for all users")
def models(case: Case) -> Iterator[Finding]:
    """Every model file is there, not empty, a GGUF file, and readable for the containers' users."""
    folder, there = case.host.models_folder, _model_files(case)
    uses = {file: item for item in case.plan.site.replicas if item.host == case.name for file in item.files}
    own = sorted(file for file in uses if not file.startswith("/"))
    folders = {".": folder} if own else {}
    folders |= {store: store for store in case.host.used_stores}
    for name, place in folders.items():
        if name not in there:
            hint = f"make it and put {_some(own)} there" if name == "." else "is the disk mounted? See model_stores"
            yield error(f"there is no folder {place}", hint)
        elif not there[name].mode & ENTERABLE:
            yield error(f"containers cannot look into {place} (mode {there[name].mode:o})", f"chmod o+rx {place}")
    closed = {name for name in folders if name not in there or not there[name].mode & ENTERABLE}
    for name, replica in sorted(uses.items()):
        store = next((store for store in case.host.used_stores if name.startswith(f"{store}/")), ".")
        path = name if name.startswith("/") else f"{folder}/{name}"
        if store not in closed and (wrong := _wrong(path, there.get(name), replica.files[name])):
            yield error(f"{replica.pool}: {wrong[0]}", wrong[1])


def _wrong(path: str, found: ModelFile | None, source: str) -> tuple[str, str] | None:
    """What is wrong with a model file, and what helps; None when it is as it should be."""
    if found is None:
        return f"{path} is not there", f"get it from {source}"
    if found.magic == "outside":
        return f"{path} is a link that leads out of its folder", "put the file there, or its folder into model_stores"
    if not found.size:
        return f"{path} is empty", f"get it again from {source}"
    if path.endswith(".gguf") and found.magic != GGUF:
        begin = bytes.fromhex(found.magic.strip("-")).decode("latin-1")
        return f"{path} is no GGUF file; it begins with {begin!r}", "often a saved error page; get it again"
    return None if found.mode & READABLE else (f"containers cannot read {path}", f"chmod o+r {path}")


@files("certificates", remedy="renew the certificate")
def certificates(case: Case) -> Iterator[Finding]:
    """Every certificate that a service is given can be read and is valid for `thresholds.certificate_days` more."""
    ends = understood_ends(case.said("certificates"))
    if unknown := sorted(set(certificate_files(case.host)) - set(ends)):
        yield warning(f"it is not known when {_some(unknown)} ends", "install openssl on the host")
    for path, end in ends.items():
        yield from _ending(case, path, end, "renew the certificate" if end else "put the PEM file there")
    # Those of the site's own authority, which hosts show each other; `secrets` says which are missing.
    for secret in case.plan.secrets_of(case.name):
        file = case.host.rendered / FOLDER / secret.name
        if secret.is_certificate and file.is_file():
            end = end_of(file.read_text(encoding="utf-8", errors="replace"))
            yield from _ending(case, str(file), end, f"{INIT}, then ./generate.py up")


def _ending(case: Case, path: str, end: datetime | None, remedy: str) -> Iterator[Finding]:
    monitoring = case.plan.inventory.monitoring
    enough = timedelta(days=(monitoring.thresholds if monitoring else Thresholds()).certificate_days)
    left = end - datetime.now(UTC) if end else timedelta()
    if end is None:
        yield error(f"{path} cannot be read as a certificate", remedy)
    elif left < timedelta():
        yield error(f"{path} ended on {end:%d %B %Y}", remedy)
    elif left < enough:
        yield warning(f"{path} ends in {left.days} days", remedy)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def summary(case: Case) -> str:
    """What was found, when all is well."""
    count, ends = len(_model_files(case).keys() - {"."}), len(understood_ends(case.said("certificates")))
    parts = ["as rendered", _number(len(case.plan.secrets_of(case.name)), "secret")]
    parts += [_number(count, "model file")] if count else []
    return ", ".join([*parts, _number(ends, "certificate") if ends else "no certificates"])
