"""monitoring/dashboards/*.json: the pages for Grafana, made of the pieces of tools/panels.py.

    python -m tools.dashboards            # or: make dashboards

Queries use the farm's own names (monitoring/rules) where there are some, so a page holds for every engine and exporter.
"""

from __future__ import annotations

import sys
from pathlib import Path

from corral.json_layout import laid_out
from tools.panels import (
    BAD,
    FINE,
    LOOK,
    PLAIN,
    TOKENS,
    Page,
    Query,
    Step,
    Variable,
    bars,
    lines,
    number,
    page,
    states,
    table,
    words_only,
)

FOLDER = Path(__file__).resolve().parents[1] / "monitoring" / "dashboards"
RATE = "$__rate_interval"

SOME_IS_BAD: tuple[Step, ...] = ((None, FINE), (1, BAD))
LESS_IS_BAD: tuple[Step, ...] = ((None, BAD), (1, FINE))
BUSY: tuple[Step, ...] = ((None, FINE), (1, LOOK))
FILL: tuple[Step, ...] = ((None, FINE), (0.8, LOOK), (0.95, BAD))
# A card is filled on purpose; only what leaves no room for the next allocation is worth a look.
CARD_FILL: tuple[Step, ...] = ((None, FINE), (0.95, LOOK), (0.98, BAD))
LEFT: tuple[Step, ...] = ((None, BAD), (0.1, LOOK), (0.25, FINE))
FAILING: tuple[Step, ...] = ((None, FINE), (0.01, LOOK), (0.05, BAD))
BURN: tuple[Step, ...] = ((None, FINE), (1, LOOK), (6, BAD))
SHARE: tuple[Step, ...] = ((None, FINE), (1.5, LOOK), (2, BAD))
# The sum of 1 for the owner's power limit, 2 for a weak supply and 4 for heat: one strip for each card, with words.
WHY_SLOW = {
    "0": "no", "1": "power limit", "2": "SUPPLY", "3": "SUPPLY", "4": "HEAT", "5": "HEAT", "6": "HEAT, SUPPLY",
    "7": "HEAT, SUPPLY",
}  # fmt: skip
UP_DOWN = {"0": "DOWN", "1": "up"}

HOST = Variable("host", "Host", "host:up", "host")
GPU_HOST = Variable("host", "Host", "gpu:temperature:celsius", "host")
GPU = Variable("gpu", "Card", "gpu:temperature:celsius", "gpu", ("host",))
POOL = Variable("pool", "Pool", "pool:slots", "pool")
KEY = Variable("key", "Key", "key:requests:rate5m", "api_key_alias")

ON_GPU = 'host=~"$host", gpu=~"$gpu"'
ON_POOL = 'pool=~"$pool"'
ON_HOST = 'host=~"$host"'
OF_KEY = 'api_key_alias=~"$key"'
CARD = "{{host}} GPU {{gpu}}"
P50 = "10,10"

FARM = Page(
    "corral-farm",
    "Farm",
    "Health, load, queues and problems of the farm",
    {
        "Health": [
            number(
                "Firing alerts", "Critical and warning; each has a runbook.", "none",
                Query('count(ALERTS{alertstate="firing", severity=~"critical|warning"}) or vector(0)', "alerts"),
                steps=SOME_IS_BAD,
            ),
            number(
                "Targets down", "Targets that Prometheus cannot scrape.", "none",
                Query("count(up == 0) or vector(0)", "targets down"), steps=SOME_IS_BAD,
            ),
            number(
                "Pools without a replica", "Every request to such a pool fails.", "none",
                Query("count(pool:replicas_routable == 0) or vector(0)", "pools down"), steps=SOME_IS_BAD,
            ),
            number(
                "Replicas in use", "Share of replicas to which the balancer sends requests.", "percentunit",
                Query("sum(pool:replicas_routable) / sum(pool:replicas)", "in use"), steps=LESS_IS_BAD,
            ),
            number(
                "Failed requests", "Share over five minutes, all pools, without client errors.", "percentunit",
                Query("sum(pool:failures:rate5m) / sum(pool:requests:rate5m)", "failing"), steps=FAILING,
            ),
            number(
                "GPUs found", "GPUs that the driver lists, to compare with the inventory.", "none",
                Query(
                    "count(group by (host, gpu) (gpu:info)) or 0 * count(up)", "cards"
                ), steps=LESS_IS_BAD,
            ),
        ],
        "Load": [
            bars(
                "Slots in use", "Running requests per slot of a pool; at 100 % new requests wait.", "percentunit",
                Query("pool:busy:ratio", "{{pool}}"), steps=BUSY,
            ),
            lines(
                "Requests", "Requests per second of each pool, averaged over five minutes.", "reqps",
                Query("pool:requests:rate5m", "{{pool}}"), is_stacked=True,
            ),
            lines(
                "Generated tokens", "Generated tokens per second of each pool.", TOKENS,
                Query("pool:generated_tokens:rate5m", "{{pool}}"), is_stacked=True,
            ),
            bars(
                "Busiest keys", "Requests per second of the ten busiest keys.", "reqps",
                Query("topk(10, sum by (api_key_alias) (key:requests:rate5m))", "{{api_key_alias}}"),
            ),
            lines(
                "Busy replicas", "Running requests per slot of a replica.", "percentunit",
                Query("replica:busy:ratio", "{{replica}}"), top=1, width=16,
            ),
        ],
        "Queues": [
            lines(
                "Queue", "Requests that wait in the balancer for a slot.", "none", Query("pool:queue", "{{pool}}"),
            ),
            lines(
                "Time in the queue", "Average over the last 1024 requests.", "s",
                Query("pool:queue_time:seconds", "{{pool}}"),
            ),
            lines(
                "Refused without a free slot", "Requests per second: full queue, or timeout in the queue.", "reqps",
                Query("pool:refused:rate5m", "{{pool}}"),
            ),
        ],
        "Problems": [
            table(
                "Alerts", ("One line per firing alert; Watchdog always fires and shows that alerting works.", "none"),
                Query('ALERTS{alertstate="firing"}', ""),
                {"alertname": "Alert", "severity": "Severity", "host": "Host", "pool": "Pool", "replica": "Replica"},
                words={"1": "fires"},
            ),
            lines(
                "Failed requests", "Share of each pool; above the lines it violates the objective.",
                "percentunit", Query("pool:failures:ratio5m", "{{pool}}"), width=12, steps=FAILING,
            ),
            lines(
                "First token", "95th percentile of the time to the first token of streamed answers.", "s",
                Query("pool:first_token:p95_5m", "{{pool}}"),
            ),
            lines(
                "Hottest GPU", "Of each host, and the limit of its kind of GPU.", "celsius",
                Query("max by (host) (gpu:temperature:celsius)", "{{host}}"),
                Query("min by (host) (threshold:gpu_hot_celsius)", "{{host}}: limit", dashes=P50), low=20,
            ),
            bars(
                "Free disk space", "The fullest disk of each host.", "percentunit",
                Query("min by (host) (host:disk_free:ratio)", "{{host}}"), steps=LEFT,
            ),
        ],
        "Agreement with the inventory": [
            table(
                "Rendering of each host", ("Hashes of rendering and inventory at the last check.", "none"),
                Query("corral_rendering_info", ""),
                {"host": "Host", "hash": "Rendering", "inventory": "Inventory", "version": "Kit"},
                words={"1": "known"},
            ),
            states(
                "Drift", "Whether inventory, rendering, its copy on a remote host, and containers agree.",
                Query("host:drift", "{{host}}: {{kind}}"), steps=SOME_IS_BAD, words={"0": "agrees", "1": "DIFFERS"},
            ),
            number(
                "Unhealthy containers", "Planned containers that are missing, stopped, or unhealthy.", "none",
                Query("count(container:healthy == 0) or 0 * count(container:healthy)", "containers"), steps=SOME_IS_BAD,
            ),
            number(
                "Restarts", "Restarts by Docker in half an hour, all containers.", "none",
                Query("sum(container:restarts:increase30m)", "restarts"), steps=SOME_IS_BAD,
            ),
            number(
                "Damaged model files", "Missing, truncated or damaged files.", "none",
                Query("count(host:weights_verified == 0) or 0 * count(host:drift)", "files"), steps=SOME_IS_BAD,
            ),
            number(
                "Verified model files", "Files whose pinned checksum was verified since their last change.", "none",
                Query("count(host:weights_verified == 1) or 0 * count(host:drift)", "files"),
            ),
            number(
                "Oldest backup", "Age of the oldest backup of a host.", "s",
                Query("max(host:backup_age:seconds)", "age"),
            ),
            number(
                "Age of these metrics", "Time since the kit last wrote them; a timer does it every minute.", "s",
                Query("max(host:figures_age:seconds)", "age"),
            ),
            bars(
                "Memory of containers", "Share of the memory limit; the ten fullest containers.", "percentunit",
                Query("topk(10, container:memory:ratio)", "{{container}}"), steps=FILL,
            ),
        ],
    },
)  # fmt: skip

CARDS = Page(
    "corral-gpu",
    "GPU",
    "Temperature, memory, power and errors of every GPU",
    {
        "Now": [
            number(
                "Hottest GPU", "Temperature of the hottest selected GPU.", "celsius",
                Query(f"topk(1, gpu:temperature:celsius{{{ON_GPU}}})", CARD),
            ),
            number(
                "Fullest memory", "Above 95 % the next allocation may fail.", "percentunit",
                Query(f"topk(1, gpu:memory_used:bytes{{{ON_GPU}}} / gpu:memory_total:bytes{{{ON_GPU}}})", CARD),
                steps=CARD_FILL,
            ),
            number("Power", "Sum of the selected GPUs.", "watt", Query(f"sum(gpu:power:watts{{{ON_GPU}}})", "total")),
            number(
                "Throttled GPUs", "By temperature or power supply; power limits do not count.", "none",
                Query(f'count(gpu:throttled{{{ON_GPU}, reason!="power limit"}} > 0) or vector(0)', "cards"),
                steps=SOME_IS_BAD,
            ),
            number(
                "Driver errors (Xid)", "GPUs with an error in the last hour.", "none",
                Query(f"count(gpu:xid_recent{{{ON_GPU}}} > 0) or vector(0)", "cards"), steps=SOME_IS_BAD,
            ),
            number(
                "Exporter", "Whether the exporter of every host can read its GPUs.", "none",
                Query(f"min(gpu:exporter_works{{{ON_HOST}}})", "figures"), steps=LESS_IS_BAD,
                words={"0": "BLIND", "1": "works"},
            ),
        ],
        "Load": [
            lines(
                "Utilization", "Share of time in which the GPU was busy.", "percentunit",
                Query(f"gpu:utilization:ratio{{{ON_GPU}}}", CARD), top=1, width=12,
            ),
            lines(
                "Memory in use", "Share of the GPU's memory; a server allocates weights and context at start.",
                "percentunit",
                Query(f"gpu:memory_used:bytes{{{ON_GPU}}} / gpu:memory_total:bytes{{{ON_GPU}}}", CARD), top=1,
                steps=CARD_FILL, width=12,
            ),
            lines(
                "Generated tokens", "Generated tokens per second of the models on a GPU.", TOKENS,
                Query(
                    f"sum by (host, gpu) (replica:generated_tokens:rate5m{{{ON_GPU}}})", CARD
                ), width=12,
            ),
            lines(
                "Requests at work", "Of the models on a card.", "none",
                Query(f"sum by (host, gpu) (replica:in_flight{{{ON_GPU}}})", CARD), width=12,
            ),
        ],
        "Temperature and power": [
            lines(
                "Temperature", "Dashed: thresholds of the inventory for this kind of GPU.", "celsius",
                Query(f"gpu:temperature:celsius{{{ON_GPU}}}", CARD),
                Query(f"min by (card) (threshold:gpu_warm_celsius{{{ON_GPU}}})", "{{card}}: warm", dashes="4,6"),
                Query(f"min by (card) (threshold:gpu_hot_celsius{{{ON_GPU}}})", "{{card}}: hot", dashes=P50),
                low=20, width=12,
            ),
            lines(
                "Power", "Dashed: the power limit of the GPU.", "watt",
                Query(f"gpu:power:watts{{{ON_GPU}}}", CARD),
                Query(f"max by (card) (gpu:power_limit:watts{{{ON_GPU}}})", "{{card}}: limit", dashes=P50),
                width=12,
            ),
            lines(
                "Fans", "Share of the maximum speed.", "percentunit", Query(f"gpu:fan:ratio{{{ON_GPU}}}", CARD), top=1,
                width=12,
            ),
            lines("Clock", "Of the multiprocessors.", "hertz", Query(f"gpu:clock:hertz{{{ON_GPU}}}", CARD), width=12),
        ],
        "Errors": [
            states(
                "Throttling", "Reasons for a reduced clock. A power limit is intended.",
                Query(
                    f'sum by (host, gpu) (gpu:throttled{{reason="power limit", {ON_GPU}}} '
                    f'or 2 * gpu:throttled{{reason="power supply", {ON_GPU}}} '
                    f'or 4 * gpu:throttled{{reason="heat", {ON_GPU}}})', CARD,
                ),
                words=WHY_SLOW, steps=((None, FINE), (1, PLAIN), (2, LOOK), (4, BAD)),
            ),
            lines(
                "PCIe lanes", "Fewer lanes than usual under load: check riser and slot; models load slowly.", "none",
                Query(f"gpu:pcie_width:lanes{{{ON_GPU}}}", CARD), width=12,
            ),
            table(
                "Driver errors", ("1: within the last hour; see the runbook GpuXid.", "none"),
                Query(f"gpu:xid_recent{{{ON_GPU}}}", ""),
                {"host": "Host", "gpu": "Card", "card": "Kind", "xid": "Xid"},
                words={"0": "over", "1": "recent"},
            ),
            table(
                "Recovery action", ("0: none.", "none"), Query(f"gpu:recovery_action{{{ON_GPU}}}", ""),
                {"host": "Host", "gpu": "Card", "card": "Kind"},
                words={"0": "nothing", "1": "reset", "2": "reboot", "3": "drain", "4": "drain, reset"},
            ),
        ],
    },
    (GPU_HOST, GPU),
)  # fmt: skip

MODELS = Page(
    "corral-pool",
    "Model and pool",
    "Latency, load and balance of a pool",
    {
        "Latency": [
            lines(
                "First token", "Time to the first token of streamed answers: p50 (dashed) and p95.", "s",
                Query(f"pool:first_token:p95_5m{{{ON_POOL}}}", "{{pool}} p95"),
                Query(f"pool:first_token:p50_5m{{{ON_POOL}}}", "{{pool}} p50", dashes=P50), width=12,
            ),
            lines(
                "Whole answer", "From the request to the last token: p50 (dashed) and p95.", "s",
                Query(f"pool:answer:p95_5m{{{ON_POOL}}}", "{{pool}} p95"),
                Query(f"pool:answer:p50_5m{{{ON_POOL}}}", "{{pool}} p50", dashes=P50), width=12,
            ),
        ],
        "Objectives": [
            lines(
                "Goodput", "Answers per second within the objective; dashed: all requests.", "reqps",
                Query(
                    f'(pool:total:increase_5m{{objective="answer", {ON_POOL}}} - '
                    f'pool:bad:increase_5m{{objective="answer", {ON_POOL}}}) / 300', "{{pool}} in time",
                ),
                Query(f"pool:requests:rate5m{{{ON_POOL}}}", "{{pool}} all", dashes=P50), width=12,
            ),
            lines(
                "Use of the error budget",
                "1: the error budget lasts exactly one month; 14.4 raises a critical alert.", "none",
                Query(
                    f"pool:bad:ratio_1h{{{ON_POOL}}} / on (pool, objective) objective:error_budget",
                    "{{pool}} {{objective}}",
                ),
                steps=BURN, width=12,
            ),
            lines(
                "Failed requests", "Share of failed requests, without client errors.", "percentunit",
                Query(f"pool:failures:ratio5m{{{ON_POOL}}}", "{{pool}}"), steps=FAILING, width=12,
            ),
            lines(
                "Refused requests", "Without a free slot; dashed: above a limit of the key or the pool.",
                "reqps", Query(f"pool:refused:rate5m{{{ON_POOL}}}", "{{pool}} no slot"),
                Query(f"pool:limited:rate5m{{{ON_POOL}}}", "{{pool}} limit", dashes=P50), width=12,
            ),
        ],
        "Capacity": [
            lines(
                "Queue", "Requests that wait for a slot.", "none", Query(f"pool:queue{{{ON_POOL}}}", "{{pool}}"),
                width=12,
            ),
            lines(
                "Slots", "Running requests, and slots (dashed).", "none",
                Query(f"pool:in_flight{{{ON_POOL}}}", "{{pool}} running"),
                Query(f"pool:slots{{{ON_POOL}}}", "{{pool}} slots", dashes=P50), width=12,
            ),
        ],
        "Tokens": [
            lines(
                "Tokens", "Prompt tokens (dashed) and generated tokens, per second.", TOKENS,
                Query(f"pool:generated_tokens:rate5m{{{ON_POOL}}}", "{{pool}} generated"),
                Query(f"pool:prompt_tokens:rate5m{{{ON_POOL}}}", "{{pool}} prompt", dashes=P50), width=12,
            ),
            lines(
                "Time per token", "Mean time between two tokens of an answer.", "s",
                Query(f"pool:time_per_token:mean5m{{{ON_POOL}}}", "{{pool}}"), width=12,
            ),
            lines(
                "Speed of a replica", "Tokens per second of generation time.", TOKENS,
                Query(f"replica:generation_speed:rate5m{{{ON_POOL}}}", "{{replica}}"), width=12,
            ),
            lines(
                "Cache hits", "Share of prompt tokens that were in a replica's cache.", "percentunit",
                Query(
                    f"replica:cached_tokens:rate5m{{{ON_POOL}}} / "
                    f"(replica:cached_tokens:rate5m{{{ON_POOL}}} + replica:prompt_tokens:rate5m{{{ON_POOL}}} > 0)",
                    "{{replica}}",
                ), top=1, width=12,
            ),
        ],
        "Balance": [
            lines(
                "Requests per slot", "Equal lines mean equal load.", "reqps",
                Query(f"replica:requests:rate5m{{{ON_POOL}}} / replica:slots{{{ON_POOL}}}", "{{replica}}"), width=12,
            ),
            lines(
                "Imbalance", "Load of the busiest replica relative to the mean; 1 is balanced.", "none",
                Query(f"pool:imbalance:ratio{{{ON_POOL}}}", "{{pool}}"), steps=SHARE, width=12,
            ),
            states(
                "Replicas", "Whether the balancer sends requests to it.",
                Query(f"replica:routable{{{ON_POOL}}}", "{{replica}}"), words=UP_DOWN, width=24, steps=LESS_IS_BAD,
            ),
        ],
    },
    (POOL,),
)  # fmt: skip

KEYS = Page(
    "corral-keys",
    "Keys",
    "Usage, refusals and costs of every key",
    {
        "Limits": [
            bars(
                "Use of the limits", "Share of the limit per minute; at 100 % requests are refused.", "percentunit",
                Query(f"key:limit_used:ratio{{{OF_KEY}}}", "{{api_key_alias}} {{rate_limit_type}}"), width=12,
                steps=FILL,
            ),
            bars(
                "Budget left", "Remaining share of the budget of each key.", "percentunit",
                Query(f"key:budget_left:ratio{{{OF_KEY}}}", "{{api_key_alias}}"), width=12, steps=LEFT,
            ),
        ],
        "Requests": [
            lines(
                "Requests", "Per second, all answers.", "reqps",
                Query(f"sum by (api_key_alias) (key:requests:rate5m{{{OF_KEY}}})", "{{api_key_alias}}"),
            ),
            lines(
                "Refused", "Requests above a limit or budget (429), per second.", "reqps",
                Query(
                    f'sum by (api_key_alias) (key:requests:rate5m{{status_code="429", {OF_KEY}}}) '
                    f"or 0 * sum by (api_key_alias) (key:requests:rate5m{{{OF_KEY}}})", "{{api_key_alias}}",
                ),
            ),
            lines(
                "Failed", "Answers other than 2xx and 429, per second.", "reqps",
                Query(
                    f'sum by (api_key_alias) (key:requests:rate5m{{status_code!~"2..|429", {OF_KEY}}}) '
                    f"or 0 * sum by (api_key_alias) (key:requests:rate5m{{{OF_KEY}}})", "{{api_key_alias}}",
                ),
            ),
        ],
        "Tokens and spending": [
            lines(
                "Tokens", "Prompt and generated tokens, per second.", TOKENS,
                Query(f"sum by (api_key_alias) (key:tokens:rate5m{{{OF_KEY}}})", "{{api_key_alias}}"),
                width=12, is_stacked=True,
            ),
            lines(
                "Models used", "Tokens per second by key and pool.", TOKENS,
                Query(f"key:tokens:rate5m{{{OF_KEY}}}", "{{api_key_alias}} → {{pool}}"), width=12,
            ),
            lines(
                "Spend", "US dollars since the gateway started; prices of local models come from the inventory.",
                "currencyUSD", Query(f"key:spend:total{{{OF_KEY}}}", "{{api_key_alias}}"), width=12,
            ),
            table(
                "Spend in the chosen time", ("US dollars.", "currencyUSD"),
                Query(f"sum by (api_key_alias) (increase(litellm_spend_metric_total{{{OF_KEY}}}[$__range]))", ""),
                {"api_key_alias": "Key"},
            ),
        ],
    },
    (KEY,),
)  # fmt: skip

GATEWAY = Page(
    "corral-gateway",
    "Gateway and balancer",
    "LiteLLM, HAProxy and their stores",
    {
        "Gateway": [
            lines(
                "Answers", "Per second, by status.", "reqps",
                Query("sum by (status_code) (key:requests:rate5m)", "{{status_code}}"), is_stacked=True,
            ),
            lines("Requests at work", "In all its processes.", "none", Query("gateway:in_flight", "{{host}}")),
            lines(
                "Overhead", "95th percentile of the time that the gateway adds to a request.", "s",
                Query("pool:overhead:p95_5m", "{{pool}}"),
            ),
            lines(
                "Memory", "Memory of the gateway's process; constant growth indicates a leak.", "bytes",
                Query('process_resident_memory_bytes{role="gateway"}', "{{host}}"),
            ),
            lines(
                "Processor", "CPU cores that the gateway uses.", "none",
                Query(f'rate(process_cpu_seconds_total{{role="gateway"}}[{RATE}])', "{{host}} cores"),
            ),
            states(
                "Programs", "Whether gateway and balancer answer Prometheus.",
                Query('up{role=~"gateway|balancer"}', "{{job}} on {{host}}"), words=UP_DOWN, width=8,
                steps=LESS_IS_BAD,
            ),
        ],
        "Balancer": [
            states(
                "Replicas", "Whether the balancer sends requests to it.", Query("replica:routable", "{{replica}}"),
                words=UP_DOWN, steps=LESS_IS_BAD,
            ),
            lines(
                "Sessions", "Running requests of each pool, and queued ones (dashed).", "none",
                Query("pool:in_flight", "{{pool}}"), Query("pool:queue", "{{pool}} waits", dashes=P50), width=12,
            ),
            lines(
                "Answer time", "Mean of a replica's last 1024 requests.", "s",
                Query("replica:answer_time:seconds", "{{replica}}"), width=12,
            ),
            lines(
                "Errors", "5xx answers and failed connections of a replica, per second.", "reqps",
                Query("replica:errors:rate5m", "{{replica}}"), width=12,
            ),
            lines(
                "Health checks", "Duration of a replica's health check.", "s",
                Query('haproxy_server_check_duration_seconds{pool!=""}', "{{server}}"),
            ),
            lines(
                "Retries", "Requests per second that moved to another replica without being started.", "reqps",
                Query(f"sum by (proxy) (rate(haproxy_backend_retry_warnings_total[{RATE}]))", "{{proxy}}"),
            ),
            lines(
                "Client aborts", "Clients per second that disconnected before their answer.", "reqps",
                Query(f"sum by (proxy) (rate(haproxy_backend_client_aborts_total[{RATE}]))", "{{proxy}}"),
            ),
        ],
        "Stores": [
            lines(
                "Database connections", "Share of PostgreSQL's maximum.", "percentunit",
                Query("database:connections:ratio", "{{host}}"), top=1, steps=FILL,
            ),
            lines("Database size", "By database.", "bytes", Query("database:size:bytes", "{{host}} {{datname}}")),
            lines(
                "Database transactions", "Per second.", "ops", Query("database:transactions:rate5m", "{{host}}"),
            ),
            lines(
                "Counters: memory", "Share of Valkey's limit; when full, it evicts counters.", "percentunit",
                Query("cache:memory:ratio", "{{host}}"), top=1, steps=FILL,
            ),
            lines("Counters: commands", "Per second.", "ops", Query("cache:commands:rate5m", "{{host}}")),
            lines(
                "Evicted counters", "Evictions in 15 minutes because of missing memory.", "none",
                Query("cache:evicted:increase15m", "{{host}}"),
            ),
        ],
    },
)  # fmt: skip

HOSTS = Page(
    "corral-host",
    "Host",
    "Processors, memory, disks, network and clocks of the machines",
    {
        "Load": [
            lines(
                "Processors", "Share of time in which they were busy.", "percentunit",
                Query(f"host:cpu:ratio{{{ON_HOST}}}", "{{host}}"), top=1, steps=FILL,
            ),
            lines(
                "Load per core", "Running or waiting threads per core.", "none",
                Query(f"host:load_per_core{{{ON_HOST}}}", "{{host}}"),
            ),
            lines(
                "Pressure", "Share of time in which a program waited for the resource.", "percentunit",
                Query(f"rate(node_pressure_cpu_waiting_seconds_total{{{ON_HOST}}}[{RATE}])", "{{host}} processor"),
                Query(f"rate(node_pressure_io_waiting_seconds_total{{{ON_HOST}}}[{RATE}])", "{{host}} disk",
                      dashes=P50),
                Query(f"rate(node_pressure_memory_waiting_seconds_total{{{ON_HOST}}}[{RATE}])", "{{host}} memory",
                      dashes="4,6"),
            ),
        ],
        "Memory": [
            lines(
                "Memory", "Used memory; dashed: total.", "bytes",
                Query(f"host:memory_used:bytes{{{ON_HOST}}}", "{{host}}"),
                Query(f"host:memory_total:bytes{{{ON_HOST}}}", "{{host}} has", dashes=P50), width=16,
            ),
            number(
                "Out-of-memory kills", "Processes that the kernel killed in the last hour.", "none",
                Query(f"sum(increase(node_vmstat_oom_kill{{{ON_HOST}}}[1h]))", "programs"), width=8, steps=SOME_IS_BAD,
            ),
        ],
        "Disks and network": [
            bars(
                "Disk left", "Of each file system.", "percentunit",
                Query(f"host:disk_free:ratio{{{ON_HOST}}}", "{{host}} {{mountpoint}}"), steps=LEFT,
            ),
            lines(
                "Disk busy", "Share of time in which the busiest disk was active.", "percentunit",
                Query(f"host:disk_busy:ratio{{{ON_HOST}}}", "{{host}}"), top=1,
            ),
            lines(
                "Network", "Without loopback and containers.", "Bps",
                Query(f"host:network:rate5m{{{ON_HOST}}}", "{{host}} {{direction}}"),
            ),
        ],
        "Temperature and clock": [
            lines(
                "Hottest sensor", "Cards left out.", "celsius",
                Query(f"host:temperature:celsius{{{ON_HOST}}}", "{{host}}"), low=20, width=12,
            ),
            lines(
                "Clock", "Offset from the time servers; above 0: ahead.", "s",
                Query(f"node_timex_offset_seconds{{{ON_HOST}}}", "{{host}}"), low=0, width=12,
            ),
        ],
    },
    (HOST,),
)  # fmt: skip

JOBS = Page(
    "corral-jobs",
    "Jobs",
    "Place for batch jobs",
    {
        "Not yet": [
            words_only(
                "Nothing to see yet",
                "The kit has no batch jobs with metrics of their own yet. Requests of a job are on "
                "[Keys](/d/corral-keys), under the job's key.",
            )
        ]
    },
)

PAGES = (FARM, CARDS, MODELS, KEYS, GATEWAY, HOSTS, JOBS)


def texts() -> dict[str, str]:
    """Every dashboard's file name and text."""
    return {f"{made.uid.removeprefix('corral-')}.json": laid_out(page(made)) for made in PAGES}


def main() -> int:
    """Writes the dashboards and removes what is none any more."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
