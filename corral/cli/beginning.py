"""The verb with which a farm begins: an inventory from what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from corral.cli.context import INVENTORY, talk
from corral.errors import UsageError
from corral.files import write_atomically

app = typer.Typer()


HostsOption = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="USER@ADDRESS", help="Look at this machine, too, over ssh; repeatable."),
]
ModelsOption = Annotated[
    list[Path] | None, typer.Option("--models", metavar="FOLDER", help="Look for model files there, too; repeatable.")
]
OutputOption = Annotated[Path, typer.Option("--output", help="The inventory to write; never over one of your own.")]


@app.command()
def init(host: HostsOption = None, models: ModelsOption = None, output: OutputOption = INVENTORY) -> None:
    """Look at this machine (cards, models, servers) and write an inventory for what is there; changes nothing else."""
    from corral.verbs.init.init import default_text, propose, told

    if not output.parent.is_dir():
        raise UsageError(f"{output}: there is no such folder; make it first")
    old = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    if output.exists() and old != default_text():
        words = "is there already and stays as it is; nothing was written"
        raise UsageError(f"{output} {words}: name another file with --output, or move that one away")
    folders = [str(folder.expanduser().absolute()) for folder in models or ()]
    proposal = propose(host or (), folders)
    for line in told(proposal):
        talk.print(Text(line))
    write_atomically(output, proposal.text.encode(), 0o644)
    named = "" if output == INVENTORY else f" --inventory {output}"
    is_whole = all(it.candidate.gguf for it in proposal.servings)
    verbs = [f"models {'inspect' if is_whole else 'pull'}"] if proposal.servings else []
    verbs += ["plan", "render" if "runtime: local" in proposal.text else "setup"]
    over = ", over the example that came with the kit" if old else ""
    talk.print(f"{output}: written{over}; next: {', '.join(f'./generate.py {verb}{named}' for verb in verbs)}")
