"""Verbs for model files and models in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from corral.build import load_site
from corral.cli.context import JsonOption, SiteOptions, plain, shared, show_or_print, talk, tell_figures, verbs
from corral.errors import UsageError

if TYPE_CHECKING:
    from corral.verbs.models.models import Store

app = verbs("Model files: download, verify, load.")
NamesArgument = Annotated[list[str] | None, typer.Argument(help="Models; all if none.")]
PoolsArgument = Annotated[list[str], typer.Argument(help="Pools.")]


def _store(options: SiteOptions) -> tuple[Store, set[str] | None]:
    """All model files of a site, and the chosen hosts. A farm that does not fit yet has them, too."""
    from corral.verbs.models.models import Store

    site = load_site(options.loaded())
    return Store(site, options.inventory, options.out, talk), options.hosts(site.inventory)


def _print(
    found: Sequence[Any], show: Callable[[Sequence[Any], Console], None], out: Console, *, as_json: bool
) -> None:
    show_or_print([asdict(item) for item in found], lambda: show(found, out), as_json=as_json)


@app.command("pull")
@shared("inventory", "out", "host")
def models_pull(
    site: SiteOptions,
    names: NamesArgument = None,
    offline: Annotated[
        Path | None, typer.Option("--from", help="Take files from this folder instead of the network.")
    ] = None,
    fallback: Annotated[str, typer.Option("--fallback", help="Quantization to use if the file is missing.")] = "",
    update: Annotated[bool, typer.Option("--update", help="Accept and pin the sources' current content.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=16, help="Concurrent downloads.")] = 3,
    store: Annotated[Path | None, typer.Option("--store", help="Local folder for files of hosts behind ssh.")] = None,
) -> None:
    """Download missing files into the hosts' models folders, verify them, and pin them in models.lock.json."""
    from corral.verbs.models.models import Choice, pull

    if offline is not None and not offline.is_dir():
        raise UsageError(f"--from {offline}: there is no such folder")
    files, hosts = _store(site)
    chosen = frozenset(hosts) if hosts else None
    pull(files, Choice(tuple(names or ()), chosen, offline, fallback, update, jobs, store))
    tell_figures(site, hosts)


@app.command("inspect")
@shared("inventory", "out")
def models_inspect(site: SiteOptions, names: NamesArgument = None) -> None:
    """Read the metadata of model files without downloading them, so that `plan` can compute their memory."""
    from corral.verbs.models.models import inspect

    inspect(_store(site)[0], names or ())


@app.command("verify")
@shared("inventory", "out", "host")
def models_verify(site: SiteOptions, names: NamesArgument = None, as_json: JsonOption = False) -> int:
    """Read every model file from the first to the last byte; exit code 1 when one is not the pinned one."""
    from corral.verbs.models.models import rows
    from corral.verbs.models.models_show import show_verdict

    store, hosts = _store(site)
    found = [row for row in rows(store, names or (), hosts, reads=True) if row.host]
    _print(found, show_verdict, plain(), as_json=as_json)
    tell_figures(site, hosts)
    return 0 if all(row.state == "verified" for row in found) else 1


@app.command("ls")
@shared("inventory", "out", "host")
def models_ls(site: SiteOptions, names: NamesArgument = None, as_json: JsonOption = False) -> None:
    """List model files with size, quantization, context, checksum and users."""
    from corral.verbs.models.models import rows
    from corral.verbs.models.models_show import show_rows

    store, hosts = _store(site)
    _print(rows(store, names or (), hosts), show_rows, Console(highlight=False), as_json=as_json)


@app.command("ps")
@shared("inventory", "out", "host")
def models_ps(site: SiteOptions, as_json: JsonOption = False) -> None:
    """List models in memory, with the memory of each."""
    from corral.verbs.models import serving

    plan = site.plan()
    site.hosts(plan)
    found = serving.ps(serving.places_of(plan, site.out, site.host))
    _print(found, serving.show, Console(highlight=False), as_json=as_json)


@app.command("load")
@shared("inventory", "out", "host")
def models_load(site: SiteOptions, pools: PoolsArgument) -> None:
    """Load models into memory; a full shared server evicts the least recently used one after its answers have ended."""
    _serve(site, load=pools)


@app.command("unload")
@shared("inventory", "out", "host")
def models_unload(site: SiteOptions, pools: PoolsArgument) -> None:
    """Unload models after their answers have ended; a shared server reloads them on request."""
    _serve(site, unload=pools)


@app.command("swap")
@shared("inventory", "out", "host")
def models_swap(
    site: SiteOptions,
    pool: Annotated[str, typer.Argument(help="Pool whose model is loaded.")],
    instead_of: Annotated[str, typer.Option("--instead-of", help="Pool whose model is evicted.")] = "",
) -> None:
    """Replace one model of a shared server by another; if it does not load, the old one is restored."""
    _serve(site, load=[pool], instead_of=instead_of)


def _serve(site: SiteOptions, *, load: Iterable[str] = (), unload: Iterable[str] = (), instead_of: str = "") -> None:
    from corral.verbs.models import serving

    plan = site.plan()
    site.hosts(plan)
    places = serving.places_of(plan, site.out, site.host)
    coming, going = serving.chosen(places, load), serving.chosen(places, unload)
    with serving.changing(plan, site.out, talk) as change:
        serving.unload(change, going)
        serving.load(change, coming, instead_of)
