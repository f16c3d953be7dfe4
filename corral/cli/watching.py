"""Verbs that show a running farm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corral.cli.context import (
    JsonOption,
    SiteOptions,
    plain,
    print_json,
    refuse_on_swarm,
    shared,
    show_or_print,
    talk,
)
from corral.cli.show import page
from corral.errors import UsageError

app = typer.Typer()


@app.command()
@shared("inventory", "out", "host")
def status(
    site: SiteOptions,
    seconds: Annotated[float, typer.Argument(min=0.5, help="With --watch: seconds between updates.")] = 2,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Update until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show services, their health and load; exit code 1 if a service of the plan is not healthy."""
    from corral.runtime.processes import site_hosts
    from corral.verbs.status import status as ops

    if watch and as_json:
        raise UsageError("--json is one document per call; leave out --watch")
    found = site.plan()
    if found.site.is_swarm:
        refuse_on_swarm(hosts=site.host, watch=watch)
        from corral.verbs import swarm

        seen = swarm.status(found, site.out)
        print_json(seen) if as_json else page().print(swarm.status_view(seen))
        return 0 if seen["well"] else 1
    hosts = site_hosts(found, site.out, site.hosts(found))
    if watch:
        return 0 if ops.watch_status(found, hosts, page(), seconds) else 1
    data = ops.farm_status(found, hosts)
    show_or_print(data, lambda: page().print(ops.status_view(data)), as_json=as_json)
    return 0 if data["well"] else 1


@app.command()
@shared("inventory", "out", "host")
def figures(
    site: SiteOptions,
    scheduled: Annotated[
        bool, typer.Option("--scheduled", help="For timers: print nothing, and enable the alert for missed runs.")
    ] = False,
) -> None:
    """Write metrics that no exporter has (drift, containers, weights, backups) for node-exporter."""
    from corral.verbs.status.figures import figures_hosts, write_figures

    found = site.plan()
    hosts = figures_hosts(found, site.out, site.hosts(found))
    write_figures(found, hosts, is_scheduled=scheduled, err=None if scheduled else talk)


@app.command()
@shared("inventory", "out")
def watch(
    site: SiteOptions,
    seconds: Annotated[float, typer.Argument(min=0.5, help="Seconds between updates.")] = 5,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Number of updates; 0: until Ctrl-C.")] = 0,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Append every value to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show live metrics from Prometheus: pools, queues, tokens per second, cards and their temperature."""
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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow until Ctrl-C.")] = False,
    since: Annotated[str, typer.Option("--since", help="Oldest lines: 10m, 2h, or a date.")] = "",
    tail: Annotated[
        str, typer.Option("--tail", "-n", help="Last lines of each service; 100, or all with --since.")
    ] = "",
) -> None:
    """Show logs of services, sorted by time, with the service's name in front."""
    from corral.runtime.processes import site_hosts
    from corral.verbs.names import services_named
    from corral.verbs.status.logs import TAIL, Wanted, show_logs

    found = site.plan()
    chosen = site.hosts(found)
    services = services_named(found, names or [], chosen)
    if tail and tail != "all" and not tail.isdecimal():
        raise UsageError(f'--tail {tail}: must be a number of lines, or "all"')
    wanted = Wanted(tail or ("all" if since else TAIL), since, follow)
    if found.site.is_swarm:
        from corral.verbs import swarm

        swarm.show_logs(found, site.out, services, wanted, plain())
        return
    hosts = site_hosts(found, site.out, {item.host for item in services})
    show_logs(hosts, services, wanted, plain())


@app.command()
@shared("inventory", "out", "host")
def doctor(
    site: SiteOptions,
    ask: Annotated[bool, typer.Option("--ask", help="Also ask every pool a short question.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Find faults between client and GPU, with remedies; exit code 1 on errors."""
    from corral.runtime.processes import site_hosts
    from corral.verbs.doctor.report import diagnose, show

    found = site.plan()
    diagnosis = diagnose(found, site_hosts(found, site.out, site.hosts(found)), must_ask=ask)
    show_or_print(diagnosis, lambda: show(diagnosis, plain()), as_json=as_json)
    return 0 if diagnosis["well"] else 1
