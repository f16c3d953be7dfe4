"""What must hold in an inventory before it can be resolved: every name leads somewhere, every value suits its place.

Each rule's docstring says what it demands; `docs/reference/rules.md` is made from them, `tests/rules` has a pair of
inventories for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from corral.checks.registry import findings
from corral.config.client_names import kind_of, kinds_of, routed_names
from corral.config.file_names import is_file_name
from corral.config.inventory import Engine, Inventory, Kind, Placement, Weights, file_of
from corral.declarations import Server
from corral.errors import KeyPath, Problem, did_you_mean, dotted
from corral.plan.cards import CATALOGUE, card_facts
from corral.plan.routing import SECTIONS, pool_context, tier_settings
from corral.plan.site import engine_place, merged_engine

# With this begin the names of keys that the kit makes for itself.
OWN_PREFIX = "corral-"
# Metadata of a key that LiteLLM 1.106 reads as a setting, of those that it sells, and what to do instead.
PAID_METADATA = {
    "tags": "name it otherwise, such as `labels`; spending is counted for each key anyway",
    "guardrails": "name it otherwise; guard requests in front of the gateway",
    "policies": "name it otherwise; guard requests in front of the gateway",
    "prompts": "name it otherwise; let the client send the prompt",
    "logging": "name it otherwise; figures of every key are in Prometheus and in `keys spend`",
    "secret_manager_settings": "name it otherwise; keys are kept in files, see docs/keys.md",
    "team_member_key_duration": "use `expires`",
    "allowed_passthrough_routes": "leave it out: a key opens the pools that it names",
    "denied_passthrough_routes": "leave it out: a key opens the pools that it names",
    "disable_global_guardrails": "leave it out",
    "enforced_params": "leave it out; check requests in the client",
    "model_max_budget": "make a consumer with a `budget` for each pool",
    "temp_budget_increase": "change `budget`, then ./generate.py keys sync",
}
PAID_SETTINGS = {
    "general_settings": {
        "allowed_ips": "publish the gateway on an address that only they reach, or use the host's firewall",
        "allowed_routes": "leave it out: keys of consumers open nothing but models",
        "admin_only_routes": "leave it out: keys of consumers open nothing but models",
        "public_routes": "leave it out; give each person or program a key",
        "max_request_size_mb": "limit it in a proxy in front of the gateway",
        "max_response_size_mb": "leave it out; `max_tokens` bounds an answer",
        "enforced_params": "check requests in the client",
        "enable_jwt_auth": "make a consumer with `expires`",
        "enable_oauth2_auth": "make a consumer with `expires`",
    },
}
# What LiteLLM 1.106 refuses or ignores without a licence (its source: `premium_user`).
PAID_CALLBACKS = {
    "llamaguard_moderations", "hide_secrets", "openai_moderations", "google_text_moderation", "llmguard_moderations",
    "blocked_user_check", "banned_keywords",
}  # fmt: skip
QUANTIZED = {"q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0"}
CHAT_AND_EMBEDDING = {"chat", "embedding"}

ReferenceRule = Callable[[Inventory], Iterator[Problem]]
REFERENCE_RULES: dict[str, ReferenceRule] = {}


def _reference(rule: str) -> Callable[[ReferenceRule], ReferenceRule]:
    def register(check: ReferenceRule) -> ReferenceRule:
        REFERENCE_RULES[rule] = check
        return check

    return register


def check_references(inventory: Inventory) -> list[Problem]:
    """Every name in the inventory that leads nowhere, and what else must hold before a site can be resolved."""
    found = [replace(problem, rule=rule) for rule, check in REFERENCE_RULES.items() for problem in check(inventory)]
    return [*found, *findings("inventory", inventory)]


def _places(inventory: Inventory) -> Iterator[tuple[str, Placement, KeyPath]]:
    """Every placement with its pool's name and its path."""
    for name, pool in inventory.pools.items():
        for index, placement in enumerate(pool.on):
            yield name, placement, ("pools", name, "on", index)


def _unknown(what: str, name: str, path: KeyPath, known: Iterable[str]) -> Problem:
    return Problem(f'no {what} named "{name}"', path, did_you_mean(name, known))


# --- names that lead somewhere ---------------------------------------------------------------------------------------


@_reference("model-exists")
def _model_exists(inventory: Inventory) -> Iterator[Problem]:
    """A pool's model is one of `models`; a pool with replicas on a host has a model."""
    for name, pool in inventory.pools.items():
        if pool.model is not None and pool.model not in inventory.models:
            yield _unknown("model", pool.model, ("pools", name, "model"), inventory.models)
        if pool.model is None and any(placement.host for placement in pool.on):
            yield Problem('"model" is missing', ("pools", name), "replicas on a host serve one of `models`")


@_reference("place-exists")
def _place_exists(inventory: Inventory) -> Iterator[Problem]:
    """A place is one of `hosts` or one of `nodes`, and only hosts have GPUs and replicas; `auto` finds a card."""
    for _, place, path in _places(inventory):
        if place.auto:
            yield from _auto_problems(inventory, place, path)
        if place.host is None and place.node is None and not place.auto:
            yield Problem("this place names neither a host nor a node", path, "add host: or node:")
        if place.host is not None and place.node is not None:
            yield Problem("this place names both a host and a node", path, "make two places of it")
        if place.host is not None and place.host not in inventory.hosts:
            yield _unknown("host", place.host, (*path, "host"), inventory.hosts)
        if place.node is not None and place.node not in inventory.nodes:
            yield _unknown("node", place.node, (*path, "node"), inventory.nodes)
        if place.node is not None and place.host is None and (place.gpus or place.replicas):
            words = "a node has no gpus and replicas of ours"
            yield Problem(words, path, "its `slots` says how many requests it takes")


@_reference("shared-place")
def _shared_place(inventory: Inventory) -> Iterator[Problem]:
    """Pools share one of the host's `shared` servers, once each, with text models, all on the same cards."""
    first: dict[tuple[str, str], tuple[str, Placement]] = {}
    seen: set[tuple[str, str, str]] = set()
    for name, place, path in _places(inventory):
        if place.shared is None:
            continue
        key = (place.host or "", place.shared)
        words, hint = _why_not_shared(inventory, name, place)
        other, where = first.get(key, (name, place))
        if words:
            yield Problem(words, (*path, "shared"), hint)
        elif (name, *key) in seen:
            yield Problem(f"{name} is on {place.shared} twice", (*path, "shared"), "remove one")
        elif set(where.gpus or ()) != set(place.gpus or ()):
            words = f"{place.shared} is one server: {other} puts it on {_cards_of(where)}, {name} on {_cards_of(place)}"
            yield Problem(words, (*path, "gpus"), "name the same cards, or make two servers of it")
        else:
            first.setdefault(key, (name, place))
        seen.add((name, *key))


def _why_not_shared(inventory: Inventory, pool: str, place: Placement) -> tuple[str, str]:
    """What is wrong with a place on a shared server by itself, and the remedy; empty when nothing is."""
    host = inventory.hosts.get(place.host or "")
    near = did_you_mean(place.shared or "", host.shared) if host else ""
    server = _server(inventory, pool)
    reasons = (
        (place.auto, "a shared server is on cards that you name", "name gpus:, and leave auto: out"),
        (place.host is None, "a shared server is on a host", "add host:, and remove node:"),
        (
            host is not None and place.shared not in host.shared,
            f'{place.host} shares no server named "{place.shared}"',
            f"{near}; hosts.{place.host}.shared has them",
        ),
        (
            host is not None and host.runtime == "local",
            "servers of a local host serve one model each",
            "use runtime: compose, or servers of their own",
        ),
        (
            place.replicas or len(place.gpus or ()) > place.gpus_per_replica,
            f"{place.shared} is one server",
            "name the cards of one replica, and remove replicas:",
        ),
        (
            server is not None and not server.is_shareable,
            f"a server of {server.title if server else ''} serves one model",
            "remove shared: here",
        ),
    )
    return next(((words, hint) for holds, words, hint in reasons if holds), ("", ""))


def _server(inventory: Inventory, pool: str) -> Server | None:
    model = inventory.models.get(inventory.pools[pool].model or "")
    return model.served_by if model else None


def _cards_of(place: Placement) -> str:
    return f"GPU {', '.join(map(str, place.gpus))}" if place.gpus else "the processor"


@_reference("receiver-unique")
def _receiver_unique(inventory: Inventory) -> Iterator[Problem]:
    """Receivers of alerts have names of their own, and none is called `nobody`."""
    receivers = inventory.monitoring.receivers if inventory.monitoring else ()
    first: dict[str, int] = {"nobody": -1}
    for number, receiver in enumerate(receivers):
        if first.setdefault(receiver.name, number) != number:
            words = f"there is another receiver called {receiver.name}"
            yield Problem(words, ("monitoring", "receivers", number, "name"), "give each a name of its own")


def _auto_problems(inventory: Inventory, place: Placement, path: KeyPath) -> Iterator[Problem]:
    """What is wrong with a place that the plan is to choose."""
    if place.gpus is not None or place.node is not None:
        words = "auto chooses the card; this place names one already"
        yield Problem(words, path, "remove auto, or gpus and node")
    hosts = [host for name, host in inventory.hosts.items() if place.host in (None, name)]
    if not any(host.gpus and host.runtime == "compose" for host in hosts):
        yield Problem("auto finds no card to choose from", path, "add hosts.….gpus, or write on: {host: …} for the CPU")


@_reference("role-host-exists")
def _role_host_exists(inventory: Inventory) -> Iterator[Problem]:
    """The hosts of the gateway, of Langfuse and of the monitoring are in `hosts`."""
    if inventory.gateway.host not in inventory.hosts:
        yield _unknown("host", inventory.gateway.host, ("gateway", "host"), inventory.hosts)
    tracing, monitoring = inventory.tracing, inventory.monitoring
    if tracing is not None and tracing.host is not None and tracing.host not in inventory.hosts:
        yield _unknown("host", tracing.host, ("tracing", "host"), inventory.hosts)
    if monitoring is None:
        return
    if monitoring.host not in inventory.hosts:
        yield _unknown("host", monitoring.host, ("monitoring", "host"), inventory.hosts)
    for name in monitoring.local:
        if name not in inventory.hosts:
            yield _unknown("host", name, ("monitoring", "local", name), inventory.hosts)
        elif name == monitoring.host:
            words = f"the farm's own Prometheus runs on {name} already"
            yield Problem(words, ("monitoring", "local", name), "remove it; its port is monitoring.port")


@_reference("gpu-exists")
def _gpu_exists(inventory: Inventory) -> Iterator[Problem]:
    """A place names GPUs that its host has, each once, in full groups of `gpus_per_replica`."""
    for _, place, path in _places(inventory):
        if place.gpus is None and place.gpus_per_replica > 1:
            yield Problem("gpus_per_replica needs gpus", (*path, "gpus_per_replica"), "add gpus: with their numbers")
        host = inventory.hosts.get(place.host or "")
        if host is None or place.gpus is None:
            continue
        for number in place.gpus:
            if number > len(host.gpus):
                has = f"{place.host} has {len(host.gpus)}" if host.gpus else f"{place.host} has none"
                yield Problem(f"there is no GPU {number}", (*path, "gpus"), f"{has}; GPUs count from 1")
        for number, times in Counter(place.gpus).items():
            if times > 1:
                hint = "for several replicas on one card write replicas: N"
                yield Problem(f"GPU {number} is named {times} times", (*path, "gpus"), hint)
        if len(place.gpus) % place.gpus_per_replica:
            words = f"{len(place.gpus)} GPUs cannot be shared out in groups of {place.gpus_per_replica}"
            yield Problem(words, (*path, "gpus_per_replica"), "name a multiple of it")


@_reference("card-known")
def _card_known(inventory: Inventory) -> Iterator[Problem]:
    """The memory of every card is known, from the catalogue or from `cards`."""
    for name, host in inventory.hosts.items():
        first = {gpu.card: index for index, gpu in reversed(list(enumerate(host.gpus)))}
        for card, index in first.items():
            if card_facts(card, inventory.cards.get(card)) is None:
                near = did_you_mean(card, [*CATALOGUE, *inventory.cards])
                hint = f"{near} Otherwise add" if near.startswith("did") else "add"
                words = f'the card "{card}" is not in the catalogue'
                yield Problem(words, ("hosts", name, "gpus", index, "card"), f"{hint} cards.{card}.vram_gib")


@_reference("alias-unique")
def _alias_unique(inventory: Inventory) -> Iterator[Problem]:
    """An alias leads to one pool and is no pool's own name."""
    owner: dict[str, str] = {}
    for alias, name, path in routed_names(inventory):
        if alias in inventory.pools:
            yield Problem(f'the alias "{alias}" is the name of a pool', path, "choose another")
        elif owner.get(alias) == name:
            yield Problem(f'the alias "{alias}" is here twice', path, "remove one")
        elif alias in owner:
            yield Problem(f'the alias "{alias}" belongs to {owner[alias]}', path, "an alias leads to one pool")
        owner.setdefault(alias, name)
    first: dict[Kind | None, str] = {}
    for name, pool in inventory.pools.items():
        other = first.setdefault(kind_of(inventory, name), name) if pool.editor_names else name
        if other != name:
            words = f"the names of editors lead to {other} already"
            yield Problem(words, ("pools", name, "editor_names"), "give this pool the aliases that you want")


@_reference("pool-exists")
def _pool_exists(inventory: Inventory) -> Iterator[Problem]:
    """The pools that consumers and `gateway.unknown_model` name exist, and a consumer names each once."""
    unknown, auto = inventory.gateway.unknown_model, inventory.gateway.auto
    background = [name for pool in inventory.pools.values() for name in pool.background]
    names = [*inventory.pools, *([auto.name] if auto else []), *background]
    if unknown is not None and unknown not in inventory.pools:
        yield _unknown("pool", unknown, ("gateway", "unknown_model"), inventory.pools)
    for name, consumer in inventory.consumers.items():
        for index, pool in enumerate(consumer.pools or ()):
            path = ("consumers", name, "pools", index)
            if pool not in names:
                yield _unknown("pool", pool, path, names)
            elif pool in (consumer.pools or ())[:index]:
                yield Problem(f'the pool "{pool}" is here twice', path, "remove one")


# --- consumers -------------------------------------------------------------------------------------------------------


@_reference("consumer-name")
def _consumer_name(inventory: Inventory) -> Iterator[Problem]:
    """Names of consumers differ by more than case: keys lie in files of these names. `corral-…` is the kit's own."""
    first: dict[str, str] = {}
    for name in inventory.consumers:
        other = first.setdefault(name.lower(), name)
        if other != name:
            words = f'"{other}" and "{name}" differ by case alone'
            yield Problem(words, ("consumers", name), "rename one; their keys lie in files of these names")
        if name.lower().startswith(OWN_PREFIX):
            yield Problem(f"names with {OWN_PREFIX}… are the kit's own", ("consumers", name), "choose another name")


@_reference("consumer-database")
def _consumer_database(inventory: Inventory) -> Iterator[Problem]:
    """A site with consumers has a database: LiteLLM keeps keys nowhere else."""
    if inventory.consumers and not inventory.gateway.database:
        words = "consumers need a database, and there is none"
        yield Problem(words, ("gateway", "database"), "set it to true; without it there is only the master key")


@_reference("paid-setting")
def _paid_setting(inventory: Inventory) -> Iterator[Problem]:
    """Nothing needs LiteLLM's paid licence: without one LiteLLM refuses it, or ignores it with a line in its log."""
    for name, consumer in inventory.consumers.items():
        for key, instead in PAID_METADATA.items():
            if key in consumer.metadata:
                words = f"LiteLLM takes `{key}` of a key for a setting that needs its paid licence"
                yield Problem(words, ("consumers", name, "metadata", key), instead)
    for section, settings in PAID_SETTINGS.items():
        given = inventory.gateway.extra.get(section)
        for key, instead in settings.items():
            if isinstance(given, dict) and key in given:
                words = f"`{key}` needs LiteLLM's paid licence"
                yield Problem(words, ("gateway", "extra", section, key), instead)
    yield from _paid_callbacks(inventory.gateway.extra.get("litellm_settings"))


def _paid_callbacks(settings: Any) -> Iterator[Problem]:
    callbacks: Any = settings.get("callbacks") if isinstance(settings, dict) else None
    for index, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        if callback in PAID_CALLBACKS:
            words = f"the callback `{callback}` needs LiteLLM's paid licence"
            hint = "leave it out; a callback of your own may do the same"
            yield Problem(words, ("gateway", "extra", "litellm_settings", "callbacks", index), hint)


# --- values that suit their place ------------------------------------------------------------------------------------


@_reference("card-distinct")
def _card_distinct(inventory: Inventory) -> Iterator[Problem]:
    """No two cards of a host have the same UUID or PCI slot."""
    for name, host in inventory.hosts.items():
        for what in ("uuid", "pci"):
            first: dict[str, int] = {}
            for index, gpu in enumerate(host.gpus):
                value = str(getattr(gpu, what) or "").lower()
                if value and value in first:
                    words = f"GPU {index + 1} has the {what} of GPU {first[value] + 1}"
                    yield Problem(words, ("hosts", name, "gpus", index, what), "see nvidia-smi -L")
                first.setdefault(value, index)


@_reference("kinds-agree")
def _kinds_agree(inventory: Inventory) -> Iterator[Problem]:
    """All replicas of a pool are of one kind."""
    for name, pool in inventory.pools.items():
        kinds = {inventory.models[pool.model].kind} if pool.model in inventory.models else set()
        kinds |= {inventory.nodes[place.node].kind for place in pool.on if place.node in inventory.nodes}
        if len(kinds) > 1:
            words = f"replicas of different kinds: {', '.join(sorted(kinds))}"
            yield Problem(words, ("pools", name, "on"), "make a pool for each kind")


@_reference("node-address")
def _node_address(inventory: Inventory) -> Iterator[Problem]:
    """A node has a url; a cloud model has none, its name says the provider."""
    for name, node in inventory.nodes.items():
        if node.engine == "cloud" and node.url is not None:
            hint = "LiteLLM knows the provider's; a server of your own is engine: openai"
            yield Problem("a cloud model has no url", ("nodes", name, "url"), hint)
        if node.engine == "cloud" and "/" not in node.model:
            words = "a cloud model's name starts with its provider"
            yield Problem(words, ("nodes", name, "model"), "for instance openai/gpt-4o-mini")
        if node.engine != "cloud" and node.url is None:
            yield Problem('"url" is missing', ("nodes", name), "the node's base address, such as http://192.0.2.7:8080")


@_reference("node-kind")
def _node_kind(inventory: Inventory) -> Iterator[Problem]:
    """Ollama and InferrLM serve chat and embedding models only."""
    for name, node in inventory.nodes.items():
        if node.engine in ("ollama", "inferrlm") and node.kind not in CHAT_AND_EMBEDDING:
            words = f"{node.engine} has no {node.kind} requests"
            yield Problem(words, ("nodes", name, "kind"), "use another engine for it")


@_reference("key-header")
def _key_header(inventory: Inventory) -> Iterator[Problem]:
    """A header for a node's key belongs to a node with a key, and HAProxy puts the key into it."""
    for name, node in inventory.nodes.items():
        if node.key_header is None:
            continue
        path = ("nodes", name, "key_header")
        if node.engine == "cloud":
            yield Problem("a cloud model's key goes where its provider wants it", path, "remove it")
        elif node.api_key is None:
            yield Problem("there is no key for this header", path, "name the key's secret in api_key")
        elif inventory.gateway.balancing == "direct":
            words = "balancing: direct has no HAProxy, which would put the key there"
            yield Problem(words, path, "use balancing: slots, or a node that takes Authorization: Bearer")


@_reference("thinking-kind")
def _thinking_kind(inventory: Inventory) -> Iterator[Problem]:
    """Only chat models think."""
    for name, node in inventory.nodes.items():
        if node.thinking is not None and node.kind != "chat":
            yield Problem(f"{node.kind} models do not think", ("nodes", name, "thinking"), "remove it")
    for name, pool in inventory.pools.items():
        model = inventory.models.get(pool.model or "")
        if pool.thinking is not None and model is not None and model.kind != "chat":
            yield Problem(f"{model.kind} models do not think", ("pools", name, "thinking"), "remove it")


@_reference("node-once")
def _node_once(inventory: Inventory) -> Iterator[Problem]:
    """A node belongs to one pool and is named there once, so that its slots are counted once."""
    pool_of: dict[str, str] = {}
    for pool, place, path in _places(inventory):
        if place.node is not None and place.node in pool_of:
            first = pool_of[place.node]
            words = f"the node is in the pool {first} already" if first != pool else "the node is named twice"
            yield Problem(words, (*path, "node"), "its slots count once; give the pool an alias instead")
        pool_of.setdefault(place.node or "", pool)


@_reference("direct-far")
def _direct_far(inventory: Inventory) -> Iterator[Problem]:
    """With `balancing: direct` all servers are on the gateway's host: LiteLLM has no certificate for other hosts."""
    gateway = inventory.gateway
    if gateway.balancing != "direct":
        return
    hosts = {placement.host for pool in inventory.pools.values() for placement in pool.on if placement.host}
    far = sorted(hosts - {gateway.host})
    if far:
        others = far[0] + (f" and {len(far) - 1} other hosts" if len(far) > 1 else "")
        words = f"LiteLLM on {gateway.host} cannot call the servers of {others}: they admit client certificates only"
        yield Problem(words, ("gateway", "balancing"), "use slots: HAProxy calls them over TLS")


@_reference("local-runtime")
def _local_runtime(inventory: Inventory) -> Iterator[Problem]:
    """A host with `runtime: local` runs servers on its CPU, none that need Docker, and no Langfuse."""
    tracing = inventory.tracing
    host = inventory.hosts.get(tracing.host or "") if tracing else None
    if host is not None and host.runtime == "local":
        yield Problem("Langfuse needs Docker", ("tracing", "host"), "name a host with runtime: compose, or a url")
    for pool, place, path in _places(inventory):
        server = _server(inventory, pool)
        host = inventory.hosts.get(place.host or "")
        if host is None or host.runtime != "local":
            continue
        if server is not None and not server.is_local:
            yield Problem(f"{server.title} needs Docker", path, "put the pool on a host with runtime: compose")
        if place.gpus:
            words = "a local host's servers run on the CPU"
            yield Problem(words, (*path, "gpus"), "use runtime: compose for GPUs, or replicas: N")


@_reference("flash-attention")
def _flash_attention(inventory: Inventory) -> Iterator[Problem]:
    """A quantized K and V cache has flash attention."""
    for name, pool in inventory.pools.items():
        if pool.model not in inventory.models:
            continue
        hosts = (inventory.hosts[place.host] for place in pool.on if place.host in inventory.hosts)
        for card in sorted({gpu.card for host in hosts for gpu in host.gpus} | {""}):
            engine = merged_engine(inventory, name, card)
            if engine.cache_type in QUANTIZED and engine.flash_attention == "off":
                off = engine_place(inventory, name, card, "flash_attention")
                said = dotted(engine_place(inventory, name, card, "cache_type"))
                words = f"a {engine.cache_type} cache ({said}) needs flash attention"
                yield Problem(words, off, "set it to auto or on, or cache_type to f16")


# --- routing -----------------------------------------------------------------------------------------------------


def _tier_pools(inventory: Inventory) -> Iterator[tuple[str, KeyPath]]:
    """Every pool that a tier names, and where."""
    for index, tier in enumerate(inventory.gateway.auto.tiers if inventory.gateway.auto else ()):
        yield tier.pool, ("gateway", "auto", "tiers", index, "pool")
        for number, name in enumerate(tier.spill):
            yield name, ("gateway", "auto", "tiers", index, "spill", number)


def _fallback_pools(inventory: Inventory, *sections: str) -> Iterator[tuple[str, str, KeyPath]]:
    """Every pool that another one names as its fallback: who, whom, and where."""
    for name, pool in inventory.pools.items():
        for section in sections:
            for index, other in enumerate(getattr(pool, section)):
                yield name, other, ("pools", name, section, index)


@_reference("tier-pool")
def _tier_pool(inventory: Inventory) -> Iterator[Problem]:
    """The pools of a tier exist, are chat pools, and its spill is other pools, each once."""
    for name, path in _tier_pools(inventory):
        if name not in inventory.pools:
            yield _unknown("pool", name, path, inventory.pools)
        elif set(kinds_of(inventory, name)) - {"chat"}:
            yield Problem(f"the pool {name} has no chat", path, "difficulty is judged of chats only")
    for index, tier in enumerate(inventory.gateway.auto.tiers if inventory.gateway.auto else ()):
        for number, name in enumerate(tier.spill):
            if name in (tier.pool, *tier.spill[:number]):
                path = ("gateway", "auto", "tiers", index, "spill", number)
                yield Problem(f"the pool {name} is in this tier already", path, "remove it here")


@_reference("tier-known")
def _tier_known(inventory: Inventory) -> Iterator[Problem]:
    """Tiers have names of their own, the first takes what no other does, and every other says what it takes."""
    auto = inventory.gateway.auto
    names = [tier.name for tier in auto.tiers] if auto else []
    for index, tier in enumerate(auto.tiers if auto else ()):
        path: KeyPath = ("gateway", "auto", "tiers", index)
        settings = tier_settings(tier)
        takes = [name for name in settings if settings[name] not in (None, ()) and name != "words_beyond"]
        if tier.name in names[:index]:
            yield Problem(f"there are two tiers named {tier.name}", (*path, "name"), "rename one")
        elif index == 0 and takes:
            words = "the first tier takes what no other does; it has no words and lengths"
            hint = f"remove {takes[0]}" if getattr(tier, takes[0]) is not None else "put the easiest tier first"
            yield Problem(words, path, hint)
        elif index > 0 and not takes:
            hint = "add words:, characters_beyond: or messages_beyond:"
            yield Problem("this tier does not say what it takes", path, hint)


@_reference("fallback-pool")
def _fallback_pool(inventory: Inventory) -> Iterator[Problem]:
    """Pools that are asked instead of another exist, do the same, and are named once."""
    for name, other, path in _fallback_pools(inventory, *SECTIONS):
        if other not in inventory.pools:
            yield _unknown("pool", other, path, inventory.pools)
            continue
        mine, theirs = set(kinds_of(inventory, name)), set(kinds_of(inventory, other))
        if other != name and mine and theirs and mine != theirs:
            words = f"{other} is a pool for {', '.join(sorted(theirs))}, {name} for {', '.join(sorted(mine))}"
            yield Problem(words, path, "name a pool of the same kind")
        if other in getattr(inventory.pools[name], str(path[2]))[: int(path[3])]:
            yield Problem(f"{other} is named twice", path, "remove one")


@_reference("fallback-cycle")
def _fallback_cycle(inventory: Inventory) -> Iterator[Problem]:
    """No pool is asked again instead of itself, by whatever way round."""
    for name, other, path in _fallback_pools(inventory, "fallback"):
        seen: set[str] = set()
        ahead = [other]
        while ahead:
            pool = ahead.pop()
            if pool not in seen and pool in inventory.pools:
                seen.add(pool)
                ahead += inventory.pools[pool].fallback
        if name in seen:
            words = f"{name} falls back to itself" if other == name else f"{other} falls back to {name} in turn"
            yield Problem(words, path, "remove one of the two")


@_reference("fallback-context")
def _fallback_context(inventory: Inventory) -> Iterator[Problem]:
    """A pool for requests that are too long for another one has a longer context."""
    for name, other, path in _fallback_pools(inventory, "context_fallback"):
        if other not in inventory.pools:
            continue
        contexts = {pool: pool_context(inventory, pool) for pool in (name, other)}
        unknown = [pool for pool, context in contexts.items() if context is None]
        if unknown:
            yield Problem(f"the context of {unknown[0]} is not known", path, "give its nodes a context:")
        elif (contexts[other] or 0) <= (contexts[name] or 0):
            words = f"{other} takes {contexts[other]} tokens, no more than the {contexts[name]} of {name}"
            yield Problem(words, path, "name a pool with a longer context")


@_reference("background-chat")
def _background_chat(inventory: Inventory) -> Iterator[Problem]:
    """Only chat pools have names for work that can wait."""
    for name, pool in inventory.pools.items():
        if pool.background and set(kinds_of(inventory, name)) - {"chat"}:
            hint = "make them aliases; such requests are short"
            yield Problem("only chats can wait for others", ("pools", name, "background"), hint)


@_reference("budget-price")
def _budget_price(inventory: Inventory) -> Iterator[Problem]:
    """A node with a budget has a price, without which nothing would ever be spent."""
    for name, node in inventory.nodes.items():
        price = node.price
        if node.budget and (price is None or not (price.input_usd_per_million or price.output_usd_per_million)):
            words = "without a price nothing of the budget is ever spent"
            hint = "add price: {input_usd_per_million: …, output_usd_per_million: …}"
            yield Problem(words, ("nodes", name, "budget"), hint)


# --- model files -----------------------------------------------------------------------------------------------------


# Endings of files that PyTorch and others run when they read them.
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_LOOPBACK = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/")
SOURCES = "write hf:owner/repo/file.gguf, https://…, file:/folder/file.gguf or a file name"


@_reference("model-source")
def _model_source(inventory: Inventory) -> Iterator[Problem]:
    """A model's source is `hf:owner/repo/file`, `https://…/file`, `file:/…/file` or a file name, without `..`."""
    for name, model in inventory.models.items():
        for key, source in _sources(model):
            is_repository = not model.served_by.reads_files
            words, hint = _source_problem(source, is_repository=is_repository)
            if not words and not is_repository:
                words, hint = _file_problem(source, model.sha256_of(source))
            if words:
                yield Problem(words, ("models", name, key), hint)
        if model.sha256 and (not model.served_by.reads_files or len(model.sources) > len(_sources(model))):
            words = "a checksum is that of one file, and this model has another number of them"
            yield Problem(words, ("models", name, "sha256"), "remove it; models pull pins every file")
        if model.revision and not model.source.startswith("hf:"):
            hint = "remove revision, or write hf:owner/repo/file.gguf"
            yield Problem("only an hf: source has revisions", ("models", name, "source"), hint)


def _sources(model: Weights) -> list[tuple[str, str]]:
    """The sources of a model's files, each with the key that it stands under."""
    own = [("source", model.source), *([("projector", model.projector)] if model.projector else [])]
    return [*own, *(("adapters", adapter.source) for adapter in model.adapters)]


def _source_problem(source: str, *, is_repository: bool) -> tuple[str, str]:
    """What is wrong with a source, and the remedy; empty when nothing is."""
    scheme, colon, rest = source.partition(":")
    scheme = scheme if colon else ""
    parts = rest.split("/") if colon else [source]
    wanted = 2 if is_repository else 3
    hub_form = "write hf:owner/repo/file.gguf" if wanted > 2 else "write hf:owner/repo"  # noqa: PLR2004
    checks = (
        (not colon and "/" in source, "a file name has no folder",
         "put the file into the host's models folder, or set models_dir"),
        (scheme not in ("", "hf", "https", "http", "file"), f'"{scheme}:" is not known', SOURCES),
        (bool({"..", "."} & set(parts)), "a source has no `..` and `.`", SOURCES),
        (any(part.startswith("-") for part in parts), "a name in a source does not start with `-`", "rename it"),
        (scheme == "file" and bool(parts[0] or not parts[-1]), "a file on this machine is named from / on",
         "write file:/folder/file.gguf"),
        (scheme == "hf" and (len(parts) < wanted or not all(parts)), "the file is missing", hub_form),
        (scheme in ("http", "https") and not file_of(source), "the file is missing", f"write {scheme}://host/…/file.gguf"),
    )  # fmt: skip
    return next(((words, hint) for is_wrong, words, hint in checks if is_wrong), ("", ""))


def _file_problem(source: str, sha256: str) -> tuple[str, str]:
    """What is wrong with the source of a file that llama-server reads, and the remedy; empty when nothing is."""
    file = file_of(source)
    checks = (
        (not is_file_name(file), "this is no name of a file", SOURCES),
        (file.lower().endswith(PICKLED), "llama-server reads GGUF files, and this kind of file may hold a program",
         "convert it to .gguf, or take it from a repository that has one"),
        (source.startswith("http://") and not _LOOPBACK.match(source) and not sha256,
         "nothing protects a file on its way over http", "write https://, or add sha256: with the file's checksum"),
    )  # fmt: skip
    return next(((words, hint) for is_wrong, words, hint in checks if is_wrong), ("", ""))


@_reference("model-file")
def _model_file(inventory: Inventory) -> Iterator[Problem]:
    """Files from different sources have different names: they share the models folder."""
    first: dict[str, tuple[str, str]] = {}
    for name, model in inventory.models.items():
        if not model.served_by.reads_files:
            continue
        for key, source in _sources(model):
            other, origin = first.setdefault(file_of(source), (name, source))
            if origin != source:
                words = f'the file name "{file_of(source)}" is that of {other} as well'
                yield Problem(words, ("models", name, key), "rename one file and give its new name as source")


@_reference("projector-kind")
def _projector_kind(inventory: Inventory) -> Iterator[Problem]:
    """A projector belongs to a chat model."""
    for name, model in inventory.models.items():
        if model.projector is not None and model.kind != "chat":
            words = f"{model.kind} models do not read images"
            yield Problem(words, ("models", name, "projector"), "remove it, or say kind: chat")


@_reference("adapter")
def _adapter(inventory: Inventory) -> Iterator[Problem]:
    """Adapters belong to a chat model and have files of their own, without comma and colon in their names."""
    for name, model in inventory.models.items():
        path: KeyPath = ("models", name, "adapters")
        if model.adapters and model.kind != "chat":
            yield Problem(f"{model.kind} models take no adapters", path, "remove them, or say kind: chat")
        first: dict[str, int] = {}
        for index, adapter in enumerate(model.adapters):
            if first.setdefault(adapter.source, index) != index:
                words = f"{model.adapters[first[adapter.source]].name} is the same file"
                yield Problem(words, (*path, index, "source"), "give each its own, or remove one")
            if {",", ":"} & set(file_of(adapter.source)):
                words = "llama-server takes a comma or colon in this file's name for its end"
                yield Problem(words, (*path, index, "source"), "rename the file")
            if adapter.revision and not adapter.source.startswith("hf:"):
                hint = "remove revision, or write hf:owner/repo/file.gguf"
                yield Problem("only an hf: source has revisions", (*path, index, "source"), hint)


COMMIT = re.compile(r"[0-9a-f]{40}")


@_reference("repository-commit")
def _repository_commit(inventory: Inventory) -> Iterator[Problem]:
    """Whole repositories, which vLLM and LocalAI serve, have their commit: a branch has other content tomorrow."""
    for name, model in inventory.models.items():
        scheme, _, rest = model.source.rpartition(":")
        if model.kind == "image" and (scheme not in ("", "hf") or (scheme and rest.count("/") > 1)):
            hint = "write hf:owner/repo and its commit, or the name of a folder in the models folder"
            yield Problem("LocalAI reads a repository, not a file", ("models", name, "source"), hint)
            continue
        for source in model.repositories:
            if not COMMIT.fullmatch(model.revision_of(source)):
                words = f"{source} has no commit; whoever owns it could change what runs here"
                page = f"https://huggingface.co/{source.removeprefix('hf:')}"
                hint = f"add revision: with the commit (git ls-remote {page} HEAD), then: ./generate.py models pull"
                yield Problem(words, _place_of_source(name, model, source), hint)


def _place_of_source(name: str, model: Weights, source: str) -> KeyPath:
    numbers = [index for index, adapter in enumerate(model.adapters) if adapter.source == source]
    return ("models", name, "adapters", numbers[0], "source") if numbers else ("models", name, "source")


@_reference("vllm-setting")
def _vllm_setting(inventory: Inventory) -> Iterator[Problem]:
    """Settings of a model and its pools are such as its server has."""
    for name, model in inventory.models.items():
        pools = {key: pool for key, pool in inventory.pools.items() if pool.model == name}
        said: list[tuple[KeyPath, Engine]] = [(("models", name, "engine"), model.engine)]
        said += [(("pools", key, "engine"), pool.engine) for key, pool in pools.items()]
        server = model.served_by
        for path, engine in said:
            told = {key for key, value in engine if value is not None}
            for key in sorted(told - server.settings):
                yield Problem(f"{server.title} has no {key}", (*path, key), "remove it, or use the other server")


@_reference("draft-model")
def _draft_model(inventory: Inventory) -> Iterator[Problem]:
    """The model that drafts for a chat model is another chat model."""
    for name, model in inventory.models.items():
        if model.draft is None:
            continue
        path: KeyPath = ("models", name, "draft")
        if model.kind != "chat":
            yield Problem(f"{model.kind} models have nothing to draft", path, "remove it, or say kind: chat")
        elif model.draft.model not in inventory.models:
            yield _unknown("model", model.draft.model, (*path, "model"), inventory.models)
        elif model.draft.model == name:
            yield Problem(f"{name} cannot draft for itself", (*path, "model"), "name a smaller model of its family")
        elif (kind := inventory.models[model.draft.model].kind) != "chat":
            words = f"{model.draft.model} is of kind {kind}, and cannot draft"
            yield Problem(words, (*path, "model"), "name a chat model")
        elif not inventory.models[model.draft.model].served_by.reads_files:
            words = f"{model.draft.model} is no GGUF file, and cannot draft"
            yield Problem(words, (*path, "model"), "name a model from a GGUF file")


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


@_reference("no-secret")
def _no_secret(inventory: Inventory) -> Iterator[Problem]:
    """No value anywhere in the inventory is a secret; only names of secrets stand there."""
    data = inventory.model_dump(exclude_defaults=True) | inventory.notes
    for path, value, before in _values(data, ()):
        text = "" if isinstance(value, bool | float) or _SECRET_NAME.fullmatch(str(value)) else str(value)
        if text and (SECRET_VALUE.search(text) or _is_meant_secret(path, text, before)):
            yield Problem("this looks like a secret", path, "put the value into .env; only its name belongs here")


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
