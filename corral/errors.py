"""What can be wrong, as data: every finding carries its place, its message and its remedy; the command line prints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

KeyPath = tuple[str | int, ...]
Level = Literal["error", "warning", "hint"]
MAX_SHOWN = 60
MAX_LISTED = 12
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,80}")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or questionable, with an inventory, a plan, a rendering or a running host.

    It is at a path of the inventory (with file, line and column once that is located), or at a host or service.
    """

    message: str
    path: KeyPath = ()
    remedy: str = ""
    rule: str = ""
    level: Level = "error"
    file: str = ""
    line: int = 0
    column: int = 0
    # Host or service, when it is not about the inventory.
    where: str = ""

    def __str__(self) -> str:
        """`file:line:column: path: message; remedy [rule]`, without the parts that are not known."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        level = "warning" if self.level == "warning" else ""
        words = f"{self.message}; {self.remedy}" if self.remedy else self.message
        line = ": ".join(part for part in (place, level, self.where, dotted(self.path), words) if part)
        return on_one_line(f"{line} [{self.rule}]" if self.rule else line)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings each once, in the order in which they stand in the file."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: (finding.file, finding.line, finding.column)))


class CorralError(Exception):
    """A failure that is not our bug; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class SiteError(CorralError):
    """The inventory or the plan made from it is wrong; `problems` has every reason at once."""

    def __init__(self, problems: Iterable[Finding]) -> None:
        self.problems = in_order(problems)
        super().__init__("\n".join(map(str, self.problems)))


class UsageError(CorralError):
    """The command line was used in a way that cannot work."""

    exit_code = 2


class DriftError(CorralError):
    """What is on disk differs from what would be rendered."""

    exit_code = 3


def dotted(path: KeyPath) -> str:
    """The path as people write it: `pools.chat.on[0].host`; unusual keys in quotes."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_KEY.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{shown(part)}]"
    return text


def shown(value: Any) -> str:
    """A value as it may stand in a message: on one line, short, spelled as in YAML."""
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool | int | float):
        return {"None": "nothing", "True": "true", "False": "false"}.get(str(value), str(value))
    if not isinstance(value, str):
        return "a mapping"
    line = on_one_line(value)
    return f'"{line}"' if len(line) <= MAX_SHOWN else f'"{line[:MAX_SHOWN]}…"'


def on_one_line(text: str) -> str:
    """The text with control characters escaped, so that it stays on one line and does not control the terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy which names the nearest known words, or lists them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(map(shown, near)) + "?"
    if not names:
        return "there are none"
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"known: {', '.join(names[:MAX_LISTED])}{rest}"
