"""Names of files and paths that come from outside: bundles, backups, locks, model sources."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

_SIGN = r"[^/\\\x00-\x1f\x7f-\x9f]"
# One file in a folder: no separator, no control character, no leading `-`, neither `.` nor `..`.
FILE_NAME = rf"^([^./\\\x00-\x1f\x7f-\x9f-]{_SIGN}*|\.[^./\\\x00-\x1f\x7f-\x9f]{_SIGN}*|\.\.{_SIGN}+)$"
# Characters of a name, at most; file systems have no longer ones.
LONGEST = 255
_FILE_NAME = re.compile(FILE_NAME)
# Pages of the Hugging Face Hub as browsers show their addresses: a repository, and a file in it at a revision.
_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|raw|tree)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?"
)
# A quantization instead of a file, as `llama-server -hf` takes it.
_TAG = re.compile(r"hf:[^/:]+/(?P<repository>[^/:]+):(?P<tag>[A-Za-z0-9][\w.-]*)")
# A model in Ollama's own folder: `name`, `user/name` or `registry/user/name`, each with a tag if it has one.
_PART = r"[A-Za-z0-9][\w.-]*"
_OLLAMA = re.compile(
    rf"ollama:(?P<name>(?:{_PART}(?::\d+)?/)?(?:{_PART}/)?{_PART})(?::(?P<tag>{_PART}))?(?P<role>#\w+)?"
)
OLLAMA_REGISTRY, OLLAMA_USER, OLLAMA_TAG = "registry.ollama.ai", "library", "latest"


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


# --- model sources ---------------------------------------------------------------------------------------------------


def hub_source(source: str) -> tuple[str, str]:
    """A browser's address of a page of the Hugging Face Hub as an `hf:` source, and the revision that it names.

    The revision is empty for `main`; other sources are left as they are.
    """
    found = _PAGE.fullmatch(source)
    if found is None:
        return source, ""
    repository, revision, file = (unquote(part or "") for part in found.groups())
    return f"hf:{repository}" + (f"/{file}" if file else ""), "" if revision == "main" else revision


def tag_of(source: str) -> str:
    """The quantization that a source names instead of a file (`hf:owner/repo:Q4_K_M`); empty for other sources."""
    found = _TAG.fullmatch(source)
    return found["tag"] if found else ""


def ollama_manifest(source: str) -> str:
    """Path of the list of a model's parts in Ollama's folder; empty for sources of another kind."""
    found = _OLLAMA.fullmatch(source)
    if found is None:
        return ""
    names = found["name"].split("/")
    registry = [OLLAMA_REGISTRY, OLLAMA_USER][: 3 - len(names)]
    return "/".join(["manifests", *registry, *names, found["tag"] or OLLAMA_TAG])


def file_of(source: str) -> str:
    """Name of the file that a source names, as a flat models folder has it; a guess for one that names none."""
    if found := _TAG.fullmatch(source):
        return f"{re.sub('(?i)-gguf$', '', found['repository'])}-{found['tag']}.gguf"
    if manifest := ollama_manifest(source):
        role = source.partition("#")[2]
        return "-".join([*manifest.split("/")[-2:], *([role] if role else [])]) + ".gguf"
    return source.removesuffix("/").rpartition("/")[2].removeprefix("hf:").partition("?")[0]
