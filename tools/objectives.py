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
# Times in LiteLLM and in the fast lane, in the same buckets.
TIMES = {
    "first_token": ("litellm_llm_api_time_to_first_token_metric", "corral_fast_first_token_seconds"),
    "answer": ("litellm_request_total_latency_metric", "corral_fast_answer_seconds"),
}
OWN_FAULT = "40[013457]|413|415|422|429|499"
# In the fast lane a 429 is always a queue without room: limits of keys are counted apart.
FAST_OWN_FAULT = "40[013457]|413|415|422"
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
    fast = f"corral_fast_requests_total[{window}]"
    fast_failed = f'corral_fast_requests_total{{status_code!~"2..|{FAST_OWN_FAULT}"}}[{window}]'
    total = _summed(known, at_the_door, fast)
    bad = f"{_summed(failed, refused, at_the_door, fast_failed)} or 0 * {total}"
    yield _rule("pool:total:increase", window, "availability", total)
    yield _rule("pool:bad:increase", window, "availability", bad)
    for objective, (metric, fast_metric) in TIMES.items():
        count = _summed(f'{metric}_count{{pool!=""}}[{window}]', f"{fast_metric}_count[{window}]")
        bucket = _summed(f'{metric}_bucket{{pool!=""}}[{window}]', f"{fast_metric}_bucket[{window}]", by="pool, le")
        in_time = f'sum by (pool) ({bucket} * on (pool, le) objective:bucket{{objective="{objective}"}})'
        yield _rule("pool:total:increase", window, objective, count)
        yield _rule("pool:bad:increase", window, objective, f"clamp_min({count} - {in_time}, 0)")
    ratio = f"pool:bad:increase_{window} / (pool:total:increase_{window} > 0)"
    yield f"      - record: pool:bad:ratio_{window}\n        expr: {ratio}\n"


def _summed(*ranges: str, by: str = "pool") -> str:
    """The increase of different counters together."""
    return f"sum by ({by}) ({' or '.join(f'increase({item})' for item in ranges)})"


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
