"""The command line with all verbs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from corral import __version__
from corral.cli import beginning, grafana, importing, keys, models, rendering, running, saving, watching, workers
from corral.cli.context import exit_code_of, verbs
from corral.declarations import shipped

app = verbs("corral: one inventory, a whole local GPU inference farm.", has_completion=True)
for group in (beginning, rendering, importing, running, saving, watching):
    app.add_typer(group.app)
app.add_typer(rendering.secrets, name="secrets")
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")
app.add_typer(workers.app, name="workers")
app.add_typer(rendering.images, name="images")
app.add_typer(grafana.app, name="grafana")


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
    """Send load, measure capacity, derive limits."""
    # A separate program: running a farm needs no load generator.
    os.execv(sys.executable, [sys.executable, str(shipped("load-tests/bench.py")), *context.args])  # noqa: S606
