"""LiteLLM callback: chooses among different servers of one pool by the balancer's state.

HAProxy cannot balance servers that need different requests (another protocol, model name or key), so LiteLLM chooses
among them. For each request it gets their state from HAProxy and takes the healthy ones with a free slot in turn; if
all are busy, the one with the shortest queue.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with such a pool.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from litellm.integrations.custom_logger import CustomLogger

STATE_PATH = "/-/groups"
ANSWER_WITHIN_S = 2.0
# Longest time of a request from here to HAProxy; until then HAProxy does not count it.
UNDER_WAY_S = 0.1


class Group(NamedTuple):
    """HAProxy's state of one group of servers."""

    # Servers that are up.
    servers: int
    # Slots without a request.
    free: int
    # Requests in the queue.
    waiting: int


class CorralGroups(CustomLogger):
    """LiteLLM hooks that choose a group; one instance serves every request of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._turns: Counter[str] = Counter()
        self._under_way: deque[tuple[float, str]] = deque()
        self._client = httpx.AsyncClient(timeout=ANSWER_WITHIN_S, trust_env=False)

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: object = None,
    ) -> list[Any]:
        """Returns the deployments of the chosen group; all of them if there is no choice.

        A cloud model beside servers of the site's own is used when none of these is up.
        """
        names = [group_of(deployment) for deployment in healthy_deployments]
        known = sorted({name for name in names if name})
        if len(known) <= 1:
            return healthy_deployments
        try:
            groups = await self._ask(next(filter(None, map(_base, healthy_deployments))))
        except (httpx.HTTPError, ValueError):
            return healthy_deployments
        self._turns[model] += 1
        chosen = choose(
            {name: groups[name] for name in known if name in groups}, self._recent(), turn=self._turns[model]
        )
        if chosen is None:
            outside = [item for item, name in zip(healthy_deployments, names, strict=True) if not name]
            return outside or healthy_deployments
        self._under_way.append((time.monotonic(), chosen))
        return [item for item, name in zip(healthy_deployments, names, strict=True) if name == chosen]

    async def _ask(self, base: str) -> dict[str, Group]:
        response = await self._client.get(base + STATE_PATH)
        return {name: Group(*figures) for name, figures in response.raise_for_status().json().items()}

    def _recent(self) -> Counter[str]:
        """Requests that were sent just now, by group."""
        now = time.monotonic()
        while self._under_way and now - self._under_way[0][0] > UNDER_WAY_S:
            self._under_way.popleft()
        return Counter(name for _, name in self._under_way)


def choose(groups: Mapping[str, Group], under_way: Mapping[str, int], *, turn: int) -> str | None:
    """The group for the next request, None when no server is up: free ones in turn, else the shortest queue."""
    up = {name: group for name, group in groups.items() if group.servers > 0}
    free = [name for name, group in up.items() if group.free > under_way.get(name, 0)]
    if free:
        return free[turn % len(free)]
    return min(up, key=lambda name: (up[name].waiting + under_way.get(name, 0), name), default=None)


def group_of(deployment: Mapping[str, Any]) -> str:
    """The group in a deployment's address; empty for one that is not behind the balancer."""
    address = urlsplit(str(_parameters(deployment).get("api_base") or ""))
    parts = address.path.split("/")
    return parts[1] if len(parts) > 2 else ""  # noqa: PLR2004 - /<group>/<replica>/…


def _base(deployment: Mapping[str, Any]) -> str:
    address = urlsplit(str(_parameters(deployment).get("api_base") or ""))
    return f"{address.scheme}://{address.netloc}" if group_of(deployment) else ""


def _parameters(deployment: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = deployment.get("litellm_params")
    return parameters if isinstance(parameters, Mapping) else {}


corral_groups = CorralGroups()
