"""From what the sources say to one inventory: names, cards, pools, places, and what the user has to complete."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlunsplit

from corral.config.inventory import MAX_GPUS, OWN_FOLDER, PATTERNS
from corral.contributions import is_systems
from corral.verbs.imports.draft import HOST, Draft, Entry, slug, stem, unique
from corral.verbs.imports.litellm import KNOWN, engine_of, is_local, kind_of, parts_of
from corral.verbs.imports.sources import KINDS, Leaf

WORDS: dict[str, str] = KINDS["words"]
SERVED = ("llama", "vllm")
# The order in which people write the first keys of a pool.
KEYS = ("model", "on", "ports", "aliases", "limits")
_FILE = re.compile(r"(?i)\.gguf$")


def build(draft: Draft) -> dict[str, Any]:
    """The inventory as data; empty pools when the sources have nothing that could be called."""
    data = draft.data
    data |= {
        "schema_version": 1,
        "name": "farm",
        "hosts": {HOST: {}},
        "cards": {},
        "nodes": {},
        "models": {},
        "pools": {},
    }
    draft.address = draft.address or str(draft.site.get("host.address", ""))
    _join(draft)
    servers = [item for item in draft.entries if item.engine in SERVED and not item.dropped]
    for entry in servers:
        _model(draft, entry, data)
    _number_cards(draft, [item for item in servers if not item.dropped], data["hosts"][HOST])
    groups = _groups([item for item in draft.entries if not item.dropped and not item.stands_for])
    for asked, members in groups.items():
        _pool(draft, asked, members, data)
    _names(draft, data)
    _site(draft, data)
    for key in [key for key, value in data.items() if value in ({}, None)]:
        del data[key]
    for name, pool in data.get("pools", {}).items():
        data["pools"][name] = {
            key: pool[key] for key in sorted(pool, key=lambda it: KEYS.index(it) if it in KEYS else len(KEYS))
        }
    return data


def _join(draft: Draft) -> None:
    """Finds which deployments lead to servers of other sources, and makes nodes of those that the kit only uses."""
    running = [item for item in draft.entries if item.engine]
    for entry in [item for item in running if item.engine in ("ollama", "localai")]:
        _as_nodes(draft, entry)
    for entry in [item for item in draft.entries if not item.engine and item.get("node.url")]:
        url = parts_of(str(entry.get("node.url")))
        for server in running:
            ports = {server.get("pool.ports"), server.get("node.port")} - {None}
            is_named = url.hostname in (server.name.lower(), str(server.get("container", "")).lower())
            is_here = (
                is_local(url.geturl()) or (draft.address and url.hostname == draft.address)
            ) and url.port in ports
            if (is_named or is_here) and server.engine in SERVED:
                entry.stands_for, server.asked = server, server.asked or entry.asked
                if server.asked != entry.asked:
                    draft.aliases.append((entry.asked, server.asked, entry.leaf))
                server.values |= {
                    key: item for key, item in entry.values.items() if key.startswith("pool.") and key != "pool."
                }
            elif is_named or is_here:
                entry.values["here"] = server.get("node.port") or KINDS["ports"][server.engine]
                entry.values.setdefault("node.slots", server.get("node.slots", 1))
                server.dropped = f"the node of {entry.asked} is this server"


def _as_nodes(draft: Draft, entry: Entry) -> None:
    """A server that goes on running: a node for each of its models that the file names."""
    entry.values["provider"] = "ollama" if entry.engine == "ollama" else "openai"
    entry.values["here"] = entry.get("node.port") or KINDS["ports"][entry.engine]
    entry.values["node.url"] = f"http://localhost:{entry.values['here']}"
    models = entry.values.pop("node.models", [])
    entry.values |= {"node.model": models[0], "node.kind": kind_of(models[0])} if models else {"node.model": ""}
    for name in models[1:]:
        other = draft.entry(name, entry.leaf)
        other.engine, other.values = entry.engine, {**entry.values, "node.model": name, "node.kind": kind_of(name)}


# --- models ----------------------------------------------------------------------------------------------------------


def _model(draft: Draft, entry: Entry, data: dict[str, Any]) -> None:
    """The model of a server, and what its values are in the inventory's terms."""
    model = entry.section("model")
    for part, to in (("path", "source"), ("projector", "projector")):
        if part in model:
            model[to] = _file(draft, entry, str(model.pop(part)))
    repository, file = model.pop("repository", ""), model.pop("hub_file", "")
    if repository and entry.engine == "vllm":
        model["source"] = repository if repository.startswith(("/", "./")) else f"hf:{repository}"
    elif repository:
        name, _, quantization = repository.partition(":")
        model["source"] = f"hf:{name}/{file}" if file else f"hf:{name}:{quantization or 'Q4_K_M'}"
    if not model.get("source"):
        entry.dropped = WORDS["no_model"]
        return
    _context(entry, model)
    if entry.engine == "vllm":
        model["server"] = "vllm"
        model.setdefault("context", 4096)
    model = {"source": model.pop("source"), "kind": model.pop("kind", "chat"), **model}
    known = next((name for name, other in data["models"].items() if other == model), "")
    name = known or unique(stem(model["source"]), data["models"])
    entry.names["model"] = name
    data["models"][name] = model
    draft.origins.setdefault(("models", name), entry.leaf)
    if (
        entry.engine == "vllm"
        and model["source"].startswith("hf:")
        and not re.fullmatch("[0-9a-f]{40}", str(model.get("revision")))
    ):
        model["revision"] = "0" * 40
        draft.complete["models", name, "revision"] = WORDS["commit"].format(source=model["source"].removeprefix("hf:"))
    _draft_model(draft, entry, data, model)


def _draft_model(draft: Draft, entry: Entry, data: dict[str, Any], model: dict[str, Any]) -> None:
    small = entry.section("draft")
    path, repository = small.pop("path", ""), small.pop("repository", "")
    if not path and not repository:
        if small:
            entry.leaf.tell("look", WORDS["no_draft"])
        return
    source = _file(draft, entry, path) if path else f"hf:{repository}" + ("" if ":" in repository else ":Q4_K_M")
    name = next((name for name, other in data["models"].items() if other["source"] == source), "") or unique(
        stem(source), data["models"]
    )
    data["models"].setdefault(name, {"source": source, "kind": "chat"})
    model["draft"] = {"model": name, **small}


def _context(entry: Entry, model: dict[str, Any]) -> None:
    """The context of one request: llama-server divides what it is told between its slots."""
    total, slots = model.pop("context_total", None), int(entry.get("engine.slots", 1))
    if total is None:
        return
    if total <= 0:
        entry.leaf.tell("look", WORDS["whole_context"])
    else:
        is_shared = entry.get("engine.kv_unified") is True
        model["context"] = total if is_shared else max(32, total // slots)
        if slots > 1 and not is_shared:
            entry.leaf.tell("look", WORDS["divided"].format(total=total, slots=slots, each=model["context"]))


def _file(draft: Draft, entry: Entry, path: str) -> str:
    """The source of a file: below a folder of the machine, which servers read in place; or in the models folder."""
    path = re.sub(r"^(\$HOME|\$\{HOME\}|\$\{env\.HOME\})(?=/|$)", "~", path)
    if "$" in path:
        draft.complete["models", stem(KINDS["words"]["file"]), "source"] = WORDS["variable"]
        return WORDS["file"]
    where = PurePosixPath(path)
    mounted = sorted(
        (PurePosixPath(inside) for inside in entry.folders if where.is_relative_to(inside)),
        key=lambda it: -len(it.parts),
    )
    if mounted:
        host = entry.folders[str(mounted[0])]
        rest = where.relative_to(mounted[0])
        folder = _on_machine(host, str(entry.get("folder", "."))) if host.startswith(("/", ".", "~")) else ""
    else:
        rest, folder = (
            PurePosixPath(where.name),
            _on_machine(str(where.parent), str(entry.get("folder", "."))) if "/" in path else "",
        )
    if not folder or is_systems(folder) or not re.fullmatch(PATTERNS["folder"].expression, folder):
        entry.leaf.tell("look", WORDS["copy"].format(file=rest.name, host=HOST))
        return rest.name
    known = draft.stores.get(folder)
    draft.stores[folder] = entry.stores[folder] = known or unique(
        slug(PurePosixPath(folder).name).replace(OWN_FOLDER, "store"), draft.stores.values()
    )
    return str(rest)


def _on_machine(path: str, folder: str) -> str:
    """A path of a source as a whole path of the machine."""
    return str(Path(path).expanduser()) if path.startswith(("/", "~")) else str(Path(folder, path).resolve())


# --- cards -----------------------------------------------------------------------------------------------------------


def _number_cards(draft: Draft, servers: list[Entry], host: dict[str, Any]) -> None:
    """Numbers cards as the inventory does, and tells which are given out several times."""
    for entry in servers:
        _wanted(entry)
    named = dict.fromkeys(card for entry in servers for card in entry.get("place.cards", ()))
    indexes = [int(card) for card in named if card.isdecimal() and int(card) < MAX_GPUS]
    others = [card for card in named if not card.isdecimal() or int(card) >= MAX_GPUS]
    count = max(indexes, default=-1) + 1
    order = {
        **{str(number): number + 1 for number in range(count)},
        **{card: count + n + 1 for n, card in enumerate(others)},
    }
    users = defaultdict(list)
    for entry in servers:
        entry.values["numbers"] = [order[card] for card in entry.get("place.cards", ())]
        for number in entry.values["numbers"]:
            users[number].append(entry)
    for number, several in users.items():
        if len(several) > 1 and not all(item.get("swap") for item in several):
            names = ", ".join(item.name for item in several)
            for item in several:
                (item.cards_leaf or item.leaf).tell("look", WORDS["twice"].format(number=number, names=names))
    if order:
        card = draft.card or WORDS["card"]
        each = [
            {"card": card} | ({"uuid": key} if re.fullmatch(PATTERNS["uuid"].expression, key) else {}) for key in order
        ]
        host["gpus"] = each if any("uuid" in item for item in each) else {"card": card, "count": len(order)}
        maker = " ".join(str(item.get("place.maker", "")) for item in servers).strip()
        if maker and not draft.card:
            draft.complete["hosts", HOST, "gpus"] = WORDS["amd"]


def _wanted(entry: Entry) -> None:
    """The cards of a server as a list of names, and over how many one replica is split."""
    cards, each = entry.get("place.cards"), int(entry.get("place.gpus_per_replica", 1))
    shares = entry.get("engine.tensor_split")
    if entry.get("engine.gpu_layers") == 0:
        cards = []
    if cards is None and (entry.get("swap") or entry.engine == "vllm" or "engine.gpu_layers" in entry.values):
        cards = ["all"]
        entry.leaf.tell("look", WORDS["which_cards"])
    elif cards is None and entry.get("from_ollama"):
        entry.leaf.tell("look", WORDS["on_processor"])
    if cards == ["all"]:
        each = max(each, len(shares) if shares else 1)
        cards = [str(number) for number in range(each)]
        if entry.cards_leaf:
            entry.cards_leaf.tell("look", WORDS["all_cards"].format(count=each))
    elif cards:
        each = len(cards)
    if shares and len(shares) != each:
        entry.values.pop("engine.tensor_split")
        entry.leaf.tell("look", WORDS["shares"])
    entry.values |= {"place.cards": cards or [], "each": each}
    if not cards:
        for key in KINDS["needs_cards"]:
            entry.values.pop(key, None)


# --- pools -----------------------------------------------------------------------------------------------------------


def _engine(entry: Entry) -> dict[str, Any]:
    """Settings of a server as the inventory has them."""
    engine = entry.section("engine")
    value_type = engine.pop("cache_type_v", None)
    if value_type and value_type != engine.setdefault("cache_type", value_type):
        entry.leaf.tell("look", WORDS["cache_types"].format(kept=engine["cache_type"]))
    if (patterns := engine.pop("override_tensor", None)) is not None:
        engine["host_tensors"] = [pair.removesuffix("=CPU") for pair in patterns.split(",")]
    if engine.get("mlock") and entry.engine == "llama":
        engine.pop("load_mode", None)
    return engine


def _groups(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Servers and nodes that answer under one name: the name that clients call, or the model where none is said."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    kept: dict[str, str] = {}
    for entry in entries:
        if entry.engine in SERVED:
            entry.values["settings"] = json.dumps(
                [entry.names["model"], _engine(entry), entry.get("each"), str(entry.get("swap", ""))], sort_keys=True
            )
            alias = str(entry.get("pool.alias", "")).split(",")[0]
            asked = (
                entry.asked
                or alias
                or next((name for name, known in kept.items() if known == entry.values["settings"]), "")
                or entry.names["model"]
            )
            first, asked = asked, _name_for(kept, asked, entry.values["settings"])
            if asked != first:
                entry.leaf.tell("look", WORDS["unlike"].format(pool=first, name=asked))
        else:
            asked = entry.asked or str(entry.get("node.model") or entry.name)
        groups[asked].append(entry)
    return groups


def _name_for(known: dict[str, Any], wanted: str, value: Any) -> str:
    """The wanted name where it is free or stands for the same; else one with a number."""
    name = wanted
    while known.setdefault(name, value) != value:
        name = unique(wanted, [item for item in known if known[item] != value])
    return name


def _pool(draft: Draft, asked: str, members: list[Entry], data: dict[str, Any]) -> None:
    """A pool, with a place for every server and node."""
    name = unique(slug(asked), data["pools"])
    pool: dict[str, Any] = {}
    servers = [item for item in members if item.engine in SERVED]
    if servers:
        pool["model"] = servers[0].names["model"]
    for item in members:
        item.names["pool"] = name
    places = [
        *_server_places(draft, servers, pool, data),
        *(place for item in members if item not in servers for place in _node(draft, item, data)),
    ]
    if not places:
        return
    pool["on"] = places[0] if len(places) == 1 else places
    for item in members:
        for to, value in item.section("pool").items():
            if to and to not in ("alias", "ports"):
                pool[to] = _merged(pool.get(to), value, adds=to == "limits")
    for also in [asked, *(part for item in members for part in str(item.get("pool.alias", "")).split(","))]:
        if also and also != name and re.fullmatch(PATTERNS["model_name"].expression, also):
            draft.aliases.append((also, asked, members[0].leaf))
    if servers and (engine := _engine(servers[0])):
        pool["engine"] = engine
    data["pools"][name] = pool
    draft.pools[asked] = name
    draft.origins["pools", name] = members[0].leaf


def _merged(old: Any, new: Any, *, adds: bool) -> Any:
    """What several members of a pool say: limits add up, of other numbers the largest counts."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _merged(old.get(key), new.get(key), adds=adds) for key in {**old, **new}}
    if old is None or new is None:
        return new if old is None else old
    return old + new if adds else max(old, new) if isinstance(new, int) else new


def _server_places(
    draft: Draft, servers: list[Entry], pool: dict[str, Any], data: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Places of a pool's own servers; a port for all when they follow each other."""
    servers.sort(key=lambda item: item.values["numbers"])
    swap = next((item.get("swap") for item in servers if item.get("swap")), None)
    if swap:
        yield _shared_place(draft, servers[0], "swap" if swap is True else slug(str(swap)), data)
        return
    ports = [item.get("pool.ports") for item in servers]
    if ports[0:1] != [None] and ports and ports == list(range(int(ports[0] or 0), int(ports[0] or 0) + len(ports))):
        pool["ports"] = ports[0]
    else:
        for item in servers:
            item.values.pop("pool.ports", None)
    on_cpu = sum(not item.values["numbers"] for item in servers)
    if on_cpu:
        yield {"host": HOST} | ({"replicas": on_cpu} if on_cpu > 1 else {})
    single = [item.values["numbers"][0] for item in servers if item.get("each") == 1 and item.values["numbers"]]
    for card in sorted(set(single)):
        if single.count(card) > 1:
            yield {"host": HOST, "gpus": card, "replicas": single.count(card)}
    once = [card for card in single if single.count(card) == 1]
    if once:
        yield {"host": HOST, "gpus": _ranges(once)}
    wide = [item.values["numbers"] for item in servers if item.get("each", 1) > 1 and item.values["numbers"]]
    for cards in wide:
        yield {"host": HOST, "gpus": _ranges(cards), "gpus_per_replica": len(cards)}


def _shared_place(draft: Draft, entry: Entry, wanted: str, data: dict[str, Any]) -> dict[str, Any]:
    """A place on a shared server, one for each set of cards."""
    cards = entry.values["numbers"]
    name = _name_for(draft.shared, wanted, cards)
    facts: dict[str, Any] = {"loaded": draft.site.get("shared.loaded", 1)}
    if draft.site.get("shared.idle_s"):
        facts["idle_s"] = draft.site.get("shared.idle_s")
    data["hosts"][HOST].setdefault("shared", {})[name] = facts
    entry.names["shared"] = name
    return (
        {"host": HOST, "shared": name}
        | ({"gpus": _ranges(cards)} if cards else {})
        | ({"gpus_per_replica": len(cards)} if len(cards) > 1 else {})
    )


def _ranges(cards: list[int]) -> int | str:
    """Numbers as the inventory has them: `2`, `1-3`, `1,4`."""
    if len(cards) == 1:
        return cards[0]
    is_range = cards == list(range(cards[0], cards[0] + len(cards)))
    return f"{cards[0]}-{cards[-1]}" if is_range else ",".join(map(str, cards))


# --- nodes -----------------------------------------------------------------------------------------------------------


def _node(draft: Draft, entry: Entry, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A place on a node: a new one, or one with the same address, which then has several models."""
    node, engine = entry.section("node"), engine_of(entry)
    node.pop("port", None)
    if not node.get("model") and not node.get("url"):
        entry.dropped = WORDS["no_model"]
        return
    _price(node)
    if engine == "cloud":
        _account(entry, node)
    elif not node.get("url"):
        node["url"] = f"http://localhost:{KINDS['ports'].get(engine, 8080)}"  # where LiteLLM looks for it
    url, unknown = _address(draft, entry, str(node["url"])) if node.get("url") else ("", "")
    if (kind := node.pop("kind", "chat")) != "chat" or "kind" in entry.said:
        node = {"kind": kind, **node}
    node = {**({"url": url} if url else {}), "engine": engine, **{key: node[key] for key in node if key != "url"}}
    address = (url, node.get("api_key"))
    same = [name for name, other in data["nodes"].items() if (other.get("url"), other.get("api_key")) == address]
    if same and url and engine != "cloud":
        yield from _further(draft, entry, same[0], node, data)
        return
    name = unique(_node_name(engine, node, unknown or url), data["nodes"])
    entry.names["node"], data["nodes"][name] = name, node
    draft.origins["nodes", name] = entry.leaf
    if not node.get("model"):
        node["model"] = "MODEL"
        draft.complete["nodes", name, "model"] = WORDS["which_model"]
    if unknown:
        draft.complete["nodes", name, "url"] = WORDS["address"].format(said=unknown)
    draft.owners[name, str(node["model"])] = entry.asked
    yield {"node": name}


def _price(node: dict[str, Any]) -> None:
    """Leaves out half a price and a price of nothing, and a budget that nothing would be spent of."""
    price = node.get("price", {})
    if len(price) < 2 or not any(price.values()):  # noqa: PLR2004 - for prompts and for answers
        node.pop("price", None)
    if "price" not in node or "max_usd" not in node.get("budget", {}):
        node.pop("budget", None)


def _account(entry: Entry, node: dict[str, Any]) -> None:
    """A model of a cloud account by LiteLLM's name, with the key that LiteLLM looks for."""
    node["model"] = entry.get("full", node.get("model"))
    provider = str(node["model"]).partition("/")[0]
    usual = f"{re.sub('[^A-Z0-9]', '_', provider.upper())}_API_KEY"
    if key := node.get("api_key") or KNOWN["keys"].get(provider, usual):
        node["api_key"] = key


def _node_name(engine: str, node: dict[str, Any], url: str) -> str:
    """A name for a node: of a cloud account its model's, of a server what answers there."""
    if engine == "cloud":
        return slug(str(node.get("model", "")).rpartition("/")[2])
    host = parts_of(url).hostname or "" if "://" in url else ""
    return (
        engine
        if not host or is_local(url) or host.replace(".", "").isdecimal() or ":" in host
        else slug(host.split(".")[0])
    )


def _address(draft: Draft, entry: Entry, url: str) -> tuple[str, str]:
    """A node's address that the gateway can call; and what the source says, where it has to be completed."""
    named = re.fullmatch(r"os\.environ/(\w+)|\$\{?(\w+)\}?", url)
    if named and (value := draft.variables.get(named[1] or named[2])):
        url, named = value, None
    here = entry.get("here")
    if named or (not here and not re.match(r"https?://", url)):
        return "http://192.0.2.1:8080", named.group(0) if named else "no address"
    parts = parts_of(url)
    if here or is_local(url):
        where = f"{draft.address or '192.0.2.1'}:{here or parts.port or 80}"
        return urlunsplit(
            (parts.scheme, where, parts.path.rstrip("/"), "", "")
        ), "" if draft.address else parts.hostname or ""
    host = parts.netloc.rpartition("@")[2]
    is_service = "." not in host and ":" not in host.strip("[]").rpartition(":")[0] and not host.startswith("[")
    fixed = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    return (fixed, parts.hostname or "") if is_service else (fixed, "")


def _further(
    draft: Draft, entry: Entry, name: str, node: dict[str, Any], data: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Another model of a node that is known; a model that it has already is another name of its pool."""
    known, model = data["nodes"][name], str(node.get("model") or "MODEL")
    entry.names["node"] = name
    if "slots" in node:
        known["slots"] = max(known.get("slots", 1), node["slots"])
    if model in (known.get("model"), *known.get("models", ())):
        owner = draft.owners[name, model]
        if entry.asked not in ("", owner):
            draft.aliases.append((entry.asked, owner, entry.leaf))
        entry.leaf.tell("look", WORDS["same_model"].format(model=model))
        return
    if entry.asked and entry.asked in (asked for (node_name, _), asked in draft.owners.items() if node_name == name):
        entry.dropped = WORDS["second_model"]
        return
    if "model" in known:
        first = known.pop("model")
        known["models"] = {first: {"kind": known.pop("kind")} if "kind" in known else {}}
        draft.complete.pop(("nodes", name, "model"), None)
        for place in (place for pool in data["pools"].values() for place in _places(pool)):
            if place.get("node") == name:
                place["model"] = first
    known["models"][model] = {key: node[key] for key in ("kind", "context") if key in node}
    draft.owners[name, model] = entry.asked
    yield {"node": name, "model": model}


def _places(pool: dict[str, Any]) -> list[dict[str, Any]]:
    return pool["on"] if isinstance(pool["on"], list) else [pool["on"]]


# --- names, fallbacks, the site --------------------------------------------------------------------------------------


def _names(draft: Draft, data: dict[str, Any]) -> None:
    """Aliases and fallbacks, of those that lead somewhere."""
    taken = set(data["pools"])
    for also, asked, leaf in draft.aliases:
        pool = draft.pools.get(asked) or next(
            (draft.pools[to] for other, to, _ in draft.aliases if other == asked and to in draft.pools), ""
        )
        if not pool:
            leaf.tell("left", WORDS["no_pool"])
        elif also in taken:
            leaf.tell("look" if leaf.told else "left", WORDS["taken"])
        elif not re.fullmatch(PATTERNS["model_name"].expression, also):
            leaf.tell("left", WORDS["odd_name"])
        else:
            taken.add(also)
            draft.pools.setdefault(also, pool)
            data["pools"][pool].setdefault("aliases", []).append(also)
            leaf.tell("becomes", f"pools.{pool}.aliases")
    for asked, other, to, leaf in draft.fallbacks:
        _fallback(data, (draft.pools.get(asked, ""), draft.pools.get(other, ""), to), leaf)


def _fallback(data: dict[str, Any], wish: tuple[str, str, str], leaf: Leaf) -> None:
    pool, other, to = wish
    pools = data["pools"]
    if not pool or not other or pool == other:
        leaf.tell("never" if pool and pool == other else "left", WORDS["no_pool"])
    elif _kind(data, pool) != _kind(data, other):
        leaf.tell("left", WORDS["kinds"])
    elif pool in _reached(pools, other, to):
        leaf.tell("left", WORDS["loop"])
    elif to == "context_fallback" and not _context_of(data, other) > (_context_of(data, pool) or 10**9):
        leaf.tell("left", WORDS["contexts"])
    elif other not in pools[pool].get(to, []):
        pools[pool].setdefault(to, []).append(other)
        leaf.tell("becomes", f"pools.{pool}.{to}")
    else:
        leaf.tell("becomes", f"pools.{pool}.{to}")


def _reached(pools: dict[str, Any], name: str, to: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        item = waiting.pop()
        if item not in found:
            found.add(item)
            waiting += pools[item].get(to, [])
    return found


def _facts(data: dict[str, Any], pool: str) -> Iterator[dict[str, Any]]:
    if "model" in data["pools"][pool]:
        yield data["models"][data["pools"][pool]["model"]]
    for place in _places(data["pools"][pool]):
        node = data["nodes"].get(place.get("node"), {})
        if node:
            yield {**node, **node.get("models", {}).get(place.get("model"), {})}


def _kind(data: dict[str, Any], pool: str) -> str:
    return next((str(item.get("kind", "chat")) for item in _facts(data, pool)), "chat")


def _context_of(data: dict[str, Any], pool: str) -> int:
    return min(int(item.get("context", 4096 if "source" in item else 0)) for item in _facts(data, pool))


def _site(draft: Draft, data: dict[str, Any]) -> None:
    """What is of the whole site."""
    host = data["hosts"][HOST]
    if draft.address:
        host["address"] = draft.address
    if stores := {name: path for path, name in draft.stores.items()} | draft.site.section("store"):
        host["model_stores"] = stores
    data["gateway"] = {"host": HOST}
    for key in ("gateway", "monitoring", "consumers"):
        if found := draft.site.section(key):
            data[key] = {**data.get(key, {}), **found}
    start = data["gateway"].pop("start_timeout_s", None)
    for pool in data["pools"].values() if start else ():
        if "model" in pool:
            pool.setdefault("engine", {}).setdefault("start_timeout_s", start)
    gpus = host.get("gpus")
    kinds = {item["card"] for item in (gpus if isinstance(gpus, list) else [gpus] if gpus else [])}
    if WORDS["card"] in kinds:
        data["cards"] = {WORDS["card"]: {"vendor": "nvidia", "vram_gib": 1024, "compute_capability": "8.6"}}
        draft.complete.setdefault(("hosts", HOST, "gpus"), WORDS["kind_of_card"])
