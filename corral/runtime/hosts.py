"""A Compose host and how to command it: on this machine, or over ssh with nothing of ours installed there.

The rendering is copied to the host and `docker compose` runs there. Everything that touches a host's containers goes
through here, so a verb never knows whether its host is near or far.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

from corral.build import Plan
from corral.contributions import Service
from corral.errors import CorralError, UsageError
from corral.files import private_folder
from corral.plan.site import bracketed, resolve
from corral.render.compose import project_name
from corral.runtime.causes import with_docker_cause
from corral.runtime.docker import PROJECT, Container, containers_in

if TYPE_CHECKING:
    from _typeshed import SupportsRead

COMMAND_LIMIT_S = 120
END_LIMIT_S = 10
CHUNK = 1 << 20
# One connection serves a whole command; a host that asks for a password is refused, one that vanishes is noticed.
SSH = (
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"),
    *("-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
)
# Environment variable that names another file than `~/.ssh/config`.
SSH_CONFIG = "CORRAL_SSH_CONFIG"
CPU_FILE = "compose.cpu.yaml"
# Folders in a host's rendered folder that belong to the machine they are on.
NOT_COPIED = {"models", "data", "logs", "keys"}
# A free port of this machine may be taken before ssh listens there.
FORWARD_TRIES = 3
# ssh's own exit code when there was no connection.
UNREACHABLE = 255
UNPACK = Path(__file__).with_name("unpack.sh")


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """What the command said when it failed: the last lines of stderr, or of stdout."""
        return "\n".join((self.err.strip() or self.out.strip()).splitlines()[-8:])

    @property
    def last_line(self) -> str:
        """The last line of these."""
        return self.words.rpartition("\n")[2] or "no answer"


class CommandError(CorralError):
    """A command on a host failed; the message names host, command and what it said."""

    def __init__(self, host: str, argv: Sequence[str], done: Done) -> None:
        self.done = done
        words = with_docker_cause(done.words) if argv[:2] == ["docker", "ps"] else done.words
        super().__init__(f"{host}: {shlex.join(argv)} failed ({done.code}): {words}")


@dataclass(frozen=True, slots=True)
class ComposeHost:
    """One Compose host of a plan, with its rendered folder on this machine."""

    plan: Plan
    name: str
    out: Path
    # Whether services that want a card run on the processor here: a machine without cards (`compose.cpu.yaml`).
    is_on_cpu: bool = False

    @property
    def rendered(self) -> Path:
        """The host's rendered folder on this machine."""
        return self.out / self.name

    @property
    def ssh(self) -> str | None:
        """Where ssh connects to; None for this machine."""
        return self.plan.site.host(self.name).ssh

    @property
    def folder(self) -> str:
        """The rendered folder as commands on the host see it."""
        if self.ssh is None:
            return str(self.rendered.resolve())
        return self.plan.site.host(self.name).folder or f"corral/{self.plan.inventory.name}/{self.name}"

    @property
    def models_folder(self) -> str:
        """The folder with model files as commands on the host see it."""
        folder = self.plan.site.host(self.name).models_dir
        return folder if folder.startswith("/") else f"{self.folder}/{folder.removeprefix('./')}"

    @property
    def model_sources(self) -> dict[str, str]:
        """Where every known model file that the host's servers read comes from."""
        replicas = [item for item in self.plan.site.replicas if item.host == self.name]
        return {file: source for item in replicas for file, source in item.files.items()}

    @property
    def files_without_stores(self) -> dict[str, tuple[str, str]]:
        """Model files by the path that each has where all are in the models folder: its path here, and its source."""
        site = self.plan.site
        alone = resolve(site.inventory, site.lock.without_places()).replicas
        pairs = [(there, other) for there, other in zip(site.replicas, alone, strict=True) if there.host == self.name]
        return {file: (there.file_of(source), source) for there, other in pairs for file, source in other.files.items()}

    @property
    def used_stores(self) -> list[str]:
        """The host's folders with model files, besides the models folder, that its servers read."""
        return [folder for folder, _ in self.plan.site.store_mounts(self.name, self.model_sources)]

    @property
    def services(self) -> list[Service]:
        """The planned services that run here: without cards there is nothing for those that only look at them."""
        return [item for item in self.plan.services_of(self.name) if not (self.is_on_cpu and item.needs_cards)]

    @property
    def project(self) -> str:
        """Name of the Compose project."""
        return project_name(self.plan, self.name)

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command as this machine starts it."""
        return list(command) if self.ssh is None else [*ssh_command(), self.ssh, "--", shlex.join(command)]

    def run(
        self,
        command: Sequence[str],
        *,
        given: bytes | None = None,
        limit_s: float = COMMAND_LIMIT_S,
        check: bool = True,
    ) -> Done:
        """Runs a command on the host; raises CommandError if it fails (with `check`), CorralError if it cannot run."""
        try:
            ended = subprocess.run(
                self.argv(command), input=given or b"", capture_output=True, timeout=limit_s, check=False
            )
        except FileNotFoundError as error:
            raise self._not_installed(error) from None
        except subprocess.TimeoutExpired:
            raise CorralError(f"{self.name}: {shlex.join(command)} did not end within {limit_s:.0f} s") from None
        return self._checked(command, _done(ended.returncode, ended.stdout, ended.stderr), check=check)

    @contextmanager
    def stream(self, command: Sequence[str]) -> Iterator[IO[bytes]]:
        """What a command on the host prints, while it prints it; however long that takes.

        Raises:
            CommandError: at the end of the block, if the command failed.
        """
        with self._process(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None  # noqa: S101 - for the type checker
            yield process.stdout
            process.stdout.close()

    def feed(self, command: Sequence[str], data: SupportsRead[bytes]) -> None:
        """Hands all of a stream to a command on the host; raises CommandError if the command fails."""
        with self._process(command, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None  # noqa: S101 - for the type checker
            with suppress(BrokenPipeError):  # its own message says why it ended
                shutil.copyfileobj(data, process.stdin, CHUNK)
            with suppress(BrokenPipeError):
                process.stdin.close()

    @contextmanager
    def _process(
        self, command: Sequence[str], *, stdin: int, stdout: int | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A command that the block talks to, ended with it; raises CommandError afterwards if the command failed."""
        with TemporaryFile() as complaints:
            try:  # in a session of its own: Ctrl-C is for this program, which then ends the command
                process = subprocess.Popen(
                    self.argv(command), start_new_session=True, stdin=stdin, stdout=stdout or complaints,
                    stderr=complaints,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise self._not_installed(error) from None
            try:
                yield process
            except BaseException:
                _end(process)
                raise
            code = process.wait()
            complaints.seek(0)
            self._checked([word for word in command if "\n" not in word], _done(code, b"", complaints.read()))

    def _not_installed(self, error: FileNotFoundError) -> CorralError:
        return CorralError(f"{self.name}: {error.filename} is not installed on this machine")

    def _checked(self, command: Sequence[str], done: Done, *, check: bool = True) -> Done:
        # Without a word it was reached: its output was not read to the end, or the command itself ended so.
        if self.ssh is not None and done.code == UNREACHABLE and done.words:
            raise CorralError(f"{self.name}: ssh {self.ssh} does not connect: {done.words}")
        if check and done.code != 0:
            raise CommandError(self.name, command, done)
        return done

    def compose_words(self, *arguments: str) -> list[str]:
        """`docker compose` for this host's project."""
        files = ["compose.yaml", *([CPU_FILE] if self.is_on_cpu else [])]
        named = [word for file in files for word in ("--file", f"{self.folder}/{file}")]
        return ["docker", "compose", "--project-directory", self.folder, *named, *arguments]

    def compose(self, *arguments: str, limit_s: float = COMMAND_LIMIT_S, check: bool = True) -> Done:
        """Runs `docker compose` for this host's project."""
        return self.run(self.compose_words(*arguments), limit_s=limit_s, check=check)

    def containers(self) -> list[Container]:
        """Every container of the project, stopped ones too, by name."""
        label = f"label={PROJECT}={self.project}"
        ids = self.run(["docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", label]).out.split()
        if not ids:
            return []
        return containers_in(self.run(["docker", "inspect", *ids], check=False).out)  # one may have gone in between

    def names_of(self, kind: str) -> set[str]:
        """Names of the networks (`network`) or volumes (`volume`) of the project."""
        label = f"label={PROJECT}={self.project}"
        return set(self.run(["docker", kind, "ls", "--filter", label, "--format", "{{.Name}}"]).out.split())

    def container_of(self, service: str) -> Container | None:
        """The container of a service now; None when there is none."""
        return next((item for item in self.containers() if item.service == service), None)

    def last_lines(self, container: str, count: int) -> str:
        """The last lines that a container printed; empty when there is no container of that name."""
        done = self.run(["docker", "logs", "--tail", str(count), container], check=False)
        return f"{done.out}{done.err}" if done.code == 0 else ""

    @contextmanager
    def forwarded(self, port: int, address: str = "127.0.0.1") -> Iterator[str]:
        """Base URL of a port of the host while the block runs; on another machine over ssh, never over the network.

        Args:
            port: where the program listens.
            address: the host's own address that the port is bound to.

        Raises:
            CorralError: ssh does not connect, or refuses to forward.
        """
        place = f"{bracketed(address)}:{port}"
        if self.ssh is None:
            yield f"http://{place}"
            return
        self.run(["true"])  # the connection that forwards
        spec = self._forward(place)
        try:
            yield f"http://{':'.join(spec.split(':')[:2])}"
        finally:
            self._control("cancel", spec)

    def _forward(self, place: str) -> str:
        """Lets the kept connection forward a free port of this machine's loopback; returns it as ssh spells it."""
        for _ in range(FORWARD_TRIES):
            spec = f"127.0.0.1:{_free_port()}:{place}"
            done = self._control("forward", spec)
            if done.returncode == 0:
                return spec
        raise CorralError(f"{self.name}: ssh {self.ssh} does not forward to {place}: {done.stderr.strip()}")

    def _control(self, action: str, spec: str) -> subprocess.CompletedProcess[str]:
        command = [*ssh_command(), "-O", action, "-L", spec, str(self.ssh)]
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)

    def copy(self) -> None:
        """Makes a far host's folder agree with the rendering, secrets included; other files there stay."""
        if self.ssh is None:
            return
        self.run(
            ["sh", "-c", UNPACK.read_text(encoding="utf-8"), "-", self.folder],
            given=_packed(self.rendered),
            limit_s=600,
        )


def _done(code: int, out: bytes, err: bytes) -> Done:
    return Done(code, out.decode(errors="replace"), err.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Closes the process's output and waits up to END_LIMIT_S for it to exit; kills it then, or if it reads input.

    To what reads its input, a mere end of it could pass for the whole of the data.
    """
    if process.stdout is not None:
        process.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_LIMIT_S)
    process.kill()
    process.wait()


def _free_port() -> int:
    """A port of this machine's loopback address on which nothing listens."""
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return int(link.getsockname()[1])


def ssh_command() -> list[str]:
    """How ssh is started; its connections are kept in a private folder."""
    folder = private_folder(Path(f"/tmp/corral-ssh-{os.getuid()}"))  # noqa: S108 - a socket's path must be short
    config = os.environ.get(SSH_CONFIG, "")
    return [*SSH, "-o", f"ControlPath={folder}/%C", *(("-F", config) if config else ())]


def refuse_swarm(plan: Plan) -> None:
    """Raises UsageError for a site that Docker Swarm runs."""
    if plan.site.is_swarm:
        raise UsageError("Docker Swarm runs this site, and this verb is for Compose hosts; see docs/swarm.md")


def compose_hosts(plan: Plan, out: Path, chosen: Iterable[str] | None = None) -> list[ComposeHost]:
    """The plan's Compose hosts that have services, in the inventory's order, or those of them that were chosen.

    Raises:
        UsageError: there are none; on a site of Swarm's the engine itself does what is asked for.
    """
    refuse_swarm(plan)
    busy = {service.host for service in plan.contributions.services}
    wanted = set(chosen) if chosen else busy
    names = [name for name in plan.inventory.hosts if name in wanted and name in busy and not plan.site.is_local(name)]
    if not names:
        words = "no host with Docker is meant, and this verb works with containers; `local` hosts have"
        raise UsageError(f"{words} up, status, logs, restart, down and doctor (docs/local.md)")
    return [ComposeHost(plan, name, out) for name in names]


def _packed(folder: Path) -> bytes:
    """A host's rendered folder as a tar archive, without what belongs to the machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            if path.name not in NOT_COPIED:
                archive.add(path, arcname=path.name, filter=without_owner)
    return buffer.getvalue()


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member that belongs to root and that only its owner may write: user numbers mean other people elsewhere."""
    return member.replace(uid=0, gid=0, uname="", gname="", mode=member.mode & 0o755, deep=False)
