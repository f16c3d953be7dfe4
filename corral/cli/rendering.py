"""What needs no running farm: check, plan, diff, render, schema, secrets init, images lock."""

from __future__ import annotations

import difflib
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from corral.build import Plan, build_plan
from corral.checks.policy import check_tree, refuse_weak, weak_words
from corral.cli.context import INVENTORY, OUT, JsonOption, SiteOptions, plain, shared, show_or_print, talk, verbs
from corral.cli.plan_data import plan_as_data
from corral.cli.show import page, show_plan
from corral.cli.what_if import show_changed
from corral.config.image_lock import ImageLock
from corral.config.schema import schema_text
from corral.errors import CorralError, DriftError
from corral.render.output import Change, compare, write
from corral.render.secrets import initialise
from corral.render.tree import refuse_other_site
from corral.render.tree import render as render_plan

app = typer.Typer()
secrets = verbs("Keys and passwords of the hosts.")
images = verbs("Digests of the images.")
SHOWN_ACTIONS = {"create": "green", "update": "yellow", "remove": "red", "edited": "bold red", "identical": "dim"}


@app.command()
@shared("inventory")
def check(site: SiteOptions) -> None:
    """Check the inventory, every rule of the plan, and the security of what would be rendered; writes nothing."""
    from corral.verbs.images import warnings

    plan = site.plan()
    findings = [(host, finding) for host, found in check_tree(plan, render_plan(plan)).items() for finding in found]
    for host, finding in findings:
        talk.print(Text(f"{host}: {finding}", style="yellow" if finding.level == "warning" else ""))
    errors = sum(finding.level == "error" for _, finding in findings)
    if errors:
        raise CorralError(weak_words(errors))
    for words in warnings(plan):
        talk.print(Text(words, style="yellow"))
    count = len(plan.contributions.services)
    talk.print(
        f"{site.inventory}: fine ({len(plan.inventory.hosts)} hosts, {len(plan.inventory.pools)} pools, "
        f"{count} services)"
    )


@app.command()
@shared("inventory", "host")
def plan(
    site: SiteOptions,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if", metavar="[POOL.]KEY=VALUE", help="Simulate waits and refusals with this changed; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the resolved farm: hosts, GPUs, services, ports, memory, slots, limits."""
    found = site.plan()
    hosts = site.hosts(found)
    if what_if:
        show_changed(found, what_if, hosts, as_json=as_json)
        return
    show_or_print(lambda: plan_as_data(found, hosts), lambda: show_plan(found, page(), hosts), as_json=as_json)


@app.command()
@shared("inventory", "out", "host")
def diff(site: SiteOptions) -> None:
    """Show what `render` would change; exit code 3 if anything."""
    found = site.plan()
    refuse_other_site(found, site.out)
    changes = [
        change for change in compare(render_plan(found), site.out, site.hosts(found)) if change.action != "identical"
    ]
    console = plain()
    for change in changes:
        _print_difference(console, change)
    if changes:
        raise DriftError(f"{len(changes)} files differ from the inventory; ./generate.py render writes them")
    talk.print(f"{site.out} agrees with {site.inventory}")


@app.command()
@shared("inventory", "out", "host")
def render(
    site: SiteOptions,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite files that were edited by hand, and ignore security errors.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only problems.")] = False,
) -> None:
    """Write the Compose projects and every configuration file."""
    found = site.plan()
    hosts = site.hosts(found)
    write_rendering(found, site.out, hosts, force=force, quiet=quiet)
    if not quiet:
        talk.print(Text(_next_command(found, site.out, hosts)))


def write_rendering(found: Plan, out: Path, hosts: set[str] | None, *, force: bool = False, quiet: bool = True) -> None:
    """Writes the rendering of a plan; raises CorralError when files that were edited by hand stay."""
    refuse_other_site(found, out)
    tree = render_plan(found)
    if not force:
        refuse_weak(found, tree)
    changes = write(tree, out, hosts, force=force)
    for change in changes if not quiet else ():
        action = "update" if force and change.action == "edited" else change.action
        talk.print(Text.assemble((f"{action:>9}", SHOWN_ACTIONS[change.action]), f"  {out}/{change.path}"))
    edited = [change for change in changes if change.action == "edited" and not force]
    if edited:
        raise CorralError(
            f"{len(edited)} files were edited by hand and left as they are; move the change into the inventory, "
            "or write over them with --force"
        )


def _next_command(found: Plan, out: Path, hosts: set[str] | None) -> str:
    """The next command to type."""
    names = [name for name in found.inventory.hosts if (hosts is None or name in hosts) and found.services_of(name)]
    if any(not (out / name / "secrets" / secret.name).exists() for name in names for secret in found.secrets_of(name)):
        return f"next: ./generate.py secrets init{_options(found, out)}"
    if found.site.is_swarm or found.site.is_local(names[0]):
        return f"next: ./generate.py up{_options(found, out)}"
    folder = shlex.quote(f"{out}/{names[0]}")
    return f"next: docker compose -f {folder}/compose.yaml up -d --wait"


def _options(found: Plan, out: Path) -> str:
    source = found.source_file
    inventory = "" if source == str(INVENTORY) else f" --inventory {shlex.quote(source)}"
    return inventory + ("" if out == OUT else f" --out {shlex.quote(str(out))}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the inventory."""
    sys.stdout.write(schema_text())


@secrets.command("init")
@shared("inventory", "out", "host")
def secrets_init(site: SiteOptions) -> None:
    """Add what is missing to the hosts' secrets (mode 0600); never changes what is there."""
    found = site.plan()
    hosts = site.hosts(found)
    missing = []
    for report in initialise(found.secrets, site.out, hosts):
        file = f"{site.out}/{report.host}/.env"
        made = ", ".join(report.made) or "nothing new"
        talk.print(f"{file}: {made}" + (f"; kept {len(report.kept)}" if report.kept else ""))
        missing += [f"{name} in {file}" for name in report.missing]
    if missing:
        raise CorralError("these values only you know; write them, then run this again: " + ", ".join(missing))


@images.command("lock")
@shared("inventory", "out")
def images_lock(
    site: SiteOptions,
    update: Annotated[bool, typer.Option("--update", help="Accept other digests for locked images.")] = False,
) -> None:
    """Ask the registries for the digests of all images, and write images.lock.json, which the plan then uses."""
    from corral.verbs.images import lock_images

    lock_images(build_plan(replace(site.loaded(), image_lock=ImageLock())), site.out, talk, update=update)


def _print_difference(console: Console, change: Change) -> None:
    if change.action == "edited":
        console.print(Text(f"edited by hand: {change.path}", style="bold red"))
    old = (change.old or b"").decode(errors="replace").splitlines(keepends=True)
    new = (change.new or b"").decode(errors="replace").splitlines(keepends=True)
    names = (
        f"a/{change.path}" if change.old is not None else "/dev/null",
        f"b/{change.path}" if change.new is not None else "/dev/null",
    )
    for line in difflib.unified_diff(old, new, *names):
        style = "green" if line.startswith("+") else "red" if line.startswith("-") else ""
        console.print(Text(line.rstrip("\n"), style=style))
