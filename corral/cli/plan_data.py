"""The plan as plain data for programs: `plan --json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from corral.build import Plan
from corral.config.client_names import aliases_of
from corral.contributions import Service
from corral.plan.site import Replica, claimed_mib
from corral.whatif import measured

CARD_FIELDS = ("number", "card", "device", "pinned_by", "vram_mib")


def plan_as_data(plan: Plan, hosts: set[str] | None = None) -> dict[str, Any]:
    """The plan as plain data: hosts with cards and services, pools with their backends."""
    return {
        "name": plan.inventory.name,
        "balancing": plan.inventory.gateway.balancing,
        "hosts": {name: _host_data(plan, name) for name in plan.inventory.hosts if hosts is None or name in hosts},
        "pools": {name: _pool_data(plan, name) for name in plan.inventory.pools},
        "auto": _auto_data(plan),
        "warnings": [str(warning) for warning in plan.warnings],
    }


def _auto_data(plan: Plan) -> dict[str, Any] | None:
    auto = plan.inventory.gateway.auto
    if auto is None:
        return None
    tiers = [{"name": tier.name, "pool": tier.pool, "spill": list(tier.spill)} for tier in auto.tiers]
    return {"names": [auto.name, *auto.aliases], "tiers": tiers}


def _host_data(plan: Plan, name: str) -> dict[str, Any]:
    host = plan.site.host(name)
    services = plan.services_of(name)
    return {
        "address": host.address,
        "runtime": host.runtime,
        "gpus": [{field: getattr(card, field) for field in CARD_FIELDS} for card in plan.site.cards[name]],
        "services": [_service_data(service, plan.site.members(name, service.name)) for service in services],
    }


def _service_data(service: Service, members: tuple[Replica, ...]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": service.name,
        "container": service.container_name,
        "component": service.component,
        "role": service.role,
        "image": service.image,
        "ports": [{"number": port.number, "published_on": port.publish or None} for port in service.ports],
        "memory_mib": service.memory_mib,
        "exceptions": dict(service.exceptions),
    }
    if not members:
        return data
    if members[0].shared is None:
        return data | _replica_data(members[0])
    return data | {
        "loaded": members[0].shared.loaded,
        "vram_mib": sum(claimed_mib(members)),
        "shared_by": list(map(_replica_data, members)),
    }


def _replica_data(replica: Replica) -> dict[str, Any]:
    return {
        "pool": replica.pool, "model": replica.model, "slots": replica.slots, "context": replica.weights.context,
        "gpus": [card.number for card in replica.cards], "vram_mib": replica.vram_mib,
        "card_mib": list(replica.card_mib), "tensor_split": list(replica.split) if len(replica.split) > 1 else None,
        "cache_ram_mib": replica.cache_ram_mib,
        "memory_bytes": None if replica.memory is None else asdict(replica.memory),
    }  # fmt: skip


def _pool_data(plan: Plan, name: str) -> dict[str, Any]:
    pool = plan.inventory.pools[name]
    queue = pool.queue or plan.inventory.gateway.queue
    backends = [backend for backend in plan.contributions.backends if backend.pool == name]
    return {
        "aliases": [alias for alias in aliases_of(plan.inventory, name) if alias not in pool.background],
        "background": list(pool.background),
        "fallback": list(pool.fallback),
        "context_fallback": list(pool.context_fallback),
        "backends": [{"name": backend.name, "slots": backend.slots} for backend in backends],
        "queue": {"depth": queue.depth, "timeout_s": queue.timeout_s},
        "limits": {"rpm": pool.limits.rpm, "tpm": pool.limits.tpm, "origin": measured.state(plan, name)},
    }
