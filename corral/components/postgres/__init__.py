"""PostgreSQL: virtual keys, budgets and spend of the gateway."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
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
    Store,
)
from corral.plan.site import Site

STAGE = Stage.BALANCER
COMPONENT = "postgres"
IMAGE = "postgres:18.6"
DATA = "/var/lib/postgresql"
VOLUME = "database"
PASSWORD = "POSTGRES_PASSWORD"  # noqa: S105 - the secret's name
MONITOR_PASSWORD = "POSTGRES_EXPORTER_PASSWORD"  # noqa: S105 - the secret's name
# No role of these is a superuser; that one has no password and comes in through the socket in the container alone.
DATABASE, ROLE, MONITOR = "corral", "litellm", "exporter"
SCRIPT = "litellm/postgres.sh"
START = "/etc/corral/start.sh"
URL = "DATABASE_URL"
# It may have to replay its log twice after a crash: once to see to the roles.
START_TIMEOUT_S = 300


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """The database, its password, and the URL by which it is reached."""
    gateway = site.inventory.gateway
    if not gateway.database:
        return
    endpoint = Endpoint(gateway.database_port, gateway.host, COMPONENT)
    yield Secret(PASSWORD, gateway.host, "password of the gateway's database")
    url = f"postgresql://{ROLE}:{{{PASSWORD}:url}}@{site.address(endpoint, gateway.host)}/{DATABASE}"
    yield Secret(URL, gateway.host, "address of the gateway's database", template=url)
    monitor_password = MONITOR_PASSWORD if has_exporters(site) else ""
    if monitor_password:
        yield Secret(monitor_password, gateway.host, "password of the database's exporter")
    yield Store("database", endpoint, URL, ROLE, DATABASE, MONITOR, monitor_password)
    yield _service(site)
    yield _state(site)
    yield File(gateway.host, COMPONENT, "start.sh", asset=SCRIPT)


def has_exporters(site: Site) -> bool:
    """Whether the site reads figures of its stores."""
    monitoring = site.inventory.monitoring
    return monitoring is not None and monitoring.store_exporters


def _state(site: Site) -> State:
    """As PostgreSQL's own dump: of one moment while it is in use, and readable by newer versions."""
    gateway = site.inventory.gateway
    dump, load = dump_and_load("--port", str(gateway.database_port), "--username", ROLE, "--dbname", DATABASE)
    return State(
        host=gateway.host,
        service=COMPONENT,
        name="database",
        purpose="keys, budgets and spend",
        volume=VOLUME,
        path=DATA,
        dump=dump,
        load=load,
    )


def dump_and_load(*login: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The commands that print a database and that put it back, with the rights of the role that owns it."""
    rights = ("--no-owner", "--no-privileges")
    dump = ("pg_dump", "--format", "custom", *rights, *login)
    load = ("pg_restore", "--clean", "--if-exists", *rights, "--single-transaction", "--exit-on-error", *login)
    return dump, load


def _service(site: Site) -> Service:
    gateway = site.inventory.gateway
    is_local = site.is_local(gateway.host)
    passwords = (PASSWORD, *((MONITOR_PASSWORD,) if has_exporters(site) else ()))
    files = [site.secret_path(gateway.host, name) for name in passwords]
    ready = ("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(gateway.database_port), "-U", ROLE, "-d", DATABASE)
    return Service(
        host=gateway.host,
        component=COMPONENT,
        name=COMPONENT,
        role="database",
        image=site.image(COMPONENT, IMAGE),
        program="postgres",
        entrypoint=("sh" if is_local else "/bin/sh", site.config_path(gateway.host, COMPONENT, "start.sh", START)),
        args=(
            str(gateway.database_port), "127.0.0.1" if is_local else "*", DATABASE, ROLE, files[0],
            *((MONITOR, files[1]) if len(files) > 1 else ()),
        ),
        health=Health(gateway.database_port, "", ready, START_TIMEOUT_S),
        memory_mib=1024,
        shm_mib=128,
        environment={"PGDATA": site.data_path(gateway.host, COMPONENT, DATA)} if is_local else {},
        secrets=passwords,
        ports=(Port(gateway.database_port, site.publish_address(gateway.host), "a password, on loopback"),),
        volumes=((VOLUME, DATA),),
        configs=(ConfigMount("start.sh", START),),
        tmpfs=("/tmp:size=64m", "/var/run/postgresql:size=1m,uid=999,gid=999"),  # noqa: S108 - paths in the container
        network="database",
        user="999:999",
        cpu_weight=2048,
        stop_signal="SIGINT",
        stop_grace_s=60,
    )  # fmt: skip
