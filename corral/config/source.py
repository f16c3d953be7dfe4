"""YAML text as plain data plus the place of every value, so that an error can name file, line and column.

Read from the event stream with YAML 1.2's core scalars (`on`, `off`, `yes`, `no` are words, not booleans).
Duplicate keys, unknown tags, runaway aliases, extreme nesting and oversized files are refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from corral.errors import Finding, KeyPath, SiteError, did_you_mean

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 64
MAX_VALUES = 500_000
MAX_DIGITS = 18

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
MERGE = "<<"
_PLAIN_TAGS = {None, "!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(slots=True)
class Source:
    """A parsed YAML file: `data`, and where each value stands."""

    file: str
    data: Any
    marks: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)

    def locate(self, problem: Finding) -> Finding:
        """The problem with file, line and column of the nearest place in the file, and its path as the file has it."""
        known: KeyPath = ()
        shown: KeyPath = ()
        for part in problem.path:
            if (*known, part) in self.marks:
                known = (*known, part)
                shown = (*shown, part)
            elif isinstance(part, str):  # an index that is not in the file stands for a single value without a list
                shown = (*shown, part)
        line, column = self.marks.get(known, (1, 1))
        return replace(problem, path=shown, file=self.file, line=line, column=column)


def plain_yaml(text: bytes) -> Any:
    """The data of a YAML file that no person writes; by libyaml where PyYAML has it, seven times as fast."""
    return yaml.load(text, Loader=_LOADER)  # noqa: S506 - safe


def values_in(value: Any, path: KeyPath = (), before: str = "") -> Iterator[tuple[KeyPath, Any, str]]:
    """Every single value in data with its path and, in a list, the word before it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from values_in(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from values_in(item, (*path, index), str(value[index - 1]) if index else "")
    elif value is not None:
        yield path, value, before


def read_source(path: Path) -> Source:
    """The file's data and places; raises SiteError with located problems when it is not usable YAML."""
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        remedy = "name a file in it" if path.is_dir() else ""
        raise SiteError([Finding(f"cannot be read: {error.strerror or error}", remedy=remedy, file=name)]) from None
    if len(raw) > MAX_BYTES:
        words = f"larger than {MAX_BYTES // 1024**2} MiB, which no inventory is"
        raise SiteError([Finding(words, remedy="is this the right file?", file=name)])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SiteError([_not_utf8(raw, error.start, name)]) from None
    return parse(text, name)


def _not_utf8(raw: bytes, position: int, name: str) -> Finding:
    words = "not UTF-8 text" + (" but UTF-16" if raw.startswith(_UTF16) else "")
    line_start = raw.rfind(b"\n", 0, position) + 1
    column = len(raw[line_start:position].decode(errors="replace")) + 1
    line = raw.count(b"\n", 0, position) + 1
    return Finding(words, remedy="save the file as UTF-8", file=name, line=line, column=column)


def parse(text: str, name: str) -> Source:
    """Like read_source, from text."""
    odd = _NOT_TEXT.search(text, text.startswith("\ufeff"))
    if odd:
        line, column = text.count("\n", 0, odd.start()) + 1, odd.start() - text.rfind("\n", 0, odd.start())
        words = f"the invisible character U+{ord(odd.group()):04X} is not allowed"
        raise SiteError([Finding(words, remedy="remove it", file=name, line=line, column=column)])
    try:
        return _Reader(name, text).read()
    except yaml.MarkedYAMLError as error:
        raise SiteError([_in_plain_words(error, text, name)]) from None


class _Reader:
    """Builds data from YAML events, one value at a time."""

    def __init__(self, name: str, text: str) -> None:
        self.source = Source(name, None)
        self.problems: list[Finding] = []
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        # What each anchor stands for, and where that is.
        self.anchors: dict[str, tuple[Any, KeyPath]] = {}
        # Mappings and lists that are being filled.
        self.open: list[Any] = []
        self.left = MAX_VALUES

    def read(self) -> Source:
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.DocumentStartEvent):
            self.source.data = self._value(next(self.events), ())
            next(self.events)  # the document's end
            event = next(self.events)
            if isinstance(event, yaml.DocumentStartEvent):
                self._stop(event, "a second YAML document", "an inventory is one document; remove the `---`")
        if self.problems:
            raise SiteError(self.problems)
        return self.source

    def _fail(self, event: Any, message: str, remedy: str, path: KeyPath = ()) -> None:
        line, column = _place(event)
        self.problems.append(Finding(message, path, remedy, file=self.source.file, line=line, column=column))

    def _stop(self, event: Any, message: str, remedy: str, path: KeyPath = ()) -> NoReturn:
        self._fail(event, message, remedy, path)
        raise SiteError(self.problems)

    def _spend(self, event: Any, path: KeyPath) -> None:
        self.left -= 1
        if self.left < 0:
            self._stop(event, f"more than {MAX_VALUES} values", "aliases multiply what they stand for")
        if len(path) > MAX_DEPTH:
            self._stop(event, f"nested deeper than {MAX_DEPTH} levels", "aliases put too much into each other")

    def _value(self, event: Any, path: KeyPath) -> Any:
        self._spend(event, path)
        self.source.marks.setdefault(path, _place(event))
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        if event.tag not in _PLAIN_TAGS:
            short = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._fail(event, f"the tag {short} is not allowed", "remove it", path[:-1])
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif len(path) >= MAX_DEPTH:
            self._stop(event, f"nested deeper than {MAX_DEPTH} levels", "is a bracket missing?")
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if event.anchor:
            self.anchors[event.anchor] = value, path
        if not isinstance(event, yaml.ScalarEvent):
            self.open.append(value)
            self._fill_mapping(value, path) if isinstance(value, dict) else self._fill_list(value, path)
            self.open.pop()
        return value

    def _fill_list(self, found: list[Any], path: KeyPath) -> None:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self._value(event, (*path, len(found))))

    def _fill_mapping(self, found: dict[str, Any], path: KeyPath) -> None:
        written: set[str] = set()
        merged: Any = None
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, path)
            below = (*path, key)
            if key in written:
                line = self.source.marks[below][0]
                self._fail(event, f'the key "{key}" is here twice', f"the first is in line {line}; keep one", below)
            written.add(key)
            self.source.marks[below] = _place(event)
            value = self._value(next(self.events), below)
            if key == MERGE:
                merged = value
            else:
                found[key] = value
        if merged is not None:
            self._merge(event, found, merged, path)

    def _key(self, event: Any, path: KeyPath) -> str:
        is_single = isinstance(event, yaml.ScalarEvent | yaml.AliasEvent)
        value = self._value(event, path) if is_single else None
        if value is None or isinstance(value, dict | list):
            self._stop(event, "a key must be a plain word", "put it in quotes", path)
        return event.value if isinstance(event, yaml.ScalarEvent) else str(value)

    def _alias(self, event: yaml.AliasEvent, path: KeyPath) -> Any:
        name = event.anchor or ""
        if name not in self.anchors:
            remedy = did_you_mean(name, self.anchors) if self.anchors else "put a text that starts with * in quotes"
            self._stop(event, f"no anchor &{name} before this alias", remedy, path[:-1])
        value, origin = self.anchors[name]
        if any(item is value for item in self.open):
            self._stop(event, f"the alias *{name} contains itself", "remove it", path[:-1])
        self._copy_marks(event, value, origin, path)
        return value

    def _copy_marks(self, event: Any, value: Any, origin: KeyPath, target: KeyPath) -> None:
        """Notes for what is in `value` as well the place where it is written: below `origin`."""
        items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        for key, child in items:
            below, source = (*target, key), (*origin, key)
            self._spend(event, below)
            self.source.marks.setdefault(below, self.source.marks.get(source, _place(event)))
            self._copy_marks(event, child, source, below)

    def _merge(self, event: Any, found: dict[str, Any], merged: Any, path: KeyPath) -> None:
        """Adds what stands at `<<` to a finished mapping; its own keys win, then the earlier of several mappings."""
        several = isinstance(merged, list)
        for index, part in enumerate(merged if several else [merged]):
            origin = (*path, MERGE, index) if several else (*path, MERGE)
            if not isinstance(part, dict):
                problem = Finding("`<<` takes a mapping or a list of mappings", origin, "write <<: *anchor")
                raise SiteError([*self.problems, self.source.locate(problem)])
            new = {key: item for key, item in part.items() if key not in found}
            found.update(new)
            self._copy_marks(event, new, origin, path)

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        text: str = event.value
        if not event.implicit[0] or event.tag is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > MAX_DIGITS:
                self._fail(event, f"the number {text[:MAX_DIGITS]}… is too large", "put a text in quotes", path)
                return 0
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        number = float(text) if _FLOAT.fullmatch(text) else math.inf
        return number if math.isfinite(number) else text


def _place(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


# --- the parser's errors in plain words ------------------------------------------------------------------------------


def _in_plain_words(error: yaml.MarkedYAMLError, text: str, name: str) -> Finding:
    """A parser's error as a finding that a person understands; `yaml_errors.yaml` has the words."""
    said = ", ".join(part for part in (error.context, error.problem) if part)
    table = plain_yaml(Path(__file__).with_name("yaml_errors.yaml").read_bytes())
    words = next(words for words in table if re.search(words["pattern"], said))
    first, last = error.context_mark or error.problem_mark, error.problem_mark or error.context_mark
    mark = first if words.get("is_at_start") else last
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message, remedy = words["message"], words["remedy"].replace("{line}", str(first.line + 1 if first else 1))
    tab = _tab_in_indentation(text, line)
    if tab:
        message, remedy, column = "a tab in the indentation", "indent with spaces", tab
    return Finding(f"not valid YAML: {message}", remedy=remedy, file=name, line=line, column=column)


def _tab_in_indentation(text: str, line: int) -> int:
    """Column of the first tab before the words of a line; 0 when there is none."""
    lines = text.splitlines()
    words = lines[line - 1] if line <= len(lines) else ""
    return words[: len(words) - len(words.lstrip())].find("\t") + 1
