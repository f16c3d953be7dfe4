"""The files that people bring: which kind each is, and every value in it with its line."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dotenv.parser import parse_stream

from corral.config.source import parse
from corral.declarations import read_yaml
from corral.errors import Finding, KeyPath, SiteError, dotted

TABLES = Path(__file__).with_name("tables")
KINDS: dict[str, Any] = read_yaml(TABLES / "kinds.yaml")
# What became of a value. `look`: it was carried over or not, and there is something that its owner should know.
Sort = Literal["becomes", "kit", "never", "left", "look"]
SECRET_NAME, SECRET_VALUE, NO_SECRET = (
    re.compile(KINDS["secrets"][key], re.IGNORECASE) for key in ("name", "value", "reference")
)
_VARIABLE = re.compile(
    r"\$(?:\$|(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?:(?P<sign>:?[-?+])(?P<other>[^}]*))?\})"
)


@dataclass(frozen=True)
class Told:
    """A finding about a value."""

    sort: Sort
    words: str


NOT_TAKEN = Told("left", KINDS["words"]["not_taken"])


@dataclass(eq=False)
class Leaf:
    """One value of a source, and what is told of it."""

    file: str
    line: int
    path: KeyPath
    value: Any
    # Findings, or what finds them when all names are known.
    told: list[Told | Callable[[], Told]] = field(default_factory=list)

    def tell(self, sort: Sort, words: str) -> None:
        """Adds a finding."""
        self.told.append(Told(sort, words))

    @property
    def findings(self) -> list[Told]:
        """What is told of it, each finding once."""
        found = list(dict.fromkeys(item if isinstance(item, Told) else item() for item in self.told))
        return [item for item in found if item != NOT_TAKEN or all(one.sort == "look" for one in found if one != item)]

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"

    @property
    def text(self) -> str:
        """The value as a text."""
        return (
            ""
            if self.value in (None, {}, [])
            else str(self.value).lower()
            if isinstance(self.value, bool)
            else str(self.value)
        )


@dataclass
class Document:
    """A source: its kind, and its values in the order in which they stand there."""

    kind: str
    file: str
    leaves: list[Leaf]
    folder: str = "."

    def below(self, *path: str | int) -> list[Leaf]:
        """Values at or below a path."""
        return [leaf for leaf in self.leaves if leaf.path[: len(path)] == path]

    def names(self, section: str) -> list[str]:
        """The keys of a mapping."""
        keys = (leaf.path[1] for leaf in self.below(section) if len(leaf.path) > 1)
        return [key for key in dict.fromkeys(keys) if isinstance(key, str)]

    def value(self, *path: str | int) -> Any:
        """The value at a path; None where there is none."""
        return next((leaf.value for leaf in self.leaves if leaf.path == path), None)


def read_file(path: Path) -> Document:
    """A source; raises SiteError when its kind is not known, or when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError([Finding(f"cannot be read: {error}", file=str(path))]) from None
    return read_text(text, str(path), str(path.resolve().parent))


def read_text(text: str, name: str, folder: str = ".") -> Document:
    """Like read_file, from text."""
    bare = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if any(re.match(r"(?i)from\s+\S", line) for line in bare):
        return Document("modelfile", name, list(_instructions(text, name)), folder)
    if bare and all(re.match(r"(export\s+)?[A-Za-z_][\w.]*\s*=", line) for line in bare):
        return Document("dotenv", name, list(_variables(text, name)), folder)
    source = parse(text, name)
    keys = set(source.data) if isinstance(source.data, dict) else set()
    kind = next((kind for kind, known in KINDS["keys"].items() if keys & set(known.split())), "")
    if not kind or "schema_version" in keys:
        words = "this is an inventory already" if kind else "this is no file of a kind that can be imported"
        raise SiteError([Finding(words, remedy=KINDS["known"], file=name)])
    places = {path: line for path, (line, _) in source.marks.items()}
    return Document(kind, name, [Leaf(name, places[path], path, value) for path, value in _flat(source.data)], folder)


def _flat(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every single value below one; an empty list or mapping is one, too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path, value
    for key, item in items:
        yield from _flat(item, (*path, key))


def _variables(text: str, name: str) -> Iterator[Leaf]:
    for item in parse_stream(io.StringIO(text)):
        if item.key is not None:
            blank = len(item.original.string) - len(item.original.string.lstrip("\n"))
            yield Leaf(name, item.original.line + blank, (item.key,), item.value)


def _instructions(text: str, name: str) -> Iterator[Leaf]:
    """Every instruction of a Modelfile; texts in three quotes may have several lines."""
    seen: dict[str, int] = {}
    for found in re.finditer(r'(?m)^[ \t]*([A-Za-z]+)[ \t]+("""(?s:.*?)"""|.*)$', text):
        word, rest = found[1].upper(), found[2].strip().strip('"').strip()
        key, _, value = rest.partition(" ") if word == "PARAMETER" else ("", "", rest)
        path = (word, key.lower()) if key else (word,)
        count = seen[dotted(path)] = seen.get(dotted(path), -1) + 1
        line = text.count("\n", 0, found.start(1)) + 1
        yield Leaf(name, line, (*path, count) if count else path, value.strip().strip('"'))


def fill(document: Document, values: dict[str, str]) -> None:
    """Puts variables into a Compose file's texts as Compose does, and tells which have no value."""
    for leaf in document.leaves:
        if isinstance(leaf.value, str) and "$" in leaf.value:
            leaf.value = _VARIABLE.sub(lambda found, leaf=leaf: _filled(found, values, leaf), leaf.value)  # type: ignore[misc]


def _filled(found: re.Match[str], values: dict[str, str], leaf: Leaf) -> str:
    name = found["plain"] or found["name"]
    if not name:
        return "$"
    sign, value = found["sign"] or "", values.get(name, "")
    if sign.endswith("+"):
        return found["other"] if value else ""
    if value or (name in values and sign != ":-"):
        return found[0] if SECRET_NAME.search(name) else value
    if sign.endswith("-"):
        return found["other"]
    if not SECRET_NAME.search(name):
        leaf.tell("look", f"{name} has no value here; name the .env file that has it, too")
    return found[0]


def is_secret(leaf: Leaf) -> bool:
    """Whether a value is a secret in clear, and not only the name of one."""
    if not isinstance(leaf.value, str) or NO_SECRET.fullmatch(leaf.value):
        return False
    name = next((part for part in reversed(leaf.path) if isinstance(part, str)), "")
    pair = re.fullmatch(r"([A-Za-z_]\w*)=(\S+)", leaf.value) if isinstance(leaf.path[-1], int) else None
    if pair and SECRET_NAME.search(pair[1]):
        return not NO_SECRET.fullmatch(pair[2])
    return bool(SECRET_VALUE.search(leaf.value) or (pair is None and SECRET_NAME.search(name)))
