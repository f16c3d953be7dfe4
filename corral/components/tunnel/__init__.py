"""The tunnel: an sshd at which workers behind NAT dial in, and behind which the balancer finds them as nodes.

A worker has one key. It opens one port, on which sshd passes requests back through the worker's own connection.
"""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import secrets, service
from corral.config.inventory import Inventory, Node
from corral.contributions import Contribution, Contributions, File
from corral.declarations import declaration
from corral.plan.site import TUNNEL, Site

STAGE = Stage.BACKENDS
COMPONENT = TUNNEL
SEED = "TUNNEL_SEED"
# Folder beside its configuration with the workers' public keys.
KEYS = "workers"
END_OTHERS = "end_others.sh"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """The sshd, its host key and its configuration."""
    tunnel, host = site.inventory.gateway.tunnel, site.inventory.gateway.host
    if tunnel is None:
        return
    workers = workers_of(site.inventory)
    ports = sorted({node.dials_in for node in workers.values() if node.dials_in})
    is_local, memory = site.is_local(host), declaration(COMPONENT)["memory"]
    outside = tunnel.address or site.host(host).address
    yield from secrets(COMPONENT, host)
    # On loopback it is asked whether it is well.
    addresses = sorted({outside, "127.0.0.1"}) if is_local else []
    values = {"port": tunnel.port, "ports": ports, "addresses": addresses, "is_local": is_local}
    yield File(host, COMPONENT, "sshd_config", template="tunnel/sshd_config.j2", values=values)
    yield from (
        File(host, COMPONENT, name, asset=f"corral/components/tunnel/{name}") for name in ("start.sh", END_OTHERS)
    )
    yield service(
        site,
        host,
        COMPONENT,
        port=tunnel.port,
        outside=outside,
        inside=tuple((port, site.publish_address(host), "loopback") for port in ports),
        keys=tuple(key_file(name, node) for name, node in workers.items()),
        memory_mib=memory["base_mib"] + memory["worker_mib"] * len(workers),
        pids=256 + memory["processes"] * len(workers),
    )


def workers_of(inventory: Inventory) -> dict[str, Node]:
    """The nodes that dial in, by name."""
    return {name: node for name, node in inventory.nodes.items() if node.dials_in}


def key_file(name: str, node: Node) -> str:
    """Name of the file with a worker's public key: after a change of the port the old key opens nothing."""
    return f"{name}-{node.dials_in}"
