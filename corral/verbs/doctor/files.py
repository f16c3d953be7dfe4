"""Do inventory, rendering, the host's folder, secrets and models agree?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from corral.checks.registry import Findings
from corral.config.inventory import Thresholds
from corral.errors import CorralError
from corral.render.certificates import end_of
from corral.render.output import compare
from corral.render.secrets import ENV_FILE, FOLDER, read_env
from corral.render.tree import render
from corral.units import counted
from corral.verbs.doctor.case import Case, manifest, say
from corral.verbs.status.certificates import certificate_files, understood_ends

GGUF = b"GGUF".hex()
SHOWN = 3
# Readable for all users: containers run under user ids of their own.
READABLE, ENTERABLE = 0o004, 0o001
PRIVATE = 0o077


def rendered(case: Case) -> Findings:
    """The rendered files are those of the inventory, and were not edited."""
    try:
        changes = compare(render(case.plan), case.host.out, {case.name})
    except CorralError as problem:
        yield say("rendered/problem", problem=problem)
        return
    actions = Counter(change.action for change in changes)
    if actions["create"] and not actions["identical"]:
        yield say("rendered/nothing")
        return
    if edited := [change.path for change in changes if change.action == "edited"]:
        yield say("rendered/edited", edited=_some(edited))
    if others := sum(actions[action] for action in ("create", "update", "remove")):
        yield say("rendered/older", others=f"{counted(others, 'file')} {'is' if others == 1 else 'are'}")


def copied(case: Case) -> Findings:
    """The files on a far host are those rendered here."""
    wanted = manifest(case.host) if case.host.ssh else {}
    if different := [path for path in wanted if not _is_same(case, path)]:
        text = "copied/nothing" if len(different) == len(wanted) else "copied/other"
        yield say(text, different=_some(different), up=case.up)


def _is_same(case: Case, path: str) -> bool:
    """Whether a far host's file is as it is here."""
    return f"{path}: OK" in case.said("same").splitlines()


def running_as_rendered(case: Case) -> Findings:
    """Every container runs with the configuration that is rendered now."""
    if case.seen.hashes_problem:
        yield say("running-as-rendered/unreadable", problem=case.seen.hashes_problem)
    if old := [item.service for item in case.own if case.seen.is_older(item)]:
        yield say("running-as-rendered/older", old=_some(old), up=case.up)


def secrets(case: Case) -> Findings:
    """Every secret has a value and its file, and the host has the same as this machine."""
    wanted, folder, env = case.plan.secrets_of(case.name), case.host.rendered / FOLDER, case.host.rendered / ENV_FILE
    try:
        values = read_env(env)
    except CorralError as problem:
        yield say("secrets/problem", problem=problem)
        return
    laid_out = {item.name: (folder / item.name).read_bytes() for item in wanted if (folder / item.name).is_file()}
    if missing := [item.name for item in wanted if item.is_stored and not values.get(item.name)]:
        yield say("secrets/no-value", missing=_some(missing), env=env)
    elif absent := [item.name for item in wanted if item.name not in laid_out]:
        yield say("secrets/no-file", absent=_some(absent), folder=folder)
    if other := [name for name, data in laid_out.items() if values.get(name) and values[name].encode() != data]:
        yield say("secrets/differ", other=_some(other))
    far = [name for name in laid_out if not _is_same(case, f"{FOLDER}/{name}")]
    if case.host.ssh is not None and FOLDER in _modes(case) and far:
        yield say("secrets/far", far=_some(far), up=case.up)


def _modes(case: Case) -> dict[str, int]:
    """Modes of the secrets on the host, by path below the rendered folder."""
    lines = (line.partition(" ") for line in case.said("modes").splitlines())
    return {path: int(mode, 8) for mode, _, path in lines}


def secrets_private(case: Case) -> Findings:
    """Only their owner can read the secrets; containers can read the files that they are given."""
    modes = _modes(case)
    for path, wanted in ((ENV_FILE, "600"), (FOLDER, "700")):
        if modes.get(path, 0) & PRIVATE:
            yield say("secrets-private/open", path=path, mode=modes[path], wanted=wanted, folder=case.host.folder)
    closed = [path for path, mode in modes.items() if path.startswith(f"{FOLDER}/") and not mode & READABLE]
    if closed and case.has("containers"):
        yield say("secrets-private/closed", closed=_some(closed))


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


def models(case: Case) -> Findings:
    """Every model file is there, not empty, a GGUF file, and readable for the containers' users."""
    folder, there = case.host.models_folder, _model_files(case)
    uses = {file: item for item in case.plan.site.replicas if item.host == case.name for file in item.files}
    own = sorted(file for file in uses if not file.startswith("/"))
    folders = {".": folder} if own else {}
    folders |= {store: store for store in case.host.used_stores}
    closed = {name for name in folders if name not in there or not there[name].mode & ENTERABLE}
    for name in (name for name in folders if name in closed):
        absent = "no-folder" if name == "." else "no-store"
        mode = there[name].mode if name in there else 0
        text = f"models/{'closed' if name in there else absent}"
        yield say(text, place=folders[name], own=_some(own), mode=mode)
    for name, replica in sorted(uses.items()):
        store = next((store for store in case.host.used_stores if name.startswith(f"{store}/")), ".")
        path = name if name.startswith("/") else f"{folder}/{name}"
        if store not in closed and (text := _wrong(path, there.get(name))):
            begin = bytes.fromhex(there[name].magic.strip("-")).decode("latin-1") if text == "no-gguf" else ""
            values = {"pool": replica.pool, "path": path, "source": replica.files[name], "begin": begin}
            yield say(f"models/{text}", **values)


def _wrong(path: str, found: ModelFile | None) -> str:
    """What is wrong with a model file; empty when it is as it should be."""
    if found is None or found.magic == "outside":
        return "outside" if found else "absent"
    if not found.size:
        return "empty"
    if path.endswith(".gguf") and found.magic != GGUF:
        return "no-gguf"
    return "" if found.mode & READABLE else "unreadable"


def certificates(case: Case) -> Findings:
    """Every certificate that a service is given can be read and is valid for `thresholds.certificate_days` more."""
    ends = understood_ends(case.said("certificates"))
    if unknown := sorted(set(certificate_files(case.host)) - set(ends)):
        yield say("certificates/unknown", unknown=_some(unknown))
    for path, end in ends.items():
        yield from _ending(case, path, end, "renew the certificate" if end else "put the PEM file there")
    for secret in case.plan.secrets_of(case.name):  # `secrets` says which are missing
        file = case.host.rendered / FOLDER / secret.name
        if secret.is_certificate and file.is_file():
            end = end_of(file.read_text(encoding="utf-8", errors="replace"))
            yield from _ending(case, str(file), end, "./generate.py secrets init, then ./generate.py up")


def _ending(case: Case, path: str, end: datetime | None, remedy: str) -> Findings:
    monitoring = case.plan.inventory.monitoring
    enough = timedelta(days=(monitoring.thresholds if monitoring else Thresholds()).certificate_days)
    left = end - datetime.now(UTC) if end else timedelta()
    text = "unreadable" if end is None else "ended" if left < timedelta() else "ends" if left < enough else ""
    if text:
        yield say(f"certificates/{text}", path=path, end=end, left=left, remedy=remedy)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def summary(case: Case) -> str:
    """What was found, when all is well."""
    count, ends = len(_model_files(case).keys() - {"."}), len(understood_ends(case.said("certificates")))
    parts = ["as rendered", counted(len(case.plan.secrets_of(case.name)), "secret")]
    parts += [counted(count, "model file")] if count else []
    return ", ".join([*parts, counted(ends, "certificate") if ends else "no certificates"])
