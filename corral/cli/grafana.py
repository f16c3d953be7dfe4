"""Dashboards in a Grafana that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from corral.cli.context import JsonOption, SiteOptions, shared, show_or_print, verbs

app = verbs("Dashboards in a Grafana that runs.")


@app.command("push")
@shared("inventory")
def grafana_push(
    site: SiteOptions,
    url: Annotated[str, typer.Option("--url", help="Address of that Grafana; the site's own has the dashboards.")],
    folder: Annotated[str, typer.Option("--folder", help="Folder in Grafana; the site's name if absent.")] = "",
    source: Annotated[str, typer.Option("--source", help="Name or uid of the Prometheus in that Grafana.")] = "",
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with a service account's token; else GRAFANA_TOKEN.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the site's dashboards into another Grafana, over those of an earlier push; prints their addresses."""
    from corral.verbs.grafana import Grafana, push

    found = push(site.plan(), Grafana(url, token_file), folder, source)
    lines = (f"{address}\n" for address in found.values())
    show_or_print(found, lambda: sys.stdout.writelines(lines), as_json=as_json)
