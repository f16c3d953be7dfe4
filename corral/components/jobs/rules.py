"""What must hold for jobs."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.config.client_names import all_aliases
from corral.contributions import Contributions
from corral.errors import Finding, did_you_mean
from corral.plan.site import Site


@check("plan", "jobs-door")
def _jobs_door(site: Site, published: Contributions) -> Iterator[Finding]:
    """Jobs are sent to HAProxy's door, which `balancing: direct` has not."""
    if site.inventory.jobs is not None and not published.doors:
        yield Finding("without HAProxy nothing passes requests on to /v1/jobs", ("jobs",), "use balancing: slots")


@check("plan", "jobs-model")
def _jobs_model(site: Site, _published: Contributions) -> Iterator[Finding]:
    """The model of jobs that name none is one of the farm's."""
    inventory = site.inventory
    if inventory.jobs is None or inventory.jobs.model is None:
        return
    auto = inventory.gateway.auto
    names = {*inventory.pools, *all_aliases(inventory), *([auto.name] if auto else [])}
    if inventory.jobs.model not in names:
        words = f'no pool is called "{inventory.jobs.model}"'
        yield Finding(words, ("jobs", "model"), did_you_mean(inventory.jobs.model, names))
