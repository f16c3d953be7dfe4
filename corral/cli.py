"""The command line: `./generate.py VERB`. Data on stdout, talk on stderr; exit 0 fine, 1 wrong, 2 usage, 3 drift."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from corral import __version__
from corral.errors import CorralError, DriftError, SiteError, UsageError, did_you_mean
from corral.image_lock import ImageLock
from corral.load import load_inventory
from corral.output import Change, compare, finish_interrupted, write
from corral.plan import Plan, build_plan, load_site
from corral.policy import check_tree, refuse_weak, weak_words
from corral.render import refuse_other_site
from corral.render import render as render_plan
from corral.schema import schema_text
from corral.secrets import initialise
from corral.show import page, plan_as_data, show_plan, show_what_if

if TYPE_CHECKING:
    from corral.ops.models import Shelf

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="corral: one inventory, a whole local GPU inference farm.",
)  # fmt: skip
secrets_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys and passwords of the hosts.")
app.add_typer(secrets_app, name="secrets")
keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys of consumers on the gateway.")
app.add_typer(keys_app, name="keys")
models_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Model files: fetch, check, describe.")
app.add_typer(models_app, name="models")
images_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Which content the images have.")
app.add_typer(images_app, name="images")
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Load, measured capacity, limits from it.")
app.add_typer(bench_app, name="bench")
grafana_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pages in a Grafana that runs.")
app.add_typer(grafana_app, name="grafana")

talk = Console(stderr=True, highlight=False, soft_wrap=True)

InventoryOption = Annotated[Path, typer.Option("--inventory", "-i", help="The inventory file.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for rendered files.")]
HostOption = Annotated[list[str] | None, typer.Option("--host", help="Only this host; may be given several times.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
NamesArgument = Annotated[list[str] | None, typer.Argument(help="Models; all if none.")]
PassphraseOption = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line is the passphrase; else CORRAL_PASSPHRASE.")
]
INVENTORY = Path("inventory.yaml")
OUT = Path("compose")
SHOWN_ACTIONS = {"create": "green", "update": "yellow", "remove": "red", "edited": "bold red", "identical": "dim"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; errors are printed here and nowhere else."""
    try:
        code = app(arguments, standalone_mode=False)
    except SiteError as error:
        for problem in error.problems:
            talk.print(Text(str(problem)))
        count = len(error.problems)
        talk.print(f"{count} problem{'' if count == 1 else 's'}; nothing was written", style="red")
        return error.exit_code
    except CorralError as error:
        talk.print(Text(f"corral: {error}"))
        return error.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        talk.print(Text(f"corral: {error.format_message()} (see ./generate.py --help)"))
        return 2
    return int(code or 0)


def _load(inventory: Path) -> Plan:
    """The plan of an inventory file; warnings are printed."""
    if not inventory.exists():
        raise UsageError(f"{inventory}: no such file; name the inventory with --inventory PATH")
    plan = build_plan(load_inventory(inventory))
    for warning in plan.warnings:
        talk.print(Text(str(warning), style="yellow"))
    return plan


def _chosen(plan: Plan, hosts: list[str] | None) -> set[str] | None:
    for name in hosts or []:
        if name not in plan.inventory.hosts:
            raise UsageError(f'no host named "{name}"; {did_you_mean(name, plan.inventory.hosts)}')
    return set(hosts) if hosts else None


@app.command()
def check(inventory: InventoryOption = INVENTORY) -> None:
    """Check the inventory, every rule of the plan, and the security of what would be rendered; writes nothing."""
    from corral.ops.images import warnings

    plan = _load(inventory)
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
        f"{inventory}: fine ({len(plan.inventory.hosts)} hosts, {len(plan.inventory.pools)} pools, {count} services)"
    )


@app.command()
def plan(
    inventory: InventoryOption = INVENTORY,
    host: HostOption = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if", metavar="[POOL.]KEY=VALUE", help="Simulate waits and refusals with this changed; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the resolved farm: hosts, GPUs, services, ports, memory, slots, limits."""
    found = _load(inventory)
    hosts = _chosen(found, host)
    if what_if:
        _what_if(found, what_if, hosts, as_json)
        return
    if as_json:
        _print_json(plan_as_data(found, hosts))
        return
    show_plan(found, page(), hosts)


def _what_if(found: Plan, words: list[str], hosts: set[str] | None, as_json: bool) -> None:
    from corral import whatif
    from corral.ops.bench.answers import measured_answers

    if hosts:
        raise UsageError("--what-if is for whole pools; leave --host out")
    results = whatif.run(whatif.cases(found, whatif.parse_changes(words, found), measured_answers(found)))
    if as_json:
        _print_json(whatif.as_data(results))
    else:
        show_what_if(results, page())


@app.command()
def diff(inventory: InventoryOption = INVENTORY, out: OutOption = OUT, host: HostOption = None) -> None:
    """Show what `render` would change; exit code 3 if anything."""
    found = _load(inventory)
    finish_interrupted(out)
    refuse_other_site(found, out)
    changes = [
        change for change in compare(render_plan(found), out, _chosen(found, host)) if change.action != "identical"
    ]
    console = Console(highlight=False, soft_wrap=True)
    for change in changes:
        _print_difference(console, change)
    if changes:
        raise DriftError(f"{len(changes)} files differ from the inventory; ./generate.py render writes them")
    talk.print(f"{out} agrees with {inventory}")


@app.command()
def render(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite files that were edited by hand, and write what weakens a host.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only problems.")] = False,
) -> None:
    """Write the Compose projects and every configuration file."""
    found = _load(inventory)
    hosts = _chosen(found, host)
    refuse_other_site(found, out)
    tree = render_plan(found)
    if not force:
        refuse_weak(found, tree)
    changes = write(tree, out, hosts, force=force)
    edited = [change for change in changes if change.action == "edited" and not force]
    if not quiet:
        for change in changes:
            talk.print(
                Text.assemble(
                    (
                        f"{'update' if force and change.action == 'edited' else change.action:>9}",
                        SHOWN_ACTIONS[change.action],
                    ),
                    f"  {out}/{change.path}",
                )
            )
    if edited:
        raise CorralError(
            f"{len(edited)} files were edited by hand and left as they are; move the change into the inventory, "
            "or write over them with --force"
        )
    if not quiet:
        talk.print(Text(_next_command(found, out, hosts)))


def _next_command(found: Plan, out: Path, hosts: set[str] | None) -> str:
    """What a person types next."""
    names = [name for name in found.inventory.hosts if (hosts is None or name in hosts) and found.services_of(name)]
    if any(not (out / name / "secrets" / secret.name).exists() for name in names for secret in found.secrets_of(name)):
        return f"next: ./generate.py secrets init{_options(found, out)}"
    folder = shlex.quote(f"{out}/{names[0]}")
    if found.site.is_local(names[0]):
        supervisord = shlex.quote(os.path.relpath(Path(sys.prefix) / "bin" / "supervisord"))
        return f"next: mkdir -p {folder}/logs && {supervisord} -c {folder}/supervisord.conf"
    return f"next: docker compose -f {folder}/compose.yaml up -d --wait"


def _options(found: Plan, out: Path) -> str:
    source = found.source_file
    inventory = "" if source == str(INVENTORY) else f" --inventory {shlex.quote(source)}"
    return inventory + ("" if out == OUT else f" --out {shlex.quote(str(out))}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the inventory."""
    sys.stdout.write(schema_text())


@app.command()
def demo(
    model: Annotated[str | None, typer.Option("--model", help="A GGUF file, or hf:owner/repo/file.gguf.")] = None,
    down: Annotated[bool, typer.Option("--down", help="Stop the demo and leave nothing behind.")] = False,
) -> None:
    """Run the whole request path on this machine, without Docker, GPU or downloads."""
    from corral.ops.demo import down as stop_demo
    from corral.ops.demo import up as start_demo

    if down and model:
        raise UsageError("--down takes no model")
    if down:
        stop_demo(talk)
    else:
        start_demo(model, talk, Console(highlight=False, soft_wrap=True))


@app.command()
def up(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=1, help="Seconds that a service may take; its own limit if absent.")
    ] = None,
    render_first: Annotated[bool, typer.Option("--render", help="Write the rendering first.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="No cards here: run what wants one on the processor.")] = False,
) -> None:
    """Start what is missing, change what is not as rendered, wait until all is well; replicas are drained first."""
    from corral.ops.up import up as bring_up

    found = _load(inventory)
    hosts = _chosen(found, host)
    if render_first:
        render(inventory, out, host, quiet=True)
    bring_up(found, out, talk, hosts=hosts, timeout_s=timeout, is_on_cpu=cpu)
    _tell_figures(inventory, out, hosts)


@app.command()
def down(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    volumes: Annotated[bool, typer.Option("--volumes", help="Lose the data too: keys, spend, figures.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Yes, lose the data.")] = False,
) -> None:
    """Stop and remove containers and networks; data stays unless --volumes and --yes say otherwise."""
    from corral.ops.up import down as take_down

    found = _load(inventory)
    take_down(found, out, talk, hosts=_chosen(found, host), volumes=volumes, yes=yes)


@app.command()
def upgrade(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    to: Annotated[list[str] | None, typer.Option("--to", metavar="KEY=IMAGE", help="Another image for a key.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds that a service may take.")] = None,
) -> None:
    """Show every image from and to, try one replica of each pool first, then change the rest one at a time."""
    from corral.ops.upgrade import upgrade as change_images

    _load(inventory)
    change_images(inventory, out, talk, Console(highlight=False, soft_wrap=True), to=to or [], timeout_s=timeout)
    _tell_figures(inventory, out, None)


@app.command()
def rollback(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds that a service may take.")] = None,
) -> None:
    """Go back to the rendering that ran before, one service at a time."""
    from corral.ops.upgrade import rollback as go_back

    found = _load(inventory)
    go_back(found, out, talk, hosts=_chosen(found, host), timeout_s=timeout)
    _tell_figures(inventory, out, _chosen(found, host))


@app.command()
def backup(  # noqa: PLR0913, PLR0917 - a parameter per option
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    to: Annotated[Path | None, typer.Option("--to", help="The file to make; SITE-DATE.backup here if absent.")] = None,
    without_secrets: Annotated[
        bool, typer.Option("--without-secrets", help="Leave keys and passwords out, and seal nothing.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Seal only the secrets: the rest stays readable without the passphrase.")
    ] = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Save inventory, rendering, secrets and data of services in one sealed file; prints its name."""
    from corral.ops.archives.backup import backup as save
    from corral.ops.archives.contents import Sealing
    from corral.ops.archives.passphrase import find_passphrase

    found = _load(inventory)
    hosts = _chosen(found, host)
    sealing = None if without_secrets else Sealing(find_passphrase(passphrase_file, is_new=True), plain)
    made = save(found, out, talk, hosts=hosts, to=to, sealing=sealing)
    sys.stdout.write(f"{made}\n")
    _tell_figures(inventory, out, hosts)


@app.command()
def restore(  # noqa: PLR0913, PLR0917 - a parameter per option
    file: Annotated[Path, typer.Argument(help="What backup made.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    passphrase_file: PassphraseOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="The place is not empty: replace what is there.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Yes, lose what is there, and use other places and images.")
    ] = False,
    only_list: Annotated[
        bool, typer.Option("--list", help="Check every byte, show what is in it, change nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring back what a backup holds on an empty machine; afterwards `up` starts it."""
    from corral.ops.archives import restore as ops
    from corral.ops.archives.contents import read_backup
    from corral.ops.archives.passphrase import find_passphrase

    if as_json and not only_list:
        raise UsageError("--json goes with --list")
    if not only_list:
        hosts = frozenset(host) if host else None
        ops.restore(file, talk, ops.Wanted(inventory, out, hosts, passphrase_file, replace, yes))
        return
    found = read_backup(file, partial(find_passphrase, passphrase_file, is_new=False))
    if as_json:
        _print_json(found.manifest.model_dump(mode="json"))
        return
    page().print(ops.listing(found))
    talk.print(Text(ops.summary(found)))


@app.command()
def bundle(  # noqa: PLR0913, PLR0917 - a parameter per option
    load: Annotated[str, typer.Argument(metavar="[load]", help="load PATH: the other side.")] = "",
    path: Annotated[Path | None, typer.Argument(help="The bundle to load.")] = None,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    to: Annotated[Path | None, typer.Option("--to", help="A folder, or FILE.tar, to make.")] = None,
    without_kit: Annotated[bool, typer.Option("--without-kit", help="Leave the kit and its wheels out.")] = False,
    sign: Annotated[Path | None, typer.Option("--sign", metavar="KEYFILE", help="Sign it with this ssh key.")] = None,
    signer: Annotated[
        Path | None, typer.Option("--signer", help="With load: file of allowed signers, as ssh-keygen reads it.")
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="With load: accept an unsigned bundle.")] = False,
) -> None:
    """Collect images, model files, rendering and the kit for hosts without internet; `bundle load PATH` over there."""
    from corral.ops.archives import bundle as making
    from corral.ops.archives import load as unbundle

    if (load, path is None, to is None) == ("load", False, True):
        if (signer is None) != unsigned:
            raise UsageError(
                "say who has to have made it: --signer FILE (allowed signers: NAME ssh-ed25519 AAAA…), or --unsigned, "
                "once the sha256 that bundle printed was compared with sha256sum SHA256SUMS"
            )
        hosts = frozenset(host) if host else None
        unbundle.load(path or Path(), talk, unbundle.Wanted(inventory, out, hosts, signer))
        return
    if load or to is None:
        raise UsageError("say where to: bundle --to FOLDER (or FILE.tar); or on the other side: bundle load PATH")
    found = _load(inventory)
    making.bundle(found, out, talk, hosts=_chosen(found, host), to=to, with_kit=not without_kit, key=sign)


@app.command()
def status(
    seconds: Annotated[float, typer.Argument(min=0.5, help="With --watch: seconds between two looks.")] = 2,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what runs, how well and how busy; exit code 1 when something of the plan is not well."""
    from corral.ops import status as ops
    from corral.ops.hosts import compose_hosts

    found = _load(inventory)
    hosts = compose_hosts(found, out, _chosen(found, host))
    if watch and as_json:
        raise UsageError("--json is one document per call; leave out --watch")
    if as_json:
        data = ops.farm_status(found, hosts)
        _print_json(ops.status_as_data(data))
        return 0 if data.is_well else 1
    console = page()
    is_well = ops.watch_status(found, hosts, console, seconds) if watch else ops.show_status(found, hosts, console)
    return 0 if is_well else 1


@app.command()
def figures(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    scheduled: Annotated[
        bool, typer.Option("--scheduled", help="A timer calls: say nothing, and warn when it does not come again.")
    ] = False,
) -> None:
    """Write what no exporter tells (drift, containers, weights, backups) where node-exporter reads it."""
    from corral.ops.figures import figures_hosts, write_figures

    found = _load(inventory)
    hosts = figures_hosts(found, out, _chosen(found, host))
    write_figures(found, hosts, is_scheduled=scheduled, talk=None if scheduled else talk)


def _tell_figures(inventory: Path, out: Path, hosts: Iterable[str] | None) -> None:
    """Writes the figures anew after a verb that changed them, where there are some; the verb's success stays."""
    from corral.ops.figures import FOLDER, figures_hosts, write_figures

    try:
        plan = build_plan(load_inventory(inventory))
        chosen = [item for item in figures_hosts(plan, out, hosts) if (item.rendered / FOLDER).is_dir()]
    except CorralError:
        return  # no such figures in this site
    try:
        write_figures(plan, chosen)
    except CorralError as error:
        talk.print(Text(f"figures were not written: {error}", style="yellow"))


@app.command()
def watch(
    seconds: Annotated[float, typer.Argument(min=0.5, help="Seconds between two looks.")] = 5,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Looks; 0 goes on until Ctrl-C.")] = 0,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Append every figure to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the farm does, from its Prometheus: pools, queues, tokens a second, cards and their temperature."""
    from corral.ops import watch as ops

    ask = ops.asking(_load(inventory), out)
    if as_json:
        _print_json(ops.as_data(ops.look(ask)))
        return
    ops.watch(ask, page(), seconds, looks=count, csv_file=csv_file)


@app.command()
def logs(  # noqa: PLR0913, PLR0917 - a parameter per option
    names: Annotated[list[str] | None, typer.Argument(help="Service, container, pool, host, GPU; all if none.")] = None,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    since: Annotated[str, typer.Option("--since", help="Not older than this: 10m, 2h, or a date.")] = "",
    tail: Annotated[str, typer.Option("--tail", "-n", help="Last lines of each service; 100, or all since.")] = "",
) -> None:
    """Show what services print, in the order of time, with the service's name in front."""
    from corral.ops.hosts import compose_hosts
    from corral.ops.logs import TAIL, Wanted, show_logs
    from corral.ops.names import services_named

    found = _load(inventory)
    chosen = _chosen(found, host)
    services = services_named(found, names or [], chosen)
    if tail and tail != "all" and not tail.isdecimal():
        raise UsageError(f'--tail {tail}: must be a number of lines, or "all"')
    hosts = compose_hosts(found, out, {item.host for item in services})
    wanted = Wanted(tail or ("all" if since else TAIL), since, follow)
    show_logs(hosts, services, wanted, Console(highlight=False, soft_wrap=True))


@app.command()
def restart(
    names: Annotated[list[str], typer.Argument(help="Service, container, pool, model, host or GPU.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
) -> None:
    """Restart services one after the other; each is healthy again before the next."""
    from corral.ops.hosts import compose_hosts
    from corral.ops.names import services_named
    from corral.ops.restart import restart as restart_services

    found = _load(inventory)
    services = services_named(found, names, _chosen(found, host))
    hosts = compose_hosts(found, out, {item.host for item in services})
    restart_services(hosts, services, talk)


@app.command()
def setup(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    units: Annotated[bool, typer.Option("--units", help="Install systemd units: start at boot, power limits.")] = False,
) -> None:
    """Prepare a fresh host step by step and start it: says first what it will do; may be run again at any time."""
    from corral.ops.hosts import compose_hosts
    from corral.ops.setup import Setup

    found = _load(inventory)
    chosen = _chosen(found, host)
    Setup(render_plan(found), talk, dry_run=dry_run, units=units).run(compose_hosts(found, out, chosen))
    if not dry_run:
        _tell_figures(inventory, out, chosen)


@app.command()
def doctor(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    ask: Annotated[bool, typer.Option("--ask", help="Also ask every pool a short question.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Find what fails between client and card, and what helps; exit code 1 on errors."""
    from corral.ops.doctor.report import as_data, diagnose, show
    from corral.ops.hosts import compose_hosts

    found = _load(inventory)
    diagnoses = diagnose(found, compose_hosts(found, out, _chosen(found, host)), must_ask=ask)
    if as_json:
        _print_json(as_data(diagnoses))
    else:
        show(diagnoses, Console(highlight=False, soft_wrap=True))
    return 0 if all(item.is_well for item in diagnoses) else 1


@secrets_app.command("init")
def secrets_init(inventory: InventoryOption = INVENTORY, out: OutOption = OUT, host: HostOption = None) -> None:
    """Add what is missing to the hosts' secrets (mode 0600); never changes what is there."""
    found = _load(inventory)
    hosts = _chosen(found, host)
    needed = {name: wanted for name in found.inventory.hosts if (wanted := found.secrets_of(name))}
    missing = []
    for report in initialise(needed, out, hosts):
        words = ", ".join(report.made) or "nothing new"
        talk.print(f"{out}/{report.host}/.env: {words}" + (f"; kept {len(report.kept)}" if report.kept else ""))
        missing += [f"{name} in {out}/{report.host}/.env" for name in report.missing]
    if missing:
        raise CorralError("these values only you know; write them, then run this again: " + ", ".join(missing))


@keys_app.command("sync")
def keys_sync(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show; exit code 3 if anything differs.")] = False,
    adopt: Annotated[list[str] | None, typer.Option("--adopt", help="Take over a key made by hand.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the gateway's keys agree with the inventory's consumers; new keys go into files, never on the screen."""
    from corral.ops import keys

    found = _load(inventory)
    steps = keys.sync(found, out, dry_run=dry_run, adopted=adopt or [])
    if as_json:
        _print_json(keys.steps_as_data(found, out, steps))
    else:
        keys.show_steps(found, out, steps, Console(highlight=False, soft_wrap=True), talk)
    keys.conclude(steps, dry_run=dry_run)


@keys_app.command("ls")
def keys_ls(inventory: InventoryOption = INVENTORY, out: OutOption = OUT, as_json: JsonOption = False) -> None:
    """Show every key of the gateway: whose, what it opens, its limits, what it has spent, until when."""
    from corral.ops import keys

    plan = _load(inventory)
    found = keys.listed(plan, out)
    if as_json:
        _print_json([item.data() for item in found])
    else:
        keys.show_keys(plan, found, Console(highlight=False))


@keys_app.command("spend")
def keys_spend(inventory: InventoryOption = INVENTORY, out: OutOption = OUT, as_json: JsonOption = False) -> None:
    """Show what every key has spent in its period, the highest first."""
    from corral.ops import keys

    found = keys.by_spend(keys.listed(_load(inventory), out))
    if as_json:
        _print_json([{key: item.data()[key] for key in ("name", "spend_usd", "budget")} for item in found])
    else:
        keys.show_spend(found, Console(highlight=False))


@keys_app.command("create")
def keys_create(  # noqa: PLR0913, PLR0917 - a parameter per option
    name: Annotated[str, typer.Argument(help="Its name, LiteLLM's key_alias.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    pool: Annotated[list[str] | None, typer.Option("--pool", help="Pool that it opens; all if none.")] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option("--tpm", help="Tokens per minute.")] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", help="Requests at the same time.")] = None,
    max_usd: Annotated[float | None, typer.Option("--max-usd", help="What it may spend.")] = None,
    period: Annotated[str | None, typer.Option("--period", help="Spending counts anew after it, such as 30d.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="Day or moment, such as 2027-01-31.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key by hand, for a while: what is to last belongs into the inventory. Prints the file that it is in."""
    from corral.ops import keys

    found = _load(inventory)
    limits = {"rpm": rpm, "tpm": tpm, "parallel": parallel}
    budget = {"max_usd": max_usd, "period": period}
    given = {"pools": pool, "limits": limits, "budget": budget, "expires": expires}
    path = keys.create(found, out, name, keys.checked_consumer(name, given))
    if as_json:
        _print_json({"name": name, "file": str(path)})
    else:
        sys.stdout.write(f"{path}\n")


@keys_app.command("revoke")
def keys_revoke(
    names: Annotated[list[str], typer.Argument(help="Names of keys.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
) -> None:
    """Revoke keys at once, and remove their files."""
    from corral.ops import keys

    again = keys.revoke(_load(inventory), out, names)
    talk.print(f"revoked: {', '.join(names)}")
    if again:
        talk.print(f"in the inventory still, so the next keys sync makes new ones: {', '.join(again)}", style="yellow")


@keys_app.command("rotate")
def keys_rotate(
    name: Annotated[str, typer.Argument(help="Name of a key.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    keep_hours: Annotated[
        float, typer.Option("--keep-hours", min=0, max=8760, help="Hours for which the old key stays valid.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Put a new key in the place of one, with its settings and spending. Prints the file that it is in."""
    from datetime import timedelta

    from corral.ops import keys

    path = keys.rotate(_load(inventory), out, name, keep=timedelta(hours=keep_hours))
    if as_json:
        _print_json({"name": name, "file": str(path)})
    else:
        sys.stdout.write(f"{path}\n")


@images_app.command("lock")
def images_lock(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    update: Annotated[bool, typer.Option("--update", help="Take other content for images that are locked.")] = False,
) -> None:
    """Ask the registries which content the images have, and write it into images.lock.json; the plan then names it."""
    from corral.ops.images import lock_images

    if not inventory.exists():
        raise UsageError(f"{inventory}: no such file; name the inventory with --inventory PATH")
    lock_images(build_plan(replace(load_inventory(inventory), image_lock=ImageLock())), out, talk, update=update)


def _shelf(inventory: Path, out: Path, hosts: list[str] | None) -> tuple[Shelf, set[str] | None]:
    """All model files of a site. A farm that does not fit yet has them, too."""
    from corral.ops.models import open_shelf

    if not inventory.exists():
        raise UsageError(f"{inventory}: no such file; name the inventory with --inventory PATH")
    site = load_site(load_inventory(inventory))
    for name in hosts or []:
        if name not in site.inventory.hosts:
            raise UsageError(f'no host named "{name}"; {did_you_mean(name, site.inventory.hosts)}')
    return open_shelf(site, inventory, out, talk), set(hosts) if hosts else None


@models_app.command("pull")
def models_pull(  # noqa: PLR0913, PLR0917 - a parameter per option
    names: NamesArgument = None,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    offline: Annotated[
        Path | None, typer.Option("--from", help="Take files from this folder, not the network.")
    ] = None,
    fallback: Annotated[str, typer.Option("--fallback", help="Quantization to take where there is no other.")] = "",
    update: Annotated[bool, typer.Option("--update", help="Take and pin what the sources have now.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=16, help="Files at the same time.")] = 3,
    store: Annotated[Path | None, typer.Option("--store", help="Folder here for files of hosts behind ssh.")] = None,
) -> None:
    """Fetch what is missing into the hosts' models folders, check it, and pin it in models.lock.json."""
    from corral.ops.models import Choice, pull

    if offline is not None and not offline.is_dir():
        raise UsageError(f"--from {offline}: there is no such folder")
    shelf, hosts = _shelf(inventory, out, host)
    chosen = frozenset(hosts) if hosts else None
    pull(shelf, Choice(tuple(names or ()), chosen, offline, fallback, update, jobs, store))
    _tell_figures(inventory, out, hosts)


@models_app.command("inspect")
def models_inspect(names: NamesArgument = None, inventory: InventoryOption = INVENTORY, out: OutOption = OUT) -> None:
    """Read what the model files say of themselves, without fetching them, so that `plan` knows what they need."""
    from corral.ops.models import inspect

    inspect(_shelf(inventory, out, None)[0], names or ())


@models_app.command("verify")
def models_verify(
    names: NamesArgument = None,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    as_json: JsonOption = False,
) -> int:
    """Read every model file from the first to the last byte; exit code 1 when one is not the pinned one."""
    from corral.ops.models import verify
    from corral.ops.models_show import as_data, show_verdict

    shelf, hosts = _shelf(inventory, out, host)
    found = verify(shelf, names or (), hosts)
    if as_json:
        _print_json(as_data(found))
    else:
        show_verdict(found, Console(highlight=False, soft_wrap=True))
    _tell_figures(inventory, out, hosts)
    return 0 if all(row.state == "verified" for row in found) else 1


@models_app.command("ls")
def models_ls(
    names: NamesArgument = None,
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every model file: size, quantization, context, checksum, who uses it."""
    from corral.ops.models import rows
    from corral.ops.models_show import as_data, show_rows

    shelf, hosts = _shelf(inventory, out, host)
    found = rows(shelf, names or (), hosts)
    if as_json:
        _print_json(as_data(found))
    else:
        show_rows(found, Console(highlight=False))


PoolsArgument = Annotated[list[str], typer.Argument(help="Pools.")]


@models_app.command("ps")
def models_ps(
    inventory: InventoryOption = INVENTORY, out: OutOption = OUT, host: HostOption = None, as_json: JsonOption = False
) -> None:
    """Show which pools' models are in memory, and how much each takes."""
    from dataclasses import asdict

    from corral.ops import serving

    plan = _load(inventory)
    _chosen(plan, host)
    found = serving.ps(serving.places_of(plan, out, host))
    if as_json:
        _print_json([asdict(item) for item in found])
    else:
        serving.show(found, Console(highlight=False))


@models_app.command("load")
def models_load(
    pools: PoolsArgument, inventory: InventoryOption = INVENTORY, out: OutOption = OUT, host: HostOption = None
) -> None:
    """Bring models into memory; on a full shared server the least recently used goes, after its answers have ended."""
    _serve(inventory, out, host, load=pools)


@models_app.command("unload")
def models_unload(
    pools: PoolsArgument, inventory: InventoryOption = INVENTORY, out: OutOption = OUT, host: HostOption = None
) -> None:
    """Take models out of memory after their answers have ended; a shared server loads what is asked for again."""
    _serve(inventory, out, host, unload=pools)


@models_app.command("swap")
def models_swap(
    pool: Annotated[str, typer.Argument(help="The pool whose model comes.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    host: HostOption = None,
    instead_of: Annotated[str, typer.Option("--instead-of", help="The pool whose model goes.")] = "",
) -> None:
    """Put one model of a shared server in the place of another; when it does not load, the other is back."""
    _serve(inventory, out, host, load=[pool], instead_of=instead_of)


def _serve(
    inventory: Path, out: Path, host: list[str] | None, *, load: Iterable[str] = (), unload: Iterable[str] = (),
    instead_of: str = "",
) -> None:  # fmt: skip
    from corral.ops import serving

    plan = _load(inventory)
    _chosen(plan, host)
    places = serving.places_of(plan, out, host)
    coming, going = serving.chosen(places, load), serving.chosen(places, unload)
    with serving.changing(plan, out, talk) as change:
        serving.unload(change, going)
        serving.load(change, coming, instead_of)


DirectOption = Annotated[bool, typer.Option("--direct", help="Straight at the replicas, past the gateway.")]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer.")]
LongOption = Annotated[float | None, typer.Option("--long-share", min=0, max=1, help="Share of long prompts.")]
PoolsOption = Annotated[list[str] | None, typer.Option("--pool", help="Only this pool; may be given several times.")]


@bench_app.command("run")
def bench_run(  # noqa: PLR0913, PLR0917 - a parameter per option
    scenario: Annotated[str, typer.Argument(help="stress, mixed, soak, single, conversation or burst.")],
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    pool: PoolsOption = None,
    direct: DirectOption = False,
    replica: Annotated[str, typer.Option("--replica", help="Only this replica, by its container's name.")] = "",
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="Requests a second (open loop).")] = None,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Clients, or requests in a burst.")] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", min=1, help="Seconds; the scenario's if absent.")
    ] = None,
    max_tokens: TokensOption = None,
    long_share: LongOption = None,
    web: Annotated[str, typer.Option("--web", help="HOST:PORT of Locust's page; Ctrl-C ends it.")] = "",
    to: Annotated[Path | None, typer.Option("--to", help="Folder for raw data and figures.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Run one scenario with Locust; exit code 1 when the farm did not hold what the scenario promises."""
    from corral.ops.bench.run import Wanted, run, show
    from corral.ops.bench.settings import Target

    target = Target(_load(inventory), out, direct, replica, max_tokens, long_share)
    data = run(target, Wanted(scenario, tuple(pool or ()), rate, users, duration, web, to), talk)
    if as_json:
        _print_json(data)
    else:
        show(data, Console(highlight=False, soft_wrap=True))
    return 1 if data["broken"] else 0


RunOption = Annotated[str, typer.Option("--run", help="Name or folder of a run; the newest if absent.")]


@bench_app.command("sweep")
def bench_sweep(  # noqa: PLR0913, PLR0917 - a parameter per option
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    pool: PoolsOption = None,
    direct: DirectOption = False,
    steps: Annotated[str, typer.Option("--steps", help="Rates, as shares of what the full pool answers.")] = (
        "0.3,0.5,0.7,0.8,0.9,1.0,1.1,1.3"
    ),
    step_s: Annotated[float, typer.Option("--step-s", min=1, help="Least seconds of a step.")] = 300,
    step_requests: Annotated[int, typer.Option("--step-requests", min=1, help="Least requests of a step.")] = 100,
    warm_s: Annotated[float, typer.Option("--warm-s", min=1, help="Seconds with every slot in use at first.")] = 60,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=20, help="How often all steps are made.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 128,
    long_share: LongOption = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds after which an answer is a failure.")
    ] = 120,
    resume: Annotated[str, typer.Option("--resume", help="Go on with this run, as it was begun.")] = "",
    to: Annotated[Path | None, typer.Option("--to", help="Folder of the run.")] = None,
) -> None:
    """Measure what every pool holds: knee, safe rate, N-1; prints the folder of the run with its report."""
    from corral.ops.bench import sweep as ops
    from corral.ops.bench.report import write_report
    from corral.ops.bench.settings import Target

    plan = _load(inventory)
    if resume:
        folder = ops.find_run(plan, resume, is_whole=False)
        wanted = ops.read_wanted(folder)
    else:
        folder = to or ops.bench_folder(plan) / ops.new_run()
        shares = ops.parse_shares(steps)
        wanted = ops.Wanted(
            tuple(pool or ()), shares, step_s, step_requests, warm_s, repeats, max_tokens, long_share, timeout, direct
        )
    ops.sweep(Target(plan, out), wanted, folder, talk)
    write_report(folder)
    sys.stdout.write(f"{folder}\n")


@bench_app.command("report")
def bench_report(inventory: InventoryOption = INVENTORY, run: RunOption = "") -> None:
    """Write a run's report again: HTML, Markdown, CSV."""
    from corral.ops.bench.report import write_report
    from corral.ops.bench.sweep import find_run

    for path in write_report(find_run(_load(inventory), run)):
        sys.stdout.write(f"{path}\n")


@bench_app.command("compare")
def bench_compare(
    before: Annotated[str, typer.Argument(help="Name or folder of the earlier run.")],
    after: Annotated[str, typer.Argument(help="Name or folder of the later run; the newest if absent.")] = "",
    inventory: InventoryOption = INVENTORY,
    as_json: JsonOption = False,
) -> int:
    """Compare two runs; exit code 1 when a pool holds less than before, beyond the noise."""
    from dataclasses import asdict

    from corral.ops.bench.compare import compare_runs
    from corral.ops.bench.sweep import find_run

    plan = _load(inventory)
    found = compare_runs(find_run(plan, before), find_run(plan, after))
    if as_json:
        _print_json([asdict(item) for item in found])
    for item in found if not as_json else ():
        sys.stdout.write(f"{item.words}\n")
    return 1 if any(item.verdict == "worse" for item in found) else 0


@bench_app.command("apply")
def bench_apply(
    inventory: InventoryOption = INVENTORY,
    run: RunOption = "",
    basis: Annotated[str, typer.Option("--basis", help="safe, n-1 (a card may be lost) or knee.")] = "safe",
    tokens: Annotated[bool, typer.Option("--tokens", help="Limit tokens a minute, too.")] = False,
    to_file: Annotated[bool, typer.Option("--write", help="Change the inventory.")] = False,
) -> None:
    """Show the limits that a run measured as a change of the inventory; --write makes it."""
    from corral.ops.bench.apply import apply
    from corral.ops.bench.sweep import find_run

    folder = find_run(_load(inventory), run)
    sys.stdout.write(apply(inventory, folder, basis, with_tokens=tokens, is_written=to_file))
    talk.print("next: ./generate.py up --render, then bench verify" if to_file else "--write makes this change")


@bench_app.command("verify")
def bench_verify(  # noqa: PLR0913, PLR0917 - a parameter per option
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    pool: PoolsOption = None,
    at_s: Annotated[float, typer.Option("--at-s", min=1, help="Seconds at the limit.")] = 60,
    above_s: Annotated[float, typer.Option("--above-s", min=1, help="Seconds at three times the limit.")] = 60,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, as in the sweep.")] = 128,
    long_share: LongOption = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for raw data and figures.")] = None,
) -> int:
    """Show that pools hold their objective at their limits and refuse cleanly above; exit code 1 when they do not."""
    from corral.ops.bench.settings import Target
    from corral.ops.bench.sweep import bench_folder
    from corral.ops.bench.verify import Wanted, verify

    plan = _load(inventory)
    wanted = Wanted(tuple(pool or ()), at_s, above_s, max_tokens)
    data = verify(Target(plan, out, long_share=long_share), wanted, to or bench_folder(plan) / "verify", talk)
    for words in data["broken"]:
        talk.print(Text(words, style="red"))
    return 1 if data["broken"] else 0


UrlOption = Annotated[str, typer.Option("--url", help="Another Grafana than the site's own.")]
SourceOption = Annotated[str, typer.Option("--source", help="Name or uid of the Prometheus in that Grafana.")]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="File with a service account's token; else GRAFANA_TOKEN.")
]


@grafana_app.command("push")
def grafana_push(  # noqa: PLR0913, PLR0917 - a parameter per option
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    url: UrlOption = "",
    folder: Annotated[str, typer.Option("--folder", help="Folder in Grafana; the site's name if absent.")] = "",
    source: SourceOption = "",
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the site's pages into a Grafana that runs already, over those of an earlier push; prints their addresses."""
    from corral.ops import grafana as ops

    plan = _load(inventory)
    found = ops.push(plan, ops.Grafana(ops.find_door(plan, out, url, token_file)), folder, source)
    if as_json:
        _print_json(found)
        return
    for address in found.values():
        sys.stdout.write(f"{address}\n")


@grafana_app.command("check")
def grafana_check(
    inventory: InventoryOption = INVENTORY,
    out: OutOption = OUT,
    url: UrlOption = "",
    source: SourceOption = "",
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Ask Grafana every query of the site's pages; exit code 1 when a data source, a page or a query fails."""
    from corral.ops import grafana as ops

    plan = _load(inventory)
    found = ops.check(plan, ops.Grafana(ops.find_door(plan, out, url, token_file)), source)
    if as_json:
        _print_json(found.as_data())
    else:
        ops.show(found, Console(highlight=False, soft_wrap=True), talk)
    return 1 if found.failing else 0


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


def _print_json(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"corral {__version__}\n")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    os.umask(0o022)
