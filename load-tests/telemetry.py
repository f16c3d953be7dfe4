"""What the farm's Prometheus saw in the same minutes: temperature, power, throttling, queue, cache."""

from __future__ import annotations

from typing import Any

import httpx

from corral.build import Plan

POINTS = 120
LIMIT_S = 10.0
QUERIES = {
    "temperature": ("gpu:temperature:celsius", "°C"),
    "power": ("gpu:power:watts", "W"),
    "throttled": ("gpu:throttled", "1 = yes"),
    "queue": ('pool:queue{pool="POOL"}', "requests"),
    "in flight": ('pool:in_flight{pool="POOL"}', "requests"),
    "cached tokens": ('pool:cached_tokens:rate5m{pool="POOL"}', "tokens a second"),
}
NAMING = ("host", "gpu", "uuid", "pool", "replica", "reason")


def figures_between(plan: Plan, pool: str, began: float, ended: float) -> dict[str, Any]:
    """Series by title, each with its unit and points of (moment, value); empty where no Prometheus answers."""
    monitoring = plan.inventory.monitoring
    if monitoring is None:
        return {}
    host = plan.site.host(monitoring.host)
    if host.ssh:
        return {}
    address = f"http://127.0.0.1:{monitoring.port}"
    found: dict[str, Any] = {}
    with httpx.Client(base_url=address, timeout=LIMIT_S, trust_env=False) as client:
        for title, (query, unit) in QUERIES.items():
            wanted = {"start": began, "end": ended, "step": max(1.0, (ended - began) / POINTS)}
            try:
                answer = client.get("/api/v1/query_range", params={"query": query.replace("POOL", pool), **wanted})
                series = answer.raise_for_status().json()["data"]["result"]
            except (httpx.HTTPError, ValueError, KeyError):
                return found
            if series:
                found[title] = {"unit": unit, "series": {_name(one["metric"]): one["values"] for one in series}}
    return found


def _name(labels: dict[str, str]) -> str:
    return " ".join(labels[name] for name in NAMING if name in labels) or "all"
