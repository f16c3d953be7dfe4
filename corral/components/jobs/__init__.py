"""Jobs: requests that may wait, kept in a store until a worker has run them at the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corral.components import Stage, litellm
from corral.components.declared import secrets, service
from corral.config.client_names import poller_key
from corral.config.inventory import Jobs
from corral.contributions import Contribution, Contributions, Endpoint, File, Rules, ScrapeTarget, Secret, State
from corral.declarations import declaration
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT, STORE, WORKER = "jobs", "jobs-store", "jobs-worker"
FILES = ("api.py", "batches.py", "polls.py", "sending.py", "store.lua", "store.py", "web.py", "worker.py")
SETTINGS = "settings.yaml"
# Memory of the API and of the worker: their programs, and for the worker the requests that it runs, several times each.
API_MIB, WORKER_MIB, COPIES = 192, 96, 4
AWAY = "it delivers callbacks"


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The store, the API and the workers."""
    jobs, host = site.inventory.jobs, site.inventory.gateway.host
    if jobs is None or not published.doors:
        return
    store, door = Endpoint(jobs.store_port, host, STORE), published.doors[0].endpoint
    yield from secrets(COMPONENT, host)
    pollers = {poller_key(name): name for name in jobs.pollers}
    for key, name in pollers.items():
        yield Secret(key, host, f"with it the poller {name} fetches jobs, and nothing else", "sk")
    yield File(host, COMPONENT, SETTINGS, data=_settings(site, jobs, store, door), note="read by store.py")
    yield from (File(host, COMPONENT, name, asset=f"jobs/{name}") for name in FILES)
    is_local = site.is_local(host)
    if is_local:
        yield File(host, COMPONENT, "start.sh", asset="litellm/valkey-local.sh")
    start = ("sh", site.config_path(host, COMPONENT, "start.sh", "")) if is_local else ("valkey-server",)
    told = {"port": jobs.store_port, "start": start, "most_memory": f"{jobs.memory_mib}mb"}
    # Twice its own limit: a copy of itself writes the file anew.
    yield service(site, host, COMPONENT, STORE, memory_mib=2 * jobs.memory_mib + 64, **told)
    common = {"files": tuple((name, f"/etc/corral/{name}") for name in (*FILES, SETTINGS)), "calls": (store, door)}
    # A batch is shown with all its results.
    api = {"memory_mib": API_MIB + jobs.memory_mib, "pollers": tuple(pollers)}
    yield service(site, host, COMPONENT, port=jobs.port, **api, **common)
    body_mib = site.inventory.gateway.max_body_kib * COPIES // 1024
    memory_mib = WORKER_MIB + min(jobs.workers, 8) * body_mib
    seen = None if is_local else "/tmp/seen"  # noqa: S108
    own = {"seen": seen, "exceptions": {"way-out": AWAY} if jobs.callbacks else {}}
    yield service(site, host, COMPONENT, WORKER, port=jobs.port, memory_mib=memory_mib, **own, **common)
    yield State(host, STORE, "jobs", "jobs that wait, and results", "jobs", "/data")
    if site.inventory.monitoring:
        yield Rules("monitoring/rules/jobs.yml")
        yield ScrapeTarget("jobs", Endpoint(jobs.port, host, COMPONENT), {"host": host, "role": "jobs"})


def _settings(site: Site, jobs: Jobs, store: Endpoint, door: Endpoint) -> dict[str, Any]:
    """What the programs read, as `Settings` in jobs/store.py."""
    host = site.inventory.gateway.host
    return {
        "listen": "127.0.0.1" if site.is_local(host) else "0.0.0.0",  # noqa: S104 - the container's own networks
        "port": jobs.port,
        "store": site.address(store, host),
        "gateway": f"http://{site.address(door, host)}",
        "workers": jobs.workers,
        "model": jobs.model or next((name for pool in site.inventory.pools.values() for name in pool.background), ""),
        "depth": jobs.depth,
        "key_depth": jobs.key_depth,
        "ttl_s": jobs.ttl_s,
        "retries": jobs.retries,
        "keep_s": jobs.keep_s,
        "run_s": litellm.patience_s(site),
        "callbacks": list(jobs.callbacks),
        "lease_s": jobs.grace_s,
        "pollers": {poller_key(name): list(poller.models) for name, poller in jobs.pollers.items()},
        **declaration(COMPONENT)["settings"],
    }
