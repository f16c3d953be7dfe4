"""`setup`: a fresh machine becomes a host of the farm, step by step.

First every step looks what is there, and all of it is told; then what is missing is done. Nothing is done twice,
nothing is ever removed, and what only a person can do is said as the commands to type. Run again, it goes on where it
stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from corral.checks.policy import refuse_weak
from corral.errors import CorralError
from corral.render.output import compare, write
from corral.render.secrets import ENV_FILE, initialise, read_env
from corral.render.secrets import FOLDER as SECRETS_FOLDER
from corral.render.tree import ROOT, Tree, figure_units, metrics_hosts, unit_names
from corral.runtime.hosts import CommandError, ComposeHost
from corral.verbs.setup.machine import Look, Machine
from corral.verbs.up.up import up

PULL_LIMIT_S = 7200
UNITS_FOLDER = "/etc/systemd/system"
MARKS = {"done": ("✓", "green"), "todo": ("→", "cyan"), "yours": ("✗", "red")}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a host needs."""

    title: str
    look: Callable[[], Look]
    act: Callable[[], None] | None = None
    # Whether looking further makes no sense while this is missing.
    is_foundation: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be set up, and how."""

    tree: Tree
    talk: Console
    dry_run: bool = False
    units: bool = False
    units_folder: str = UNITS_FOLDER
    # What was learned of each host.
    machines: dict[str, Machine] = field(default_factory=dict)

    def run(self, hosts: Sequence[ComposeHost]) -> None:
        """Prepares the hosts and starts them; raises CorralError when something is left for a person to do."""
        refuse_weak(hosts[0].plan, self.tree)
        waiting = [host.name for host in hosts if not self._host(host)]
        if self.dry_run:
            return
        if waiting:
            raise CorralError(f"{', '.join(waiting)}: see ✗ above; when it is done, run the same command again")
        up(hosts[0].plan, hosts[0].out, self.talk, hosts=[host.name for host in hosts])

    def _host(self, host: ComposeHost) -> bool:
        where = f"over ssh {host.ssh}" if host.ssh else "this machine"
        self.talk.print(Text.assemble((host.name, "bold cyan"), f"  {where}, folder {host.folder}"))
        todo, is_blocked = self._look(host)
        return not is_blocked and (self.dry_run or self._act(host, todo))

    def _look(self, host: ComposeHost) -> tuple[list[Step], bool]:
        """Tells the state of every step; returns what is to be done, and whether a foundation is missing."""
        todo: list[Step] = []
        for step in self.steps(host):
            look = step.look()
            self._tell(step.title, look)
            if look.state != "done":
                todo.append(step)
            if look.state == "yours" and step.is_foundation:
                self.talk.print("    what comes after this cannot be seen yet", style="dim")
                return todo, True
        return todo, False

    def _act(self, host: ComposeHost, todo: list[Step]) -> bool:
        for step in todo:
            look = step.look()  # again: an earlier step may have settled it
            if look.state == "yours":
                self.talk.print(Text(f"  stopped before: {step.title}", style="red"))
                return False
            if look.state == "todo" and step.act:
                self.talk.print(Text(f"  {step.title} …"))
                step.act()
        self.talk.print(Text(f"  {host.name} is ready to start", style="green"))
        return True

    def _tell(self, title: str, look: Look) -> None:
        mark, style = MARKS[look.state]
        self.talk.print(Text.assemble("  ", (mark, style), f" {title}: {look.words}"))
        for line in look.remedy.splitlines():
            self.talk.print(Text(f"      {line}"))

    def steps(self, host: ComposeHost) -> Iterator[Step]:
        """Everything that a host needs, in the order in which it is needed."""
        machine = self.machines.setdefault(host.name, Machine(host))
        cards = [card for card in host.plan.site.cards[host.name] if card.vendor == "nvidia"]
        yield Step("machine", machine.look, is_foundation=True)
        yield Step("Docker engine", machine.look_at_engine, is_foundation=True)
        yield Step("Docker Compose", machine.look_at_compose, is_foundation=True)
        if cards:
            yield Step("graphics cards", lambda: machine.look_at_cards(cards), is_foundation=True)
            yield Step("NVIDIA container toolkit", lambda: machine.look_at_toolkit(cards), is_foundation=True)
        yield Step("rendering", lambda: self._look_at_rendering(host), lambda: self._render(host))
        yield Step("secrets", lambda: _look_at_secrets(host), lambda: _make_secrets(host))
        if host.ssh:
            yield Step("copy", lambda: Look("todo", f"rendering and secrets to {host.ssh}:{host.folder}"), host.copy)
        if host.model_sources:
            yield Step("models folder", lambda: _look_at_folder(host), lambda: _make_folder(host))
        yield Step("images", lambda: _look_at_images(host), lambda: self._pull(host))
        if self.units:
            yield Step("systemd units", lambda: self._look_at_units(host), lambda: self._install_units(host))
        if host.model_sources:
            yield Step("model files", lambda: _look_at_models(host))
        start = Look("todo", "bring every service up, in stages that wait for health (./generate.py up)")
        yield Step("start", lambda: start)

    # --- steps that need the tree or talk ---

    def _look_at_rendering(self, host: ComposeHost) -> Look:
        changes = [change for change in compare(self.tree, host.out, {host.name}) if change.action != "identical"]
        edited = [change.path for change in changes if change.action == "edited"]
        if edited:
            remedy = f"move the change into the inventory, or: ./generate.py render --force --host {host.name}"
            return Look("yours", f"{len(edited)} files were edited by hand, such as {host.out}/{edited[0]}", remedy)
        if changes:
            return Look("todo", f"write {len(changes)} files to {host.rendered}")
        return Look("done", f"{host.rendered} agrees with the inventory")

    def _render(self, host: ComposeHost) -> None:
        write(self.tree, host.out, {host.name})

    def _pull(self, host: ComposeHost) -> None:
        for image in _missing_images(host):
            self.talk.print(Text(f"    {image}", style="dim"))
            try:
                host.run(["docker", "pull", "--quiet", image], limit_s=PULL_LIMIT_S)
            except CommandError as error:
                remedy = "is its name right, and does the machine reach the registry?"
                raise CorralError(f"{host.name}: no image {image}; {remedy} {error.done.words}") from None

    # --- units ---

    def _units(self, host: ComposeHost) -> dict[str, bytes]:
        """The files of the host's units by path: as rendered, and a drop-in that says where the rendering lies."""
        folder = host.run(["sh", "-c", f"cd {shlex.quote(host.folder)} 2>/dev/null && pwd -P || true"]).out.strip()
        names, figures = unit_names(host.plan, host.name), figure_units(host.plan, host.name)
        drop_ins = {names[-1]: f"[Service]\nWorkingDirectory={folder.replace('%', '%%')}\n"}
        if figures:
            drop_ins[figures[0]] = _figures_drop_in(host)
        files = {f"{self.units_folder}/{name}": self.tree[f"{host.name}/systemd/{name}"] for name in (*names, *figures)}
        return files | {f"{self.units_folder}/{name}.d/folder.conf": text.encode() for name, text in drop_ins.items()}

    def _look_at_units(self, host: ComposeHost) -> Look:
        if host.run(["test", "-d", "/run/systemd/system"], check=False).code != 0:
            return Look("done", "this machine does not run systemd; the containers come back by their restart policy")
        names = " and ".join(_enabled_units(host))
        if self._stale_units(host) or any(not _is_enabled(host, name) for name in _enabled_units(host)):
            return Look("todo", f"install {names} in {self.units_folder} and enable them")
        return Look("done", f"{names} are installed and enabled")

    def _stale_units(self, host: ComposeHost) -> dict[str, bytes]:
        found = {path: host.run(["cat", path], check=False).out.encode() for path in self._units(host)}
        return {path: data for path, data in self._units(host).items() if found[path] != data}

    def _install_units(self, host: ComposeHost) -> None:
        sudo = [] if host.run(["id", "-u"]).out.strip() == "0" else ["sudo", "-n"]
        stale = self._stale_units(host)
        try:
            for path, data in stale.items():
                script = 'umask 022 && mkdir -p "${1%/*}" && cat >"$1.new" && mv "$1.new" "$1"'
                host.run([*sudo, "sh", "-c", script, "sh", path], given=data)
            host.run([*sudo, "systemctl", "daemon-reload"])
            for name in _enabled_units(host):
                host.run([*sudo, "systemctl", "enable", name])
            for name in _enabled_units(host):
                is_project = name == unit_names(host.plan, host.name)[-1]
                if f"{self.units_folder}/{name}" in stale and not is_project:
                    host.run([*sudo, "systemctl", "restart", name])  # power limits and figures: from now on
        except CommandError as error:
            words = "needs root for its units; let this user use sudo without a password, or run setup as root"
            raise CorralError(f"{host.name}: {words}. {error.done.words}" if sudo else str(error)) from None


def _enabled_units(host: ComposeHost) -> list[str]:
    """What systemd starts when the machine boots; the timer starts the service of the figures."""
    return [*unit_names(host.plan, host.name), *figure_units(host.plan, host.name)[1:]]


def _figures_drop_in(host: ComposeHost) -> str:
    """Who writes figures, and with which kit and inventory; only for this machine, the kit is nowhere else."""
    paths = ["--inventory", str(Path(host.plan.source_file).resolve()), "--out", str(host.out.resolve())]
    hosts = [word for name in metrics_hosts(host.plan, host.name) for word in ("--host", name)]
    command = [sys.executable, str(ROOT / "generate.py"), "figures", "--scheduled", *paths, *hosts]
    user = host.run(["id", "-un"]).out.strip()
    return f"[Service]\nUser={user}\nExecStart=\nExecStart={' '.join(map(_systemd_word, command))}\n"


def _systemd_word(word: str) -> str:
    """A word of a unit's command line, taken letter by letter."""
    for old, new in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(old, new)
    return f'"{word}"'


def _is_enabled(host: ComposeHost, unit: str) -> bool:
    return host.run(["systemctl", "is-enabled", "--quiet", unit], check=False).code == 0


# --- secrets, models, images -----------------------------------------------------------------------------------------


def _look_at_secrets(host: ComposeHost) -> Look:
    secrets = host.plan.secrets_of(host.name)
    wanted = [secret for secret in secrets if secret.is_stored]
    known = read_env(host.rendered / ENV_FILE)
    given = [secret.name for secret in wanted if secret.generate == "given" and not known.get(secret.name)]
    if given:
        remedy = f"write NAME=value lines into {host.rendered / ENV_FILE}"
        return Look("yours", f"only you know {', '.join(given)}", remedy)
    missing = [secret.name for secret in wanted if not known.get(secret.name)]
    folder = host.rendered / SECRETS_FOLDER
    files = [secret.name for secret in secrets if not (folder / secret.name).exists()]
    if missing or files:
        return Look("todo", f"make {len(missing)} values and {len(files)} files, readable by their owner only")
    return Look("done", f"{len(wanted)} are there")


def _make_secrets(host: ComposeHost) -> None:
    plan = host.plan
    needed = {name: plan.secrets_of(name) for name in plan.inventory.hosts if plan.secrets_of(name)}
    initialise(needed, host.out, {host.name})


def _look_at_folder(host: ComposeHost) -> Look:
    folder = host.models_folder
    is_there = host.run(["test", "-d", folder], check=False).code == 0
    return Look("done" if is_there else "todo", folder if is_there else f"make {folder}")


def _make_folder(host: ComposeHost) -> None:
    folder = host.models_folder
    done = host.run(["mkdir", "-p", "-m", "755", folder], check=False)
    if done.code != 0:
        remedy = f'sudo install -d -o "$USER" {shlex.quote(folder)}'
        raise CorralError(f"{host.name}: {folder} cannot be made ({done.words}); run there: {remedy}")


def _look_at_models(host: ComposeHost) -> Look:
    sources = host.model_sources
    folder = host.models_folder
    script = 'cd "$1" 2>/dev/null || exit 0; shift; for file; do [ -s "$file" ] && echo "$file"; done; exit 0'
    found = set(host.run(["sh", "-c", script, "sh", folder, *sources]).out.splitlines())
    missing = {file: source for file, source in sources.items() if file not in found}
    if missing:
        lines = [f"{file}  from {source}" for file, source in missing.items()]
        remedy = "\n".join(
            [*lines, f"fetch, check and put them there with: ./generate.py models pull --host {host.name}"]
        )
        return Look("yours", f"{len(missing)} of {len(sources)} missing in {folder}", remedy)
    return Look("done", f"{len(sources)} in {folder}")


def _missing_images(host: ComposeHost) -> list[str]:
    images = sorted({service.image for service in host.plan.services_of(host.name)})
    return [image for image in images if host.run(["docker", "image", "inspect", image], check=False).code != 0]


def _look_at_images(host: ComposeHost) -> Look:
    missing = _missing_images(host)
    count = len({service.image for service in host.plan.services_of(host.name)})
    if missing:
        return Look("todo", f"pull {len(missing)} of {count}: {', '.join(missing)}")
    return Look("done", f"{count} are there")
