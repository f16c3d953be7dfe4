"""LiteLLM callback: leases a slot before a request to a pool whose servers take different requests.

LiteLLM must know the server before it builds the request (protocol, model name, key), but HAProxy has the queue. So
each request first waits in the pool's backend of HAProxy, like a request to a pool of equal servers. HAProxy answers
with the server whose slot is free, and keeps that slot until the answer is closed: when the client has everything, has
left, or when the server did not begin the request and it leases another slot.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with such a pool.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name
# No postponed annotations: LiteLLM loads this file without registering its module, which dataclasses would need.

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import litellm
from litellm.exceptions import APIError, RateLimitError
from litellm.integrations.custom_logger import CustomLogger

GROUP_HEADER = "x-corral-group"
OWN_HEADERS = "x-corral-"
# A pool to which a request spills is asked this much later.
HEAD_START_S = 0.05
SERVICE_UNAVAILABLE = 503
# The server did not begin the request. On a reused connection HAProxy signals that by closing it.
NOT_BEGUN = re.compile(r"Connection error\.|Server disconnected|Cannot connect to host")


@dataclass(eq=False)
class Lease:
    """A slot of a pool for one attempt of a request."""

    pool: str
    answer: aiohttp.ClientResponse | None = None
    # Why the attempt failed, unless no server began it.
    failure: Exception | None = None

    def end(self) -> None:
        """Frees the slot; more than once does no harm."""
        if self.answer is not None:
            self.answer.close()


# The leases of a request, and the one of this attempt. Neither refers to the request's task: that would be a cycle,
# which keeps the whole request in memory until Python collects its garbage.
_leases: ContextVar[list[Lease] | None] = ContextVar("corral_leases", default=None)
_lease: ContextVar[Lease | None] = ContextVar("corral_lease", default=None)


class CorralLeases(CustomLogger):
    """LiteLLM hooks that lease slots; one instance serves every request of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._client: aiohttp.ClientSession | None = None

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request unchanged; its leases end with its task, after the last byte of the answer."""
        _leases.set(_until_the_end())
        return data

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: object = None,
    ) -> list[Any]:
        """Returns the deployments of the server whose slot this request has from now on.

        A cloud model beside servers of the site's own is used when none of these is up.

        Raises:
            Exception: HAProxy's refusal, or the last attempt's failure if a server had begun the request.
        """
        if not request_kwargs:  # no request follows: LiteLLM counts tokens
            return healthy_deployments
        last = _lease.get()
        if last is not None:
            last.end()
            if last.pool == model and last.failure is not None:
                raise last.failure
        _lease.set(None)
        places = dict(places_of(model, healthy_deployments))
        if not places:
            return healthy_deployments
        lease = Lease(model)
        _lease.set(lease)
        try:
            lease.answer = await self._first_slot(list(places), own_headers(request_kwargs))
        except RefusedError as refusal:
            outside = [item for item in healthy_deployments if not lease_url(item)]
            if outside and refusal.status == SERVICE_UNAVAILABLE:
                return outside
            lease.failure = refusal.as_error(model)
            raise lease.failure from None
        leases = _leases.get()
        (_until_the_end() if leases is None else leases).append(lease)
        group = lease.answer.headers[GROUP_HEADER]
        return [item for item in places[_url_of(lease.answer)] if group_of(item) == group]

    async def async_post_call_failure_deployment_hook(
        self,
        request_data: Mapping[str, object],
        exception: Exception,
        call_type: object,
        fallback_depth: int | None = None,
    ) -> None:
        """Remembers a failure of a request that a server may have begun: it is not sent to another one."""
        lease, status = _lease.get(), str(getattr(exception, "status_code", ""))
        if lease and status != str(SERVICE_UNAVAILABLE) and not NOT_BEGUN.search(str(exception)):
            lease.failure = exception

    async def _first_slot(self, urls: Sequence[str], headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The first slot that is granted; the first refusal if every pool refuses."""
        asked: list[asyncio.Task[aiohttp.ClientResponse]] = []
        granted = None
        try:
            for url in urls:
                asked.append(asyncio.create_task(self._slot(url, headers)))
                granted = await _granted(asked, HEAD_START_S if url != urls[-1] else None)
                if granted is not None:
                    return granted.result()
            return asked[0].result()
        finally:
            for task in asked:
                if task is not granted:
                    task.add_done_callback(_give_back)
                    task.cancel()

    async def close(self) -> None:
        """Closes the connections to HAProxy."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _slot(self, url: str, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        if self._client is None:
            endless = aiohttp.ClientTimeout(total=None)  # HAProxy ends the wait
            self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=endless)
        try:
            answer = await self._client.get(url, headers=headers)
            if answer.ok:
                return answer
            raise RefusedError(answer.status, await answer.text(), dict(answer.headers))
        except aiohttp.ClientError as error:
            raise RefusedError(SERVICE_UNAVAILABLE, str(error), {}) from error


class RefusedError(Exception):
    """HAProxy's refusal of a lease."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str]) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers

    def as_error(self, model: str) -> Exception:
        """The error that LiteLLM raises when a server refuses like this."""
        if self.status >= SERVICE_UNAVAILABLE:  # of a kind for which LiteLLM leases no other slot
            return APIError(self.status, self._message(), llm_provider="", model=model)
        request = httpx.Request("POST", "http://haproxy")
        response = httpx.Response(self.status, headers=dict(self.headers), text=str(self), request=request)
        return RateLimitError(self._message(), llm_provider="", model=model, response=response)

    def _message(self) -> str:
        try:
            return str(json.loads(str(self))["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return str(self)


def _until_the_end() -> list[Lease]:
    """A list whose leases end with the current task."""
    leases: list[Lease] = []

    def end(_task: object) -> None:
        for lease in leases:
            lease.end()

    task = asyncio.current_task()
    if task is not None:
        task.add_done_callback(end)
    return leases


async def _granted(
    asked: Sequence[asyncio.Task[aiohttp.ClientResponse]], within_s: float | None
) -> asyncio.Task[aiohttp.ClientResponse] | None:
    """The first of these that has a slot; None when all are refused, or the time is over."""
    waiting = set(asked)
    while waiting:
        done, waiting = await asyncio.wait(waiting, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if granted := next((task for task in done if not task.exception()), None):
            return granted
        if not done:
            return None
    return None


def _give_back(task: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """Frees a slot that was granted after another one."""
    if not task.cancelled() and not task.exception():
        task.result().close()


def places_of(model: str, deployments: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Where this request may lease a slot, and the deployments behind it: its pool, then those to which it spills."""
    from litellm.proxy import proxy_server

    router, spills = proxy_server.llm_router, [item.spill for item in litellm.callbacks if hasattr(item, "spill")]
    others = [pool for spill in spills for pool in spill(model)]
    for found in (deployments, *(router.get_model_list(model_name=pool) or [] for pool in others if router)):
        if url := next(filter(None, map(lease_url, found)), ""):
            yield url, found


def lease_url(deployment: Mapping[str, Any]) -> str:
    """Where a deployment's slots are leased; empty for one without."""
    return str((deployment.get("model_info") or {}).get("lease_url") or "")


def group_of(deployment: Mapping[str, Any]) -> str:
    """The group of servers in a deployment's address, http://HAPROXY/<group>/<replica>/…; empty for a cloud model."""
    path = urlsplit(str((deployment.get("litellm_params") or {}).get("api_base") or "")).path
    return path.split("/")[1] if lease_url(deployment) else ""


def _url_of(answer: aiohttp.ClientResponse) -> str:
    return str(answer.request_info.url)


def own_headers(request: Mapping[str, Any]) -> dict[str, str]:
    """The kit's headers in a request, which tell HAProxy its consumer, conversation and class."""
    found = {**(request.get("headers") or {}), **(request.get("extra_headers") or {})}
    return {name: str(value) for name, value in found.items() if name.lower().startswith(OWN_HEADERS)}


corral_leases = CorralLeases()
