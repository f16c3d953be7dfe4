"""Pages in a Grafana that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from corral.cli.context import JsonOption, SiteOptions, plain, print_json, shared, talk, verbs

app = verbs("Pages in a Grafana that runs.")
UrlOption = Annotated[str, typer.Option("--url", help="Another Grafana than the site's own.")]
SourceOption = Annotated[str, typer.Option("--source", help="Name or uid of the Prometheus in that Grafana.")]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="File with a service account's token; else GRAFANA_TOKEN.")
]


@app.command("push")
@shared("inventory", "out")
def grafana_push(
    site: SiteOptions,
    url: UrlOption = "",
    folder: Annotated[str, typer.Option("--folder", help="Folder in Grafana; the site's name if absent.")] = "",
    source: SourceOption = "",
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the site's pages into a Grafana that runs already, over those of an earlier push; prints their addresses."""
    from corral.ops import grafana as ops

    plan = site.plan()
    found = ops.push(plan, ops.Grafana(ops.find_door(plan, site.out, url, token_file)), folder, source)
    if as_json:
        print_json(found)
        return
    for address in found.values():
        sys.stdout.write(f"{address}\n")


@app.command("check")
@shared("inventory", "out")
def grafana_check(
    site: SiteOptions,
    url: UrlOption = "",
    source: SourceOption = "",
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Ask Grafana every query of the site's pages; exit code 1 when a data source, a page or a query fails."""
    from corral.ops import grafana as ops

    plan = site.plan()
    found = ops.check(plan, ops.Grafana(ops.find_door(plan, site.out, url, token_file)), source)
    if as_json:
        print_json(found.as_data())
    else:
        ops.show(found, plain(), talk)
    return 1 if found.failing else 0
