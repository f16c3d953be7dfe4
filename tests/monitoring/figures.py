"""Two hours of figures of a farm under load, as its programs would tell them: four cards, two pools, three keys.

Names and labels are those of the catalogue (a test sees to it). `text` is in Prometheus' OpenMetrics form, for
`promtool tsdb create-blocks-from openmetrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

BLOCK_S = 7200
# Where a block of Prometheus begins: what begins and ends in one block is quickly written.
BEGIN = 248_611 * BLOCK_S
SPAN_S = BLOCK_S
STEP_S = 30
END = BEGIN + SPAN_S - STEP_S
HOST = {"host": "pea"}
CARDS = ("1", "2", "3", "4")
POOLS = {"chat": ("pea-gpu-1", "pea-gpu-2", "pea-gpu-3"), "embed": ("pea-gpu-4",)}
# Requests per second at the height of the load.
KEYS = {"VISTA": 6.0, "whisplbrx": 2.5, "AnyDataNext": 0.8}
EDGES = ("0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "60.0", "120.0", "+Inf")
GIB = 1 << 30

# A value at a time between 0 and 1.
Shape = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """A series: its name, its labels, and what it says when."""

    name: str
    labels: Mapping[str, str]
    shape: Shape

    def __str__(self) -> str:
        """As in a text of figures, without a value."""
        labels = ",".join(f'{key}="{value}"' for key, value in self.labels.items())
        return f"{self.name}{{{labels}}}"


def load(when: float) -> float:
    """How much there is to do: it grows, is at its height after two thirds, and goes down."""
    return 0.15 + 0.85 * math.exp(-((when - 0.66) ** 2) / 0.035) + 0.03 * math.sin(60 * when)


def _flat(value: float) -> Shape:
    return lambda _when: value


def _scaled(shape: Shape, factor: float, least: float = 0) -> Shape:
    return lambda when: least + factor * shape(when)


def _whole(shape: Shape) -> Shape:
    return lambda when: round(shape(when))


def _above(shape: Shape, limit: float) -> Shape:
    return lambda when: float(shape(when) > limit)


def _sinks(gib: float) -> Shape:
    return lambda when: (gib - 3 * when) * GIB


def _grows(per_s: Callable[[float], float]) -> Shape:
    """A counter that grows by this much in a second."""
    points = [0.0]
    for index in range(SPAN_S // STEP_S):
        points.append(points[-1] + max(0.0, per_s(index * STEP_S / SPAN_S)) * STEP_S)
    return lambda when: points[round(when * SPAN_S / STEP_S)]


def series() -> Iterator[Series]:
    """Everything that Prometheus would have read."""
    yield from _known()
    yield from _cards()
    yield from _replicas()
    yield from _pools()
    yield from _gateway()
    yield from _host()
    yield from _kit()
    yield from _stores()
    yield from _alerts()


def text(renamed: str = "") -> str:
    """The whole as OpenMetrics; the metric `renamed` under another name, as after an upgrade of its program."""
    written: list[str] = []
    for item in series():
        name = str(item).replace(renamed, f"{renamed}_new", 1) if renamed and item.name == renamed else str(item)
        written += [f"{name} {item.shape(s / SPAN_S):.6g} {BEGIN + s}" for s in range(0, SPAN_S, STEP_S)]
    return "\n".join([*written, "# EOF", ""])


def _known() -> Iterator[Series]:
    """The inventory's figures, which a rule with a constant makes."""
    for card in CARDS:
        labels = {**HOST, "gpu": card, "card": "p104-100"}
        yield Series("inventory:gpu", labels | {"uuid": f"0000-{card}"}, _flat(1))
        yield Series("threshold:gpu_warm_celsius", labels, _flat(80))
        yield Series("threshold:gpu_hot_celsius", labels, _flat(85))
    for _pool, labels in _replica_labels():
        yield Series("inventory:replica_slots", labels, _flat(2))
    for pool in POOLS:
        for objective, le in (("first_token", "10.0"), ("answer", "60.0")):
            yield Series("objective:bucket", {"pool": pool, "objective": objective, "le": le}, _flat(1))
        for objective, budget in (("availability", 0.01), ("first_token", 0.05), ("answer", 0.05)):
            yield Series("objective:error_budget", {"pool": pool, "objective": objective}, _flat(budget))
    yield Series("threshold:disk_full_h", {}, _flat(24))


def _cards() -> Iterator[Series]:
    job = {**HOST, "job": "gpu-exporter", "role": "gpu"}
    yield Series("up", job, _flat(1))
    yield Series("nvidia_smi_last_collect_success", job, _flat(1))
    for index, card in enumerate(CARDS):
        labels = job | {"uuid": f"0000-{card}"}
        share = 1 - 0.12 * index
        yield Series("nvidia_smi_gpu_info", labels | {"name": "NVIDIA P104-100", "index": str(index)}, _flat(1))

        def busy(when: float, share: float = share) -> float:
            return min(1.0, share * load(when))

        shapes: dict[str, Shape] = {
            "nvidia_smi_utilization_gpu_ratio": busy,
            "nvidia_smi_memory_used_bytes": _flat((6.1 + 0.35 * index) * GIB),
            "nvidia_smi_memory_total_bytes": _flat(8 * GIB),
            "nvidia_smi_temperature_gpu": _whole(_scaled(busy, 39, 44)),
            "nvidia_smi_power_draw_watts": _scaled(busy, 80, 12),
            "nvidia_smi_enforced_power_limit_watts": _flat(90),
            "nvidia_smi_fan_speed_ratio": _scaled(busy, 0.6, 0.3),
            "nvidia_smi_clocks_current_sm_clock_hz": _scaled(_above(busy, 0.9), -2.5e8, 1.7e9),
            "nvidia_smi_pcie_link_width_current": _flat(4 if index else 1),
            "nvidia_smi_gpu_recovery_action": _flat(0),
            "nvidia_smi_clocks_event_reasons_hw_thermal_slowdown": _above(busy, 0.95),
            "nvidia_smi_clocks_event_reasons_sw_thermal_slowdown": _flat(0),
            "nvidia_smi_clocks_event_reasons_hw_power_brake_slowdown": _flat(0),
            "nvidia_smi_clocks_event_reasons_sw_power_cap": _above(busy, 0.8),
        }
        for name, shape in shapes.items():
            yield Series(name, labels, shape)
    xid = job | {"uuid": "0000-2", "xid": "31"}
    yield Series("nvidia_smi_xid_last_timestamp_seconds", xid, _flat(BEGIN + 4000))


def _replica_labels() -> Iterator[tuple[str, dict[str, str]]]:
    for pool, replicas in POOLS.items():
        for replica in replicas:
            labels = {**HOST, "gpu": replica[-1], "card": "p104-100", "pool": pool, "model": f"{pool}-8b"}
            yield pool, labels | {"replica": replica, "role": "chat" if pool == "chat" else "embedding"}


def _replicas() -> Iterator[Series]:
    for pool, labels in _replica_labels():
        target = labels | {"job": "llama"}
        share = 1.1 if labels["replica"].endswith("1") else 0.95
        yield Series("up", target, _flat(1))
        yield Series("llamacpp:requests_processing", target, _whole(_scaled(load, 2 * share)))
        yield Series("llamacpp:requests_deferred", target, _flat(0))
        for name, per_s in {
            "prompt_tokens_total": 160.0, "prompt_tokens_cached_total": 95.0, "prompt_seconds_total": 0.3,
            "tokens_predicted_total": 28.0, "tokens_predicted_seconds_total": 0.8, "n_decode_total": 20.0,
        }.items():  # fmt: skip
            yield Series(f"llamacpp:{name}", target, _grows(_scaled(load, per_s * share)))
        server = {**HOST, "job": "haproxy", "role": "balancer", "pool": pool, "proxy": pool} | {
            "replica": labels["replica"], "server": labels["replica"],
        }  # fmt: skip
        yield from _server(server, share, is_away=labels["replica"] == "pea-gpu-3")


def _server(labels: dict[str, str], share: float, *, is_away: bool) -> Iterator[Series]:
    """HAProxy's figures of one server; one was away for a while."""

    def up(when: float) -> float:
        return float(not (is_away and 0.30 < when < 0.36))

    def rate(when: float) -> float:
        return share * up(when) * load(when)

    yield Series("haproxy_server_status", labels | {"state": "UP"}, up)
    yield Series("haproxy_server_status", labels | {"state": "DOWN"}, lambda when: 1 - up(when))
    for code, part in (("2xx", 0.98), ("4xx", 0.01), ("5xx", 0.01)):
        counted = _grows(_scaled(rate, 2.4 * part))
        yield Series("haproxy_server_http_responses_total", labels | {"code": code}, counted)
    yield Series("haproxy_server_current_sessions", labels, lambda when: min(2, round(2.1 * rate(when))))
    yield Series("haproxy_server_limit_sessions", labels, _flat(2))
    yield Series("haproxy_server_check_code", labels, lambda when: 200 if up(when) else 503)
    yield Series("haproxy_server_check_duration_seconds", labels, lambda when: 0.002 + 0.004 * load(when))
    yield Series("haproxy_server_check_last_change_seconds", labels, lambda when: 1000 + 7200 * when)
    yield Series("haproxy_server_check_up_down_total", labels, lambda when: float(is_away and when > 0.3))
    yield Series("haproxy_server_connection_errors_total", labels, _flat(0))
    yield Series("haproxy_server_total_time_average_seconds", labels, lambda when: 1.5 + 6 * load(when))


def _pools() -> Iterator[Series]:
    for pool, replicas in POOLS.items():
        labels = {**HOST, "job": "haproxy", "role": "balancer", "pool": pool, "proxy": pool}
        size = len(replicas)

        def waits(when: float, size: int = size) -> float:
            return max(0, round(12 * (load(when) - 0.7))) * (size > 1)

        yield Series("haproxy_backend_current_queue", labels, waits)
        yield Series("haproxy_backend_queue_time_average_seconds", labels, _scaled(waits, 0.4))
        for code, part in (("2xx", 0.97), ("4xx", 0.02), ("5xx", 0.01)):
            counted = _grows(_scaled(load, 2.4 * size * part))
            yield Series("haproxy_backend_http_responses_total", labels | {"code": code}, counted)
        yield Series("haproxy_backend_retry_warnings_total", labels, _grows(lambda when: 0.02 * load(when)))
        yield Series("haproxy_backend_client_aborts_total", labels, _grows(lambda when: 0.05 * load(when)))
    yield Series("up", {**HOST, "job": "haproxy", "role": "balancer"}, _flat(1))


def _gateway() -> Iterator[Series]:
    job = {**HOST, "job": "litellm", "role": "gateway"}
    yield Series("up", job, _flat(1))
    yield Series("litellm_in_flight_requests", job, lambda when: round(9 * load(when)))
    yield Series("process_resident_memory_bytes", job, lambda when: (0.7 + 0.05 * when) * GIB)
    yield Series("process_cpu_seconds_total", job, _grows(lambda when: 0.5 * load(when)))
    for pool in POOLS:
        for key, height in KEYS.items():
            yield from _asked(job | {"pool": pool, "requested_model": pool, "api_key_alias": key}, pool, height)
    yield from _fast_lane({**HOST, "job": "haproxy-fast-lane", "role": "balancer"})
    for key, height in KEYS.items():
        labels = job | {"api_key_alias": key, "hashed_api_key": f"hash-of-{key}", "instance": "gateway"}
        for kind, allowed in (("requests", 420.0), ("tokens", 60_000.0)):
            limit = labels | {"rate_limit_type": kind}
            used = allowed * height / 6.5
            yield Series("litellm_api_key_rate_limit_allowed_metric", limit, _flat(allowed))
            yield Series("litellm_api_key_rate_limit_used_metric", limit, _scaled(load, used))
        yield Series("litellm_api_key_max_budget_metric", labels, _flat(10))
        left = _flat(10 - height)
        yield Series("litellm_remaining_api_key_budget_metric", labels, left)


def _asked(labels: dict[str, str], pool: str, height: float) -> Iterator[Series]:
    """What the gateway says of one key's requests to a pool."""
    part = 0.8 if pool == "chat" else 0.2
    asks: Shape = lambda when: height * part * load(when)  # noqa: E731
    for status, share in (("200", 0.95), ("429", 0.03), ("500", 0.02)):
        counted = _grows(_scaled(asks, share))
        yield Series("litellm_proxy_total_requests_metric_total", labels | {"status_code": status}, counted)
    for status, kind, share in (
        ("429", "ProxyRateLimit", 0.03), ("500", "InternalServerError", 0.015), ("503", "Timeout", 0.005),
    ):  # fmt: skip
        counted = _grows(_scaled(asks, share))
        why = {"exception_status": status, "exception_class": kind}
        yield Series("litellm_proxy_failed_requests_metric_total", labels | why, counted)
    for name, each in (("input", 210.0), ("output", 42.0), ("total", 252.0), ("input_cached", 80.0)):
        tokens = _grows(_scaled(asks, each))
        yield Series(f"litellm_{name}_tokens_metric_total", labels, tokens)
    yield Series("litellm_spend_metric_total", labels, _grows(lambda when: asks(when) * 0.0004))
    slow = 1.0 if pool == "chat" else 0.15
    yield from _times("litellm_request_total_latency_metric", labels, asks, 4.0 * slow)
    yield from _times("litellm_llm_api_time_to_first_token_metric", labels, asks, 0.9 * slow)
    group = {key: value for key, value in labels.items() if key != "requested_model"} | {"model_group": pool}
    yield from _times("litellm_deployment_latency_per_output_token", group, asks, 0.04)
    yield from _times("litellm_overhead_latency_metric", group, asks, 0.02)


def _fast_lane(job: dict[str, str]) -> Iterator[Series]:
    """What HAProxy says of one key's requests that do not go through LiteLLM."""
    key = job | {"pool": "chat", "api_key_alias": "VISTA", "hashed_api_key": "hash-of-VISTA"}
    asks: Shape = lambda when: 4 * load(when)  # noqa: E731
    for status, share in (("200", 0.98), ("429", 0.02)):
        counted = _grows(_scaled(asks, share))
        yield Series("corral_fast_requests_total", key | {"status_code": status}, counted)
    for name, each in (("input_tokens", 210.0), ("output_tokens", 42.0), ("limited_requests", 0.05)):
        yield Series(f"corral_fast_{name}_total", key, _grows(_scaled(asks, each)))
    yield from _times("corral_fast_answer_seconds", job | {"pool": "chat"}, asks, 4.0)
    yield from _times("corral_fast_first_token_seconds", job | {"pool": "chat"}, asks, 0.9)


def _times(name: str, labels: dict[str, str], asks: Shape, middle: float) -> Iterator[Series]:
    """A histogram whose times grow with the load."""
    for edge in EDGES:
        limit = float(edge)

        def below(when: float, limit: float = limit) -> float:
            return asks(when) * (1 - math.exp(-limit / (middle * (0.4 + load(when)))))

        yield Series(f"{name}_bucket", labels | {"le": edge}, _grows(below))
    yield Series(f"{name}_count", labels, _grows(asks))
    yield Series(f"{name}_sum", labels, _grows(lambda when: asks(when) * middle * (0.4 + load(when))))


def _host() -> Iterator[Series]:
    job = {**HOST, "job": "node", "role": "host"}
    yield Series("up", job, _flat(1))
    for cpu in ("0", "1", "2", "3"):
        idle = _grows(lambda when: 1 - 0.6 * load(when))
        yield Series("node_cpu_seconds_total", job | {"cpu": cpu, "mode": "idle"}, idle)
        yield Series(
            "node_cpu_seconds_total", job | {"cpu": cpu, "mode": "user"}, _grows(lambda when: 0.6 * load(when))
        )
    for mountpoint, free in (("/", 41.0), ("/srv", 120.0)):
        disk = job | {"device": "/dev/sda1", "fstype": "ext4", "mountpoint": mountpoint}
        yield Series("node_filesystem_avail_bytes", disk, _sinks(free))
        yield Series("node_filesystem_size_bytes", disk, _flat(220 * GIB))
    for what, share in (("cpu", 0.2), ("io", 0.1), ("memory", 0.01)):
        waiting = _grows(_scaled(load, share))
        yield Series(f"node_pressure_{what}_waiting_seconds_total", job, waiting)
    yield Series("node_load5", job, lambda when: 3.5 * load(when))
    yield Series("node_memory_MemTotal_bytes", job, _flat(32 * GIB))
    yield Series("node_memory_MemAvailable_bytes", job, lambda when: (21 - 6 * load(when)) * GIB)
    yield Series("node_disk_io_time_seconds_total", job | {"device": "sda"}, _grows(lambda when: 0.3 * load(when)))
    for direction, rate in (("receive", 3e6), ("transmit", 1e6)):
        counted = _grows(_scaled(load, rate))
        yield Series(f"node_network_{direction}_bytes_total", job | {"device": "eth0"}, counted)
    yield Series("node_hwmon_temp_celsius", job | {"chip": "cpu", "sensor": "temp1"}, lambda when: 45 + 25 * load(when))
    yield Series("node_timex_offset_seconds", job, lambda when: 0.0004 * math.sin(20 * when))
    yield Series("node_vmstat_oom_kill", job, _flat(0))


def _kit() -> Iterator[Series]:
    """What `./generate.py figures` wrote, read by way of node-exporter; one container was started anew, one is down."""
    job = {**HOST, "job": "node", "role": "host"}
    facts = {"hash": "0123456789abcdef", "inventory": "fedcba9876543210", "version": "0.1.0"}
    yield Series("corral_rendering_info", job | facts, _flat(1))
    yield Series("corral_figures_scheduled", job, _flat(1))
    yield Series("corral_figures_timestamp_seconds", job, lambda when: BEGIN + when * SPAN_S - 20)
    yield Series("corral_backup_last_success_timestamp_seconds", job, _flat(BEGIN - 86_400))
    ends = _flat(BEGIN + 60 * 86_400)
    yield Series("corral_certificate_expires_timestamp_seconds", job | {"file": "/etc/ssl/farm/farm.pem"}, ends)
    for kind in ("rendering", "containers"):
        yield Series("corral_drift", job | {"kind": kind}, _flat(float(kind == "containers")))
    for _pool, labels in _replica_labels():
        container = job | {"service": labels["replica"].removeprefix("pea-"), "container": labels["replica"]}
        is_down = labels["replica"] == "pea-gpu-4"
        yield Series("corral_container_healthy", container, _flat(float(not is_down)))
        yield Series("corral_container_restarts_total", container, lambda when: float(when > 0.5))
        yield Series("corral_container_memory_bytes", container, lambda when: (1 + load(when)) * GIB)
        yield Series("corral_container_memory_limit_bytes", container, _flat(3 * GIB))
    for model, is_right in (("m", 1.0), ("e", 0.0)):
        yield Series("corral_weights_verified", job | {"model": model, "file": f"{model}.gguf"}, _flat(is_right))


def _stores() -> Iterator[Series]:
    database = {**HOST, "job": "postgres", "role": "database"}
    yield Series("up", database, _flat(1))
    yield Series("pg_up", database, _flat(1))
    yield Series("pg_database_size_bytes", database | {"datname": "litellm"}, lambda when: (1.2 + 0.02 * when) * GIB)
    yield Series("pg_stat_activity_count", database | {"state": "idle"}, lambda when: round(6 + 9 * load(when)))
    yield Series("pg_settings_max_connections", database, _flat(100))
    for name in ("xact_commit", "xact_rollback"):
        counted = _grows(lambda when: 12 * load(when))
        yield Series(f"pg_stat_database_{name}", database | {"datname": "litellm"}, counted)
    yield Series("pg_stat_database_deadlocks", database | {"datname": "litellm"}, _flat(0))
    cache = {**HOST, "job": "valkey", "role": "cache"}
    yield Series("up", cache, _flat(1))
    yield Series("redis_up", cache, _flat(1))
    yield Series("redis_memory_used_bytes", cache, lambda when: (9 + 20 * load(when)) * 1e6)
    yield Series("redis_memory_max_bytes", cache, _flat(128e6))
    yield Series("redis_commands_processed_total", cache, _grows(lambda when: 80 * load(when)))
    yield Series("redis_evicted_keys_total", cache, _flat(0))


def _alerts() -> Iterator[Series]:
    """What Prometheus itself writes about the alerts that fire."""
    firing = {"alertstate": "firing"}
    yield Series("ALERTS", firing | {"alertname": "Watchdog", "severity": "watchdog", "about": "monitoring"}, _flat(1))
    warm = firing | {"alertname": "PoolQueued", "severity": "warning", "about": "pool-queue", "pool": "chat"}
    yield Series("ALERTS", warm, _flat(1))
