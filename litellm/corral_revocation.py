"""LiteLLM callback: makes a worker forget keys that another one has changed or revoked.

A worker keeps the keys that it has checked in memory for a minute. The worker that changes a key tells the others
through Valkey, at most once and without knowing whether they listen. So each worker also asks the database, every 0.7
seconds and in one query, for the keys that it has in memory, and forgets those that are gone or have changed.

LiteLLM loads this file from beside its `config.yaml`, on sites with several workers and a database.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

EVERY_S = 0.7
# Columns that every request changes.
COUNTED = (
    "spend", "total_spend", "model_spend", "updated_at", "last_active", "budget_limits", "soft_budget_cooldown",
)  # fmt: skip
QUERY = (
    'SELECT token, md5((to_jsonb(keys) - $2::text[])::text) AS digest FROM "LiteLLM_VerificationToken" AS keys '
    "WHERE token = ANY($1::text[])"
)

log = logging.getLogger("corral.revocation")


class CorralRevocation(CustomLogger):
    """LiteLLM hooks that start two tasks; one instance serves every request of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: list[asyncio.Task[None]] = []
        with suppress(RuntimeError):  # LiteLLM loads it in its own loop, tools without one
            self._start()

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request unchanged; starts the tasks if they do not run."""
        self._start()
        return data

    def _start(self) -> None:
        if any(not task.done() for task in self._tasks):
            return
        loop, known = asyncio.get_running_loop(), Known()
        # The second, as a worker that has lost Valkey tries again only when it has something to ask.
        acts = (lambda: _forget_outdated(known), _ask_valkey)
        self._tasks = [loop.create_task(_again(act)) for act in acts]


class Known:
    """What the database said about the keys in a worker's memory."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._changed: set[str] = set()

    def outdated(self, tokens: Iterable[str], digests: Mapping[str, str]) -> list[str]:
        """Keys of the memory to forget: those that the database has not, has otherwise, or was not asked about before.

        What has changed is forgotten twice: a request may have read the row before, and keep it in memory after.
        """
        here = {token: digests.get(token, "") for token in tokens}
        different = {key for key, value in here.items() if self._digests.get(key) != value}
        again, self._changed = self._changed, different & self._digests.keys()
        self._digests |= here
        return [key for key, value in here.items() if not value or key in different | again]


async def _again(act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            await act()
        except Exception as error:  # noqa: BLE001 - the database or Valkey is away; LiteLLM itself says so
            log.debug("not asked: %r", error)


async def _forget_outdated(known: Known) -> None:
    from litellm.proxy import proxy_server

    cache, client = proxy_server.user_api_key_cache, proxy_server.prisma_client
    tokens = list(cache.key_object_cache.in_memory_cache.cache_dict)
    if tokens and client is not None:
        rows = await client.db.query_raw(QUERY, tokens, list(COUNTED))
        for token in known.outdated(tokens, {row["token"]: row["digest"] for row in rows}):
            cache.in_memory_cache_for(token).delete_cache(token)


async def _ask_valkey() -> None:
    from litellm.proxy import proxy_server

    if proxy_server.redis_usage_cache is not None:
        await proxy_server.redis_usage_cache.async_get_cache("corral")


corral_revocation = CorralRevocation()
