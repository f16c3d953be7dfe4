"""`import`: an inventory from others' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from corral.build import build_plan
from corral.checks.policy import check_tree
from corral.cli.context import INVENTORY, JsonOption, plain, print_json, talk
from corral.config.load import load_text
from corral.errors import CorralError, SiteError, UsageError
from corral.render.tree import render
from corral.units import counted

app = typer.Typer()


@app.command("import")
def import_files(
    files: Annotated[list[Path], typer.Argument(help="LiteLLM's, Compose's or llama-swap's file, Modelfiles, .env.")],
    only_report: Annotated[
        bool, typer.Option("--report", help="Say what becomes of every value; write nothing.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", help="The inventory to write; never one that exists.")
    ] = INVENTORY,
    address: Annotated[str, typer.Option("--address", help="Address of the machine that the files are about.")] = "",
    card: Annotated[str, typer.Option("--card", help="Kind of its graphics cards, such as rtx-3090.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Carry over what LiteLLM, Compose, llama-swap or Ollama serve, with a finding for every value of the files."""
    from corral.verbs.imports.reader import lines_to_complete, read
    from corral.verbs.imports.sources import read_file
    from corral.verbs.imports.writing import as_data, report, text_of

    if not only_report and output.exists():
        raise UsageError(f"{output} is there already and is not overwritten; name another file with --output PATH")
    found = read(map(read_file, files), address=address, card=card)
    if as_json:
        print_json(as_data(found))
    else:
        console = plain()
        for line in report(found):
            console.print(Text(line))
    if only_report:
        return
    if "pools" not in found.data:
        raise CorralError("these files have nothing that clients could call; no inventory was written")
    text = text_of(found)
    with output.open("x", encoding="utf-8") as file:  # never over a file that came up meanwhile
        file.write(text)
    lines = lines_to_complete(text, found.draft.complete)
    for number, words in lines:
        talk.print(Text(f"{output}:{number}: {words}", style="yellow"))
    _check(text, output)
    rest = f"; complete {counted(len(lines), 'line')}" if lines else ""
    talk.print(Text(f"wrote {output}{rest}; next: ./generate.py plan --inventory {output}"))


def _check(text: str, output: Path) -> None:
    """Checks what was written as `check` does; tells what its user has to change."""
    try:
        plan = build_plan(load_text(text, output))
    except SiteError as error:
        for problem in error.problems:
            talk.print(Text(str(problem), style="yellow"))
        raise CorralError(f"wrote {output}; change the lines above before the next step") from None
    for host, findings in check_tree(plan, render(plan)).items():
        for finding in findings:
            talk.print(Text(f"{host}: {finding}", style="yellow"))
