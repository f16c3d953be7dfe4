"""llama-server's flags as corral/components/llama/flags.yaml, from llama.cpp's own parser in the wheel xllamacpp.

`make flags` writes the table again; tests read command lines with the same parser, which is the code that a container's
llama-server reads its own with. The wheel does not offer it to Python, so it is called as any C++ function of a shared
library can be, in a process of its own: `--help` ends the process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parents[1] / "corral" / "components" / "llama" / "flags.yaml"
REMOVED = "the argument has been removed."
HEAD = """\
# llama-server's command line, as llama.cpp's own parser has it: written by `make flags`, read by
# corral/components/llama/flags.py.
# Source: the help of the parser in the wheel xllamacpp {version}, the build after the images' (see images in
# corral/components/llama/component.yaml). The wheel before them, 2026.9.11063, has the same but for --moe-cache-mib,
# --rpc and --spec-draft-sampling: whether the images' build has these three is not known; it has all others.
"""
_CALL = r"""
import ctypes, json, sys
import xllamacpp
library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
parse = library._Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E
parse.restype = ctypes.c_bool
parse.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
HEAD_OF_OBJECT = 16  # a Python object's reference count and type; then comes the C++ object that it wraps
SERVER = 12  # LLAMA_EXAMPLE_SERVER
for words in json.load(sys.stdin):
    words = [word.encode() for word in ("llama-server", *words)]
    parameters = xllamacpp.CommonParams()
    sys.stderr.write("\n=====\n"), sys.stderr.flush()
    known = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    is_read = parse(len(words), known, id(parameters) + HEAD_OF_OBJECT, SERVER, None)
    sys.stdout.write("\n=====\n" + ("read" if is_read else "refused")), sys.stdout.flush()
"""


@dataclass(frozen=True)
class Flag:
    """One flag of the help: all its names, how many words follow it, and for a removed one what to use instead."""

    names: tuple[str, ...]
    values: int
    successor: str = ""


def parsed(*command_lines: Sequence[str]) -> list[str]:
    """What llama-server's parser makes of command lines: for each an empty text, or its complaint."""
    done = subprocess.run(
        [sys.executable, "-c", _CALL],
        input=json.dumps(list(map(list, command_lines))),
        check=True,
        capture_output=True,
        text=True,
        env={"GGML_NO_BACKTRACE": "1", "LC_ALL": "C.UTF-8"},
    )
    verdicts = done.stdout.split("\n=====\n")[1:]
    complaints = done.stderr.split("\n=====\n")[1:]
    return [
        "" if verdict.strip() == "read" else complaint.strip() or verdict
        for verdict, complaint in zip(verdicts, complaints, strict=True)
    ]


def help_text() -> str:
    """llama-server's own help."""
    call = [sys.executable, "-c", _CALL]
    return subprocess.run(call, input='[["--help"]]', check=True, capture_output=True, text=True).stdout


_NAME = r"--?[A-Za-z0-9][\w.-]*"
_ENTRY = re.compile(rf"({_NAME}(?:,\s+{_NAME})*)(?: (\S.*?))?(?:\s{{2,}}(.*))?$")


def flags() -> list[Flag]:
    """Every flag, in the order of the help."""
    found: list[Flag] = []
    text: list[str] = []
    for line in help_text().splitlines():
        entry = _ENTRY.match(line) if line.startswith("-") and not line.startswith("-----") else None
        if entry is None:
            text.append("" if line.startswith("-----") else line.strip())
            continue
        _finish(found, text)
        names, value, words = entry.groups()
        found.append(Flag(tuple(re.split(r",\s+", names)), _count(value or "")))
        text = [words or ""]
    _finish(found, text)
    return found


def _count(value: str) -> int:
    """Words that follow a flag: none, one, or two such as `START END`."""
    return len(value.split()) if re.fullmatch(r"[A-Z]+ [A-Z]+", value) else int(bool(value))


def _finish(found: list[Flag], text: list[str]) -> None:
    words = " ".join(filter(None, text)).partition(" (env:")[0]
    if found and words.startswith(REMOVED):
        found[-1] = Flag(found[-1].names, found[-1].values, words.removeprefix(REMOVED).strip())


def table(found: Sequence[Flag], version: str) -> str:
    """The table as YAML, one flag a line."""
    lines = [HEAD.format(version=version)]
    for title, count in (("switches", 0), ("values", 1), ("pairs", 2)):
        lines += [f"{title}:", *(f'  - "{" ".join(flag.names)}"' for flag in found if flag.values == count), ""]
    lines += ["removed:", *(f'  "{" ".join(flag.names)}": "{flag.successor}"' for flag in found if flag.successor)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the table again."""
    import xllamacpp

    TABLE.write_text(table(flags(), xllamacpp.__version__), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
