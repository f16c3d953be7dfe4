"""Folders with model files as other programs write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

COMMIT = "1" * 40


def put_in_hub(folder: Path, repository: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """Files in a Hugging Face cache: large ones by their sha256, others by git's checksum; links lead to them."""
    cache = folder / f"models--{repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "blobs").mkdir(exist_ok=True)
    for path, content in files.items():
        is_large = path.endswith((".gguf", ".safetensors"))
        blob = (
            hashlib.sha256(content).hexdigest()
            if is_large
            else hashlib.sha1(content, usedforsecurity=False).hexdigest()
        )
        (cache / "blobs" / blob).write_bytes(content)
        link = cache / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * (2 + path.count("/")) + f"blobs/{blob}")
    return cache


def put_in_ollama(folder: Path, name: str, tag: str, content: bytes) -> None:
    """A model in Ollama's folder: a list of its parts, and each by its checksum."""
    sha256 = hashlib.sha256(content).hexdigest()
    manifest = folder / "manifests" / "registry.ollama.ai" / "library" / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "blobs" / f"sha256-{sha256}").write_bytes(content)
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": 1}
        for kind, digest in (("license", "0" * 64), ("model", sha256), ("template", "1" * 64))
    ]
    media = "application/vnd.docker.distribution.manifest.v2+json"
    manifest.write_text(json.dumps({"schemaVersion": 2, "mediaType": media, "config": {}, "layers": layers}))
