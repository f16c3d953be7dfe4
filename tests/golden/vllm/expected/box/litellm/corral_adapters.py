# Rendered by corral from the inventory "vllm", host box; do not edit.
# Change the inventory or litellm/corral_adapters.py, then run: ./generate.py render

"""The LiteLLM callback by which a LoRA adapter is called like a model: `<pool>:<adapter>`.

LiteLLM knows such a name as an alias of the pool, so keys, limits, slots and queue are the pool's. What the alias adds
is in the `model_info` of deployments that have the adapter. For llama-server, whose requests have a field for it, it is
`adapters: {"chat:sql": {lora: [{id: 0, scale: 1.0}]}}`; for vLLM, where it is a model of its own,
`adapters: {"chat:sql": {model: "chat:sql"}}`. A deployment without it, such as a fallback's, gets the request as it is;
so does one whose client says `lora` itself.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with an adapter.
"""
# ruff: noqa: ARG002 - the hooks' parameters are LiteLLM's, which passes them by name

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

_asked: ContextVar[str] = ContextVar("corral_adapter_asked", default="")


class CorralAdapters(CustomLogger):
    """LiteLLM hooks that name the adapter to the server; one instance serves every request of a worker."""

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request as it is; keeps the name that the client used, which LiteLLM replaces by the pool's."""
        _asked.set(str(data.get("model") or ""))
        return data

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: object = None,
    ) -> list[Any]:
        """Returns the deployments that have the adapter; all of them where none has, as in a pool that stands in."""
        able = [item for item in healthy_deployments if _asked.get() in adapters_of(item)]
        return able or healthy_deployments

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: object) -> dict[str, Any] | None:
        """Returns the request with the adapter in its body, or None, by which LiteLLM sends it as it is."""
        adapter = adapters_of(kwargs).get(_asked.get())
        body = kwargs.get("extra_body") or {}
        if adapter is None or "lora" in kwargs or "lora" in body:
            return None
        if "model" in adapter:
            provider = str(kwargs.get("model") or "").partition("/")[0]
            return {**kwargs, "model": f"{provider}/{adapter['model']}"}
        return {**kwargs, "extra_body": {**body, **adapter}}


def adapters_of(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the deployment that a request goes to has, by the names for it."""
    for place in (request, *(request.get(name) or {} for name in ("metadata", "litellm_metadata"))):
        info = place.get("model_info") if isinstance(place, Mapping) else None
        if isinstance(info, Mapping) and info.get("adapters"):
            found: Mapping[str, Any] = info["adapters"]
            return found
    return {}


corral_adapters = CorralAdapters()
