"""The balancer: HAProxy gives every replica only as many requests as it has slots, and bounds the queue of every pool.

Settings and their reasons were measured; see docs/decisions/0003-balancing.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from corral.components import Stage, edge, grafana, litellm, valkey
from corral.components.declared import service
from corral.config.client_names import added_models
from corral.config.inventory import Entrance, Jobs
from corral.contributions import (
    Backend,
    Contribution,
    Contributions,
    Dashboard,
    Door,
    Endpoint,
    File,
    Relabel,
    Route,
    Rules,
    ScrapeTarget,
    Secret,
    Service,
    SlotFigures,
    WebPage,
    is_system_folder,
    name_of_shared,
)
from corral.declarations import declaration, shipped
from corral.gateway import fast_lane, page
from corral.gateway.frontends import (
    EVERYWHERE,
    FULL,
    LARGE_KIB,
    MOST_ADMINS,
    entrance_address,
    entry,
    fronts,
    gateway_publish_address,
    named_doors,
    people_address,
)
from corral.gateway.routes import (
    API_PREFIX,
    AZURE_PREFIX,
    JARVIS_PATH,
    JOBS_PATHS,
    MODEL_ROUTES,
    READ_ROUTES,
    SESSION_PATH,
    SESSIONS_PATH,
    WORK_FOLDER,
)
from corral.plan.networks import INSIDE, OUTSIDE, alias
from corral.plan.site import Site
from corral.units import grouped as by_key

STAGE = Stage.BALANCER
COMPONENT = "haproxy"
FOLDER = "/usr/local/etc/haproxy"
CONFIG = f"{FOLDER}/haproxy.cfg"
RENDERED = ("haproxy.cfg", "farm.lua")
ASSETS = ("request_gate.lua", "outlier_ejection.lua", "fair.lua", "health.lua", "credentials.lua")
# For sites with shared servers.
SHARED_ASSETS = ("fair_swapping.lua", "models.lua")
# For sites with `gateway.fast_lane`.
FAST_ASSETS = ("fast_lane.lua",)
# The backend of the fast lane, and where HAProxy shows what went through it.
FAST, USAGE_PATH = "Fast", "/usage"
# For sites whose entrance has a certificate.
CERTIFICATE_ASSETS = ("certificate_reload.lua",)
CERTIFICATES = "/etc/corral/certificates"
AUTHORITIES = "/etc/corral/authorities"
AUTHORITY_THERE = "certificates and authorities are kept in such folders; nothing beside them is mounted"
CERTIFICATE_THERE = "the certificate is kept in that folder; nothing beside it is mounted, and nothing can be written"
GUARDED = "a key, one list of routes, limits for each address"
# Memory of the tables of addresses and keys, when full.
TABLES_MIB = 24
# Where the servers' states are kept over a reload; gone with the container, so that a new one looks for itself.
STATE_FILE = "/tmp/servers.state"  # noqa: S108 - a path in the container
# Where it keeps what it has counted over a reload, on a `local` host and in a container.
FIGURES_FILES = ("logs/haproxy.figures", "/tmp/figures")  # noqa: S108 - a path in the container
# Relative to the host's folder, in which supervisord starts every program.
LOCAL_SOCKET = "unix@logs/haproxy.sock mode 600"
# The backend with LiteLLM, for requests that are not refused at the door.
BEHIND_THE_DOOR = "Gateway"
# The secret that authorizes changes of the models on shared servers.
MODELS_KEY = "MODELS_KEY"
# Begins the backend that leases the slots of a pool whose servers take different requests.
#
# Its servers have the names of the replicas, and their states.
LEASES = "Leases."
# What such a backend has not: LiteLLM sends no request through it.
LEASE: dict[str, Any] = {
    "is_lease": True, "is_leased": False, "has_choice": False, "takes_files": False, "keeps_key": True,
    "key_header": "", "host_header": "", "models": (),
}  # fmt: skip
# Where HAProxy says how many slots of every pool are free; no pool's path is of one part only.
SLOTS_PATH = "/slots"
CONTROL_PORTS = (9999, 9998, 9997)
# Connections of clients that are always taken; idle ones are closed after 75 s.
FEWEST_CLIENTS = 2048
# Connections of browsers at one port for people, each with one or two to the program behind it.
MOST_READERS = 1024
# What a busy connection takes (two buffers and its own state), and HAProxy without any.
CONNECTION_KIB, BASE_MIB = 40, 96
# A refused client is told to wait this fraction of the pool's queue timeout.
RETRY_AFTER_SHARE = 12


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas of a pool that take the same request: same protocol, model name, path and key.

    Or a node that has models of several pools: it is one server, so its pools have one queue and share its slots.
    """

    name: str
    # The pool, or what stands for it in figures.
    pool: str
    backends: tuple[Backend, ...]
    # The same server as each of its pools has it.
    members: tuple[Backend, ...]

    @property
    def first(self) -> Backend:
        """Stands for what all of them share."""
        return self.backends[0]

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools whose requests it takes."""
        return tuple(member.pool for member in self.members)

    @property
    def slots(self) -> int:
        """Requests that they work on at the same time."""
        return sum(backend.slots for backend in self.backends)


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The balancer with its configuration, and a route for every pool (or replica) through it."""
    gateway = site.inventory.gateway
    is_direct = gateway.balancing == "direct"
    past = [backend for backend in published.backends if is_direct or backend.protocol == "cloud"]
    groups = list(grouped([backend for backend in published.backends if backend not in past]))
    times = Counter(backend.name for backend in past)
    for backend in past:
        name = backend.name if times[backend.name] == 1 else f"{backend.pool}.{backend.name}"
        is_cloud = backend.protocol == "cloud"
        url = backend.base_url if is_cloud else _url(backend, site.address(backend.endpoint, gateway.host))
        yield Route(backend, name, url, backend.slots)
    if not is_direct or gateway.entrance is not None:
        elsewhere = {backend.pool for backend in past} | {name for name, _ in added_models(site.inventory)}
        yield from _balancer(site, groups, elsewhere, published.web_pages)


def grouped(backends: list[Backend]) -> Iterator[Group]:
    """Backends by pool and by what a request to them looks like; the pool's own name when they are all alike."""
    pools: dict[str, dict[tuple[Any, ...], list[Backend]]] = {}
    nodes = by_key((backend.name, backend) for backend in backends if not backend.is_ours)
    for backend in backends:
        host = backend.endpoint.address if backend.scheme == "https" else ""
        is_shared = len(nodes.get(backend.name, ())) > 1
        alone = backend.name if is_shared or (backend.cost and backend.cost.budget_usd) else ""
        key = (
            backend.protocol, backend.upstream_model, backend.api_path, backend.secret, backend.key_header,
            backend.health_path, host, repr(sorted(backend.parameters.items())), backend.hides_thoughts,
            repr(backend.adapters), backend.cost, alone, backend.cache_field, backend.ca_file,
        )  # fmt: skip
        pools.setdefault(backend.pool, {}).setdefault(key, []).append(backend)
    for pool, kinds in pools.items():
        for alike in kinds.values():
            first, members = alike[0], nodes.get(alike[0].name, ())
            if len(members) <= 1:
                name = pool if len(kinds) == 1 else f"{pool}.{first.name}"
                yield Group(name, pool, tuple(alike), (first,))
            elif members[0].pool == pool:
                name = name_of_shared(first.name)
                yield Group(name, name, (first,), tuple(members))


def _balancer(site: Site, groups: list[Group], cloud: set[str], web_pages: Sequence[WebPage]) -> Iterator[Contribution]:
    gateway = site.inventory.gateway
    entry = Endpoint(gateway.balancer_port, gateway.host, COMPONENT)
    figures = Endpoint(gateway.stats_port, gateway.host, COMPONENT)
    values = _values(site, groups, cloud, web_pages)
    assets = (
        *ASSETS,
        *(SHARED_ASSETS if values["shared"] else ()),
        *(FAST_ASSETS if values["fast"] else ()),
        *(CERTIFICATE_ASSETS if values["entrance_certificate"] else ()),
        *(page.FILES if any(front["page"] for front in values["door"]["fronts"]) else ()),
    )
    values["figures_file"] = FIGURES_FILES[not site.is_local(gateway.host)]
    values["assets"] = [shipped(f"haproxy/{name}").read_text(encoding="utf-8") for name in assets]
    for name in RENDERED:
        yield File(gateway.host, COMPONENT, name, template=f"haproxy/{name}.j2", values=values)
    yield from (File(gateway.host, COMPONENT, name, asset=f"haproxy/{name}") for name in assets)
    yield _service(site, groups, values, (*RENDERED, *assets), web_pages)
    if values["shared"]:
        key = f"Bearer {{{values['shared'][0]['secret']}}}\n"
        yield Secret(MODELS_KEY, gateway.host, "opens /models/load, unload and swap", template=key)
    if _calls_edges(site, groups):
        yield from edge.client_secrets(gateway.host, "gateway")
    yield Door(Endpoint(gateway.port, gateway.host, COMPONENT))
    yield Rules("monitoring/rules/haproxy.yml")
    yield Dashboard("monitoring/dashboards/pool.json")
    labels = {"host": gateway.host, "role": "balancer"}
    yield ScrapeTarget("haproxy", figures, labels, relabel=_relabel(values["groups"], values["door"]["named"]))
    base = f"http://{site.address(entry, gateway.host)}"
    if _has_spill(site):
        yield SlotFigures(f"{base}{SLOTS_PATH}")
    if values["fast"]:
        yield ScrapeTarget("haproxy-fast-lane", figures, labels, USAGE_PATH)
    yield from _routes(groups, base, leased_pools(site, groups), is_by_pool=gateway.balancing == "slots")


def leased_pools(site: Site, groups: list[Group]) -> dict[str, bool]:
    """Pools whose slots are leased: LiteLLM has to know which replica is free before it builds the request.

    Those with several groups, and pools of `auto` to which their requests spill: the value says whether a request that
    waits there waits for other pools as well.
    """
    known = _groups_of_pools(groups)
    unlike = {pool for pool, count in known.items() if count > 1}
    auto = site.inventory.gateway.auto
    chains = [{tier.pool, *tier.spill} for tier in auto.tiers if tier.spill] if auto else []
    spilling = set().union(*(chain for chain in chains if chain & unlike))
    return {pool: pool in spilling for pool in known if pool in unlike | spilling}


def _routes(groups: list[Group], base: str, leased: Collection[str], *, is_by_pool: bool) -> Iterator[Route]:
    """A route for every group, or for every replica of it."""
    per_pool = _groups_of_pools(groups)
    for group in groups:
        for backend in group.members if is_by_pool or len(group.members) > 1 else group.backends:
            is_only = per_pool[backend.pool] == 1
            if is_by_pool:
                name = backend.pool if is_only else f"{backend.pool}.{backend.name}"
                part, slots = "any", group.slots
            else:
                name = backend.name if len(group.members) == 1 else f"{backend.pool}.{backend.name}"
                part, slots = backend.name, backend.slots
            url = f"{base}/{group.name}/{part}{backend.api_path}"
            lease = f"{base}/{LEASES}{backend.pool}/any/-/lease" if backend.pool in leased else ""
            yield Route(backend, name, url, slots, lease_url=lease)


def _groups_of_pools(groups: list[Group]) -> Counter[str]:
    """How many groups every pool has."""
    return Counter(pool for group in groups for pool in group.pools)


def _relabel(groups: list[dict[str, Any]], doors: list[dict[str, Any]]) -> tuple[Relabel, ...]:
    """Labels `pool` and `replica` for HAProxy's own `proxy` and `server`."""
    full = ((door["pool"], f"{FULL}{door['name']}") for door in doors)
    pools = by_key([*((group["pool"], group["name"]) for group in groups), *full])
    named = (Relabel("proxy", tuple(names), "pool", pool) for pool, names in pools.items())
    leases = tuple(group["name"] for group in groups if group["is_lease"])
    twice = (Relabel("proxy", leases, "", left_out="haproxy_server_.+"),) if leases else ()
    return (*twice, *named, Relabel("server", (), "replica"))


def _url(backend: Backend, address: str) -> str:
    return f"{backend.scheme}://{address}{backend.api_path}"


def _service(
    site: Site, groups: list[Group], values: dict[str, Any], files: tuple[str, ...], web_pages: Sequence[WebPage]
) -> Service:
    gateway = site.inventory.gateway
    endpoints = [backend.endpoint for group in groups for backend in group.backends]
    is_far = any(site.is_outside(endpoint, gateway.host) for endpoint in endpoints)
    authorities = {
        (item.ca_file, _authority(site, item)) for group in groups for item in group.backends if item.ca_file
    }
    mounts = (*_mounts(site), *(() if site.is_local(gateway.host) else sorted(authorities)))
    keys = (edge.AUTHORITY, edge.CLIENTS["gateway"]) if _calls_edges(site, groups) else ()
    fast_keys = sorted({item["secret"] for item in (values["fast"] or {}).get("pools", ()) if item["secret"]})
    is_mounted = any(is_system_folder(folder) for folder, _ in mounts)
    behind = [item.endpoint for item in web_pages]
    if site.inventory.jobs:
        behind.append(_jobs_endpoint(site.inventory.jobs, gateway.host))
    return service(
        site,
        gateway.host,
        COMPONENT,
        port=gateway.port,
        admin_port=gateway.admin_port,
        balancer_port=gateway.balancer_port,
        stats_port=gateway.stats_port,
        inside=gateway_publish_address(site),
        entrance=(
            *_entrance_port(site),
            *((item.port, people_address(site), item.protection) for item in web_pages),
        ),
        stats_open="127.0.0.1" if site.sleepers else site.publish_address(gateway.host),
        program=() if site.is_local(gateway.host) else ("haproxy",),
        memory_mib=BASE_MIB + TABLES_MIB + values["most_connections"] * CONNECTION_KIB // 1024,
        keys=(
            *keys,
            *((MODELS_KEY,) if values["shared"] else ()),
            *fast_keys,
            *(item.secret for item in _limited(web_pages)),
        ),
        files=tuple((name, "") for name in files),
        mounts=mounts,
        calls=(*endpoints, *litellm.workers_behind(site), *_counters(site), *behind),
        exceptions=({"way-out": "it calls servers on other machines"} if is_far else {})
        | ({"host-mount": AUTHORITY_THERE if authorities else CERTIFICATE_THERE} if is_mounted else {}),
    )


def _counters(site: Site) -> tuple[Endpoint, ...]:
    """Where several workers of LiteLLM count together; nothing for one."""
    gateway = site.inventory.gateway
    return (Endpoint(gateway.cache_port, gateway.host, valkey.COMPONENT),) if gateway.workers > 1 else ()


def _entrance_port(site: Site) -> tuple[tuple[int, str, str], ...]:
    entrance = site.inventory.gateway.entrance
    return ((entrance.port, entrance_address(site, entrance), GUARDED),) if entrance else ()


def _mounts(site: Site) -> tuple[tuple[str, str], ...]:
    gateway = site.inventory.gateway
    if site.is_local(gateway.host):
        return ()
    entrance = gateway.entrance
    own = (f"./{COMPONENT}", FOLDER)
    if entrance is None or not entrance.certificate:
        return (own,)
    return own, (str(PurePosixPath(entrance.certificate).parent), CERTIFICATES)


def _authority(site: Site, backend: Backend) -> str:
    """The file with the authority of a node's certificate as HAProxy sees it, or HAProxy's word for the public ones."""
    is_own = not site.is_local(site.inventory.gateway.host)
    return (f"{AUTHORITIES}/{backend.name}.pem" if is_own else backend.ca_file) if backend.ca_file else "@system-ca"


def _certificate(entrance: Entrance | None, *, is_local: bool) -> str:
    """Path of the entrance's certificate as HAProxy sees it; empty without one."""
    path = (entrance and entrance.certificate) or ""
    return path if is_local or not path else f"{CERTIFICATES}/{PurePosixPath(path).name}"


def _calls_edges(site: Site, groups: list[Group]) -> bool:
    """Whether replicas are on other hosts of the site."""
    endpoints = [backend.endpoint for group in groups for backend in group.backends]
    return edge.is_called(site, endpoints, site.inventory.gateway.host)


def _has_spill(site: Site) -> bool:
    auto = site.inventory.gateway.auto
    return auto is not None and any(tier.spill for tier in auto.tiers)


def control_port(site: Site) -> int:
    """Port of HAProxy's runtime API, on the container's own loopback address."""
    gateway = site.inventory.gateway
    public = {section.port for section in (gateway.entrance, site.inventory.chat) if section}
    taken = {gateway.port, gateway.admin_port, gateway.balancer_port, gateway.stats_port, *public}
    return next(port for port in CONTROL_PORTS if port not in taken)


def answer_timeout_s(site: Site, pool: str) -> int:
    """Longest time in seconds that one answer of a pool may take, without the wait for a slot."""
    return site.inventory.pools[pool].timeout_s or site.inventory.gateway.timeout_s


def _values(site: Site, groups: list[Group], cloud: set[str], web_pages: Sequence[WebPage]) -> dict[str, Any]:
    gateway = site.inventory.gateway
    is_local = site.is_local(gateway.host)
    bind = "127.0.0.1" if is_local else "*"
    certificate = _certificate(gateway.entrance, is_local=is_local)
    leased = leased_pools(site, groups)
    values = [_group_values(site, group, is_leased=leased.keys() >= set(group.pools)) for group in groups]
    leases = [_lease_values(site, pool, values) | {"spills": spills} for pool, spills in leased.items()]
    # What admits the requests of every pool.
    queues = [
        *({**value, "pools": [pool for pool in value["pools"] if pool not in leased]} for value in values),
        *leases,
    ]
    most_clients = _most_clients(queues)
    is_dual = site.has_ipv6 and not is_local
    everywhere = EVERYWHERE if is_dual else bind
    links = [(item.title, item.url) for item in web_pages]
    dashboards = [("Grafana", url)] if (url := grafana.url_of(site)) else []
    pages = {
        True: page.data(site.inventory, queues, is_inside=True, own_links=[*links, *dashboards]),
        False: page.data(site.inventory, queues, is_inside=False, own_links=links),
    }
    inward = [
        front | {"page": pages[front["is_inside"]]} for front in fronts(gateway, everywhere, most_clients, certificate)
    ]
    return {
        "entry": _own_addresses(site, gateway.balancer_port, INSIDE),
        "entrance_certificate": certificate,
        "most_connections": 2 * sum(front["most_clients"] for front in inward)
        + MOST_ADMINS
        + FEWEST_CLIENTS // 8
        + 2 * MOST_READERS * len(web_pages),
        "model_routes": " ".join(MODEL_ROUTES),
        "read_routes": " ".join(READ_ROUTES),
        "short_routes": " ".join(
            route.removeprefix("/v1") for route in (*MODEL_ROUTES, *READ_ROUTES) if route.startswith("/v1/")
        ),
        "served": ", ".join((*MODEL_ROUTES, *READ_ROUTES, *_further_paths(site))),
        "sessions": {"path": SESSIONS_PATH, "below": SESSION_PATH} if gateway.conversations else None,
        "api_prefix": API_PREFIX,
        "jobs": _jobs(site),
        "work": WORK_FOLDER if site.inventory.jobs and site.inventory.jobs.pollers else "",
        "azure_prefix": AZURE_PREFIX,
        **declaration(COMPONENT)["settings"],
        "large_body": LARGE_KIB * 1024,
        "door": {
            "fronts": inward,
            "admin": _own_addresses(site, gateway.admin_port, OUTSIDE),
            "most_admins": MOST_ADMINS,
            "large_at_once": litellm.large_bodies_at_once(gateway),
            "named": list(named_doors(site.inventory, queues, cloud)),
            "full": FULL,
            "behind": BEHIND_THE_DOOR,
            "patience_s": litellm.patience_s(site),
            "workers": [
                {"name": worker.service, "address": site.address(worker, gateway.host)}
                for worker in litellm.workers_behind(site)
            ],
            "counters": [site.address(store, gateway.host) for store in _counters(site)],
        },
        "web_pages": [_web_page(site, item, everywhere) for item in web_pages],
        "accounts": [
            {"page": item, "key": site.secret_beside(gateway.host, item.secret)} for item in _limited(web_pages)
        ],
        "most_readers": MOST_READERS,
        "successor_address": f"127.0.0.1:{gateway.balancer_port}",
        "figures": _figures(site, bind),
        "is_local": is_local,
        "control": LOCAL_SOCKET if is_local else f"ipv4@127.0.0.1:{control_port(site)}",
        "state_file": "" if is_local else STATE_FILE,
        "longest_answer_s": max((answer_timeout_s(site, pool) for pool in site.inventory.pools), default=1),
        "groups": [*values, *leases],
        "authority": site.secret_beside(gateway.host, edge.AUTHORITY),
        "certificate": site.secret_beside(gateway.host, edge.CLIENTS["gateway"]),
        "models_key": site.secret_beside(gateway.host, MODELS_KEY),
        "shared": list(_shared(site, groups)),
        "sleepers": [
            {"name": value["name"], "machines": machines}
            for value in (*values, *leases)
            if (machines := [name for name in value["machines"] if name in site.sleepers])
        ],
        "fast": _fast(site, groups) if gateway.fast_lane else None,
        "slots_path": SLOTS_PATH if _has_spill(site) else "",
        "pools": [
            {"name": pool, "groups": [value for value in queues if pool in value["pools"]]}
            for pool in _groups_of_pools(groups)
        ],
        "has_background": any(pool.background for pool in site.inventory.pools.values()),
    }


def _further_paths(site: Site) -> list[str]:
    """What else clients may call on this site."""
    sessions = [SESSIONS_PATH] if site.inventory.gateway.conversations else []
    return [*sessions, *(JOBS_PATHS if site.inventory.jobs else ())]


def _web_page(site: Site, page: WebPage, bind: str) -> dict[str, str]:
    address = site.address(page.endpoint, site.inventory.gateway.host)
    return {"name": page.name, "entry": entry(bind, page.port), "address": address}


def _limited(web_pages: Sequence[WebPage]) -> list[WebPage]:
    """Pages whose accounts have limits."""
    return [item for item in web_pages if item.rpm or item.parallel]


def _jobs(site: Site) -> dict[str, str] | None:
    """Where requests for jobs go, and the paths by which they are known."""
    jobs, host = site.inventory.jobs, site.inventory.gateway.host
    if jobs is None:
        return None
    return {
        "address": site.address(_jobs_endpoint(jobs, host), host),
        "paths": " ".join((*JOBS_PATHS, *([JARVIS_PATH] if jobs.jarvis_path else []))),
        "folders": " ".join(f"{path}/" for path in JOBS_PATHS),
    }


def _jobs_endpoint(jobs: Jobs, host: str) -> Endpoint:
    return Endpoint(jobs.port, host, "jobs")


def _fast(site: Site, groups: list[Group]) -> dict[str, Any]:
    """The backend of the fast lane, the pools that it takes, and the buckets in which it counts times."""
    leased, host = leased_pools(site, groups), site.inventory.gateway.host
    pools = [
        {
            "pool": pool,
            "kind": group.first.kind,
            "path": f"/{group.name}/any{group.first.api_path}",
            "secret": group.first.secret,
            "key_file": site.secret_beside(host, group.first.secret) if group.first.secret else "",
            "limits": litellm.request_limits(site, pool, group.first.kind),
        }
        for group in groups
        for pool in group.pools
        if not fast_lane.reason_against(site, pool, group.backends, is_one_queue=pool not in leased)
    ]
    return {"backend": FAST, "pools": pools, "buckets": litellm.buckets(site)}


def _figures(site: Site, bind: str) -> str:
    """Where its metrics are; not on networks that the project did not make."""
    gateway = site.inventory.gateway
    added = site.host(gateway.host).services.get(COMPONENT)
    if added is None or not added.networks:
        return f"{bind}:{gateway.stats_port}"
    return _own_addresses(site, gateway.stats_port, OUTSIDE, INSIDE)


def _own_addresses(site: Site, port: int, *sides: str) -> str:
    """Where HAProxy listens for some only: on one of its networks, or on loopback on a `local` host, and for itself."""
    itself, *names = site.own_addresses(site.inventory.gateway.host, *(alias(COMPONENT, side) for side in sides))
    names = [f"ipv4@{name}" for name in names] if site.has_ipv6 else names
    return ",".join(f"{name}:{port}" for name in (*names, itself))


def _most_clients(queues: list[dict[str, Any]]) -> int:
    """Connections of clients at once: twice what the farm can hold, for those that are idle or refused."""
    held: int = sum(queue["slots"] + queue["depth"] for queue in queues if queue["pools"])
    return max(FEWEST_CLIENTS, 2 * held)


def _queue_values(site: Site, pools: Sequence[str]) -> dict[str, Any]:
    """The queue before what these pools share: as many wait as the one with the most may let wait."""
    found = [site.inventory.pools[name] for name in pools]
    queues = [pool.queue or site.inventory.gateway.queue for pool in found]
    depth, timeout_s = max(queue.depth for queue in queues), queues[0].timeout_s
    return {
        "pools": pools,
        "depth": depth,
        "background_depth": (depth + 1) // 2 if any(pool.background for pool in found) else 0,
        "queue_timeout_s": timeout_s,
        "retry_after_s": max(1, timeout_s // RETRY_AFTER_SHARE),
    }


def _lease_values(site: Site, pool: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A backend in front of a pool's groups: it has their replicas, slots and states, and the pool's queue."""
    members = [group for group in groups if pool in group["pools"]]
    servers = [{**server, "group": group["name"]} for group in members for server in group["servers"]]
    return _queue_values(site, (pool,)) | LEASE | {
        "name": f"{LEASES}{pool}",
        "pool": pool,
        "has_sessions": any(group["is_chat"] for group in members) and len(servers) > 1,
        "machines": sorted(set().union(*(group["machines"] for group in members))),
        "slots": sum(group["slots"] for group in members),
        "servers": [server | {"id": number} for number, server in enumerate(servers, start=1)],
    }  # fmt: skip


def _group_values(site: Site, group: Group, *, is_leased: bool) -> dict[str, Any]:
    return _queue_values(site, group.pools) | {
        "name": group.name,
        "pool": group.pool,
        "is_lease": False,
        "is_leased": is_leased,
        "is_chat": group.first.kind == "chat",
        "machines": sorted({site.machine_of(item) for item in group.backends}),
        "slots": group.slots,
        "key_header": group.first.key_header.lower(),
        "answer_timeout_s": answer_timeout_s(site, group.pools[0]),
        "health_path": group.first.health_path,
        "health_status": "200,401,403" if group.first.health_path == "/v1/models" else "200",
        "host_header": group.first.endpoint.address if group.first.scheme == "https" else "",
        "keeps_key": any(
            not site.is_behind_edge(item.endpoint, site.inventory.gateway.host) for item in group.backends
        ),
        "has_sessions": group.first.kind == "chat" and len(group.backends) > 1,
        "has_choice": len(group.backends) > 1,
        "probe": _probe(group.first),
        "takes_files": any(item.kind == "transcription" for item in group.members),
        "models": [json.dumps(item.upstream_model, ensure_ascii=False) for item in group.members],
        "servers": [_server(site, number, backend) for number, backend in enumerate(group.backends, start=1)],
    }


def _probe(backend: Backend) -> dict[str, str]:
    """Path and body, as a Lua string, of the smallest request that any sound server of this kind answers."""
    known = declaration(COMPONENT)["probes"]
    probe = known.get(backend.protocol, {}).get(backend.kind) or known["openai"][backend.kind]
    body = json.dumps({"model": backend.upstream_model, **probe["body"]})
    return {"path": f"{backend.api_path}{probe['path']}", "body_text": json.dumps(body)}


def _shared(site: Site, groups: list[Group]) -> Iterator[dict[str, Any]]:
    """Servers with several pools: how many of their models are in memory at once, and what each pool may take."""
    alone = Counter(backend.pool for group in groups for backend in group.backends)
    members = by_key((backend.endpoint, (group, backend)) for group in groups for backend in group.backends)
    for endpoint, found in members.items():
        replicas = site.members(endpoint.host, endpoint.service)
        shared = replicas[0].shared if replicas else None
        if shared is None:
            continue
        start_s = {item.pool: item.start_timeout_s for item in replicas}
        gateway = site.inventory.gateway
        is_far = site.is_behind_edge(endpoint, gateway.host)
        name = f"Shared.{endpoint.host}.{endpoint.service}"
        yield {
            "name": name,
            "via": f"http://127.0.0.1:{gateway.balancer_port}/-/{name}" if is_far else "",
            "address": site.address(endpoint, gateway.host),
            "edge_name": edge.server_name(endpoint) if is_far else "",
            "host": endpoint.host,
            "secret": found[0][1].secret,
            "loaded": shared.loaded,
            "turn_s": shared.turn_s,
            "members": [
                {
                    "name": group.name,
                    "pool": group.pool,
                    "server": backend.name,
                    "takes_turns": alone[group.pool] == 1,
                    "answer_s": answer_timeout_s(site, group.pool),
                    "start_s": start_s[group.pool],
                }
                for group, backend in found
            ],
        }


def _server(site: Site, number: int, backend: Backend) -> dict[str, Any]:
    is_far = site.is_behind_edge(backend.endpoint, site.inventory.gateway.host)
    return {
        "name": backend.name,
        "id": number,
        "address": site.address(backend.endpoint, site.inventory.gateway.host),
        "slots": backend.slots,
        "model_text": json.dumps(backend.upstream_model, ensure_ascii=False),
        "is_ours": backend.is_ours,
        "tier": node.tier or "" if (node := site.inventory.nodes.get(backend.name)) else "",
        "authority": _authority(site, backend) if backend.scheme == "https" else "",
        "edge_name": edge.server_name(backend.endpoint) if is_far else "",
        "host": backend.endpoint.host,
    }
