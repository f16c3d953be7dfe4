"""The golden cases: inventories, their plans and what is rendered from them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.contributions import Service
from corral.render.templates import Tree
from corral.render.tree import render

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# The default site, which is rendered and committed as a whole.
DEFAULT = "compose"
CASES = (
    "minimal",
    "one-host-two-gpus",
    "other-cards",
    "heartcode",
    "neural-farm",
    "dragon",
    "jarvis",
    "llama-farm",
    "local-everything",
    "least-busy",
    "direct",
    "routing",
    "shared",
    "vllm",
    "speech",
    "traced",
    "everything-on",
    "swarm",
)

each_case = pytest.mark.parametrize("case", CASES)


def inventory_of(case: str) -> Path:
    """A case's own inventory, or the worked example of the same name."""
    if case == DEFAULT:
        return ROOT / "inventory.yaml"
    own = GOLDEN / case / "inventory.yaml"
    return own if own.exists() else ROOT / "inventories" / f"{case}.yaml"


@cache
def plan_of(case: str) -> Plan:
    """The plan of a case."""
    return build_plan(load_inventory(inventory_of(case)))


@cache
def tree_of(case: str) -> Tree:
    """What is rendered for a case."""
    return render(plan_of(case))


def put(tree: Tree, folder: Path) -> Path:
    """Lays a tree out below a folder, as plainly as can be, and returns the folder."""
    for path, data in tree.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def hosts_of(case: str, runtime: str) -> list[str]:
    """The rendered hosts of one runtime."""
    inventory = plan_of(case).inventory
    rendered = {path.partition("/")[0] for path in tree_of(case)}
    return [
        name
        for name, host in inventory.hosts.items()
        if name in rendered and runtime == ("local" if host.runtime == "local" else inventory.runtime)
    ]


def compose_files(case: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every `compose.yaml` of a case, parsed."""
    for path, data in tree_of(case).items():
        if path.endswith("compose.yaml"):
            yield path, yaml.safe_load(data)


def services_of(case: str) -> list[Service]:
    """The planned services of a case."""
    return plan_of(case).contributions.services
