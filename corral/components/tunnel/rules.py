"""What must hold for workers that dial in."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.tunnel import workers_of
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.site import Site


@check("plan", "dials-in")
def _dials_in(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A node that dials in has no url and a port of the gateway's tunnel for itself."""
    gateway = site.inventory.gateway
    first: dict[int | None, str] = {gateway.tunnel.port if gateway.tunnel else None: "the tunnel itself"}
    for name, node in workers_of(site.inventory).items():
        path = ("nodes", name, "dials_in")
        other = first.setdefault(node.dials_in, name)
        if gateway.tunnel is None:
            yield Finding("there is no tunnel at which it could dial in", path, "add to gateway: tunnel: {name: HOST}")
        if node.url or node.engine == "cloud":
            words = "what dials in has no url" if node.url else "a cloud account does not dial in"
            yield Finding(words, path, "remove one of the two: dials_in, or url" if node.url else "remove dials_in")
        if other != name:
            remedy = "give it another port, and its worker the new command: ./generate.py workers rotate"
            yield Finding(f"port {node.dials_in} is that of {other}", path, remedy)


@check("plan", "tunnel-used", level="warning")
def _tunnel_used(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A tunnel is there for nodes that dial in."""
    if site.inventory.gateway.tunnel and not workers_of(site.inventory):
        hint = "remove it, or write dials_in: PORT instead of url: in a node"
        yield Finding("no node dials in, and the tunnel's port is open", ("gateway", "tunnel"), hint)
