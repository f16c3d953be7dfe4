"""The demo's farm, planned for this machine: what it runs, where it lies, how its programs find each other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from corral.build import Plan, build_plan
from corral.config.inventory import Inventory
from corral.config.load import Loaded, load_inventory
from corral.contributions import Secret, Service
from corral.render.secrets import ENV_FILE, read_env
from corral.render.tree import ROOT
from corral.runtime import supervisor

INVENTORY = ROOT / "inventories" / "demo.yaml"
FOLDER = ROOT / ".corral" / "demo"
# The folder with llama-server from a wheel, for machines without one of their own.
SHIM = ROOT / "gpu-server" / "local"

KEY = "LITELLM_MASTER_KEY"


@dataclass(frozen=True, slots=True)
class Farm:
    """The plan, and what running it needs to know."""

    plan: Plan
    host: str
    # PATH of its programs.
    path: str
    # The chat model that was asked for, empty for the one we make.
    model: str

    @property
    def folder(self) -> Path:
        """The rendered host."""
        return FOLDER / self.host

    @property
    def runtime(self) -> supervisor.LocalHost:
        """What runs its programs."""
        return supervisor.LocalHost(self.folder, self.path)

    @property
    def services(self) -> list[Service]:
        """What runs."""
        return self.plan.services_of(self.host)

    @property
    def secrets(self) -> list[Secret]:
        """What it needs to know."""
        return self.plan.secrets_of(self.host)

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://127.0.0.1:{self.plan.inventory.gateway.port}/v1"

    @property
    def key(self) -> str:
        """What opens the gateway."""
        return read_env(self.folder / ENV_FILE)[KEY]

    @property
    def is_balanced(self) -> bool:
        """Whether HAProxy is in the request path."""
        return self.plan.inventory.gateway.balancing != "direct"

    def pools(self, kind: str) -> list[str]:
        """Names of the pools of a kind."""
        models = self.plan.inventory.models
        return [
            name for name, pool in self.plan.inventory.pools.items() if pool.model and models[pool.model].kind == kind
        ]


def plan_farm(model: str) -> Farm:
    """The farm that this machine can run; `model` is the person's own chat model, empty for the tiny one."""
    path = supervisor.search_path()
    if not shutil.which("llama-server", path=path):
        path = supervisor.search_path([str(SHIM)])
    loaded = load_inventory(INVENTORY)
    has_balancer = shutil.which("haproxy", path=path) is not None
    fitted = fit_inventory(loaded.inventory, has_balancer=has_balancer, has_own_model=bool(model))
    plan = build_plan(Loaded(fitted, loaded.source))
    return Farm(plan, fitted.gateway.host, path, model)


def fit_inventory(inventory: Inventory, *, has_balancer: bool, has_own_model: bool) -> Inventory:
    """The demo's inventory for this machine: without HAProxy where there is none, with all cores for a real model."""
    gateway = inventory.gateway if has_balancer else inventory.gateway.model_copy(update={"balancing": "direct"})
    pools = dict(inventory.pools)
    for name, pool in pools.items():
        if has_own_model and pool.model and inventory.models[pool.model].kind == "chat":
            threads = max(1, (psutil.cpu_count(logical=False) or 1))
            pools[name] = pool.model_copy(update={"engine": pool.engine.model_copy(update={"threads": threads})})
    return inventory.model_copy(update={"gateway": gateway, "pools": pools})
