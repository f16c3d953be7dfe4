"""Verbs for archives: backup, restore, bundle."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from corral.cli.context import JsonOption, SiteOptions, print_json, shared, talk, tell_figures
from corral.cli.show import page
from corral.errors import UsageError

app = typer.Typer()
PassphraseOption = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line is the passphrase; else CORRAL_PASSPHRASE.")
]


@app.command()
@shared("inventory", "out", "host")
def backup(
    site: SiteOptions,
    to: Annotated[Path | None, typer.Option("--to", help="File to write; SITE-DATE.backup here if absent.")] = None,
    without_secrets: Annotated[
        bool, typer.Option("--without-secrets", help="Omit keys and passwords; do not encrypt.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Encrypt only the secrets.")] = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Save inventory, rendering, secrets and data of services in one encrypted file; prints its name."""
    from corral.verbs.archives.backup import backup as save
    from corral.verbs.archives.contents import Sealing
    from corral.verbs.archives.passphrase import find_passphrase

    found = site.plan()
    hosts = site.hosts(found)
    sealing = None if without_secrets else Sealing(find_passphrase(passphrase_file, is_new=True), plain)
    made = save(found, site.out, talk, hosts=hosts, to=to, sealing=sealing)
    sys.stdout.write(f"{made}\n")
    tell_figures(site, hosts)


@app.command()
@shared("inventory", "out", "host")
def restore(
    site: SiteOptions,
    file: Annotated[Path, typer.Argument(help="Archive that backup made.")],
    passphrase_file: PassphraseOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an existing installation.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm data loss and changed hosts or images.")] = False,
    only_list: Annotated[
        bool, typer.Option("--list", help="Verify the archive and list its content; change nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Restore a backup on an empty machine; `up` then starts it."""
    from corral.verbs.archives import restore as ops
    from corral.verbs.archives.contents import read_backup
    from corral.verbs.archives.passphrase import find_passphrase

    if as_json and not only_list:
        raise UsageError("--json goes with --list")
    if not only_list:
        hosts = frozenset(site.host) if site.host else None
        ops.restore(file, talk, ops.Wanted(site.inventory, site.out, hosts, passphrase_file, replace, yes))
        return
    found = read_backup(file, partial(find_passphrase, passphrase_file, is_new=False))
    if as_json:
        print_json(found.manifest.model_dump(mode="json"))
        return
    page().print(ops.listing(found))
    talk.print(Text(ops.summary(found)))


@app.command()
@shared("inventory", "out", "host")
def bundle(
    site: SiteOptions,
    load: Annotated[str, typer.Argument(metavar="[load]", help="load PATH: load a bundle.")] = "",
    path: Annotated[Path | None, typer.Argument(help="The bundle to load.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder, or FILE.tar, to write.")] = None,
    without_kit: Annotated[bool, typer.Option("--without-kit", help="Omit the kit and its wheels.")] = False,
    sign: Annotated[Path | None, typer.Option("--sign", metavar="KEYFILE", help="Sign it with this ssh key.")] = None,
    signer: Annotated[
        Path | None, typer.Option("--signer", help="With load: file of allowed signers (format of ssh-keygen).")
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="With load: accept an unsigned bundle.")] = False,
) -> None:
    """Collect images, model files, rendering and the kit for air-gapped hosts; `bundle load PATH` loads them."""
    from corral.verbs.archives import bundle as making
    from corral.verbs.archives import load as unbundle

    if (load, path is None, to is None) == ("load", False, True):
        if (signer is None) != unsigned:
            raise UsageError(
                "say who has to have made it: --signer FILE (allowed signers: NAME ssh-ed25519 AAAA…), or --unsigned, "
                "once the sha256 that bundle printed was compared with sha256sum SHA256SUMS"
            )
        hosts = frozenset(site.host) if site.host else None
        unbundle.load(path or Path(), talk, unbundle.Wanted(site.inventory, site.out, hosts, signer))
        return
    if load or to is None:
        raise UsageError("say where to: bundle --to FOLDER (or FILE.tar); or on the other side: bundle load PATH")
    found = site.plan()
    making.bundle(found, site.out, talk, hosts=site.hosts(found), to=to, with_kit=not without_kit, key=sign)
