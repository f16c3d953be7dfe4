"""What must hold in an inventory before it can be resolved: every name leads somewhere, every value suits its place.

`references.yaml` says what each rule demands; docs/reference/rules.md is made from it, tests/rules has a pair of
inventories for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from corral.checks.registry import findings
from corral.config.client_names import kind_of, kinds_of, routed_names
from corral.config.file_names import is_file_name
from corral.config.inventory import Inventory, Kind, Model, Node, Placement, ServerSettings, Tier, file_of
from corral.config.source import plain_yaml
from corral.errors import Finding, KeyPath, did_you_mean, dotted
from corral.plan.cards import CATALOGUE, card_facts
from corral.plan.routing import SECTIONS, pool_context, tier_settings
from corral.plan.settings import engine_place, merged_engine

# What each rule demands.
RULES: dict[str, str] = plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes())
# What LiteLLM sells.
PAID: dict[str, Any] = plain_yaml(Path(__file__).with_name("litellm_paid.yaml").read_bytes())
# With this begin the names of keys that the kit makes for itself.
OWN_PREFIX = "corral-"
QUANTIZED = {"q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0"}
# Endings of files that PyTorch and others run when they read them.
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
SOURCES = "write hf:owner/repo/file.gguf, https://…, file:/folder/file.gguf or a file name"
COMMIT = re.compile(r"[0-9a-f]{40}")
_LOOPBACK = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/")

Findings = Iterator[Finding]
# Of several reasons the first that holds is told: whether it does, the message and the remedy.
Reasons = Iterable[tuple[object, str, str]]


def check_references(inventory: Inventory) -> list[Finding]:
    """Every name in the inventory that leads nowhere, and what else must hold before a site can be resolved."""
    own = [finding for check in CHECKS for finding in check(inventory)]
    return [*own, *findings("inventory", inventory)]


def _first(rule: str, path: KeyPath, reasons: Reasons) -> Findings:
    """The first of the reasons that holds."""
    found = next(((message, remedy) for holds, message, remedy in reasons if holds), None)
    if found:
        yield Finding(found[0], path, found[1], rule)


def _known(rule: str, what: str, name: str | None, path: KeyPath, known: Iterable[str]) -> Findings:
    """A finding where something is named that is not there."""
    if name is not None and name not in known:
        yield Finding(f'no {what} named "{name}"', path, did_you_mean(name, known), rule)


def _repeated(items: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The index of every item that is there before, and of the first that equals it; empty ones do not count."""
    first: dict[Any, int] = {}
    for index, item in enumerate(items):
        if item and first.setdefault(item, index) != index:
            yield index, first[item]


def _places(inventory: Inventory) -> Iterator[tuple[str, Placement, KeyPath]]:
    """Every placement with its pool's name and its path."""
    for name, pool in inventory.pools.items():
        for index, placement in enumerate(pool.on):
            yield name, placement, ("pools", name, "on", index)


def _model_of(inventory: Inventory, pool: str) -> Model | None:
    return inventory.models.get(inventory.pools[pool].model or "")


# --- places ----------------------------------------------------------------------------------------------------------


def _pools_and_places(inventory: Inventory) -> Findings:
    for name, pool in inventory.pools.items():
        yield from _known("model-exists", "model", pool.model, ("pools", name, "model"), inventory.models)
        if pool.model is None and any(placement.host for placement in pool.on):
            remedy = "replicas on a host serve one of `models`"
            yield Finding('"model" is missing', ("pools", name), remedy, "model-exists")
        kinds = kinds_of(inventory, name)
        if len(kinds) > 1:
            words = f"replicas of different kinds: {', '.join(sorted(kinds))}"
            yield Finding(words, ("pools", name, "on"), "make a pool for each kind", "kinds-agree")
    for pool_name, place, path in _places(inventory):
        yield from _place(inventory, place, path)
        yield from _gpus(inventory, place, path)
        yield from _place_on_local_host(inventory, pool_name, place, path)


def _place(inventory: Inventory, place: Placement, path: KeyPath) -> Findings:
    if place.auto:
        yield from _auto_place(inventory, place, path)
    elif place.host is None and place.node is None:
        yield Finding("this place names neither a host nor a node", path, "add host: or node:", "place-exists")
    if place.host is not None and place.node is not None:
        yield Finding("this place names both a host and a node", path, "make two places of it", "place-exists")
    yield from _known("place-exists", "host", place.host, (*path, "host"), inventory.hosts)
    yield from _known("place-exists", "node", place.node, (*path, "node"), inventory.nodes)
    if place.node is not None and place.host is None and (place.gpus or place.replicas):
        remedy = "its `slots` says how many requests it takes"
        yield Finding("a node has no gpus and replicas of ours", path, remedy, "place-exists")


def _auto_place(inventory: Inventory, place: Placement, path: KeyPath) -> Findings:
    if place.gpus is not None or place.node is not None:
        words = "auto chooses the card; this place names one already"
        yield Finding(words, path, "remove auto, or gpus and node", "place-exists")
    hosts = [host for name, host in inventory.hosts.items() if place.host in (None, name)]
    if not any(host.gpus and host.runtime == "compose" for host in hosts):
        remedy = "add hosts.….gpus, or write on: {host: …} for the CPU"
        yield Finding("auto finds no card to choose from", path, remedy, "place-exists")


def _gpus(inventory: Inventory, place: Placement, path: KeyPath) -> Findings:
    host, each = inventory.hosts.get(place.host or ""), place.gpus_per_replica
    if place.gpus is None and each > 1:
        remedy = "add gpus: with their numbers"
        yield Finding("gpus_per_replica needs gpus", (*path, "gpus_per_replica"), remedy, "gpu-exists")
    if host is None or place.gpus is None:
        return
    has = f"{place.host} has {len(host.gpus) or 'none'}; GPUs count from 1"
    for number, times in Counter(place.gpus).items():
        if number > len(host.gpus):
            yield Finding(f"there is no GPU {number}", (*path, "gpus"), has, "gpu-exists")
        if times > 1:
            remedy = "for several replicas on one card write replicas: N"
            yield Finding(f"GPU {number} is named {times} times", (*path, "gpus"), remedy, "gpu-exists")
    if len(place.gpus) % each:
        words = f"{len(place.gpus)} GPUs cannot be shared out in groups of {each}"
        yield Finding(words, (*path, "gpus_per_replica"), "name a multiple of it", "gpu-exists")


def _place_on_local_host(inventory: Inventory, pool: str, place: Placement, path: KeyPath) -> Findings:
    model, host = _model_of(inventory, pool), inventory.hosts.get(place.host or "")
    if host is None or host.runtime != "local":
        return
    if model is not None and not model.served_by.is_local:
        yield Finding(
            f"{model.served_by.title} needs Docker",
            path,
            "put the pool on a host with runtime: compose",
            "local-runtime",
        )
    if place.gpus:
        remedy = "use runtime: compose for GPUs, or replicas: N"
        yield Finding("a local host's servers run on the CPU", (*path, "gpus"), remedy, "local-runtime")


def _shared_places(inventory: Inventory) -> Findings:
    first: dict[tuple[str, str], tuple[str, Placement]] = {}
    seen: set[tuple[str, str, str]] = set()
    for name, place, path in _places(inventory):
        if place.shared is None:
            continue
        key = (place.host or "", place.shared)
        wrong = list(_first("shared-place", (*path, "shared"), _why_not_shared(inventory, name, place)))
        other, where = first.get(key, (name, place))
        yield from wrong
        if not wrong and (name, *key) in seen:
            yield Finding(f"{name} is on {place.shared} twice", (*path, "shared"), "remove one", "shared-place")
        elif not wrong and set(where.gpus or ()) != set(place.gpus or ()):
            words = f"{place.shared} is one server: {other} puts it on {_cards_of(where)}, {name} on {_cards_of(place)}"
            yield Finding(words, (*path, "gpus"), "name the same cards, or make two servers of it", "shared-place")
        elif not wrong:
            first.setdefault(key, (name, place))
        seen.add((name, *key))


def _why_not_shared(inventory: Inventory, pool: str, place: Placement) -> Reasons:
    """What may be wrong with a place on a shared server by itself."""
    host, model = inventory.hosts.get(place.host or ""), _model_of(inventory, pool)
    server = model.served_by if model else None
    if host is not None and place.shared not in host.shared:
        near = did_you_mean(place.shared or "", host.shared)
        no_server = (
            f'{place.host} shares no server named "{place.shared}"',
            f"{near}; hosts.{place.host}.shared has them",
        )
    else:
        no_server = "", ""
    return (
        (place.auto, "a shared server is on cards that you name", "name gpus:, and leave auto: out"),
        (place.host is None, "a shared server is on a host", "add host:, and remove node:"),
        (no_server[0], *no_server),
        (host is not None and host.runtime == "local", "servers of a local host serve one model each",
         "use runtime: compose, or servers of their own"),
        (place.replicas or len(place.gpus or ()) > place.gpus_per_replica, f"{place.shared} is one server",
         "name the cards of one replica, and remove replicas:"),
        (server and not server.is_shareable, f"a server of {server.title if server else ''} serves one model",
         "remove shared: here"),
    )  # fmt: skip


def _cards_of(place: Placement) -> str:
    return f"GPU {', '.join(map(str, place.gpus))}" if place.gpus else "the processor"


# --- hosts and their cards -------------------------------------------------------------------------------------------


def _hosts_of_roles(inventory: Inventory) -> Findings:
    monitoring, tracing = inventory.monitoring, inventory.tracing
    roles = {
        "gateway": inventory.gateway.host,
        "tracing": tracing.host if tracing else None,
        "monitoring": monitoring.host if monitoring else None,
    }
    for section, host in roles.items():
        yield from _known("role-host-exists", "host", host, (section, "host"), inventory.hosts)
    for name in monitoring.local if monitoring else ():
        path = ("monitoring", "local", name)
        yield from _known("role-host-exists", "host", name, path, inventory.hosts)
        if name == roles["monitoring"] and name in inventory.hosts:
            words = f"the farm's own Prometheus runs on {name} already"
            yield Finding(words, path, "remove it; its port is monitoring.port", "role-host-exists")
    traced = inventory.hosts.get(roles["tracing"] or "")
    if traced is not None and traced.runtime == "local":
        remedy = "name a host with runtime: compose, or a url"
        yield Finding("Langfuse needs Docker", ("tracing", "host"), remedy, "local-runtime")


def _cards(inventory: Inventory) -> Findings:
    for name, host in inventory.hosts.items():
        path: KeyPath = ("hosts", name, "gpus")
        first = {gpu.card: index for index, gpu in reversed(list(enumerate(host.gpus)))}
        for card, index in first.items():
            if card_facts(card, inventory.cards.get(card)) is None:
                near = did_you_mean(card, [*CATALOGUE, *inventory.cards])
                remedy = f"{near} Otherwise add" if near.startswith("did") else "add"
                words = f'the card "{card}" is not in the catalogue'
                yield Finding(words, (*path, index, "card"), f"{remedy} cards.{card}.vram_gib", "card-known")
        for what in ("uuid", "pci"):
            for index, other in _repeated(str(getattr(gpu, what) or "").lower() for gpu in host.gpus):
                words = f"GPU {index + 1} has the {what} of GPU {other + 1}"
                yield Finding(words, (*path, index, what), "see nvidia-smi -L", "card-distinct")


def _far_servers(inventory: Inventory) -> Findings:
    gateway = inventory.gateway
    far = sorted({place.host for _, place, _ in _places(inventory) if place.host} - {gateway.host})
    if far and gateway.balancing == "direct":
        others = far[0] + (f" and {len(far) - 1} other hosts" if len(far) > 1 else "")
        words = f"LiteLLM on {gateway.host} cannot call the servers of {others}: they admit client certificates only"
        yield Finding(words, ("gateway", "balancing"), "use slots: HAProxy calls them over TLS", "direct-far")


def _quantized_caches(inventory: Inventory) -> Findings:
    for name, pool in inventory.pools.items():
        hosts = (inventory.hosts[place.host] for place in pool.on if place.host in inventory.hosts)
        cards = sorted({gpu.card for host in hosts for gpu in host.gpus} | {""})
        for card in cards if pool.model in inventory.models else ():
            engine = merged_engine(inventory, name, card)
            if engine.cache_type in QUANTIZED and engine.flash_attention == "off":
                off = engine_place(inventory, name, card, "flash_attention")
                said = dotted(engine_place(inventory, name, card, "cache_type"))
                words = f"a {engine.cache_type} cache ({said}) needs flash attention"
                yield Finding(words, off, "set it to auto or on, or cache_type to f16", "flash-attention")


# --- names -----------------------------------------------------------------------------------------------------------


def _names(inventory: Inventory) -> Findings:
    owner: dict[str, str] = {}
    for alias, name, path in routed_names(inventory):
        other = owner.get(alias)
        taken = f'the alias "{alias}" is here twice' if other == name else f'the alias "{alias}" belongs to {other}'
        reasons = (
            (alias in inventory.pools, f'the alias "{alias}" is the name of a pool', "choose another"),
            (other, taken, "remove one" if other == name else "an alias leads to one pool"),
        )
        yield from _first("alias-unique", path, reasons)
        owner.setdefault(alias, name)
    first: dict[Kind | None, str] = {}
    for name, pool in inventory.pools.items():
        editors = first.setdefault(kind_of(inventory, name), name) if pool.editor_names else name
        if editors != name:
            words = f"the names of editors lead to {editors} already"
            remedy = "give this pool the aliases that you want"
            yield Finding(words, ("pools", name, "editor_names"), remedy, "alias-unique")


def _receivers(inventory: Inventory) -> Findings:
    receivers = inventory.monitoring.receivers if inventory.monitoring else ()
    for index, _ in _repeated(["nobody", *(receiver.name for receiver in receivers)]):
        words, path = f"there is another receiver called {receivers[index - 1].name}", ("monitoring", "receivers")
        yield Finding(words, (*path, index - 1, "name"), "give each a name of its own", "receiver-unique")


def _consumers(inventory: Inventory) -> Findings:
    auto, pools = inventory.gateway.auto, inventory.pools
    names = [*pools, *([auto.name] if auto else []), *(name for pool in pools.values() for name in pool.background)]
    path: KeyPath = ("gateway", "unknown_model")
    yield from _known("pool-exists", "pool", inventory.gateway.unknown_model, path, pools)
    for name, consumer in inventory.consumers.items():
        opened, path = consumer.pools or (), ("consumers", name, "pools")
        for index, pool in enumerate(opened):
            yield from _known("pool-exists", "pool", pool, (*path, index), names)
        for index, _ in _repeated(pool if pool in names else "" for pool in opened):
            yield Finding(f'the pool "{opened[index]}" is here twice', (*path, index), "remove one", "pool-exists")
        if name.lower().startswith(OWN_PREFIX):
            words = f"names with {OWN_PREFIX}… are the kit's own"
            yield Finding(words, ("consumers", name), "choose another name", "consumer-name")
    consumers = list(inventory.consumers)
    for index, other in _repeated(name.lower() for name in consumers):
        words = f'"{consumers[other]}" and "{consumers[index]}" differ by case alone'
        remedy = "rename one; their keys lie in files of these names"
        yield Finding(words, ("consumers", consumers[index]), remedy, "consumer-name")
    if consumers and not inventory.gateway.database:
        words, remedy = (
            "consumers need a database, and there is none",
            "set it to true; without it there is only the master key",
        )
        yield Finding(words, ("gateway", "database"), remedy, "consumer-database")


def _paid_settings(inventory: Inventory) -> Findings:
    for name, consumer in inventory.consumers.items():
        for key in PAID["metadata"].keys() & consumer.metadata:
            words = f"LiteLLM takes `{key}` of a key for a setting that needs its paid licence"
            yield Finding(words, ("consumers", name, "metadata", key), PAID["metadata"][key], "paid-setting")
    path, extra = ("gateway", "extra"), inventory.gateway.extra
    for section, settings in PAID["settings"].items():
        given = extra.get(section)
        for key in settings.keys() & given if isinstance(given, dict) else ():
            words = f"`{key}` needs LiteLLM's paid licence"
            yield Finding(words, (*path, section, key), settings[key], "paid-setting")
    own = extra.get("litellm_settings")
    callbacks = own.get("callbacks") if isinstance(own, dict) else None
    for index, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        if callback in PAID["callbacks"]:
            words = f"the callback `{callback}` needs LiteLLM's paid licence"
            remedy = "leave it out; a callback of your own may do the same"
            yield Finding(words, (*path, "litellm_settings", "callbacks", index), remedy, "paid-setting")


# --- nodes -----------------------------------------------------------------------------------------------------------


def _nodes(inventory: Inventory) -> Findings:
    for name, node in inventory.nodes.items():
        path: KeyPath = ("nodes", name)
        yield from _node_address(node, path)
        if node.engine in ("ollama", "inferrlm") and node.kind not in ("chat", "embedding"):
            words = f"{node.engine} has no {node.kind} requests"
            yield Finding(words, (*path, "kind"), "use another engine for it", "node-kind")
        if node.thinking is not None and node.kind != "chat":
            yield Finding(f"{node.kind} models do not think", (*path, "thinking"), "remove it", "thinking-kind")
        if node.key_header is not None:
            is_direct = inventory.gateway.balancing == "direct"
            yield from _first("key-header", (*path, "key_header"), _why_no_header(node, is_direct=is_direct))
        price = node.price
        if node.budget and not (price and (price.input_usd_per_million or price.output_usd_per_million)):
            remedy = "add price: {input_usd_per_million: …, output_usd_per_million: …}"
            words = "without a price nothing of the budget is ever spent"
            yield Finding(words, (*path, "budget"), remedy, "budget-price")


def _node_address(node: Node, path: KeyPath) -> Findings:
    is_cloud = node.engine == "cloud"
    if is_cloud and node.url is not None:
        remedy = "LiteLLM knows the provider's; a server of your own is engine: openai"
        yield Finding("a cloud model has no url", (*path, "url"), remedy, "node-address")
    if is_cloud and "/" not in node.model:
        words = "a cloud model's name starts with its provider"
        yield Finding(words, (*path, "model"), "for instance openai/gpt-4o-mini", "node-address")
    if not is_cloud and node.url is None:
        remedy = "the node's base address, such as http://192.0.2.7:8080"
        yield Finding('"url" is missing', path, remedy, "node-address")


def _why_no_header(node: Node, *, is_direct: bool) -> Reasons:
    return (
        (node.engine == "cloud", "a cloud model's key goes where its provider wants it", "remove it"),
        (node.api_key is None, "there is no key for this header", "name the key's secret in api_key"),
        (is_direct, "balancing: direct has no HAProxy, which would put the key there",
         "use balancing: slots, or a node that takes Authorization: Bearer"),
    )  # fmt: skip


def _nodes_of_pools(inventory: Inventory) -> Findings:
    places = list(_places(inventory))
    for index, other in _repeated(place.node for _, place, _ in places):
        (name, _, path), first = places[index], places[other][0]
        words = f"the node is in the pool {first} already" if first != name else "the node is named twice"
        yield Finding(words, (*path, "node"), "its slots count once; give the pool an alias instead", "node-once")
    for name, pool in inventory.pools.items():
        model = _model_of(inventory, name)
        if pool.thinking is not None and model is not None and model.kind != "chat":
            words = f"{model.kind} models do not think"
            yield Finding(words, ("pools", name, "thinking"), "remove it", "thinking-kind")


# --- routing ---------------------------------------------------------------------------------------------------------


def _tiers(inventory: Inventory) -> Findings:
    tiers = inventory.gateway.auto.tiers if inventory.gateway.auto else ()
    for index, tier in enumerate(tiers):
        path: KeyPath = ("gateway", "auto", "tiers", index)
        yield from _pools_of_tier(inventory, tier, path)
        settings = tier_settings(tier)
        takes = [name for name in settings if settings[name] not in (None, ()) and name != "words_beyond"]
        if tier.name in [other.name for other in tiers[:index]]:
            yield Finding(f"there are two tiers named {tier.name}", (*path, "name"), "rename one", "tier-known")
        elif index == 0 and takes:
            words = "the first tier takes what no other does; it has no words and lengths"
            is_said = getattr(tier, takes[0]) is not None
            remedy = f"remove {takes[0]}" if is_said else "put the easiest tier first"
            yield Finding(words, path, remedy, "tier-known")
        elif index > 0 and not takes:
            remedy = "add words:, characters_beyond: or messages_beyond:"
            yield Finding("this tier does not say what it takes", path, remedy, "tier-known")


def _pools_of_tier(inventory: Inventory, tier: Tier, path: KeyPath) -> Findings:
    places: list[KeyPath] = [(*path, "pool"), *((*path, "spill", number) for number in range(len(tier.spill)))]
    pools = (tier.pool, *tier.spill)
    for name, place in zip(pools, places, strict=True):
        yield from _known("tier-pool", "pool", name, place, inventory.pools)
        if name in inventory.pools and set(kinds_of(inventory, name)) - {"chat"}:
            yield Finding(f"the pool {name} has no chat", place, "difficulty is judged of chats only", "tier-pool")
    for index, _ in _repeated(pools):
        yield Finding(f"the pool {pools[index]} is in this tier already", places[index], "remove it here", "tier-pool")


def _fallbacks(inventory: Inventory) -> Findings:
    for name, pool in inventory.pools.items():
        for section in SECTIONS:
            others: tuple[str, ...] = getattr(pool, section)
            path: KeyPath = ("pools", name, section)
            for index, other in enumerate(others):
                yield from _known("fallback-pool", "pool", other, (*path, index), inventory.pools)
                if other in inventory.pools:
                    yield from _fallback(inventory, name, other, (*path, index))
            for index, _ in _repeated(other if other in inventory.pools else "" for other in others):
                yield Finding(f"{others[index]} is named twice", (*path, index), "remove one", "fallback-pool")
        if pool.background and set(kinds_of(inventory, name)) - {"chat"}:
            remedy = "make them aliases; such requests are short"
            path = ("pools", name, "background")
            yield Finding("only chats can wait for others", path, remedy, "background-chat")


def _fallback(inventory: Inventory, name: str, other: str, path: KeyPath) -> Findings:
    """What is wrong with one pool that is asked instead of another."""
    mine, theirs = (sorted(kinds_of(inventory, pool)) for pool in (name, other))
    if mine and theirs and mine != theirs:
        words = f"{other} is a pool for {', '.join(theirs)}, {name} for {', '.join(mine)}"
        yield Finding(words, path, "name a pool of the same kind", "fallback-pool")
    if path[2] == "context_fallback":
        contexts = {pool: pool_context(inventory, pool) for pool in (name, other)}
        unknown = [pool for pool, context in contexts.items() if context is None]
        words = f"{other} takes {contexts[other]} tokens, no more than the {contexts[name]} of {name}"
        reasons = (
            (unknown, f"the context of {''.join(unknown[:1])} is not known", "give its nodes a context:"),
            ((contexts[other] or 0) <= (contexts[name] or 0), words, "name a pool with a longer context"),
        )
        yield from _first("fallback-context", path, reasons)
    elif name in _asked_in_turn(inventory, other):
        words = f"{name} falls back to itself" if other == name else f"{other} falls back to {name} in turn"
        yield Finding(words, path, "remove one of the two", "fallback-cycle")


def _asked_in_turn(inventory: Inventory, pool: str) -> list[str]:
    """A pool and all that are asked instead of it, one after the other."""
    found = [pool]
    for name in found:  # grows as it is walked
        more = inventory.pools[name].fallback if name in inventory.pools else ()
        found += (other for other in more if other not in found)
    return found


# --- model files -----------------------------------------------------------------------------------------------------


def _models(inventory: Inventory) -> Findings:
    first: dict[str, tuple[str, str]] = {}
    for name, model in inventory.models.items():
        path: KeyPath = ("models", name)
        yield from _sources_of_model(model, path)
        yield from _repository(model, path)
        yield from _adapters(model, path)
        if model.projector is not None and model.kind != "chat":
            words = f"{model.kind} models do not read images"
            yield Finding(words, (*path, "projector"), "remove it, or say kind: chat", "projector-kind")
        if model.draft is not None:
            yield from _draft(inventory, name, model, model.draft.model)
        for key, source in _sources(model) if model.served_by.reads_files else ():
            other, origin = first.setdefault(file_of(source), (name, source))
            if origin != source:
                words = f'the file name "{file_of(source)}" is that of {other} as well'
                remedy = "rename one file and give its new name as source"
                yield Finding(words, (*path, key), remedy, "model-file")


def _sources(model: Model) -> list[tuple[str, str]]:
    """The sources of a model's files, each with the key that it stands under."""
    own = [("source", model.source), *([("projector", model.projector)] if model.projector else [])]
    return [*own, *(("adapters", adapter.source) for adapter in model.adapters)]


def _sources_of_model(model: Model, path: KeyPath) -> Findings:
    is_repository = not model.served_by.reads_files
    for key, source in _sources(model):
        reasons = _source_reasons(source, is_repository=is_repository)
        reasons += () if is_repository else _file_reasons(source, model.sha256_of(source))
        yield from _first("model-source", (*path, key), reasons)
    if model.sha256 and (not model.served_by.reads_files or len(model.sources) > len(_sources(model))):
        words = "a checksum is that of one file, and this model has another number of them"
        yield Finding(words, (*path, "sha256"), "remove it; models pull pins every file", "model-source")
    yield from _revision("model-source", model.revision, model.source, (*path, "source"))


def _revision(rule: str, revision: str | None, source: str, path: KeyPath) -> Findings:
    if revision and not source.startswith("hf:"):
        remedy = "remove revision, or write hf:owner/repo/file.gguf"
        yield Finding("only an hf: source has revisions", path, remedy, rule)


def _source_reasons(source: str, *, is_repository: bool) -> tuple[tuple[object, str, str], ...]:
    """What may be wrong with a source."""
    scheme, colon, rest = source.rpartition(":") if ":" not in source else source.partition(":")
    parts = rest.split("/")
    least, form = (2, "hf:owner/repo") if is_repository else (3, "hf:owner/repo/file.gguf")
    return (
        (not colon and "/" in source, "a file name has no folder",
         "put the file into the host's models folder, or set models_dir"),
        (scheme not in ("", "hf", "https", "http", "file"), f'"{scheme}:" is not known', SOURCES),
        ({"..", "."} & set(parts), "a source has no `..` and `.`", SOURCES),
        (any(part.startswith("-") for part in parts), "a name in a source does not start with `-`", "rename it"),
        (scheme == "file" and (parts[0] or not parts[-1]), "a file on this machine is named from / on",
         "write file:/folder/file.gguf"),
        (scheme == "hf" and (len(parts) < least or not all(parts)), "the file is missing", f"write {form}"),
        (scheme in ("http", "https") and not file_of(source), "the file is missing", f"write {scheme}://host/…/file.gguf"),
    )  # fmt: skip


def _file_reasons(source: str, sha256: str) -> tuple[tuple[object, str, str], ...]:
    """What may be wrong with the source of a file that llama-server reads."""
    file = file_of(source)
    return (
        (not is_file_name(file), "this is no name of a file", SOURCES),
        (file.lower().endswith(PICKLED), "llama-server reads GGUF files, and this kind of file may hold a program",
         "convert it to .gguf, or take it from a repository that has one"),
        (source.startswith("http://") and not _LOOPBACK.match(source) and not sha256,
         "nothing protects a file on its way over http", "write https://, or add sha256: with the file's checksum"),
    )  # fmt: skip


def _is_repository(source: str) -> bool:
    """Whether a source is a repository or a folder, not a file."""
    scheme, _, rest = source.rpartition(":")
    return scheme in ("", "hf") and not (scheme and rest.count("/") > 1)


def _repository(model: Model, path: KeyPath) -> Findings:
    if model.kind == "image" and not _is_repository(model.source):
        remedy = "write hf:owner/repo and its commit, or the name of a folder in the models folder"
        yield Finding("LocalAI reads a repository, not a file", (*path, "source"), remedy, "repository-commit")
        return
    places = {adapter.source: ("adapters", index, "source") for index, adapter in enumerate(model.adapters)}
    for source in model.repositories:
        if not COMMIT.fullmatch(model.revision_of(source)):
            words = f"{source} has no commit; its owner could change what runs here"
            page = f"https://huggingface.co/{source.removeprefix('hf:')}"
            remedy = f"add revision: with the commit (git ls-remote {page} HEAD), then: ./generate.py models pull"
            yield Finding(words, (*path, *places.get(source, ("source",))), remedy, "repository-commit")


def _adapters(model: Model, path: KeyPath) -> Findings:
    path = (*path, "adapters")
    if model.adapters and model.kind != "chat":
        words = f"{model.kind} models take no adapters"
        yield Finding(words, path, "remove them, or say kind: chat", "adapter")
    for index, other in _repeated(adapter.source for adapter in model.adapters):
        words = f"{model.adapters[other].name} is the same file"
        yield Finding(words, (*path, index, "source"), "give each its own, or remove one", "adapter")
    for index, adapter in enumerate(model.adapters):
        if {",", ":"} & set(file_of(adapter.source)):
            words = "llama-server takes a comma or colon in this file's name for its end"
            yield Finding(words, (*path, index, "source"), "rename the file", "adapter")
        yield from _revision("adapter", adapter.revision, adapter.source, (*path, index, "source"))


def _settings_of_servers(inventory: Inventory) -> Findings:
    for name, model in inventory.models.items():
        pools = {key: pool for key, pool in inventory.pools.items() if pool.model == name}
        said: list[tuple[KeyPath, ServerSettings]] = [(("models", name, "engine"), model.engine)]
        said += [(("pools", key, "engine"), pool.engine) for key, pool in pools.items()]
        server = model.served_by
        for path, engine in said:
            told = {key for key, value in engine if value is not None}
            for key in sorted(told - server.settings):
                remedy = "remove it, or use the other server"
                yield Finding(f"{server.title} has no {key}", (*path, key), remedy, "vllm-setting")


def _draft(inventory: Inventory, name: str, model: Model, draft: str) -> Findings:
    path: KeyPath = ("models", name, "draft")
    other = inventory.models.get(draft)
    if model.kind != "chat":
        words = f"{model.kind} models have nothing to draft"
        yield Finding(words, path, "remove it, or say kind: chat", "draft-model")
        return
    yield from _known("draft-model", "model", draft, (*path, "model"), inventory.models)
    reasons = (
        (draft == name, f"{name} cannot draft for itself", "name a smaller model of its family"),
        (other and other.kind != "chat", f"{draft} is of kind {other and other.kind}, and cannot draft",
         "name a chat model"),
        (other and not other.served_by.reads_files, f"{draft} is no GGUF file, and cannot draft",
         "name a model from a GGUF file"),
    )  # fmt: skip
    yield from _first("draft-model", (*path, "model"), reasons)


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRET_VALUE = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{8,}|hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,}|xox[abp]-[A-Za-z0-9-]{8,}|(gsk|r8|tvly|nvapi)[_-][A-Za-z0-9]{16,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]*:[^/\s@]+@"
)
SECRET_KEY = re.compile(
    r"(password|passwd|passphrase|token|secret|credentials?|(api|master|salt|secret|access|private)[_-]?key)$",
    re.IGNORECASE,
)
_SECRET_OPTION = re.compile(r"--?(api-key|hf-token|password|token)")
_SECRET_OPTION_AND_VALUE = re.compile(_SECRET_OPTION.pattern + "=.")
# What may stand where a secret is meant: its name.
_SECRET_NAME = re.compile(r"(os\.environ/)?[A-Z][A-Z0-9_]*")


def _secrets(inventory: Inventory) -> Findings:
    data = inventory.model_dump(exclude_defaults=True) | inventory.notes
    for path, value, before in _values(data, ()):
        text = "" if isinstance(value, bool | float) or _SECRET_NAME.fullmatch(str(value)) else str(value)
        if text and (SECRET_VALUE.search(text) or _is_meant_secret(path, text, before)):
            remedy = "put the value into .env; only its name belongs here"
            yield Finding("this looks like a secret", path, remedy, "no-secret")


def _is_meant_secret(path: KeyPath, text: str, before: str) -> bool:
    """Whether the key, or the option before it, says that a value is a secret."""
    if "extra_args" in path:
        return bool(_SECRET_OPTION.fullmatch(before) or _SECRET_OPTION_AND_VALUE.match(text))
    return isinstance(path[-1], str) and bool(SECRET_KEY.search(path[-1])) and _is_free_text(path)


def _is_free_text(path: KeyPath) -> bool:
    return any(part in ("environment", "extra") or str(part).startswith("x-") for part in path)


def _values(value: Any, path: KeyPath, before: str = "") -> Iterator[tuple[KeyPath, Any, str]]:
    """Every single value with its path and, in a list, the word before it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _values(item, (*path, index), str(value[index - 1]) if index else "")
    elif value is not None:
        yield path, value, before


CHECKS: tuple[Callable[[Inventory], Findings], ...] = (
    _pools_and_places, _shared_places, _hosts_of_roles, _cards, _far_servers, _quantized_caches, _names, _receivers,
    _consumers, _paid_settings, _nodes, _nodes_of_pools, _tiers, _fallbacks, _models, _settings_of_servers, _secrets,
)  # fmt: skip
