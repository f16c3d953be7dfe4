"""`upgrade` and `rollback`: other images, tried on one replica of each pool first; and the way back.

The rendering that ran before comes back when a canary does not become well; afterwards it is in the history.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML

from corral.build import Plan, build_plan
from corral.checks.policy import refuse_weak
from corral.components import image_keys
from corral.config.image_lock import lock_in_rendering
from corral.config.load import load_inventory, load_text
from corral.errors import CorralError, UsageError, did_you_mean
from corral.files import write_atomically
from corral.render.output import compare, refuse_unfinished, write
from corral.render.templates import Tree
from corral.render.tree import render
from corral.runtime.board import Board
from corral.runtime.haproxy import backends_of, running_balancer
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.processes import ProcessHost, site_hosts
from corral.tables import new_table
from corral.verbs.up import history
from corral.verbs.up.rolling import roll
from corral.verbs.up.survey import join_networks
from corral.verbs.up.up import LOCK, Run, carry_out, check_secrets, fetch_images, look, next_words, remember

SHORT_ID = 12
# Content by path below a host's folder.
Files = Mapping[str, bytes]
# A service: its host and its name.
Place = tuple[str, str]


# --- upgrade ---------------------------------------------------------------------------------------------------------


def upgrade(
    inventory: Path, out: Path, talk: Console, console: Console, *, to: Sequence[str], timeout_s: float | None = None
) -> None:
    """Brings other images into use: one canary of each pool first, then the rest, each drained before.

    `to` has `KEY=IMAGE` for the inventory's `images`, where it is written; none to use what the inventory says by now.
    One service may take `timeout_s`. The table of images goes to `console`.

    Raises:
        CorralError: a canary did not become well; then all is as it was before, the inventory and its rendering too.
    """
    before = Before.of(inventory, out)
    text = with_images(before.inventory, parse_choices(to)) if to else before.inventory
    plan = build_plan(load_text(text, inventory))
    hosts = compose_hosts(plan, out)
    check_secrets(plan, out, hosts)
    tree = render(plan)
    refuse_weak(plan, tree)
    with Interrupts(), alone(out / LOCK, "corral upgrade"):
        run = Run(plan, out, hosts, Board(talk), timeout_s)
        try:
            _write_inventory(inventory, text)
            write(tree, out)
            look(run)
            images = image_changes(run)
            console.print(_table(images))
            fetch_images(run)
        except BaseException:
            before.restore()
            raise
        before.remember()
        changed = [place for (old, new), places in images.items() if old != new for place in places]
        with run.board:
            _try_canaries(run, before, changed)
            carry_out(run)
        remember(run, text)
    message = f"{len(changed)} services have other images now; ./generate.py rollback goes back"
    talk.print(message if changed else "no image changed")
    talk.print(next_words(plan, out, hosts), soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Before:
    """What the inventory and the rendering on disk were when it began."""

    path: Path
    out: Path
    inventory: str
    # Rendered files of each host.
    files: Mapping[str, Files]

    @classmethod
    def of(cls, inventory: Path, out: Path) -> Before:
        """As they are now; raises CorralError when files were edited by hand, which would get lost."""
        refuse_unfinished(out)
        _refuse_edited({}, out)
        hosts = compose_hosts(build_plan(load_inventory(inventory)), out)
        files = {host.name: history.files_on_disk(out, host.name) for host in hosts}
        return cls(inventory, out, inventory.read_text(encoding="utf-8"), files)

    def remember(self) -> None:
        """Keeps the rendering of every host of which nothing is kept yet, so that there is a way back."""
        for host, files in self.files.items():
            if files and not history.entries(self.out, host):
                history.record(self.out, host, files, self.inventory)

    def restore(self) -> None:
        """Puts both back."""
        write(_tree(self.files), self.out, set(self.files), force=True)
        _write_inventory(self.path, self.inventory)


def _tree(files: Mapping[str, Files]) -> Tree:
    return {f"{host}/{path}": data for host, found in files.items() for path, data in found.items()}


def _write_inventory(path: Path, text: str) -> None:
    if path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode(), path.stat().st_mode & 0o777)


def _refuse_edited(tree: Tree, out: Path, hosts: set[str] | None = None) -> None:
    """Raises CorralError when files were edited by hand, which would get lost."""
    edited = [change.path for change in compare(tree, out, hosts) if change.action == "edited"]
    if edited:
        raise CorralError(
            f"edited by hand: {', '.join(edited)}; ./generate.py diff shows how, render --force undoes it"
        )


def parse_choices(to: Sequence[str]) -> dict[str, str]:
    """Image by key, from `KEY=IMAGE`; raises UsageError for keys that no component has."""
    known = image_keys()
    found = dict(choice.partition("=")[::2] for choice in to)
    for key, image in found.items():
        if not image:
            raise UsageError(f"--to {key}: write KEY=IMAGE, such as llama-cpu=ghcr.io/ggml-org/llama.cpp:server-b11347")
        if key not in known:
            raise UsageError(f'no image has the key "{key}"; {did_you_mean(key, known)}')
    return found


def with_images(text: str, choices: Mapping[str, str]) -> str:
    """An inventory's text with these entries in `images`; everything else, comments too, stays as it is."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(text)
    data.setdefault("images", {}).update(choices)
    buffer = io.StringIO()
    yaml.dump(data, buffer)
    return buffer.getvalue()


def image_changes(run: Run) -> dict[tuple[str, str], list[Place]]:
    """Services by the image that they run with and the one that they will have; with ids where only those differ."""
    found: dict[tuple[str, str], list[Place]] = {}
    for host, seen in run.seen.items():
        for name, item in seen.found.items():
            old, old_id = item.container.image, item.container.image_id
            new, new_id = item.service.image, item.image_id
            if old == new and old_id and new_id and old_id != new_id:
                old, new = (f"{old} ({image.removeprefix('sha256:')[:SHORT_ID]})" for image in (old_id, new_id))
            found.setdefault((old, new), []).append((host, name))
    return found


def _table(images: Mapping[tuple[str, str], Sequence[Place]]) -> Table:
    table = new_table("services", "from", "to")
    for (old, new), places in images.items():
        target = Text("the same", "dim") if old == new else Text(new, "yellow")
        table.add_row(", ".join(map("/".join, places)), old or "(does not run)", target)
    return table


def _try_canaries(run: Run, before: Before, changed: Iterable[Place]) -> None:
    """One replica of each pool whose image changes; when one does not become well, everything is put back."""
    for seen in run.seen.values():
        join_networks(seen)
    for host, name in _canaries(run, changed):
        run.board.say(f"{host.name}: canary {name}")
        run.touched += 1
        try:
            roll(host, [name], run.board, timeout_s=run.timeout_s, keep_out_on_failure=True)
        except BaseException as error:
            before.restore()
            run.board.say(f"{host.name}: {name} does not become well; putting the old one back", "yellow")
            _put_back(run, host, name)
            if not isinstance(error, CorralError):
                raise
            raise CorralError(f"the canary failed; all is as it was before\n{error}") from None


def _canaries(run: Run, changed: Iterable[Place]) -> list[tuple[ComposeHost, str]]:
    """The first running replica of each pool among the services that change."""
    first: dict[str, Place] = {}
    for place in changed:
        if run.seen[place[0]].found[place[1]].container.is_up:
            for backend in backends_of(run.plan, *place):
                first.setdefault(backend.pool, place)
    hosts = {host.name: host for host in run.hosts}
    return [(hosts[name], service) for name, service in dict.fromkeys(first.values())]


def _put_back(run: Run, host: ComposeHost, name: str) -> None:
    """Makes the canary again as it was, and lets it take requests once it is well."""
    for each in run.hosts:
        each.copy()
    roll(host, [name], run.board, timeout_s=run.timeout_s)
    if balancer := running_balancer(run.plan, run.out):
        balancer.put_all_back()


# --- rollback --------------------------------------------------------------------------------------------------------


def rollback(
    plan: Plan, out: Path, talk: Console, *, hosts: Iterable[str] | None = None, timeout_s: float | None = None
) -> None:
    """Brings back the rendering that ran before the present one; what changes is changed one service at a time.

    Raises:
        CorralError: there is no earlier rendering, or a service did not become well.
    """
    began = time.monotonic()
    refuse_unfinished(out)
    names = [host.name for host in site_hosts(plan, out, hosts)]
    with Interrupts(), alone(out / LOCK, "corral rollback"), Board(talk) as board:
        alike: dict[str, dict[str, Files]] = {}  # files by host, by the inventory that they were made of
        for host in names:
            if files := _earlier(out, host, board):
                alike.setdefault(files.pop(history.INVENTORY).decode(), {})[host] = files
        if not alike:
            raise CorralError("there is no earlier rendering to go back to; every successful up keeps one")
        changed = sum(
            _go_back(text, Path(plan.source_file), out, files, board, timeout_s) for text, files in alike.items()
        )
    beside = out / history.FOLDER / "inventory.yaml"  # laid out to be compared
    write_atomically(beside, next(iter(alike)).encode(), 0o644)
    went = ", ".join(name for files in alike.values() for name in files)
    talk.print(f"went back on {went} in {time.monotonic() - began:.0f} s; {changed} services were changed")
    talk.print(
        f"the inventory still says otherwise; what it said then is in {beside}: "
        f"change {plan.source_file} before the next render",
        soft_wrap=True,
    )


def _earlier(out: Path, host: str, board: Board) -> dict[str, bytes]:
    """The rendering that ran before the one on disk; empty when there is none."""
    entry = history.before(out, host, history.files_on_disk(out, host))
    if entry is None:
        board.say(f"{host}: no earlier rendering is kept")
        return {}
    board.say(f"{host}: back to {entry.hash} (number {entry.number})")
    return history.load(entry)


def _go_back(
    text: str, source: Path, out: Path, files: Mapping[str, Files], board: Board, timeout_s: float | None
) -> int:
    """Brings renderings of one inventory up; returns how many services were changed."""
    tree = _tree(files)
    plan = build_plan(replace(load_text(text, source), image_lock=lock_in_rendering(tree)))
    refuse_weak(plan, tree, is_of_plan=False)
    _refuse_edited(tree, out, set(files))
    write(tree, out, set(files))
    hosts = site_hosts(plan, out, files)
    local = [host for host in hosts if isinstance(host, ProcessHost)]
    run = Run(plan, out, [host for host in hosts if host not in local], board, timeout_s, local)
    carry_out(run)
    remember(run, text)
    return run.touched
