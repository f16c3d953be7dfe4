"""PostgreSQL: virtual keys, budgets and spend of the gateway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from corral.components import Stage
from corral.components.declared import service
from corral.contributions import Contribution, Contributions, Database, Endpoint, File, Secret, Service, State, Store
from corral.plan.site import Site

STAGE = Stage.BALANCER
COMPONENT = "postgres"
PASSWORD = "POSTGRES_PASSWORD"  # noqa: S105 - the secret's name
MONITOR_PASSWORD = "POSTGRES_EXPORTER_PASSWORD"  # noqa: S105 - the secret's name
DATABASE, ROLE, MONITOR = "corral", "litellm", "exporter"
SCRIPT = "litellm/postgres.sh"
URL = "DATABASE_URL"


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The database, its password, and the URL by which it is reached."""
    gateway = site.inventory.gateway
    if not gateway.database:
        return
    endpoint = Endpoint(gateway.database_port, gateway.host, COMPONENT)
    yield Secret(PASSWORD, gateway.host, "password of the gateway's database")
    url = f"postgresql://{ROLE}:{{{PASSWORD}:url}}@{site.address(endpoint, gateway.host)}/{DATABASE}"
    yield Secret(URL, gateway.host, "address of the gateway's database", template=url)
    monitor_password = MONITOR_PASSWORD if site.has_store_exporters else ""
    if monitor_password:
        yield Secret(monitor_password, gateway.host, "password of the database's exporter")
    yield Store("database", endpoint, URL, ROLE, DATABASE, MONITOR, monitor_password)
    yield _service(site, published.databases)
    folder = "/var/lib/postgresql"
    kept = ((DATABASE, ROLE, "database", "keys, budgets and spend"),
            *((item.name, item.role, item.name, item.purpose) for item in published.databases))  # fmt: skip
    for name, role, title, purpose in kept:
        # As PostgreSQL's own dump: of one moment while it is in use, and readable by newer versions.
        dump, load = dump_and_load("--port", str(gateway.database_port), "--username", role, "--dbname", name)
        yield State(gateway.host, COMPONENT, title, purpose, "database", folder, dump, load)
    yield File(gateway.host, COMPONENT, "start.sh", asset=SCRIPT)


def dump_and_load(*login: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The commands that print a database and that put it back, with the rights of the role that owns it."""
    rights = ("--no-owner", "--no-privileges")
    dump = ("pg_dump", "--format", "custom", *rights, *login)
    load = ("pg_restore", "--clean", "--if-exists", *rights, "--single-transaction", "--exit-on-error", *login)
    return dump, load


def url_of(site: Site, database: Database) -> str:
    """Template of the secret with a further database's address."""
    gateway = site.inventory.gateway
    place = site.address(Endpoint(gateway.database_port, gateway.host, COMPONENT), gateway.host)
    return f"postgresql://{database.role}:{{{database.password}:url}}@{place}/{database.name}"


def _service(site: Site, further: Sequence[Database]) -> Service:
    host, has_monitor = site.inventory.gateway.host, site.has_store_exporters
    return service(
        site,
        host,
        COMPONENT,
        port=site.inventory.gateway.database_port,
        monitor=(MONITOR, site.secret_path(host, MONITOR_PASSWORD)) if has_monitor else (),
        further=tuple(
            word for item in further for word in ("--", item.name, item.role, site.secret_path(host, item.password))
        ),
        passwords=(*((MONITOR_PASSWORD,) if has_monitor else ()), *(item.password for item in further)),
        environment={"PGDATA": site.data_path(host, COMPONENT, "")} if site.is_local(host) else {},
    )
