"""Names of files and paths that come from outside: bundles, backups, locks, model sources."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_SIGN = r"[^/\\\x00-\x1f\x7f-\x9f]"
# One file in a folder: no separator, no control character, no leading `-`, neither `.` nor `..`.
FILE_NAME = rf"^([^./\\\x00-\x1f\x7f-\x9f-]{_SIGN}*|\.[^./\\\x00-\x1f\x7f-\x9f]{_SIGN}*|\.\.{_SIGN}+)$"
# Characters of a name, at most; file systems have no longer ones.
LONGEST = 255
_FILE_NAME = re.compile(FILE_NAME)


def is_file_name(name: str) -> bool:
    """Whether a name is that of one file in a folder, safe in a path and as a word of a command."""
    return len(name) <= LONGEST and _FILE_NAME.fullmatch(name) is not None


def is_below(path: str) -> bool:
    """Whether a path from a record leads to a place below the folder of that record."""
    return all(map(is_file_name, path.split("/")))


def _path_below(path: str) -> str:
    if not is_below(path):
        raise ValueError("is no path below a folder")
    return path


# The type of a path of file names that comes from outside.
PathBelow = Annotated[str, AfterValidator(_path_below)]
