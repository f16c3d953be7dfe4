"""Keys of consumers on the gateway."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from corral.cli.context import JsonOption, SiteOptions, plain, shared, show_or_print, talk, verbs

app = verbs("Keys of consumers on the gateway.")


@app.command("sync")
@shared("inventory", "out")
def keys_sync(
    site: SiteOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show; exit code 3 if anything differs.")] = False,
    adopt: Annotated[list[str] | None, typer.Option("--adopt", help="Take over a key made by hand.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the gateway's keys agree with the inventory's consumers; new keys go into files, never on the screen."""
    from corral.verbs.keys import keys, show

    plan = site.plan()
    changes = keys.sync(plan, site.out, dry_run=dry_run, adopted=adopt or [])
    data = show.changes_as_data(plan, site.out, changes)
    show_or_print(data, lambda: show.show_changes(plan, site.out, changes, plain(), talk), as_json=as_json)
    keys.conclude(changes, dry_run=dry_run)


@app.command("ls")
@shared("inventory", "out")
def keys_ls(site: SiteOptions, as_json: JsonOption = False) -> None:
    """Show every key of the gateway: its owner, pools, limits, spending and expiry."""
    from corral.verbs.keys import keys, show

    plan = site.plan()
    found = keys.listed(plan, site.out)
    show_or_print(found, lambda: show.show_keys(plan, found, Console(highlight=False)), as_json=as_json)


@app.command("spend")
@shared("inventory", "out")
def keys_spend(site: SiteOptions, as_json: JsonOption = False) -> None:
    """Show what every key has spent in its period, and its requests and tokens of 30 days; the highest first."""
    from corral.verbs.keys import keys, show

    found = keys.spending(site.plan(), site.out)
    data = [{name: row[name] for name in ("name", "spend_usd", "budget", "usage_30d")} for row in found]
    show_or_print(data, lambda: show.show_spend(found, Console(highlight=False)), as_json=as_json)


@app.command("create")
@shared("inventory", "out")
def keys_create(
    site: SiteOptions,
    name: Annotated[str, typer.Argument(help="Its name, LiteLLM's key_alias.")],
    pool: Annotated[list[str] | None, typer.Option("--pool", help="Pool that it opens; all if none.")] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option("--tpm", help="Tokens per minute.")] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", help="Requests at the same time.")] = None,
    max_usd: Annotated[float | None, typer.Option("--max-usd", help="Budget in US dollars.")] = None,
    period: Annotated[str | None, typer.Option("--period", help="Spending resets after it, such as 30d.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="Day or moment, such as 2027-01-31.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a temporary key by hand; a lasting one belongs in the inventory. Prints the key's file."""
    from corral.verbs.keys import keys

    limits = _given(rpm=rpm, tpm=tpm, parallel=parallel)
    budget = _given(max_usd=max_usd, period=period)
    found = site.plan()
    consumer = keys.checked_consumer(name, {"pools": pool, "limits": limits, "budget": budget, "expires": expires})
    _print_file(name, keys.create(found, site.out, name, consumer), as_json=as_json)


@app.command("revoke")
@shared("inventory", "out")
def keys_revoke(site: SiteOptions, names: Annotated[list[str], typer.Argument(help="Names of keys.")]) -> None:
    """Revoke keys at once, and remove their files."""
    from corral.verbs.keys import keys

    again = keys.revoke(site.plan(), site.out, names)
    talk.print(f"revoked: {', '.join(names)}")
    if again:
        talk.print(f"still in the inventory, so the next keys sync makes new ones: {', '.join(again)}", style="yellow")


@app.command("rotate")
@shared("inventory", "out")
def keys_rotate(
    site: SiteOptions,
    name: Annotated[str, typer.Argument(help="Name of a key.")],
    keep_hours: Annotated[
        float, typer.Option("--keep-hours", min=0, max=8760, help="Hours for which the old key stays valid.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Replace a key by a new one with its settings and spending. Prints the key's file."""
    from corral.verbs.keys import keys

    path = keys.rotate(site.plan(), site.out, name, keep=timedelta(hours=keep_hours))
    _print_file(name, path, as_json=as_json)


@app.command("import")
@shared("inventory", "out")
def keys_import(
    site: SiteOptions,
    file: Annotated[Path, typer.Argument(help="Made by: pg_dump --format custom")],
    replace: Annotated[bool, typer.Option("--replace", help="Also if the keys that the gateway has are lost.")] = False,
) -> None:
    """Load keys, teams and spending from a dump of another LiteLLM's database."""
    from corral.verbs.keys.moving import bring

    bring(site.plan(), site.out, file, talk, replace=replace)


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _print_file(name: str, path: Path, *, as_json: bool) -> None:
    show_or_print({"name": name, "file": str(path)}, lambda: sys.stdout.write(f"{path}\n"), as_json=as_json)
