"""The whole site as one Docker Swarm stack: the same services as with Compose, placed by the engine. Pure.

Swarm cannot change a config or a secret, so each is named after its content, and a service with another content is
made anew. What Swarm cannot hold is refused before (`swarm-holds` in corral/checks/rules.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from corral.build import Plan
from corral.contributions import Service
from corral.plan.networks import networks, outer_network
from corral.plan.site import swarm_name
from corral.render.templates import RenderedHost, Tree, dump_yaml, short_digest

STACK = "stack.yml"
VERSION = "3.13"
# Label of a node that says which host of the site it is.
HOST_LABEL = "corral.host"
# Longest name of a config or secret, with the digest of its content.
NAME_LENGTH, DIGEST_LENGTH = 64, 16
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")
_SIZE = re.compile(r"size=(\d+)m")
NOTE = """
# One stack for all hosts; ./generate.py up deploys it. Swarm publishes ports at every address of a host, so that those
# for its loopback address are not published at all."""


def stack_name(plan: Plan) -> str:
    """Name of the site's stack."""
    return plan.inventory.name.replace(".", "-")


def stack(host: RenderedHost, tree: Mapping[str, bytes]) -> Tree:
    """The stack, in the folder of the gateway's host; `tree` has the files of all hosts."""
    plan = host.plan
    services = plan.contributions.services
    configs: dict[str, Any] = {}
    told = {swarm_name(item.host, item.name): _service(plan, item, tree, configs) for item in services}
    data = {
        "version": VERSION,
        "services": told,
        "networks": _networks(plan),
        "volumes": {name: {} for item in services for name, _ in item.volumes},
        "configs": configs,
        "secrets": dict(_secrets(plan)),
    }
    filled = {key: value for key, value in data.items() if value}
    text = host.header("corral/render/swarm.py") + NOTE + "\n\n" + dump_yaml(_literal(filled))
    return {f"{host.name}/{STACK}": text.encode()}


def named_after(plan: Plan, name: str, content: bytes) -> str:
    """Name of a config or secret with that content, which no other content has."""
    start = _NOT_IN_NAMES.sub("-", f"{plan.inventory.name}-{name}")[: NAME_LENGTH - DIGEST_LENGTH - 1]
    return f"{start}-{short_digest(content.hex())}"


def _literal(value: Any) -> Any:
    """The same with every `$` doubled: the engine's command replaces variables."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list | tuple) else value


def _networks(plan: Plan) -> dict[str, Any]:
    services = plan.contributions.services
    outer = {outer_network(service) for service in services}
    is_encrypted = plan.inventory.encrypted_networks is not False
    options = {"driver_opts": {"encrypted": "true"}} if is_encrypted else {}
    names = sorted({name for service in services for name in networks(service, services)})
    return {name: {"driver": "overlay", **options, **({} if name in outer else {"internal": True})} for name in names}


def _secrets(plan: Plan) -> Iterator[tuple[str, dict[str, str]]]:
    """Every secret once: its value is the same on all hosts. `up` names it after its value, too."""
    first = {secret.name: host for host, found in reversed(plan.secrets.items()) for secret in found}
    for name in sorted({name for service in plan.contributions.services for name in service.secrets}):
        yield name, {"file": f"../{first[name]}/secrets/{name}", "name": f"{stack_name(plan)}-{name}"}


def _service(plan: Plan, service: Service, tree: Mapping[str, bytes], configs: dict[str, Any]) -> dict[str, Any]:
    mlock = {"memlock": {"soft": -1, "hard": -1}} if service.mlock else {}
    told: dict[str, Any] = {
        "image": service.image,
        "init": True,
        "user": service.user,
        "entrypoint": list(service.entrypoint),
        "command": list(service.args),
        "environment": dict(sorted(_environment(plan, service).items())),
        "secrets": list(service.secrets),
        "configs": list(_configs(plan, service, tree, configs)),
        "ports": list(_ports(service)),
        "volumes": list(_volumes(service)),
        "healthcheck": _health(service),
        "networks": list(networks(service, plan.contributions.services)),
        "extra_hosts": [f"{name}:{address}" for name, address in service.extra_hosts.items()],
        "ulimits": mlock,
        "read_only": service.read_only,
        "cap_drop": ["ALL"],
        "stop_signal": service.stop_signal,
        "stop_grace_period": f"{service.stop_grace_s}s",
        "logging": {"driver": "json-file", "options": {"max-size": "100m", "max-file": "3"}},
        "labels": {"corral.site": plan.inventory.name, "corral.role": service.role or service.component}
        | dict(service.labels),
        "deploy": _deploy(service),
    }
    return {key: value for key, value in told.items() if value or value is False}


def _deploy(service: Service) -> dict[str, Any]:
    """How Swarm places, changes and restarts it: the old one ends before the new one starts, as both want one card."""
    return {
        "endpoint_mode": "dnsrr",
        "placement": {"constraints": [f"node.labels.{HOST_LABEL} == {service.host}"]},
        "update_config": {"order": "stop-first", "failure_action": "rollback", "monitor": "5s"},
        "rollback_config": {"order": "stop-first"},
        "restart_policy": {"condition": "any", "delay": "2s"},
        "resources": {"limits": {"memory": f"{service.memory_mib}M", "pids": service.pids}},
    }


def _environment(plan: Plan, service: Service) -> dict[str, str]:
    """Its variables and its cards: NVIDIA's runtime, the hosts' default there, hands in what the variable names."""
    cards = plan.site.cards[service.host]
    named = ",".join(claim.device for claim in service.gpus)
    if any(card.is_jetson for card in cards) and named:
        named = "all"
    return {**service.environment, **({"NVIDIA_VISIBLE_DEVICES": named or "void"} if cards else {})}


def _configs(
    plan: Plan, service: Service, tree: Mapping[str, bytes], configs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Its files, each noted in `configs`; those that Compose mounts as a folder one by one."""
    folders = {folder: path for folder, path in service.mounts if folder.startswith("./")}
    for mount in service.configs:
        path = f"{service.component}/{mount.file}"
        target = mount.target or next(
            f"{there}/{PurePosixPath(path).relative_to(folder)}"
            for folder, there in ((folder.removeprefix("./"), there) for folder, there in folders.items())
            if f"{path}/".startswith(f"{folder}/")
        )
        content = tree[f"{service.host}/{path}"]
        key = _NOT_IN_NAMES.sub("-", f"{service.host}-{path}")
        configs[key] = {"file": f"../{service.host}/{path}", "name": named_after(plan, key, content)}
        yield {"source": key, "target": target, "mode": 0o555 if content.startswith(b"#!") else 0o444}


def _ports(service: Service) -> Iterator[dict[str, Any]]:
    for port in service.ports:
        if port.publish:
            yield {"target": port.number, "published": port.number, "mode": "host"}


def _volumes(service: Service) -> Iterator[Any]:
    for folder, path in service.mounts:
        if folder.startswith("/"):
            yield {"type": "bind", "source": folder, "target": path, "read_only": True}
    yield from ({"type": "volume", "source": name, "target": path} for name, path in service.volumes)
    shared = [f"/dev/shm:size={service.shm_mib}m"] if service.shm_mib else []  # noqa: S108 - in the container
    for entry in (*service.tmpfs, *shared):
        path, _, options = entry.partition(":")
        size = _SIZE.search(options)
        yield {"type": "tmpfs", "target": path, **({"tmpfs": {"size": int(size[1]) << 20}} if size else {})}


def _health(service: Service) -> dict[str, Any]:
    return {
        "test": ["CMD", *service.health.command],
        "interval": "10s",
        "timeout": "5s",
        "retries": 3,
        "start_period": f"{service.health.start_timeout_s}s",
        "start_interval": "3s",
    }
