"""A rendered Compose project in a real engine: made for one test module, driven as a person would, gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.render.output import write
from corral.render.secrets import initialise, read_env
from corral.render.tree import render
from tests import tiny_models
from tests.model_files import make_embedding_model, make_rerank_model
from tests.processes.helpers import wait_until

# Of every Compose project that tests start; tests touch no other project.
PREFIX = "corral-test-"
COMMAND_LIMIT_S = 900
UP_LIMIT_S = 600
STOP_S = 1
KINDS = ("container", "network", "volume")
LOG_LINES = 30
# Between two questions of a client under load: it is there all the time, and leaves the processor to what is tried.
PAUSE_S = 0.2
# The last characters of long lines are shown: the end of a traceback says what happened.
LOG_WIDTH = 300
MAKERS: dict[str, Callable[..., None]] = {
    "chat": tiny_models.make_chat_model,
    "embedding": make_embedding_model,
    "rerank": make_rerank_model,
}
# Run in the network of a container: of all [service, address, port] those that accept a connection.
TRY_ALL = """
import concurrent.futures, json, socket, sys
def attempt(place):
    try:
        socket.create_connection(tuple(place[1:]), 0.5).close()
    except OSError:
        return
    print(json.dumps([place[0], place[2]]) + chr(10), end="")
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(attempt, json.loads(sys.argv[1])))
"""


class CommandFailed(AssertionError):
    """A command ended with an error; the message has its output."""


@contextmanager
def cut_off(container: str, alias: str) -> Iterator[None]:
    """A container cut off from the others: on none of its networks until the block ends, then on all of them again."""
    names = docker(
        "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}", container
    )
    for name in names.split():
        docker("network", "disconnect", name, container)
    try:
        yield
    finally:
        for name in names.split():
            docker("network", "connect", "--alias", alias, name, container)


def docker(*words: str, check: bool = True, given: bytes = b"") -> str:
    """What a docker command prints, with `given` on its stdin; CommandFailed when it fails."""
    done = subprocess.run(["docker", *words], input=given, capture_output=True, timeout=COMMAND_LIMIT_S, check=False)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if check and done.returncode != 0:
        raise CommandFailed(f"docker {' '.join(words)} ended with {done.returncode}:\n{out}{err}")
    return out


def without_permission(folder: Path) -> dict[str, str]:
    """An environment in which `docker` runs as a user who may not use the engine; only root can make it."""
    real = shutil.which("docker")
    fake = folder / "docker"
    fake.write_text(f'#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups {real} "$@"\n')
    fake.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "DOCKER_CONFIG": str(folder / "none")}


def render_site(inventory: Path, out: Path) -> Plan:
    """Renders an inventory into a folder as `render` and `secrets init` do, and returns its plan."""
    plan = build_plan(load_inventory(inventory))
    write(render(plan), out)
    initialise({host: plan.secrets_of(host) for host in plan.inventory.hosts if plan.secrets_of(host)}, out)
    return plan


def make_models(plan: Plan, host: str, folder: Path) -> None:
    """Puts a tiny model under every file name that llama-servers ask for, and empty folders for the other servers."""
    folder.mkdir(parents=True, exist_ok=True)
    for replica in plan.site.replicas:
        weights = replica.weights
        sources = () if replica.host != host or weights.served_by.reads_files else weights.sources
        for name in map(weights.folder, sources):
            (folder / name).mkdir(exist_ok=True)
        path = folder / replica.weights.file
        if replica.host == host and replica.weights.served_by.reads_files and not path.exists():
            MAKERS[replica.kind](path, context=replica.weights.context)


def _engine(address: str) -> httpx.Client:
    """A client of the engine at an address as in DOCKER_HOST."""
    kind, _, place = (address or "unix:///var/run/docker.sock").partition("://")
    transport = httpx.HTTPTransport(uds=place) if kind == "unix" else None
    base = "http://engine" if kind == "unix" else f"http://{place}"
    return httpx.Client(transport=transport, base_url=base, timeout=COMMAND_LIMIT_S, trust_env=False)


@dataclass(slots=True)
class Project:
    """One host's rendering, run by the engine under a name of its own; files and container names are as rendered."""

    plan: Plan
    host: str
    out: Path
    name: str
    # Words that put a docker command before another engine, as `("--host", "unix:///…")`.
    engine: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self.remove()  # of a run that was killed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def folder(self) -> Path:
        """Where the host's files were rendered."""
        return self.out / self.host

    @property
    def secrets(self) -> dict[str, str]:
        """Values by name, as the host's .env has them."""
        return read_env(self.folder / ".env")

    def docker(self, *words: str, check: bool = True) -> str:
        """What a docker command on the project's engine prints."""
        return docker(*self.engine, *words, check=check)

    def compose(self, *words: str, check: bool = True) -> str:
        """What a docker compose command for this project prints."""
        file = str(self.folder / "compose.yaml")
        return self.docker(
            "compose", "--project-name", self.name, "--file", file, "--progress", "plain", *words, check=check
        )

    def up(self, *words: str) -> None:
        """Starts what is missing or changed and waits until all is healthy; else says which service is not, and why."""
        try:
            self.compose("up", "--detach", "--wait", "--wait-timeout", str(UP_LIMIT_S), *words)
        except (CommandFailed, subprocess.TimeoutExpired) as error:
            raise CommandFailed(f"{error}\n{self.what_is_wrong()}") from None

    def remove(self) -> None:
        """Takes away containers, networks and volumes of this project, and says so when something stays."""
        if any(map(self.objects, KINDS)):
            self.compose("down", "--volumes", "--remove-orphans", "--timeout", str(STOP_S), check=False)
            left = {kind: self.objects(kind) for kind in KINDS}
            assert not any(left.values()), f"{self.name}: still there after down: {left}"

    def objects(self, kind: str) -> set[str]:
        """Names of the project's containers, networks or volumes."""
        filters = json.dumps({"label": [f"com.docker.compose.project={self.name}"]})
        path = f"/{kind}s/json?all=1" if kind == "container" else f"/{kind}s?"
        found = self._asked(f"{path}&filters={filters}")
        items = found["Volumes"] or [] if kind == "volume" else found
        return {item["Names"][0][1:] if kind == "container" else item["Name"] for item in items}

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows of a container."""
        found: dict[str, Any] = self._asked(f"/containers/{container}/json")
        return found

    def _asked(self, path: str) -> Any:
        """An answer of the engine: looking is frequent here, and a docker command costs a tenth of a second."""
        with _engine(self.engine[1] if self.engine else os.environ.get("DOCKER_HOST", "")) as client:
            answer = client.get(path)
        if answer.is_error:
            raise CommandFailed(f"{path}: {answer.text}")
        return answer.json()

    def states(self) -> dict[str, str]:
        """`healthy`, `starting`, `unhealthy` or the container's state, by container."""
        states = {name: self.inspect(name)["State"] for name in sorted(self.objects("container"))}
        return {
            name: state.get("Health", {}).get("Status", "no health check") if state["Running"] else state["Status"]
            for name, state in states.items()
        }

    def ids(self) -> dict[str, str]:
        """Ids by container: another one means that it was made anew."""
        return {name: str(self.inspect(name)["Id"]) for name in sorted(self.objects("container"))}

    def wait_healthy(self, deadline_s: float = UP_LIMIT_S) -> None:
        """Returns when every container is healthy."""
        wait_until(
            lambda: set(self.states().values()) == {"healthy"}, deadline_s, f"all containers healthy: {self.states()}"
        )

    def what_is_wrong(self) -> str:
        """Every container that is not healthy, with its last health check and its last lines."""
        parts = []
        for name, state in self.states().items():
            if state != "healthy":
                checks = self.inspect(name)["State"].get("Health", {}).get("Log") or [{}]
                last_check = str(checks[-1].get("Output", "none")).strip()[-LOG_WIDTH:]
                lines = "\n".join(line[-LOG_WIDTH:] for line in docker_logs(self, name, LOG_LINES).splitlines())
                parts.append(f"--- {name} is {state}; last check: {last_check!r}\n{lines}")
        return "\n".join(parts)


def program_of(project: Project, container: str) -> psutil.Process:
    """The container's program: below its init, and for a llama-server below its watchdog, too."""
    below = psutil.Process(project.inspect(container)["State"]["Pid"]).children(recursive=True)
    return next((item for item in below if item.name() == "llama-server"), below[0])


def reached_from(project: Project, service: str) -> set[tuple[str, int]]:
    """What a program in a container can connect to, by service and port: tried by every address of every container.

    From inside its network namespace, with the tools of this machine: the image may have none.
    """
    containers = {
        item.name: project.inspect(f"{item.host}-{item.name}") for item in project.plan.services_of(project.host)
    }
    places = [
        [item.name, network["IPAddress"], port.number]
        for item in project.plan.services_of(project.host)
        for network in containers[item.name]["NetworkSettings"]["Networks"].values()
        for port in item.ports
    ]
    inside = f"--net=/proc/{containers[service]['State']['Pid']}/ns/net"
    words = ["nsenter", inside, "python3", "-c", TRY_ALL, json.dumps(places)]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    return {(name, port) for name, port in map(json.loads, said.splitlines())}


@contextmanager
def frozen(project: Project, container: str) -> Iterator[None]:
    """The container's program stands still inside the block, and answers nothing; the engine takes it for running."""
    program = program_of(project, container)
    program.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            program.resume()


def docker_logs(project: Project, container: str, lines: int | None = None) -> str:
    """A container's output on both streams, or its last lines."""
    tail = ["--tail", str(lines)] if lines else []
    command = ["docker", *project.engine, "logs", *tail, container]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_LIMIT_S, check=False
    )
    return done.stdout


def patiently(bring_up: Callable[[], object], is_well: Callable[[], bool], deadline_s: float = 900) -> None:
    """Brings a site up; on a machine so busy that a service misses its start timeout, again when it has made it."""
    try:
        bring_up()
    except AssertionError:
        wait_until(is_well, deadline_s, "every container healthy after all")
        bring_up()


@dataclass(slots=True)
class Client:
    """A client with a key at the gateway's address."""

    base: str
    key: str
    timeout_s: float = 60

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """The gateway's answer, whatever it is."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with httpx.Client(trust_env=False, timeout=self.timeout_s, base_url=self.base, headers=headers) as client:
            return client.request(method, path, json=body)

    def admin(self, port: int = 4002) -> Client:
        """The same key at the operator's own port of the gateway's host."""
        return Client(f"http://127.0.0.1:{port}", self.key, self.timeout_s)

    def chat(self, model: str = "chat", **options: Any) -> httpx.Response:
        """The answer to one question."""
        message = {"role": "user", "content": options.pop("content", "hello")}
        return self.send("POST", "/v1/chat/completions", {"model": model, "messages": [message], **options})

    def chat_text(self, model: str = "chat", **options: Any) -> str:
        """The text of the answer to one question."""
        response = self.chat(model, **options)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])


def replica_of(response: httpx.Response) -> str:
    """The replica that answered, as the balancer named it and the gateway passes it on."""
    return response.headers["llm_provider-x-replica"]


def streamed_text(body: str) -> str:
    """The text of all events of a streamed chat."""
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events[-2:]
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@dataclass(slots=True)
class Load:
    """Clients that ask one question after the other until the block ends; then `results` has the answers in order."""

    client: Client
    clients: int = 3
    most: int = 2000
    # Status (0: no answer at all) and the replica that answered.
    results: list[tuple[int, str]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self.clients)
        for number in range(self.clients):
            self._pool.submit(self._ask, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        assert self._pool is not None
        self._pool.shutdown()

    def _ask(self, number: int) -> None:
        for turn in range(self.most // self.clients):
            if self._stop.is_set():
                return
            try:
                response = self.client.chat(content=f"question {number} {turn}", max_tokens=10)
                self.results.append((response.status_code, response.headers.get("llm_provider-x-replica", "")))
            except httpx.HTTPError:
                self.results.append((0, ""))
            self._stop.wait(PAUSE_S)

    def wait_for(self, more: int, deadline_s: float = 60) -> None:
        """Returns after so many more answers."""
        target = len(self.results) + more
        wait_until(lambda: len(self.results) >= target, deadline_s, f"{more} more answers under load")

    def wait_for_replica(self, replica: str, deadline_s: float = 60) -> None:
        """Returns when that replica has answered from now on."""
        start = len(self.results)
        wait_until(lambda: replica in {name for _, name in self.results[start:]}, deadline_s, f"an answer by {replica}")

    def failures(self) -> list[tuple[int, str]]:
        """Every answer but 200."""
        return [result for result in self.results if result[0] != 200]


def files_with(folder: Path, values: Iterable[str], *, but: set[str]) -> list[str]:
    """Files below a folder that contain one of the values; parts of a path named in `but` are left out."""
    wanted = [value.encode() for value in values]
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and not but & set(path.relative_to(folder).parts)
    )
    return [str(path.relative_to(folder)) for path in files if any(value in path.read_bytes() for value in wanted)]
