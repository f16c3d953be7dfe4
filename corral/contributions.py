"""What components tell each other: typed, frozen, and all that one component ever learns of another.

Producers publish (a backend, a scrape target, a secret …), consumers read; no component names another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from posixpath import normpath
from typing import Any, Literal, get_args, get_type_hints

from corral.errors import KeyPath

# Folders of the host that nothing is to have as a whole; one below them may be meant.
SYSTEM_ROOTS = ("/", "/home", "/root", "/var", "/var/lib")
# Folders of the host that no container is to see, nor anything below them, without a reason.
SYSTEM_FOLDERS = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr",
    "/var/lib/containerd", "/var/lib/docker", "/var/run",
)  # fmt: skip
# Where desktops mount disks and Ollama keeps its models, in folders that are the system's otherwise.
NOT_SYSTEM = ("/run/media/", "/usr/share/ollama/")


def plain_path(path: str) -> str:
    """A path as the kernel walks it, without `..`, `.` and needless slashes."""
    return f"/{normpath(path).lstrip('/')}" if path.startswith("/") else normpath(path)


def is_system_folder(path: str) -> bool:
    """Whether a folder of the host belongs to its system, or lies below one that does."""
    plain = plain_path(path)
    return not f"{plain}/".startswith(NOT_SYSTEM) and any(f"{plain}/".startswith(f"{path}/") for path in SYSTEM_FOLDERS)


def is_systems(folder: str) -> bool:
    """Whether a folder of the host is the system's own, or a root that holds such folders."""
    return plain_path(folder) in SYSTEM_ROOTS or is_system_folder(folder)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a program listens: on a host of the site, or at a node's own address."""

    port: int
    host: str = ""
    service: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a service. `publish` is the address on the host that it is bound to; empty: inside the farm only."""

    number: int
    publish: str = ""
    # What guards it: a key, a password, loopback, or the stated reason why it is open.
    protection: str = ""


@dataclass(frozen=True, slots=True)
class ConfigMount:
    """A rendered file that a service reads: its name in the component's folder, its path in the container.

    Without a path the file is not mounted by itself: the folder that it lies in is among the service's mounts.
    """

    file: str
    target: str


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """A service's share of a card."""

    number: int
    device: str
    vram_mib: int
    vendor: str = "nvidia"


@dataclass(frozen=True, slots=True)
class CpuVariant:
    """What of a service on a graphics card is different when the same host runs it on its processor instead."""

    image: str
    memory_mib: int
    environment: Mapping[str, str] = field(default_factory=dict)
    configs: tuple[ConfigMount, ...] = ()


@dataclass(frozen=True, slots=True)
class Health:
    """How to see that a service is ready: a path on its port, or a command inside the container."""

    port: int = 0
    path: str = ""
    command: tuple[str, ...] = ()
    start_timeout_s: int = 60

    @classmethod
    def by_wget(cls, port: int, path: str, start_timeout_s: int = 60) -> Health:
        """The path, asked from inside by images that have wget."""
        command = ("wget", "-q", "-O", "/dev/null", f"http://127.0.0.1:{port}{path}")
        return cls(port, path, command, start_timeout_s)


@dataclass(frozen=True, slots=True)
class Service:
    """One container (or, on a `local` host, one process)."""

    host: str
    component: str
    name: str
    image: str
    program: str
    args: tuple[str, ...] = ()
    health: Health = Health()
    memory_mib: int = 256
    memory_swap_mib: int = 0
    container: str = ""
    role: str = ""
    entrypoint: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    configs: tuple[ConfigMount, ...] = ()
    # Named volume (kept across `down`) and its path in the container.
    volumes: tuple[tuple[str, str], ...] = ()
    # Folder on the host and its path in the container, read-only.
    mounts: tuple[tuple[str, str], ...] = ()
    tmpfs: tuple[str, ...] = ("/tmp:size=64m",)  # noqa: S108 - a path in the container
    gpus: tuple[GpuClaim, ...] = ()
    # Device files of the host, under the same path in the container.
    devices: tuple[str, ...] = ()
    # Further groups of the program's user, by number.
    groups: tuple[int, ...] = ()
    # For services with `gpus`: how they run on a machine without cards.
    cpu_variant: CpuVariant | None = None
    user: str = ""
    read_only: bool = True
    mlock: bool = False
    threads: int = 0
    # CPU shares (relative weight); they matter only under contention.
    cpu_weight: int = 1024
    pids: int = 256
    shm_mib: int = 0
    stop_grace_s: int = 10
    stop_signal: str = ""
    after: tuple[tuple[str, Literal["service_healthy", "service_started"]], ...] = ()
    # Inner network on which others on its host call it; empty: the component's own (corral/plan/networks.py).
    network: str = ""
    # Whether it is on the host's network instead of networks of the project.
    is_on_host: bool = False
    # Whether it listens over IPv6, too, where the site has such addresses.
    is_dual_stack: bool = False
    # Whether its outer network has IPv6.
    has_ipv6: bool = False
    # Everything that it calls: on its own host it joins the network of each.
    calls: tuple[Endpoint, ...] = ()
    # Whether it reads changed configuration files without being started again, and is told to by `up`.
    reloads: bool = False
    # Whether it listens on some of its networks only, and so needs a name for its address on each of those.
    is_picky: bool = False
    # What the inventory adds: networks that exist already, labels, lines of the hosts file, processors.
    joins: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    extra_hosts: Mapping[str, str] = field(default_factory=dict)
    cpuset: str = ""
    # Rules of the security baseline (corral/checks/policy.py) that do not hold for this service, each with the reason.
    #
    # `way-out` puts the service on a network that leads out of the host.
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def container_name(self) -> str:
        """Name of its container."""
        return self.container or f"{self.host}-{self.name}"

    @property
    def needs_cards(self) -> bool:
        """Whether it has nothing to do on a machine without cards."""
        return bool(self.gpus) and self.cpu_variant is None

    @property
    def tenancies(self) -> tuple[GpuClaim, ...]:
        """The cards on which it computes; an exporter has cards only to look at them."""
        return () if self.role == "exporter" else self.gpus


@dataclass(frozen=True, slots=True)
class Cost:
    """What a backend charges for a token, in US dollars, and the most that it may cost in a period."""

    input_usd: float
    output_usd: float
    budget_usd: float | None = None
    period: str = ""


@dataclass(frozen=True, slots=True)
class Backend:
    """One replica of a pool that can answer requests."""

    pool: str
    name: str
    kind: str
    endpoint: Endpoint
    slots: int
    upstream_model: str
    health_path: str
    api_path: str = "/v1"
    scheme: Literal["http", "https"] = "http"
    protocol: Literal["openai", "ollama", "cloud"] = "openai"
    secret: str = ""
    # Whether the kit starts it; a node is asked for its health less often.
    is_ours: bool = True
    cost: Cost | None = None
    # File of the gateway's host with the authority of its certificate; empty: one of the public ones.
    ca_file: str = ""
    # Header in which it wants its key; empty: `Authorization: Bearer`.
    key_header: str = ""
    # Address of a cloud provider where LiteLLM does not know it.
    base_url: str = ""
    # What every request to it carries besides the client's own, in LiteLLM's `litellm_params`.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    # Whether the gateway takes thoughts out of its answers: the server may leave them in the text.
    hides_thoughts: bool = False
    # Body field by which a request keeps what its prompt left in the cache from other keys; empty: none is needed.
    cache_field: str = ""
    # By the names under which clients ask for a LoRA adapter: fields that the body of a request for it has.
    adapters: Mapping[str, Any] = field(default_factory=dict)


def name_of_shared(node: str) -> str:
    """What stands for the pool in the figures of a node that has several; no pool has a dot in its name."""
    return f"node.{node}"


def pool_in_figures(backends: Sequence[Backend]) -> str:
    """What stands for the pool in the figures of one server, from its backends in every pool that uses it."""
    return backends[0].pool if len(backends) == 1 else name_of_shared(backends[0].name)


@dataclass(frozen=True, slots=True)
class Route:
    """How the gateway reaches a pool, or one replica of it, through whatever stands in between."""

    # Stands for all replicas behind the route.
    backend: Backend
    name: str
    # Empty for cloud models whose provider LiteLLM knows.
    url: str
    slots: int = 1
    # Where the gateway leases a slot before it sends a request: the balancer chooses among the pool's routes.
    lease_url: str = ""

    @property
    def pool(self) -> str:
        """The pool whose requests it takes."""
        return self.backend.pool


@dataclass(frozen=True, slots=True)
class Door:
    """Where clients come in, when that is not the gateway itself."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class SlotFigures:
    """Where the gateway learns how many slots of every pool are free: JSON at a URL, kept by the balancer."""

    url: str


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """Figures for Prometheus."""

    job: str
    endpoint: Endpoint
    labels: Mapping[str, str] = field(default_factory=dict)
    path: str = "/metrics"
    secret: str = ""
    # Who has the secret as a password; empty: it is a key by itself (`Authorization: Bearer`).
    user: str = ""
    scheme: Literal["http", "https"] = "http"
    # File of the reader's host with the authority of its certificate; empty: one of the public ones.
    ca_file: str = ""
    relabel: tuple[Relabel, ...] = ()


@dataclass(frozen=True, slots=True)
class Relabel:
    """A label that Prometheus adds to a target's series where another label has one of these values."""

    source: str
    values: tuple[str, ...]
    target: str
    # What the new label says; empty: the same as the source.
    replacement: str = ""
    # Instead of adding a label, leaves out the metrics whose names this expression matches.
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """Recording and alerting rules for Prometheus: a file below monitoring/rules."""

    asset: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure of the inventory, as a series of constant value: rules compare what is with what should be."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A dashboard for Grafana: a file below monitoring/dashboards."""

    asset: str


@dataclass(frozen=True, slots=True)
class AlertSink:
    """Where Prometheus sends alerts."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class DataSource:
    """Figures for dashboards: a Prometheus."""

    name: str
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class TraceReceiver:
    """Who gets a trace of every request that the gateway answers: OTLP over HTTP, `/v1/traces` below a URL."""

    url: str
    # Name of the secret with the headers that it wants, as `Name=value,Name=value`.
    secret: str = ""
    # Whether it is on another machine than the gateway.
    is_outside: bool = False
    # Where it listens, when it is a service of the site.
    endpoint: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class Secret:
    """A value that one or more hosts need; generated once and kept, or given by the user."""

    name: str
    host: str
    purpose: str
    # `hex64` is a key of 256 bits; corral/render/certificates.py issues the last three.
    generate: Literal["hex", "hex64", "sk", "given", "authority", "server", "client"] = "hex"
    # Made from other secrets, as `postgresql://corral:{POSTGRES_PASSWORD}@…`; never stored by itself.
    template: str = ""
    # Whether every host makes up a value of its own; others of the same name are equal on all hosts.
    is_per_host: bool = False
    # Whom a certificate is for: names and addresses of a server, the one name of a client.
    names: tuple[str, ...] = ()

    @property
    def is_certificate(self) -> bool:
        """Whether it is issued by the site's certificate authority, and can be issued again at any time."""
        return self.generate in ("authority", "server", "client")

    @property
    def is_stored(self) -> bool:
        """Whether `.env` has its value; others are made from something else."""
        return not self.template and not self.is_certificate


def distinct(secrets: Iterable[Secret]) -> list[Secret]:
    """Secrets each once, by name: one that the kit makes up before one that only the user knows."""
    found: dict[str, Secret] = {}
    for secret in secrets:
        known = found.setdefault(secret.name, secret)
        if known.generate == "given" and secret.generate != "given":
            found[secret.name] = secret
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Store:
    """A store for other programs: the gateway's database or its shared counters."""

    kind: Literal["database", "cache"]
    endpoint: Endpoint
    # Name of the secret that opens it: the whole URL for a database, the password for a cache.
    secret: str
    user: str = ""
    database: str = ""
    # The user that may read statistics only.
    monitor: str = ""
    # Name of the secret with that user's password; empty: the site has no exporter for it.
    monitor_password: str = ""


@dataclass(frozen=True, slots=True)
class Database:
    """A further database in the site's PostgreSQL, for a program that owns it and can open no other."""

    name: str
    role: str
    # Name of the secret with the role's password.
    password: str
    # What is in it, for people.
    purpose: str


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key of the gateway for a program of the site: `keys sync` makes it from a secret of the gateway's host."""

    name: str
    secret: str
    # LiteLLM's fields that the inventory decides.
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WebPage:
    """Pages for people: HAProxy publishes them at a port of their own, with the entrance's certificate if there is."""

    name: str
    title: str
    # Where browsers find it.
    url: str
    port: int
    endpoint: Endpoint
    protection: str
    # Requests in a minute and at once that each account of the page may make; None: as many as it likes.
    rpm: int | None = None
    parallel: int | None = None
    # What tells an account's requests at the gateway: name of the secret with the page's key, and a header.
    secret: str = ""
    account_header: str = ""


@dataclass(frozen=True, slots=True)
class File:
    """A file beside a component's compose.yaml: laid out by a template, dumped from data, or copied from an asset."""

    host: str
    component: str
    path: str
    template: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] | None = None
    # What the inventory adds to the data (corral/components/additions.py), and where it says so.
    extra: Mapping[str, Any] = field(default_factory=dict)
    extra_at: KeyPath = ()
    asset: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """What of a service's data is worth keeping when its machine is lost.

    A program that has a way of its own to say what it holds names the commands, which run in its container: the first
    prints everything, the second reads that and puts it in the place of what is there, all of it or nothing. Without
    them the files below `path` are copied while the service stands still for a moment.
    """

    host: str
    service: str
    name: str
    purpose: str
    # The named volume that holds it.
    volume: str
    # Where the volume is in the container.
    path: str = ""
    dump: tuple[str, ...] = ()
    load: tuple[str, ...] = ()


Contribution = (
    Service | Backend | Route | Door | SlotFigures | ScrapeTarget | Secret | Store | File | Rules | Fact | Dashboard
    | AlertSink | DataSource | State | TraceReceiver | Database | OwnKey | WebPage
)  # fmt: skip


@dataclass(slots=True)
class Contributions:
    """Everything published so far, by kind, in the order in which it was published."""

    services: list[Service] = field(default_factory=list)
    backends: list[Backend] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    doors: list[Door] = field(default_factory=list)
    slot_figures: list[SlotFigures] = field(default_factory=list)
    targets: list[ScrapeTarget] = field(default_factory=list)
    secrets: list[Secret] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    rules: list[Rules] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    dashboards: list[Dashboard] = field(default_factory=list)
    sinks: list[AlertSink] = field(default_factory=list)
    sources: list[DataSource] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    trace_receivers: list[TraceReceiver] = field(default_factory=list)
    databases: list[Database] = field(default_factory=list)
    own_keys: list[OwnKey] = field(default_factory=list)
    web_pages: list[WebPage] = field(default_factory=list)

    def add(self, item: Contribution) -> None:
        """Puts a contribution where consumers of its kind look."""
        getattr(self, _lists()[type(item)]).append(item)


@cache
def _lists() -> Mapping[type, str]:
    """By kind of contribution, the name of its list."""
    return {get_args(hint)[0]: name for name, hint in get_type_hints(Contributions).items()}
