"""`restore`: what a backup holds, on a machine that has nothing of it; afterwards `up` starts the site as it was.

Nothing is written before every byte of the archive is checked and the secrets are open. A place that is not empty is
left alone unless asked. A restore that was cut off goes on where it stopped when it is run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.build import Plan, build_plan
from corral.checks.policy import refuse_weak
from corral.config.load import load_inventory
from corral.contributions import State
from corral.errors import CorralError, UsageError, on_one_line
from corral.render.output import MANIFEST
from corral.render.secrets import ENV_FILE, FOLDER, initialise
from corral.render.tree import render
from corral.runtime.board import Board
from corral.runtime.hosts import NOT_COPIED, CommandError, ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.waiting import COMMAND_LIMIT_S, create, wait_well
from corral.verbs.archives.backup import states_of, title
from corral.verbs.archives.container import amount, explained, options_of, unpacked, work_folder
from corral.verbs.archives.contents import RENDERING, SECRETS, Asking, Backup, read_backup
from corral.verbs.archives.passphrase import find_passphrase, unseal
from corral.verbs.archives.target import Target, put
from corral.verbs.up.survey import check_engine
from corral.verbs.up.up import LOCK, Run, fetch_images, look

# Folder beside the renderings for the data of services, from when it is checked until it is back.
STAGING = ".restore.part"
# In the folder of renderings while a restore is not finished: of which backup, and which states are back.
NOTE = ".restore.json"
GO_ON = "run the same command again to go on"


@dataclass(frozen=True, slots=True)
class Wanted(Target):
    """Where a backup goes, and what the operator said about it."""

    passphrase_file: Path | None = None
    replace: bool = False
    yes: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """A restore at work."""

    backup: Backup
    wanted: Wanted
    plan: Plan
    names: tuple[str, ...]
    # Rendered files of the hosts, by path.
    tree: dict[str, bytes]
    # Files by path below the folder of renderings; none when the archive has none.
    secrets: dict[str, bytes]

    @property
    def hosts(self) -> list[ComposeHost]:
        """Hosts that get something back into their containers or volumes."""
        busy = [name for name in self.names if self.plan.services_of(name) and not self.plan.site.is_local(name)]
        return compose_hosts(self.plan, self.wanted.out, busy) if busy else []

    def states(self, host: ComposeHost) -> dict[str, State]:
        """What goes back on a host, by the archive's member."""
        known = {(state.service, state.name): state for state in states_of(host)}
        saved = [item for item in self.backup.manifest.states if item.host == host.name]
        return {item.member: known[item.service, item.name] for item in saved if (item.service, item.name) in known}


# --- looking ---------------------------------------------------------------------------------------------------------


def listing(backup: Backup) -> Table:
    """What is in a backup, as a table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("sha256")
    manifest = backup.manifest
    titles = {item.member: f"{item.host}/{item.service}: {item.name} ({item.purpose})" for item in manifest.states}
    for host in manifest.hosts:
        sizes = [item.size for name, item in manifest.members.items() if name.startswith(f"{RENDERING}{host}/")]
        table.add_row(f"{host}: rendering, {len(sizes)} files", amount(sum(sizes)), "")
    for name, member in manifest.members.items():
        if not name.startswith(RENDERING):
            words = titles.get(name, "secrets, sealed" if name == SECRETS else name)
            table.add_row(Text(words), amount(member.size), member.sha256[:16])
    return table


def summary(backup: Backup) -> Text:
    """One line about a backup that is whole."""
    manifest = backup.manifest
    secrets = "with secrets" if manifest.has_secrets else "without secrets"
    trust = (
        "" if backup.is_authentic else "; NOT AUTHENTICATED: a program that could write to the file may have changed it"
    )
    words = (
        f"{backup.path}: whole; site {manifest.site} ({', '.join(manifest.hosts)}), made "
        f"{manifest.made:%Y-%m-%d %H:%M:%S} UTC by corral {manifest.corral}, {secrets}{trust}"
    )
    return Text(words, "" if backup.is_authentic else "yellow")


# --- restoring -------------------------------------------------------------------------------------------------------


def restore(path: Path, talk: Console, wanted: Wanted) -> None:
    """Bring back what a backup holds.

    Raises:
        WrongPassphraseError: it does not open; nothing was changed.
        UsageError: the place is not empty, or the backup names other places than the inventory here, or is not
            authenticated and names any; the message says which.
        CorralError: the archive is damaged, or something is left for a person to do; the message says what.
    """

    @cache
    def ask() -> str:
        return find_passphrase(wanted.passphrase_file, is_new=False)

    with Interrupts(), _staging(wanted.out) as folder:
        backup = read_backup(path, ask, folder)
        talk.print(summary(backup))
        job = _job(backup, wanted, ask)
        hosts = job.hosts
        done = _states_that_are_back(job)
        if done is None and (found := _differences(job)):
            _agree(f"these places, images and addresses would be used:\n{_indented(found)}", wanted, talk)
        for host in hosts:  # only now: it may call them over ssh
            check_engine(host)
        with alone(wanted.out / LOCK, "corral restore"), explained(wanted.out, GO_ON):
            if done is None:
                _make_room(job, hosts, talk)
            _note(job, done or [])
            wanted.fill(backup.files, job.tree, talk, force=True)
            _lay_out_secrets(job, talk)
            with Board(talk) as board:
                _put_states_back(job, hosts, board, done or [])
            (wanted.out / NOTE).unlink()
    talk.print(Text(f"restored; next: ./generate.py up{options_of(wanted.inventory, wanted.out)}"))


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    try:
        with work_folder(out / STAGING, "nothing was changed") as place:
            yield place
    finally:
        with suppress(OSError):
            out.rmdir()  # if nothing was laid out


def _job(backup: Backup, wanted: Wanted, ask: Asking) -> _Job:
    names = wanted.hosts_of(backup.manifest.hosts, "backup")
    plan = wanted.plan_of(backup.files)
    secrets: dict[str, bytes] = {}
    if backup.manifest.has_secrets:
        if SECRETS not in backup.files:
            raise CorralError(f"{backup.path}: has no {SECRETS}")
        secrets = unpacked(unseal(backup.files[SECRETS], ask()))
    rendering = {name: data for name, data in backup.files.items() if name.startswith(RENDERING)}
    tree = {name.removeprefix(RENDERING): data for name, data in rendering.items()}
    _refuse_foreign(backup, tree, secrets)
    tree = _of_hosts(tree, names)
    refuse_weak(plan, tree, is_of_plan=False)
    return _Job(backup, wanted, plan, names, tree, _of_hosts(secrets, names))


def _refuse_foreign(backup: Backup, tree: Collection[str], secrets: Collection[str]) -> None:
    """Raise CorralError when files have names that `backup` does not give to such files."""
    own = {ENV_FILE, FOLDER, *NOT_COPIED}
    foreign = [path for path in tree if path.partition("/")[2].partition("/")[0] in own]
    for path in secrets:
        inner = path.split("/")[1:]
        if inner != [ENV_FILE] and inner[:-1] != [FOLDER]:
            foreign.append(path)
    if foreign:
        raise CorralError(f"{backup.path}: {foreign[0]} in it is nothing that corral saves; use another backup")


def _of_hosts(files: Mapping[str, bytes], names: Collection[str]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path.partition("/")[0] in names}


def _states_that_are_back(job: _Job) -> list[str] | None:
    """Members that an unfinished restore of this backup has put back; None when there is no such restore."""
    try:
        note = json.loads((job.wanted.out / NOTE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    is_ours = isinstance(note, dict) and note.get("backup") == job.backup.mark
    return [str(name) for name in note.get("done", [])] if is_ours else None


def _note(job: _Job, done: Sequence[str]) -> None:
    data = json.dumps({"backup": job.backup.mark, "done": list(done)}).encode() + b"\n"
    put(job.wanted.out / NOTE, data, 0o600)


# --- an empty place --------------------------------------------------------------------------------------------------


def _make_room(job: _Job, hosts: Sequence[ComposeHost], talk: Console) -> None:
    """Empty the place if the operator asked for it; otherwise raise UsageError with what is there."""
    lost, out = (
        job.wanted.conflicts(job.plan, job.backup.files, job.tree, {"update", "edited", "remove"}),
        job.wanted.out,
    )
    lost += [f"{out / path}, other secrets" for path, data in job.secrets.items() if _is_other(out / path, data)]
    counts = {host: len(host.containers()) for host in hosts}
    lost += [f"{host.name}: {count} containers of this site" for host, count in counts.items() if count]
    volumes = [(host, name) for host in hosts for name in _volumes_in_the_way(host, job)]
    lost += [f"{host.name}: volume {name}" for host, name in volumes]
    if lost and not job.wanted.replace:
        words = f"the place is not empty:\n{_indented(lost)}"
        raise UsageError(f"nothing was changed; {words}\nto replace all that, add --replace")
    if lost:
        _agree(f"this would be lost:\n{_indented(lost)}", job.wanted, talk)
    for host, count in counts.items():
        if count:
            talk.print(Text(f"{host.name}: stopping and removing {count} containers"))
            command = ["docker", "compose", "--project-name", host.project, "down", "--remove-orphans"]
            host.run(command, limit_s=COMMAND_LIMIT_S)
    for host, name in volumes:
        host.run(["docker", "volume", "rm", name])


def _is_other(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() != data


def _volumes_in_the_way(host: ComposeHost, job: _Job) -> list[str]:
    names = {f"{host.project}_{state.volume}" for state in job.states(host).values()}
    return sorted(names & set(host.run(["docker", "volume", "ls", "--format", "{{.Name}}"]).out.split()))


def _agree(words: str, wanted: Wanted, talk: Console) -> None:
    """Print what would happen; raises UsageError unless the operator agrees."""
    if not wanted.yes and not sys.stdin.isatty():
        raise UsageError(f"nothing was changed; {words}\nif that is meant, add --yes")
    talk.print(Text(words, "yellow"))
    if not wanted.yes and input("go on? Write yes: ").strip() != "yes":
        raise UsageError("nothing was changed")


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {on_one_line(line)}" for line in lines)


def _differences(job: _Job) -> list[str]:
    """What the backup's inventory says otherwise than the one that is here, of all that says where secrets go.

    Without one here, all of it, unless the archive is authenticated; what is not may also have another rendering.
    """
    here, there = _places_here(job.wanted.inventory), _places(job.plan)
    if here is None and job.backup.is_authentic:
        return []
    here = here or {}
    found = [
        f"{key}: {here.get(key, 'not here')} -> {there.get(key, 'not in the backup')}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if not job.backup.is_authentic:
        made = render(job.plan)
        other = (
            path for path, data in job.tree.items() if made.get(path) != data and not path.endswith(f"/{MANIFEST}")
        )
        found += [f"{path}: is not what this kit makes of the backup's inventory" for path in sorted(other)]
    return found


def _places_here(inventory: Path) -> dict[str, str] | None:
    """The places of the inventory that is here; None when there is none, or none that can be read."""
    try:
        return _places(build_plan(load_inventory(inventory))) if inventory.exists() else None
    except CorralError:
        return None


def _places(plan: Plan) -> dict[str, str]:
    """Everything in a plan that secrets and requests are sent to or run by."""
    found = {}
    for name, host in plan.inventory.hosts.items():
        found[f"host {name}"] = f"address {host.address}, ssh {host.ssh or '-'}, folder {host.folder or '-'}"
        found[f"models of {name}"] = host.models_dir
    found |= {f"node {name}": node.url or node.model for name, node in plan.inventory.nodes.items()}
    if plan.inventory.tracing is not None:
        found["traces"] = plan.inventory.tracing.url or plan.inventory.tracing.host or ""
    images = {service.image for service in plan.contributions.services if service.image}
    return found | {f"image {name.partition('@')[0]}": name for name in images}


# --- filling it ------------------------------------------------------------------------------------------------------


def _lay_out_secrets(job: _Job, talk: Console) -> None:
    """Write the secrets; raises CorralError with the values that the operator has to supply."""
    out, plan = job.wanted.out, job.plan
    for path, data in job.secrets.items():
        folder = (out / path).parent
        if folder.name == FOLDER:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        put(out / path, data, 0o644 if folder.name == FOLDER else 0o600)
    needed = {name: plan.secrets_of(name) for name in plan.inventory.hosts if plan.secrets_of(name)}
    if not job.backup.manifest.has_secrets:
        missing = [name for name in job.names if name in needed and not (out / name / ENV_FILE).is_file()]
        if missing:
            raise CorralError(_what_to_supply(job, missing))
    reports = initialise(needed, out, set(job.names))
    unknown = [f"{name} in {out / report.host / ENV_FILE}" for report in reports for name in report.missing]
    if unknown:
        words = ", ".join(unknown)
        raise CorralError(f"these values only you know; write them, then run the same command again: {words}")
    talk.print(Text(f"secrets of {', '.join(job.names)} are in place"))


def _what_to_supply(job: _Job, hosts: Sequence[str]) -> str:
    lines = [
        "the backup has no secrets; inventory and rendering are in place, data is not yet",
        "write NAME=value into",
    ]
    for name in hosts:
        lines.append(f"  {job.wanted.out / name / ENV_FILE}:")
        stored = [secret for secret in job.plan.secrets_of(name) if secret.is_stored]
        lines += [f"    {secret.name}  ({secret.purpose})" for secret in stored]
    lines.append("what you do not have any more: ./generate.py secrets init makes new values (docs/backup.md says what")
    lines.append("is lost with the old ones); then run the same command again")
    return "\n".join(lines)


def _put_states_back(job: _Job, hosts: Sequence[ComposeHost], board: Board, done: list[str]) -> None:
    """Put every state back that is not in `done`, and note each one on the disk."""
    run = Run(job.plan, job.wanted.out, list(hosts), board)
    if hosts:
        look(run)
        fetch_images(run)
    for host in run.hosts:
        for member, state in job.states(host).items():
            if member not in done:
                _put_back(host, state, job.backup.states[member], board)
                done.append(member)
                _note(job, done)
                board.say(f"{title(state)}: is back")


def _put_back(host: ComposeHost, state: State, path: Path, board: Board) -> None:
    """Restore a state into its service; raises CorralError when the service refuses it."""
    try:
        if state.load:
            create(host, [state.service])
            wait_well(host, [item for item in host.services if item.name == state.service], board)
        else:
            host.compose("up", "--no-start", "--no-deps", "--no-build", "--pull", "never", state.service)
        container = host.container_of(state.service)
        if container is None:
            raise CorralError(f"{title(state)}: the container of {state.service} is gone again")
        into = ["docker", "exec", "--interactive", container.id, *state.load]
        copy = ["docker", "cp", "--archive", "-", f"{container.id}:{state.path}"]
        with path.open("rb") as data:
            host.feed(into if state.load else copy, data)
    except CommandError as error:
        words = f"{title(state)}: is not back: {error.done.words}"
        raise CorralError(f"{words}\n  run the same command again when that is mended") from None
