"""LiteLLM callback: connects the gateway with the balancer.

LiteLLM loads this file from beside its `config.yaml`:

    litellm_settings:
      callbacks: ["corral_gateway.corral_gateway"]

It adds what LiteLLM has no setting for: it passes a backend's `Retry-After` to the client, sends the conversation of a
request to the balancer, alternates between equally busy replicas, refuses with the statuses that OpenAI's clients
expect, and logs a refusal in one line.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from litellm._logging import verbose_logger, verbose_proxy_logger, verbose_router_logger
from litellm.integrations.custom_logger import CustomLogger

# The balancer's header for conversations: 32 hexadecimal characters, the key length of its stick table.
SESSION_HEADER = "x-corral-session"

# Headers with which the balancer shares slots and queues between keys.
CONSUMER_HEADER, WEIGHT_HEADER = "x-corral-consumer", "x-corral-weight"
# Set by corral_routing, which runs before this callback.
CLASS_HEADER = "x-corral-class"
OWN_HEADERS = "x-corral-"
# Metadata of a key with a weight other than 1; `keys sync` writes it.
WEIGHT = "corral_weight"
KEY_HASH = re.compile(r"[0-9a-f]{64}")
CONSUMER_LENGTH = 32

# Headers with which a client may name its conversation; the first match wins.
CLIENT_SESSION_HEADERS = ("x-litellm-session-id", "x-session-id", "litellm_session_id")

# Kinds of call that may get the header. For others LiteLLM would write it into the body, or it is useless.
CONVERSATIONS = frozenset(
    {
        "completion",
        "acompletion",
        "text_completion",
        "atext_completion",
        "anthropic_messages",
        "aanthropic_messages",
        "responses",
        "aresponses",
    }
)

# Kinds of call to which LiteLLM adds the headers in `headers`; `extra_headers` would end up in some bodies.
OTHER_CALLS = frozenset({"aembedding", "embedding", "arerank", "rerank", "aimage_generation", "image_generation"})

RETRY_AFTER = "retry-after"
TOO_MANY_REQUESTS = 429
NOT_FOUND = 404
SERVICE_UNAVAILABLE = 503
# LiteLLM's messages for a backend that was unreachable or closed the connection without an answer.
#
# The first comes from OpenAI's library, the others from LiteLLM's own connections.
NOBODY_THERE = re.compile(r"Exception - (Connection error\.|Server disconnected|Cannot connect to host)")
SOON_S = "5"
MOST_SHOWN = 127
# The pool for models that do not exist; without it they get 404.
UNKNOWN_MODEL = os.environ.get("CORRAL_UNKNOWN_MODEL", "")
DELAY_OR_DATE = re.compile(r"[\w,: .+-]{1,40}", re.ASCII)


class ShortRefusals(logging.Filter):
    """Removes the traceback from a refusal's log record.

    An overloaded farm refuses constantly; a traceback for each refusal took as long as the refusal itself and hid
    real errors.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record pass."""
        error = record.exc_info[1] if record.exc_info else None
        if str(getattr(error, "status_code", "")) == str(TOO_MANY_REQUESTS):
            record.exc_info = record.exc_text = None
        return True


for _logger in (verbose_logger, verbose_proxy_logger, verbose_router_logger):
    _logger.filters.insert(0, ShortRefusals())  # before LiteLLM's own filters, which search the whole text for secrets


class CorralGateway(CustomLogger):
    """LiteLLM hooks of a corral gateway; one instance serves every request of a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._turns: Counter[str] = Counter()

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: object,
        traceback_str: str | None = None,
    ) -> None:
        """Refuses like OpenAI and with `Retry-After`, which LiteLLM alone would hide."""
        _correct_status(original_exception, request_data.get("model"))
        if str(getattr(original_exception, "status_code", "")) != str(TOO_MANY_REQUESTS):
            return
        own_headers = _lower_case(getattr(original_exception, "headers", None))
        if own_headers.get("rate_limit_type") == "max_parallel_requests":
            # LiteLLM says one minute, as for its other limits, but a place is free as soon as an answer ends.
            vars(original_exception)["headers"] = {**own_headers, RETRY_AFTER: SOON_S}
        delay = _lower_case(_response_headers(original_exception)).get(RETRY_AFTER, "")
        if RETRY_AFTER in own_headers or not DELAY_OR_DATE.fullmatch(delay):
            return
        # The proxy sends this attribute, which the exception classes do not declare.
        vars(original_exception)["headers"] = {**own_headers, RETRY_AFTER: delay}

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request with the conversation's name in a header for the balancer; the body is unchanged.

        Where the site names a pool for models that do not exist, such a request gets its name.
        """
        if UNKNOWN_MODEL and _is_unknown(data.get("model")):
            data["model"] = UNKNOWN_MODEL
        if call_type in OTHER_CALLS:
            data["headers"] = _foreign(data.get("headers")) | consumer_headers(user_api_key_dict)
        if call_type not in CONVERSATIONS:
            return data
        upstream = _foreign(data.get("extra_headers")) | consumer_headers(user_api_key_dict)
        key = str(getattr(user_api_key_dict, "api_key", None) or "")
        name = conversation_name(data, key)
        if name:
            upstream[SESSION_HEADER] = name
        if upstream:
            data["extra_headers"] = upstream
        return data

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: object = None,
    ) -> list[Any]:
        """Returns all deployments in rotating order, because least-busy takes the first of equals."""
        if len(healthy_deployments) <= 1:
            return healthy_deployments
        turn = self._turns[model] % len(healthy_deployments)
        self._turns[model] += 1
        return [*healthy_deployments[turn:], *healthy_deployments[:turn]]


def consumer_headers(key: object) -> dict[str, str]:
    """Returns the balancer's headers for the consumer: half of the key's hash, and the key's weight.

    The public frontend computes the same from the credential, so LiteLLM's alias for the master key is replaced.
    """
    hashed = str(getattr(key, "api_key", None) or "")
    if not KEY_HASH.fullmatch(hashed):
        from litellm.proxy import proxy_server

        hashed = hashlib.sha256(str(proxy_server.master_key or hashed).encode()).hexdigest()
    weight = (getattr(key, "metadata", None) or {}).get(WEIGHT)
    named = {CONSUMER_HEADER: hashed[:CONSUMER_LENGTH]}
    return named | ({WEIGHT_HEADER: str(weight)} if weight else {})


def _foreign(headers: object) -> dict[str, str]:
    """Returns headers without the kit's, which a client must not set."""
    items = _text_items(headers).items()
    return {name: value for name, value in items if name == CLASS_HEADER or not name.lower().startswith(OWN_HEADERS)}


def _correct_status(error: Exception, model: object) -> None:
    """Replaces LiteLLM's status by OpenAI's.

    404 for an unknown model, 401 for an unknown key, 429 for a budget that is spent, 503 when no server took the
    request: on a reused connection, HAProxy signals that by closing it.
    """
    kind = str(getattr(error, "type", ""))
    if NOBODY_THERE.search(str(getattr(error, "message", ""))) and str(getattr(error, "status_code", "")) == "500":
        vars(error)["status_code"] = SERVICE_UNAVAILABLE
    if type(error).__name__ == "BudgetExceededError":
        vars(error)["status_code"] = TOO_MANY_REQUESTS
    elif kind.endswith("no_db_connection"):  # without a database the master key is the only key
        vars(error).update(code="401", message="Authentication Error, this key is not known here", type="auth_error")
    elif not _is_unknown(model):
        return
    elif type(error).__name__ == "ProxyModelNotFoundError":
        vars(error).update(status_code=NOT_FOUND, detail=_no_such_model(model))
    elif kind.endswith("key_model_access_denied"):
        found = {"code": str(NOT_FOUND), "message": _no_such_model(model), "type": "invalid_request_error"}
        vars(error).update(found)


def _no_such_model(model: object) -> str:
    return f"The model '{str(model)[:MOST_SHOWN]}' does not exist. GET /v1/models lists the models of your key."


def _is_unknown(model: object) -> bool:
    """Whether the gateway has no pool, alias or deployment of this name."""
    if not isinstance(model, str) or not model:
        return False
    from litellm.proxy import proxy_server

    router = proxy_server.llm_router
    if router is None:
        return False
    known = model in router.model_names or model in (router.model_group_alias or {}) or router.has_model_id(model)
    return not known and not router.pattern_router.route(model)


def conversation_name(data: Mapping[str, Any], key: str) -> str | None:
    """Returns the same 32 characters for every turn of a conversation, None for other requests.

    A conversation is what the client says it is, otherwise all requests with one key, model and opening: the messages
    up to and including the first of the user. The key is part of both, so that tenants never share a name. OpenAI's
    `prompt_cache_key`, where a client sends it, tells conversations with the same opening apart.
    """
    if session := _client_session(data):
        return _digest(["session", key, session])
    if opening := _opening(data.get("messages") or data.get("input")):
        named = [data["prompt_cache_key"]] if data.get("prompt_cache_key") else []
        return _digest(["opening", key, data.get("model"), opening, *named])
    return None


def _client_session(data: Mapping[str, Any]) -> str | None:
    request = data.get("proxy_server_request")
    headers = _lower_case(request.get("headers") if isinstance(request, Mapping) else None)
    named = (headers.get(name) for name in CLIENT_SESSION_HEADERS)
    return next((value for value in named if value), None)


def _opening(messages: object) -> list[object]:
    """Returns the messages up to the user's first one, which are the same in every turn."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        return []
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return list(messages[: index + 1])
    return []


def _digest(parts: list[object]) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _response_headers(error: Exception) -> object:
    """Returns the backend's headers, which are in one of two places depending on the call."""
    return getattr(error, "litellm_response_headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )


def _lower_case(headers: object) -> dict[str, str]:
    return {name.lower(): value for name, value in _text_items(headers).items()}


def _text_items(mapping: object) -> dict[str, str]:
    if not isinstance(mapping, Mapping):
        return {}
    return {str(name): str(value) for name, value in mapping.items()}


corral_gateway = CorralGateway()
