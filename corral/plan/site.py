"""The inventory resolved to facts about hosts, cards and replicas, and the questions components ask of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal
from urllib.parse import urlsplit

from corral.config.inventory import Engine, Gpu, Host, Inventory, Node, Placement, Shared, Weights, file_of, folder_of
from corral.config.model_lock import Gguf, ModelLock
from corral.contributions import Endpoint
from corral.errors import KeyPath
from corral.plan.auto import Seat, placed
from corral.plan.cards import VRAM_RESERVE_MIB, CardFacts, card_facts, vram_mib
from corral.plan.memory import CARD_MIB, MIB, Memory, Use, memory_of
from corral.plan.routing import has_private_cache
from corral.plan.sizes import kv_cache_mib, replica_mib, weights_mib, worst

# Port of GPU 0 (the CPU) for each kind, when the inventory names none; the GPU number is added.
PORT_BASE = {"chat": 8100, "embedding": 8300, "rerank": 8500, "image": 8700}
# The same for servers that several pools share.
SHARED_PORT_BASE = 8900
# Distance between the derived ports of several replicas on one card.
PORTS_OF_COPY = 20

# Stands for a local host's rendered folder in what its programs are told; no inventory can have it in a value.
HERE = "\x1ahere\x1a"
# How long a server may take to start, where the inventory does not say.
START_TIMEOUT_S = 600
NO_LOCK = ModelLock()

KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "chat": {"slots": 1, "cache_reuse": 256},
    "embedding": {"slots": 4, "cache_ram_mib": 0, "cache_reuse": 0},
    "rerank": {"slots": 4, "cache_ram_mib": 0, "cache_reuse": 0},
    "image": {"slots": 1, "memory_mib": 4096, "start_timeout_s": 1800},
}
# Defaults of vLLM; the host memory is for loading the weights into the card.
VLLM_DEFAULTS: dict[str, Any] = {
    "slots": 16, "memory_mib": 8192, "start_timeout_s": 1800,
    "gpu_memory_fraction": 0.9, "adapters_at_once": 1, "adapter_rank": 64,
}  # fmt: skip
# Kinds whose server refuses an input that does not fit into one physical batch (`--ubatch-size`).
WHOLE_INPUT = ("embedding", "rerank")
COMMON_DEFAULTS: dict[str, Any] = {
    "gpu_layers": "all", "batch": 2048, "ubatch": 512, "cache_type": "f16", "flash_attention": "auto",
    "mlock": False, "jinja": True, "start_timeout_s": START_TIMEOUT_S,
}  # fmt: skip


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
    host: str
    service: str
    container: str
    kind: str
    model: str
    weights: Weights
    cards: tuple[Card, ...]
    port: int
    is_port_explicit: bool
    engine: Engine
    slots: int
    vram_mib: int
    memory_mib: int
    cache_ram_mib: int
    # Every file that it opens in the models folder, the model first, and where each comes from.
    files: Mapping[str, str] = field(default_factory=dict)
    # What it takes, from what its model file says; None: estimated from the file's name.
    memory: Memory | None = None
    # The small model that makes it faster.
    draft: Weights | None = None
    # Name of that model's file in the models folder.
    draft_file: str = ""
    # The server that serves it beside others; `service` is that one's name, `container` stays its own.
    shared: Shared | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models that it loads, its own first."""
        return (self.model, *([self.weights.draft.model] if self.weights.draft else []))

    @property
    def start_timeout_s(self) -> int:
        """How long it may take to start and to load."""
        return self.engine.start_timeout_s or START_TIMEOUT_S

    @property
    def context(self) -> int:
        """Tokens of all slots together, as llama-server's `--ctx-size` counts."""
        return self.weights.context * self.slots

    @property
    def file(self) -> str:
        """Name of its model file in the models folder."""
        return next(iter(self.files), "")


@dataclass(frozen=True, slots=True)
class Site:
    """The resolved site."""

    inventory: Inventory
    cards: dict[str, tuple[Card, ...]] = field(default_factory=dict)
    replicas: tuple[Replica, ...] = ()
    lock: ModelLock = NO_LOCK
    # Why replicas of `on: auto` are where they are.
    reasons: tuple[str, ...] = ()
    _members: dict[tuple[str, str], tuple[Replica, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Sorts the replicas by their servers: there may be thousands, and every service is asked for its own."""
        found: dict[tuple[str, str], list[Replica]] = {}
        for replica in self.replicas:
            found.setdefault((replica.host, replica.service), []).append(replica)
        object.__setattr__(self, "_members", {key: tuple(members) for key, members in found.items()})

    def host(self, name: str) -> Host:
        """The host of that name."""
        return self.inventory.hosts[name]

    def is_local(self, host: str) -> bool:
        """Whether the host runs processes instead of containers."""
        return self.host(host).runtime == "local"

    def address(self, endpoint: Endpoint, seen_from: str) -> str:
        """`name:port` under which a program on host `seen_from` reaches an endpoint; on another host its edge."""
        if endpoint.address:
            return f"{bracketed(endpoint.address)}:{endpoint.port}"
        if endpoint.host != seen_from:
            return f"{bracketed(self.host(endpoint.host).address)}:{self.inventory.gateway.edge_port}"
        return f"{'127.0.0.1' if self.is_local(seen_from) else endpoint.service}:{endpoint.port}"

    def is_outside(self, endpoint: Endpoint, seen_from: str) -> bool:
        """Whether an endpoint is on another machine than the host `seen_from`."""
        return bool(endpoint.address) or endpoint.host != seen_from

    def publish_address(self, host: str) -> str:
        """Address that a port is bound to for other programs of the farm; empty: the host's own network is enough.

        Programs on other hosts come through the host's edge.
        """
        return "127.0.0.1" if self.is_local(host) else ""

    def is_behind_edge(self, endpoint: Endpoint, seen_from: str) -> bool:
        """Whether an endpoint is on another host of the site, whose edge stands before it."""
        return not endpoint.address and endpoint.host != seen_from

    def model_path(self, host: str, file: str) -> str:
        """Path of a model file as programs on that host see it."""
        return f"{self.local_folder(self.host(host).models_dir)}/{file}" if self.is_local(host) else f"/models/{file}"

    def config_path(self, host: str, component: str, file: str, container: str) -> str:
        """Path of a rendered file as programs on that host see it."""
        return f"{self.local_folder(component)}/{file}" if self.is_local(host) else container

    def secret_path(self, host: str, name: str) -> str:
        """Path of a secret's file as programs on that host see it."""
        return f"{self.local_folder('secrets')}/{name}" if self.is_local(host) else f"/run/secrets/{name}"

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

    def image(self, key: str, default: str) -> str:
        """The image of that key: the site's own, else the pinned one."""
        return self.inventory.images.get(key, default)


def claimed_mib(members: Iterable[Replica]) -> int:
    """MiB that a service takes on all its cards together: of models that take turns, the worst set of them."""
    found = list(members)
    shared = found[0].shared if found else None
    return worst((item.vram_mib for item in found), shared.loaded if shared else len(found))


def resolve(inventory: Inventory, lock: ModelLock = NO_LOCK) -> Site:
    """The site of an inventory whose references hold (see references.check_references).

    Args:
        inventory: what is wanted.
        lock: what is known of the model files; what is not known is estimated.
    """
    ordered = _in_order(inventory)
    facts = _facts_of_cards(ordered)
    cards = {name: tuple(_cards(name, host, facts)) for name, host in ordered.hosts.items()}
    ordered, reasons = _with_chosen_cards(ordered, lock, cards)
    replicas = (replica for name in ordered.pools for replica in _replicas(ordered, lock, cards, name))
    return Site(ordered, cards, tuple(replicas), lock, reasons)


def _with_chosen_cards(
    inventory: Inventory, lock: ModelLock, cards: dict[str, tuple[Card, ...]]
) -> tuple[Inventory, tuple[str, ...]]:
    """The inventory with a card for every replica that leaves the choice to the plan."""
    seats = [
        Seat(card.host, card.number, card.card, card.vram_mib - VRAM_RESERVE_MIB)
        for host, found in cards.items()
        if inventory.hosts[host].runtime == "compose"
        for card in found
    ]

    @cache
    def size(pool: str, kind: str) -> int:
        return _settings(inventory, lock, pool, kind).vram_mib

    return placed(inventory, seats, size)


def _in_order(inventory: Inventory) -> Inventory:
    """The inventory with its named things sorted: what is rendered does not depend on the order in which they stand."""
    sections = ("hosts", "nodes", "cards", "models", "defaults", "pools", "images")
    update: dict[str, Any] = {name: dict(sorted(getattr(inventory, name).items())) for name in sections}
    if inventory.monitoring is not None:
        local = dict(sorted(inventory.monitoring.local.items()))
        update["monitoring"] = inventory.monitoring.model_copy(update={"local": local})
    return inventory.model_copy(update=update)


def _facts_of_cards(inventory: Inventory) -> dict[str, CardFacts]:
    names = {gpu.card for host in inventory.hosts.values() for gpu in host.gpus}
    found = {name: card_facts(name, inventory.cards.get(name)) for name in sorted(names)}
    return {name: facts for name, facts in found.items() if facts is not None}


def _cards(host: str, facts: Host, known: dict[str, CardFacts]) -> Iterator[Card]:
    before: Counter[str] = Counter()
    for number, gpu in enumerate(facts.gpus, start=1):
        kind = known[gpu.card]
        yield _card(host, number, before[kind.vendor], gpu, kind)
        before[kind.vendor] += 1


def _card(host: str, number: int, index: int, gpu: Gpu, facts: CardFacts) -> Card:
    return Card(
        host, number, gpu.card, vram_mib(gpu, facts), facts.vendor, facts.compute_capability, index, facts.backend,
        gpu.uuid or "", gpu.pci or "", gpu.power_limit_w,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where one replica of a pool lives."""

    host: str
    cards: tuple[Card, ...]
    # Number from 1 among the replicas on the same cards, or on the CPU.
    copy: int
    # Number from 0 among all replicas of the pool.
    index: int
    # Name of the server that it shares with other pools.
    shared: str = ""


def _replicas(
    inventory: Inventory, lock: ModelLock, cards: dict[str, tuple[Card, ...]], name: str
) -> Iterator[Replica]:
    pool = inventory.pools[name]
    if pool.model is None:
        return
    settings = cache(lambda card, cards: _settings(inventory, lock, name, card, cards))
    index = 0
    for placement in pool.on:
        if placement.host is None:
            continue
        for group, copy in _groups(placement):
            chosen = tuple(cards[placement.host][number - 1] for number in group)
            seat = _Seat(placement.host, chosen, copy, index, placement.shared or "")
            replica = _replica(inventory, name, settings(chosen[0].card if chosen else "", len(chosen)), seat)
            drafts = _files(lock, replica.draft) if replica.draft else {}
            files = _files(lock, replica.weights) | drafts
            yield replace(replica, files=files, draft_file=next(iter(drafts), ""))
            index += 1


def _files(lock: ModelLock, weights: Weights) -> dict[str, str]:
    """The model's files in the models folder: each the one that the lock says was taken, else the source's own.

    Of a repository those that the lock knows; before it was pulled, the folder that they will be in.
    """
    if not weights.is_llama:
        return {file: name for source in weights.repositories for file, name in _members(lock, weights, source)}
    known = {source: lock.get(weights.key(source)) for source in weights.sources}
    return {taken.file if taken else file_of(source): source for source, taken in known.items()}


def _members(lock: ModelLock, weights: Weights, source: str) -> Iterator[tuple[str, str]]:
    revision = weights.revision_of(source)
    members = lock.members(source, revision)
    yield from ((known.file, key.rpartition("@")[0]) for key, known in members.items())
    if not members:
        yield folder_of(source, revision), source


def _groups(placement: Placement) -> Iterator[tuple[tuple[int, ...], int]]:
    """GPU numbers and copy number (from 1) of every replica of a placement."""
    copies = range(1, (placement.replicas or 1) + 1)
    if placement.gpus is None:
        yield from (((), copy) for copy in copies)
        return
    size = placement.gpus_per_replica
    for start in range(0, len(placement.gpus), size):
        yield from ((placement.gpus[start : start + size], copy) for copy in copies)


def merged_engine(inventory: Inventory, pool: str, card: str) -> Engine:
    """Engine settings of a pool on a kind of card: kind, card, model and pool have their say, in that order."""
    weights = inventory.models[inventory.pools[pool].model or ""]
    merged: dict[str, Any] = {**COMMON_DEFAULTS, **KIND_DEFAULTS[weights.kind]}
    if weights.server == "vllm":
        merged |= VLLM_DEFAULTS
    if weights.kind in WHOLE_INPUT:
        merged |= {"batch": max(merged["batch"], weights.context), "ubatch": max(merged["ubatch"], weights.context)}
    for _, level in _engine_levels(inventory, pool, card):
        merged.update({key: value for key, value in level if value is not None})
    return Engine(**merged)


def engine_place(inventory: Inventory, pool: str, card: str, key: str) -> KeyPath:
    """Where in the inventory an engine setting is said, or would be said for the pool alone."""
    places = [path for path, level in _engine_levels(inventory, pool, card) if getattr(level, key) is not None]
    return (*(places[-1] if places else ("pools", pool, "engine")), key)


def _engine_levels(inventory: Inventory, pool: str, card: str) -> Iterator[tuple[KeyPath, Engine]]:
    """What the inventory says about a pool's engine on a kind of card, and where; the last word counts."""
    model = inventory.pools[pool].model or ""
    weights = inventory.models[model]
    if weights.kind in inventory.defaults:
        yield ("defaults", weights.kind), inventory.defaults[weights.kind]
    if card in inventory.cards:
        yield ("cards", card, "engine"), inventory.cards[card].engine
    yield ("models", model, "engine"), weights.engine
    yield ("pools", pool, "engine"), inventory.pools[pool].engine


@dataclass(frozen=True, slots=True)
class _Settings:
    """What all replicas of a pool on one kind of card have in common."""

    engine: Engine
    slots: int
    vram_mib: int
    memory_mib: int
    cache_ram_mib: int
    memory: Memory | None


def _settings(inventory: Inventory, lock: ModelLock, pool: str, card: str, cards: int = 1) -> _Settings:
    """Settings of a pool's replicas on so many cards of a kind; 0 cards: on the processor."""
    weights = inventory.models[inventory.pools[pool].model or ""]
    engine = merged_engine(inventory, pool, card)
    draft = _draft_of(inventory, weights)
    memory = memory_of_replica(weights, lock, engine, cards, draft)
    limit = engine.memory_mib or _default_memory_mib(weights, engine, memory, draft, is_on_gpu=cards > 0)
    cache_ram = engine.cache_ram_mib if engine.cache_ram_mib is not None else min(1024, limit // 4)
    if has_private_cache(inventory, pool):
        cache_ram = 0
    if weights.server == "vllm":
        facts = card_facts(card, inventory.cards.get(card))
        vram = round((facts.vram_gib if facts else 0) * 1024 * (engine.gpu_memory_fraction or 0)) * cards
    else:
        vram = engine.vram_mib if engine.vram_mib is not None else _vram_mib(weights, engine, memory, draft, cards)
    return _Settings(engine, engine.slots or 1, vram if cards else 0, limit, cache_ram, memory)


def _draft_of(inventory: Inventory, weights: Weights) -> Weights | None:
    """The model that drafts for another, as it is served: with the other's context."""
    if weights.draft is None:
        return None
    return inventory.models[weights.draft.model].model_copy(update={"context": weights.context, "draft": None})


def memory_of_replica(
    weights: Weights, lock: ModelLock, engine: Engine, cards: int, draft: Weights | None = None
) -> Memory | None:
    """What a server takes, from what its model files say; None while the lock does not know one of them."""
    if draft is not None and weights.draft is not None:
        own = memory_of_replica(weights, lock, engine, cards)
        changed = {"gpu_layers": weights.draft.gpu_layers}
        more = memory_of_replica(
            draft.model_copy(update={"context": weights.context}), lock, engine.model_copy(update=changed), cards
        )
        return own + more if own and more else None
    gguf = gguf_of(weights, lock)
    if gguf is None or not weights.is_llama:
        return None
    use = Use(
        slots=engine.slots or 1, context=weights.context, batch=engine.batch or 2048, ubatch=engine.ubatch or 512,
        cache_type=engine.cache_type or "f16", flash_attention=engine.flash_attention or "auto",
        gpu_layers=(engine.gpu_layers if engine.gpu_layers is not None else "all") if cards else 0,
        embeds=weights.kind in WHOLE_INPUT, cards=max(1, cards),
    )  # fmt: skip
    return memory_of(gguf, use)


def gguf_of(weights: Weights, lock: ModelLock) -> Gguf | None:
    """What a model's file says of itself; the first of several speaks, further parts and a projector add bytes.

    None while the lock does not know all of them.
    """
    files = [lock.get(weights.key(source)) for source in weights.sources]
    first = files[0].gguf if files[0] else None
    if first is None or len(files) == 1:
        return first
    if not all(known and known.size for known in files):
        return None
    spoken = sum(first.layer_bytes) + first.input_bytes + first.output_bytes + first.other_bytes
    more = max(0, sum(known.size for known in files if known) - spoken)
    return first.model_copy(update={"other_bytes": first.other_bytes + more})


def _vram_mib(weights: Weights, engine: Engine, memory: Memory | None, draft: Weights | None, cards: int) -> int:
    """MiB on all its cards together."""
    if memory is not None:
        return -(-memory.device // MIB) + CARD_MIB * cards
    is_on_card = draft is not None and weights.draft is not None and weights.draft.gpu_layers != 0
    more = _guessed_mib(draft, engine) if is_on_card else 0
    return replica_mib(weights, engine.slots or 1, engine.cache_type or "f16") + more


def _guessed_mib(model: Weights | None, engine: Engine) -> int:
    """Weights and cache of a model in MiB, from the name of its file."""
    if model is None:
        return 0
    return weights_mib(model) + kv_cache_mib(model, engine.slots or 1, engine.cache_type or "f16")


def _replica(inventory: Inventory, name: str, settings: _Settings, seat: _Seat) -> Replica:
    pool = inventory.pools[name]
    weights = inventory.models[pool.model or ""]
    service = _service_name(pool.short or name, seat, has_gpus=bool(inventory.hosts[seat.host].gpus))
    shared = inventory.hosts[seat.host].shared.get(seat.shared)
    port = pool.ports + seat.index if pool.ports else _derived_port(weights.kind, seat)
    engine = settings.engine
    if shared is not None:
        port = shared.port or SHARED_PORT_BASE + (seat.cards[0].number if seat.cards else 0)
        engine = engine.model_copy(update={"sleep_idle_s": engine.sleep_idle_s or shared.idle_s})
    return Replica(
        pool=name,
        host=seat.host,
        service=seat.shared or service,
        container=f"{seat.host}-{service}",
        kind=weights.kind,
        model=pool.model or "",
        weights=weights,
        cards=seat.cards,
        port=port,
        is_port_explicit=(shared.port if shared else pool.ports) is not None,
        engine=engine,
        slots=settings.slots,
        vram_mib=_own_share_mib(weights, engine, seat.cards) or settings.vram_mib,
        memory_mib=settings.memory_mib,
        cache_ram_mib=settings.cache_ram_mib,
        memory=settings.memory,
        draft=_draft_of(inventory, weights),
        shared=shared,
    )


def _own_share_mib(weights: Weights, engine: Engine, cards: tuple[Card, ...]) -> int:
    """MiB on these cards of a server that takes a share of each, whatever it needs; 0 for others."""
    fraction = engine.gpu_memory_fraction or 0
    return sum(round(card.vram_mib * fraction) for card in cards) if weights.server == "vllm" else 0


def _service_name(short: str, seat: _Seat, *, has_gpus: bool) -> str:
    """`gpu-3` on GPU 3, `gpu-3-2` for a second replica there; `chat-1` on the CPU, `chat-cpu-1` beside GPUs."""
    if seat.cards:
        return f"{short}-{seat.cards[0].number}" + (f"-{seat.copy}" if seat.copy > 1 else "")
    return f"{short}-cpu-{seat.copy}" if has_gpus else f"{short}-{seat.copy}"


def _derived_port(kind: str, seat: _Seat) -> int:
    """A port that follows from what the replica is, not from where it stands in the inventory."""
    if seat.cards:
        return PORT_BASE[kind] + seat.cards[0].number + (seat.copy - 1) * PORTS_OF_COPY
    return PORT_BASE[kind] + seat.copy - 1


def _default_memory_mib(
    weights: Weights, engine: Engine, memory: Memory | None, draft: Weights | None, *, is_on_gpu: bool
) -> int:
    """Container limit in MiB: the program and its prompt cache; on the CPU the weights and the KV cache as well."""
    if is_on_gpu:
        return 2048 if weights.kind == "chat" else 768
    if memory is not None:
        return -(-memory.host // MIB) + 1024
    return _guessed_mib(weights, engine) + _guessed_mib(draft, engine) + 1024


def memory_on_cpu_mib(replica: Replica) -> int:
    """Container limit in MiB when a replica that has cards is run on the processor instead."""
    memory = None if replica.memory is None else _all_in_host_memory(replica.memory)
    limit = _default_memory_mib(replica.weights, replica.engine, memory, replica.draft, is_on_gpu=False)
    return limit + replica.cache_ram_mib


def _all_in_host_memory(memory: Memory) -> Memory:
    """The same server with everything in host memory."""
    return replace(memory, host_weights=memory.total, host_cache=0, host_compute=0, output=0)


def bracketed(address: str) -> str:
    """An address as it stands before `:port`: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def node_endpoint(node: Node) -> Endpoint:
    """Where a node listens."""
    url = urlsplit(node.url or "")
    return Endpoint(url.port or (443 if url.scheme == "https" else 80), address=url.hostname or "")
