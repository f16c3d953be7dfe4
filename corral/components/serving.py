"""What components of inference servers have in common: the service of a replica, its key, and its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from corral.components.declared import described
from corral.contributions import (
    Backend,
    Contribution,
    Endpoint,
    Fact,
    Health,
    Port,
    ScrapeTarget,
    Secret,
    Service,
)
from corral.declarations import declaration
from corral.errors import KeyPath
from corral.plan import routing
from corral.plan.devices import access, claims
from corral.plan.settings import engine_place
from corral.plan.site import Replica, Site

LEAVE = "leave it out"


class Trouble(NamedTuple):
    """What is wrong with one word of `extra_args`, and what to do."""

    number: int
    message: str
    hint: str


def own_words(component: str) -> dict[str, Any]:
    """What the kit says to a component's server itself, and what became of flags: `flags` in its component.yaml."""
    return dict(declaration(component)["flags"])


def replicas_of(site: Site, component: str) -> list[Replica]:
    """The replicas that a component's servers run."""
    return [replica for replica in site.replicas if replica.weights.served_by.component == component]


def one_of_each_sort(site: Site, component: str = "") -> Iterator[Replica]:
    """One replica of every pool on every kind of card, of one component or of all: the others are set alike."""
    found = replicas_of(site, component) if component else site.replicas
    yield from {(replica.pool, _card(replica)): replica for replica in reversed(found)}.values()


def engine_key(site: Site, replica: Replica, key: str) -> KeyPath:
    """Where the inventory says a setting of a replica's server, or would say it for its pool."""
    return engine_place(site.inventory, replica.pool, _card(replica), key)


def _card(replica: Replica) -> str:
    return replica.cards[0].card if replica.cards else ""


def server(site: Site, replica: Replica, fields: Mapping[str, Any], **values: Any) -> Service:
    """The service of a replica, as its component.yaml describes it, with what is the same for all servers.

    Beside the fields of a service, the description has `health_path`, which answers with 200 once the model is loaded,
    and `protection`: what guards its port.

    Args:
        site: the site.
        replica: what it serves.
        fields: fields of the service that the component decides.
        values: what `$name` stands for, beside the host's, `$port`, `$pool`, `$service` and `$models`.
    """
    engine, cards, component = replica.engine, access(site, replica), replica.weights.served_by.component
    known = {"port": replica.port, "pool": replica.pool, "service": replica.service}
    known["models"] = site.host(replica.host).models_dir
    own = described(site, replica.host, component, component, {**known, **values}) | {**fields}
    path, protection = own.pop("health_path"), own.pop("protection")
    command = ("curl", "-fsS", f"http://localhost:{replica.port}{path}")
    if not site.is_local(replica.host):
        own["mounts"] = (*own.get("mounts", ()), *site.store_mounts(replica.host, replica.files))
    own["environment"] = {**own.get("environment", {}), **cards.environment, **(engine.environment or {})}
    own["exceptions"] = {**own.get("exceptions", {}), **cards.exceptions}
    own |= {"name": replica.service, "container": replica.container, "role": replica.kind}
    return Service(
        health=Health(replica.port, path, command, replica.start_timeout_s),
        memory_mib=replica.memory_mib,
        memory_swap_mib=engine.memory_swap_mib or 0,
        ports=(Port(replica.port, _published_at(site, replica), protection),),
        gpus=claims(replica),
        devices=cards.devices,
        groups=cards.groups,
        **own,
    )


def _published_at(site: Site, replica: Replica) -> str:
    """Address that a replica's port is bound to: loopback if the port is named; empty: inside the farm only."""
    return "127.0.0.1" if replica.is_port_explicit else site.publish_address(replica.host)


def served(replica: Replica, health_path: str, secret: str, job: str, **more: Any) -> Iterator[Contribution]:
    """A replica's backend, where its metrics are, and what the inventory says of it.

    Args:
        replica: the replica.
        health_path: path by which the balancer asks whether it is well.
        secret: name of the key to its API.
        job: the scrape job, empty without metrics; a key is sent along unless `scrape_secret=""` says that none is
            needed.
        more: further fields of the backend (`upstream_model`: its name there, when that is not the pool's),
            `scrape_secret`, and `scrape_labels` for the target alone.
    """
    endpoint, labels = Endpoint(replica.port, replica.host, replica.service), labels_of(replica)
    scrape_secret, asked = more.pop("scrape_secret", secret), more.pop("scrape_labels", {})
    model = more.pop("upstream_model", replica.pool)
    yield Backend(
        replica.pool, replica.container, replica.kind, endpoint, replica.slots, model, health_path,
        secret=secret, **more,
    )  # fmt: skip
    if job:
        yield ScrapeTarget(job, endpoint, labels | asked, secret=scrape_secret)
    yield Fact("inventory:replica_slots", replica.slots, labels)
    yield Fact("inventory:replica_start_seconds", replica.start_timeout_s, labels)


def labels_of(replica: Replica) -> dict[str, str]:
    """Labels by which metrics of a replica are found."""
    labels = {
        "host": replica.host,
        "pool": replica.pool,
        "model": replica.model,
        "replica": replica.container,
        "role": replica.kind,
    }
    if replica.cards:
        labels |= {"gpu": ",".join(str(card.number) for card in replica.cards), "card": replica.cards[0].card}
    return labels


def keys_for(site: Site, replicas: Sequence[Replica], name: str, purpose: str) -> Iterator[Secret]:
    """The key of these servers, another one on every host whose edge puts it in, and one on the gateway's host."""
    for host in sorted({replica.host for replica in replicas} | ({site.inventory.gateway.host} if replicas else set())):
        yield Secret(name, host, purpose, "hex", is_per_host=not site.is_swarm)


def has_private_cache(site: Site, replica: Replica) -> bool:
    """Whether a chat server must not use for one key what it computed for another."""
    return replica.kind == "chat" and routing.has_private_cache(site.inventory, replica.pool)
