"""A whole farm of a `local` host for tests: rendered and started exactly as for a user, with fakes among its nodes.

What the machine lacks is left out of the inventory (the database, the cache, monitoring); tests that want it say so
with `needs`. LiteLLM and the servers of real models are always there, HAProxy in every mode but `direct`.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from xmlrpc.client import Fault

import httpx
import pytest
import yaml

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.render.output import write
from corral.render.secrets import initialise, read_env
from corral.render.tree import render
from corral.runtime import supervisor
from corral.verbs.keys import keys
from tests.model_files import make_adapter, make_embedding_model
from tests.needs import why_missing
from tests.processes import preloaded
from tests.processes.fakes import LOOPBACK, Fakes, command
from tests.processes.helpers import REPOSITORY, Process, wait_http, wait_until
from tests.tiny_models import make_chat_model

Mode = Literal["slots", "least-busy", "direct"]
HOST = "box"
BIN = REPOSITORY / "tests" / "processes" / "bin"
START_DEADLINE_S = 240.0
STOP_GRACE_S = 2.0
ANSWER_TIMEOUT_S = 60.0
# Between two questions of a client under load: far less than an answer of a fake at work takes.
PAUSE_S = 0.03

# Pools of fakes: the name of each fake and its slots.
POOLS = {
    "even": {"even-1": 1, "even-2": 1, "even-3": 1},
    "mixed": {"mixed-1": 1, "mixed-2": 2, "mixed-4": 4},
    "brief": {"brief-1": 1},
    "limited": {"limited-1": 1},
    "vectors": {"vectors-1": 2},
}
EVEN, MIXED, BRIEF, LIMITED, VECTORS = map(tuple, POOLS.values())
# Keys of a farm with a database: seed 002's services, with limits that a test can reach.
CONSUMERS: dict[str, dict[str, Any]] = {
    "VISTA": {"pools": ["even", "chat"], "limits": {"rpm": 35, "parallel": 2}, "metadata": {"team": "vets"}},
    "whisplbrx": {"pools": ["even"], "limits": {"tpm": 30}},
    "AnyDataNext": {"pools": ["mixed", "vectors"], "budget": {"max_usd": 0.1, "period": "30d"}},
    "lbrxvoice": {},
    "guest": {"pools": ["even", "chat"]},
}
# A fake's answer has six tokens: three US cents.
PRICES = {"mixed": {"input_usd_per_million": 5000, "output_usd_per_million": 5000}}
# In `least-busy`: the pool for models that do not exist.
UNKNOWN_GOES_TO = "even"
# A model of `gateway.extra`.
ADDED = "added"
# The name of `mixed` for what may wait.
SPARE_TIME = "spare-time"
# A link on the page about the farm, with a title that must not become HTML.
LINK = "<img src=x onerror=alert(1)>"
EVEN_DEPTH = 4
BRIEF_TIMEOUT_S = 1
LIMIT_RPM = 5
CHAT_SLOTS = 2
# Unfinished jobs of one key.
MOST_JOBS = 210
JOBS_MIB = 16
CHAT_REPLICAS = ("box-chat-1", "box-chat-2")
# Fakes whose health is asked on the path that the kit knows for their engine; of the others on `/health`.
FAKES_OF_DEFAULT_HEALTH = LIMITED

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Others for every worker of pytest-xdist; above the ports of tests/compose, below those of outgoing connections.
FIRST_PORTS = range(23_000 + _WORKER % 3 * 3_000, 26_000 + _WORKER % 3 * 3_000)
PROGRAMS = (
    "chat", "chat-2", "embed", "gateway", "admin", "litellm", "balancer", "stats", "database", "cache", "prometheus",
    "node-exporter", "fakes", "jobs", "jobs-store", "sink", "page", "open-webui", "entrance",
)  # fmt: skip
PORT_NAMES = (*PROGRAMS, *(name for pool in POOLS.values() for name in pool))

_numbers = itertools.count(1)


def search_path() -> str:
    """PATH of a farm: a user's, and before it LiteLLM's command that starts quicker and llama-server from a wheel."""
    return supervisor.search_path(map(str, (preloaded.commands(), BIN, REPOSITORY / "gpu-server" / "local")))


def in_modes(*modes: Mode, broken: Mapping[Mode, str] | None = None) -> pytest.MarkDecorator:
    """Runs a test on a farm of each of these modes; `broken` names what a mode cannot hold, and why.

    All tests of one mode share one farm, with pytest-xdist too.
    """
    reasons = broken or {}
    return pytest.mark.parametrize(
        "running_farm", [pytest.param(mode, marks=_marks(mode, reasons.get(mode))) for mode in modes], indirect=True
    )


def _marks(mode: Mode, broken: str | None) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.xdist_group(f"farm-{mode}")]
    if mode != "direct":
        marks.append(pytest.mark.needs("haproxy"))
    if broken is not None:
        marks.append(pytest.mark.xfail(reason=broken, strict=True, raises=(AssertionError, TimeoutError)))
    return marks


def choose_ports(names: Sequence[str] = PORT_NAMES) -> dict[str, int]:
    """A port for everything, in a row at a random place, so that farms of several test runs do not collide."""
    for _attempt in range(100):
        first = random.choice(FIRST_PORTS)  # noqa: S311 - no secret
        ports = {name: first + index for index, name in enumerate(names)}
        if all(map(is_free, ports.values())):
            return ports
    raise RuntimeError(f"no {len(names)} free ports in a row")


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address."""
    with socket.socket() as listener:
        try:
            listener.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class Extras:
    """Which of the programs that a farm can do without it runs."""

    has_database: bool = False
    has_cache: bool = False
    has_monitoring: bool = False

    @classmethod
    def installed(cls) -> Extras:
        """All that this machine has."""
        return cls(
            has_database=not why_missing("postgres") and not why_missing("prisma-engine"),
            has_cache=not why_missing("redis"),
            has_monitoring=not why_missing("prometheus") and not why_missing("node-exporter"),
        )


def inventory_of(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    """The site: two real chat servers, a real embedding server, and pools of fakes for slots, queues and limits."""
    nodes = {name: _node(ports[name], slots, name) for pool in POOLS.values() for name, slots in pool.items()}
    fakes = {name: {"on": [{"node": node} for node in pool]} for name, pool in POOLS.items()}
    return {
        "schema_version": 1,
        "name": f"test-{mode}",
        "hosts": {HOST: {"runtime": "local", "address": LOOPBACK}},
        "models": {
            "tiny-chat": {
                "source": "chat.gguf", "kind": "chat", "context": 2048,
                "adapters": [
                    {"name": "late", "source": "late.gguf"}, {"name": "weak", "source": "weak.gguf", "scale": 0.1},
                ],
            },
            "tiny-embed": {"source": "embed.gguf", "kind": "embedding", "context": 512},
        },
        "nodes": nodes,
        "pools": {
            "chat": {
                "model": "tiny-chat", "on": {"host": HOST, "replicas": 2}, "ports": ports["chat"],
                "aliases": ["default", "assistant"], "engine": {"slots": CHAT_SLOTS, "threads": 1},
                "cache": "shared",
            },
            "embed": {"model": "tiny-embed", "on": {"host": HOST}, "ports": ports["embed"], "engine": {"threads": 1}},
            "even": fakes["even"] | {
                "queue": {"depth": EVEN_DEPTH, "timeout_s": 24}, "aliases": ["Owner/Model:8B"], "editor_names": True,
            },
            "mixed": fakes["mixed"] | {
                "queue": {"depth": 40, "timeout_s": 24}, "price": PRICES["mixed"],
                **({"background": [SPARE_TIME]} if mode == "slots" else {}),
            },
            "brief": fakes["brief"] | {"queue": {"depth": 2, "timeout_s": BRIEF_TIMEOUT_S}, "cache": "private"},
            "vectors": fakes["vectors"] | {"editor_names": True},
            "limited": fakes["limited"] | {"limits": {"rpm": LIMIT_RPM}, "aliases": ["limited-alias"]},
        },
        "gateway": {
            "host": HOST, "port": ports["gateway"], "balancing": mode, "timeout_s": 40,
            **({"unknown_model": UNKNOWN_GOES_TO} if mode == "least-busy" else {}),
            "admin_port": ports["admin"], "litellm_port": ports["litellm"],
            "balancer_port": ports["balancer"], "stats_port": ports["stats"],
            "database": extras.has_database, "database_port": ports["database"],
            "cache": extras.has_cache, "cache_port": ports["cache"],
            **({"extra": _added(ports["limited-1"])} if "limited-1" in ports else {}),
            "page": {"links": {LINK: "http://192.0.2.7:3000"}},
            **({"entrance": _entrance(ports)} if extras.has_cache else {}),
        },
        **({"consumers": CONSUMERS} if extras.has_database else {}),
        **({"monitoring": _monitoring(ports)} if extras.has_monitoring else {}),
        **({"jobs": _jobs(ports)} if extras.has_cache else {}),
    }  # fmt: skip


def keep_only(site: dict[str, Any], *pools: str) -> None:
    """Takes everything out of a site of `inventory_of` but these pools of fakes."""
    site["pools"] = {name: site["pools"][name] for name in pools}
    site["nodes"] = {name: site["nodes"][name] for pool in pools for name in POOLS[pool]}
    del site["models"]


def _node(port: int, slots: int, name: str) -> dict[str, Any]:
    engine = "llama.cpp" if name in BRIEF else "openai"
    node = {"url": f"http://{LOOPBACK}:{port}", "engine": engine, "model": "fake-model", "slots": slots}
    kind = {"kind": "embedding"} if name in VECTORS else {}
    health = {} if name in FAKES_OF_DEFAULT_HEALTH else {"health": "/health"}
    return node | kind | health


def _added(port: int) -> dict[str, Any]:
    """A deployment that the kit knows nothing of, with a key of its own."""
    params = {
        "model": "openai/fake-model", "api_base": f"http://{LOOPBACK}:{port}/v1", "api_key": "os.environ/SPEECH_KEY",
    }  # fmt: skip
    return {"model_list": [{"model_name": ADDED, "litellm_params": params}]}


def _jobs(ports: dict[str, int]) -> dict[str, Any]:
    """Jobs whose lost workers are noticed within two seconds."""
    return {
        "workers": 2, "grace_s": 2, "key_depth": MOST_JOBS, "jarvis_path": True, "memory_mib": JOBS_MIB,
        "callbacks": [f"http://{LOOPBACK}:{ports['sink']}"],
        "pollers": {"tab": {"models": ["even"]}},
        "port": ports["jobs"], "store_port": ports["jobs-store"],
    }  # fmt: skip


def _entrance(ports: dict[str, int]) -> dict[str, Any]:
    """A door for a page whose origin is the receiver of callbacks."""
    return {"port": ports["entrance"], "address": LOOPBACK, "origins": [f"http://{LOOPBACK}:{ports['sink']}"]}


def _monitoring(ports: dict[str, int]) -> dict[str, Any]:
    own = {"port": ports["prometheus"], "node_exporter_port": ports["node-exporter"], "store_exporters": False}
    job = {"job_name": "router", "static_configs": [{"targets": [f"{LOOPBACK}:{ports['prometheus']}"]}]}
    return {"host": HOST, "scrape_interval_s": 4, "extra": {"scrape_configs": [job]}} | own


@dataclass(frozen=True)
class Streamed:
    """A streamed answer: its status, and every event before `[DONE]`."""

    response: httpx.Response
    events: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """All pieces together."""
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    @property
    def finish_reasons(self) -> list[str]:
        """How it says that it is complete; empty if it never does."""
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


class Farm:
    """A running farm, and a client of its gateway."""

    def __init__(self, mode: Mode, folder: Path, plan: Plan, ports: dict[str, int], extras: Extras) -> None:
        self.mode = mode
        self.plan = plan
        self.ports = ports
        self.extras = extras
        self.out = folder
        self.folder = folder / HOST
        self.secrets = read_env(self.folder / ".env")
        self.key = self.secrets["LITELLM_MASTER_KEY"]
        self.fakes = Fakes(ports["fakes"])
        self.client = self.new_client(self.key)
        self.admin = self.new_admin()

    # --- requests

    def new_client(self, key: str = "") -> httpx.Client:
        """A client of the gateway with this key, or without one."""
        return httpx.Client(
            base_url=f"http://{LOOPBACK}:{self.ports['gateway']}",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
            timeout=ANSWER_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None),
        )

    def new_admin(self, key: str = "") -> httpx.Client:
        """A client of all that LiteLLM has, as the operator reaches it; with the master key unless another is given."""
        port = self.ports["gateway" if self.mode == "direct" else "admin"]
        headers = {"Authorization": f"Bearer {key or self.key}"}
        base = f"http://{LOOPBACK}:{port}"
        return httpx.Client(base_url=base, headers=headers, trust_env=False, timeout=ANSWER_TIMEOUT_S)

    def ask(self, model: str, text: str = "", *, key: str | None = None, **fields: object) -> httpx.Response:
        """The answer to one chat request; without a text it opens a conversation of its own."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.client.post("/v1/chat/completions", json=body_of(model, text, **fields), headers=headers)

    def ask_streamed(self, model: str, text: str = "", **fields: object) -> Streamed:
        """The whole streamed answer to one chat request."""
        body = body_of(model, text, stream=True, **fields)
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return Streamed(response, [json.loads(line) for line in lines if line != "[DONE]"])

    @contextmanager
    def leaving(self, model: str, *, is_streamed: bool = False) -> Iterator[None]:
        """A client that asks, and goes away without its answer at the end of the block."""
        connection = http.client.HTTPConnection(LOOPBACK, self.ports["gateway"], timeout=ANSWER_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        body = json.dumps(body_of(model, stream=is_streamed))
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            yield
        finally:
            connection.close()

    def leave(self, model: str, *, is_streamed: bool = False) -> None:
        """Asks a pool of fakes that hold their answers, and goes away once the request has reached one of them."""
        names = POOLS[model]
        before = sum(self.fakes.arrivals(names).values())
        with self.leaving(model, is_streamed=is_streamed):
            wait_until(lambda: sum(self.fakes.arrivals(names).values()) > before, 10, "the request has arrived")

    def replica(self, response: httpx.Response) -> str:
        """Who answered, as the gateway tells its client."""
        name = "x-litellm-model-id" if self.mode == "direct" else "llm_provider-x-replica"
        return str(response.headers[name])

    # --- the programs behind

    def pid(self, program: str) -> int:
        """The process of a program under supervisord."""
        found = supervisor.programs(self.folder) or {}
        return found[program].pid

    def restart(self, program: str) -> None:
        """Ends a program and returns once it is healthy again."""
        for method in ("stopProcess", "startProcess"):
            with suppress(Fault):  # supervisord was faster
                supervisor.call(self.folder, method, program, timeout_s=START_DEADLINE_S)
        self.wait_healthy([program])

    def wait_healthy(self, programs: Iterable[str] = ()) -> None:
        """Return once every program (or each of these) is healthy; TimeoutError names the first that is not."""
        wanted = set(programs)
        for service in self.plan.services_of(HOST):
            if wanted and service.name not in wanted:
                continue
            if service.health.path:
                wait_http(f"http://{LOOPBACK}:{service.health.port}{service.health.path}", START_DEADLINE_S)
            else:
                port = service.health.port
                wait_until(partial(is_listening, port), START_DEADLINE_S, f"{service.name} listens on {port}")

    def balancer_figures(self, name: str, label: str = "server") -> dict[str, float]:
        """One of HAProxy's figures by `pool/label`, for instance `haproxy_backend_current_queue`."""
        text = httpx.get(f"http://{LOOPBACK}:{self.ports['stats']}/metrics", trust_env=False).text
        figures = re.findall(rf"^{name}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
        labelled = [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in figures]
        return {f"{labels['proxy']}/{labels.get(label, '')}": value for labels, value in labelled}

    def queue(self, pool: str) -> float:
        """Requests that wait in HAProxy for a slot of this pool."""
        return self.balancer_figures("haproxy_backend_current_queue")[f"{pool}/"]

    def down(self) -> list[str]:
        """Replicas that HAProxy does not use at the moment."""
        text = httpx.get(f"http://{LOOPBACK}:{self.ports['stats']}/metrics", trust_env=False).text
        return re.findall(r'^haproxy_server_status{[^}]*server="([^"]*)",state="UP"} 0$', text, re.MULTILINE)


def body_of(model: str, text: str = "", **fields: object) -> dict[str, object]:
    """A chat request; without a text its opening is like no other."""
    content = text or f"question {next(_numbers)}"
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


def key_of(farm: Farm, name: str) -> str:
    """The value of a consumer's key."""
    return (farm.out / HOST / "keys" / name).read_text(encoding="utf-8")


def is_listening(port: int) -> bool:
    """Whether somebody accepts connections on this port of the loopback address."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((LOOPBACK, port)) == 0


class Load:
    """Clients that ask one pool again and again, each for itself, for as long as the `with` block lasts."""

    def __init__(self, farm: Farm, model: str, clients: int) -> None:
        self.farm = farm
        self.answers: list[httpx.Response] = []
        self.failures: list[str] = []
        self._model = model
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(ANSWER_TIMEOUT_S)

    def replicas_since(self, count: int) -> set[str]:
        """Who gave the answers after the first `count`."""
        return {self.farm.replica(answer) for answer in self.answers[count:]}

    def _ask_on(self) -> None:
        while not self._is_over.wait(PAUSE_S):
            try:
                answer = self.farm.ask(self._model)
            except httpx.TransportError as error:
                self.failures.append(repr(error))
                continue
            if answer.is_success:
                self.answers.append(answer)
            else:
                self.failures.append(f"{answer.status_code} {answer.text}")


MakeInventory = Callable[[Mode, dict[str, int], Extras], dict[str, Any]]


@contextmanager
def running(
    mode: Mode, make_inventory: MakeInventory = inventory_of, pools: Mapping[str, Mapping[str, int]] = POOLS
) -> Iterator[Farm]:
    """A farm from its inventory to all programs healthy, and nothing of it left afterwards."""
    served_names = [name for pool in pools.values() for name in pool]
    ports = choose_ports((*PROGRAMS, *served_names))
    extras = Extras.installed() if mode == "slots" else Extras()
    # Not pytest's folder: that is closed to the account under which PostgreSQL has to run when root tests.
    folder = Path(tempfile.mkdtemp(prefix="corral-farm-"))
    folder.chmod(0o755)
    try:
        plan = _prepare(make_inventory(mode, ports, extras), folder)
        served = [(name, ports[name], slots) for pool in pools.values() for name, slots in pool.items()]
        with Process(command(ports["fakes"], served), folder / "fakes.log"):
            wait_http(f"http://{LOOPBACK}:{ports['fakes']}/")
            farm = Farm(mode, folder, plan, ports, extras)
            with _started(farm), farm.client, farm.admin, farm.fakes.client:
                yield farm
    finally:
        shutil.rmtree(folder)


def _prepare(inventory: dict[str, Any], folder: Path) -> Plan:
    """Everything that lies on disk before a start: the rendering, secrets and models."""
    path = folder / "inventory.yaml"
    path.write_text(yaml.safe_dump(inventory, sort_keys=False), encoding="utf-8")
    plan = build_plan(load_inventory(path))
    write(render(plan), folder)
    secrets = plan.secrets_of(HOST)
    _give(folder / HOST / ".env", [secret.name for secret in secrets if secret.generate == "given"])
    initialise({HOST: secrets}, folder)
    models = folder / HOST / "models"
    models.mkdir()
    make_chat_model(models / "chat.gguf")
    make_adapter(models / "late.gguf", start=50)
    make_adapter(models / "weak.gguf", start=90)
    make_embedding_model(models / "embed.gguf")
    return plan


def _give(env: Path, names: list[str]) -> None:
    """Writes what a user would: a value for each of these secrets, made of its name."""
    env.write_text("".join(f"{name}=value-of-{name}\n" for name in names))
    env.chmod(0o600)


@contextmanager
def _started(farm: Farm) -> Iterator[None]:
    try:
        supervisor.start(farm.folder, search_path())
        try:
            farm.wait_healthy()
        except TimeoutError as error:
            logs = sorted((farm.folder / "logs").glob("*.log"))
            error.add_note("\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs))
            raise
        if farm.mode != "direct":
            wait_until(lambda: not farm.down(), 30, "HAProxy uses every replica")
        if farm.plan.inventory.gateway.database:
            keys.sync(farm.plan, farm.out)
        yield
    finally:
        with suppress(httpx.HTTPError, Fault):  # before its database, which it would wait for
            supervisor.call(farm.folder, "stopProcess", "litellm")
        supervisor.stop(farm.folder, grace_s=STOP_GRACE_S)
