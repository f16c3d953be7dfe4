"""Langfuse: traces of requests for people, with its own stores, headless from the first start. Compose hosts only.

Its stores are on a network of their own: SeaweedFS has doors without a lock, and nobody but Langfuse needs any of them.
Variables are those of Langfuse 4.16 (web/src/env.mjs, worker/src/env.ts); tests/consumers knows them by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from corral.components import Stage, postgres
from corral.config.inventory import Tracing
from corral.contributions import (
    ConfigMount,
    Contribution,
    Contributions,
    Endpoint,
    File,
    Health,
    Port,
    Secret,
    Service,
    State,
    TraceReceiver,
)
from corral.plan.site import Site, bracketed

STAGE = Stage.DASHBOARDS
COMPONENT = "langfuse"
IMAGES = {
    "langfuse": "docker.langfuse.com/langfuse/langfuse:4.16.0",
    "langfuse-worker": "docker.langfuse.com/langfuse/langfuse-worker:4.16.0",
    "langfuse-clickhouse": "clickhouse/clickhouse-server:25.12",
    "langfuse-postgres": "postgres:18.6",
    "langfuse-seaweedfs": "chrislusf/seaweedfs:4.44",
    "langfuse-valkey": "valkey/valkey:9.1.2",
}
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
# Langfuse's name for the gateway's key, its `public key`: as good as any, for every Langfuse has names of its own.
USER = "pk-lf-corral"
PUBLIC_KEY = "LANGFUSE_PUBLIC_KEY"
PASSWORD = "LANGFUSE_ADMIN_PASSWORD"  # noqa: S105 - the secret's name
PROJECT_KEY = "LANGFUSE_SECRET_KEY"
NEXTAUTH = "LANGFUSE_NEXTAUTH_SECRET"
SALT = "LANGFUSE_SALT"
ENCRYPTION_KEY = "LANGFUSE_ENCRYPTION_KEY"
DATABASE_PASSWORD = "LANGFUSE_POSTGRES_PASSWORD"  # noqa: S105 - the secret's name
DATABASE_URL = "LANGFUSE_DATABASE_URL"
# Langfuse's role owns its database and is no superuser.
DATABASE, ROLE = "langfuse", "langfuse_app"
DATABASE_START = "/etc/corral/postgres.sh"
CLICKHOUSE_PASSWORD = "LANGFUSE_CLICKHOUSE_PASSWORD"  # noqa: S105 - the secret's name
VALKEY_PASSWORD = "LANGFUSE_VALKEY_PASSWORD"  # noqa: S105 - the secret's name
VALKEY_USERS = "LANGFUSE_VALKEY_USERS"
S3_KEY = "LANGFUSE_S3_KEY"
S3_CONFIG = "LANGFUSE_S3_CONFIG"
SECRETS = {
    PASSWORD: "password of Langfuse's user `operator@corral.internal`, taken when Langfuse first starts",
    NEXTAUTH: "signs the sessions of people in Langfuse",
    SALT: "hashes the API keys in Langfuse's database; never change it",
    DATABASE_PASSWORD: "password of Langfuse's PostgreSQL",
    CLICKHOUSE_PASSWORD: "password of Langfuse's ClickHouse",
    VALKEY_PASSWORD: "password of Langfuse's queues",
    S3_KEY: "opens Langfuse's store of raw events",
}
# Variables of both programs that are secrets, and the secret that each gets.
VARIABLES = {
    "DATABASE_URL": DATABASE_URL,
    "SALT": SALT,
    "ENCRYPTION_KEY": ENCRYPTION_KEY,
    "CLICKHOUSE_PASSWORD": CLICKHOUSE_PASSWORD,
    "REDIS_AUTH": VALKEY_PASSWORD,
    "LANGFUSE_S3_EVENT_UPLOAD_SECRET_ACCESS_KEY": S3_KEY,
}
WEB_VARIABLES = {
    "LANGFUSE_INIT_PROJECT_PUBLIC_KEY": PUBLIC_KEY,
    "NEXTAUTH_SECRET": NEXTAUTH,
    "LANGFUSE_INIT_PROJECT_SECRET_KEY": PROJECT_KEY,
    "LANGFUSE_INIT_USER_PASSWORD": PASSWORD,
}
BUCKET = "langfuse"
S3_IDENTITY = (
    '{{"identities": [{{"name": "langfuse", "credentials": [{{"accessKey": "langfuse", "secretKey": "{'
    + S3_KEY
    + '}"}}],'
    ' "actions": ["Read:langfuse", "Write:langfuse", "List:langfuse", "Tagging:langfuse"]}}]}}\n'
)
# ClickHouse's tables about itself, but for query_log, in which Langfuse looks for its own queries.
OWN_LOGS = (
    "asynchronous_metric_log", "error_log", "latency_log", "metric_log", "opentelemetry_span_log", "part_log",
    "processors_profile_log", "query_metric_log", "query_thread_log", "query_views_log", "session_log", "text_log",
    "trace_log",
)  # fmt: skip
START = "/etc/corral/start.sh"
OTLP_PATH = "/api/public/otel"
NETWORK = "traces"
WRITES = "Prisma and Next.js write beside the program; it was never tried on a read-only root here"
OWN_PASSWORD = "Langfuse's own users and keys; sign-up is off"  # noqa: S105 - a reason
STORES = ("langfuse-clickhouse", "langfuse-postgres", "langfuse-seaweedfs", "langfuse-valkey")


def announce(site: Site) -> Iterator[Contribution]:
    """The receiver of the gateway's traces, and the key with which the gateway comes."""
    tracing, gateway = site.inventory.tracing, site.inventory.gateway
    if tracing is None or tracing.host is None:
        return
    endpoint = Endpoint(tracing.port, tracing.host, COMPONENT)
    for host in dict.fromkeys((tracing.host, gateway.host)):
        yield Secret(PROJECT_KEY, host, "key of the gateway in Langfuse", "sk")
    headers = f"Authorization=Basic {{{PROJECT_KEY}:basic {USER}}},x-langfuse-ingestion-version=4"
    yield Secret(HEADERS, gateway.host, "the gateway's key as Langfuse wants it", template=headers)
    is_outside = site.is_outside(endpoint, gateway.host)
    base = f"https://{{}}/{COMPONENT}" if is_outside else "http://{}"
    url = base.format(site.address(endpoint, gateway.host)) + OTLP_PATH
    yield TraceReceiver(url, HEADERS, is_outside=is_outside, endpoint=endpoint)


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """Langfuse's two programs and their four stores, where the inventory wants them."""
    tracing = site.inventory.tracing
    if tracing is None or tracing.host is None:
        return
    host = tracing.host
    yield from _secrets(host)
    yield File(host, COMPONENT, "start.sh", asset="langfuse/start.sh")
    yield File(host, COMPONENT, "postgres.sh", asset=postgres.SCRIPT)
    yield File(host, COMPONENT, "clickhouse.yaml", data=clickhouse(), note="merged into ClickHouse's own settings")
    yield _web(site, host, tracing)
    yield _worker(site, host, tracing)
    yield _clickhouse(site, host, tracing)
    yield _postgres(site, host)
    yield _seaweedfs(site, host)
    yield _valkey(site, host)
    yield from _states(host)


def clickhouse() -> dict[str, Any]:
    """ClickHouse's settings: the logs of itself that it keeps as tables would grow without end."""
    return {
        "logger": {"level": "warning", "console": 1, "log": {"@remove": "1"}, "errorlog": {"@remove": "1"}},
        "query_log": {"ttl": "event_date + INTERVAL 3 DAY DELETE"},
        **{name: {"@remove": "1"} for name in OWN_LOGS},
    }


def _secrets(host: str) -> Iterator[Secret]:
    yield from (Secret(name, host, purpose) for name, purpose in SECRETS.items())
    yield Secret(PUBLIC_KEY, host, "name of the gateway's key in Langfuse", template=USER)
    yield Secret(ENCRYPTION_KEY, host, "encrypts what people entrust to Langfuse; never change it", "hex64")
    url = f"postgresql://{ROLE}:{{{DATABASE_PASSWORD}:url}}@langfuse-postgres:5432/{DATABASE}"
    yield Secret(DATABASE_URL, host, "address of Langfuse's database", template=url)
    users = f"user default on #{{{VALKEY_PASSWORD}:sha256}} ~* &* +@all\n"
    yield Secret(VALKEY_USERS, host, "users file of Langfuse's queues", template=users)
    yield Secret(S3_CONFIG, host, "users of Langfuse's store of raw events", template=S3_IDENTITY)


def _states(host: str) -> Iterator[State]:
    dump, load = postgres.dump_and_load("--username", ROLE, "--dbname", DATABASE)
    yield State(
        host, "langfuse-postgres", "traces-projects", "Langfuse's users, projects and keys", "traces-database",
        "/var/lib/postgresql",
        dump=dump, load=load,
    )  # fmt: skip
    yield State(
        host, "langfuse-clickhouse", "traces", "the traces themselves", "traces-clickhouse", "/var/lib/clickhouse"
    )
    yield State(host, "langfuse-seaweedfs", "traces-events", "traces as they came in", "traces-events", "/data")


def _environment(site: Site, host: str, tracing: Tracing) -> dict[str, str]:
    """What both programs of Langfuse are told."""
    return {
        "CLICKHOUSE_CLUSTER_ENABLED": "false",
        "CLICKHOUSE_MIGRATION_URL": "clickhouse://langfuse-clickhouse:9000",
        "CLICKHOUSE_URL": "http://langfuse-clickhouse:8123",
        "CLICKHOUSE_USER": "langfuse",
        "CORRAL_SECRETS_DIR": site.secret_path(host, "").rstrip("/"),
        "HOSTNAME": "0.0.0.0",  # noqa: S104 - else the address that Docker gave, where no health check asks
        "LANGFUSE_S3_EVENT_UPLOAD_ACCESS_KEY_ID": "langfuse",
        "LANGFUSE_S3_EVENT_UPLOAD_BUCKET": BUCKET,
        "LANGFUSE_S3_EVENT_UPLOAD_ENDPOINT": "http://langfuse-seaweedfs:8333",
        "LANGFUSE_S3_EVENT_UPLOAD_FORCE_PATH_STYLE": "true",
        "LANGFUSE_S3_EVENT_UPLOAD_PREFIX": "events/",
        "LANGFUSE_S3_EVENT_UPLOAD_REGION": "us-east-1",
        "NEXTAUTH_URL": f"http://{bracketed(site.host(host).address)}:{tracing.port}",
        "NODE_OPTIONS": "--max-old-space-size=1536",
        "REDIS_HOST": "langfuse-valkey",
        "REDIS_PORT": "6379",
        "TELEMETRY_ENABLED": "false",
    }


def _stores(host: str) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(port, host, name) for name, port in zip(STORES, (8123, 5432, 8333, 6379), strict=True))


def _given(variables: Mapping[str, str]) -> str:
    """Which variable gets which secret, as start.sh wants to be told."""
    return " ".join(f"{variable}={secret}" for variable, secret in sorted(variables.items()))


def _web(site: Site, host: str, tracing: Tracing) -> Service:
    """Pages and API. The first project, its key and its owner are there when it has started."""
    variables = {**VARIABLES, **WEB_VARIABLES}
    address = site.host(host).address
    return Service(
        host=host,
        component=COMPONENT,
        name=COMPONENT,
        role="tracing",
        image=site.image("langfuse", IMAGES["langfuse"]),
        program="node",
        entrypoint=("/bin/sh", START),
        args=("./web/entrypoint.sh", "node", "./web/server.js", "--keepAliveTimeout", "110000"),
        health=Health.by_wget(tracing.port, "/api/public/ready", 600),
        memory_mib=2048,
        environment={
            **_environment(site, host, tracing),
            "AUTH_DISABLE_SIGNUP": "true",
            "CORRAL_SECRETS": _given(variables),
            "LANGFUSE_INIT_ORG_ID": "corral",
            "LANGFUSE_INIT_ORG_NAME": site.inventory.name,
            "LANGFUSE_INIT_PROJECT_ID": "corral",
            "LANGFUSE_INIT_PROJECT_NAME": site.inventory.name,
            "LANGFUSE_INIT_USER_EMAIL": "operator@corral.internal",
            "LANGFUSE_INIT_USER_NAME": "operator",
            "PORT": str(tracing.port),
        },
        secrets=tuple(sorted(variables.values())),
        ports=(Port(tracing.port, address, OWN_PASSWORD),),
        configs=(ConfigMount("start.sh", START),),
        calls=_stores(host),
        user="1001:1001",
        read_only=False,
        cpu_weight=256,
        stop_grace_s=30,
        after=tuple((name, "service_healthy") for name in STORES),
        exceptions={"read-only": WRITES},
    )


def _worker(site: Site, host: str, tracing: Tracing) -> Service:
    """Takes what came in from the queues into ClickHouse."""
    return Service(
        host=host,
        component=COMPONENT,
        name="langfuse-worker",
        role="tracing",
        image=site.image("langfuse-worker", IMAGES["langfuse-worker"]),
        program="node",
        entrypoint=("/bin/sh", START),
        args=("./worker/entrypoint.sh", "node", "worker/dist/index.js"),
        health=Health.by_wget(3030, "/api/health", 300),
        memory_mib=2048,
        environment={**_environment(site, host, tracing), "CORRAL_SECRETS": _given(VARIABLES), "PORT": "3030"},
        secrets=tuple(sorted(VARIABLES.values())),
        ports=(Port(3030),),
        configs=(ConfigMount("start.sh", START),),
        network=NETWORK,
        user="1001:1001",
        read_only=False,
        cpu_weight=256,
        stop_grace_s=60,
        after=((COMPONENT, "service_healthy"),),
        exceptions={"read-only": WRITES},
    )


def _clickhouse(site: Site, host: str, tracing: Tracing) -> Service:
    return Service(
        host=host,
        component=COMPONENT,
        name="langfuse-clickhouse",
        role="tracing",
        image=site.image("langfuse-clickhouse", IMAGES["langfuse-clickhouse"]),
        program="clickhouse-server",
        entrypoint=("/bin/sh", START),
        args=("/entrypoint.sh",),
        health=Health.by_wget(8123, "/ping", 120),
        memory_mib=tracing.clickhouse_mib,
        environment={
            "CLICKHOUSE_DB": "default",
            "CLICKHOUSE_USER": "langfuse",
            "CORRAL_SECRETS": _given({"CLICKHOUSE_PASSWORD": CLICKHOUSE_PASSWORD}),
            "CORRAL_SECRETS_DIR": site.secret_path(host, "").rstrip("/"),
        },
        secrets=(CLICKHOUSE_PASSWORD,),
        ports=(Port(8123), Port(9000)),
        volumes=(("traces-clickhouse", "/var/lib/clickhouse"),),
        configs=(
            ConfigMount("start.sh", START),
            ConfigMount("clickhouse.yaml", "/etc/clickhouse-server/config.d/corral.yaml"),
        ),
        tmpfs=(
            "/tmp:size=64m",  # noqa: S108 - a path in the container
            "/var/log/clickhouse-server:size=64m,uid=101,gid=101",
            "/etc/clickhouse-server/users.d:size=1m,uid=101,gid=101",
        ),
        network=NETWORK,
        user="101:101",
        cpu_weight=256,
        pids=4096,
        stop_grace_s=60,
    )


def _postgres(site: Site, host: str) -> Service:
    return Service(
        host=host,
        component=COMPONENT,
        name="langfuse-postgres",
        role="tracing",
        image=site.image("langfuse-postgres", IMAGES["langfuse-postgres"]),
        program="postgres",
        entrypoint=("/bin/sh", DATABASE_START),
        args=("5432", "*", DATABASE, ROLE, site.secret_path(host, DATABASE_PASSWORD)),
        health=Health(
            5432, "", ("pg_isready", "-q", "-h", "127.0.0.1", "-U", ROLE, "-d", DATABASE), postgres.START_TIMEOUT_S
        ),
        memory_mib=512,
        shm_mib=64,
        secrets=(DATABASE_PASSWORD,),
        configs=(ConfigMount("postgres.sh", DATABASE_START),),
        ports=(Port(5432),),
        volumes=(("traces-database", "/var/lib/postgresql"),),
        tmpfs=("/tmp:size=64m", "/var/run/postgresql:size=1m,uid=999,gid=999"),  # noqa: S108 - paths in the container
        network=NETWORK,
        user="999:999",
        cpu_weight=256,
        stop_signal="SIGINT",
        stop_grace_s=60,
    )


def _seaweedfs(site: Site, host: str) -> Service:
    """S3 in one process; MinIO, which Langfuse's own compose file has, publishes no images any more."""
    return Service(
        host=host,
        component=COMPONENT,
        name="langfuse-seaweedfs",
        role="tracing",
        image=site.image("langfuse-seaweedfs", IMAGES["langfuse-seaweedfs"]),
        program="weed",
        entrypoint=("weed",),
        args=(
            "-logtostderr=true",
            "mini",
            "-dir=/data",
            "-ip=127.0.0.1",
            "-ip.bind=0.0.0.0",
            f"-bucket={BUCKET}",
            f"-s3.config={site.secret_path(host, S3_CONFIG)}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ),
        health=Health(8333, "/healthz", ("curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8333/healthz"), 120),
        memory_mib=512,
        secrets=(S3_CONFIG,),
        ports=(Port(8333),),
        volumes=(("traces-events", "/data"),),
        network=NETWORK,
        user="1000:1000",
        cpu_weight=256,
        stop_grace_s=30,
    )


def _valkey(site: Site, host: str) -> Service:
    """Queues: nothing may be thrown away for lack of room, and what waits is there again after a restart."""
    return Service(
        host=host,
        component=COMPONENT,
        name="langfuse-valkey",
        role="tracing",
        image=site.image("langfuse-valkey", IMAGES["langfuse-valkey"]),
        program="valkey-server",
        entrypoint=("valkey-server",),
        args=(
            "--port", "6379", "--bind", "*", "--aclfile", site.secret_path(host, VALKEY_USERS), "--save", "",
            "--appendonly", "yes", "--dir", "/data", "--maxmemory", "384mb", "--maxmemory-policy", "noeviction",
        ),
        health=Health(6379, "", ("sh", "-c", "valkey-cli -p 6379 ping | grep -qE 'PONG|NOAUTH'")),
        memory_mib=512,
        secrets=(VALKEY_USERS,),
        ports=(Port(6379),),
        volumes=(("traces-queues", "/data"),),
        network=NETWORK,
        user="999:999",
        cpu_weight=256,
        stop_grace_s=30,
    )  # fmt: skip
