# Rendered by corral from the inventory "everything.on", host gate; do not edit.
# Change the inventory or litellm/corral_cache.py, then run: ./generate.py render

"""The LiteLLM callback that keeps the prompt caches of servers apart by key.

A server that continues a prompt from what it computed for another key tells, by its speed and by `cached_tokens`, which
beginnings the other key has sent. The `model_info` of a deployment names the field of its requests that prevents it:
`cache_prompt` (llama-server: false, so that nothing is reused) or `cache_salt` (vLLM: only requests with the same salt
share a prefix; each key has its own). What a client says in these fields does not count.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with such a pool.
"""
# ruff: noqa: ARG002 - the hooks' parameters are LiteLLM's, which passes them by name

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

OWN_FIELDS = ("cache_prompt", "cache_salt", "id_slot")
SALT_LENGTH = 32

_key: ContextVar[str] = ContextVar("corral_cache_key", default="")


class CorralCache(CustomLogger):
    """LiteLLM hooks that keep prompt caches private; one instance serves every request of a worker."""

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request as it is; keeps the key, as LiteLLM names it."""
        _key.set(str(getattr(user_api_key_dict, "api_key", None) or ""))
        return data

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: object) -> dict[str, Any] | None:
        """Returns the request with the field of its deployment, or None, by which LiteLLM sends it as it is."""
        name = field_of(kwargs)
        if not name:
            return None
        private = {name: salt_of(_key.get()) if name == "cache_salt" else False}
        left = {field: value for field, value in kwargs.items() if field not in OWN_FIELDS}
        body = {field: value for field, value in (kwargs.get("extra_body") or {}).items() if field not in OWN_FIELDS}
        return {**left, "extra_body": {**body, **private}}


def salt_of(key: str) -> str:
    """Returns the salt of a key: always the same, and of no use for finding the key or its hash."""
    return hashlib.sha256(f"corral cache {key}".encode()).hexdigest()[:SALT_LENGTH]


def field_of(request: Mapping[str, Any]) -> str:
    """The field that the deployment which a request goes to needs; empty for none."""
    for place in (request, *(request.get(name) or {} for name in ("metadata", "litellm_metadata"))):
        info = place.get("model_info") if isinstance(place, Mapping) else None
        if isinstance(info, Mapping) and info.get("cache_field"):
            return str(info["cache_field"])
    return ""


corral_cache = CorralCache()
