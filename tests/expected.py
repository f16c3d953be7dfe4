"""The expected trees of the golden cases, without copies.

`tests/golden/<case>/expected.txt` has a line for each rendered file:

    box/.env.example                                             the file is below `expected/`
    box/haproxy/fair.lua = haproxy/fair.lua                      the header, then the bytes of that shipped file
    gpu1/.gitignore = minimal: box/.gitignore                    the text of an earlier file, with the names of this one
    box/haproxy/haproxy.cfg ~ minimal: box/haproxy/haproxy.cfg   the same, with the changes of `expected/<path>.delta`

An earlier file belongs to `compose/`, to a case before this one in CASES, or to this case. The names of its site and
host are replaced by those of the file that refers to it. In a delta, `@ skip 3, copy 12` goes on by 3 lines of the
earlier text (back, if negative) and copies the next 12, `@ back 40, copy 12` copies the first 12 of the last 40 lines
made so far, and a line with a `+` is new. To see a whole file, render the case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from corral.render.templates import Tree
from tests.trees import CASES, DEFAULT, GOLDEN, ROOT, plan_of, put, tree_of

SHORTEST = 3  # lines that a delta copies; fewer are easier to read as they are
WHOLE = "minimal"  # has no deltas: a reader's complete example of a small site
ENTRY = re.compile(r"^(\S+)(?: ([=~]) (?:(\S+): )?(\S+))?$", re.MULTILINE)
HUNK = re.compile(r"@ (skip|back) (-?\d+), copy (\d+)")
SOURCE = re.compile(rb"^(?:#|--) Change the inventory or (\S+), then run:", re.MULTILINE)


@cache
def expected_of(case: str) -> Tree:
    """The committed tree of a case; a file below `expected/` that the manifest does not name is part of it."""
    if case == DEFAULT:
        return {path: (ROOT / "compose" / path).read_bytes() for path in tree_of(case)}
    stored, tree = read_tree(GOLDEN / case / "expected"), Tree()
    for path, mark, base, source in ENTRY.findall((GOLDEN / case / "expected.txt").read_text(encoding="utf-8")):
        if not mark:
            tree[path] = stored.pop(path, b"")
        elif not base:
            tree[path] = shipped(source, case, path)
        else:
            earlier = tree if base == case else expected_of(base)
            old = renamed(earlier.get(source, b""), (base, source), (case, path))
            tree[path] = old if mark == "=" else changed(old, stored.pop(f"{path}.delta", b""))
    return tree | stored


def read_tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shipped(source: str, case: str, path: str) -> bytes:
    """A file of the repository as it is rendered at a path; JSON has no comments, so it gets no header."""
    data, mark, (site, host) = (ROOT / source).read_bytes(), "--" if source.endswith(".lua") else "#", names(case, path)
    header = (
        f'{mark} Rendered by corral from the inventory "{site}", host {host}; do not edit.\n'
        f"{mark} Change the inventory or {source}, then run: ./generate.py render\n\n"
    )
    interpreter = data[: data.index(b"\n") + 1] if data.startswith(b"#!") else b""
    return data if source.endswith(".json") else interpreter + header.encode() + data[len(interpreter) :]


def renamed(data: bytes, old: tuple[str, str], new: tuple[str, str]) -> bytes:
    """The text of one file (case, path) with the names of the site and the host of another."""
    (site, host), (new_site, new_host) = names(*old), names(*new)
    pattern = rf'(?<=["=-]){re.escape(site)}(?!\w)|(?<![\w.]){re.escape(host)}(?![\w.])'
    return re.sub(pattern, lambda found: new_site if found[0] == site else new_host, data.decode()).encode()


def names(case: str, path: str) -> tuple[str, str]:
    return plan_of(case).inventory.name, path.partition("/")[0]


def changed(old: bytes, delta: bytes) -> bytes:
    lines, made, at = old.decode().split("\n"), list[str](), 0
    for line in delta.decode().split("\n")[:-1]:
        hunk = HUNK.fullmatch(line)
        if hunk is None:
            made.append(line[1:])
        elif hunk[1] == "skip":
            at += int(hunk[2]) + int(hunk[3])
            made += lines[at - int(hunk[3]) : at]
        else:
            made += made[len(made) - int(hunk[2]) :][: int(hunk[3])]
    return "\n".join(made).encode()


def delta_of(old: bytes, new: bytes) -> bytes:
    lines, wanted = old.decode().split("\n"), new.decode().split("\n")
    delta, at, done = list[str](), 0, 0
    while done < len(wanted):
        made, rest = wanted[:done], wanted[done:]
        size, where, start = max((*copies(lines, rest, 1), *copies(made, rest, 0)), default=(0, 0, 0))
        if size < SHORTEST:
            delta.append(f"+{rest[0]}")
            size = 1
        elif where == 1:
            delta.append(f"@ skip {start - at}, copy {size}")
            at = start + size
        else:
            delta.append(f"@ back {done - start}, copy {size}")
        done += size
    return "".join(f"{line}\n" for line in delta).encode()


def copies(lines: list[str], wanted: list[str], where: int) -> Iterator[tuple[int, int, int]]:
    """How many of the wanted lines stand in the others, `where`, and from which line on."""
    for start in (index for index, line in enumerate(lines) if line == wanted[0]):
        pairs = enumerate(zip(lines[start:], wanted, strict=False))
        yield next((size for size, (a, b) in pairs if a != b), min(len(lines) - start, len(wanted))), where, start


def write_expected(case: str) -> None:
    """Write the manifest and the kept files of a case anew from what is rendered, and delete all others."""
    folder, entries = GOLDEN / case / "expected", [entry(case, path) for path in tree_of(case)]
    kept = {name: data for _, name, data in entries if name}
    for path in read_tree(folder).keys() - kept.keys():
        (folder / path).unlink()
    put(kept, folder)
    (GOLDEN / case / "expected.txt").write_text("".join(f"{line}\n" for line, *_ in entries), encoding="utf-8")


def entry(case: str, path: str) -> tuple[str, str, bytes]:
    """The line of the manifest for a file, and the name and bytes of what is kept below `expected/`, if anything."""
    data = tree_of(case)[path]
    found = SOURCE.search(data)
    source = found[1].decode() if found else f"monitoring/dashboards/{path.rpartition('/')[2]}"
    if (ROOT / source).is_file() and shipped(source, case, path) == data:
        return f"{path} = {source}", "", b""
    texts: dict[bytes, str] = {}
    for base, other in before(case, path):
        texts.setdefault(renamed(tree_of(base)[other], (base, other), (case, path)), f"{base}: {other}")
    if data in texts:
        return f"{path} = {texts[data]}", "", b""
    deltas = (
        [] if case == WHOLE else [(f"{path} ~ {at}", f"{path}.delta", delta_of(old, data)) for old, at in texts.items()]
    )
    return min([(path, path, data), *deltas], key=lambda item: item[2].count(b"\n"))


def before(case: str, path: str) -> list[tuple[str, str]]:
    """The files before this one with the same path below the host, digits aside, or else with the same name."""
    files = [(base, other) for base in (DEFAULT, *CASES[: CASES.index(case) + 1]) for other in tree_of(base)]
    files = files[: files.index((case, path))]
    alike = [file for file in files if kind(*file) == kind(case, path)]
    return alike or [file for file in files if Path(file[1]).name == Path(path).name]


def kind(case: str, path: str) -> str:
    return re.sub(r"\d+", "", path.partition("/")[2].replace(f"-{names(case, path)[0]}", ""))
