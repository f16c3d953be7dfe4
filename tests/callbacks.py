"""LiteLLM's callbacks of the kit, loaded as LiteLLM loads them: by their paths, since their folder is no package."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent / "litellm"

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM would fetch a price list when imported


def load_callback(name: str, folder: Path = FOLDER) -> ModuleType:
    """A callback, anew at each call; from beside its settings where they are in another folder."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
