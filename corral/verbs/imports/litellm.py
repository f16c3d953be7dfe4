"""LiteLLM's `config.yaml`: deployments as nodes or as servers of other sources, their names, fallbacks and limits."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, urlsplit

from corral.declarations import read_yaml
from corral.verbs.imports.draft import HOST, Draft, Entry, Step, slug
from corral.verbs.imports.sources import TABLES, Document, is_secret

KNOWN: dict[str, Any] = read_yaml(TABLES / "litellm_known.yaml")
WORDS = KNOWN["words"]
SECTIONS = {"general_settings": "general", "litellm_settings": "litellm", "router_settings": "router"}


def begin(draft: Draft, document: Document) -> None:
    """Tells of keys that LiteLLM does not know or does not use as the file is."""
    keys = {name: set(words.split()) for name, words in read_yaml(TABLES / "litellm_keys.yaml").items()}
    for leaf in document.leaves:
        section = str(leaf.path[0])
        name = str(leaf.path[1]) if len(leaf.path) > 1 else ""
        if section not in keys["top"] or (section in SECTIONS and name not in keys[SECTIONS[section]]):
            unused = KNOWN["unused"].get(name) == section
            leaf.tell("never", WORDS["unused" if unused else "unknown"])
            continue
        for row in KNOWN["dormant"]:
            if (
                section == row["section"]
                and name in row["keys"].split()
                and not document.below(*row["needs"].split("."))
            ):
                leaf.tell("never", WORDS["dormant"].format(needs=row["needs"]))
    checks = [leaf.value for leaf in document.below("router_settings", "optional_pre_call_checks")]
    strategy = str(document.value("router_settings", "routing_strategy"))
    draft.site.values["limits"] = "enforce_model_rate_limits" in checks or "usage-based" in strategy


def asked_name(at: Step) -> None:
    """The name that clients call becomes a pool."""
    at.entry.asked = at.leaf.text
    if "*" in at.leaf.text:
        at.entry.dropped = (
            "a name for any model: write a pool for each model that is meant, or keep it in gateway.extra.model_list"
        )
    at.entry.put("pool.", at.entry.asked, at.leaf)


def provider(at: Step) -> None:
    """A provider and the name of a model there."""
    before, slash, name = at.leaf.text.partition("/")
    known = slash and before in KNOWN["providers"]
    at.entry.values["provider"] = at.entry.get("provider") or (before if slash else "")
    if not slash:
        found = next((other for words, other in KNOWN["bare"].items() if re.match(words, at.leaf.text)), "openai")
        at.entry.values["provider"], name = found, at.leaf.text
    at.entry.values["full"] = at.leaf.text if slash else f"{at.entry.values['provider']}/{at.leaf.text}"
    at.entry.put("node.model", name if known or not slash else at.leaf.text, at.leaf)
    at.entry.values.setdefault("node.kind", kind_of(at.leaf.text))


def kind_of(model: str) -> str:
    """The kind of a model by its name, where nothing says it."""
    return next((str(kind) for words, kind in KNOWN["names"].items() if re.search(words, model)), "chat")


def given_provider(at: Step) -> None:
    """A provider that is said beside the model's name."""
    at.entry.values["provider"] = at.leaf.text
    at.entry.put("node.engine", KNOWN["providers"].get(at.leaf.text, "cloud"), at.leaf)


def base(at: Step) -> None:
    """The address of a server, which may be one that another source starts."""
    at.entry.put("node.url", at.leaf.text, at.leaf)


def key(at: Step) -> None:
    """A key by its name; dummies that a local server never looks at are left out."""
    named = re.fullmatch(r"os\.environ/([A-Za-z]\w{0,62})", at.leaf.text) or re.fullmatch(
        r"\$\{?([A-Z][A-Z0-9_]{0,62})\}?", at.leaf.text
    )
    if named:
        at.entry.put("node.api_key", named[1].upper(), at.leaf)
        at.leaf.tell("look", f"its value goes into compose/{HOST}/.env as {named[1].upper()}")
    elif is_secret(at.leaf):
        at.entry.put(
            "node.api_key",
            re.sub(r"[^A-Z0-9]+", "_", f"{slug(at.entry.asked)}_API_KEY".upper()).lstrip("_0123456789"),
            at.leaf,
        )
    else:
        at.leaf.tell("kit", "it is no key, and none is sent")


def limit(at: Step) -> None:
    """A limit of a deployment."""
    if not at.draft.site.get("limits"):
        at.leaf.tell("look", WORDS["limit"])


def alias(at: Step) -> None:
    """Another name of a pool."""
    if at.leaf.path[-1] == "hidden" or len(at.leaf.path) < 3:  # noqa: PLR2004 - section, key, name
        at.leaf.tell("left", "/v1/models lists all names that a key may use")
    else:
        at.draft.aliases.append((str(at.leaf.path[2]), at.leaf.text, at.leaf))


def fallback(at: Step) -> None:
    """A pool that is asked instead of another."""
    if len(at.leaf.path) < 5:  # noqa: PLR2004 - section, key, index, pool, index
        at.leaf.tell("left", "it names no pool that is asked instead")
        return
    to = "context_fallback" if at.leaf.path[1] == "context_window_fallbacks" else "fallback"
    at.draft.fallbacks.append((str(at.leaf.path[3]), at.leaf.text, to, at.leaf))


def parts_of(url: str) -> SplitResult:
    """The parts of an address; none of what is no address."""
    try:
        found = urlsplit(url)
        _ = found.port  # a wrong one is told of here
    except ValueError:
        return urlsplit("")
    return found


def is_local(url: str) -> bool:
    """Whether an address is the machine's own, as programs on it see it."""
    return (parts_of(url).hostname or "") in KNOWN["local"].split()


def engine_of(entry: Entry) -> str:
    """What answers at a node, by LiteLLM's provider and the port."""
    url = str(entry.get("node.url", ""))
    found = KNOWN["providers"].get(entry.get("provider", ""), "cloud")
    if found == "openai" and not url:
        return "cloud"
    if found == "openai":
        return str(KNOWN["ports"].get(str(parts_of(url).port), "openai"))
    return str(found)
