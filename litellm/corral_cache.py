"""LiteLLM callback: separates the prompt caches of servers by key.

A server that reuses a cached prompt of another key reveals, by its speed and by `cached_tokens`, the beginnings of
prompts that the other key has sent. The `model_info` of a deployment names the request field that prevents this:
`cache_prompt` (llama-server: false disables reuse) or `cache_salt` (vLLM: only requests with the same salt share a
prefix; each key has its own). The client's values of these fields are ignored.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with such a pool.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

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
        """Returns the request unchanged; stores LiteLLM's hash of the key."""
        _key.set(str(getattr(user_api_key_dict, "api_key", None) or ""))
        return data

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: object) -> dict[str, Any] | None:
        """Returns the request with the field of its deployment, or None for no change."""
        name = field_of(kwargs)
        if not name:
            return None
        private = {name: salt_of(_key.get()) if name == "cache_salt" else False}
        left = {field: value for field, value in kwargs.items() if field not in OWN_FIELDS}
        body = {field: value for field, value in (kwargs.get("extra_body") or {}).items() if field not in OWN_FIELDS}
        return {**left, "extra_body": {**body, **private}}


def salt_of(key: str) -> str:
    """Returns the salt of a key: always the same, and not reversible to the key or its hash."""
    return hashlib.sha256(f"corral cache {key}".encode()).hexdigest()[:SALT_LENGTH]


def field_of(request: Mapping[str, Any]) -> str:
    """The field that the request's deployment needs; empty for none."""
    for place in (request, *(request.get(name) or {} for name in ("metadata", "litellm_metadata"))):
        info = place.get("model_info") if isinstance(place, Mapping) else None
        if isinstance(info, Mapping) and info.get("cache_field"):
            return str(info["cache_field"])
    return ""


corral_cache = CorralCache()
