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
from corral.site import Site

STAGE = Stage.BALANCER
COMPONENT = "postgres"
IMAGE = "postgres:18.6"
DATA = "/var/lib/postgresql"
VOLUME = "database"
PASSWORD = "POSTGRES_PASSWORD"  # noqa: S105 - the secret's name
URL = "DATABASE_URL"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """The database, its password, and the URL by which it is reached."""
    gateway = site.inventory.gateway
    if not gateway.database:
        return
    endpoint = Endpoint(gateway.database_port, gateway.host, COMPONENT)
    yield Secret(PASSWORD, gateway.host, "password of the gateway's database")
    url = f"postgresql://corral:{{{PASSWORD}:url}}@{site.address(endpoint, gateway.host)}/corral"
    yield Secret(URL, gateway.host, "address of the gateway's database", template=url)
    yield Store("database", endpoint, URL, PASSWORD, "corral", "corral")
    yield _service(site)
    yield _state(site)
    if site.is_local(gateway.host):
        yield File(gateway.host, COMPONENT, "start.sh", asset="litellm/postgres-local.sh")


def _state(site: Site) -> State:
    """As PostgreSQL's own dump: of one moment while it is in use, and readable by newer versions."""
    gateway = site.inventory.gateway
    login = ("--port", str(gateway.database_port), "--username", "corral", "--dbname", "corral")
    return State(
        host=gateway.host,
        service=COMPONENT,
        name="database",
        purpose="keys, budgets and spend",
        volume=VOLUME,
        path=DATA,
        dump=("pg_dump", "--format", "custom", "--no-owner", *login),
        load=("pg_restore", "--clean", "--if-exists", "--no-owner", "--single-transaction", "--exit-on-error", *login),
    )


def _service(site: Site) -> Service:
    gateway = site.inventory.gateway
    is_local = site.is_local(gateway.host)
    script = site.config_path(gateway.host, COMPONENT, "start.sh", "")
    data = site.data_path(gateway.host, COMPONENT, DATA)
    ready = ("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(gateway.database_port), "-U", "corral", "-d", "corral")
    return Service(
        host=gateway.host,
        component=COMPONENT,
        name=COMPONENT,
        role="database",
        image=site.image(COMPONENT, IMAGE),
        program="postgres",
        entrypoint=("sh", script) if is_local else (),
        args=(data, str(gateway.database_port), site.secret_path(gateway.host, PASSWORD))
        if is_local
        else ("postgres", "-p", str(gateway.database_port)),
        health=Health(gateway.database_port, "", ready),
        memory_mib=1024,
        shm_mib=128,
        environment={}
        if is_local
        else {
            "POSTGRES_USER": "corral",
            "POSTGRES_DB": "corral",
            "POSTGRES_PASSWORD_FILE": site.secret_path(gateway.host, PASSWORD),
        },
        secrets=(PASSWORD,),
        ports=(Port(gateway.database_port, site.publish_address(gateway.host), "a password, on loopback"),),
        volumes=((VOLUME, DATA),),
        configs=(ConfigMount("start.sh", ""),) if is_local else (),
        tmpfs=("/tmp:size=64m", "/var/run/postgresql:size=1m,uid=999,gid=999"),  # noqa: S108 - paths in the container
        user="999:999",
        cpu_weight=2048,
        stop_signal="SIGINT",
        stop_grace_s=60,
    )
