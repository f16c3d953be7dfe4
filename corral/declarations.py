"""What components say of themselves as data: `component.yaml` in each folder, read before any of their code runs.

A component is a folder of corral/components, or a package that an installed distribution names as an entry point of the
group `corral.components`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from corral.config.source import plain_yaml
from corral.errors import UsageError

GROUP = "corral.components"
CODE = Path(__file__).resolve().parent
BUILT_IN = CODE / "components"
# Where the folders of the checkout are that the kit ships unchanged; a wheel has copies of them (see pyproject.toml).
ASSETS = CODE / "_assets" if (CODE / "_assets").is_dir() else CODE.parent
IS_CHECKOUT = CODE.parent == ASSETS
# What serves a model whose `server` the inventory leaves out, unless another one is the usual one for its kind.
USUAL = "llama.cpp"
# Whose words: of a container or of Docker about it, of a program of a `local` host, or of a command on a host.
Place = Literal["container", "process", "docker", "nvidia-smi"]


class Package(NamedTuple):
    """Where a component's code is."""

    module: str
    folder: Path


class InferenceServer(BaseModel, frozen=True, extra="forbid"):
    """An inference server, as far as the inventory and the plan have to know it."""

    component: str
    # Its name in messages.
    title: str
    # What `server` of a model says; empty: only the model's kind chooses it.
    name: str = ""
    # Kinds of models for which it is the usual one.
    usual_for: tuple[str, ...] = ()
    # Keys of `engine` that it has.
    settings: frozenset[str]
    # Their values where the inventory says nothing.
    defaults: Mapping[str, Any] = {}
    # Whether it reads single GGUF files; others read a repository or a folder.
    reads_files: bool = False
    # Whether pools can share one of its servers, which loads and unloads models while it runs.
    is_shareable: bool = False
    # Whether it runs without Docker.
    is_local: bool = False
    # Whether it takes a share of each card (`gpu_memory_fraction`), whatever it needs.
    takes_share: bool = False
    # Whether gpu-server/Dockerfile builds it for cards and processors that stock images have no code for.
    has_own_build: bool = False
    # What helps when its container's memory was too small.
    memory_remedy: str = "raise its memory_mib"


class CauseRow(BaseModel, frozen=True, extra="forbid"):
    """A message in a component's log, what it means and what helps."""

    # A regular expression.
    says: str
    means: str
    remedy: str
    # Whose words; without it those of a program, in a container or not.
    of: Place | None = None


@cache
def packages() -> Mapping[str, Package]:
    """Every component by name; an installed one does not replace one of the kit's own."""
    own = {path.parent.name: path.parent for path in sorted(BUILT_IN.glob("*/__init__.py"))}
    installed = {item.name: item.value for item in entry_points(group=GROUP)}
    found = {name: Package(module, _folder_of(module)) for name, module in installed.items() if name not in own}
    return found | {name: Package(f"{GROUP}.{name}", folder) for name, folder in own.items()}


def _folder_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{module}, an installed component of corral, is no package")
    return Path(spec.submodule_search_locations[0])


def shipped(path: str) -> Path:
    """A file that the kit ships, by its path in the checkout, or that a component does: `toy/server.py`."""
    component, _, rest = path.partition("/")
    if component == CODE.name:
        return CODE / rest
    own = packages().get(component)
    return ASSETS / path if own is None or (ASSETS / path).exists() else own.folder / rest


def checkout(what: str) -> Path:
    """The checkout that the kit runs from; raises UsageError, which says what needs it, in an installed wheel."""
    if not IS_CHECKOUT:
        raise UsageError(f"{what} needs a checkout of corral, and this one was installed; see docs/install.md")
    return ASSETS


@cache
def declaration(component: str) -> Mapping[str, Any]:
    """A component's `component.yaml`; empty when it has none."""
    path = packages()[component].folder / "component.yaml"
    return read_yaml(path) if path.exists() else {}


@cache
def read_yaml(path: Path) -> Any:
    """A shipped file's data, read once; it is not to be changed."""
    return plain_yaml(path.read_bytes())


@cache
def servers() -> tuple[InferenceServer, ...]:
    """Every inference server, by the names of their components."""
    told = {name: declaration(name).get("server") for name in sorted(packages())}
    return tuple(InferenceServer(component=name, **fields) for name, fields in told.items() if fields)


@cache
def server_of(kind: str, name: str) -> InferenceServer:
    """What serves a model of that kind whose `server` has that name."""
    usual = [item for item in servers() if kind in item.usual_for] if name == USUAL else []
    return (usual or [item for item in servers() if item.name == name])[0]


@cache
def cause_rows() -> tuple[CauseRow, ...]:
    """What components know of words in their logs."""
    return tuple(CauseRow(**row) for name in sorted(packages()) for row in declaration(name).get("causes", ()))
