"""LiteLLM callback: has a pool without a price answer chats of a key whose budget is spent, in place of 429.

The pool is in the key's metadata: `keys sync` writes `budget.fallback` of the consumer and of its team there. LiteLLM
checks budgets before any callback runs. So this replaces where LiteLLM handles a failed authorization: if it failed at
such a budget, the request gets the pool as its model, and LiteLLM authorizes it once more. LiteLLM does the same for
budgets of single models, which it sells.

LiteLLM loads this file from beside its `config.yaml`, on sites with such a budget.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from litellm.exceptions import BudgetExceededError
from litellm.integrations.custom_logger import CustomLogger

# By whose budget is spent: the name in the key's metadata under which `keys sync` writes the pool.
FALLBACKS = {"key": "corral_key_fallback", "team": "corral_team_fallback"}
# How the paths of requests end that a chat pool answers.
CHATS = ("/completions", "/messages", "/messages/count_tokens", "/responses")
# Tells the client which pool has answered in place of the one that it asked.
HEADER = "x-corral-fallback"
# The pool that the current request has got.
_fallback: ContextVar[str] = ContextVar("corral_budgets_fallback", default="")

Function = Callable[..., Awaitable[Any]]


class _HasOtherModelError(Exception):
    """The request has another model now, with which it is to be authorized."""


class CorralBudgets(CustomLogger):
    """LiteLLM hooks that tell clients of another pool; one instance serves every request of a worker."""

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: object,
        response: object,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, object] | None = None,
    ) -> dict[str, str] | None:
        """Returns the header with the pool; None where no budget has changed it."""
        pool = _fallback.get()
        return {HEADER: pool} if pool else None


def fallback_of(error: Exception, route: str, key: object) -> str:
    """The pool that answers in place of this failure; empty for none."""
    if not isinstance(error, BudgetExceededError) or not route.endswith(CHATS):
        return ""
    name = FALLBACKS.get(error.entity_type or "", "")
    return str((getattr(key, "metadata", None) or {}).get(name, ""))


def _with_fallback(handle: Function) -> Function:
    """LiteLLM's handling of a failed authorization; raises _HasOtherModelError if there is a pool in its place."""

    async def handle_authentication_error(**failed: Any) -> Any:
        from litellm.proxy.common_utils.http_parsing_utils import safe_set_request_parsed_body

        pool, body = fallback_of(failed["e"], failed["route"], failed.get("resolved_identity")), failed["request_data"]
        if not pool or body.get("model") == pool:
            return await handle(**failed)
        body["model"] = pool
        safe_set_request_parsed_body(request=failed["request"], parsed_body=body)
        _fallback.set(pool)
        raise _HasOtherModelError

    return handle_authentication_error


def _once_more(authorize: Function) -> Function:
    """A step of LiteLLM's authorization, which runs again if the request has another model since."""

    async def authorize_once_more(*arguments: Any, **named: Any) -> Any:
        try:
            return await authorize(*arguments, **named)
        except _HasOtherModelError:
            return await authorize(*arguments, **named)

    return authorize_once_more


def install(authorization: Any) -> None:
    """Puts this into LiteLLM's module for authorization."""
    handler = authorization.UserAPIKeyAuthExceptionHandler
    handler.handle_authentication_error = staticmethod(_with_fallback(handler.handle_authentication_error))
    for name in ("user_api_key_auth_builder", "_authorize_authenticated_request"):
        setattr(authorization, name, _once_more(getattr(authorization, name)))


if "litellm.proxy.auth.user_api_key_auth" in sys.modules:  # not in a test of this file
    install(sys.modules["litellm.proxy.auth.user_api_key_auth"])

corral_budgets = CorralBudgets()
