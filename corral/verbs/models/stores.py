"""Model files that other programs keep on a host: found where they lie, by the source that the inventory names.

Known are a Hugging Face cache, Ollama's folder, LM Studio's and llama.cpp's own, and any folder with paths below it.
Servers read such files in place. Nothing is written there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from corral.config.file_names import is_below, ollama_manifest
from corral.config.model_paths import COMMIT

if TYPE_CHECKING:
    from corral.verbs.models.far_files import FarFolder
    from corral.verbs.models.local_files import LocalFolder

# What Ollama calls the parts of a model.
LAYER = "application/vnd.ollama.image."
# Content by its checksum, as the Hub's cache and Ollama name it.
_BLOB = re.compile(r"(?:sha256-)?([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Found:
    """A file in a store."""

    path: str
    # By its name; empty where only its content tells.
    sha256: str
    # The commit of its repository, where the store knows it.
    commit: str = ""
    # Where it really lies when that is outside of the store.
    outside: str = ""


def find(folder: LocalFolder | FarFolder, root: str, source: str, revision: str, commit: str) -> Found | None:
    """The file of a source in a store; None when it is not there.

    Args:
        folder: reads the host's files.
        root: the store, as a whole path.
        source: the file that is looked for.
        revision: the revision that the inventory wants; empty for the newest.
        commit: the commit that the lock has pinned, tried first.
    """
    for path in _candidates(folder, root, source, revision, commit):
        if is_below(path) and folder.size(f"{root}/{path}") is not None:
            real, top = folder.real(f"{root}/{path}"), folder.real(root)
            blob = _BLOB.fullmatch(PurePosixPath(real).name)
            snapshot = re.search(r"/snapshots/([0-9a-f]{40})/", path)
            is_inside = real.startswith(f"{top}/")
            return Found(path, blob[1] if blob else "", snapshot[1] if snapshot else "", "" if is_inside else real)
    return None


def _candidates(folder: LocalFolder | FarFolder, root: str, source: str, revision: str, commit: str) -> Iterator[str]:
    """Paths below a store at which a file may lie."""
    scheme, _, rest = source.rpartition(":") if "://" not in source else ("web", "", "")
    if source.startswith("hf:"):
        yield from _of_hub(folder, root, rest, revision, commit)
    elif manifest := ollama_manifest(source):
        for start in ("", "models/"):  # OLLAMA_MODELS, or the folder around it
            digest = _digest(folder.text(f"{root}/{start}{manifest}"), source.partition("#")[2] or "model")
            yield f"{start}blobs/{digest.replace(':', '-')}"
    elif scheme == "file" and rest.startswith(f"{root}/"):
        yield rest.removeprefix(f"{root}/")
    elif not scheme:
        yield source


def _of_hub(folder: LocalFolder | FarFolder, root: str, rest: str, revision: str, commit: str) -> Iterator[str]:
    owner, repository, file = rest.split("/", 2)
    for start in ("", "hub/"):  # HF_HUB_CACHE, or HF_HOME around it
        cache = f"{start}models--{owner}--{repository}"
        named = revision if COMMIT.fullmatch(revision) else ""
        for found in dict.fromkeys([commit, named or folder.text(f"{root}/{cache}/refs/{revision or 'main'}").strip()]):
            if COMMIT.fullmatch(found):
                yield f"{cache}/snapshots/{found}/{file}"
    if not revision:  # these folders do not tell of which revision their files are
        yield f"{owner}/{repository}/{file}"
        yield f"{owner}/{repository}/{PurePosixPath(file).name}"
        yield f"{owner}_{repository}_{file.replace('/', '_')}"


def _digest(manifest: str, role: str) -> str:
    """The content of a part of a model by Ollama's list of its parts."""
    with suppress(ValueError, TypeError, KeyError):
        for layer in json.loads(manifest)["layers"]:
            if layer["mediaType"] == LAYER + role:
                return str(layer["digest"])
    return ""
