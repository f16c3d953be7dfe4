"""Hosts behind a real sshd with throw-away keys, on this machine's loopback or in a network namespace."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.needs import program
from tests.processes.helpers import Process, free_port, wait_until

READY_S = 30
SERVER = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
{environment}
"""
CLIENT = """\
Host {name}
    HostName {address}
    Port {port}
    User {user}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking accept-new
"""


@dataclass(slots=True)
class Sshd:
    """An sshd, started by `with`; `client_config` is what `ssh NAME` needs."""

    name: str
    folder: Path
    address: str = "127.0.0.1"
    # Network namespace it listens in; empty for the test's own.
    namespace: str = ""
    # Engine that its sessions talk to; empty for the machine's own.
    docker_host: str = ""
    port: int = field(default_factory=free_port)
    _process: Process = field(init=False)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("host_key", "user_key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True, timeout=30)
        environment = f"SetEnv DOCKER_HOST={self.docker_host}" if self.docker_host else ""
        config = self.folder / "sshd_config"
        config.write_text(
            SERVER.format(port=self.port, address=self.address, folder=self.folder, environment=environment)
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}"] if self.namespace else []
        self._process = Process([*enter, program("sshd"), "-D", "-e", "-f", config], self.folder / "sshd.log")
        self._process.__enter__()
        wait_until(lambda: "listening" in self._process.output, READY_S, f"sshd: {self._process.output}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, traceback)

    @property
    def client_config(self) -> str:
        """Lines of an ssh configuration that reach it by its name."""
        return CLIENT.format(
            name=self.name, address=self.address, port=self.port, user=getpass.getuser(), folder=self.folder
        )


def client_config(servers: Sequence[Sshd], path: Path) -> dict[str, str]:
    """Writes one ssh configuration for all of them; returns the variable by which corral finds it."""
    path.write_text("".join(server.client_config for server in servers))
    return {"CORRAL_SSH_CONFIG": str(path)}
