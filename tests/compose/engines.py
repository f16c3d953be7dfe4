"""A Docker engine for each host of a site, in a network namespace of its own: the host's address, and cards it lacks.

Two hosts see each other over a cable (a veth pair); the test's own namespace has a cable to each. Nothing else is
connected. `nvidia-container-runtime-hook` does nothing: it only makes the engine know the driver "nvidia", so
that unmodified reservations of cards work; the engine still tells every container which card it was given.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.processes.helpers import Process, wait_until

PREFIX = "corral-test-"
READY_S = 60
# Most memory for an engine's files: written and thrown away in a fraction of a disk's time.
ROOM = "6g"
# How engines keep images.
DRIVER = "overlay2"
FOLDERS = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
HOOK = """#!/bin/sh
exit 0
"""


def run(*command: str, check: bool = True) -> str:
    """What a command prints; an error with its words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(slots=True)
class Engine:
    """An engine in its own network namespace with an address, started by `with` and gone without a trace after it."""

    name: str
    address: str
    """With the length of its network's prefix."""
    folder: Path
    # Of the machine's own engine, and there from the start.
    images: Sequence[str] = ()
    options: Sequence[str] = ()
    process: Process = field(init=False)

    @property
    def namespace(self) -> str:
        """Name of the network namespace."""
        return f"{PREFIX}{self.name}"

    @property
    def socket(self) -> str:
        """Where it listens, as DOCKER_HOST has it."""
        return f"unix://{self.folder}/docker.sock"

    @property
    def words(self) -> tuple[str, ...]:
        """What has to stand after `docker` to reach this engine."""
        return "--host", self.socket

    def __enter__(self) -> Self:
        self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "corral-test", str(self.folder))
        run("ip", "netns", "add", self.namespace)
        run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        if self.images:
            self._share()
        hooks = self.folder / "hooks"
        hooks.mkdir(parents=True)
        hook = hooks / "nvidia-container-runtime-hook"
        hook.write_text(HOOK)
        hook.chmod(0o755)
        # nsenter, not `ip netns exec`: that hides the control groups.
        folders = [f"--{name}={self.folder / place}" for name, place in FOLDERS.items()]
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}"]
        command = [*enter, "dockerd", *self.words, *folders, "--add-runtime=nvidia=runc", f"--storage-driver={DRIVER}"]
        command += self.options
        path = os.pathsep.join([str(hooks), os.environ["PATH"]])
        self.process = Process(command, self.folder / "dockerd.log", environment={"PATH": path})
        self.process.__enter__()
        wait_until(self._answers, READY_S, f"an engine for {self.name}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.__exit__(kind, error, traceback)
        self._clear()

    def _share(self) -> None:
        """Describes the images as the machine's own engine does, and mounts their layers: a copy takes a minute."""
        root, data = Path(run("docker", "info", "--format", "{{.DockerRootDir}}").strip()), self.folder / "data"
        own, described = root / "image" / DRIVER, data / "image" / DRIVER
        shutil.copytree(own / "imagedb", described / "imagedb")
        shutil.copy(own / "repositories.json", described)
        said = run("docker", "image", "inspect", "--format", "{{json .GraphDriver.Data}}", *self.images)
        paths = ":".join(":".join(json.loads(line).values()) for line in said.splitlines())
        layers = {Path(path).parent.name for path in paths.split(":")}
        for layer in (own / "layerdb" / "sha256").iterdir():
            if (layer / "cache-id").read_text() in layers:
                shutil.copytree(layer, described / "layerdb" / "sha256" / layer.name)
        run("mount", "--bind", str(data), str(data))  # as the engine would by itself, and hide what is mounted below
        run("mount", "--make-shared", str(data))
        shutil.copytree(root / DRIVER / "l", data / DRIVER / "l", symlinks=True)
        for name in layers:
            there, here = root / DRIVER / name, data / DRIVER / name
            (here / "diff").mkdir(parents=True)
            for file in filter(Path.is_file, there.iterdir()):
                shutil.copy(file, here)
            run("mount", "-o", "bind,ro", str(there / "diff"), str(here / "diff"))

    def _answers(self) -> bool:
        if self.process.exit_code() is not None:
            raise ChildProcessError(f"the engine of {self.name} ended:\n{self.process.output[-2000:]}")
        return bool(run("docker", *self.words, "version", "--format", "{{.Server.Version}}", check=False).strip())

    def _clear(self) -> None:
        run("ip", "netns", "delete", self.namespace, check=False)
        for mount in sorted(_mounts_in(self.folder), reverse=True):
            run("umount", "--lazy", mount, check=False)


def _mounts_in(folder: Path) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point == str(folder) or point.startswith(f"{folder}/")]


@dataclass(slots=True)
class Lab:
    """An engine for each host; the test can reach the addresses of both."""

    gateway: Engine
    servers: Engine
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        with self._stack:  # ends what was started when a later step fails
            for engine in (self.gateway, self.servers):
                self._stack.enter_context(engine)
            connect(self.gateway, self.servers)
            for number, engine in enumerate((self.gateway, self.servers)):
                self._connect_test(engine, number)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _connect_test(self, engine: Engine, number: int) -> None:
        """A cable between the test's own namespace and an engine's; it goes with the namespace."""
        space, cable = engine.namespace, f"corral-test{number}"
        here, there = f"198.51.100.{4 * number + 1}", f"198.51.100.{4 * number + 2}"
        run("ip", "link", "delete", cable, check=False)  # of a run that was killed
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "test", "netns", space)
        run("ip", "address", "add", f"{here}/30", "dev", cable)
        run("ip", "link", "set", cable, "up")
        run("ip", "-n", space, "address", "add", f"{there}/30", "dev", "test")
        run("ip", "-n", space, "link", "set", "test", "up")
        run("ip", "route", "replace", engine.address.partition("/")[0], "via", there)


@dataclass(slots=True)
class Switch:
    """A network of its own that joins any number of engines, and the test at an address of it."""

    engines: Sequence[Engine]
    address: str
    """The test's own, with the length of the network's prefix."""
    namespace: str = f"{PREFIX}switch"
    cable: str = "corral-switch"
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        self._clear()
        with self._stack:  # ends what was started when a later step fails
            self._stack.callback(self._clear)
            for engine in self.engines:
                self._stack.enter_context(engine)
            run("ip", "netns", "add", self.namespace)
            run("ip", "-n", self.namespace, "link", "add", "lan", "type", "bridge")
            run("ip", "-n", self.namespace, "link", "set", "lan", "up")
            for engine in self.engines:
                self._plug("lan", engine.name, engine.address, "-n", engine.namespace)
            self._plug(self.cable, "test", self.address)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def cut(self, engine: Engine) -> None:
        """From now on nothing reaches that engine, nor its containers."""
        run("ip", "-n", self.namespace, "link", "set", engine.name, "down")

    def _plug(self, end: str, port: str, address: str, *where: str) -> None:
        run("ip", *where, "link", "add", end, "type", "veth", "peer", "name", port, "netns", self.namespace)
        run("ip", *where, "address", "add", address, "dev", end)
        run("ip", *where, "link", "set", end, "up")
        run("ip", "-n", self.namespace, "link", "set", port, "master", "lan", "up")

    def _clear(self) -> None:
        run("ip", "link", "delete", self.cable, check=False)
        run("ip", "netns", "delete", self.namespace, check=False)


def connect(one: Engine, other: Engine) -> None:
    """A cable between two engines' namespaces, each end with its address."""
    run(
        "ip", "-n", one.namespace, "link", "add", "lan", "type", "veth", "peer", "name", "lan", "netns", other.namespace
    )
    for engine in (one, other):
        run("ip", "-n", engine.namespace, "address", "add", engine.address, "dev", "lan")
        run("ip", "-n", engine.namespace, "link", "set", "lan", "up")
