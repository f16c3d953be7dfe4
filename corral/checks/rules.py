"""What must hold once a site is resolved; what must hold before that is in `references`.

`rules.yaml` says what each rule demands and what is told when it is broken; docs/reference/rules.md is made from it,
`tests/rules` has a pair of inventories for each. Rules about one component alone are in its folder.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from corral.checks.registry import Findings, Row, Texts, findings, known
from corral.components import component, components, image_keys
from corral.components.additions import summed
from corral.components.serving import engine_key, one_of_each_sort
from corral.config.client_names import kind_of
from corral.config.file_names import ollama_manifest, tag_of
from corral.config.inventory import Consumer, Host, Inventory, KeyBudget
from corral.contributions import Backend, Contributions, Service
from corral.errors import Finding, KeyPath, did_you_mean
from corral.plan.advice import what_fits
from corral.plan.cards import VRAM_RESERVE_MIB
from corral.plan.devices import CUDA13_FLOOR, VENDORS, backend_of, is_pinned
from corral.plan.memory import MIB
from corral.plan.own_image import CUDA11_FLOOR, CUDA12_FLOOR, build_command, is_own
from corral.plan.routing import pools_behind
from corral.plan.site import Card, Replica, Site, swarm_name
from corral.plan.sizes import billions, weights_mib
from corral.units import grouped

components()  # with their rules
TEXTS = Texts.beside(__file__)
# Host memory of one server besides its buffers: program, tokenizer, threads.
PROGRAM_MIB = 150
# More threads than this for each core cost more than they bring.
THREADS_PER_CORE = 8
LAST_PORT = 65535
# Longest name of a host in DNS; other containers find a service by its name.
LABEL_LENGTH = 63
CUDA13_WORDS = ("cuda13", "cuda-13", "cuda:13", "cu13")
# From here on NVIDIA's driver locks clocks.
VOLTA = (7, 0)
STOCK_CUDA = "ggml-org/llama.cpp:server-cuda"
# How many of several equal things a message names.
TOLD = 5


def check_plan(site: Site, found: Contributions) -> list[Finding]:
    """Every rule that a resolved site breaks, with those of its components."""
    own = [finding for check in CHECKS for finding in check(site, found)]
    return [*own, *findings("plan", site, found)]


def _pools_of_services(site: Site) -> dict[tuple[str, str], str]:
    """Pool of a service by its host and name."""
    return {(replica.host, replica.service): replica.pool for replica in site.replicas}


def _more(items: Sequence[object]) -> str:
    return f" ({len(items) - 1} more as well)" if len(items) > 1 else ""


def _listed(items: Iterable[object]) -> str:
    return " and ".join(map(str, items))


# --- ports, names, addresses -----------------------------------------------------------------------------------------


def _ports(site: Site, found: Contributions) -> Findings:
    pools = _pools_of_services(site)
    for service in found.services:
        pool = pools.get((service.host, service.name))
        for port in (port for port in service.ports if port.publish and not port.protection):
            path: KeyPath = ("pools", pool) if pool else ("hosts", service.host)
            yield TEXTS.finding("port-protected/open", path, name=service.name, port=port, component=service.component)
    published = ((item, port) for item in found.services for port in item.ports if port.publish)
    owners = grouped(((item.host, port.publish, port.number), item.name) for item, port in published)
    clashes = grouped(
        ((host, tuple(pools.get((host, name), name) for name in names)), (number, names))
        for (host, _, number), names in owners.items()
        if len(names) > 1
    )
    for (host, who), ports in clashes.items():
        number, names = ports[0]
        pool = next((name for name in reversed(who) if name in site.inventory.pools), "")
        shared = next((name for name in reversed(names) if name in site.host(host).shared), "")
        path = ("pools", pool, "ports") if pool else _place_of_port(site.inventory, number)
        if shared:
            pool, path = "", ("hosts", host, "shared", shared, "port")
        size = sum(replica.pool == pool for replica in site.replicas) if pool else 1
        values = {"number": number, "host": host, "names": _listed(names), "more": _more(ports), "key": path[-1]}
        yield TEXTS.finding("port-unique/taken", path, free=_free_port(found, number, size), **values)


def _place_of_port(inventory: Inventory, number: int) -> KeyPath:
    """Where the inventory says a port that belongs to no pool."""
    for section in ("tracing", "monitoring", "chat", "jobs", "gateway"):
        for key, value in getattr(inventory, section) or ():
            if key.endswith("port") and value == number:
                return section, key
    return ("gateway", "port")


def _free_port(found: Contributions, number: int, count: int) -> int:
    """The first of as many ports in a row as are wanted, above the one that is taken."""
    taken = {port.number for service in found.services for port in service.ports}
    while number <= LAST_PORT and not taken.isdisjoint(range(number, number + count)):
        number += 1
    return number


def _replicas_of_pools(site: Site, _found: Contributions) -> Findings:
    for pool, replicas in grouped((item.pool, item) for item in site.replicas).items():
        port, name = max(item.port for item in replicas), max((item.service for item in replicas), key=len)
        yield from TEXTS.broken(
            ("pools", pool),
            (port > LAST_PORT, "port-range/beyond", "ports"),
            (len(name) > LABEL_LENGTH, "name-length/long", "short"),
            port=port, last=LAST_PORT, less=port - LAST_PORT, name=name, length=len(name), longest=LABEL_LENGTH,
        )  # fmt: skip


def _names(site: Site, found: Contributions) -> Findings:
    pools, told = _pools_of_services(site), set[str]()
    for (host, name), times in Counter((service.host, service.name) for service in found.services).items():
        if times > 1:
            told.add(f"{host}-{name}")
            pool = pools.get((host, name))
            path = ("pools", pool, "short" if site.inventory.pools[pool].short else "on") if pool else ("hosts", host)
            yield TEXTS.finding("name-unique/services", path, times=times, host=host, name=name)
    backends: dict[str, Backend] = {}
    for backend in found.backends:
        other, name, pool = backends.setdefault(backend.name, backend), backend.name, backend.pool
        is_other = other.pool != pool and (other.is_ours or backend.is_ours) and name not in told
        row = (is_other, "name-unique/servers", "")
        yield from TEXTS.broken(("pools", pool), row, other=other.pool, pool=pool, name=name)
    for name, times in Counter(route.name for route in found.routes).items():
        if times > 1 and name not in backends and name not in told:
            yield TEXTS.finding("name-unique/deployments", ("pools", name), times=times, name=name)


def _addresses(site: Site, found: Contributions) -> Findings:
    first: dict[str, str] = {}
    for name in sorted({service.host for service in found.services}):
        address = site.host(name).address
        other = first.setdefault(address, name)
        row = (other != name, "address-distinct/shared", "address")
        yield from TEXTS.broken(("hosts", name), row, name=name, other=other, address=address)
    gateway, monitoring, tracing = site.inventory.gateway, site.inventory.monitoring, site.inventory.tracing
    wanted = {(backend.endpoint.host, gateway.host) for backend in found.backends}
    wanted |= {(target.endpoint.host, monitoring.host) for target in found.targets} if monitoring else set()
    wanted |= {(tracing.host, gateway.host)} if tracing and tracing.host else set()
    for host, reader in sorted(wanted):
        address = site.host(host).address if host and host != reader else ""
        yield from TEXTS.first(
            ("hosts", host),
            (address and site.is_local(host), "address-reachable/local", "runtime"),
            (address and ipaddress.ip_address(address).is_loopback, "address-reachable/loopback", "address"),
            reader=reader, host=host, address=address,
        )  # fmt: skip


# --- memory ----------------------------------------------------------------------------------------------------------


def _vram(site: Site, found: Contributions) -> Findings:
    tenants = grouped(
        ((service.host, claim.number), (service.name, claim.vram_mib))
        for service in found.services
        for claim in service.tenancies
    )
    pools = _pools_of_services(site)
    rooms = {key: site.cards[key[0]][key[1] - 1].vram_mib - VRAM_RESERVE_MIB for key in tenants}
    full = grouped(
        ((host, tuple(pools.get((host, name), name) for name, _ in claims), rooms[host, number], wanted), number)
        for (host, number), claims in tenants.items()
        if (wanted := sum(mib for _, mib in claims)) > rooms[host, number]
    )
    guessed = {(item.host, item.service): item.model for item in site.replicas if item.is_guess}
    for (host, who, room, wanted), numbers in full.items():
        claims = tenants[host, numbers[0]]
        card = site.cards[host][numbers[0] - 1]
        here = [item for item in site.replicas if card in item.cards]
        shared = next((name for name, _ in reversed(claims) if name in site.host(host).shared), "")
        models = {guessed[host, name] for name, _ in claims if (host, name) in guessed}
        is_known = sum(mib for name, mib in claims if (host, name) not in guessed) > room or not models
        yield TEXTS.finding(
            "vram/full" if is_known else "vram/guessed",
            ("hosts", host, "shared", shared) if shared else ("pools", who[-1], "on"),
            number=numbers[0], host=host, lacking=wanted - room, more=_more(numbers), room=room, wanted=wanted,
            parts=", ".join(f"{name} {mib}{_turns(site, host, name)}" for name, mib in claims),
            models=", ".join(sorted(models)), hint=what_fits(site, here, wanted - room),
        )  # fmt: skip


def _turns(site: Site, host: str, service: str) -> str:
    """Of which models a shared server's share is the worst set; empty for a server with one model."""
    members = sorted(site.members(host, service), key=lambda item: (-item.vram_mib, item.pool))
    shared = members[0].shared if members else None
    if shared is None:
        return ""
    parts = " + ".join(f"{item.pool} {max(item.card_mib)}" for item in members[: shared.loaded])
    return f" = {parts}, the largest {min(shared.loaded, len(members))} of {len(members)}"


def _memory_of_host(site: Site, name: str, host: Host, services: Iterable[Service]) -> Findings:
    is_shared = any(card.unified_memory for card in site.cards[name])
    limits = sorted((-site.host_memory_mib(service), service.name) for service in services)
    room = round(((host.ram_gib or 0) - host.os_reserve_gib) * 1024)
    wanted = -sum(mib for mib, _ in limits)
    yield from TEXTS.broken(
        ("hosts", name),
        (host.ram_gib is None and is_shared, "host-ram/unknown", ""),
        (host.ram_gib is not None and wanted > room, "host-ram/full", "ram_gib"),
        name=name, lacking=wanted - room, room=room, who="containers and cards" if is_shared else "the containers",
        wanted=wanted, largest=", ".join(f"{service} {-mib}" for mib, service in limits[:TOLD]),
    )  # fmt: skip


def _servers(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site):
        cache, limit, swap = replica.cache_ram_mib, replica.memory_mib, replica.engine.memory_swap_mib
        # Weights in host memory that are only mapped can be given back and read again.
        is_mapped = not replica.engine.mlock and replica.engine.load_mode in (None, "mmap")
        own = replica.memory.locked(is_mapped=is_mapped) // MIB + PROGRAM_MIB if replica.memory else 0
        for is_broken, text, key in (
            (cache >= limit, "cache-ram/large", "cache_ram_mib"),
            (own and own + cache > limit, "server-ram/full", "memory_mib"),
            (swap is not None and swap < limit, "swap/less", "memory_swap_mib"),
        ):
            values = {"cache": cache, "limit": limit, "swap": swap, "own": own, "wanted": own + cache}
            yield from TEXTS.broken(engine_key(site, replica, key), (is_broken, text, ""), **values)
        look = getattr(component(replica.weights.served_by.component), "extra_args_troubles", None)
        place = engine_key(site, replica, "extra_args")
        for trouble in look(site, replica) if look and replica.engine.extra_args else ():
            yield TEXTS.finding("server-flag/trouble", (*place, trouble.number), trouble=trouble)


# --- hosts, processors and cards -------------------------------------------------------------------------------------


def _hosts(site: Site, found: Contributions) -> Findings:
    services = grouped((service.host, service) for service in found.services)
    for name, host in site.inventory.hosts.items():
        own, cards, is_local = services.get(name, []), site.cards[name], site.is_local(name)
        ours = [card for card in cards if card.vendor == "nvidia"]
        makers = sorted({card.vendor for card in cards} - {"nvidia"})
        by_slot = [card.number for card in ours if card.pinned_by == "PCI slot"]
        threads = sum(service.threads for service in own)
        yield from _memory_of_host(site, name, host, own)
        yield from TEXTS.broken(
            ("hosts", name),
            (not own, "host-used/idle", ""),
            (host.selinux and is_local, "host-setting/selinux", "selinux"),
            (host.cpu.cores and threads > THREADS_PER_CORE * host.cpu.cores, "threads/many", "cpu.cores"),
            (makers and not is_local and not host.device_groups, "device-groups/missing", "gpus"),
            (host.gpu_access and (not ours or is_local), "gpu-access/nothing", "gpu_access"),
            (host.gpu_access == "cdi" and by_slot, "gpu-access/slot", "gpu_access"),
            name=name, host=host, threads=threads, makers=_listed(makers), numbers=", ".join(map(str, by_slot)),
        )  # fmt: skip
        for card in cards:
            for key in ("power_limit_w", "clock_lock_mhz"):
                yield from _limits_refused(card, key, is_local=is_local)
        yield from _additions(name, host, {service.name: service for service in own}, is_local=is_local)


def _swarm(site: Site, found: Contributions) -> Findings:
    """What Docker Swarm cannot hold, and what would have no effect there."""
    inventory = site.inventory
    if not site.is_swarm:
        yield from TEXTS.broken((), (inventory.encrypted_networks is not None, "swarm-holds/not", "encrypted_networks"))
        return
    gateway, tunnel = inventory.gateway, inventory.gateway.tunnel
    addresses = {
        "gateway.address": gateway.address,
        "gateway.entrance.address": gateway.entrance and gateway.entrance.address,
        "gateway.tunnel.address": tunnel and tunnel.address,
    }
    for name, node in inventory.nodes.items():
        yield from TEXTS.broken(("nodes", name), (node.dials_in, "swarm-holds/dials-in", "dials_in"))
    for key, address in addresses.items():
        yield from TEXTS.broken((), (address, "swarm-holds/address", key))
    yield from TEXTS.broken((), (inventory.container_prefix, "swarm-holds/containers", "container_prefix"))
    for name, host in inventory.hosts.items():
        yield from _host_in_swarm(name, host)
    for replica in site.replicas:
        yield from TEXTS.broken(
            ("pools", replica.pool),
            (inventory.pools[replica.pool].ports, "swarm-holds/loopback", "ports"),
            (is_own(_image_of(found, replica)), "swarm-holds/built", ""),
        )
        swap = engine_key(site, replica, "memory_swap_mib")
        yield from TEXTS.broken(swap, (replica.engine.memory_swap_mib, "swarm-holds/swap", ""))
        shared = ("hosts", replica.host, "shared", replica.service, "port")
        yield from TEXTS.broken(shared, (replica.shared and replica.shared.port, "swarm-holds/loopback", ""))
    pools = _pools_of_services(site)
    for service in found.services:
        place = (service.host, service.name)
        path = ("pools", pools[place]) if place in pools else ("hosts", service.host)
        label = f"{inventory.name}_{swarm_name(*place)}"
        reason = ", ".join(_not_in_swarm(service))
        yield from TEXTS.broken(
            path,
            (reason, "swarm-holds/cannot", ""),
            (len(label) > LABEL_LENGTH, "swarm-holds/long", ""),
            name=service.name, reason=reason, label=label, length=len(label), longest=LABEL_LENGTH,
        )  # fmt: skip


def _host_in_swarm(name: str, host: Host) -> Findings:
    """What is said of a host that Swarm does not know."""
    yield from TEXTS.broken(
        ("hosts", name),
        (host.runtime == "local", "swarm-holds/local", "runtime"),
        (host.folder, "swarm-holds/folder", "folder"),
        (host.selinux, "swarm-holds/selinux", "selinux"),
        (host.gpu_access in ("reservation", "cdi"), "swarm-holds/gpu-access", "gpu_access"),
        (not host.models_dir.startswith("/"), "swarm-holds/relative", "models_dir"),
    )
    for number, gpu in enumerate(host.gpus):
        is_limited = gpu.power_limit_w is not None or gpu.clock_lock_mhz is not None
        yield from TEXTS.broken(("hosts", name, "gpus", number), (is_limited, "swarm-holds/limits", ""))


def _not_in_swarm(service: Service) -> Iterator[str]:
    """What of a service Swarm has no word for."""
    rows = (
        (service.devices, "device files of AMD and Intel cards"),
        (service.is_on_host, "the host's own network"),
        (service.joins, "a network that exists already"),
        (service.cpuset, "cpuset"),
        ("confined" in service.exceptions, "security options"),
        ("host-gateway" in service.extra_hosts.values(), "host-gateway in extra_hosts"),
    )
    yield from (words for is_there, words in rows if is_there)


def _image_of(found: Contributions, replica: Replica) -> str:
    key = (replica.host, replica.service)
    return next((item.image for item in found.services if (item.host, item.name) == key), "")


def _limits_refused(card: Card, key: str, *, is_local: bool) -> Findings:
    """A limit of a card that would have no effect."""
    is_given, is_ours = getattr(card, key) is not None, card.vendor == "nvidia"
    has_clocks = is_ours and (card.compute_capability or VOLTA) >= VOLTA
    yield from TEXTS.first(
        ("hosts", card.host, "gpus", card.number - 1, key),
        (is_given and is_local, "card-limits/local", ""),
        (is_given and card.uuid.startswith("MIG-"), "card-limits/slice", ""),
        (is_given and card.is_jetson, "card-limits/jetson", ""),
        (is_given and key == "clock_lock_mhz" and not has_clocks, "card-limits/clocks", ""),
        (is_given and not is_ours and not card.pci, "card-limits/slot", ""),
        host=card.host, who=f"GPU {card.number} ({card.card})",
    )  # fmt: skip


def _additions(host: str, facts: Host, services: dict[str, Service], *, is_local: bool) -> Findings:
    """What is added to services of a host that is wrong there."""
    for name, added in facts.services.items():
        path: KeyPath = ("hosts", host, "services", name)
        service = services.get(name)
        if service is None:
            near = did_you_mean(name, services)
            yield TEXTS.finding("service-additions/unknown", path, host=host, name=name, near=near)
            continue
        targets = Counter(path for _, path in service.mounts) + Counter(item.target for item in service.configs)
        for key, value in added.environment.items():
            row = (service.environment[key] != value, "service-additions/environment", "")
            yield from TEXTS.broken((*path, "environment", key), row, key=key)
        for folder, target in added.mounts.items():
            row = (targets[target] > 1, "service-additions/mount", "")
            yield from TEXTS.broken((*path, "mounts", folder), row, key=target)
        for key in sorted(added.model_fields_set - {"environment"}) if is_local else ():
            yield TEXTS.finding("service-additions/local", (*path, key), key=key)


def _pins(site: Site, _found: Contributions) -> Findings:
    loose: dict[tuple[str, str], set[int]] = {}
    for host, cards in site.cards.items():
        ours = [card for card in cards if card.vendor == "nvidia"]
        if len({card.card for card in ours}) > 1:
            loose[host, ""] = {card.number for card in ours if card.pinned_by == "index"}
    for replica in site.replicas:
        backend = backend_of(replica)
        # Graphics of a processor alone in its host are the only ones; of a split over makers one-vendor tells.
        is_only = len(site.cards[replica.host]) == 1 and all(card.unified_memory for card in replica.cards)
        is_told = is_only or len({card.vendor for card in replica.cards}) > 1
        for card in replica.cards:
            if card.vendor != "nvidia" and not is_told and not is_pinned(backend, card):
                loose.setdefault((replica.host, backend), set()).add(card.number)
    for (host, backend), numbers in loose.items():
        key, tool = ("uuid", "rocminfo") if backend == "rocm" else ("pci", "lspci -D")
        yield from TEXTS.broken(
            ("hosts", host),
            (numbers, "card-pinned/number" if backend else "card-pinned/index", "gpus"),
            numbers=", ".join(map(str, sorted(numbers))), are="is" if len(numbers) == 1 else "are",
            host=host, backend=backend, key=key, tool=tool,
        )  # fmt: skip


def _builds(site: Site, _found: Contributions) -> Findings:
    """Cards of one replica, and the build that is to use them."""
    for replica in site.replicas:
        wanted, vendors = replica.engine.backend, {card.vendor for card in replica.cards}
        fitting = [backend for backend, makers in VENDORS.items() if vendors and vendors <= set(makers)]
        is_slice = any(card.uuid.startswith("MIG-") for card in replica.cards)
        has_own = replica.weights.served_by.has_own_build
        values: dict[str, object] = {"service": replica.service, "vendors": _listed(sorted(vendors)), "backend": wanted}
        yield from TEXTS.broken(
            ("pools", replica.pool, "on"),
            (is_slice and len(replica.cards) > 1, "one-vendor/slices", ""),
            (len(vendors) > 1 and not has_own, "one-vendor/image", ""),
            **values,
        )
        for card in replica.cards if len(vendors) > 1 and has_own and backend_of(replica) == "vulkan" else ():
            if card.vendor != "nvidia" and not card.pci:
                path = ("hosts", card.host, "gpus", card.number - 1)
                yield TEXTS.finding("one-vendor/slot", path, number=card.number, **values)
        if wanted and wanted not in fitting:
            place = f"a card of {' and one of '.join(sorted(vendors))}" if vendors else "the processor"
            hint = f"remove it, or use {' or '.join(fitting)}" if fitting else "remove it"
            place_of = engine_key(site, replica, "backend")
            yield TEXTS.finding("backend-fits/other", place_of, place=place, hint=hint, **values)


def _cuda_images(site: Site, found: Contributions) -> Findings:
    replicas = {(replica.host, replica.service): replica for replica in site.replicas}
    for service in found.services:
        replica = replicas.get((service.host, service.name))
        for card in replica.cards if replica else ():
            if replica and (missing := next(_card_without_code(site, replica, card, service.image), None)):
                yield missing
                break


def _card_without_code(site: Site, replica: Replica, card: Card, image: str) -> Findings:
    """What is wrong with the image for the card."""
    capability = card.compute_capability
    if not capability or is_own(image):
        return
    has_own, is_cuda13 = replica.weights.served_by.has_own_build, any(word in image for word in CUDA13_WORDS)
    is_stock = is_cuda13 or STOCK_CUDA in image
    own = f"make your own engine.image: {build_command(capability)}"
    yield from TEXTS.first(
        _place_of_image(site, replica, image),
        (card.is_jetson and is_stock, "cuda-image/jetson", ""),
        (capability < CUDA12_FLOOR and has_own and is_stock, "cuda-image/none", ""),
        (capability < CUDA13_FLOOR and is_cuda13, "cuda-image/cuda13", ""),
        card=card.card, capability=".".join(map(str, capability)), other=f", or {own}" if has_own else "",
        hint=own if capability >= CUDA11_FLOOR else "take it out",
    )  # fmt: skip


def _place_of_image(site: Site, replica: Replica, image: str) -> KeyPath:
    for key in ("image", "backend"):
        if getattr(replica.engine, key):
            return engine_key(site, replica, key)
    place: KeyPath = ("pools", replica.pool, "on")
    return next((("images", key) for key, value in site.inventory.images.items() if value == image), place)


# --- settings that would do nothing, or not what they say ------------------------------------------------------------


def _unused(site: Site, _found: Contributions) -> Findings:
    inventory, images = site.inventory, image_keys()
    for key in sorted(inventory.images.keys() - images):
        yield TEXTS.finding("image-known/unknown", ("images", key), key=key, near=did_you_mean(key, images))
    used = {pool.model for pool in inventory.pools.values()}
    used |= {model.draft.model for model in inventory.models.values() if model.draft}
    for name in sorted(inventory.models.keys() - used):
        yield TEXTS.finding("model-used/unused", ("models", name), name=name)
    cards = {card.card for cards in site.cards.values() for card in cards}
    for name in sorted(inventory.cards.keys() - cards):
        near = did_you_mean(name, cards)
        hint = near if near.startswith("did") else "remove it, or name it in hosts.….gpus"
        yield TEXTS.finding("card-used/unused", ("cards", name), name=name, hint=hint)
    stores = {(item.host, site.store_of(item.host, file)) for item in site.replicas for file in item.files}
    for host, facts in inventory.hosts.items():
        for store in facts.model_stores:
            path = ("hosts", host, "model_stores", store)
            yield from TEXTS.broken(path, ((host, store) not in stores, "store-used/unused", ""))


def _models(site: Site, _found: Contributions) -> Findings:
    guessed = {replica.model for replica in site.replicas if replica.is_guess and replica.kind == "chat"}
    names = {name for replica in site.replicas for name in replica.models}
    for name, model in site.inventory.models.items():
        path = ("models", name, "source")
        if name in guessed and billions(model) is None and model.size_gib is None:
            yield TEXTS.finding("memory-guess/unknown", path, mib=weights_mib(model))
        for source in model.sources if name in names else ():
            known = site.lock.get(model.key(source))
            if tag_of(source) or (ollama_manifest(source) and not (known and known.places)):
                yield TEXTS.finding("model-unknown/source", path, source=source.partition("#")[0])


def _direct_mode(site: Site, _found: Contributions) -> Findings:
    gateway = site.inventory.gateway
    if gateway.balancing != "direct":
        return
    yield TEXTS.finding("direct-mode/queue", ("gateway", "balancing"))
    for index, tier in enumerate(gateway.auto.tiers if gateway.auto else ()):
        path = ("gateway", "auto", "tiers", index)
        yield from TEXTS.broken(path, (tier.spill, "direct-mode/spill", "spill"))
    for name, pool in site.inventory.pools.items():
        yield from TEXTS.broken(("pools", name), (pool.background, "direct-mode/background", "background"))


def _contributed(site: Site, found: Contributions) -> Findings:
    deployments = Counter(route.pool for route in found.routes)
    for name, pool in site.inventory.pools.items():
        is_shared = (pool.limits.rpm or pool.limits.tpm) and deployments[name] > 1
        row = (is_shared, "limit-share/shared", "limits")
        yield from TEXTS.broken(("pools", name), row, count=deployments[name])
    for service in found.services:
        is_open = any(not port.protection or port.protection.startswith("loopback") for port in service.ports)
        row = (bool(service.joins) and is_open and not service.is_picky, "joined-protected/open", "networks")
        path = ("hosts", service.host, "services", service.name)
        yield from TEXTS.broken(path, row, name=service.name, networks=_listed(service.joins))
    wrong = (problem for file in found.files if file.extra for problem in summed(file).wrong)
    yield from (replace(problem, rule="extra-adds") for problem in dict.fromkeys(wrong))


# --- consumers -------------------------------------------------------------------------------------------------------


def _fallbacks_of_consumers(site: Site, _found: Contributions) -> Findings:
    for name, consumer in site.inventory.consumers.items():
        opened = consumer.pools or ()
        for index, pool in enumerate(opened):
            others = site.inventory.pools[pool].fallback if pool in site.inventory.pools else ()
            row = (others and not consumer.local_only and not {*others} & {*opened}, "fallback-opened/closed", "")
            yield from TEXTS.broken(("consumers", name, "pools", index), row, pool=pool, others=", ".join(others))


def _limits_of_consumers(site: Site, published: Contributions) -> Findings:
    for name, consumer in site.inventory.consumers.items():
        pools, path = _pools_of(site, consumer), ("consumers", name, "limits")
        for key, unit in (("rpm", "requests a minute"), ("tpm", "tokens a minute")):
            limit = getattr(consumer.limits, key)
            most = [getattr(site.inventory.pools[pool].limits, key) for pool in pools]
            row: Row = (limit and all(most) and limit > sum(most), "consumer-limits/rate", key)
            yield from TEXTS.broken(path, row, limit=limit, unit=unit, most=sum(map(int, filter(None, most))))
        room, limit = _room(site, published, pools), consumer.limits.parallel
        row = (limit and room and limit > room, "consumer-limits/parallel", "parallel")
        yield from TEXTS.broken(path, row, limit=limit, most=room)


def _pools_of(site: Site, consumer: Consumer) -> tuple[str, ...]:
    """The pools in which a consumer's requests end up."""
    names = consumer.pools or tuple(site.inventory.pools)
    return tuple(dict.fromkeys(pool for name in names for pool in pools_behind(site.inventory, name)))


def _room(site: Site, published: Contributions, pools: Iterable[str]) -> int:
    """Requests that pools work on and let wait; 0 where nothing bounds them."""
    if site.inventory.gateway.balancing == "direct":
        return 0
    slots = {backend.name: backend.slots for backend in published.backends if backend.pool in set(pools)}
    return sum(slots.values()) + sum(
        (site.inventory.pools[pool].queue or site.inventory.gateway.queue).depth for pool in pools
    )


def _budgets(site: Site, published: Contributions) -> Findings:
    inventory = site.inventory
    paid = {backend.pool for backend in published.backends if backend.protocol == "cloud"}
    paid |= {name for name, pool in inventory.pools.items() if pool.price}
    paid |= {route.pool for route in published.routes if route.backend.cost}
    opened = {name: set(_pools_of(site, consumer)) for name, consumer in inventory.consumers.items()}
    for name, consumer in inventory.consumers.items():
        row = (consumer.budget and not paid & opened[name], "budget-counts/consumer", "budget")
        yield from TEXTS.broken(("consumers", name), row)
        yield from _fallback(inventory, ("consumers", name), consumer.budget, {name: opened[name]}, paid)
    for team, found in inventory.teams.items():
        members = {name: opened[name] for name, item in inventory.consumers.items() if item.team == team}
        is_free = not paid & {pool for pools in members.values() for pool in pools}
        yield from TEXTS.broken(("teams", team), (is_free, "budget-counts/team", "budget"))
        yield from _fallback(inventory, ("teams", team), found.budget, members, paid)


def _fallback(
    inventory: Inventory, path: KeyPath, budget: KeyBudget | None, opened: Mapping[str, set[str]], paid: set[str]
) -> Findings:
    """What is wrong with the pool for a spent budget; `opened` are the pools of each key, `paid` those with a price."""
    pool, key = budget.fallback if budget else None, "budget.fallback"
    yield from known("budget-fallback", "pool", pool, (*path, "budget", "fallback"), inventory.pools)
    if pool not in inventory.pools:
        return
    kind = kind_of(inventory, pool)
    yield from TEXTS.first(
        path, (kind != "chat", "budget-fallback/kind", key), (pool in paid, "budget-fallback/paid", key),
        pool=pool, kind=kind,
    )  # fmt: skip
    chats = {name for name in paid if kind_of(inventory, name) == "chat"}
    is_unused = not any(chats & pools for pools in opened.values())
    yield from TEXTS.broken(path, (is_unused, "budget-fallback/unused", key))
    for consumer in opened:
        named = inventory.consumers[consumer].pools or inventory.pools
        yield from TEXTS.broken(path, (pool not in named, "budget-fallback/closed", key), pool=pool, consumer=consumer)


CHECKS: tuple[Callable[[Site, Contributions], Findings], ...] = (
    _ports, _replicas_of_pools, _names, _addresses, _vram, _servers, _hosts, _pins, _builds, _cuda_images, _unused,
    _models, _direct_mode, _swarm, _contributed, _fallbacks_of_consumers, _limits_of_consumers, _budgets,
)  # fmt: skip
