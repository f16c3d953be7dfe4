"""Do inventory, rendering, the host's folder, secrets and models agree?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from corral.config.inventory import Thresholds
from corral.errors import CorralError
from corral.render.certificates import end_of
from corral.render.output import MANIFEST, compare, digest
from corral.render.secrets import ENV_FILE, FOLDER, read_env
from corral.render.tree import render
from corral.verbs.doctor.checks import Case, Finding, check
from corral.verbs.doctor.facts import SeenFile
from corral.verbs.status.certificates import certificate_files

GGUF = "GGUF"
SHOWN = 3
# Readable for all users: containers run under user ids of their own.
READABLE, ENTERABLE = 0o004, 0o001
PRIVATE = 0o077


@check("rendered", "files", "./generate.py render")
def rendered(case: Case) -> Iterator[Finding]:
    """The rendered files are those of the inventory, and were not edited."""
    try:
        changes = compare(render(case.plan), case.host.out, {case.name})
    except CorralError as error:
        yield Finding(str(error))
        return
    actions = Counter(change.action for change in changes)
    edited = [change.path for change in changes if change.action == "edited"]
    if actions["create"] and not actions["identical"]:
        yield Finding("nothing is rendered for this host yet", "./generate.py render")
        return
    if edited:
        words = f"edited by hand: {_some(edited)}"
        yield Finding(words, "move the change into the inventory, then ./generate.py render --force", "warning")
    others = sum(actions[action] for action in ("create", "update", "remove"))
    if others:
        yield Finding(f"{_count(others, 'file')} not as the inventory says", "./generate.py diff, then render and up")


@check("copied", "files", "./generate.py up copies the rendering to the host")
def copied(case: Case) -> Iterator[Finding]:
    """The files on a far host are those rendered here."""
    if case.host.ssh is None:
        return
    try:
        wanted = json.loads((case.host.rendered / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return  # `rendered` says so
    different = [path for path, value in wanted.items() if _digest(case, path) != value]
    if len(different) == len(wanted):
        yield Finding("the rendering was not copied to the host yet", _up(case), "hint")
    elif different:
        yield Finding(f"other files on the host than were rendered here: {_some(different)}", _up(case))


def _digest(case: Case, path: str) -> str:
    return case.facts.files.get(path, SeenFile()).digest


@check("running-as-rendered", "files", "./generate.py up", "running")
def running_as_rendered(case: Case) -> Iterator[Finding]:
    """Every container runs with the configuration that is rendered now."""
    if case.seen.hashes_problem:
        words = f"Compose cannot read the rendering: {case.seen.hashes_problem}"
        yield Finding(words, "./generate.py render, then secrets init")
    old = [
        item.service
        for item in case.seen.containers
        if item.project == case.host.project
        and item.service in case.seen.hashes
        and case.seen.hashes[item.service] != item.config_hash
    ]
    if old:
        yield Finding(f"running with an older configuration: {_some(old)}", _up(case), "warning")


@check("secrets", "files", "./generate.py secrets init")
def secrets(case: Case) -> Iterator[Finding]:
    """Every secret has a value and its file, and the host has the same as this machine."""
    wanted = case.plan.secrets_of(case.name)
    try:
        values = read_env(case.host.rendered / ENV_FILE)
    except CorralError as error:
        yield Finding(str(error))
        return
    missing = [item.name for item in wanted if item.is_stored and not values.get(item.name)]
    if missing:
        yield Finding(f"no value for {_some(missing)} in {case.host.rendered / ENV_FILE}", "./generate.py secrets init")
    laid_out = [item.name for item in wanted if (case.host.rendered / FOLDER / item.name).is_file()]
    if not missing and len(laid_out) < len(wanted):
        absent = [item.name for item in wanted if item.name not in laid_out]
        yield Finding(f"no file for {_some(absent)} in {case.host.rendered / FOLDER}", "./generate.py secrets init")
    other = [name for name in laid_out if values.get(name) and _local(case, name) != digest(values[name].encode())]
    if other:
        words = f"{ENV_FILE} and {FOLDER}/ disagree about {_some(other)}"
        yield Finding(words, "./generate.py secrets init, then restart what uses it")
    if case.host.ssh is not None and any(path.startswith(FOLDER) for path in case.facts.files):
        far = [name for name in laid_out if _digest(case, f"{FOLDER}/{name}") != _local(case, name)]
        if far:
            yield Finding(f"the host has another value for {_some(far)} than this machine", _up(case))


def _local(case: Case, name: str) -> str:
    return digest((case.host.rendered / FOLDER / name).read_bytes())


@check("secrets-private", "files", "chmod 600 .env; chmod 700 secrets")
def secrets_private(case: Case) -> Iterator[Finding]:
    """Only their owner can read the secrets; containers can read the files that they are given."""
    files = case.facts.files
    for path, mode in ((ENV_FILE, "600"), (FOLDER, "700")):
        found = files.get(path)
        if found and int(found.mode, 8) & PRIVATE:
            remedy = f"chmod {mode} {case.host.folder}/{path}"
            yield Finding(f"others can read {path} (mode {found.mode})", remedy)
    closed = [
        path
        for path, found in files.items()
        if path.startswith(f"{FOLDER}/") and found.mode.isdecimal() and not int(found.mode, 8) & READABLE
    ]
    if closed:
        yield Finding(f"containers cannot read {_some(closed)}", "./generate.py secrets init")


@check("models", "files", "put the file into models_dir, readable for everybody")
def models(case: Case) -> Iterator[Finding]:
    """Every model file is there, not empty, a GGUF file, and readable for the containers' users."""
    folder, seen = case.host.models_folder, case.facts.models
    replicas = [item for item in case.plan.site.replicas if item.host == case.name]
    uses = {file: item for item in replicas for file in item.files}
    place = seen.get(".")
    if uses and place is None:
        yield Finding(f"there is no folder {folder}", f"make it and put {_some(sorted(uses))} there")
        return
    if place and uses and not int(place.mode, 8) & ENTERABLE:
        yield Finding(f"containers cannot look into {folder} (mode {place.mode})", f"chmod o+rx {folder}")
    for name, replica in sorted(uses.items()):
        source = replica.files[name]
        found = seen.get(name, SeenFile())
        if not found.exists:
            yield Finding(f"{replica.pool}: {folder}/{name} is not there", f"get it from {source}")
        elif not found.size:
            yield Finding(f"{replica.pool}: {folder}/{name} is empty", f"get it again from {source}")
        elif name.endswith(".gguf") and found.magic != GGUF:
            words = f"{replica.pool}: {folder}/{name} is no GGUF file; it begins with {found.magic!r}"
            yield Finding(words, "often a saved error page; get it again")
        elif not int(found.mode, 8) & READABLE:
            yield Finding(f"{replica.pool}: containers cannot read {folder}/{name}", f"chmod o+r {folder}/{name}")


@check("certificates", "files", "renew the certificate")
def certificates(case: Case) -> Iterator[Finding]:
    """Every certificate that a service is given can be read and is valid for `thresholds.certificate_days` more."""
    monitoring = case.plan.inventory.monitoring
    enough = timedelta(days=(monitoring.thresholds if monitoring else Thresholds()).certificate_days)
    unknown = set(certificate_files(case.host)) - set(case.facts.certificates)
    if unknown:
        yield Finding(f"nobody can say when {_some(sorted(unknown))} ends", "install openssl on the host", "warning")
    for path, end in case.facts.certificates.items():
        if end is None:
            yield Finding(f"{path} cannot be read as a certificate", "put the PEM file there")
            continue
        left = end - datetime.now(UTC)
        if left < timedelta():
            yield Finding(f"{path} ended on {end:%d %B %Y}", "renew the certificate")
        elif left < enough:
            yield Finding(f"{path} ends in {left.days} days", "renew the certificate", "warning")
    yield from _ends_of_own(case, enough)


def _ends_of_own(case: Case, enough: timedelta) -> Iterator[Finding]:
    """The certificates of the site's own authority, which hosts show each other."""
    remedy = "./generate.py secrets init, then ./generate.py up"
    for secret in case.plan.secrets_of(case.name):
        path = case.host.rendered / FOLDER / secret.name
        if not secret.is_certificate or not path.is_file():  # `secrets` says so
            continue
        end = end_of(path.read_text(encoding="utf-8", errors="replace"))
        if end is None:
            yield Finding(f"{path} cannot be read as a certificate", remedy)
        elif end - datetime.now(UTC) < enough:
            is_over = end < datetime.now(UTC)
            words = f"{path} {'ended' if is_over else 'ends'} on {end:%d %B %Y}"
            yield Finding(words, remedy, "error" if is_over else "warning")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _count(number: int, noun: str) -> str:
    return f"{_number(number, noun)} {'is' if number == 1 else 'are'}"


def _up(case: Case) -> str:
    return f"./generate.py up --host {case.name}"


def summary(case: Case) -> str:
    """What was found, when all is well."""
    parts = ["as rendered", _number(len(case.plan.secrets_of(case.name)), "secret")]
    count = sum(name != "." for name in case.facts.models)
    parts += [_number(count, "model file")] if count else []
    ends = len(case.facts.certificates)
    return ", ".join([*parts, _number(ends, "certificate") if ends else "no certificates"])


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
