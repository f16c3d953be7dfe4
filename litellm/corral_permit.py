"""LiteLLM callback: tells HAProxy what a key may do, so that its plain requests need not pass through LiteLLM.

Every answer to a key without spending to count has a header with the key's limits. HAProxy removes the header and lets
the same key call the same model for a few seconds (haproxy/fast_lane.lua). A key with a budget, with a limit on tokens,
or of a team, user or customer gets no such permit: LiteLLM has to count each of its requests.

LiteLLM loads this file from beside its `config.yaml`, on sites with `gateway.fast_lane`.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from litellm.integrations.custom_logger import CustomLogger

PERMIT_HEADER = "x-corral-permit"
# Metadata of a key with a weight other than 1; `keys sync` writes it.
WEIGHT = "corral_weight"
# Attributes of a key that only LiteLLM can apply, or that lead to further limits.
COUNTED = (
    "blocked", "max_budget", "soft_budget", "model_max_budget", "budget_limits", "budget_id", "tpm_limit", "tpd_limit",
    "tpm_limit_per_model", "rpm_limit_per_model", "team_id", "user_max_budget", "user_tpm_limit", "user_rpm_limit",
    "user_model_max_budget", "end_user_id", "org_id", "project_id", "agent_id", "config", "aliases", "router_settings",
    "object_permission_id",
)  # fmt: skip


class CorralPermit(CustomLogger):
    """LiteLLM hooks that grant permits; one instance serves every request of a worker."""

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: object,
        response: object,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, object] | None = None,
    ) -> dict[str, str] | None:
        """Returns the header with the key's permit; None for a failure, or a key that gets none."""
        permit = permit_of(user_api_key_dict) if response is not None else ""
        return {PERMIT_HEADER: permit} if permit else None


def permit_of(key: object) -> str:
    """What HAProxy may let a key do, such as `weight=1 rpm=60 name=reader`; empty if each request must be counted."""
    if any(getattr(key, name, None) for name in COUNTED):
        return ""
    metadata = getattr(key, "metadata", None) or {}
    found = {
        "weight": metadata.get(WEIGHT, 1),
        "parallel": getattr(key, "max_parallel_requests", None),
        "rpm": getattr(key, "rpm_limit", None),
        "expires": _seconds(getattr(key, "expires", None)),
        "name": quote(str(getattr(key, "key_alias", None) or "")) or None,
    }
    return " ".join(f"{name}={value}" for name, value in found.items() if value is not None)


def _seconds(moment: object) -> int | None:
    """A moment as seconds since 1970, rounded down; LiteLLM has it as a time or as text."""
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if not isinstance(moment, datetime):
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


corral_permit = CorralPermit()
