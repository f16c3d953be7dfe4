"""For hatchling: the wheel needs the versions that `requirements.txt` has, with which the kit was tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class LockedDependencies(MetadataHookInterface):
    """Each locked package with its version and marker, without hashes."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the dependencies."""
        lines = (Path(self.root) / "requirements.txt").read_text(encoding="utf-8").splitlines()
        metadata["dependencies"] = [line.removesuffix("\\").strip() for line in lines if line[:1].isalnum()]
