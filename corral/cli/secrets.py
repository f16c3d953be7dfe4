"""Keys and passwords of the hosts."""

from __future__ import annotations

from corral.cli.context import SiteOptions, shared, talk, verbs
from corral.errors import CorralError
from corral.render.secrets import initialise

app = verbs("Keys and passwords of the hosts.")


@app.command("init")
@shared("inventory", "out", "host")
def secrets_init(site: SiteOptions) -> None:
    """Add what is missing to the hosts' secrets (mode 0600); never changes what is there."""
    found = site.plan()
    hosts = site.hosts(found)
    needed = {name: wanted for name in found.inventory.hosts if (wanted := found.secrets_of(name))}
    missing = []
    for report in initialise(needed, site.out, hosts):
        words = ", ".join(report.made) or "nothing new"
        talk.print(f"{site.out}/{report.host}/.env: {words}" + (f"; kept {len(report.kept)}" if report.kept else ""))
        missing += [f"{name} in {site.out}/{report.host}/.env" for name in report.missing]
    if missing:
        raise CorralError("these values only you know; write them, then run this again: " + ", ".join(missing))
