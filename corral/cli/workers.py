"""Workers: machines behind NAT that dial in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corral.cli.context import JsonOption, SiteOptions, plain, print_json, shared, talk, verbs
from corral.errors import UsageError
from corral.tables import new_table

if TYPE_CHECKING:
    from corral.verbs.workers.workers import Side

app = verbs("Machines behind NAT that dial in (docs/workers.md).")
Name = Annotated[str, typer.Argument(help="A node with dials_in.")]
To = Annotated[Path | None, typer.Option("--to", help="Folder to make for the worker; corral-worker-NAME if absent.")]
Port = Annotated[
    int | None,
    typer.Option("--port", min=1, max=65535, help="Port of the server on the worker; its engine's if absent."),
]


@app.command("issue")
@shared("inventory", "out")
def workers_issue(site: SiteOptions, name: Name, to: To = None, port: Port = None, as_json: JsonOption = False) -> None:
    """Give a worker its key: makes the folder that it needs, and prints the command that connects it."""
    from corral.verbs.workers import workers

    _show(name, workers.issue(site.plan(), site.out, name, to=to, port=port), as_json=as_json)


@app.command("rotate")
@shared("inventory", "out")
def workers_rotate(
    site: SiteOptions, name: Name, to: To = None, port: Port = None, as_json: JsonOption = False
) -> None:
    """Give a worker a new key; the old one is refused at once, and its connection ends."""
    from corral.verbs.workers import workers

    _show(name, workers.rotate(site.plan(), site.out, name, to=to, port=port), as_json=as_json)


@app.command("revoke")
@shared("inventory", "out")
def workers_revoke(
    site: SiteOptions,
    names: Annotated[list[str] | None, typer.Argument(help="Nodes with dials_in.")] = None,
    is_all: Annotated[bool, typer.Option("--all", help="All workers.")] = False,
) -> None:
    """Refuse the keys of workers from now on, and end their connections."""
    from corral.verbs.workers import workers

    if bool(names) == is_all:
        raise UsageError("name the workers, or say --all")
    found = workers.revoke(site.plan(), site.out, names or [], is_all=is_all)
    talk.print(f"revoked: {', '.join(found)}" if found else "no worker has a key")


@app.command("ls")
@shared("inventory", "out")
def workers_ls(site: SiteOptions, as_json: JsonOption = False) -> None:
    """Show every worker: the fingerprint of its key, whether it is connected, when it was seen last."""
    from corral.verbs.workers import workers

    found = workers.listed(site.plan(), site.out)
    if as_json:
        print_json(found)
        return
    table = new_table("worker", "engine", "key", "connected", "last seen")
    words = {None: "the balancer does not run", True: "yes", False: "no"}
    for row in found:
        key, seen = row["fingerprint"] or "none: workers issue", row["last_seen"] or ""
        table.add_row(row["name"], row["engine"], key, words[row["connected"]], seen if row["fingerprint"] else "")
    plain().print(table)


def _show(name: str, side: Side, *, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "folder": str(side.folder), "command": side.command})
        return
    talk.print(f"{side.folder}: bring this folder into the home folder of {name}, and delete it here; there run:")
    plain().print(side.command)
    talk.print("to keep it running, the folder has a unit for systemd, a plist for launchd and a Compose file")
