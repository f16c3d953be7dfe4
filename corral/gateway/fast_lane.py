"""The fast lane: which pools HAProxy may answer for without LiteLLM, and why another one may not.

`haproxy/fast_lane.lua` applies it to requests; which keys may use it LiteLLM says at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from corral.config.client_names import added_models
from corral.contributions import Backend, Contributions
from corral.plan.site import Site
from corral.units import grouped

# Kinds whose answers LiteLLM passes on unchanged.
KINDS = ("chat", "embedding")
# Sections of `gateway.extra` that may look at every request.
WATCHING = ("litellm_settings", "router_settings", "guardrails")


def verdicts(site: Site, published: Contributions) -> dict[str, str]:
    """For each pool why its requests need LiteLLM; empty text for those that take the fast lane."""
    unlike = {route.pool for route in published.routes if route.lease_url}
    found = grouped((backend.pool, backend) for backend in published.backends)
    return {
        pool: reason_against(site, pool, backends, is_one_queue=pool not in unlike) for pool, backends in found.items()
    }


def reason_against(site: Site, pool: str, backends: Sequence[Backend], *, is_one_queue: bool) -> str:
    """Why requests to a pool need LiteLLM; empty when they do not.

    Args:
        site: with the inventory.
        pool: its name.
        backends: its replicas.
        is_one_queue: whether all of them are one group of the balancer.
    """
    return next(_reasons(site, pool, backends, is_one_queue=is_one_queue), "")


def _reasons(site: Site, name: str, backends: Sequence[Backend], *, is_one_queue: bool) -> Iterator[str]:
    inventory, pool, first = site.inventory, site.inventory.pools[name], backends[0]
    replicas = [item for backend in backends for item in site.members(backend.endpoint.host, backend.endpoint.service)]
    found = {
        "tracing needs each request": inventory.tracing is not None,
        "gateway.extra may look at requests": any(part in inventory.gateway.extra for part in WATCHING),
        "gateway.extra has a model of this name": name in dict(added_models(inventory)),
        f"answers of kind {first.kind} are changed by LiteLLM": first.kind not in KINDS,
        "its servers are unlike each other": not is_one_queue,
        f"LiteLLM translates the protocol of {first.protocol}": first.protocol != "openai",
        "it has a fallback": bool(pool.fallback or pool.context_fallback),
        "its requests or tokens are limited": bool(pool.limits.rpm or pool.limits.tpm),
        "it has a price": pool.price is not None or first.cost is not None,
        "its servers have several models": any(item.shared for item in replicas),
        "thoughts are taken out of its answers (thinking: shown leaves them in)": first.hides_thoughts,
        "each key has a cache of its own (cache: shared has none)": bool(first.cache_field),
        "its requests get further fields": bool(first.parameters),
        f"its servers call the model {first.upstream_model}": first.upstream_model != name,
    }
    return (reason for reason, is_so in found.items() if is_so)
