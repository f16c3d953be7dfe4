"""LiteLLM callback: writes the usage of HAProxy's fast lane into LiteLLM's daily sums by key.

HAProxy counts the requests and tokens of that lane (haproxy/fast_lane.lua). Every few seconds this callback takes what
has been added, and puts it into the queue from which LiteLLM updates its database.

LiteLLM loads this file from beside its `config.yaml`, on sites with `gateway.fast_lane` and a database.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
from litellm.integrations.custom_logger import CustomLogger

USAGE_PATH = "/-/usage"
EVERY_S = 5.0
ANSWER_WITHIN_S = 2.0
ENDPOINTS = {"chat": "/chat/completions", "embedding": "/embeddings"}

log = logging.getLogger("corral.usage")


class CorralUsage(CustomLogger):
    """LiteLLM hooks that start the task; one instance serves every request of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._task: asyncio.Task[None] | None = None

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request unchanged; the first one starts the task. HAProxy has no usage before LiteLLM has."""
        if self._task is None:
            self._task = asyncio.create_task(_take_on())
        return data


async def _take_on() -> None:
    async with httpx.AsyncClient(timeout=ANSWER_WITHIN_S, trust_env=False) as client:
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                answer = await client.post(_balancer() + USAGE_PATH)
                for row in answer.raise_for_status().json():
                    await _add(row)
            except (httpx.HTTPError, ValueError) as error:
                log.warning("the usage of the fast lane was not read: %s", error)


def _balancer() -> str:
    """The balancer's address, which is that of every deployment behind it."""
    from litellm.proxy import proxy_server

    models = proxy_server.llm_router.model_list if proxy_server.llm_router else []
    addresses = [urlsplit(str(item["litellm_params"].get("api_base") or "")) for item in models]
    return next((f"{item.scheme}://{item.netloc}" for item in addresses if item.path.count("/") > 1), "http://")


async def _add(row: dict[str, Any]) -> None:
    """Puts one key's usage of one pool into LiteLLM's queue; it adds to what the day has."""
    from litellm.proxy import proxy_server

    zero = (
        "cache_read_input_tokens", "cache_creation_input_tokens", "compression_saved_tokens", "failed_requests",
        "compression_savings_spend", "prompt_caching_savings_spend", "gateway_injected_caching_savings_spend", "spend",
    )  # fmt: skip
    date = datetime.now(UTC).date().isoformat()
    transaction = {
        "user_id": "default_user_id", "date": date, "api_key": row["key"], "model": row["pool"],
        "model_group": row["pool"], "mcp_namespaced_tool_name": None, "custom_llm_provider": "openai",
        "endpoint": ENDPOINTS[row["kind"]], "prompt_tokens": row["input"], "completion_tokens": row["output"],
        "api_requests": row["requests"], "successful_requests": row["requests"], **dict.fromkeys(zero, 0),
    }  # fmt: skip
    queue = proxy_server.proxy_logging_obj.db_spend_update_writer.daily_spend_update_queue
    await queue.add_update(update={f"fast {date} {row['key']} {row['pool']}": transaction})


corral_usage = CorralUsage()
