"""LiteLLM callback: sends one span per request, with pool, model, key, times, tokens, cost and result.

It is LiteLLM's own OpenTelemetry callback with fewer spans. LiteLLM's also traces health checks (FastAPI traces
everything once a process has a tracer) and a dozen internal steps per request, and includes error texts, in which
servers quote prompts. LiteLLM's environment variables set the receiver, and whether spans contain prompts.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with `tracing`.
"""

from __future__ import annotations

from typing import Any

from litellm.integrations.opentelemetry import OpenTelemetry, OpenTelemetryConfig

# Attributes of an error that contain nothing of the request.
ERROR_FACTS = ("error_code", "error_class", "llm_provider")


class CorralTraces(OpenTelemetry):
    """LiteLLM's OpenTelemetry callback with the request's own span only; one instance serves a whole worker."""

    def __init__(self) -> None:
        config = OpenTelemetryConfig.from_env()
        config.skip_set_global = True
        config.ignore_context_propagation = True  # the receiver does not know a client's own trace
        super().__init__(config=config, callback_name="corral_traces")

    def create_litellm_proxy_request_started_span(self, start_time: Any, headers: Any) -> None:
        """No span around the request's own."""

    async def async_service_success_hook(self, *_args: Any, **_more: Any) -> None:
        """No span for steps inside LiteLLM."""

    async def async_service_failure_hook(self, *_args: Any, **_more: Any) -> None:
        """No span for steps inside LiteLLM."""

    def _maybe_log_raw_request(self, *_args: Any, **_more: Any) -> None:
        """No second span with the request to the server: prompt and answer are in the first."""

    def _record_exception_on_span(self, span: Any, kwargs: dict[str, Any]) -> None:
        """Records the error; the server's text only if spans may contain prompts."""
        if not self._capture_in_span():
            told = (kwargs.get("standard_logging_object") or {}).get("error_information") or {}
            facts = {name: told.get(name) for name in ERROR_FACTS}
            kwargs = {"standard_logging_object": {"error_information": facts}}
        super()._record_exception_on_span(span=span, kwargs=kwargs)

    def _get_span_name(self, kwargs: dict[str, Any]) -> str:
        """The pool, as the trace's name."""
        told = kwargs.get("standard_logging_object") or {}
        return str(told.get("model_group") or super()._get_span_name(kwargs))


corral_traces = CorralTraces()
