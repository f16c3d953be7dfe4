"""YAML text as plain data plus the place of every value, so that an error can name file, line and column.

Read from the event stream with YAML 1.2's core scalars (`on`, `off`, `yes`, `no` are words, not booleans).
Duplicate keys, unknown tags, runaway aliases, extreme nesting and oversized files are refused here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from corral.errors import KeyPath, Problem, SiteError, did_you_mean

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

    def locate(self, problem: Problem) -> Problem:
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


def read_source(path: Path) -> Source:
    """The file's data and places; raises SiteError with located problems when it is not usable YAML."""
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SiteError([Problem(f"cannot be read: {error.strerror or error}", file=name)]) from None
    if len(raw) > MAX_BYTES:
        words = f"larger than {MAX_BYTES // 1024**2} MiB, which no inventory is"
        raise SiteError([Problem(words, remedy="is this the right file?", file=name)])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SiteError([_not_utf8(raw, error.start, name)]) from None
    return parse(text, name)


def _not_utf8(raw: bytes, position: int, name: str) -> Problem:
    words = "not UTF-8 text" + (" but UTF-16" if raw.startswith(_UTF16) else "")
    line_start = raw.rfind(b"\n", 0, position) + 1
    column = len(raw[line_start:position].decode(errors="replace")) + 1
    line = raw.count(b"\n", 0, position) + 1
    return Problem(words, remedy="save the file as UTF-8", file=name, line=line, column=column)


def parse(text: str, name: str) -> Source:
    """Like read_source, from text."""
    odd = _NOT_TEXT.search(text, text.startswith("\ufeff"))
    if odd:
        line, column = text.count("\n", 0, odd.start()) + 1, odd.start() - text.rfind("\n", 0, odd.start())
        words = f"the invisible character U+{ord(odd.group()):04X} is not allowed"
        raise SiteError([Problem(words, remedy="remove it", file=name, line=line, column=column)])
    try:
        return _Builder(name).build(text)
    except yaml.MarkedYAMLError as error:
        raise SiteError([_in_plain_words(error, text, name)]) from None


@dataclass(slots=True)
class _Frame:
    """A mapping or list that is being filled."""

    value: Any
    path: KeyPath
    key: str | None = None
    written: set[str] = field(default_factory=set)
    # What stands at `<<`.
    merged: Any = None


class _Builder:
    """Builds data from YAML events without recursion."""

    def __init__(self, name: str) -> None:
        self.source = Source(name, None)
        self.problems: list[Problem] = []
        self.stack: list[_Frame] = []
        self.anchors: dict[str, tuple[Any, KeyPath]] = {}
        self.budget = MAX_VALUES
        self.documents = 0

    def build(self, text: str) -> Source:
        for event in yaml.parse(text, Loader=_LOADER):
            self._take(event)
        if self.problems:
            raise SiteError(self.problems)
        return self.source

    def _fail(self, event: yaml.Event, message: str, hint: str = "", path: KeyPath | None = None) -> None:
        if path is None:
            path = self.stack[-1].path if self.stack else ()
        line, column = _place(event)
        self.problems.append(Problem(message, path, hint, file=self.source.file, line=line, column=column))

    def _stop(self, event: yaml.Event, message: str, hint: str = "", path: KeyPath | None = None) -> NoReturn:
        self._fail(event, message, hint, path)
        raise SiteError(self.problems)

    def _take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._stop(event, "a second YAML document", "an inventory is one document; remove the `---`")
        elif isinstance(event, yaml.ScalarEvent):
            self._add(event, self._scalar(event), event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._open(event)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            frame = self.stack.pop()
            if frame.merged is not None:
                self._merge(event, frame)

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        if len(self.stack) >= MAX_DEPTH:
            self._stop(event, f"nested deeper than {MAX_DEPTH} levels", "is a bracket missing?", ())
        self._refuse_tag(event, event.tag)
        value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        path = self._add(event, value, event.anchor)
        self.stack.append(_Frame(value, path))

    def _refuse_tag(self, event: yaml.Event, tag: str | None) -> None:
        if tag not in _PLAIN_TAGS:
            short = str(tag).replace("tag:yaml.org,2002:", "!!")
            self._fail(event, f"the tag {short} is not allowed", "remove it")

    def _alias(self, event: yaml.AliasEvent) -> None:
        name = event.anchor or ""
        if name not in self.anchors:
            hint = did_you_mean(name, self.anchors) if self.anchors else "put a text that starts with * in quotes"
            self._stop(event, f"no anchor &{name} before this alias", hint)
        value, origin = self.anchors[name]
        if any(frame.value is value for frame in self.stack):
            self._stop(event, f"the alias *{name} contains itself", "remove it")
        path = self._add(event, value, None)
        if isinstance(value, dict | list):
            self._copy_marks(event, value, origin, path)

    def _copy_marks(self, event: yaml.Event, value: Any, origin: KeyPath, target: KeyPath) -> None:
        """Notes for what stands below `target` as well the place where it is written: below `origin`."""
        pending = [(value, origin, target)]
        while pending:
            item, source, where = pending.pop()
            if len(where) > MAX_DEPTH:
                self._stop(event, f"nested deeper than {MAX_DEPTH} levels", "aliases put too much into each other", ())
            for key, child in item.items() if isinstance(item, dict) else enumerate(item):
                self._spend(event)
                below = (*where, key)
                self.source.marks.setdefault(below, self.source.marks.get((*source, key), _place(event)))
                if isinstance(child, dict | list):
                    pending.append((child, (*source, key), below))

    def _spend(self, event: yaml.Event) -> None:
        self.budget -= 1
        if self.budget < 0:
            self._stop(event, f"more than {MAX_VALUES} values", "aliases multiply what they stand for", ())

    def _add(self, event: yaml.Event, value: Any, anchor: str | None) -> KeyPath:
        """Puts a value where it belongs and returns its path."""
        self._spend(event)
        path = self._put(event, value)
        if anchor:
            self.anchors[anchor] = value, path
        return path

    def _put(self, event: yaml.Event, value: Any) -> KeyPath:
        if not self.stack:
            self.source.data = value
            self.source.marks[()] = _place(event)
            return ()
        frame = self.stack[-1]
        if isinstance(frame.value, list):
            path = (*frame.path, len(frame.value))
            frame.value.append(value)
            self.source.marks[path] = _place(event)
            return path
        if frame.key is None:
            return self._key(event, value, frame)
        path = (*frame.path, frame.key)
        if frame.key == MERGE:
            frame.merged = value
        else:
            frame.value[frame.key] = value
        frame.key = None
        return path

    def _key(self, event: yaml.Event, value: Any, frame: _Frame) -> KeyPath:
        if isinstance(value, dict | list) or value is None:
            self._stop(event, "a key must be a plain word", "put it in quotes")
        key = event.value if isinstance(event, yaml.ScalarEvent) else str(value)
        path = (*frame.path, key)
        if key in frame.written:
            first = self.source.marks[path][0]
            self._fail(event, f'the key "{key}" is here twice', f"the first is in line {first}; keep one", path)
        frame.written.add(key)
        frame.key = key
        self.source.marks[path] = _place(event)
        return path

    def _merge(self, event: yaml.Event, frame: _Frame) -> None:
        """Adds what stands at `<<` to a finished mapping; its own keys win, then the earlier of several mappings."""
        several = isinstance(frame.merged, list)
        for index, part in enumerate(frame.merged if several else [frame.merged]):
            origin = (*frame.path, MERGE, index) if several else (*frame.path, MERGE)
            if not isinstance(part, dict):
                problem = Problem("`<<` takes a mapping or a list of mappings", origin, "write <<: *anchor")
                raise SiteError([*self.problems, self.source.locate(problem)])
            new = {key: item for key, item in part.items() if key not in frame.value}
            frame.value.update(new)
            self._copy_marks(event, new, origin, frame.path)

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        self._refuse_tag(event, event.tag)
        text: str = event.value
        if not event.implicit[0] or event.tag is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > MAX_DIGITS:
                frame = self.stack[-1] if self.stack else _Frame(None, ())
                path = (*frame.path, frame.key) if frame.key else frame.path
                self._fail(event, f"the number {text[:MAX_DIGITS]}… is too large", "put a text in quotes", path)
                return 0
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text):
            number = float(text)
            return number if math.isfinite(number) else text
        return text


def _place(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


# --- the parser's errors in plain words ------------------------------------------------------------------------------


class _Words(NamedTuple):
    """What the parser says, as a pattern, and what we say instead."""

    pattern: str
    message: str
    hint: str
    # Whether the place where the construct begins tells more than the place where the parser gave up.
    is_at_start: bool = False


_IN_PLAIN_WORDS = (
    _Words("quoted scalar.*end of stream", "this quote is never closed", "close it", is_at_start=True),
    _Words("unknown escape", "this escape is not known in double quotes", "double the backslash or use single quotes"),
    _Words("flow sequence", 'expected "," or "]" here', 'the "[" of line {line} is still open'),
    _Words("flow mapping", 'expected "," or "}" here', 'the "{" of line {line} is still open'),
    _Words("simple key", 'a ":" is missing after this', "write key: value", is_at_start=True),
    _Words("block collection", "this is no item of the list above", 'items start with "- ", all in one column'),
    _Words("block mapping", "expected a key here", "check the indentation and the line above"),
    _Words("mapping values are not", 'a ":" is not allowed here', "check the indentation, or put the text in quotes"),
    _Words("sequence entries are not", 'a "- " is not allowed here', "start the list on a line of its own"),
    _Words("tag handle|directive|incompatible", "tags and directives are not allowed", "remove it"),
    _Words("scanning an (alias|anchor)", "a name is missing after this sign", "put a text in quotes", is_at_start=True),
    _Words("document start", "this stands after the end of the document", "remove the line with `...`"),
    _Words("block scalar", "this cannot follow `|` or `>`", "start the text on the next line"),
    _Words("node content", "expected a value here", "put the text in quotes, or remove the sign"),
    _Words("cannot start any token", "a value cannot start with this sign", "put the text in quotes"),
    _Words("", "this cannot be read", "check the indentation and the quotes"),
)


def _in_plain_words(error: yaml.MarkedYAMLError, text: str, name: str) -> Problem:
    """A parser's error as a problem that a person understands."""
    said = ", ".join(part for part in (error.context, error.problem) if part)
    words = next(words for words in _IN_PLAIN_WORDS if re.search(words.pattern, said))
    first, last = error.context_mark or error.problem_mark, error.problem_mark or error.context_mark
    mark = first if words.is_at_start else last
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message, hint = words.message, words.hint.replace("{line}", str(first.line + 1 if first else 1))
    tab = _tab_in_indentation(text, line)
    if tab:
        message, hint, column = "a tab in the indentation", "indent with spaces", tab
    return Problem(f"not valid YAML: {message}", remedy=hint, file=name, line=line, column=column)


def _tab_in_indentation(text: str, line: int) -> int:
    """Column of the first tab before the words of a line; 0 when there is none."""
    lines = text.splitlines()
    words = lines[line - 1] if line <= len(lines) else ""
    return words[: len(words) - len(words.lstrip())].find("\t") + 1
