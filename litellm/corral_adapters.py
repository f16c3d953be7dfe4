"""LiteLLM callback: makes a LoRA adapter callable like a model, as `<pool>:<adapter>`.

For LiteLLM such a name is an alias of the pool, with the pool's keys, limits, slots and queue. The `model_info` of
deployments with the adapter has the fields to add. For llama-server, which has a request field for adapters, these are
`adapters: {"chat:sql": {lora: [{id: 0, scale: 1.0}]}}`; for vLLM, where an adapter is a model, `adapters: {"chat:sql":
{model: "chat:sql"}}`. The request stays unchanged for a deployment without the adapter, such as a fallback's, and if
the client sends `lora` itself.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with an adapter.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

_asked: ContextVar[str] = ContextVar("corral_adapter_asked", default="")


class CorralAdapters(CustomLogger):
    """LiteLLM hooks that send the adapter to the server; one instance serves every request of a worker."""

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request unchanged; stores the client's model name, which LiteLLM replaces by the pool's."""
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
        """Returns the deployments with the adapter; all of them if none has it, as in a fallback pool."""
        able = [item for item in healthy_deployments if _asked.get() in adapters_of(item)]
        return able or healthy_deployments

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: object) -> dict[str, Any] | None:
        """Returns the request with the adapter in its body, or None for no change."""
        adapter = adapters_of(kwargs).get(_asked.get())
        body = kwargs.get("extra_body") or {}
        if adapter is None or "lora" in kwargs or "lora" in body:
            return None
        if "model" in adapter:
            provider = str(kwargs.get("model") or "").partition("/")[0]
            return {**kwargs, "model": f"{provider}/{adapter['model']}"}
        return {**kwargs, "extra_body": {**body, **adapter}}


def adapters_of(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The adapters of the request's deployment, by model name."""
    for place in (request, *(request.get(name) or {} for name in ("metadata", "litellm_metadata"))):
        info = place.get("model_info") if isinstance(place, Mapping) else None
        if isinstance(info, Mapping) and info.get("adapters"):
            found: Mapping[str, Any] = info["adapters"]
            return found
    return {}


corral_adapters = CorralAdapters()
