"""What the sources have in common: servers, nodes and what clients call, gathered before names and cards are known."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from corral.errors import KeyPath, dotted
from corral.verbs.imports.sources import KINDS, SECRET_NAME, SECRET_VALUE, Document, Leaf, Told

# Where the inventory has what an entry says, by the entry's section.
SECTIONS: dict[str, str] = KINDS["sections"]
SPELLED: dict[str, str] = KINDS["spelled"]
HOST = "box"


class NotCarried(ValueError):
    """A value that the inventory cannot have; the words say why."""


@dataclass(eq=False)
class Entry:
    """One server, node or name for clients in a source: what it says, by section and key of the inventory."""

    # As its source calls it.
    name: str
    leaf: Leaf
    values: dict[str, Any] = field(default_factory=dict)
    # Names in the inventory that the sections have in the end: model, pool, node.
    names: dict[str, str] = field(default_factory=dict)
    # Keys that the source says itself.
    said: set[str] = field(default_factory=set)
    # The name that clients call; empty where only its model says one.
    asked: str = ""
    # Folders of the machine that the server sees, by their paths in its container.
    folders: dict[str, str] = field(default_factory=dict)
    # Why all of it is left out.
    dropped: str = ""
    # What the server runs, by the sections of KINDS["engines"]; empty for nothing that is known.
    engine: str = ""
    # The server of another source that this one only names.
    stands_for: Entry | None = None
    cards_leaf: Leaf | None = None
    # The inventory, when it is made.
    data: dict[str, Any] = field(default_factory=dict)
    # Folders of the host that its files are read from, by their paths on the host.
    stores: dict[str, str] = field(default_factory=dict)

    def put(self, to: str, value: Any, leaf: Leaf, label: str = "") -> None:
        """Takes a value over, and tells where it goes."""
        section = to.partition(".")[0]
        hidden = isinstance(value, str) and SECRET_VALUE.search(value) and to != "node.url"
        if hidden or (section == "engine" and SECRET_NAME.search(to.rpartition(".")[2])):
            leaf.tell("left", f"{label or to}: {KINDS['secrets']['words']}")
            return
        self.values[to] = value
        self.said.add(to.partition(".")[2])
        leaf.told.append(lambda: self._outcome(section, to, label))

    def add(self, to: str, amount: float, leaf: Leaf) -> None:
        """Like put, for amounts that add up."""
        self.put(to, self.values.get(to, 0) + amount, leaf)

    def get(self, to: str, other: Any = None) -> Any:
        """What it says; `other` where it says nothing."""
        return self.values.get(to, other)

    def _outcome(self, section: str, to: str, label: str) -> Told:
        """Where a value is in the inventory; or that it is not there, because its entry does not take it."""
        lead = f"{label}: " if label else ""
        if reason := self.dropped or (self.stands_for.dropped if self.stands_for else ""):
            return Told("left", lead + reason)
        if self.stands_for is not None and section == "node":
            return Told("becomes", f"{lead}pools.{self.stands_for.names['pool']}.on: the server {self.stands_for.name}")
        names = defaultdict(str, {**self.names, **(self.stands_for.names if self.stands_for else {})})
        above = SECTIONS[section].format_map(names).split("/")
        for key in SPELLED.get(to, to.partition(".")[2]).split("|"):
            path = tuple(part for part in (*above, *key.split(".")) if part)
            if _has(self.data, path):
                return Told("becomes", lead + dotted(path))
        return Told("left", lead + KINDS["words"]["not_taken"])

    def folder_told(self, folder: str) -> Told:
        """What becomes of a folder that a server sees."""
        found = next(
            (name for path, name in self.stores.items() if path.endswith(folder.strip("./~")) and folder), None
        )
        if found:
            return Told("becomes", f"hosts.{HOST}.model_stores.{found}")
        return Told("kit", "servers see the folders with their models, read-only")

    def section(self, name: str) -> dict[str, Any]:
        """What it says for one section, nested as the inventory has it."""
        found: dict[str, Any] = {}
        for to, value in self.values.items():
            if to.startswith(f"{name}."):
                nest(found, to.split(".")[1:], value)
        return found


def _has(data: Any, path: KeyPath) -> bool:
    """Whether data have a path; of a list, any item of it."""
    if isinstance(data, list):
        return not path or any(_has(item, path) for item in data)
    return not path or (isinstance(data, dict) and path[0] in data and _has(data[path[0]], path[1:]))


def nest(data: dict[str, Any], path: Iterable[str], value: Any) -> None:
    """Sets a value in nested mappings."""
    *above, last = path
    for key in above:
        data = data.setdefault(key, {})
    data[last] = value


@dataclass
class Draft:
    """All that the sources say."""

    entries: list[Entry] = field(default_factory=list)
    # Settings of the whole site.
    site: Entry = field(default_factory=lambda: Entry("site", Leaf("", 0, (), None), names={"pool": ""}))
    # Other names of pools, and pools that are asked instead: name, other names, leaf, and which of both.
    aliases: list[tuple[str, str, Leaf]] = field(default_factory=list)
    fallbacks: list[tuple[str, str, str, Leaf]] = field(default_factory=list)
    # Lines that the user has to complete: path in the inventory, and what to write.
    complete: dict[KeyPath, str] = field(default_factory=dict)
    # Variables that sources have, for texts of other sources that name them.
    variables: dict[str, str] = field(default_factory=dict)
    # The address of the machine that Compose files, llama-swap and localhost are about, and the kind of its cards.
    address: str = ""
    card: str = ""
    # Shared servers of the host by name, and their cards.
    shared: dict[str, list[int]] = field(default_factory=dict)
    # Pools by the names that clients call, folders of the host by path, and where parts of the inventory come from.
    pools: dict[str, str] = field(default_factory=dict)
    stores: dict[str, str] = field(default_factory=dict)
    # The name that clients call, by node and model.
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    origins: dict[KeyPath, Leaf] = field(default_factory=dict)
    # The sources by file, and the variables that they name.
    documents: dict[str, Document] = field(default_factory=dict)
    # The inventory.
    data: dict[str, Any] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.site.data = self.data

    def entry(self, name: str, leaf: Leaf) -> Entry:
        """The entry of that name, made when there is none."""
        found = Entry(name, leaf, data=self.data)
        self.entries.append(found)
        return found


class Step(NamedTuple):
    """What a function that a row names gets: a value, and the entry to which it belongs."""

    draft: Draft
    entry: Entry
    leaf: Leaf


def slug(text: str) -> str:
    """A text as a name of the inventory."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:56].rstrip("-._") or "unnamed"


def unique(name: str, taken: Iterable[str]) -> str:
    """The name, or the name with a number where it is taken."""
    known = set(taken)
    return next(found for n in range(1, 10_000) if (found := name if n == 1 else f"{name}-{n}") not in known)


def stem(source: str) -> str:
    """A short name of a model from its source."""
    last = PurePosixPath(re.sub(r"^\w+:", "", source).split("?")[0]).name or source
    last = re.sub(r"(?i)\.(gguf|safetensors)$", "", last)
    last = re.sub(r"(?i)-0000\d-of-0+\d+$", "", last)
    return slug(
        re.sub(r"(?i)[-_.](ud[-_.])?(iq|q)\d\w*$|-gguf(:.*)?$|-instruct(?=$|[-_.])|:(ud-)?(iq|q)\d\w*$", "", last)
    )


# --- values ----------------------------------------------------------------------------------------------------------


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?\d+(\.0)?", text):
        raise NotCarried("it is no whole number")
    return int(float(text))


def _positive(text: str) -> int:
    if (value := _whole(text)) < 1:
        raise NotCarried(f"{value} means what the program chooses by itself, as the kit does without it")
    return value


def _measured(text: str, units: str) -> int:
    """An amount such as `10m` in the unit of a table of units."""
    known: dict[str, float] = KINDS["units"][units]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not found or found[2] not in known:
        raise NotCarried("its unit is not known")
    return max(1, round(float(found[1]) * known[found[2]]))


def _layers(text: str) -> int | str:
    """Layers on the card; numbers beyond every model, and -1, are all."""
    count = -1 if text in ("all", "auto") else _whole(text)
    return "all" if count < 0 or count >= KINDS["all_layers"] else count


def _kind(text: str) -> str:
    found: dict[str, str] = KINDS["modes"]
    if text not in found:
        raise NotCarried("the gateway has no requests of this kind")
    return found[text]


# What a value becomes, by `as` of a row.
CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "same": lambda text: text,
    "whole": _whole,
    "positive": _positive,
    "number": float,
    "numbers": lambda text: [float(part) for part in re.split(r"[,/]", text)],
    "layers": _layers,
    "kind": _kind,
    "seconds": lambda text: _measured(text, "seconds"),
    "mib": lambda text: max(16, _measured(re.sub("i?b$", "", text.lower()), "mib")),
    "context": lambda text: _measured(text, "tokens"),
    "per_million": lambda text: round(float(text) * 1e6, 6),
    # Flash attention, in the spelling of old and new builds.
    "flash": lambda text: KINDS["flash"].get(text.lower(), text.lower()),
    "switch": lambda text: text.lower() not in ("false", "0", "off", "no"),
}


def settle(row: dict[str, Any], leaf: Leaf, entry: Entry, *, text: str | None = None, label: str = "") -> None:
    """Does what a row of a table says about a value: tells findings, and takes the value over."""
    lead = f"{label}: " if label else ""
    for sort in ("kit", "left", "never", "look"):
        if sort in row:
            leaf.tell(sort, lead + row[sort])
    if "to" not in row:
        return
    try:
        value = (
            row["value"] if "value" in row else CONVERSIONS[row.get("as", "same")](leaf.text if text is None else text)
        )
    except NotCarried as error:
        leaf.tell("left", f"{lead}{error}")
        entry.dropped = str(error) if row.get("drops") else entry.dropped
    except ValueError:
        leaf.tell("left", f"{lead}its value is none that the inventory can have")
    else:
        if "told" in row:
            entry.values[row["to"]] = value
            leaf.tell("becomes", lead + row["told"])
            return
        entry.add(row["to"], value, leaf) if row.get("adds") else entry.put(row["to"], value, leaf, label)
