"""An inference server that an installed package adds to corral: it answers every chat with the same words."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.serving import Trouble, keys_for, replicas_of, served, server
from corral.contributions import Contribution, Contributions, File, Service
from corral.plan.site import Replica, Site

STAGE = Stage.BACKENDS
COMPONENT = "toy"
IMAGE = "example.org/toy-server:1.0"
API_KEY = "TOY_API_KEY"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service, its settings and its backend for every replica, and the key that protects them."""
    replicas = replicas_of(site, COMPONENT)
    yield from keys_for(site, replicas, API_KEY, "opens the toy servers for the gateway")
    for replica in replicas:
        values = {"pool": replica.pool, "slots": replica.slots, "folder": replica.weights.source}
        yield File(replica.host, COMPONENT, f"{replica.service}.ini", template="toy/settings.ini.j2", values=values)
        yield File(replica.host, COMPONENT, "server.py", asset="toy/server.py")
        yield _service(site, replica)
        yield from served(replica, "/health", API_KEY, "toy")


def extra_args_troubles(_site: Site, replica: Replica) -> Iterator[Trouble]:
    """What is wrong with a replica's `extra_args`: the toy knows one flag."""
    for number, word in enumerate(replica.engine.extra_args or ()):
        if word != "--wound-up":
            yield Trouble(number, f"the toy has no flag {word}", "use --wound-up")


def _service(site: Site, replica: Replica) -> Service:
    image = replica.engine.image or site.image(COMPONENT, IMAGE)
    return server(site, replica, {"image": image, "args": (str(replica.port), *(replica.engine.extra_args or ()))})
