"""Settings of a load process: tasks, targets and names of keys, from the plan; keys are in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.build import Plan
from corral.components.litellm import MASTER_KEY
from corral.config.inventory import Objective
from corral.contributions import Backend, Endpoint
from corral.errors import CorralError, UsageError, did_you_mean
from corral.plan.site import bracketed
from corral.render.secrets import ENV_FILE, read_env
from corral.verbs.keys.gateway import client_address, is_out_of_reach

# Environment variable with the key for the gateway; the master key when absent.
KEY = "CORRAL_KEY"
KEY_OF = "CORRAL_REPLICA_KEY_"
# Tokens of context from which long prompts are sent unless the user says otherwise.
LONG_CONTEXT = 8192
LONG_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Target:
    """The targets: the gateway, or the replicas themselves."""

    plan: Plan
    out: Path
    is_direct: bool = False
    # Only this replica, by the name of its container or node.
    replica: str = ""
    max_tokens: int | None = None
    long_share: float | None = None


@dataclass(slots=True)
class Tasks:
    """Tasks for Locust, and the keys that its environment needs."""

    tasks: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def backends_of(plan: Plan, pool: str) -> list[Backend]:
    """The replicas of a pool."""
    return [backend for backend in plan.contributions.backends if backend.pool == pool]


def slots_of(plan: Plan, pool: str) -> int:
    """Concurrent requests of the pool."""
    return sum(backend.slots for backend in backends_of(plan, pool))


def kind_of(plan: Plan, pool: str) -> str:
    """The kind of the pool."""
    found = backends_of(plan, pool)
    return found[0].kind if found else ""


def objective_of(plan: Plan, pool: str) -> Objective:
    """The pool's objective, else the monitoring's, else the kit's."""
    monitoring = plan.inventory.monitoring
    return plan.inventory.pools[pool].objective or (monitoring.objective if monitoring else Objective())


def chosen_pools(plan: Plan, names: Iterable[str] | None, kinds: Iterable[str]) -> list[str]:
    """The pools of that name, or all of these kinds; raises UsageError when there is none."""
    for name in names or ():
        if name not in plan.inventory.pools:
            raise UsageError(f'no pool named "{name}"; {did_you_mean(name, plan.inventory.pools)}')
    chosen = list(names) if names else [name for name in plan.inventory.pools if kind_of(plan, name) in kinds]
    if not chosen:
        raise UsageError(f"no pool of kind {' or '.join(kinds)} here; name one with --pool")
    return chosen


def tasks_for(target: Target, pools: Iterable[str], long_share: float, max_tokens: int) -> Tasks:
    """The tasks that load these pools; raises CorralError when this machine cannot reach them or has no key."""
    found = Tasks()
    share = target.long_share if target.long_share is not None else long_share
    tokens = target.max_tokens or max_tokens
    for pool in pools:
        kind = kind_of(target.plan, pool)
        places = _places(target, pool, found.environment)
        lengths = {"short": 1 - share, "long": share} if kind == "chat" else {"short": 1.0}
        for length, weight in lengths.items():
            if weight > 0:
                name = f"{pool} {length}" if share and kind == "chat" else pool
                found.tasks.append(
                    {
                        "name": name, "pool": pool, "kind": kind, "weight": weight, "prompt": length,
                        "max_tokens": tokens, "places": places,
                    }
                )  # fmt: skip
    return found


def usual_long_share(plan: Plan, pool: str) -> float:
    """Share of long prompts that suits a pool's context."""
    model = plan.inventory.pools[pool].model
    contexts = [plan.inventory.models[model].context] if model else []
    contexts += [plan.inventory.nodes[item.node].context or 0 for item in plan.inventory.pools[pool].on if item.node]
    return LONG_SHARE if contexts and min(contexts) >= LONG_CONTEXT else 0.0


def _places(target: Target, pool: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    if not target.is_direct and not target.replica:
        environment[KEY] = _gateway_key(target)
        return [_place("gateway", f"{client_address(target.plan)}/v1", pool, slots_of(target.plan, pool), KEY)]
    backends = backends_of(target.plan, pool)
    if target.replica:
        backends = [backend for backend in backends if backend.name == target.replica]
        if not backends:
            names = [backend.name for backend in backends_of(target.plan, pool)]
            raise UsageError(f'pool {pool} has no replica "{target.replica}"; {did_you_mean(target.replica, names)}')
    return [_replica_place(target, backend, environment) for backend in backends]


def _replica_place(target: Target, backend: Backend, environment: dict[str, str]) -> dict[str, Any]:
    if backend.protocol != "openai":
        raise CorralError(f"{backend.name} speaks {backend.protocol}; only the gateway translates that, so ask it")
    variable = ""
    if backend.secret:
        variable = KEY_OF + backend.secret
        host = backend.endpoint.host or target.plan.inventory.gateway.host
        environment[variable] = read_env(target.out / host / ENV_FILE).get(backend.secret, "")
    url = f"{backend.scheme}://{_address(target.plan, backend)}{backend.api_path}"
    return _place(backend.name, url, backend.upstream_model, backend.slots, variable, backend.key_header)


def _place(name: str, url: str, model: str, slots: int, key: str, key_header: str = "") -> dict[str, Any]:
    return {"name": name, "url": url, "model": model, "slots": max(1, slots), "key": key, "key_header": key_header}


def _address(plan: Plan, backend: Backend) -> str:
    """Where this machine finds a replica."""
    endpoint: Endpoint = backend.endpoint
    if endpoint.address:
        return f"{bracketed(endpoint.address)}:{endpoint.port}"
    if plan.site.is_local(endpoint.host):
        return f"127.0.0.1:{endpoint.port}"
    is_here = plan.site.host(endpoint.host).ssh is None
    for service in plan.contributions.services if is_here else ():
        if (service.host, service.name) == (endpoint.host, endpoint.service):
            for port in service.ports:
                if port.number == endpoint.port and port.publish:
                    return f"{bracketed(port.publish)}:{port.number}"
    raise CorralError(
        f"{backend.name} is open inside its own host only, so it cannot be asked from here; "
        "measure through the gateway (without --direct and --replica)"
    )


def _secrets(target: Target) -> Mapping[str, str]:
    return read_env(target.out / target.plan.inventory.gateway.host / ENV_FILE)


def _gateway_key(target: Target) -> str:
    """The key for the gateway: the user's own, else the master key, which no network is to see."""
    plan = target.plan
    if os.environ.get(KEY) is None and plan.site.host(plan.inventory.gateway.host).ssh is not None:
        raise CorralError(
            f"the master key does not go over the network; put a consumer's key into {KEY} (docs/keys.md), "
            f"or run this on {plan.inventory.gateway.host}"
        )
    if is_out_of_reach(plan):
        host = plan.inventory.gateway.host
        raise CorralError(
            f"the gateway listens on {host}'s loopback address, which this machine does not reach; run this on {host}"
        )
    key = os.environ.get(KEY) or _secrets(target).get(MASTER_KEY, "")
    if not key:
        place = target.out / plan.inventory.gateway.host / ENV_FILE
        raise CorralError(f"no key: {place} has no {MASTER_KEY}; run ./generate.py secrets init, or set {KEY}")
    return key
