"""A LiteLLM callback that sends one span for each request: pool, model, key, times, tokens, cost, and how it ended.

It is LiteLLM's own OpenTelemetry callback with less to say. That one also traces health checks (FastAPI traces all
there is once a process has a tracer) and a dozen steps inside LiteLLM for every request, and repeats the texts of
errors, in which servers quote prompts. Where it sends to, and whether prompts go along, is in LiteLLM's variables.

LiteLLM loads this file from beside its `config.yaml`, and only on sites with `tracing`.
"""

from __future__ import annotations

from typing import Any

from litellm.integrations.opentelemetry import OpenTelemetry, OpenTelemetryConfig

# What of an error says nothing of the request.
ERROR_FACTS = ("error_code", "error_class", "llm_provider")


class CorralTraces(OpenTelemetry):
    """LiteLLM's OpenTelemetry callback with the request's own span alone; one instance serves all of a worker."""

    def __init__(self) -> None:
        config = OpenTelemetryConfig.from_env()
        config.skip_set_global = True
        config.ignore_context_propagation = True  # a client's own trace is not known to the receiver
        super().__init__(config=config, callback_name="corral_traces")

    def create_litellm_proxy_request_started_span(self, start_time: Any, headers: Any) -> None:
        """No span around the request's own."""

    async def async_service_success_hook(self, *_args: Any, **_more: Any) -> None:
        """No span for steps inside LiteLLM."""

    async def async_service_failure_hook(self, *_args: Any, **_more: Any) -> None:
        """No span for steps inside LiteLLM."""

    def _maybe_log_raw_request(self, *_args: Any, **_more: Any) -> None:
        """No second span with the request as the server gets it: prompt and answer are in the first."""

    def _record_exception_on_span(self, span: Any, kwargs: dict[str, Any]) -> None:
        """What went wrong: in a server's words only where prompts may be seen."""
        if not self._capture_in_span():
            told = (kwargs.get("standard_logging_object") or {}).get("error_information") or {}
            facts = {name: told.get(name) for name in ERROR_FACTS}
            kwargs = {"standard_logging_object": {"error_information": facts}}
        super()._record_exception_on_span(span=span, kwargs=kwargs)

    def _get_span_name(self, kwargs: dict[str, Any]) -> str:
        """The pool: traces are listed by their names."""
        told = kwargs.get("standard_logging_object") or {}
        return str(told.get("model_group") or super()._get_span_name(kwargs))


corral_traces = CorralTraces()
