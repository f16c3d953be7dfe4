"""Verbs that start, change and stop a farm."""

from __future__ import annotations

from typing import Annotated

import typer

from corral.cli.context import SiteOptions, plain, refuse_on_swarm, shared, talk, tell_figures
from corral.cli.rendering import write_rendering
from corral.errors import UsageError
from corral.render.tree import render as render_plan

app = typer.Typer()
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", min=1, help="Seconds for a service to become healthy.")
]


@app.command()
def demo(
    model: Annotated[str | None, typer.Option("--model", help="A GGUF file, or hf:owner/repo/file.gguf.")] = None,
    down: Annotated[bool, typer.Option("--down", help="Stop the demo and remove its files.")] = False,
) -> None:
    """Run the whole request path on this machine, without Docker, GPU or downloads."""
    from corral.verbs.demo.demo import down as stop_demo
    from corral.verbs.demo.demo import up as start_demo

    if down and model:
        raise UsageError("--down takes no model")
    if down:
        stop_demo(talk)
    else:
        start_demo(model, talk, plain())


@app.command()
@shared("inventory", "out", "host")
def up(
    site: SiteOptions,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=1, help="Seconds for a service to become healthy; default: its limit."),
    ] = None,
    render_first: Annotated[bool, typer.Option("--render", help="Write the rendering first.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without GPUs: run GPU services on the processor.")] = False,
) -> None:
    """Start missing services, apply changes, and wait for health; replicas are drained first."""
    from corral.verbs.up.up import up as bring_up

    found = site.plan()
    hosts = site.hosts(found)
    if render_first:
        write_rendering(found, site.out, hosts)
    if found.site.is_swarm:
        refuse_on_swarm(hosts=site.host, cpu=cpu)
        from corral.verbs import swarm

        swarm.up(found, site.out, talk, timeout_s=timeout)
        return
    bring_up(found, site.out, talk, hosts=hosts, timeout_s=timeout, is_on_cpu=cpu)
    tell_figures(site, hosts)


@app.command()
@shared("inventory", "out", "host")
def down(
    site: SiteOptions,
    volumes: Annotated[bool, typer.Option("--volumes", help="Delete the data too: keys, spending, metrics.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm data loss.")] = False,
) -> None:
    """Stop and remove containers, networks and processes; keeps data unless you add --volumes --yes."""
    from corral.verbs.up.up import down as take_down

    found = site.plan()
    if found.site.is_swarm:
        refuse_on_swarm(hosts=site.host)
        from corral.verbs import swarm

        swarm.down(found, site.out, talk, volumes=volumes, yes=yes)
        return
    take_down(found, site.out, talk, hosts=site.hosts(found), volumes=volumes, yes=yes)


@app.command()
@shared("inventory", "out")
def upgrade(
    site: SiteOptions,
    to: Annotated[list[str] | None, typer.Option("--to", metavar="KEY=IMAGE", help="New image for a key.")] = None,
    timeout: TimeoutOption = None,
) -> None:
    """List old and new images, change one replica of each pool first, then the others one at a time."""
    from corral.verbs.up.upgrade import upgrade as change_images

    site.plan()
    change_images(site.inventory, site.out, talk, plain(), to=to or [], timeout_s=timeout)
    tell_figures(site, None)


@app.command()
@shared("inventory", "out", "host")
def rollback(site: SiteOptions, timeout: TimeoutOption = None) -> None:
    """Restore the previous rendering, one service at a time."""
    from corral.verbs.up.upgrade import rollback as go_back

    found = site.plan()
    go_back(found, site.out, talk, hosts=site.hosts(found), timeout_s=timeout)
    tell_figures(site, site.hosts(found))


@app.command()
@shared("inventory", "out", "host")
def restart(
    site: SiteOptions, names: Annotated[list[str], typer.Argument(help="Service, container, pool, model, host or GPU.")]
) -> None:
    """Restart services one at a time; waits for health before the next."""
    from corral.verbs.names import services_named
    from corral.verbs.up.up import restart as restart_services

    found = site.plan()
    restart_services(found, site.out, services_named(found, names, site.hosts(found)), talk)


@app.command()
@shared("inventory", "out", "host")
def setup(
    site: SiteOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be done.")] = False,
    units: Annotated[bool, typer.Option("--units", help="Install systemd units: start at boot, power limits.")] = False,
) -> None:
    """Prepare a fresh host step by step and start it; reports its steps first, and can be run again at any time."""
    from corral.runtime.hosts import compose_hosts
    from corral.verbs.setup.setup import Setup

    found = site.plan()
    chosen = site.hosts(found)
    Setup(render_plan(found), talk, dry_run=dry_run, units=units).run(compose_hosts(found, site.out, chosen))
    if not dry_run:
        tell_figures(site, chosen)
