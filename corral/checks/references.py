"""What must hold in an inventory before it can be resolved: every name leads somewhere, every value suits its place.

`references.yaml` says what each rule demands, what is told when it is broken, and the remedy; docs/reference/rules.md
is made from it, tests/rules has a pair of inventories for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from corral.checks.registry import Findings, Row, Texts, findings, known
from corral.config.card_names import ASKED, ROWS, maker_of, meant_by
from corral.config.client_names import added_models, all_aliases, kind_of, kinds_of, poller_key, routed_names
from corral.config.file_names import file_of, is_below, ollama_manifest, tag_of
from corral.config.inventory import Inventory, Kind, Model, Placement, ServerSettings, Tier
from corral.config.source import plain_yaml, values_in
from corral.errors import Finding, KeyPath, did_you_mean, dotted
from corral.gateway.routes import AZURE_PREFIX, CONSUMER_ROUTES
from corral.plan.cards import CATALOGUE, card_facts
from corral.plan.routing import SECTIONS, local_names, pool_context, reachable, reaches_cloud, tier_settings
from corral.plan.settings import engine_place, merged_engine
from corral.plan.site import bracketed

TEXTS = Texts.beside(__file__)
_finding, _broken, _first, _known = TEXTS.finding, TEXTS.broken, TEXTS.first, known
# What LiteLLM sells.
PAID: dict[str, Any] = plain_yaml(Path(__file__).with_name("litellm_paid.yaml").read_bytes())
# With this begin the names of keys that the kit makes for itself.
OWN_PREFIX = "corral-"
QUANTIZED = {"q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0"}
# Providers that give every customer an address.
OWN_ADDRESS = ("azure/", "azure_ai/", "databricks/", "hosted_vllm/", "litellm_proxy/")
# Endings of files that PyTorch and others run when they read them.
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
SOURCES = (
    "write hf:owner/repo/file.gguf, hf:owner/repo:Q4_K_M, https://…, file:/folder/file.gguf, ollama:name:tag or a path "
    "in the models folder"
)
# Halves of files, as they were uploaded before llama.cpp could split models itself.
_HALF = re.compile(r"(?i)\.(gguf|safetensors)[.-](part|split)")
COMMIT = re.compile(r"[0-9a-f]{40}")
ANY_MAKER = "nvidia, amd or intel"
_LOOPBACK = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(?=[:/]|$)")
_OF_APPLE = re.compile(r"(apple-)?m[1-9](-(pro|max|ultra))?$")
# What only a shell fills in, and a name without an ending.
_OF_SHELL, _ENDING = re.compile(r"^~|\$[A-Za-z{]"), re.compile(r"\.[A-Za-z]\w*$")

# What counts tokens of a node.
COSTS = ("price", "budget")
# Kinds without tokens.
SPEECH = ("transcription", "speech")


def check_references(inventory: Inventory) -> list[Finding]:
    """Every name in the inventory that leads nowhere, and what else must hold before a site can be resolved."""
    own = [finding for check in CHECKS for finding in check(inventory)]
    return [*own, *findings("inventory", inventory)]


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
        path: KeyPath = ("pools", name)
        kinds = sorted(kinds_of(inventory, name))
        yield from _known("model-exists", "model", pool.model, (*path, "model"), inventory.models)
        has_replicas = any(place.host for place in pool.on)
        yield from _broken(path, (pool.model is None and has_replicas, "model-exists/missing", ""))
        yield from _broken(path, (len(kinds) > 1, "kinds-agree/differ", "on"), kinds=", ".join(kinds))
    for pool_name, place, path in _places(inventory):
        yield from _place(inventory, place, path)
        yield from _gpus(inventory, place, path)
        yield from _place_on_local_host(inventory, pool_name, place, path)


def _place(inventory: Inventory, place: Placement, path: KeyPath) -> Findings:
    has_host, has_node = place.host is not None, place.node is not None
    candidates = [host for name, host in inventory.hosts.items() if place.host in (None, name)]
    has_card = any(host.gpus and host.runtime == "compose" for host in candidates)
    yield from _broken(
        path,
        (place.auto and (place.gpus is not None or has_node), "place-exists/auto-and-card", ""),
        (place.auto and not has_card, "place-exists/no-card", ""),
        (not (place.auto or has_host or has_node), "place-exists/nowhere", ""),
        (has_host and has_node, "place-exists/both", ""),
        (has_node and not has_host and (place.gpus or place.replicas), "place-exists/node-gpus", ""),
        (place.model and not has_node, "place-exists/host-model", "model"),
    )
    yield from _known("place-exists", "host", place.host, (*path, "host"), inventory.hosts)
    yield from _known("place-exists", "node", place.node, (*path, "node"), inventory.nodes)
    node = inventory.nodes.get(place.node or "")
    if node is not None and node.models:
        yield from _broken(path, (place.model is None, "node-model/unnamed", ""), models=", ".join(node.models))
        yield from _known("node-model", f"model of {place.node}", place.model, (*path, "model"), node.models)
    elif node is not None:
        yield from _broken(path, (place.model is not None, "node-model/only", "model"), node=place.node)


def _gpus(inventory: Inventory, place: Placement, path: KeyPath) -> Findings:
    gpus, each, host = place.gpus, place.gpus_per_replica, inventory.hosts.get(place.host or "")
    yield from _broken(path, (gpus is None and each > 1, "gpu-exists/no-gpus", "gpus_per_replica"))
    if host is None or gpus is None:
        return
    for number, times in Counter(gpus).items():
        rows: list[Row] = [
            (number > len(host.gpus), "gpu-exists/unknown", "gpus"),
            (times > 1, "gpu-exists/twice", "gpus"),
        ]
        yield from _broken(path, *rows, number=number, times=times, host=place.host, count=len(host.gpus) or "none")
    yield from _broken(path, (len(gpus) % each, "gpu-exists/groups", "gpus_per_replica"), count=len(gpus), each=each)


def _place_on_local_host(inventory: Inventory, pool: str, place: Placement, path: KeyPath) -> Findings:
    model, host = _model_of(inventory, pool), inventory.hosts.get(place.host or "")
    if host is not None and host.runtime == "local":
        yield from _broken(
            path,
            (model and not model.served_by.is_local, "local-runtime/docker", ""),
            (place.gpus, "local-runtime/gpus", "gpus"),
            server=model and model.served_by.title,
        )


def _shared_places(inventory: Inventory) -> Findings:
    first: dict[tuple[str, str], tuple[str, Placement]] = {}
    seen: set[tuple[str, str, str]] = set()
    for name, place, path in _places(inventory):
        if place.shared is None:
            continue
        key = (place.host or "", place.shared)
        other, where = first.get(key, (name, place))
        wrong = next(_shared_place(inventory, name, place, path), None)
        if wrong:
            yield wrong
        elif (name, *key) in seen:
            yield _finding("shared-place/twice", (*path, "shared"), name=name, shared=place.shared)
        elif set(where.gpus or ()) != set(place.gpus or ()):
            cards = {"theirs": _cards_of(where), "ours": _cards_of(place)}
            yield _finding("shared-place/cards", (*path, "gpus"), shared=place.shared, other=other, name=name, **cards)
        else:
            first.setdefault(key, (name, place))
        seen.add((name, *key))


def _shared_place(inventory: Inventory, pool: str, place: Placement, path: KeyPath) -> Findings:
    """What is wrong with a place on a shared server by itself."""
    host, model = inventory.hosts.get(place.host or ""), _model_of(inventory, pool)
    return _first(
        (*path, "shared"),
        (place.auto, "shared-place/auto", ""),
        (place.host is None, "shared-place/no-host", ""),
        (host and place.shared not in host.shared, "shared-place/unknown", ""),
        (host and host.runtime == "local", "shared-place/local", ""),
        (place.replicas or len(place.gpus or ()) > place.gpus_per_replica, "shared-place/several", ""),
        (model and not model.served_by.is_shareable, "shared-place/alone", ""),
        host=place.host, shared=place.shared, near=did_you_mean(place.shared or "", host.shared if host else ()),
        server=model and model.served_by.title,
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
        is_own = name == roles["monitoring"] and name in inventory.hosts
        yield from _broken(path, (is_own, "role-host-exists/own", ""), name=name)
    yield from _own_machine(inventory, tracing.url if tracing else None, ("tracing", "url"))
    traced = inventory.hosts.get(roles["tracing"] or "")
    yield from _broken(("tracing",), (traced and traced.runtime == "local", "local-runtime/langfuse", "host"))


def _cards(inventory: Inventory) -> Findings:
    for name, host in inventory.hosts.items():
        path: KeyPath = ("hosts", name, "gpus")
        first = {(gpu.card, gpu.vram_gib): index for index, gpu in reversed(list(enumerate(host.gpus)))}
        for (card, vram_gib), index in first.items():
            yield from _card_known(inventory, card, vram_gib, (*path, index))
        for what in ("uuid", "pci"):
            for index, other in _repeated(str(getattr(gpu, what) or "").lower() for gpu in host.gpus):
                values = {"number": index + 1, "other": other + 1}
                yield _finding("card-distinct/twice", (*path, index, what), what=what, **values)


def _card_known(inventory: Inventory, card: str, vram_gib: float | None, path: KeyPath) -> Findings:
    """All that is not known of a card, in one finding: where the site describes it, else where it has it."""
    said, alike, maker = inventory.cards.get(card), meant_by(card), maker_of(card)
    facts = card_facts(card, said)
    has_memory = vram_gib or (facts.vram_gib if facts else said and said.vram_gib)
    if said and said.compute_capability and facts and facts.vendor != "nvidia":
        path = ("cards", card, "compute_capability")
        yield _finding("card-known/foreign", path, card=card, vendor=facts.vendor)
    missing = [*([] if has_memory else ["vram_gib: …"]), *([] if facts else [f"vendor: {maker or ANY_MAKER}"])]
    if not missing:
        return
    near = did_you_mean(card, [*CATALOGUE, *inventory.cards])
    values = {
        "card": card, "lines": ", ".join(missing), "ask": ASKED[maker],
        "near": f"{near} Otherwise add" if near.startswith("did") else "add",
        "alike": " or ".join(f"{item} ({ROWS[item]['vram_gib']} GiB)" for item in alike),
    }  # fmt: skip
    if said and not alike:
        yield _finding("card-known/incomplete", ("cards", card), **values)
        return
    yield from _first(
        (*path, "card"),
        (facts and facts.unified_memory and alike == [card], "card-known/shared", ""),
        (alike, "card-known/several", ""),
        (_OF_APPLE.match(card), "card-known/apple", ""),
        (True, "card-known/unknown", ""),
        **values,
    )


def _far_servers(inventory: Inventory) -> Findings:
    gateway = inventory.gateway
    far = sorted({place.host for _, place, _ in _places(inventory) if place.host} - {gateway.host})
    if far and gateway.balancing == "direct":
        others = far[0] + (f" and {len(far) - 1} other hosts" if len(far) > 1 else "")
        yield _finding("direct-far/far", ("gateway", "balancing"), host=gateway.host, others=others)


def _quantized_caches(inventory: Inventory) -> Findings:
    for name, pool in inventory.pools.items():
        hosts = (inventory.hosts[place.host] for place in pool.on if place.host in inventory.hosts)
        cards = sorted({gpu.card for host in hosts for gpu in host.gpus} | {""})
        for card in cards if pool.model in inventory.models else ():
            engine = merged_engine(inventory, name, card)
            if engine.cache_type in QUANTIZED and engine.flash_attention == "off":
                off = engine_place(inventory, name, card, "flash_attention")
                said = dotted(engine_place(inventory, name, card, "cache_type"))
                yield _finding("flash-attention/needed", off, cache_type=engine.cache_type, said=said)


# --- names -----------------------------------------------------------------------------------------------------------


def _names(inventory: Inventory) -> Findings:
    owner: dict[str, str] = {}
    for name, path in added_models(inventory):
        other = all_aliases(inventory).get(name)
        yield from _broken(path, (other, "alias-unique/taken", ""), alias=name, other=other)
    for alias, name, path in routed_names(inventory):
        other = owner.get(alias)
        yield from _first(
            path,
            (alias in inventory.pools, "alias-unique/pool", ""),
            (other == name, "alias-unique/twice", ""),
            (other, "alias-unique/taken", ""),
            alias=alias,
            other=other,
        )
        owner.setdefault(alias, name)
    first: dict[Kind | None, str] = {}
    for name, pool in inventory.pools.items():
        other = first.setdefault(kind_of(inventory, name), name) if pool.editor_names else name
        yield from _broken(("pools", name), (other != name, "alias-unique/editors", "editor_names"), other=other)


def _receivers(inventory: Inventory) -> Findings:
    names = ["nobody", *(item.name for item in (inventory.monitoring.receivers if inventory.monitoring else ()))]
    for index, _ in _repeated(names):
        yield _finding("receiver-unique/twice", ("monitoring", "receivers", index - 1, "name"), name=names[index])


def _consumers(inventory: Inventory) -> Findings:
    auto, pools = inventory.gateway.auto, inventory.pools
    names = [*pools, *([auto.name] if auto else []), *(name for pool in pools.values() for name in pool.background)]
    names += [name for name, _ in added_models(inventory)]
    path: KeyPath = ("gateway", "unknown_model")
    yield from _known("pool-exists", "pool", inventory.gateway.unknown_model, path, pools)
    for name, consumer in inventory.consumers.items():
        opened, path = consumer.pools or (), ("consumers", name)
        for index, pool in enumerate(opened):
            yield from _known("pool-exists", "pool", pool, (*path, "pools", index), names)
        for index, _ in _repeated(pool if pool in names else "" for pool in opened):
            yield _finding("pool-exists/twice", (*path, "pools", index), pool=opened[index])
        yield from _known("team-exists", "team", consumer.team, (*path, "team"), inventory.teams)
        if consumer.local_only:
            for index, pool in enumerate(opened):
                if reaches_cloud(inventory, pool):
                    yield _finding("local-only/cloud", (*path, "pools", index), pool=pool)
            yield from _broken(path, (not opened and not local_names(inventory), "local-only/none", "local_only"))
        yield from _broken(path, (name.lower().startswith(OWN_PREFIX), "consumer-name/own", ""), prefix=OWN_PREFIX)
    used = {consumer.team for consumer in inventory.consumers.values()}
    for name in inventory.teams:
        yield from _broken(("teams", name), (name not in used, "team-exists/unused", ""), team=name)
    consumers = list(inventory.consumers)
    for index, other in _repeated(name.lower() for name in consumers):
        name = consumers[index]
        yield _finding("consumer-name/case", ("consumers", name), name=name, other=consumers[other])
    has_no_database = consumers and not inventory.gateway.database
    keeps_nowhere = inventory.gateway.conversations and not inventory.gateway.database
    yield from _broken(
        ("gateway",),
        (has_no_database, "consumer-database/missing", "database"),
        (keeps_nowhere, "conversations-database/missing", "database"),
    )


def _path_prefix(inventory: Inventory) -> Findings:
    gateway, path = inventory.gateway, inventory.gateway.path or ""
    first = {route.split("/")[1] for route in (*CONSUMER_ROUTES, AZURE_PREFIX)} | {"health", "healthz"}
    is_direct = gateway.balancing == "direct" and gateway.entrance is None
    yield from _broken(
        ("gateway",),
        (path and is_direct, "path-prefix/direct", "path"),
        (path and path.split("/")[1] in first, "path-prefix/route", "path"),
        (gateway.proxies and is_direct, "path-prefix/direct", "proxies"),
        prefix=path,
    )


def _paid_settings(inventory: Inventory) -> Findings:
    for name, consumer in inventory.consumers.items():
        for key in PAID["metadata"].keys() & consumer.metadata:
            path: KeyPath = ("consumers", name, "metadata", key)
            yield _finding("paid-setting/metadata", path, key=key, instead=PAID["metadata"][key])
    path, extra = ("gateway", "extra"), inventory.gateway.extra
    for section, settings in PAID["settings"].items():
        given = extra.get(section)
        for key in settings.keys() & given if isinstance(given, dict) else ():
            yield _finding("paid-setting/setting", (*path, section, key), key=key, instead=settings[key])
    own = extra.get("litellm_settings")
    callbacks = own.get("callbacks") if isinstance(own, dict) else None
    for index, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        if callback in PAID["callbacks"]:
            yield _finding("paid-setting/callback", (*path, "litellm_settings", "callbacks", index), key=callback)


# --- nodes -----------------------------------------------------------------------------------------------------------


def _own_machine(inventory: Inventory, url: str | None, path: KeyPath) -> Findings:
    """A url that the gateway calls, on loopback: in a container that is the container itself."""
    host = inventory.hosts.get(inventory.gateway.host)
    found = _LOOPBACK.match(url or "")
    if found and host and host.runtime == "compose":
        own = "192.0.2.10" if host.address.startswith("127.") else host.address
        rest = (url or "")[found.end() :]
        yield _finding("node-address/own-machine", path, address=found[1], meant=f"http://{bracketed(own)}{rest}")


def _nodes(inventory: Inventory) -> Findings:
    for name, node in inventory.nodes.items():
        path, is_cloud, price = ("nodes", name), node.engine == "cloud", node.price
        has_price = price and (price.input_usd_per_million or price.output_usd_per_million)
        is_small = node.engine in ("ollama", "inferrlm")
        yield from _first(
            path,
            (node.model is None and not node.models, "node-model/missing", ""),
            (node.model is not None and node.models, "node-model/both", "model"),
            (is_cloud and node.models, "node-model/cloud", "models"),
            (node.budget and node.models, "node-model/budget", "budget"),
        )
        for model in node.models:
            served = node.serving(model)
            yield from _broken(
                (*path, "models", model),
                (is_small and served.kind not in ("chat", "embedding"), "node-kind/kind", "kind"),
                (node.models[model].thinking and served.kind != "chat", "thinking-kind/kind", "thinking"),
                engine=node.engine,
                kind=served.kind,
            )
        yield from _broken(
            path,
            (is_cloud and node.model and "/" not in node.model, "node-address/no-provider", "model"),
            (not is_cloud and node.url is None and node.dials_in is None, "node-address/no-url", ""),
            (is_cloud and node.url is None and (node.model or "").startswith(OWN_ADDRESS), "node-address/own", ""),
            (is_small and not node.models and node.kind not in ("chat", "embedding"), "node-kind/kind", "kind"),
            (node.thinking is not None and node.kind != "chat", "thinking-kind/kind", "thinking"),
            (node.budget and not has_price and node.kind not in SPEECH, "budget-price/missing", "budget"),
            engine=node.engine,
            kind=node.kind,
        )
        yield from _own_machine(inventory, node.url, (*path, "url"))
        if node.ca_file is not None:
            yield from _first(
                (*path, "ca_file"),
                (not (node.url or "").startswith("https:"), "node-authority/plain", ""),
                (inventory.gateway.balancing == "direct", "node-authority/direct", ""),
            )
        if node.key_header is not None:
            yield from _first(
                (*path, "key_header"),
                (is_cloud, "key-header/cloud", ""),
                (node.api_key is None, "key-header/no-key", ""),
                (inventory.gateway.balancing == "direct", "key-header/direct", ""),
            )


def _speech(inventory: Inventory) -> Findings:
    """Speech has no tokens."""
    for name, node in inventory.nodes.items():
        is_speech = all(node.serving(model).kind in SPEECH for model in node.names)
        yield from _broken(("nodes", name), *((getattr(node, key) and is_speech, "speech/price", key) for key in COSTS))
    for name, pool in inventory.pools.items():
        is_speech = kind_of(inventory, name) in SPEECH
        counted: tuple[tuple[KeyPath, object], ...] = (
            (("price",), pool.price), (("request", "max_tokens"), pool.request.max_tokens),
            (("limits", "tpm"), pool.limits.tpm),
        )  # fmt: skip
        for key, value in counted:
            yield from _broken(("pools", name, *key), (value and is_speech, "speech/price", ""))


def _nodes_of_pools(inventory: Inventory) -> Findings:
    places = list(_places(inventory))
    for index, _ in _repeated(place.node and (name, place.node) for name, place, _ in places):
        yield _finding("node-once/twice", (*places[index][2], "node"))
    for index, other in _repeated(place.node and (place.node, place.model) for _, place, _ in places):
        (name, _, path), first = places[index], places[other][0]
        yield from _broken(path, (first != name, "node-once/taken", "node"), other=first)
    for name, pool in inventory.pools.items():
        model = _model_of(inventory, name)
        if pool.thinking is not None and model is not None and model.kind != "chat":
            yield _finding("thinking-kind/kind", ("pools", name, "thinking"), kind=model.kind)


# --- routing ---------------------------------------------------------------------------------------------------------


def _tiers(inventory: Inventory) -> Findings:
    tiers = inventory.gateway.auto.tiers if inventory.gateway.auto else ()
    for index, tier in enumerate(tiers):
        path: KeyPath = ("gateway", "auto", "tiers", index)
        yield from _pools_of_tier(inventory, tier, path)
        settings = tier_settings(tier)
        takes = [name for name in settings if settings[name] not in (None, ()) and name != "words_beyond"]
        is_said = any(getattr(tier, name) is not None for name in takes[:1])
        yield from _first(
            path,
            (tier.name in [other.name for other in tiers[:index]], "tier-known/twice", "name"),
            (index == 0 and takes, "tier-known/first", ""),
            (index > 0 and not takes, "tier-known/empty", ""),
            name=tier.name,
            remedy=f"remove {takes[0]}" if is_said else "put the easiest tier first",
        )


def _pools_of_tier(inventory: Inventory, tier: Tier, path: KeyPath) -> Findings:
    places: list[KeyPath] = [(*path, "pool"), *((*path, "spill", number) for number in range(len(tier.spill)))]
    pools = (tier.pool, *tier.spill)
    for name, place in zip(pools, places, strict=True):
        yield from _known("tier-pool", "pool", name, place, inventory.pools)
        has_other = name in inventory.pools and set(kinds_of(inventory, name)) - {"chat"}
        yield from _broken(place, (has_other, "tier-pool/kind", ""), pool=name)
    for index, _ in _repeated(pools):
        yield _finding("tier-pool/twice", places[index], pool=pools[index])


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
                yield _finding("fallback-pool/twice", (*path, index), other=others[index])
        is_other = pool.background and set(kinds_of(inventory, name)) - {"chat"}
        yield from _broken(("pools", name), (is_other, "background-chat/kind", "background"))


def _fallback(inventory: Inventory, name: str, other: str, path: KeyPath) -> Findings:
    """What is wrong with one pool that is asked instead of another."""
    names = {"name": name, "other": other}
    mine, theirs = (sorted(kinds_of(inventory, pool)) for pool in (name, other))
    if mine and theirs and mine != theirs:
        yield _finding("fallback-pool/kind", path, mine=", ".join(mine), theirs=", ".join(theirs), **names)
    if path[2] == "context_fallback":
        contexts = {pool: pool_context(inventory, pool) for pool in (name, other)}
        unknown = [pool for pool, context in contexts.items() if context is None]
        yield from _first(
            path,
            (unknown, "fallback-context/unknown", ""),
            ((contexts[other] or 0) <= (contexts[name] or 0), "fallback-context/shorter", ""),
            pool="".join(unknown[:1]), mine=contexts[name], theirs=contexts[other], **names,
        )  # fmt: skip
    elif name in reachable(inventory, other):
        yield _finding("fallback-cycle/itself" if other == name else "fallback-cycle/turn", path, **names)


# --- model files -----------------------------------------------------------------------------------------------------


def _models(inventory: Inventory) -> Findings:
    for name, model in inventory.models.items():
        path: KeyPath = ("models", name)
        is_chat = model.kind == "chat"
        has_other_count = not model.reads_files or len(model.sources) > len(_sources(model))
        yield from _broken(
            path,
            (model.sha256 and has_other_count, "model-source/checksum", "sha256"),
            (model.revision and not model.source.startswith("hf:"), "model-source/revision", "source"),
            (model.projector is not None and not is_chat, "projector-kind/kind", "projector"),
            (model.adapters and not is_chat, "adapter/kind", "adapters"),
            kind=model.kind,
        )
        for key, source in _sources(model):
            yield from _source(model, source, (*path, key))
        yield from _repository(model, path)
        yield from _adapters(model, (*path, "adapters"))
        if model.draft is not None:
            yield from _draft(inventory, name, model, model.draft.model)


def _sources(model: Model) -> list[tuple[str, str]]:
    """The sources of a model's files, each with the key that it stands under."""
    own = [("source", model.source), *([("projector", model.projector)] if model.projector else [])]
    own += [("components", source) for source in model.components.values()]
    return [*own, *(("adapters", adapter.source) for adapter in model.adapters)]


def _source(model: Model, source: str, path: KeyPath) -> Findings:
    """What is wrong with one source of a model."""
    scheme, _, rest = source.partition(":") if ":" in source else ("", "", source)
    parts, file = rest.split("/"), file_of(source)
    is_file = model.reads_files
    least, form = (3, "hf:owner/repo/file.gguf or hf:owner/repo:Q4_K_M") if is_file else (2, "hf:owner/repo")
    is_open = source.startswith("http://") and not _LOOPBACK.match(source)
    is_bare = is_file and not scheme and "/" not in source and not _ENDING.search(source)
    of_torch = is_file and model.kind != "image" and file.lower().endswith(".safetensors")
    yield from _first(
        path,
        (_OF_SHELL.search(rest), "model-source/shell", ""),
        (scheme in ("hf", "ollama") and rest.startswith("/"), "model-source/slashes", ""),
        (scheme not in ("", "hf", "https", "http", "file", "ollama"), "model-source/scheme", ""),
        (not scheme and source.startswith("/"), "model-source/whole", ""),
        (_HALF.search(source), "model-file/half", ""),
        ({"..", "."} & set(parts), "model-source/dots", ""),
        (any(part.startswith("-") for part in parts), "model-source/dash", ""),
        (scheme == "file" and (parts[0] or not parts[-1]), "model-source/relative", ""),
        (scheme == "ollama" and not (is_file and ollama_manifest(source)), "model-source/ollama", ""),
        (is_file and not scheme and "/" in source and not source.endswith(".gguf"), "model-source/folder", ""),
        (tag_of(source) and path[-1] == "projector", "model-source/projector", ""),
        (scheme == "hf" and not is_file and ":" in rest, "model-source/quantization", ""),
        (scheme == "hf" and not tag_of(source) and len(parts) < least, "model-source/hub", ""),
        (scheme == "hf" and not all(parts), "model-source/hub", ""),
        (scheme in ("http", "https") and (not file or " " in source), "model-source/web", ""),
        (is_file and not is_below(file if scheme else source), "model-source/name", ""),
        (is_bare, "model-source/bare", ""),
        (of_torch, "model-source/torch", ""),
        (is_file and file.lower().endswith(PICKLED), "model-source/pickle", ""),
        (is_file and is_open and not model.sha256_of(source), "model-source/http", ""),
        scheme=scheme, sources=_meant_source(source), source=source, server=model.served_by.title, form=form,
        rest=rest.lstrip("/"),
    )  # fmt: skip


def _meant_source(source: str) -> str:
    """What to write instead of a source: the same as `hf:` or `ollama:` where it looks like one, else every form."""
    bare = re.sub(r"^(ollama|hf|huggingface)(:?//?)", "", source)
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+:[\w.-]+", bare):
        return SOURCES
    return f"write hf:{bare}, if it is on the Hub" if "/" in bare else f"write ollama:{bare}, if Ollama has it here"


def _is_repository(source: str) -> bool:
    """Whether a source is a repository or a folder, not a file."""
    scheme, _, rest = source.rpartition(":")
    return scheme in ("", "hf") and not (scheme and rest.count("/") > 1)


def _repository(model: Model, path: KeyPath) -> Findings:
    is_pickle = model.source.lower().endswith(PICKLED)
    if model.kind == "image" and not model.reads_files and (is_pickle or not _is_repository(model.source)):
        yield _finding("repository-commit/file", (*path, "source"))
        return
    places = {adapter.source: ("adapters", index, "source") for index, adapter in enumerate(model.adapters)}
    for source in model.repositories:
        if not COMMIT.fullmatch(model.revision_of(source)):
            page = f"https://huggingface.co/{source.removeprefix('hf:')}"
            place = (*path, *places.get(source, ("source",)))
            yield _finding("repository-commit/missing", place, source=source, page=page)


def _adapters(model: Model, path: KeyPath) -> Findings:
    again = dict(_repeated(adapter.source for adapter in model.adapters))
    for index, adapter in enumerate(model.adapters):
        yield from _broken(
            (*path, index),
            (index in again, "adapter/twice", "source"),
            ({",", ":"} & set(file_of(adapter.source)), "adapter/sign", "source"),
            (adapter.revision and not adapter.source.startswith("hf:"), "adapter/revision", "source"),
            other=model.adapters[again.get(index, 0)].name,
        )


def _draft(inventory: Inventory, name: str, model: Model, draft: str) -> Findings:
    path, other = ("models", name, "draft"), inventory.models.get(draft)
    if model.kind != "chat":
        yield _finding("draft-model/kind", path, kind=model.kind)
        return
    yield from _known("draft-model", "model", draft, (*path, "model"), inventory.models)
    yield from _first(
        (*path, "model"),
        (draft == name, "draft-model/itself", ""),
        (other and other.kind != "chat", "draft-model/other", ""),
        (other and not other.served_by.reads_files, "draft-model/no-file", ""),
        name=name,
        draft=draft,
        other=other and other.kind,
    )


def _settings_of_servers(inventory: Inventory) -> Findings:
    for name, model in inventory.models.items():
        pools = {key: pool for key, pool in inventory.pools.items() if pool.model == name}
        said: list[tuple[KeyPath, ServerSettings]] = [(("models", name, "engine"), model.engine)]
        said += [(("pools", key, "engine"), pool.engine) for key, pool in pools.items()]
        server = model.served_by
        for path, engine in said:
            told = {key for key, value in engine if value is not None}
            for key in sorted(told - server.settings):
                yield _finding("vllm-setting/unknown", (*path, key), server=server.title, key=key)


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
    for path, value, before in values_in(data):
        text = "" if isinstance(value, bool | float) or _SECRET_NAME.fullmatch(str(value)) else str(value)
        if text and (SECRET_VALUE.search(text) or _is_meant_secret(path, text, before)):
            yield _finding("no-secret/value", path)
            continue
        is_of_server = path[-2:-1] == ("environment",) and ("engine" in path or path[0] == "defaults")
        if text == "" and value and is_of_server and SECRET_KEY.search(str(path[-1])):
            yield _finding("no-secret/name", path)


def _is_meant_secret(path: KeyPath, text: str, before: str) -> bool:
    """Whether the key, or the option before it, says that a value is a secret."""
    if "extra_args" in path:
        return bool(_SECRET_OPTION.fullmatch(before) or _SECRET_OPTION_AND_VALUE.match(text))
    is_free_text = any(part in ("environment", "extra") or str(part).startswith("x-") for part in path)
    return isinstance(path[-1], str) and bool(SECRET_KEY.search(path[-1])) and is_free_text


def _jobs(inventory: Inventory) -> Findings:
    jobs, gateway = inventory.jobs, inventory.gateway
    if jobs is None:
        return
    has_door = gateway.balancing != "direct" or gateway.entrance is not None
    yield from _broken(("jobs",), (not has_door, "jobs-door/direct", ""))
    auto = (gateway.auto.name,) if gateway.auto else ()
    names = (*inventory.pools, *all_aliases(inventory), *auto, *(name for name, _ in added_models(inventory)))
    yield from _known("jobs-model", "pool or alias", jobs.model, ("jobs", "model"), names)
    pollers = list(jobs.pollers)
    for index, other in _repeated(poller_key(name) for name in pollers):
        path = ("jobs", "pollers", pollers[index])
        yield _finding("jobs-pollers/same", path, name=pollers[index], other=pollers[other])
    for name, poller in jobs.pollers.items():
        for index, model in enumerate(poller.models):
            yield from _known("jobs-model", "pool or alias", model, ("jobs", "pollers", name, "models", index), names)


CHECKS: tuple[Callable[[Inventory], Findings], ...] = (
    _speech,
    _pools_and_places, _shared_places, _hosts_of_roles, _cards, _far_servers, _quantized_caches, _names, _receivers,
    _consumers, _path_prefix, _paid_settings, _nodes, _nodes_of_pools, _tiers, _fallbacks, _models,
    _settings_of_servers, _secrets, _jobs,
)  # fmt: skip
