"""What shows a running farm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corral.cli.context import JsonOption, SiteOptions, plain, print_json, shared, talk
from corral.cli.show import page
from corral.errors import UsageError

app = typer.Typer()


@app.command()
@shared("inventory", "out", "host")
def status(
    site: SiteOptions,
    seconds: Annotated[float, typer.Argument(min=0.5, help="With --watch: seconds between two looks.")] = 2,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what runs, how well and how busy; exit code 1 when something of the plan is not well."""
    from corral.runtime.hosts import compose_hosts
    from corral.verbs.status import status as ops

    if watch and as_json:
        raise UsageError("--json is one document per call; leave out --watch")
    found = site.plan()
    hosts = compose_hosts(found, site.out, site.hosts(found))
    if watch:
        return 0 if ops.watch_status(found, hosts, page(), seconds) else 1
    data = ops.farm_status(found, hosts)
    if as_json:
        print_json(data)
    else:
        page().print(ops.status_view(data))
    return 0 if data["well"] else 1


@app.command()
@shared("inventory", "out", "host")
def figures(
    site: SiteOptions,
    scheduled: Annotated[
        bool, typer.Option("--scheduled", help="A timer calls: say nothing, and warn when it does not come again.")
    ] = False,
) -> None:
    """Write what no exporter tells (drift, containers, weights, backups) where node-exporter reads it."""
    from corral.verbs.status.figures import figures_hosts, write_figures

    found = site.plan()
    hosts = figures_hosts(found, site.out, site.hosts(found))
    write_figures(found, hosts, is_scheduled=scheduled, err=None if scheduled else talk)


@app.command()
@shared("inventory", "out")
def watch(
    site: SiteOptions,
    seconds: Annotated[float, typer.Argument(min=0.5, help="Seconds between two looks.")] = 5,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Looks; 0 goes on until Ctrl-C.")] = 0,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Append every figure to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the farm does, from its Prometheus: pools, queues, tokens a second, cards and their temperature."""
    from corral.verbs.status import watch as ops

    ask = ops.asking(site.plan(), site.out)
    if as_json:
        print_json(ops.as_data(ops.rows_now(ask)))
        return
    ops.watch(ask, page(), seconds, looks=count, csv_file=csv_file)


@app.command()
@shared("inventory", "out", "host")
def logs(
    site: SiteOptions,
    names: Annotated[list[str] | None, typer.Argument(help="Service, container, pool, host, GPU; all if none.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    since: Annotated[str, typer.Option("--since", help="Not older than this: 10m, 2h, or a date.")] = "",
    tail: Annotated[str, typer.Option("--tail", "-n", help="Last lines of each service; 100, or all since.")] = "",
) -> None:
    """Show what services print, in the order of time, with the service's name in front."""
    from corral.runtime.hosts import compose_hosts
    from corral.verbs.names import services_named
    from corral.verbs.status.logs import TAIL, Wanted, show_logs

    found = site.plan()
    chosen = site.hosts(found)
    services = services_named(found, names or [], chosen)
    if tail and tail != "all" and not tail.isdecimal():
        raise UsageError(f'--tail {tail}: must be a number of lines, or "all"')
    hosts = compose_hosts(found, site.out, {item.host for item in services})
    wanted = Wanted(tail or ("all" if since else TAIL), since, follow)
    show_logs(hosts, services, wanted, plain())


@app.command()
@shared("inventory", "out", "host")
def doctor(
    site: SiteOptions,
    ask: Annotated[bool, typer.Option("--ask", help="Also ask every pool a short question.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Find what fails between client and card, and what helps; exit code 1 on errors."""
    from corral.runtime.hosts import compose_hosts
    from corral.verbs.doctor.report import diagnose, show

    found = site.plan()
    diagnosis = diagnose(found, compose_hosts(found, site.out, site.hosts(found)), must_ask=ask)
    if as_json:
        print_json(diagnosis)
    else:
        show(diagnosis, plain())
    return 0 if diagnosis["well"] else 1
