"""`setup`: a fresh machine becomes a host of the farm, step by step.

First every step looks at the host and reports its state; then `setup` does what is missing. It never repeats a step
that is done and never removes anything. For what only a person can do, it prints the commands and stops; when it is run
again, it continues there.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from corral.checks.policy import refuse_weak
from corral.errors import CorralError
from corral.render.output import compare, write
from corral.render.secrets import ENV_FILE, initialise, read_env
from corral.render.secrets import FOLDER as SECRETS_FOLDER
from corral.render.templates import Tree
from corral.runtime.hosts import CommandError, ComposeHost
from corral.verbs.doctor.machine import COMPOSE_FLOOR, ENGINE_FLOOR
from corral.verbs.setup import machine
from corral.verbs.setup.machine import Look
from corral.verbs.setup.units import UNITS_FOLDER, install_units, look_at_units, unit_files
from corral.verbs.up.up import PULL_LIMIT_S, up

MARKS = {"done": ("✓", "green"), "todo": ("→", "cyan"), "yours": ("✗", "red")}
# Prints those of the files `$2…` that are in folder `$1` and not empty.
LIST_FILES = 'cd "$1" 2>/dev/null || exit 0; shift; for file; do [ -s "$file" ] && echo "$file"; done; exit 0'


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a host needs."""

    title: str
    look: Callable[[], Look]
    act: Callable[[], object] | None = None
    # Whether later steps cannot look while this is missing.
    is_foundation: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be set up, and how."""

    tree: Tree
    talk: Console
    dry_run: bool = False
    units: bool = False
    units_folder: str = UNITS_FOLDER

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
        """Whether the host is ready to start."""
        where = f"over ssh {host.ssh}" if host.ssh else "this machine"
        self.talk.print(Text.assemble((host.name, "bold cyan"), f"  {where}, folder {host.folder}"))
        todo: list[Step] = []
        for step in self.steps(host):
            look = step.look()
            self._report(step.title, look)
            if look.state != "done":
                todo.append(step)
            if look.state == "yours" and step.is_foundation:
                self.talk.print("    the steps after this one cannot look yet", style="dim")
                return False
        return self.dry_run or self._act(host, todo)

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

    def _report(self, title: str, look: Look) -> None:
        mark, style = MARKS[look.state]
        self.talk.print(Text.assemble("  ", (mark, style), f" {title}: {look.words}"))
        for line in look.remedy.splitlines():
            self.talk.print(Text(f"      {line}"))

    def steps(self, host: ComposeHost) -> Iterator[Step]:
        """Everything that a host needs, in the order in which it is needed."""
        foundations: dict[str, Callable[[ComposeHost], Look]] = {
            "machine": machine.look_at_machine,
            "Docker engine": lambda host: machine.look_at_docker(host, ENGINE_FLOOR, *machine.ENGINE_VERSION),
            "Docker Compose": lambda host: machine.look_at_docker(host, COMPOSE_FLOOR, *machine.COMPOSE_VERSION),
        }
        if machine.nvidia_cards(host):
            foundations |= {
                "graphics cards": machine.look_at_cards,
                "NVIDIA container toolkit": machine.look_at_toolkit,
            }
        for title, look in foundations.items():
            yield Step(title, lambda look=look: look(host), is_foundation=True)  # type: ignore[misc]
        tree, folder = self.tree, self.units_folder
        name, out, secrets = host.name, host.out, host.plan.secrets
        yield Step("rendering", lambda: _look_at_rendering(host, tree), lambda: write(tree, out, {name}))
        yield Step("secrets", lambda: _look_at_secrets(host), lambda: initialise(secrets, out, {name}))
        if host.ssh:
            yield Step("copy", lambda: Look("todo", f"rendering and secrets to {host.ssh}:{host.folder}"), host.copy)
        if host.model_sources:
            yield Step("models folder", lambda: _look_at_folder(host), lambda: _make_folder(host))
        yield Step("images", lambda: _look_at_images(host), lambda: _pull(host, self.talk))
        if self.units:
            yield Step(
                "systemd units",
                lambda: look_at_units(host, unit_files(host, tree, folder), folder),
                lambda: install_units(host, unit_files(host, tree, folder)),
            )
        if host.model_sources:
            yield Step("model files", lambda: _look_at_models(host))
        start = "start all services in stages that wait for health (./generate.py up)"
        yield Step("start", lambda: Look("todo", start))


def _look_at_rendering(host: ComposeHost, tree: Tree) -> Look:
    changes = [change for change in compare(tree, host.out, {host.name}) if change.action != "identical"]
    edited = [change.path for change in changes if change.action == "edited"]
    if edited:
        remedy = f"move the change into the inventory, or: ./generate.py render --force --host {host.name}"
        return Look("yours", f"{len(edited)} files were edited by hand, such as {host.out}/{edited[0]}", remedy)
    if changes:
        return Look("todo", f"write {len(changes)} files to {host.rendered}")
    return Look("done", f"{host.rendered} agrees with the inventory")


def _look_at_secrets(host: ComposeHost) -> Look:
    secrets = host.plan.secrets_of(host.name)
    wanted = [secret for secret in secrets if secret.is_stored]
    known = read_env(host.rendered / ENV_FILE)
    missing = [secret for secret in wanted if not known.get(secret.name)]
    given = [secret.name for secret in missing if secret.generate == "given"]
    if given:
        remedy = f"write NAME=value lines into {host.rendered / ENV_FILE}"
        return Look("yours", f"only you know {', '.join(given)}", remedy)
    files = [secret for secret in secrets if not (host.rendered / SECRETS_FOLDER / secret.name).exists()]
    if missing or files:
        return Look("todo", f"make {len(missing)} values and {len(files)} files, readable by their owner only")
    return Look("done", f"{len(wanted)} are there")


def _look_at_folder(host: ComposeHost) -> Look:
    folder = host.models_folder
    is_there = host.run(["test", "-d", folder], check=False).code == 0
    return Look("done", folder) if is_there else Look("todo", f"make {folder}")


def _make_folder(host: ComposeHost) -> None:
    folder = host.models_folder
    done = host.run(["mkdir", "-p", "-m", "755", folder], check=False)
    if done.code != 0:
        remedy = f'sudo install -d -o "$USER" {shlex.quote(folder)}'
        raise CorralError(f"{host.name}: {folder} cannot be made ({done.words}); run there: {remedy}")


def _look_at_models(host: ComposeHost) -> Look:
    sources, folder = host.model_sources, host.models_folder
    found = set(host.run(["sh", "-c", LIST_FILES, "sh", folder, *sources]).out.splitlines())
    lines = [f"{file}  from {source}" for file, source in sources.items() if file not in found]
    if lines:
        words = f"{len(lines)} of {len(sources)} missing in {folder}"
        lines.append(f"fetch, check and put them there with: ./generate.py models pull --host {host.name}")
        return Look("yours", words, "\n".join(lines))
    return Look("done", f"{len(sources)} in {folder}")


def _images(host: ComposeHost) -> tuple[list[str], list[str]]:
    """The images of the host, and those that it lacks."""
    images = sorted({service.image for service in host.plan.services_of(host.name)})
    lacking = [image for image in images if host.run(["docker", "image", "inspect", image], check=False).code != 0]
    return images, lacking


def _look_at_images(host: ComposeHost) -> Look:
    images, missing = _images(host)
    if missing:
        return Look("todo", f"pull {len(missing)} of {len(images)}: {', '.join(missing)}")
    return Look("done", f"{len(images)} are there")


def _pull(host: ComposeHost, talk: Console) -> None:
    for image in _images(host)[1]:
        talk.print(Text(f"    {image}", style="dim"))
        try:
            host.run(["docker", "pull", "--quiet", image], limit_s=PULL_LIMIT_S)
        except CommandError as error:
            remedy = "is its name right, and does the machine reach the registry?"
            raise CorralError(f"{host.name}: no image {image}; {remedy} {error.done.words}") from None
