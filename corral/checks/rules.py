"""What must hold once a site is resolved; what must hold before that is in `references`.

Each rule's docstring says what it demands; `docs/reference/rules.md` is made from them, `tests/rules` has a pair of
inventories for each. Rules about one component alone are in its folder.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from corral.checks.registry import check
from corral.components import component, components, image_keys
from corral.components.additions import summed
from corral.components.serving import engine_key, one_of_each_sort
from corral.config.file_names import ollama_manifest, tag_of
from corral.config.inventory import Consumer, Inventory
from corral.contributions import Backend, Contributions, Service
from corral.errors import Finding, KeyPath, did_you_mean
from corral.plan.advice import what_fits
from corral.plan.cards import VRAM_RESERVE_MIB
from corral.plan.devices import CUDA13_FLOOR, VENDORS, backend_of, is_pinned
from corral.plan.memory import MIB
from corral.plan.own_image import CUDA11_FLOOR, CUDA12_FLOOR, build_command, is_own
from corral.plan.routing import pools_behind
from corral.plan.site import Card, Replica, Site
from corral.plan.sizes import billions, weights_mib

components()  # with their rules
LOOK = "look into the file: ./generate.py models inspect"
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
JETSON_IMAGE = "name an engine.image that is made for it, such as those of dustynv/llama_cpp, or build your own there"
PCI_HINT = "write its pci: as `lspci -D` prints it"
STOCK_CUDA = "ggml-org/llama.cpp:server-cuda"
# How many of several equal things a message names.
TOLD = 5


def _by_host(found: Contributions) -> dict[str, list[Service]]:
    services: dict[str, list[Service]] = defaultdict(list)
    for service in found.services:
        services[service.host].append(service)
    return services


def _pools_of_services(site: Site) -> dict[tuple[str, str], str]:
    """Pool of a service by its host and name."""
    return {(replica.host, replica.service): replica.pool for replica in site.replicas}


# --- ports, names, addresses -----------------------------------------------------------------------------------------


@check("plan", "port-unique")
def _port_unique(site: Site, found: Contributions) -> Iterator[Finding]:
    """A port of an address belongs to one service (on a local host every port, elsewhere the published ones)."""
    owners: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for service in found.services:
        for port in service.ports:
            if port.publish:
                owners[service.host, port.publish, port.number].append(service.name)
    pools = _pools_of_services(site)
    clashes: dict[tuple[str, tuple[str, ...]], list[tuple[int, list[str]]]] = defaultdict(list)
    for (host, _, number), names in owners.items():
        if len(names) > 1:
            clashes[host, tuple(pools.get((host, name), name) for name in names)].append((number, names))
    for (host, who), ports in clashes.items():
        number, names = ports[0]
        more = f" ({len(ports) - 1} more as well)" if len(ports) > 1 else ""
        pool = next((name for name in reversed(who) if name in site.inventory.pools), "")
        shared = next((name for name in reversed(names) if name in site.host(host).shared), "")
        path: KeyPath = ("pools", pool, "ports") if pool else _place_of_port(site.inventory, number)
        if shared:
            pool, path = "", ("hosts", host, "shared", shared, "port")
        size = sum(replica.pool == pool for replica in site.replicas) if pool else 1
        hint = f"set {'ports' if pool else path[-1]}: {_free_port(found, number, size)}, which is free"
        yield Finding(f"port {number} of {host} is wanted by {' and '.join(names)}{more}", path, hint)


def _place_of_port(inventory: Inventory, number: int) -> KeyPath:
    """Where the inventory says a port that belongs to no pool."""
    for section in ("tracing", "monitoring", "gateway"):
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


@check("plan", "port-range")
def _port_range(site: Site, _found: Contributions) -> Iterator[Finding]:
    """The ports of a pool's replicas end before 65536."""
    highest: dict[str, int] = {}
    for replica in site.replicas:
        highest[replica.pool] = max(replica.port, highest.get(replica.pool, 0))
    for pool, port in highest.items():
        if port > LAST_PORT:
            words = f"the ports of the replicas run up to {port}; {LAST_PORT} is the last"
            yield Finding(words, ("pools", pool, "ports"), f"start at {port - LAST_PORT} less")


@check("plan", "port-protected")
def _port_protected(site: Site, found: Contributions) -> Iterator[Finding]:
    """A published port has a key or password in front, or a stated reason why it needs none."""
    pools = _pools_of_services(site)
    for service in found.services:
        for port in service.ports:
            if port.publish and not port.protection:
                words = f"{service.name} publishes port {port.number} on {port.publish} with nothing in front"
                pool = pools.get((service.host, service.name))
                path = ("pools", pool) if pool else ("hosts", service.host)
                yield Finding(words, path, f"its component ({service.component}) has to say what protects it")


@check("plan", "name-unique")
def _name_unique(site: Site, found: Contributions) -> Iterator[Finding]:
    """Services of a host, containers of the farm, and what the gateway calls have names of their own."""
    pools = _pools_of_services(site)
    told: set[str] = set()
    for (host, name), times in Counter((service.host, service.name) for service in found.services).items():
        if times > 1:
            told.add(f"{host}-{name}")
            pool = pools.get((host, name))
            path = ("pools", pool, "short" if site.inventory.pools[pool].short else "on") if pool else ("hosts", host)
            yield Finding(
                f"{times} services of {host} are called {name}", path, "give the pools different short: names"
            )
    backends: dict[str, Backend] = {}
    for backend in found.backends:
        other = backends.setdefault(backend.name, backend)
        is_node = not (other.is_ours or backend.is_ours)
        if other.pool != backend.pool and not is_node and backend.name not in told:
            words = f"{other.pool} and {backend.pool} both have a server called {backend.name}"
            yield Finding(words, ("pools", backend.pool), "rename the node, or give one pool a short: name")
    for name, times in Counter(route.name for route in found.routes).items():
        if times > 1 and name not in backends and name not in told:
            yield Finding(f"{times} deployments are called {name}", ("pools", name), "rename the pool")


@check("plan", "name-length")
def _name_length(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A replica's service has a name of at most 63 characters, so that DNS can find it."""
    longest: dict[str, str] = {}
    for replica in site.replicas:
        longest[replica.pool] = max(longest.get(replica.pool, ""), replica.service, key=len)
    for pool, name in longest.items():
        if len(name) > LABEL_LENGTH:
            words = f"the service name {name} has {len(name)} characters; {LABEL_LENGTH} are possible"
            yield Finding(words, ("pools", pool, "short"), "set short: to a shorter name")


@check("plan", "address-distinct")
def _address_distinct(site: Site, found: Contributions) -> Iterator[Finding]:
    """Hosts on which something runs have addresses of their own."""
    first: dict[str, str] = {}
    for name in sorted({service.host for service in found.services}):
        other = first.setdefault(site.host(name).address, name)
        if other != name:
            words = f"{name} has the address of {other}, {site.host(name).address}"
            yield Finding(words, ("hosts", name, "address"), "give each host its own")


@check("plan", "address-reachable")
def _address_reachable(site: Site, found: Contributions) -> Iterator[Finding]:
    """The gateway and the monitoring reach what they call on other hosts: not on loopback, not on a local host."""
    gateway, monitoring, tracing = site.inventory.gateway, site.inventory.monitoring, site.inventory.tracing
    wanted = {(backend.endpoint.host, gateway.host) for backend in found.backends}
    wanted |= {(target.endpoint.host, monitoring.host) for target in found.targets} if monitoring else set()
    wanted |= {(tracing.host, gateway.host)} if tracing and tracing.host else set()
    for host, reader in sorted(wanted):
        if not host or host == reader:
            continue
        if site.is_local(host):
            words = f"{reader} cannot reach {host}, whose programs listen on loopback only"
            yield Finding(words, ("hosts", host, "runtime"), f"use runtime: compose, or put everything on {host}")
        elif ipaddress.ip_address(site.host(host).address).is_loopback:
            words = f"{reader} cannot reach {host} at {site.host(host).address}"
            yield Finding(words, ("hosts", host, "address"), f"set the address of {host} in your network")


# --- memory ----------------------------------------------------------------------------------------------------------


@check("plan", "vram")
def _vram(site: Site, found: Contributions) -> Iterator[Finding]:
    """All servers of a card fit into its memory, with 256 MiB to spare."""
    tenants: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for service in found.services:
        for claim in service.tenancies:
            tenants[service.host, claim.number].append((service.name, claim.vram_mib))
    pools = _pools_of_services(site)
    guessed = {(item.host, item.service): item.model for item in site.replicas if item.is_guess}
    full: dict[tuple[str, tuple[str, ...], int, int], list[int]] = defaultdict(list)
    for (host, number), claims in tenants.items():
        room = site.cards[host][number - 1].vram_mib - VRAM_RESERVE_MIB
        wanted = sum(mib for _, mib in claims)
        if wanted > room:
            full[host, tuple(pools.get((host, name), name) for name, _ in claims), room, wanted].append(number)
    for (host, who, room, wanted), numbers in full.items():
        parts = ", ".join(f"{name} {mib}{_turns(site, host, name)}" for name, mib in tenants[host, numbers[0]])
        more = f" ({len(numbers) - 1} more as well)" if len(numbers) > 1 else ""
        words = (
            f"GPU {numbers[0]} of {host} lacks {wanted - room} MiB{more}: {room} are free, {wanted} wanted ({parts})"
        )
        here = [
            item for item in site.replicas if any((card.host, card.number) == (host, numbers[0]) for card in item.cards)
        ]
        shared = next((name for name, _ in reversed(tenants[host, numbers[0]]) if name in site.host(host).shared), "")
        path = ("hosts", host, "shared", shared) if shared else ("pools", who[-1], "on")
        models = {guessed[host, name] for name, _ in tenants[host, numbers[0]] if (host, name) in guessed}
        hint = what_fits(site, here, wanted - room)
        if models and sum(mib for name, mib in tenants[host, numbers[0]] if (host, name) not in guessed) <= room:
            words += f"; the size of {', '.join(sorted(models))} is a guess from the file's name"
            yield Finding(words, path, f"{LOOK}; if it is right, {hint}", level="warning")
        else:
            yield Finding(words, path, hint)


@check("plan", "memory-guess", level="warning")
def _memory_guess(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A chat model's size is known from its file, or at least its file's name says how many parameters it has."""
    for name in sorted({replica.model for replica in site.replicas if replica.is_guess and replica.kind == "chat"}):
        model = site.inventory.models[name]
        if billions(model) is None and model.size_gib is None:
            words = (
                f"the file's name does not say how large the model is; the plan takes it for {weights_mib(model)} MiB"
            )
            yield Finding(words, ("models", name, "source"), LOOK)


def _turns(site: Site, host: str, service: str) -> str:
    """Of which models a shared server's share is the worst set; empty for a server with one model."""
    members = sorted(site.members(host, service), key=lambda item: (-item.vram_mib, item.pool))
    shared = members[0].shared if members else None
    if shared is None:
        return ""
    parts = " + ".join(f"{item.pool} {max(item.card_mib)}" for item in members[: shared.loaded])
    return f" = {parts}, the largest {min(shared.loaded, len(members))} of {len(members)}"


@check("plan", "host-ram")
def _host_ram(site: Site, found: Contributions) -> Iterator[Finding]:
    """A host's RAM less `os_reserve_gib` holds its containers, and what servers take of it as graphics memory."""
    services = _by_host(found)
    for name, host in site.inventory.hosts.items():
        is_shared = any(card.unified_memory for card in site.cards[name])
        if host.ram_gib is None:
            if is_shared:
                words = f"{name} has one memory for processor and cards, of a size that is not said"
                hint = "write ram_gib: as `free -g` prints it, what the cards have included"
                yield Finding(words, ("hosts", name), hint)
            continue
        limits = [(site.host_memory_mib(service), service.name) for service in services[name]]
        room = round((host.ram_gib - host.os_reserve_gib) * 1024)
        wanted = sum(mib for mib, _ in limits)
        if wanted > room:
            largest = sorted(limits, key=lambda item: (-item[0], item[1]))[:TOLD]
            who = "containers and cards" if is_shared else "the containers"
            words = f"{name} lacks {wanted - room} MiB: {room} are free, {who} may take {wanted}"
            hint = "lower memory_mib; the largest: " + ", ".join(f"{service} {mib}" for mib, service in largest)
            yield Finding(words, ("hosts", name, "ram_gib"), hint)


@check("plan", "cache-ram")
def _cache_ram(site: Site, _found: Contributions) -> Iterator[Finding]:
    """The prompt cache in host memory is smaller than its container."""
    for replica in one_of_each_sort(site):
        if replica.cache_ram_mib >= replica.memory_mib:
            size, room = replica.cache_ram_mib, replica.memory_mib
            words = f"a prompt cache of {size} MiB does not fit into a container of {room} MiB"
            place = engine_key(site, replica, "cache_ram_mib")
            yield Finding(words, place, "lower cache_ram_mib or raise memory_mib")


@check("plan", "server-ram")
def _server_ram(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A server's container holds what its model file says it takes in host memory, and its prompt cache."""
    for replica in one_of_each_sort(site):
        if replica.memory is None:
            continue
        wanted = replica.memory.locked(is_mapped=_is_mapped(replica)) // MIB + replica.cache_ram_mib + PROGRAM_MIB
        if wanted > replica.memory_mib:
            parts = f"{wanted - replica.cache_ram_mib} for the server, {replica.cache_ram_mib} for its prompt cache"
            words = (
                f"the server needs {wanted} MiB of host memory ({parts}), its container may take {replica.memory_mib}"
            )
            hint = "raise memory_mib, or lower cache_ram_mib, slots or the context"
            yield Finding(words, engine_key(site, replica, "memory_mib"), hint)


def _is_mapped(replica: Replica) -> bool:
    """Whether weights in host memory are only mapped, so that they can be given back and read again."""
    return not replica.engine.mlock and replica.engine.load_mode in (None, "mmap")


@check("plan", "swap")
def _swap(site: Site, _found: Contributions) -> Iterator[Finding]:
    """The limit of memory and swap together is not below that of memory alone."""
    for replica in one_of_each_sort(site):
        swap = replica.engine.memory_swap_mib
        if swap is not None and swap < replica.memory_mib:
            words = f"memory and swap together ({swap} MiB) are less than memory alone ({replica.memory_mib} MiB)"
            yield Finding(words, engine_key(site, replica, "memory_swap_mib"), "it is the sum of both")


# --- processors and cards --------------------------------------------------------------------------------------------


@check("plan", "threads", level="warning")
def _threads(site: Site, found: Contributions) -> Iterator[Finding]:
    """The servers of a host start at most eight threads for each core."""
    services = _by_host(found)
    for name, host in site.inventory.hosts.items():
        wanted = sum(service.threads for service in services[name])
        if host.cpu.cores and wanted > THREADS_PER_CORE * host.cpu.cores:
            words = f"the servers of {name} start {wanted} threads on {host.cpu.cores} cores"
            yield Finding(words, ("hosts", name, "cpu", "cores"), "lower engine.threads")


@check("plan", "card-pinned", level="warning")
def _card_pinned(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Unequal cards, and those of AMD and Intel, have a UUID or PCI slot: a reboot may change their order."""
    for host, cards in site.cards.items():
        ours = [card for card in cards if card.vendor == "nvidia"]
        by_index = [str(card.number) for card in ours if card.pinned_by == "index"]
        if by_index and len({card.card for card in ours}) > 1:
            words = f"GPU {', '.join(by_index)} of {host} {'is' if len(by_index) == 1 else 'are'} known by index only"
            hint = "give each its uuid, as `nvidia-smi -L` prints it: their order can change, and they are not alike"
            yield Finding(words, ("hosts", host, "gpus"), hint)
    loose: dict[tuple[str, str], set[int]] = defaultdict(set)
    for replica in site.replicas:
        backend = backend_of(replica)
        # Graphics of a processor alone in its host are the only ones; of a split over makers one-vendor tells.
        is_only = len(site.cards[replica.host]) == 1 and all(card.unified_memory for card in replica.cards)
        is_told = is_only or len({card.vendor for card in replica.cards}) > 1
        for card in replica.cards:
            if card.vendor != "nvidia" and not is_told and not is_pinned(backend, card):
                loose[replica.host, backend].add(card.number)
    for (host, backend), numbers in loose.items():
        who = ", ".join(map(str, sorted(numbers)))
        words = f"GPU {who} of {host} {'is' if len(numbers) == 1 else 'are'} known to {backend} by a number"
        key, tool = ("uuid", "rocminfo") if backend == "rocm" else ("pci", "lspci -D")
        hint = (
            f"give each its {key}, as `{tool}` prints it: the processor's own graphics count, too, and change the order"
        )
        yield Finding(words, ("hosts", host, "gpus"), hint)


@check("plan", "one-vendor")
def _one_vendor(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Cards of one replica can work together: no MIG slices; of several vendors only with llama.cpp, known by slots."""
    for replica in site.replicas:
        if len(replica.cards) > 1 and any(card.uuid.startswith("MIG-") for card in replica.cards):
            words = f"{replica.service} is split over slices (MIG), of which CUDA gives a program one only"
            yield Finding(words, ("pools", replica.pool, "on"), "leave gpus_per_replica out, or make larger slices")
        vendors = sorted({card.vendor for card in replica.cards})
        words = f"{replica.service} is split over cards of {' and '.join(vendors)}"
        if len(vendors) > 1 and not replica.weights.served_by.has_own_build:
            yield Finding(words, ("pools", replica.pool, "on"), "no image knows both; group equal cards")
        elif len(vendors) > 1 and backend_of(replica) == "vulkan":
            for card in replica.cards:
                if card.vendor != "nvidia" and not card.pci:
                    path = ("hosts", card.host, "gpus", card.number - 1)
                    yield Finding(f"{words}, and where GPU {card.number} is, is not said", path, PCI_HINT)


@check("plan", "backend-fits")
def _backend_fits(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A build of llama.cpp runs on cards of the makers that it is for; none is for a replica on the processor."""
    for replica in site.replicas:
        wanted, vendors = replica.engine.backend, {card.vendor for card in replica.cards}
        if wanted and not (vendors and vendors <= set(VENDORS[wanted])):
            place = f"a card of {' and one of '.join(sorted(vendors))}" if vendors else "the processor"
            fitting = [backend for backend, makers in VENDORS.items() if vendors and vendors <= set(makers)]
            hint = f"remove it, or use {' or '.join(fitting)}" if fitting else "remove it"
            words = f"{replica.service} runs on {place}, not with {wanted}"
            yield Finding(words, engine_key(site, replica, "backend"), hint)


@check("plan", "card-limits")
def _card_limits(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Power limits and clocks are for whole cards whose driver takes them, on a host with Docker Compose."""
    for host, cards in site.cards.items():
        for card in cards:
            for key, words, hint in _limits_refused(site, card):
                yield Finding(words, ("hosts", host, "gpus", card.number - 1, key), hint)


def _limits_refused(site: Site, card: Card) -> Iterator[tuple[str, str, str]]:
    """Keys of a card that would have no effect, why, and what to do."""
    for key in ("power_limit_w", "clock_lock_mhz"):
        who = f"GPU {card.number} ({card.card})"
        if getattr(card, key) is None:
            continue
        if site.is_local(card.host):
            yield key, f"{card.host} is local, and no unit is installed there", "remove it, and set it by hand"
        elif card.uuid.startswith("MIG-"):
            yield key, f"{who} is a slice; only the whole card has limits", "remove it, and set it by nvidia-smi once"
        elif card.is_jetson:
            yield key, f"{who} is a Jetson, which has power modes instead", "remove it, and choose one by nvpmodel"
        elif key == "clock_lock_mhz" and (card.vendor != "nvidia" or (card.compute_capability or VOLTA) < VOLTA):
            yield key, f"{who} takes no clocks: NVIDIA's cards from Volta on do", "remove it, or write power_limit_w"
        elif card.vendor != "nvidia" and not card.pci:
            yield key, f"{who} is found by its PCI slot for this", PCI_HINT


@check("plan", "gpu-access")
def _gpu_access(site: Site, _found: Contributions) -> Iterator[Finding]:
    """What `gpu_access` says is for NVIDIA cards of a host with containers, and CDI names them by UUID or index."""
    for name, cards in site.cards.items():
        way, path = site.host(name).gpu_access, ("hosts", name, "gpu_access")
        ours = [card for card in cards if card.vendor == "nvidia"]
        if way and (not ours or site.is_local(name)):
            yield Finding(f"{name} has no containers with NVIDIA cards", path, "remove gpu_access")
        by_slot = [str(card.number) for card in ours if card.pinned_by == "PCI slot"]
        if way == "cdi" and by_slot:
            words = f"GPU {', '.join(by_slot)} of {name} is known by its PCI slot, which CDI does not know"
            yield Finding(words, path, "give it its uuid, as `nvidia-smi -L` prints it")


@check("plan", "device-groups")
def _device_groups(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Containers with AMD or Intel cards know the groups that may open the device files."""
    for name, cards in site.cards.items():
        host = site.host(name)
        makers = sorted({card.vendor for card in cards} - {"nvidia"})
        if makers and host.runtime == "compose" and not host.device_groups:
            words = f"{name} has cards of {' and '.join(makers)}, whose device files only certain groups may open"
            hint = (
                "write what `stat -c %g /dev/kfd /dev/dri/render*` prints there, for instance device_groups: [44, 105]"
            )
            yield Finding(words, ("hosts", name, "gpus"), hint)


@check("plan", "cuda-image")
def _cuda_image(site: Site, found: Contributions) -> Iterator[Finding]:
    """The image has code for the card: CUDA 13 from Turing on (compute capability 7.5), stock CUDA 12 from 5.0 on."""
    replicas = {(replica.host, replica.service): replica for replica in site.replicas}
    for service in found.services:
        replica = replicas.get((service.host, service.name))
        if replica is None:
            continue
        for card in replica.cards:
            problem = _card_without_code(card, service.image, has_own_build=replica.weights.served_by.has_own_build)
            if problem:
                yield Finding(problem[0], _place_of_image(site, replica, service.image), problem[1])
                break


def _card_without_code(card: Card, image: str, *, has_own_build: bool) -> tuple[str, str] | None:
    """What is wrong with the image for the card, and what to do; None when nothing is known to be."""
    capability = card.compute_capability
    if not capability or is_own(image):
        return None
    who = f"{card.card} has compute capability {'.'.join(map(str, capability))}"
    if card.is_jetson and (_is_cuda13(image) or STOCK_CUDA in image):
        return f"{card.card} is a Jetson, for which no stock image has code", JETSON_IMAGE
    own = f"make your own engine.image: {build_command(capability)}"
    if capability < CUDA12_FLOOR and has_own_build and (_is_cuda13(image) or STOCK_CUDA in image):
        return f"{who}, for which no stock image has code", own if capability >= CUDA11_FLOOR else "take it out"
    if capability < CUDA13_FLOOR and _is_cuda13(image):
        return f"{who}, which CUDA 13 does not know", f"use a CUDA 12 image{f', or {own}' if has_own_build else ''}"
    return None


def _is_cuda13(image: str) -> bool:
    return any(word in image for word in CUDA13_WORDS)


def _place_of_image(site: Site, replica: Replica, image: str) -> KeyPath:
    if replica.engine.image:
        return engine_key(site, replica, "image")
    if replica.engine.backend:
        return engine_key(site, replica, "backend")
    place: KeyPath = ("pools", replica.pool, "on")
    return next((("images", key) for key, value in site.inventory.images.items() if value == image), place)


# --- settings that would do nothing, or not what they say ------------------------------------------------------------


@check("plan", "server-flag")
def _server_flag(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Words in `extra_args` are flags that the pinned server has, and that the kit does not set."""
    for replica in one_of_each_sort(site):
        look = getattr(component(replica.weights.served_by.component), "extra_args_troubles", None)
        place = engine_key(site, replica, "extra_args")
        for trouble in look(site, replica) if look and replica.engine.extra_args else ():
            yield Finding(trouble.message, (*place, trouble.number), trouble.hint)


@check("plan", "image-known")
def _image_known(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Every key of `images` is the name of an image that the kit uses."""
    known = image_keys()
    for key in site.inventory.images:
        if key not in known:
            yield Finding(f'no image is called "{key}"', ("images", key), did_you_mean(key, known))


@check("plan", "host-used", level="warning")
def _host_used(site: Site, found: Contributions) -> Iterator[Finding]:
    """Something runs on every host."""
    busy = {service.host for service in found.services}
    for name in site.inventory.hosts:
        if name not in busy:
            hint = "place a pool there or remove the host"
            yield Finding(f"nothing runs on {name}", ("hosts", name), hint)


@check("plan", "model-used", level="warning")
def _model_used(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A pool serves every model, or it drafts for another one."""
    used = {pool.model for pool in site.inventory.pools.values()}
    used |= {model.draft.model for model in site.inventory.models.values() if model.draft}
    for name in site.inventory.models:
        if name not in used:
            hint = "remove it or name it in a pool"
            yield Finding(f"no pool uses the model {name}", ("models", name), hint)


@check("plan", "model-unknown", level="warning")
def _model_unknown(site: Site, _found: Contributions) -> Iterator[Finding]:
    """It is known which file a quantization (`hf:owner/repo:Q4_K_M`) or a name of Ollama's stands for."""
    names = {name for replica in site.replicas for name in replica.models}
    for name, model in site.inventory.models.items():
        for source in model.sources if name in names else ():
            known = site.lock.get(model.key(source))
            if tag_of(source) or (ollama_manifest(source) and not (known and known.places)):
                words = f"which file {source.partition('#')[0]} is has not been looked up, so the plan guesses its size"
                yield Finding(words, ("models", name, "source"), "look it up with: ./generate.py models inspect")


@check("plan", "store-used", level="warning")
def _store_used(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Every folder in `model_stores` has a file that a server of its host reads."""
    used = {(item.host, site.store_of(item.host, file)) for item in site.replicas for file in item.files}
    for host, facts in site.inventory.hosts.items():
        for store in facts.model_stores:
            if (host, store) not in used:
                hint = "./generate.py models pull looks for files there; remove it if it has none"
                yield Finding("no server reads a file in it", ("hosts", host, "model_stores", store), hint)


@check("plan", "card-used", level="warning")
def _card_used(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Every kind of card in `cards` is in a host."""
    used = {card.card for cards in site.cards.values() for card in cards}
    for name in site.inventory.cards:
        if name not in used:
            near = did_you_mean(name, used)
            hint = near if near.startswith("did") else "remove it, or name it in hosts.….gpus"
            yield Finding(f"no host has the card {name}", ("cards", name), hint)


@check("plan", "direct-mode", level="warning")
def _direct_mode(site: Site, _found: Contributions) -> Iterator[Finding]:
    """`balancing` is not `direct`, which bounds no queue and limits no replica to its slots."""
    gateway = site.inventory.gateway
    if gateway.balancing != "direct":
        return
    words = "balancing: direct has no bounded queue and no slot guarantee: a busy replica queues without end"
    yield Finding(words, ("gateway", "balancing"), "use slots where HAProxy can run")
    for index, tier in enumerate(gateway.auto.tiers if gateway.auto else ()):
        if tier.spill:
            path: KeyPath = ("gateway", "auto", "tiers", index, "spill")
            yield Finding("balancing: direct does not track free slots", path, "remove it, or use slots")
    for name, pool in site.inventory.pools.items():
        if pool.background:
            words = "balancing: direct has no queue, so no request overtakes another"
            yield Finding(words, ("pools", name, "background"), "make them aliases, or use slots")


@check("plan", "limit-share", level="warning")
def _limit_share(site: Site, found: Contributions) -> Iterator[Finding]:
    """A pool with limits is one deployment, so that the limit is counted in one place."""
    deployments = Counter(route.pool for route in found.routes)
    for name, pool in site.inventory.pools.items():
        if (pool.limits.rpm or pool.limits.tpm) and deployments[name] > 1:
            words = f"the limit is shared out among {deployments[name]} deployments, each refuses beyond its share"
            hint = "balancing: slots with replicas of one sort counts exactly"
            yield Finding(words, ("pools", name, "limits"), hint)


@check("plan", "service-additions")
def _service_additions(site: Site, found: Contributions) -> Iterator[Finding]:
    """What is added to a service is for one that the host has, sets nothing anew, and has an effect there."""
    services = {(service.host, service.name): service for service in found.services}
    for host, facts in site.inventory.hosts.items():
        for name, added in facts.services.items():
            path: KeyPath = ("hosts", host, "services", name)
            service = services.get((host, name))
            if service is None:
                near = did_you_mean(name, [item for place, item in services if place == host])
                yield Finding(f'no service of {host} is called "{name}"', path, near)
                continue
            for key in added.environment:
                if service.environment[key] != added.environment[key]:
                    yield Finding(f"the kit sets {key} itself", (*path, "environment", key), "remove it")
            targets = Counter(path for _, path in service.mounts) + Counter(item.target for item in service.configs)
            for folder, target in added.mounts.items():
                if targets[target] > 1:
                    yield Finding(f"{target} is there already", (*path, "mounts", folder), "choose another path")
            for key in sorted(added.model_fields_set - {"environment"}) if site.is_local(host) else ():
                yield Finding(f"processes of a local host have no {key}", (*path, key), "remove it")


@check("plan", "host-setting")
def _host_setting(site: Site, _found: Contributions) -> Iterator[Finding]:
    """`selinux` is for Compose hosts."""
    for name, host in site.inventory.hosts.items():
        if host.selinux and site.is_local(name):
            yield Finding("a local host has no containers", ("hosts", name, "selinux"), "remove it")


@check("plan", "joined-protected")
def _joined_protected(_site: Site, found: Contributions) -> Iterator[Finding]:
    """A service that joins an existing network listens there with a key or password only."""
    for service in found.services:
        is_open = any(not port.protection or port.protection.startswith("loopback") for port in service.ports)
        if service.joins and is_open and not service.is_picky:
            words = f"{service.name} has nothing in front of its port, and {' and '.join(service.joins)} would reach it"
            path: KeyPath = ("hosts", service.host, "services", service.name, "networks")
            yield Finding(words, path, "remove it; haproxy, litellm and grafana can join a network")


@check("plan", "extra-adds")
def _extra_adds(_site: Site, found: Contributions) -> Iterator[Finding]:
    """`gateway.extra` and `monitoring.extra` add to what the kit configures; they remove and replace nothing of it."""
    yield from dict.fromkeys(problem for file in found.files for problem in (summed(file).wrong if file.extra else ()))


# --- consumers -------------------------------------------------------------------------------------------------------


@check("plan", "consumer-limits", level="warning")
def _consumer_limits(site: Site, published: Contributions) -> Iterator[Finding]:
    """A consumer's limits are not above what all its pools take together: such a limit never limits."""
    for name, consumer in site.inventory.consumers.items():
        pools = _pools_of(site, consumer)
        for what, least in (("rpm", "requests a minute"), ("tpm", "tokens a minute")):
            limit = getattr(consumer.limits, what)
            most = [getattr(site.inventory.pools[pool].limits, what) for pool in pools]
            if limit and all(most) and limit > sum(most):
                words = f"{limit} {least} are more than the {sum(most)} that its pools take together"
                yield Finding(words, ("consumers", name, "limits", what), f"set it to {sum(most)} or less")
        room = _room(site, published, pools)
        if consumer.limits.parallel and room and consumer.limits.parallel > room:
            words = f"{consumer.limits.parallel} requests at a time are more than the {room} that its pools take"
            yield Finding(words, ("consumers", name, "limits", "parallel"), f"set it to {room} or less")


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


@check("plan", "budget-counts", level="warning")
def _budget_counts(site: Site, published: Contributions) -> Iterator[Finding]:
    """A consumer with a budget has a pool whose tokens cost something."""
    paid = {backend.pool for backend in published.backends if backend.protocol == "cloud"}
    paid |= {name for name, pool in site.inventory.pools.items() if pool.price}
    paid |= {route.pool for route in published.routes if route.backend.cost}
    for name, consumer in site.inventory.consumers.items():
        if consumer.budget and not paid & set(_pools_of(site, consumer)):
            words = "this budget is never reached: tokens of its pools cost nothing"
            yield Finding(words, ("consumers", name, "budget"), "give its pools a price, or limit requests and tokens")
    for name in site.inventory.teams:
        members = [item for item in site.inventory.consumers.values() if item.team == name]
        if not paid & {pool for consumer in members for pool in _pools_of(site, consumer)}:
            words = "this budget is never reached: tokens of its consumers' pools cost nothing"
            yield Finding(words, ("teams", name, "budget"), "give their pools a price")
