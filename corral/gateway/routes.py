"""What clients may call: one list for HAProxy, keys and tests. All else is 404 in HAProxy and 403 for a key."""

from __future__ import annotations

from pathlib import Path

from corral.config.source import plain_yaml

# POST: routes that take a model.
MODEL_ROUTES: tuple[str, ...] = tuple(plain_yaml(Path(__file__).with_name("model_routes.yaml").read_bytes()))
# GET: the models of a key, and what is left of its limits and budget.
READ_ROUTES = ("/v1/models", "/key/info")
# On sites with `gateway.conversations`: the path, and those below it.
SESSIONS_PATH, SESSION_PATH = "/v1/sessions", r"^/v1/sessions/[A-Za-z0-9._:-]+(/messages|/extend)?$"
# On sites with `jobs`, for clients inside the farm; everything below the first.
JOBS_PATH, JARVIS_PATH, FILES_PATH, BATCHES_PATH = "/v1/jobs", "/internal/queue/enqueue", "/v1/files", "/v1/batches"
JOBS_PATHS = (JOBS_PATH, FILES_PATH, BATCHES_PATH)
# On sites with `jobs.pollers`, for pollers with keys that open nothing else, from outside as well: everything below it.
WORK_FOLDER = "/v1/work/"
# Another prefix for everything under `/v1`, and for `/health`.
API_PREFIX = "/api/v1"
# Azure's spelling, `<prefix><name>/chat/completions`; HAProxy turns it into the route under `/v1`.
AZURE_PREFIX = "/openai/deployments/"
# What Prometheus' own key opens, on LiteLLM's own port only.
METRICS_ROUTES = ("/metrics", "/metrics/")


def with_short_forms(routes: tuple[str, ...]) -> tuple[str, ...]:
    """The routes, and those under `/v1` without it, as some clients have them."""
    return tuple(dict.fromkeys(form for route in routes for form in (route, route.removeprefix("/v1"))))


# What a consumer's key may call (LiteLLM's `allowed_routes`).
CONSUMER_ROUTES = (*with_short_forms((*MODEL_ROUTES, *READ_ROUTES)), SESSIONS_PATH)
