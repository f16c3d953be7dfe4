"""`workers`: give a machine that dials in a key, replace or revoke it, and say who is connected.

The farm keeps public keys only, in files that sshd reads at every login. What the worker needs is in one folder, which
is made once and is to be brought there.
"""

from __future__ import annotations

import getpass
import os
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from corral.build import Plan
from corral.components.tunnel import COMPONENT, END_OTHERS, KEYS, SEED, key_file, workers_of
from corral.config.inventory import Node, Tunnel
from corral.contributions import Service
from corral.declarations import declaration
from corral.errors import CorralError, UsageError, did_you_mean
from corral.files import write_atomically
from corral.render.secrets import ENV_FILE, read_env
from corral.render.ssh_keys import fingerprint, private_key, public_key
from corral.render.templates import environment
from corral.runtime.haproxy import Server, balancer_of
from corral.runtime.hosts import ComposeHost
from corral.runtime.lock import alone

LOCK = ".workers.lock"
SSH_PORT = 22
# What stands before a worker's public key: it may open its port, and nothing else.
RIGHTS = 'restrict,port-forwarding,permitlisten="{port}",command="/bin/false"'


@dataclass(frozen=True, slots=True)
class Side:
    """What was made for a worker: the folder that it needs, and the command that connects it from there."""

    folder: Path
    command: str


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of a site: who may dial in, and where that is kept."""

    plan: Plan
    out: Path
    tunnel: Tunnel

    @classmethod
    def of(cls, plan: Plan, out: Path) -> Workers:
        """Those of a plan; raises UsageError where nothing can dial in."""
        tunnel = plan.inventory.gateway.tunnel
        if tunnel is None:
            raise UsageError("the inventory has no gateway.tunnel; add one, and dials_in: PORT to the node")
        return cls(plan, out, tunnel)

    @property
    def host(self) -> ComposeHost:
        """The gateway's host."""
        return ComposeHost(self.plan, self.plan.inventory.gateway.host, self.out)

    @property
    def is_local(self) -> bool:
        """Whether sshd is a process here instead of a container."""
        return self.plan.site.is_local(self.host.name)

    @property
    def known(self) -> dict[str, Node]:
        """The nodes that dial in, by name."""
        return workers_of(self.plan.inventory)

    def node(self, name: str) -> Node:
        """The node of that name; raises UsageError for one that does not dial in."""
        if name not in self.known:
            raise UsageError(f'no node named "{name}" dials in; {did_you_mean(name, self.known)}')
        return self.known[name]

    def path(self, name: str) -> Path:
        """The file with a worker's public key."""
        return self.host.rendered / COMPONENT / KEYS / key_file(name, self.node(name))

    def key(self, name: str) -> str:
        """A worker's public key; empty without one."""
        path = self.path(name)
        return path.read_text(encoding="utf-8").partition('" ')[2].strip() if path.is_file() else ""

    def allow(self, name: str, key: str) -> None:
        """From now on the worker may dial in with this key, and with no other one."""
        path = self.path(name)
        line = f"{RIGHTS.format(port=self.node(name).dials_in)} {key} {name}\n".encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, line, 0o644)
        if not self.is_local and self.host.ssh:
            script = 'mkdir -p "$1" && cat >"$1/.new" && mv "$1/.new" "$1/$2"'
            self.host.run(["sh", "-c", script, "-", f"{self.host.folder}/{COMPONENT}/{KEYS}", path.name], given=line)

    def forbid(self, name: str) -> None:
        """From now on the worker cannot dial in."""
        path = self.path(name)
        if not self.is_local and self.host.ssh:
            self.host.run(["rm", "-f", f"{self.host.folder}/{COMPONENT}/{KEYS}/{path.name}"])
        path.unlink(missing_ok=True)

    def end_others(self, changed: Iterable[str]) -> None:
        """Ends the connections of these workers; those of others that have a key go on."""
        stay = [str(node.dials_in) for name, node in self.known.items() if name not in set(changed) and self.key(name)]
        folder = declaration(COMPONENT)["services"][COMPONENT]["config_folder"]
        if self.is_local:
            script = str(self.host.rendered / COMPONENT / END_OTHERS)
            subprocess.run(["sh", script, str(self.tunnel.port), *stay], check=True, timeout=60)
        elif (container := self.host.container_of(COMPONENT)) and container.is_running:
            words = ["sh", f"{folder}/{END_OTHERS}", str(self.tunnel.port), *stay]
            self.host.run(["docker", "exec", container.id, *words])


# --- verbs -----------------------------------------------------------------------------------------------------------


def issue(plan: Plan, out: Path, name: str, *, to: Path | None = None, port: int | None = None) -> Side:
    """Gives a worker its first key.

    Args:
        plan: what the inventory says.
        out: the folder of renderings.
        name: the node.
        to: the folder to make for the worker, in a folder of that worker's name here when absent.
        port: where the server listens on the worker; known for each engine.

    Raises:
        UsageError: the worker has a key, or the folder is there.
    """
    workers = Workers.of(plan, out)
    with alone(out / LOCK, "corral workers"):
        if workers.key(name):
            raise UsageError(f"{name} has a key; a new one instead of it: ./generate.py workers rotate {name}")
        return _new(workers, name, to, port)


def rotate(plan: Plan, out: Path, name: str, *, to: Path | None = None, port: int | None = None) -> Side:
    """Gives a worker a new key, and ends what runs with the old one; parameters and errors as for `issue`."""
    workers = Workers.of(plan, out)
    with alone(out / LOCK, "corral workers"):
        if not workers.key(name):
            raise UsageError(f"{name} has no key yet: ./generate.py workers issue {name}")
        side = _new(workers, name, to, port)
        workers.end_others([name])
        return side


def revoke(plan: Plan, out: Path, names: Iterable[str], *, is_all: bool = False) -> list[str]:
    """Takes keys away and ends what runs with them; returns whose.

    Raises:
        UsageError: one of them has no key.
    """
    workers = Workers.of(plan, out)
    with alone(out / LOCK, "corral workers"):
        chosen = [name for name in workers.known if workers.key(name)] if is_all else list(dict.fromkeys(names))
        for name in chosen:
            if not workers.key(name):
                raise UsageError(f"{name} has no key, so there is nothing to revoke")
        for name in chosen:
            workers.forbid(name)
        workers.end_others(chosen)
        return chosen


def listed(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Every worker: its key's fingerprint, whether the balancer reaches it, and since when."""
    workers, now = Workers.of(plan, out), datetime.now(UTC).replace(microsecond=0)
    balancer = balancer_of(plan, out)
    servers = balancer.servers() if balancer is not None and balancer.is_running() else {}
    return [_row(workers, name, servers.get(name), now) for name in workers.known]


def _row(workers: Workers, name: str, server: Server | None, now: datetime) -> dict[str, Any]:
    node, key = workers.node(name), workers.key(name)
    changed = (now - timedelta(seconds=server.changed_s)).isoformat() if server else None
    is_up = None if server is None else server.is_usable
    return {
        "name": name, "engine": node.engine, "models": list(node.names), "port": node.dials_in,
        "fingerprint": fingerprint(key) if key else None, "connected": is_up,
        "last_seen": now.isoformat() if is_up else changed, "since": changed,
    }  # fmt: skip


# --- the worker's side -----------------------------------------------------------------------------------------------


def _new(workers: Workers, name: str, to: Path | None, port: int | None) -> Side:
    unit = f"corral-worker-{name}"
    folder = to or Path(unit)
    if folder.exists():
        raise UsageError(f"{folder}: is there already; name another folder with --to")
    seed = secrets.token_hex(32)
    try:
        folder.mkdir(mode=0o700)
        for file, text in _files(workers, name, unit, port):
            write_atomically(folder / file, text.encode(), 0o600)
        write_atomically(folder / "key", private_key(seed).encode(), 0o600)
        workers.allow(name, public_key(seed))
    except OSError as error:
        raise CorralError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return Side(folder, f"ssh -N -F ~/{unit}/config farm")


def _files(workers: Workers, name: str, unit: str, port: int | None) -> Iterator[tuple[str, str]]:
    """What the worker needs besides its key."""
    plan, tunnel, node, data = workers.plan, workers.tunnel, workers.node(name), declaration(COMPONENT)
    facts = plan.site.host(workers.host.name)
    reached = tunnel.name or tunnel.address or facts.hostname or facts.address
    values = {
        "worker": name, "site": plan.inventory.name, "unit": unit, "folder": f"~/{unit}", "name": reached,
        "port": tunnel.port, "user": _user(workers), "farm_port": node.dials_in, "image": _service(plan).image,
        "local_port": port or data["local_ports"][node.engine], "host_key": _host_key(workers),
        "known_name": reached if tunnel.port == SSH_PORT else f"[{reached}]:{tunnel.port}",
    }  # fmt: skip
    names = {"systemd.service": f"{unit}.service", "launchd.plist": f"{unit}.plist"}
    for file in ("config", "known_hosts", "compose.yaml", *names):
        yield names.get(file, file), environment().get_template(f"{COMPONENT}/worker/{file}.j2").render(values)


def _service(plan: Plan) -> Service:
    return next(item for item in plan.contributions.services if item.component == COMPONENT)


def _user(workers: Workers) -> str:
    """Whose sshd it is: no other user can log in there."""
    if not workers.is_local:
        return str(declaration(COMPONENT)["user"])
    return "sshd" if os.geteuid() == 0 else getpass.getuser()


def _host_key(workers: Workers) -> str:
    """The key by which a worker knows the farm."""
    path = workers.host.rendered / ENV_FILE
    seed = read_env(path).get(SEED, "")
    if not seed:
        raise CorralError(f"{path} has no {SEED}; run: ./generate.py secrets init")
    return public_key(seed)
