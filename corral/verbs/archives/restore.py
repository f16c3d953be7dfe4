"""`restore`: what a backup holds, on a machine that has nothing of it; afterwards `up` starts the site as it was.

Nothing is written before every byte of the archive is checked and the secrets are open. A place that is not empty is
left alone unless asked. A restore that was cut off goes on where it stopped when it is run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
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
from corral.verbs.archives.backup import WORKERS, states_of, title
from corral.verbs.archives.container import explained, options_of, unpacked, work_folder
from corral.verbs.archives.contents import RENDERING, SECRETS, Backup, read_backup
from corral.verbs.archives.passphrase import unseal
from corral.verbs.archives.target import Site, Target, put
from corral.verbs.up.survey import check_engine
from corral.verbs.up.up import LOCK, Run, fetch_images, look

# Folder beside the renderings for the data of services, from when it is checked until it is back.
STAGING = ".restore.part"
# In the folder of renderings while a restore is not finished: of which backup, and which states are back.
NOTE = ".restore.json"


@dataclass(frozen=True, slots=True)
class _Job(Site):
    """A restore at work."""

    backup: Backup
    target: Target
    # Files by path below the folder of renderings; none when the archive has none.
    secrets: dict[str, bytes]

    def states(self, host: ComposeHost) -> dict[str, State]:
        """What goes back on a host, by the archive's member."""
        known = {(state.service, state.name): state for state in states_of(host)}
        saved = [item for item in self.backup.manifest.states if item.host == host.name]
        return {item.member: known[item.service, item.name] for item in saved if (item.service, item.name) in known}


# --- restoring -------------------------------------------------------------------------------------------------------


def restore(
    path: Path, talk: Console, target: Target, ask: Callable[[], str], *, replace: bool = False, yes: bool = False
) -> None:
    """Bring back what a backup holds.

    Args:
        path: what `backup` made.
        talk: where progress and questions go.
        target: where it goes.
        ask: gets the passphrase.
        replace: whether what is there may go.
        yes: the operator's answer to every question.

    Raises:
        WrongPassphraseError: it does not open; nothing was changed.
        UsageError: the place is not empty, or the backup names other places than the inventory here, or is not
            authenticated and names any; the message says which.
        CorralError: the archive is damaged, or something is left for a person to do; the message says what.
    """
    ask = cache(ask)
    with (
        Interrupts(),
        alone(target.out / LOCK, "corral restore"),
        work_folder(target.out / STAGING, "nothing was changed") as folder,
    ):
        backup = read_backup(path, ask, folder)
        talk.print(backup.summary())
        job = _job(backup, target, ask)
        busy = [name for name in job.hosts if job.plan.services_of(name) and not job.plan.site.is_local(name)]
        hosts = compose_hosts(job.plan, target.out, busy) if busy else []
        done = _states_that_are_back(job)
        if done is None and (found := _differences(job)):
            _agree("these places, images and addresses would be used", found, talk, yes=yes)
        for host in hosts:  # only now: it may call them over ssh
            check_engine(host)
        if done is None:
            _make_room(job, hosts, talk, replace=replace, yes=yes)
        with explained(target.out, "run the same command again to go on"):
            _fill(job, hosts, talk, done or [])
    talk.print(Text(f"restored; next: ./generate.py up{options_of(target.inventory, target.out)}"))


def _fill(job: _Job, hosts: Sequence[ComposeHost], talk: Console, done: list[str]) -> None:
    """Bring everything back but the states in `done`; the folder of renderings says how far that is."""
    _note(job, done)
    job.target.fill(job, talk, force=True)
    _lay_out_secrets(job, talk)
    with Board(talk) as board:
        run = Run(job.plan, job.target.out, list(hosts), board)
        if hosts:
            look(run)
            fetch_images(run)
        for host, member, state in ((one, *item) for one in run.hosts for item in job.states(one).items()):
            if member not in done:
                _put_back(host, state, job.backup.states[member], board)
                done.append(member)
                _note(job, done)
                board.say(f"{title(state)}: is back")
    (job.target.out / NOTE).unlink()


def _job(backup: Backup, target: Target, ask: Callable[[], str]) -> _Job:
    hosts = target.hosts_of(backup.manifest.hosts, "backup")
    plan = target.plan_of(backup.files)
    secrets: dict[str, bytes] = {}
    if backup.manifest.has_secrets:
        if SECRETS not in backup.files:
            raise CorralError(f"{backup.path}: has no {SECRETS}")
        secrets = unpacked(unseal(backup.files[SECRETS], ask()))
    tree = {name.removeprefix(RENDERING): data for name, data in backup.files.items() if name.startswith(RENDERING)}
    _refuse_foreign(backup, tree, secrets)
    tree = _of_hosts(tree, hosts)
    manifests = {path: tree.pop(path) for host in hosts if (path := f"{host}/{MANIFEST}") in tree}
    refuse_weak(plan, tree, is_of_plan=False)
    return _Job(plan, backup.files, hosts, tree, manifests, backup, target, _of_hosts(secrets, hosts))


def _refuse_foreign(backup: Backup, tree: Collection[str], secrets: Collection[str]) -> None:
    """Raise CorralError when files have names that `backup` does not give to such files."""
    own = {ENV_FILE, FOLDER, *NOT_COPIED}
    inside = {path: path.partition("/")[2] for path in tree}
    foreign = [path for path, inner in inside.items() if inner.partition("/")[0] in own or inner.startswith(WORKERS)]
    for path in secrets:
        inner = path.partition("/")[2]
        if inner != ENV_FILE and inner.rpartition("/")[0] not in (FOLDER, WORKERS):
            foreign.append(path)
    if foreign:
        raise CorralError(f"{backup.path}: {foreign[0]} in it is nothing that corral saves; use another backup")


def _of_hosts(files: Mapping[str, bytes], names: Collection[str]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path.partition("/")[0] in names}


def _states_that_are_back(job: _Job) -> list[str] | None:
    """Members that an unfinished restore of this backup has put back; None when there is no such restore."""
    try:
        note = json.loads((job.target.out / NOTE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    is_ours = isinstance(note, dict) and note.get("backup") == job.backup.mark
    return [str(name) for name in note.get("done", [])] if is_ours else None


def _note(job: _Job, done: Sequence[str]) -> None:
    data = json.dumps({"backup": job.backup.mark, "done": list(done)}).encode() + b"\n"
    put(job.target.out / NOTE, data, 0o600)


# --- an empty place --------------------------------------------------------------------------------------------------


def _make_room(job: _Job, hosts: Sequence[ComposeHost], talk: Console, *, replace: bool, yes: bool) -> None:
    """Empty the place if the operator asked for it; otherwise raise UsageError with what is there."""
    counts = [(host, count) for host in hosts if (count := len(host.containers()))]
    lost = job.target.conflicts(job, {"update", "edited", "remove"})
    secrets = [(job.target.out / path, data) for path, data in job.secrets.items()]
    lost += [f"{path}, other secrets" for path, data in secrets if path.exists() and path.read_bytes() != data]
    lost += [f"{host.name}: {count} containers of this site" for host, count in counts]
    volumes = [(host, name) for host in hosts for name in _volumes_in_the_way(host, job)]
    lost += [f"{host.name}: volume {name}" for host, name in volumes]
    if lost and not replace:
        message = _list("nothing was changed; the place is not empty", lost)
        raise UsageError(f"{message}\nto replace all that, add --replace")
    if lost:
        _agree("this would be lost", lost, talk, yes=yes)
    for host, count in counts:
        talk.print(Text(f"{host.name}: stopping and removing {count} containers"))
        command = ["docker", "compose", "--project-name", host.project, "down", "--remove-orphans"]
        host.run(command, limit_s=COMMAND_LIMIT_S)
    for host, name in volumes:
        host.run(["docker", "volume", "rm", name])


def _volumes_in_the_way(host: ComposeHost, job: _Job) -> list[str]:
    names = {f"{host.project}_{state.volume}" for state in job.states(host).values()}
    return sorted(names & set(host.run(["docker", "volume", "ls", "--format", "{{.Name}}"]).out.split()))


def _agree(what: str, lines: Sequence[str], talk: Console, *, yes: bool) -> None:
    """Print what would happen; raises UsageError unless the operator agrees."""
    message = _list(what, lines)
    if not yes and not sys.stdin.isatty():
        raise UsageError(f"nothing was changed; {message}\nif that is meant, add --yes")
    talk.print(Text(message, "yellow"))
    if not yes and input("go on? Write yes: ").strip() != "yes":
        raise UsageError("nothing was changed")


def _list(what: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{what}:", *(f"  {on_one_line(line)}" for line in lines)])


def _differences(job: _Job) -> list[str]:
    """What the backup's inventory says otherwise than the one that is here, of all that says where secrets go.

    Without one here, all of it, unless the archive is authenticated; what is not may also have another rendering.
    """
    here, there = _places_here(job.target.inventory), _places(job.plan)
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
        other = (path for path, data in job.tree.items() if made.get(path) != data)
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
    found |= {
        f"node {name}": node.url or str(node.dials_in or node.model or "")
        for name, node in plan.inventory.nodes.items()
    }
    if plan.inventory.tracing is not None:
        found["traces"] = plan.inventory.tracing.url or plan.inventory.tracing.host or ""
    images = {service.image for service in plan.contributions.services if service.image}
    return found | {f"image {name.partition('@')[0]}": name for name in images}


# --- filling it ------------------------------------------------------------------------------------------------------


def _lay_out_secrets(job: _Job, talk: Console) -> None:
    """Write the secrets; raises CorralError with the values that the operator has to supply."""
    out, plan = job.target.out, job.plan
    for path, data in job.secrets.items():
        folder = (out / path).parent
        folder.mkdir(mode=0o700 if folder.name == FOLDER else 0o777, parents=True, exist_ok=True)
        put(out / path, data, 0o600 if path.endswith(ENV_FILE) else 0o644)
    if not job.backup.manifest.has_secrets:
        missing = [name for name in job.hosts if name in plan.secrets and not (out / name / ENV_FILE).is_file()]
        if missing:
            raise CorralError(_what_to_supply(job, missing))
    reports = initialise(plan.secrets, out, set(job.hosts))
    unknown = [f"{name} in {out / report.host / ENV_FILE}" for report in reports for name in report.missing]
    if unknown:
        message = "these values only you know; write them, then run the same command again"
        raise CorralError(f"{message}: {', '.join(unknown)}")
    talk.print(Text(f"secrets of {', '.join(job.hosts)} are in place"))


def _what_to_supply(job: _Job, hosts: Sequence[str]) -> str:
    lines = ["the backup has no secrets; inventory and rendering are in place, data is not yet; write NAME=value into"]
    for name in hosts:
        stored = [secret for secret in job.plan.secrets_of(name) if secret.is_stored]
        lines += [f"  {job.target.out / name / ENV_FILE}:", *(f"    {item.name}  ({item.purpose})" for item in stored)]
    lines.append("what you do not have any more: ./generate.py secrets init makes new values (docs/backup.md says what")
    return "\n".join([*lines, "is lost with the old ones); then run the same command again"])


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
        message = f"{title(state)}: is not back: {error.done.words}"
        raise CorralError(f"{message}\n  run the same command again when that is mended") from None
