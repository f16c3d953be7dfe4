"""monitoring/rules/objectives.yml: how fast pools use up their error budgets, over every window that alerts look at.

    python -m tools.objectives > monitoring/rules/objectives.yml

The same three ratios over seven windows; written by hand they would differ somewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# Times the budget's even use, long and short window: two per cent of a month's budget in an hour, five in six.
FAST = ((14.4, "1h", "5m"), (6.0, "6h", "30m"))
SLOW = ((3.0, "1d", "2h"), (1.0, "3d", "6h"))
# Minimum of bad requests in the long window: at night one failure may be a fifth of all requests.
LEAST_BAD = 5
TIMES = {
    "first_token": "litellm_llm_api_time_to_first_token_metric",
    "answer": "litellm_request_total_latency_metric",
}
OWN_FAULT = "40[013457]|413|415|422|429|499"
HEAD = """\
# Made by tools/objectives.py; write it again with `make rules`.
#
# Objectives of pools (`objective` in the inventory) and their burn rates. `pool:bad:ratio_<window>` is the share of
# requests that violate the objective: `availability` (failed, or refused without a free slot), `first_token` and
# `answer` (too slow).
# Alerts use a long and a short window, so that they fire in time and end soon after the problem.
groups:
  - name: objectives
    rules:
"""


def main() -> None:
    """Prints the file."""
    sys.stdout.write(text())


def text() -> str:
    """The file."""
    recorded = "".join(rule for window in WINDOWS for rule in _recorded(window))
    fast = _alert("ObjectiveBurnsFast", FAST, "critical", "in one or two days")
    slow = _alert("ObjectiveBurnsSlow", SLOW, "warning", "before the month ends")
    return f"{HEAD}{recorded}\n  - name: objectives_alerts\n    rules:\n{fast}{slow}"


def _recorded(window: str) -> Iterator[str]:
    failures = "litellm_proxy_failed_requests_metric_total"
    failed = f'{failures}{{pool!="", exception_status!~"{OWN_FAULT}"}}[{window}]'
    refused = f'{failures}{{pool!="", exception_class=~".+[.]RateLimitError"}}[{window}]'
    at_the_door = f'haproxy_backend_http_responses_total{{pool!="", proxy=~"Full:.+", code="4xx"}}[{window}]'
    known = f'litellm_proxy_total_requests_metric_total{{pool!=""}}[{window}]'
    total = f"sum by (pool) (increase({known}) or increase({at_the_door}))"
    bad = f"sum by (pool) (increase({failed}) or increase({refused}) or increase({at_the_door})) or 0 * {total}"
    yield _rule("pool:total:increase", window, "availability", total)
    yield _rule("pool:bad:increase", window, "availability", bad)
    for objective, metric in TIMES.items():
        count = f'sum by (pool) (increase({metric}_count{{pool!=""}}[{window}]))'
        bucket = f'sum by (pool, le) (increase({metric}_bucket{{pool!=""}}[{window}]))'
        in_time = f'sum by (pool) ({bucket} * on (pool, le) objective:bucket{{objective="{objective}"}})'
        yield _rule("pool:total:increase", window, objective, count)
        yield _rule("pool:bad:increase", window, objective, f"clamp_min({count} - {in_time}, 0)")
    ratio = f"pool:bad:increase_{window} / (pool:total:increase_{window} > 0)"
    yield f"      - record: pool:bad:ratio_{window}\n        expr: {ratio}\n"


def _rule(name: str, window: str, objective: str, expression: str) -> str:
    return (
        f"      - record: {name}_{window}\n        labels: {{objective: {objective}}}\n        expr: |\n"
        f"          {expression}\n"
    )


def _alert(name: str, windows: tuple[tuple[float, str, str], ...], severity: str, when: str) -> str:
    parts = [
        f"(\n            pool:bad:ratio_{long} > {factor:g} * objective:error_budget\n"
        f"              and pool:bad:ratio_{short} > {factor:g} * objective:error_budget\n"
        f"              and pool:bad:increase_{long} >= {LEAST_BAD}\n          )"
        for factor, long, short in windows
    ]
    expression = " or ".join(parts)
    return (
        f"      - alert: {name}\n        expr: |\n          {expression}\n"
        f"        labels: {{severity: {severity}, about: objective}}\n        annotations:\n"
        "          summary: '{{ $labels.pool }}: too many requests violate the objective ({{ $labels.objective }})'\n"
        "          description: '{{ $value | humanizePercentage }} of the requests; at this rate the monthly error"
        f" budget is used up {when}.'\n"
    )


if __name__ == "__main__":
    main()
