"""All verbs, put together."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from corral import __version__
from corral.cli import grafana, images, keys, models, rendering, running, saving, secrets, watching
from corral.cli.context import exit_code_of, verbs
from corral.render.tree import ROOT

app = verbs("corral: one inventory, a whole local GPU inference farm.")
for group in (rendering, running, saving, watching):
    app.add_typer(group.app)
for name, commands in (
    ("secrets", secrets.app),
    ("keys", keys.app),
    ("models", models.app),
    ("images", images.app),
    ("grafana", grafana.app),
):
    app.add_typer(commands, name=name)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return exit_code_of(app, arguments)


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


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True,
                                                       "allow_interspersed_args": False})  # fmt: skip
def bench(context: typer.Context) -> None:
    """Load, measured capacity, limits from it."""
    # A program of its own: what sends load is no part of what runs a farm.
    os.execv(sys.executable, [sys.executable, str(ROOT / "load-tests" / "bench.py"), *context.args])  # noqa: S606
