# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/corral_access.py, then run: ./generate.py render

"""LiteLLM callback: lets a key call exactly its pools, by checking the model that is really called.

LiteLLM checks a key against the model in the body, but takes the model from the query or the path. It also obeys about
400 fields of a body that are meant for its operator. This callback runs before all others of the kit. It checks the
model that will be called, and removes fields that control LiteLLM or the server rather than the answer.

LiteLLM loads this file from beside its `config.yaml`.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger

BAD_REQUEST = 400
# Fields of the client that LiteLLM also writes.
METADATA = ("metadata", "litellm_metadata")
# LiteLLM's separate fields for the client's metadata.
SENT = "requester_metadata"
# Parameters of LiteLLM that a client may use; each is checked below.
KEPT = frozenset({"model", "fallbacks", *METADATA})
# Parameters that LiteLLM obeys but does not list.
FURTHER = frozenset(
    {
        "additional_drop_params", "base_url", "context_window_fallbacks", "content_policy_fallbacks", "deployment_id",
        "disable_fallbacks", "drop_params", "extra_headers", "headers", "litellm_params", "max_retries", "mock_delay",
        "mock_tool_calls", "model_list", "modify_params", "num_retries", "organization", "request_timeout",
        "router_settings_override", "specific_deployment", "stream_timeout", "timeout", "user_config",
    }
)  # fmt: skip
# Prefixes and suffixes of parameters for providers and tracers.
FAMILIES = re.compile(
    r"^(_|aws_|azure_|bedrock_|databricks_|gcs_|hf_|langfuse_|langsmith_|litellm_|oci_|s3_|sagemaker_|vertex_|watsonx_)"
    r"|_(api_base|api_key|cost_per_\w+|credentials|endpoint|secret_key)$"
)
# Fields of llama-server and vLLM that affect other requests: slots, caches, priorities.
SERVER_FIELDS = frozenset(
    {"cache_prompt", "cache_salt", "id_slot", "kv_transfer_params", "priority", "request_id", "slot_id"}
)
# Fields that LiteLLM sets itself in each request, replacing the client's.
OWN = frozenset(
    {"_litellm_strip_stream_usage", "litellm_call_id", "litellm_logging_obj", "litellm_session_id"}
    | {"litellm_trace_id", "proxy_server_request", "secret_fields"}
)


class CorralAccess(CustomLogger):
    """LiteLLM hooks that guard what a key may reach; one instance serves every request of a worker."""

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request without control fields.

        Raises:
            ProxyException: the key does not open the model that would be called (403).
            HTTPException: the model or `fallbacks` has no sensible form (400).
        """
        merge_extra_body(data)
        take_out_controls(data)
        await _check_model(data, user_api_key_dict)
        return data


async def _check_model(data: Mapping[str, Any], key: Any) -> None:
    """Raises LiteLLM's own refusal unless the key may call the request's current model."""
    from litellm.proxy import proxy_server
    from litellm.proxy.auth.auth_checks import can_key_call_resolved_model

    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise HTTPException(
            BAD_REQUEST,
            "the body must be a JSON object in UTF-8 with the name of a model in `model`; GET /v1/models lists those of"
            " your key",
        )
    await can_key_call_resolved_model(
        model=model, llm_model_list=None, valid_token=key, llm_router=proxy_server.llm_router
    )


def merge_extra_body(data: dict[str, Any]) -> None:
    """Moves the fields of `extra_body` to the top level, where every check sees them; existing fields win."""
    extra = data.pop("extra_body", None)
    if isinstance(extra, Mapping):
        for name, value in extra.items():
            data.setdefault(str(name), value)


def take_out_controls(data: dict[str, Any]) -> None:
    """Removes fields that control LiteLLM or the server, except those that LiteLLM has set itself."""
    for name in [name for name in data if is_control(name) and name not in OWN]:
        del data[name]
    for name in METADATA:
        _take_out_structures(data.get(name))
    fallbacks = data.get("fallbacks")
    if fallbacks is not None and not _are_names(fallbacks):
        raise HTTPException(BAD_REQUEST, "fallbacks must be a list of models' names")


def is_control(name: str) -> bool:
    """Whether a field is for LiteLLM's operator, or affects other requests at the server."""
    if name in KEPT:
        return False
    return name in SERVER_FIELDS or name in _litellms_names() or bool(FAMILIES.search(name))


def _take_out_structures(metadata: object) -> None:
    """Removes metadata of the client that are not plain values, because LiteLLM's settings there are none."""
    if not isinstance(metadata, dict) or not isinstance(sent := metadata.get(SENT), Mapping):
        return
    for name, value in sent.items():
        if not isinstance(value, str | int | float) and metadata.get(name) == value:
            del metadata[name]


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


@cache
def _litellms_names() -> frozenset[str]:
    """Every parameter of LiteLLM's own, as the installed version lists them."""
    from litellm.proxy.auth.auth_utils import _BANNED_REQUEST_BODY_PARAMS
    from litellm.types.router import LiteLLM_Params
    from litellm.types.utils import all_litellm_params

    named = {*map(str, all_litellm_params), *LiteLLM_Params.model_fields, *_BANNED_REQUEST_BODY_PARAMS}
    return frozenset(named | FURTHER)


corral_access = CorralAccess()
