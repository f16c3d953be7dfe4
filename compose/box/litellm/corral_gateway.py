# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/corral_gateway.py, then run: ./generate.py render

"""LiteLLM callback: connects the gateway with the balancer.

LiteLLM loads this file from beside its `config.yaml`:

    litellm_settings:
      callbacks: ["corral_gateway.corral_gateway"]

It adds what LiteLLM has no setting for: it sends the conversation of a request to the balancer, alternates between
equally busy replicas, and logs a refusal in one line.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import hashlib
import json
import logging
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
# Bytes of a conversation's opening, or of a client's name for it, that count.
OPENING_BYTES = 4096

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

TOO_MANY_REQUESTS = 429


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

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request with the conversation's name in a header for the balancer; the body is unchanged."""
        if call_type in OTHER_CALLS:
            data["headers"] = _foreign(data.get("headers")) | consumer_headers(user_api_key_dict)
        if call_type not in CONVERSATIONS:
            return data
        upstream = _foreign(data.get("extra_headers")) | consumer_headers(user_api_key_dict)
        name = conversation_name(data, key_hash(user_api_key_dict))
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
    weight = (getattr(key, "metadata", None) or {}).get(WEIGHT)
    named = {CONSUMER_HEADER: key_hash(key)[:CONSUMER_LENGTH]}
    return named | ({WEIGHT_HEADER: str(weight)} if weight else {})


def key_hash(key: object) -> str:
    """Returns the hash of a request's key, as HAProxy computes it."""
    hashed = str(getattr(key, "api_key", None) or "")
    if KEY_HASH.fullmatch(hashed):
        return hashed
    from litellm.proxy import proxy_server

    return hashlib.sha256(str(proxy_server.master_key or hashed).encode()).hexdigest()


def _foreign(headers: object) -> dict[str, str]:
    """Returns headers without the kit's, which a client must not set."""
    items = _text_items(headers).items()
    return {name: value for name, value in items if name == CLASS_HEADER or not name.lower().startswith(OWN_HEADERS)}


def conversation_name(data: Mapping[str, Any], key: str) -> str | None:
    """Returns the same 32 characters for every turn of a conversation, None for other requests.

    A conversation is what the client says it is, otherwise all requests with one key, model and opening: the messages
    up to and including the first of the user. The key is part of both, so that tenants never share a name. OpenAI's
    `prompt_cache_key`, where a client sends it, tells conversations with the same opening apart.
    haproxy/fast_lane.lua computes the same.
    """
    if session := _client_session(data):
        return _digest("session", key, session)
    if opening := _opening(data.get("messages") or data.get("input")):
        named = [str(data["prompt_cache_key"])] if data.get("prompt_cache_key") else []
        return _digest("opening", key, str(data.get("model")), *named, opening)
    return None


def _client_session(data: Mapping[str, Any]) -> str | None:
    request = data.get("proxy_server_request")
    headers = _lower_case(request.get("headers") if isinstance(request, Mapping) else None)
    named = (headers.get(name) for name in CLIENT_SESSION_HEADERS)
    return next((value for value in named if value), None)


def _opening(messages: object) -> str:
    """Returns the messages up to the user's first one, which are the same in every turn, as one text."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        return ""
    parts: list[str] = []
    for message in messages:
        if not isinstance(message, Mapping):
            continue
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
        parts.append(f"{message.get('role')}\x1f{text}")
        if message.get("role") == "user":
            return "\x1e".join(parts)
    return ""


def _digest(kind: str, *parts: str) -> str:
    *names, text = parts
    whole = "\n".join((kind, *names)).encode(errors="replace") + b"\n" + text.encode(errors="replace")[:OPENING_BYTES]
    return hashlib.sha256(whole).hexdigest()[:CONSUMER_LENGTH]


def _lower_case(headers: object) -> dict[str, str]:
    return {name.lower(): value for name, value in _text_items(headers).items()}


def _text_items(mapping: object) -> dict[str, str]:
    if not isinstance(mapping, Mapping):
        return {}
    return {str(name): str(value) for name, value in mapping.items()}


corral_gateway = CorralGateway()
