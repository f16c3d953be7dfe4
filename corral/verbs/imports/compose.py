"""Compose files: inference servers that the kit can run become pools, others become nodes."""

from __future__ import annotations

import re
from typing import Any

from corral.declarations import read_yaml
from corral.verbs.imports.commands import Word, pieces, read_command, split, words_of
from corral.verbs.imports.draft import Draft, Entry, Step, settle
from corral.verbs.imports.sources import KINDS, TABLES, Document, Leaf, fill

TABLE: dict[str, Any] = read_yaml(TABLES / "compose.yaml")
RUN = ("llama", "vllm")


def begin(draft: Draft, document: Document) -> None:
    """Finds out what each service is, and tells of those that are no inference servers."""
    fill(document, draft.variables)
    for name in document.names("services"):
        leaves = document.below("services", name)
        image = str(document.value("services", name, "image") or "")
        program = " ".join(leaf.text for leaf in leaves if leaf.path[2:3] in (("command",), ("entrypoint",)))
        engine = _first(TABLE["services"], image) or next((key for key in RUN if _starts(key, program)), "")
        if not engine and not image:
            engine = _first(TABLE["services"], name)
        if engine:
            entry = draft.entry(name, leaves[0])
            entry.engine = engine
            entry.values["file"], entry.values["folder"] = document.file, document.folder
            entry.values["container"] = str(document.value("services", name, "container_name") or name)
        else:
            words = TABLE["others"].get(
                _first({key: key for key in TABLE["others"]}, f"{image} {name}"), TABLE["unknown"]
            )
            for leaf in leaves:
                leaf.tell("left", words)


def _first(table: dict[str, str], text: str) -> str:
    return next((key for key, words in table.items() if re.search(words, text.lower())), "")


def _starts(engine: str, program: str) -> bool:
    return any(re.search(KINDS["program"][engine], word) for word in program.split() if word != "server")


def image(at: Step) -> None:
    """An image: the kit chooses its own for the cards."""
    if at.entry.engine in RUN:
        at.leaf.tell("kit", "the kit chooses the image for the cards, pinned; image: in engine names another")
        if re.search(r"rocm|vulkan|intel|sycl|musa", at.leaf.text):
            at.entry.values["place.maker"] = at.leaf.text
    elif at.entry.engine == "litellm":
        at.leaf.tell("kit", "the kit starts LiteLLM of the version against which every setting is checked")
    else:
        at.leaf.tell("becomes", f"nodes: this {at.entry.engine} goes on running, and the gateway calls it")


def command(at: Step) -> None:
    """A command line, read when all of the service's own values are known."""
    found = at.draft.documents[at.leaf.file].below("services", at.entry.name)
    leaves = [item for part in ("entrypoint", "command") for item in found if item.path[2] == part]
    words = [
        word
        for part in ("entrypoint", "command")
        if (of := [x for x in leaves if x.path[2] == part])
        for word in words_of(of)
    ]
    if at.entry.engine in RUN:
        if at.entry.engine == "llama" and re.fullmatch(r"(ba)?sh", words[0].text if words else ""):
            words = [Word(text, word.leaf) for word in words for text in split(word.text)]
        read_command(at.entry, words)
    elif at.entry.engine == "litellm":
        _gateway(at.draft, words)
    else:
        names = [name for item in leaves for name in re.findall(r"ollama (?:pull|run) ([\w./:-]+)", item.text)]
        names += [word.text for word in words if at.entry.engine == "localai" and not word.text.startswith("-")]
        for item in leaves:
            if any(name in item.text for name in names):
                at.entry.put("node.models", list(dict.fromkeys(names)), item)
            else:
                item.tell("left", f"{at.entry.engine} goes on running as it is, and this is its own")
    for item in leaves:
        if not item.told:
            item.tell("kit", "the kit starts the program")


def _gateway(draft: Draft, words: list[Word]) -> None:
    """The command line of LiteLLM's proxy."""
    rows = KINDS["gateway_flags"]
    for flag, values in pieces(words):
        for leaf in dict.fromkeys(word.leaf for word in (flag, *values)):
            text = " ".join(word.text for word in values)
            settle(rows.get(flag.text, rows["other"]), leaf, draft.site, text=text, label=flag.text)


def environment(at: Step) -> None:
    """A variable: one of a flag of the server, or one that the table knows."""
    key = at.leaf.path[3] if len(at.leaf.path) > 3 else ""  # noqa: PLR2004 - services, name, environment, variable
    name, _, value = (str(key), "", at.leaf.text) if isinstance(key, str) else at.leaf.text.partition("=")
    read_variable(at.entry, at.leaf, name, value)


def read_variable(entry: Entry, leaf: Leaf, name: str, value: str) -> None:
    """Takes over a variable of a server."""
    table = read_yaml(TABLES / f"{entry.engine}.yaml") if entry.engine in RUN else {"variables": {}, "wrapper": {}}
    flag = table["variables"].get(name) or table["wrapper"].get(name)
    if not flag and entry.engine == "llama" and name.startswith("LLAMA_ARG_"):
        flag = "--" + name.removeprefix("LLAMA_ARG_").lower().replace("_", "-")
    if flag:
        is_switch = value.lower() in ("1", "true", "on", "enabled", "") and flag not in KINDS["valued"]
        if value.lower() in ("0", "false", "off", "disabled") and flag not in KINDS["valued"]:
            leaf.tell("kit", f"{flag} is not set")
        else:
            read_command(entry, [Word(flag, leaf), *([] if is_switch else [Word(value, leaf)])])
        return
    rows = (
        (words, row)
        for words, row in TABLE["environment"].items()
        if entry.engine in row.get("of", entry.engine).split()
    )
    row = next(row for words, row in rows if re.fullmatch(words, name))
    if "cards" in row:
        cards(entry, leaf, [part.strip() for part in value.split(",") if part.strip()])
    if "flags" in row:
        read_command(entry, [Word(word, leaf) for word in split(value)])
    if "variable" in row:
        entry.put(f"engine.environment.{name}", value, leaf)
    settle(row, leaf, entry, text=value, label=name if isinstance(leaf.path[-1], int) else "")


def cards(entry: Entry, leaf: Leaf, names: list[str]) -> None:
    """Cards by number from 0, by UUID, or all of them."""
    if not names or names in (["none"], ["void"], ["-1"]):
        leaf.tell("kit", "without gpus: a server runs on the processor")
        return
    if entry.values.get("place.cards") in (None, ["all"]) or names != ["all"]:
        entry.values["place.cards"] = names
        entry.cards_leaf = leaf
    entry.put("place.gpus", "", leaf)


def device(at: Step) -> None:
    """A reservation of cards."""
    last = next((part for part in reversed(at.leaf.path) if isinstance(part, str)), "")
    if last == "device_ids":
        known = [name for name in at.entry.values.get("place.ids", []) if name not in at.leaf.text.split(",")]
        at.entry.values["place.ids"] = [*known, *at.leaf.text.split(",")]
        cards(at.entry, at.leaf, at.entry.values["place.ids"])
    elif last in ("count", "gpus"):
        count = int(at.leaf.text) if at.leaf.text.isdecimal() else -1
        cards(at.entry, at.leaf, ["all"] if count < 0 else [str(number) for number in range(min(count, 64))])
        if count < 0:
            at.leaf.tell(
                "look", "every server of this file may use every card: nothing keeps them from filling the same one"
            )
    else:
        at.leaf.tell("kit", "the kit reserves the cards that `on:` names")


def port(at: Step) -> None:
    """A published port."""
    last = at.leaf.path[-1]
    if isinstance(last, str) and last != "published":
        at.leaf.tell("kit", "the kit knows the port inside the container")
        return
    parts = at.leaf.text.split("/")[0].rsplit(":", 2)
    published = parts[-2] if len(parts) > 1 else parts[-1]
    if not published.isdecimal():
        at.leaf.tell("left", "ranges of ports have no place; ports: of the pool is the first one")
        return
    number = int(published)
    if at.entry.engine == "litellm":
        at.draft.site.put("gateway.port", number, at.leaf)
    elif at.entry.engine in RUN:
        at.entry.put("pool.ports", number, at.leaf)
        if len(parts) < 3:  # noqa: PLR2004 - address, port, port
            at.leaf.tell(
                "look", "it is open to every machine in the network; the kit opens ports of servers on loopback only"
            )
    else:
        at.entry.put("node.port", number, at.leaf)


def volume(at: Step) -> None:
    """A folder that a server sees."""
    last, found = at.leaf.path[-1], at.entry.values.setdefault("mount", {})
    if isinstance(last, str):
        found[last] = at.leaf.text
        host, inside = found.get("source"), found.get("target")
    else:
        host, _, inside = at.leaf.text.partition(":")
    if host and inside:
        at.entry.folders[inside.split(":")[0]] = host
        found.clear()
    if at.entry.engine in RUN:
        at.leaf.told.append(lambda: at.entry.folder_told(host or ""))
    else:
        at.leaf.tell(
            "left" if at.entry.engine != "litellm" else "kit",
            f"{at.entry.engine} goes on running with it"
            if at.entry.engine != "litellm"
            else "the kit renders LiteLLM's configuration",
        )
