"""`upgrade` and `rollback`: other images, tried on one replica of each pool first; and the way back.

The rendering that ran before comes back when a canary does not become well; afterwards it is in the history.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.build import Plan, build_plan
from corral.checks.policy import refuse_weak
from corral.components import image_keys
from corral.config.image_lock import lock_in_rendering
from corral.config.load import load_inventory, load_text
from corral.errors import CorralError, UsageError, did_you_mean
from corral.files import write_atomically
from corral.render.output import compare, refuse_unfinished, write
from corral.render.tree import Tree, render
from corral.runtime.board import Board
from corral.runtime.haproxy import backends_of, balancer_of
from corral.runtime.hosts import ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.verbs.up import history, wiring
from corral.verbs.up.rolling import roll
from corral.verbs.up.up import LOCK, Run, carry_out, check_secrets, fetch_images, look, next_words, remember

SHORT_ID = 12


@dataclass(frozen=True, slots=True)
class Step:
    """An image of a service: what runs, and what will."""

    host: str
    service: str
    old: str
    new: str
    is_changed: bool


# --- upgrade ---------------------------------------------------------------------------------------------------------


def upgrade(
    inventory: Path, out: Path, talk: Console, console: Console, *, to: Sequence[str], timeout_s: float | None = None
) -> None:
    """Brings other images into use: one canary of each pool first, then the rest, each drained before.

    Args:
        inventory: the inventory's file; `to` is written into its `images`.
        out: the folder of renderings.
        talk: where progress and problems go.
        console: where the table of images goes.
        to: `KEY=IMAGE` for keys of `images`; none to use what the inventory says by now.
        timeout_s: longest time in seconds that one service may take.

    Raises:
        CorralError: a canary did not become well; then all is as it was before, the inventory and its rendering too.
    """
    before = Before.of(inventory, out)
    plan = _plan_with(inventory, before.inventory, to)
    hosts = compose_hosts(plan, out)
    check_secrets(plan, out, hosts)
    refuse_weak(plan, render(plan))
    with Interrupts(), alone(out / LOCK, "corral upgrade"):
        board = Board(talk)
        run = Run(plan, out, hosts, board, timeout_s)
        try:
            _write(inventory, out, plan, before, to)
            look(run)
            steps = images(run)
            show_images(steps, console)
            fetch_images(run)
        except BaseException:
            before.restore()
            raise
        before.remember(hosts)
        with board:
            _try_canaries(run, before, steps)
            carry_out(run)
        remember(plan, out, hosts)
    changed = sum(step.is_changed for step in steps)
    words = f"{changed} services have other images now; ./generate.py rollback goes back"
    talk.print(words if changed else "no image changed")
    talk.print(next_words(plan, out, hosts), soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Before:
    """What the inventory and the rendering on disk were when it began."""

    path: Path
    out: Path
    inventory: str
    # Files of each host.
    trees: Mapping[str, dict[str, bytes]]

    @classmethod
    def of(cls, inventory: Path, out: Path) -> Before:
        """As they are now; raises CorralError when files were edited by hand, which would get lost."""
        refuse_unfinished(out)
        _refuse_edited({}, out)
        plan = build_plan(load_inventory(inventory))
        trees = {host.name: history.files_on_disk(out, host.name) for host in compose_hosts(plan, out)}
        return cls(inventory, out, inventory.read_text(encoding="utf-8"), trees)

    def remember(self, hosts: Iterable[ComposeHost]) -> None:
        """Keeps the rendering when nothing is kept yet, so that there is a way back."""
        for host in hosts:
            files = self.trees.get(host.name)
            if files and not history.entries(self.out, host.name):
                history.record(self.out, host.name, files, self.inventory)

    def restore(self) -> None:
        """Puts both back."""
        tree = {f"{host}/{path}": data for host, files in self.trees.items() for path, data in files.items()}
        write(tree, self.out, set(self.trees), force=True)
        if self.path.read_text(encoding="utf-8") != self.inventory:
            write_atomically(self.path, self.inventory.encode(), self.path.stat().st_mode & 0o777)


def _refuse_edited(tree: Tree, out: Path, hosts: set[str] | None = None) -> None:
    """Raises CorralError when files were edited by hand, which would get lost."""
    edited = [change.path for change in compare(tree, out, hosts) if change.action == "edited"]
    if edited:
        raise CorralError(
            f"edited by hand: {', '.join(edited)}; ./generate.py diff shows how, render --force undoes it"
        )


def _plan_with(inventory: Path, text: str, to: Sequence[str]) -> Plan:
    """The plan of the inventory with other images; raises SiteError before anything is written."""
    changed = with_images(text, parse_choices(to)) if to else text
    return build_plan(load_text(changed, inventory))


def parse_choices(to: Sequence[str]) -> dict[str, str]:
    """Image by key, from `KEY=IMAGE`; raises UsageError for keys that no component has."""
    known = image_keys()
    found = {}
    for choice in to:
        key, equals, image = choice.partition("=")
        if not equals or not image:
            raise UsageError(
                f"--to {choice}: write KEY=IMAGE, such as llama-cpu=ghcr.io/ggml-org/llama.cpp:server-b11347"
            )
        if key not in known:
            raise UsageError(f'no image has the key "{key}"; {did_you_mean(key, known)}')
        found[key] = image
    return found


def with_images(text: str, choices: Mapping[str, str]) -> str:
    """An inventory's text with these entries in `images`; everything else, comments too, stays as it is."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(text)
    data.setdefault("images", {})
    data["images"].update(choices)
    buffer = StringIO()
    yaml.dump(data, buffer)
    return buffer.getvalue()


def _write(inventory: Path, out: Path, plan: Plan, before: Before, to: Sequence[str]) -> None:
    if to:
        text = with_images(before.inventory, parse_choices(to))
        write_atomically(inventory, text.encode(), inventory.stat().st_mode & 0o777)
    write(render(plan), out)


def images(run: Run) -> list[Step]:
    """What each service runs with, and what it will run with; by id where the name stayed the same."""
    steps = []
    for name, seen in run.seen.items():
        for service, item in seen.found.items():
            new, container = item.service.image, item.container
            old, old_id = (container.image, container.image_id) if container else ("", "")
            new_id = seen.images.get(new, "")
            is_moved = bool(old_id and new_id and old_id != new_id)
            if old == new and is_moved:
                old, new = f"{old} ({_short(old_id)})", f"{new} ({_short(new_id)})"
            steps.append(Step(name, service, old, new, old != new or is_moved))
    return steps


def _short(image: str) -> str:
    return image.removeprefix("sha256:")[:SHORT_ID]


def show_images(steps: Sequence[Step], console: Console) -> None:
    """Prints every image once, from and to, with the services that use it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("services", "from", "to"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, str, bool], list[str]] = {}
    for step in steps:
        rows.setdefault((step.old, step.new, step.is_changed), []).append(f"{step.host}/{step.service}")
    for (old, new, is_changed), services in rows.items():
        table.add_row(
            ", ".join(services),
            old or "(does not run)",
            Text(new if is_changed else "the same", "yellow" if is_changed else "dim"),
        )
    console.print(table)


def _try_canaries(run: Run, before: Before, steps: Sequence[Step]) -> None:
    """One replica of each pool whose image changes; when one does not become well, everything is put back."""
    for seen in run.seen.values():
        wiring.join(seen)
    changed = {(step.host, step.service) for step in steps if step.is_changed}
    for host, name in _canaries(run, changed):
        run.board.say(f"{host.name}: canary {name}")
        run.touched += 1
        try:
            run.gaps += roll(host, [name], run.board, timeout_s=run.timeout_s, keep_out_on_failure=True)
        except BaseException as error:
            before.restore()
            run.board.say(f"{host.name}: {name} does not become well; putting the old one back", "yellow")
            _put_back(run, host, name)
            if not isinstance(error, CorralError):
                raise
            raise CorralError(f"the canary failed; all is as it was before\n{error}") from None
    look(run)


def _canaries(run: Run, changed: Iterable[tuple[str, str]]) -> list[tuple[ComposeHost, str]]:
    """The first running replica of each pool among the services that change."""
    hosts = {host.name: host for host in run.hosts}
    first: dict[str, tuple[str, str]] = {}
    wanted = set(changed)
    for name, seen in run.seen.items():
        for service, item in seen.found.items():
            for backend in backends_of(run.plan, name, service):
                if (name, service) in wanted and item.runs:
                    first.setdefault(backend.pool, (name, service))
    return [(hosts[name], service) for name, service in dict.fromkeys(first.values())]


def _put_back(run: Run, host: ComposeHost, name: str) -> None:
    """Makes the canary again as it was, and lets it take requests once it is well."""
    for each in run.hosts:
        each.copy()
    roll(host, [name], run.board, timeout_s=run.timeout_s)
    balancer = balancer_of(run.plan, run.out)
    if balancer is not None and balancer.is_running():
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
    names = [host.name for host in compose_hosts(plan, out, hosts)]
    with Interrupts(), alone(out / LOCK, "corral rollback"), Board(talk) as board:
        old = {host: files for host in names if (files := _earlier(out, host, board)) is not None}
        if not old:
            raise CorralError("there is no earlier rendering to go back to; every successful up keeps one")
        changed = 0
        for text in dict.fromkeys(files[history.INVENTORY] for files in old.values()):
            alike = {host: files for host, files in old.items() if files[history.INVENTORY] == text}
            changed += _go_back(text.decode(), plan.source_file, out, alike, board, timeout_s)
    talk.print(f"went back on {', '.join(old)} in {time.monotonic() - began:.0f} s; {changed} services were changed")
    talk.print(
        f"the inventory still says otherwise; what it said then is in {_inventory_beside(out, old)}: "
        f"change {plan.source_file} before the next render",
        soft_wrap=True,
    )


def _go_back(
    inventory: str,
    source: str,
    out: Path,
    old: Mapping[str, dict[str, bytes]],
    board: Board,
    timeout_s: float | None,
) -> int:
    """Brings renderings of one inventory up; returns how many services were changed."""
    trees = {
        host: {path: data for path, data in files.items() if path != history.INVENTORY} for host, files in old.items()
    }
    tree = {f"{host}/{path}": data for host, files in trees.items() for path, data in files.items()}
    plan = build_plan(replace(load_text(inventory, Path(source)), image_lock=lock_in_rendering(tree)))
    refuse_weak(plan, tree, is_of_plan=False)
    _refuse_edited(tree, out, set(old))
    write(tree, out, set(old))
    run = Run(plan, out, compose_hosts(plan, out, old), board, timeout_s)
    carry_out(run)
    for host, files in trees.items():
        history.record(out, host, files, inventory)
    return run.touched


def _earlier(out: Path, host: str, board: Board) -> dict[str, bytes] | None:
    """The rendering that ran before the one on disk; None when there is none."""
    entry = history.before(out, host, history.files_on_disk(out, host))
    if entry is None:
        board.say(f"{host}: no earlier rendering is kept")
        return None
    board.say(f"{host}: back to {entry.hash} (number {entry.number})")
    return history.load(entry)


def _inventory_beside(out: Path, old: Mapping[str, dict[str, bytes]]) -> Path:
    """The inventory of an earlier time, laid out to be compared."""
    path = out / history.FOLDER / "inventory.yaml"
    write_atomically(path, next(iter(old.values()))[history.INVENTORY], 0o644)
    return path
