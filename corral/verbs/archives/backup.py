"""`backup`: what a site cannot make again, in one file: inventory, rendering, encrypted secrets, state of services.

Model files and images are not in it: they are downloaded again, or come from a bundle. A volume is read by Docker
itself (`docker cp`), so that an image needs no tools for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from corral import __version__
from corral.build import Plan
from corral.components import tunnel
from corral.config.load import locks_beside
from corral.contributions import State
from corral.errors import CorralError
from corral.render.output import MANIFEST, refuse_unfinished
from corral.render.secrets import ENV_FILE, FOLDER
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.verbs.archives.container import INVENTORY, ArchiveFolder, amount, packed, work_folder
from corral.verbs.archives.contents import RENDERING, SECRETS, STATES, Manifest, SavedState, Sealing, write_archive
from corral.verbs.archives.passphrase import seal
from corral.verbs.up.history import files_on_disk, note_backup
from corral.verbs.up.survey import check_engine, image_ids
from corral.verbs.up.up import LOCK

# Where public keys of workers are, in the folder of the gateway's host.
WORKERS = f"{tunnel.COMPONENT}/{tunnel.KEYS}"
COPY = Path(__file__).with_name("copy_folder.sh").read_text(encoding="utf-8")


def backup(
    plan: Plan,
    out: Path,
    talk: Console,
    *,
    hosts: Iterable[str] | None = None,
    to: Path | None = None,
    sealing: Sealing | None,
) -> Path:
    """The archive that was made, mode 0600.

    Args:
        plan: what the inventory says.
        out: the folder of renderings.
        talk: where progress goes.
        hosts: hosts to save; all of them when absent.
        to: the archive's name; the site's and the date in this folder when absent.
        sealing: what protects the archive; None leaves it readable, and the secrets out.

    Raises:
        CorralError: something cannot be read or written; there is no archive then.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    site = plan.inventory.name
    target = to or Path(f"{site}-{now:%Y%m%dT%H%M%SZ}.{'backup' if sealing and not sealing.is_plain else 'tar.gz'}")
    _check_target(target)
    refuse_unfinished(out)
    chosen = [name for name in plan.inventory.hosts if hosts is None or name in set(hosts)]
    running = compose_hosts(plan, out, chosen)
    for host in running:
        check_engine(host)
    with (
        Interrupts(),
        alone(out / LOCK, "corral backup"),
        work_folder(target.absolute().parent / f".{site}.backup.part", "there is no backup of this run") as folder,
    ):
        parts = ArchiveFolder(folder)
        _add_site(parts, plan, out, chosen)
        if sealing is not None:
            parts.add(SECRETS, seal(packed(_secret_files(plan, out, chosen)), sealing.passphrase))
            talk.print(f"secrets of {', '.join(chosen)}: encrypted with the passphrase")
        manifest = Manifest(
            format="corral-backup/3",
            corral=__version__,
            site=site,
            made=now,
            hosts=tuple(chosen),
            has_secrets=sealing is not None,
            secret_names={name: tuple(secret.name for secret in plan.secrets_of(name)) for name in chosen},
            images={host.name: image_ids(host, {item.image for item in host.services}) for host in running},
            states=tuple(saved for host in running for saved in _add_states(parts, host, talk)),
        )
        write_archive(target.absolute(), parts, manifest, sealing)
        note_backup(out, chosen, now.timestamp())
    _report(plan, target, chosen, talk, sealing)
    return target


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CorralError(f"{target}: is there already; name another file")
    if not target.absolute().parent.is_dir():
        raise CorralError(f"{target.parent}: no such folder; make it first")


def _add_site(parts: ArchiveFolder, plan: Plan, out: Path, chosen: Sequence[str]) -> None:
    """Add the inventory, its locks, and the renderings as they lie on the disk."""
    source = Path(plan.source_file)
    for name, data in {INVENTORY: source.read_bytes(), **locks_beside(source)}.items():
        parts.add(name, data)
    for name in chosen:
        files = files_on_disk(out, name)
        if not files and plan.services_of(name):
            raise CorralError(f"{out / name}: nothing is rendered there; run ./generate.py render, then up")
        if files:
            files[MANIFEST] = (out / name / MANIFEST).read_bytes()
        for path, data in sorted(files.items()):
            parts.add(f"{RENDERING}{name}/{path}", data)


def _secret_files(plan: Plan, out: Path, chosen: Sequence[str]) -> dict[str, bytes]:
    """The hosts' `.env`, files beside the secrets that are made from it, and the keys of workers."""
    found: dict[str, bytes] = {}
    for name in chosen:
        names = {secret.name for secret in plan.secrets_of(name)}
        store = out / name / ENV_FILE
        if store.is_file():
            found[f"{name}/{ENV_FILE}"] = store.read_bytes()
        elif names:
            raise CorralError(
                f"{store}: no such file, so there are no secrets to save; --without-secrets leaves them out"
            )
        for path in sorted((out / name / FOLDER).glob("*")):
            if path.is_file() and path.name not in names:
                found[f"{name}/{FOLDER}/{path.name}"] = path.read_bytes()
        for path in sorted((out / name / WORKERS).glob("*-*")):
            found[f"{name}/{WORKERS}/{path.name}"] = path.read_bytes()
    return found


def states_of(host: ComposeHost) -> list[State]:
    """What of a host's services is worth keeping."""
    return [state for state in host.plan.contributions.states if state.host == host.name]


def title(state: State) -> str:
    """`sa/postgres: database (keys, budgets and spend)`."""
    return f"{state.host}/{state.service}: {state.name} ({state.purpose})"


def _add_states(parts: ArchiveFolder, host: ComposeHost, talk: Console) -> Iterator[SavedState]:
    images = {service.name: service.image for service in host.services}
    for state in states_of(host):
        member = f"{STATES}{state.host}/{state.service}/{state.name}{'.dump' if state.dump else '.tar'}"
        with host.stream(_save_command(host, state)) as data:
            size = parts.add(member, data)
        talk.print(Text(f"{title(state)}: {amount(size)}"))
        about = {name: getattr(state, name) for name in ("host", "service", "name", "purpose")}
        yield SavedState(**about, image=images[state.service], member=member)


def _save_command(host: ComposeHost, state: State) -> list[str]:
    """The command on the host that prints a state; raises CorralError when there is nothing to take it from."""
    container = host.container_of(state.service)
    if container is None or (state.dump and not container.is_running):
        reason = f"does not run ({container.state})" if container else "has no container"
        remedy = f"start it first: ./generate.py up --host {host.name}"
        raise CorralError(f"{title(state)} cannot be saved: {state.service} {reason}; {remedy}")
    return (
        ["docker", "exec", container.id, *state.dump]
        if state.dump
        else ["sh", "-c", COPY, "sh", container.id, state.path]
    )


def _report(plan: Plan, target: Path, chosen: Sequence[str], talk: Console, sealing: Sealing | None) -> None:
    for name in chosen:
        if plan.site.is_local(name):
            talk.print(Text(f"{name}: runs no containers; its data folder is not in the backup", "yellow"))
    keep = "without secrets; a program that can write to the file can change what it says"
    if sealing is not None:
        lost = "the secrets are lost" if sealing.is_plain else "all of it is lost"
        keep = f"keep the passphrase elsewhere: without it {lost}"
    talk.print(Text(f"{target}: {amount(target.stat().st_size)}, complete; {keep}"))
