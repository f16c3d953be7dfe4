"""The inventory resolved to facts about hosts, cards and replicas, and the questions components ask of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal
from urllib.parse import urlsplit

from corral.config.inventory import (
    Host,
    Inventory,
    Model,
    Node,
    Placement,
    ServerSettings,
    Shared,
    Sleep,
    folder_of,
)
from corral.config.model_lock import Gguf, ModelLock
from corral.config.model_paths import model_paths, path_on, with_files_of_tags
from corral.contributions import Backend, Endpoint, Service
from corral.plan.cards import JETSON, VRAM_RESERVE_MIB, card_facts, vram_mib
from corral.plan.memory import Memory
from corral.plan.networks import INSIDE
from corral.plan.placement import Room, placed
from corral.plan.routing import has_private_cache
from corral.plan.settings import (
    DEFAULTS,
    card_mib,
    draft_of,
    gguf_of,
    host_mib,
    memory_of_replica,
    merged_engine,
    shared_out,
    with_flash_attention,
)
from corral.plan.sizes import worst
from corral.plan.split import with_shares
from corral.units import grouped

# Port of GPU 0 (the CPU) for each kind, when the inventory names none; the GPU number is added.
PORT_BASE = {"chat": 8100, "embedding": 8300, "rerank": 8500, "image": 8700, "transcription": 8720, "speech": 8740}
# The same for servers that several pools share.
SHARED_PORT_BASE = 8900
# Distance between the derived ports of several replicas on one card.
PORTS_OF_COPY = 20

# Where containers have the stores of their host.
STORES = "/stores"
# Stands for a local host's rendered folder in what its programs are told; no inventory can have it in a value.
HERE = "\x1ahere\x1a"
NO_LOCK = ModelLock()
# The service at which nodes dial in.
TUNNEL = "tunnel"


@dataclass(frozen=True, slots=True)
class Card:
    """One graphics card of a host, with all that is known of it."""

    host: str
    number: int
    card: str
    vram_mib: int
    vendor: str
    compute_capability: tuple[int, int] | None
    index: int
    """From 0 among the host's cards of the same maker, as the maker's own tools count."""
    backend: str = ""
    """Build that suits the card, where its maker alone does not say."""
    uuid: str = ""
    pci: str = ""
    power_limit_w: int | None = None
    clock_lock_mhz: tuple[int, int] | None = None
    unified_memory: bool = False

    @property
    def is_jetson(self) -> bool:
        """Whether it is part of a Jetson, with NVIDIA's container runtime and without nvidia-smi."""
        return self.compute_capability in JETSON

    @property
    def has_nvidia_smi(self) -> bool:
        """Whether nvidia-smi and NVML know it."""
        return self.vendor == "nvidia" and not self.is_jetson

    @property
    def slot(self) -> str:
        """Its PCI slot as the kernel spells it; empty when the inventory does not say it."""
        *domain, bus, rest = self.pci.lower().split(":") if self.pci else ("", "")
        return f"{int(domain[0], 16) if domain else 0:04x}:{bus}:{rest}" if bus else ""

    @property
    def device(self) -> str:
        """What the container runtime is asked for: the UUID, else the PCI slot, else the index from 0."""
        return self.uuid or (self.pci if self.pci.count(":") != 1 else f"0000:{self.pci}") or str(self.index)

    @property
    def pinned_by(self) -> Literal["UUID", "PCI slot", "index"]:
        """By what `device` names the card; an index means another card when the order changes."""
        if self.uuid:
            return "UUID"
        return "PCI slot" if self.pci else "index"


@dataclass(frozen=True, slots=True)
class Replica:
    """One server of a pool, with every setting resolved."""

    pool: str
    kind: str
    model: str
    weights: Model
    engine: ServerSettings
    slots: int
    memory_mib: int
    cache_ram_mib: int
    host: str = ""
    service: str = ""
    container: str = ""
    cards: tuple[Card, ...] = ()
    # What it takes on each of them, and its shares of them (`--tensor-split`).
    card_mib: tuple[int, ...] = ()
    split: tuple[float, ...] = ()
    port: int = 0
    is_port_explicit: bool = False
    # Every file that it opens, the model first, and where each comes from. Paths that are not whole are those of the
    # models folder.
    files: Mapping[str, str] = field(default_factory=dict)
    # What it takes, from what its model file says; None: estimated from the file's name.
    memory: Memory | None = None
    # What its model file says of itself; None: not known.
    gguf: Gguf | None = None
    # The small model that makes it faster.
    draft: Model | None = None
    # Path of that model's file, like those of `files`.
    draft_file: str = ""
    # The server that serves it beside others; `service` is that one's name, `container` stays its own.
    shared: Shared | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models that it loads, its own first."""
        return (self.model, *([self.weights.draft.model] if self.weights.draft else []))

    @property
    def vram_mib(self) -> int:
        """What it takes on all its cards together."""
        return sum(self.card_mib)

    @property
    def is_guess(self) -> bool:
        """Whether what it takes is estimated from its file's name; what the inventory says is not."""
        said = self.engine.vram_mib if self.cards else self.engine.memory_mib
        return self.memory is None and said is None and self.weights.served_by.reads_files

    @property
    def layers_on_cards(self) -> int:
        """Layers that are divided among its cards, the output counted as one more; 0: its model is not known."""
        gguf = self.gguf
        count = gguf.layers + gguf.unused_layers + 1 if gguf else 0
        wanted = self.engine.gpu_layers
        return count if wanted in (None, "all") else min(count, int(wanted or 0))

    @property
    def start_timeout_s(self) -> int:
        """How long it may take to start and to load."""
        return self.engine.start_timeout_s or int(DEFAULTS["all"]["start_timeout_s"])

    @property
    def context(self) -> int:
        """Tokens of all slots together, as llama-server's `--ctx-size` counts."""
        return self.weights.context * (1 if self.engine.kv_unified else self.slots)

    @property
    def file(self) -> str:
        """Path of its model file, in the models folder or whole."""
        return next(iter(self.files), "")

    def folder_of(self, source: str) -> str:
        """Path of the folder that a repository lies in, or of a folder that is named by itself."""
        for file, origin in self.files.items():
            if origin.startswith(f"{source}/"):
                return file.removesuffix(f"/{origin.removeprefix(source)[1:]}")
        return self.weights.folder(source)

    def file_of(self, source: str) -> str:
        """Path of the file that comes from one of its sources."""
        return next(file for file, origin in self.files.items() if origin == source)


@dataclass(frozen=True, slots=True)
class Site:
    """The resolved site."""

    inventory: Inventory
    cards: dict[str, tuple[Card, ...]] = field(default_factory=dict)
    replicas: tuple[Replica, ...] = ()
    lock: ModelLock = NO_LOCK
    # Why replicas of `on: auto` are where they are.
    reasons: tuple[str, ...] = ()
    # Path in a models folder of every model file, by what the lock calls it.
    paths: Mapping[str, str] = field(default_factory=dict)
    _members: dict[tuple[str, str], tuple[Replica, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Sorts the replicas by their servers: there may be thousands, and every service is asked for its own."""
        found = grouped(((replica.host, replica.service), replica) for replica in self.replicas)
        object.__setattr__(self, "_members", {key: tuple(members) for key, members in found.items()})

    def host(self, name: str) -> Host:
        """The host of that name."""
        return self.inventory.hosts[name]

    def is_local(self, host: str) -> bool:
        """Whether the host runs processes instead of containers."""
        return self.host(host).runtime == "local"

    @property
    def is_swarm(self) -> bool:
        """Whether one Docker Swarm runs the containers of all hosts, on networks that reach from host to host."""
        return self.inventory.runtime == "swarm"

    def container(self, host: str, service: str) -> str:
        """Name of a service's container."""
        return container_name(self.inventory, host, service)

    @property
    def has_store_exporters(self) -> bool:
        """Whether Prometheus reads metrics of the gateway's database and cache."""
        monitoring = self.inventory.monitoring
        return monitoring is not None and monitoring.store_exporters

    @property
    def has_ipv6(self) -> bool:
        """Whether a host, a node or a receiver of traces has an IPv6 address."""
        inventory = self.inventory
        urls = [*(node.url for node in inventory.nodes.values()), inventory.tracing.url if inventory.tracing else None]
        return any(":" in host.address for host in inventory.hosts.values()) or any("[" in (url or "") for url in urls)

    @property
    def sleepers(self) -> dict[str, Sleep]:
        """Hosts and nodes that may be asleep, by name."""
        machines: dict[str, Host | Node] = {**self.inventory.hosts, **self.inventory.nodes}
        return {name: machine.sleep for name, machine in machines.items() if machine.sleep}

    def machine_of(self, backend: Backend) -> str:
        """Name of the host or node on which a backend is."""
        return backend.endpoint.host if backend.is_ours else backend.name

    def node_endpoint(self, node: Node) -> Endpoint:
        """Where a node is reached: at its url, or at its port of the tunnel."""
        if node.dials_in:
            return Endpoint(node.dials_in, self.inventory.gateway.host, TUNNEL)
        url = urlsplit(node.url or "")
        return Endpoint(url.port or (443 if url.scheme == "https" else 80), address=url.hostname or "")

    def reached_at(self, host: str) -> str:
        """Name or address under which other hosts reach a host."""
        facts = self.host(host)
        return facts.hostname or bracketed(facts.address)

    def address(self, endpoint: Endpoint, seen_from: str) -> str:
        """`name:port` under which a program on host `seen_from` reaches an endpoint; on another host its edge."""
        if endpoint.address:
            return f"{bracketed(endpoint.address)}:{endpoint.port}"
        if self.is_swarm:
            return f"{swarm_name(endpoint.host, endpoint.service)}:{endpoint.port}"
        if endpoint.host != seen_from:
            return f"{self.reached_at(endpoint.host)}:{self.inventory.gateway.edge_port}"
        return f"{'127.0.0.1' if self.is_local(seen_from) else endpoint.service}:{endpoint.port}"

    def is_outside(self, endpoint: Endpoint, seen_from: str) -> bool:
        """Whether an endpoint is on another machine than the host `seen_from`."""
        return bool(endpoint.address) or self.is_behind_edge(endpoint, seen_from)

    def publish_address(self, host: str) -> str:
        """Address that a port is bound to for other programs of the farm; empty: the host's own network is enough.

        Programs on other hosts come through the host's edge.
        """
        return "127.0.0.1" if self.is_local(host) else ""

    def is_behind_edge(self, endpoint: Endpoint, seen_from: str) -> bool:
        """Whether an endpoint is on another host of the site, whose edge stands before it."""
        return not (endpoint.address or self.is_swarm) and endpoint.host != seen_from

    def own_addresses(self, host: str, *names: str) -> tuple[str, ...]:
        """Where a program listens that not all who are on its networks are to reach: for itself, and on some of them.

        Swarm tells a container its names only once it is well, so that there is no listening by name.
        """
        if self.is_swarm:
            return ("0.0.0.0",)  # noqa: S104 - on the container's own networks
        return ("127.0.0.1", *(() if self.is_local(host) else names))

    def model_path(self, host: str, file: str) -> str:
        """Path of a model file as programs on that host see it."""
        if self.is_local(host):
            return file if file.startswith("/") else f"{self.local_folder(self.host(host).models_dir)}/{file}"
        store = self.store_of(host, file)
        folder = self.host(host).model_stores[store] if store else ""
        return f"{STORES}/{store}{file.removeprefix(folder)}" if store else f"/models/{file}"

    def store_of(self, host: str, file: str) -> str:
        """The store of a host that a file is in; empty for one in the models folder."""
        found = (name for name, folder in self.host(host).model_stores.items() if file.startswith(f"{folder}/"))
        return next(found, "")

    def store_mounts(self, host: str, files: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """The folders of a host that servers with these files read besides the models folder."""
        stores = sorted({store for file in files if (store := self.store_of(host, file))})
        return tuple((self.host(host).model_stores[store], f"{STORES}/{store}") for store in stores)

    def config_path(self, host: str, component: str, file: str, container: str) -> str:
        """Path of a rendered file as programs on that host see it."""
        return f"{self.local_folder(component)}/{file}" if self.is_local(host) else container

    def secret_path(self, host: str, name: str) -> str:
        """Path of a secret's file as programs on that host see it."""
        return f"{self.local_folder('secrets')}/{name}" if self.is_local(host) else f"/run/secrets/{name}"

    def secret_beside(self, host: str, name: str) -> str:
        """The same for a configuration that is read from its folder: there a relative path counts from that."""
        return f"../secrets/{name}" if self.is_local(host) else self.secret_path(host, name)

    def data_path(self, host: str, component: str, container: str) -> str:
        """Path of a component's own data as programs on that host see it."""
        return self.local_folder(f"data/{component}") if self.is_local(host) else container

    @staticmethod
    def local_folder(path: str) -> str:
        """A path relative to a local host's rendered folder; the mark becomes supervisord's own spelling of it."""
        return path if path.startswith("/") else f"{HERE}/{path.removeprefix('./')}"

    def members(self, host: str, service: str) -> tuple[Replica, ...]:
        """The replicas that a service serves: several when pools share it, none when it is no inference server."""
        return self._members.get((host, service), ())

    def host_memory_mib(self, service: Service) -> int:
        """Host memory in MiB that a service may take: its container's, and its share of cards that have no other."""
        shared = {card.number for card in self.cards[service.host] if card.unified_memory}
        return service.memory_mib + sum(claim.vram_mib for claim in service.tenancies if claim.number in shared)

    def image(self, key: str, default: str) -> str:
        """The image of that key: the site's own, else the pinned one."""
        return self.inventory.images.get(key, default)


def claimed_mib(members: Sequence[Replica]) -> tuple[int, ...]:
    """MiB that a service takes on each of its cards: of models that take turns, the worst set of them."""
    shared = members[0].shared
    count = shared.loaded if shared else len(members)
    return tuple(worst(sizes, count) for sizes in zip(*(item.card_mib for item in members), strict=True))


def resolve(inventory: Inventory, lock: ModelLock = NO_LOCK) -> Site:
    """The site of an inventory whose references hold (see references.check_references).

    Args:
        inventory: what is wanted.
        lock: what is known of the model files; what is not known is estimated.
    """
    ordered = with_files_of_tags(_in_order(inventory), lock)
    paths = model_paths(ordered.models.values(), lock)
    cards = {name: tuple(_cards(ordered, name, host)) for name, host in ordered.hosts.items()}
    ordered, reasons = _with_chosen_cards(ordered, lock, cards)
    replicas = [replica for name in ordered.pools for replica in _replicas(ordered, lock, cards, name)]
    shared = with_shares(replicas, partial(_resized, ordered, lock), claimed_mib)
    with_files = (_with_files(ordered, lock, paths, replica) for replica in shared)
    return Site(ordered, cards, tuple(with_files), lock, reasons, paths)


def _with_chosen_cards(
    inventory: Inventory, lock: ModelLock, cards: dict[str, tuple[Card, ...]]
) -> tuple[Inventory, tuple[str, ...]]:
    """The inventory with a card for every replica that leaves the choice to the plan."""
    empty = [
        Room((card.host, card.number), card.vram_mib - VRAM_RESERVE_MIB, kind=card.card, vendor=card.vendor)
        for host, found in cards.items()
        if inventory.hosts[host].runtime == "compose"
        for card in found
    ]

    @cache
    def size(pool: str, kind: str, count: int) -> int:
        return _as_set(inventory, lock, pool, kind, count).vram_mib

    return placed(inventory, empty, size)


def _in_order(inventory: Inventory) -> Inventory:
    """The inventory with its named things sorted: what is rendered does not depend on the order in which they stand."""
    sections = ("hosts", "nodes", "cards", "models", "defaults", "pools", "images")
    update: dict[str, Any] = {name: dict(sorted(getattr(inventory, name).items())) for name in sections}
    if inventory.monitoring is not None:
        local = dict(sorted(inventory.monitoring.local.items()))
        update["monitoring"] = inventory.monitoring.model_copy(update={"local": local})
    return inventory.model_copy(update=update)


def _cards(inventory: Inventory, host: str, facts: Host) -> Iterator[Card]:
    before: Counter[str] = Counter()
    for number, gpu in enumerate(facts.gpus, start=1):
        kind = card_facts(gpu.card, inventory.cards.get(gpu.card))
        assert kind is not None  # noqa: S101 - the rule `card-known` holds
        yield Card(
            host, number, gpu.card, vram_mib(gpu, kind), kind.vendor, kind.compute_capability, before[kind.vendor],
            kind.backend, gpu.uuid or "", gpu.pci or "", gpu.power_limit_w, gpu.clock_lock_mhz, kind.unified_memory,
        )  # fmt: skip
        before[kind.vendor] += 1


# --- replicas --------------------------------------------------------------------------------------------------------


def _replicas(
    inventory: Inventory, lock: ModelLock, cards: dict[str, tuple[Card, ...]], name: str
) -> Iterator[Replica]:
    pool = inventory.pools[name]
    if pool.model is None:
        return
    as_set = cache(lambda card, count: _as_set(inventory, lock, name, card, count))
    copies: Counter[tuple[str, int]] = Counter()
    for placement in pool.on:
        if placement.host is None:
            continue
        for group in _groups(placement):
            chosen = tuple(cards[placement.host][number - 1] for number in group)
            alike = as_set(chosen[0].card if chosen else "", len(chosen))
            before, place = copies.total(), (placement.host, group[0] if group else 0)
            copies[place] += 1
            replica = replace(alike, host=placement.host, cards=chosen)
            yield _in_place(inventory, replica, placement, copies[place], before)


def _as_set(inventory: Inventory, lock: ModelLock, name: str, card: str, cards: int) -> Replica:
    """A replica of a pool on so many cards of a kind (0: on the processor), without its place."""
    pool = inventory.pools[name]
    weights = inventory.models[pool.model or ""]
    gguf = gguf_of(weights, lock) if weights.served_by.reads_files else None
    engine, draft = merged_engine(inventory, name, card, gguf), draft_of(inventory, weights)
    if cards:
        engine = with_flash_attention(engine, gguf)
    replica = Replica(
        pool=name,
        kind=weights.kind,
        model=pool.model or "",
        weights=weights,
        engine=engine,
        slots=engine.slots or 1,
        memory_mib=0,
        cache_ram_mib=0,
        gguf=gguf,
        draft=draft,
    )
    given = engine.tensor_split or ()
    return _resized(inventory, lock, replica, given if len(given) == cards else (1,) * cards, card)


def _resized(
    inventory: Inventory, lock: ModelLock, replica: Replica, split: tuple[float, ...], card: str = ""
) -> Replica:
    """A replica with these shares of its cards, and the memory that follows from them."""
    weights, engine, draft = replica.weights, replica.engine, replica.draft
    memory = memory_of_replica(weights, lock, engine, split, draft)
    sizes = card_mib(weights, engine, memory, draft, split)
    if engine.vram_mib is not None:
        sizes = shared_out(engine.vram_mib, split)
    if weights.served_by.takes_share:
        facts = card_facts(card, inventory.cards.get(card))
        sizes = (round((facts.vram_gib if facts else 0) * 1024 * (engine.gpu_memory_fraction or 0)),) * len(split)
    limit = engine.memory_mib or host_mib(weights, engine, memory, draft, is_on_gpu=bool(split))
    cache_ram = engine.cache_ram_mib if engine.cache_ram_mib is not None else min(1024, limit // 4)
    return replace(
        replica,
        split=split,
        card_mib=sizes,
        memory=memory,
        memory_mib=limit,
        cache_ram_mib=0 if has_private_cache(inventory, replica.pool) else cache_ram,
    )


def _with_files(inventory: Inventory, lock: ModelLock, paths: Mapping[str, str], replica: Replica) -> Replica:
    """A replica in its place with the paths of its files there."""
    host = inventory.hosts[replica.host]

    def files(weights: Model) -> dict[str, str]:
        """Of a repository those that the lock knows; before it was pulled, the folder that they will be in."""
        if weights.reads_files:
            keys = {source: weights.key(source) for source in weights.sources}
            return {path_on(replica.host, host, lock.get(key), paths[key]): source for source, key in keys.items()}
        found: dict[str, str] = {}
        for source in weights.repositories:
            revision = weights.revision_of(source)
            members = lock.members(source, revision)
            for key, known in members.items():
                found[path_on(replica.host, host, known, known.file)] = key.rpartition("@")[0]
            if not members:
                found[folder_of(source, revision)] = source
        return found

    drafts = files(replica.draft) if replica.draft else {}
    return replace(replica, files=files(replica.weights) | drafts, draft_file=next(iter(drafts), ""))


def _groups(placement: Placement) -> Iterator[tuple[int, ...]]:
    """GPU numbers of every replica of a placement; none for those on the processor."""
    gpus, size = placement.gpus or (), placement.gpus_per_replica
    for start in range(0, max(1, len(gpus)), size):
        yield from [gpus[start : start + size]] * (placement.replicas or 1)


def _in_place(inventory: Inventory, replica: Replica, placement: Placement, copy: int, index: int) -> Replica:
    """A replica with its names and its port.

    Args:
        inventory: the site.
        replica: as it is set, with host and cards.
        placement: where the inventory puts it.
        copy: its number from 1 among the pool's replicas that begin on the same card, or are on the CPU of a host.
        index: its number from 0 among all replicas of the pool.
    """
    pool, host = inventory.pools[replica.pool], inventory.hosts[replica.host]
    first = replica.cards[0].number if replica.cards else 0
    service = _service_name(pool.short or replica.pool, first, copy, has_gpus=bool(host.gpus))
    shared = host.shared.get(placement.shared or "")
    engine, named = replica.engine, pool.ports
    # Of a server that takes a share of each of its cards, independent of what it needs.
    fraction = engine.gpu_memory_fraction if replica.weights.served_by.takes_share else None
    # A port that is derived follows from what the replica is, not from where it stands in the inventory.
    port = PORT_BASE[replica.kind] + (first + (copy - 1) * PORTS_OF_COPY if first else copy - 1)
    if shared is not None:
        named, port = shared.port, shared.port or SHARED_PORT_BASE + first
        engine = engine.model_copy(update={"sleep_idle_s": engine.sleep_idle_s or shared.idle_s})
    elif pool.ports:
        port = pool.ports + index
    return replace(
        replica,
        service=placement.shared or service,
        container=container_name(inventory, replica.host, service),
        port=port,
        is_port_explicit=named is not None,
        engine=engine,
        card_mib=tuple(round(card.vram_mib * fraction) for card in replica.cards) if fraction else replica.card_mib,
        shared=shared,
    )


def _service_name(short: str, first: int, copy: int, *, has_gpus: bool) -> str:
    """`gpu-3` on GPU 3, `gpu-3-2` for a second replica there; `chat-1` on the CPU, `chat-cpu-1` beside GPUs."""
    if first:
        return f"{short}-{first}" + (f"-{copy}" if copy > 1 else "")
    return f"{short}-cpu-{copy}" if has_gpus else f"{short}-{copy}"


def memory_on_cpu_mib(replica: Replica) -> int:
    """Container limit in MiB when a replica that has cards is run on the processor instead."""
    memory = replica.memory
    if memory is not None:
        memory = replace(memory, host_weights=memory.total, host_cache=0, host_compute=0, output=0, checkpoint=0)
    limit = host_mib(replica.weights, replica.engine, memory, replica.draft, is_on_gpu=False)
    return limit + replica.cache_ram_mib


def container_name(inventory: Inventory, host: str, service: str) -> str:
    """Name of a service's container; two sites on one machine differ in what it begins with."""
    return "-".join(part for part in (inventory.container_prefix, host, service) if part)


def swarm_name(host: str, service: str) -> str:
    """How a service is called in the stack of a whole site, and so in DNS, whichever network it is asked for on."""
    return f"{host}-{service.removesuffix(f'.{INSIDE}')}".replace(".", "-")


def bracketed(address: str) -> str:
    """An address as it stands before `:port`: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address
