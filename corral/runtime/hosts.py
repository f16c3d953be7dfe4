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
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from corral.build import Plan
from corral.contributions import Service
from corral.errors import CorralError, UsageError
from corral.plan.site import bracketed
from corral.runtime.docker import PROJECT, Container, containers_in

if TYPE_CHECKING:
    from _typeshed import SupportsRead

COMMAND_LIMIT_S = 120
END_LIMIT_S = 10
CHUNK = 1 << 20
SSH_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=15",
    "ControlMaster=auto",
    "ControlPersist=60",
)
# One connection serves a whole command; a host that asks for a password is refused, one that vanishes is noticed.
SSH = ("ssh", *(word for option in SSH_OPTIONS for word in ("-o", option)))
# Environment variable that names another file than `~/.ssh/config`.
SSH_CONFIG = "CORRAL_SSH_CONFIG"
CPU_FILE = "compose.cpu.yaml"
# Folders in a host's rendered folder that belong to the machine they are on.
NOT_COPIED = {"models", "data", "logs", "keys"}
# A free port of this machine may be taken before ssh listens there.
FORWARD_TRIES = 3
# ssh's own exit code when there was no connection.
UNREACHABLE = 255


UNPACK = """
set -eu
umask 077
mkdir -p "$1"
cd "$1"
if ! [ -O . ]; then
  echo "$1 belongs to another user of this host, who could change what is started; chown it to $(id -un)" >&2
  exit 1
fi
chmod 700 .
umask 022
mkdir -p secrets
chmod 700 secrets
rm -rf .incoming
trap 'rm -rf "$PWD/.incoming"' EXIT
mkdir -m 700 .incoming
tar -x -p --no-same-owner -C .incoming -f -
(cd .incoming && find . -type d) | while IFS= read -r folder; do mkdir -p "$folder"; done
(cd .incoming && find . ! -type d) | while IFS= read -r file; do mv -f ".incoming/$file" "$file"; done
"""
# Unpack an archive beside the files, then move each into place: a full disk leaves the old ones as they were. Every
# file belongs to the ssh user, and only that user may enter the folder. Containers read their files all the same: the
# daemon mounts each file or subfolder by itself, and those are readable for all.


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


class CommandError(CorralError):
    """A command on a host failed; the message names host, command and what it said."""

    def __init__(self, host: str, argv: Sequence[str], done: Done) -> None:
        self.done = done
        super().__init__(f"{host}: {shlex.join(argv)} failed ({done.code}): {done.words}")


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
    def services(self) -> list[Service]:
        """The planned services that run here: without cards there is nothing for those that only look at them."""
        return [item for item in self.plan.services_of(self.name) if not (self.is_on_cpu and item.needs_cards)]

    @property
    def project(self) -> str:
        """Name of the Compose project."""
        return f"{self.plan.inventory.name}-{self.name}".replace(".", "-")

    def argv(self, words: Sequence[str]) -> list[str]:
        """The words of a command as this machine starts them."""
        return list(words) if self.ssh is None else [*ssh_words(), self.ssh, "--", shlex.join(words)]

    def run(
        self,
        words: Sequence[str],
        *,
        given: bytes | None = None,
        limit_s: float = COMMAND_LIMIT_S,
        check: bool = True,
    ) -> Done:
        """Runs a command on the host; raises CommandError if it fails (with `check`), CorralError if it cannot run."""
        try:
            ended = subprocess.run(
                self.argv(words), input=given or b"", capture_output=True, timeout=limit_s, check=False
            )
        except FileNotFoundError as error:
            raise CorralError(f"{self.name}: {error.filename} is not installed on this machine") from None
        except subprocess.TimeoutExpired:
            raise CorralError(f"{self.name}: {shlex.join(words)} did not end within {limit_s:.0f} s") from None
        done = Done(ended.returncode, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace"))
        if self.ssh is not None and done.code == UNREACHABLE:
            raise CorralError(f"{self.name}: ssh {self.ssh} does not connect: {done.words}")
        if check and done.code != 0:
            raise CommandError(self.name, words, done)
        return done

    @contextmanager
    def stream(self, words: Sequence[str]) -> Iterator[IO[bytes]]:
        """What a command on the host prints, while it prints it; however long that takes.

        Raises:
            CommandError: at the end of the block, if the command failed.
        """
        with TemporaryFile() as complaints:
            process = self._started(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints)
            assert process.stdout is not None  # noqa: S101 - for the type checker
            try:
                yield process.stdout
            except BaseException:
                process.stdout.close()  # it ends by itself when its output is closed
                _wait(process)
                raise
            process.stdout.close()
            self._check_end(words, process.wait(), complaints)

    def feed(self, words: Sequence[str], data: SupportsRead[bytes]) -> None:
        """Hands all of a stream to a command on the host; raises CommandError if the command fails."""
        with TemporaryFile() as complaints:
            process = self._started(words, stdin=subprocess.PIPE, stdout=complaints, stderr=complaints)
            assert process.stdin is not None  # noqa: S101 - for the type checker
            try:
                with suppress(BrokenPipeError):  # its own words say why it ended
                    shutil.copyfileobj(data, process.stdin, CHUNK)
            except BaseException:
                process.kill()  # a mere end of the stream could pass for the whole of it
                raise
            finally:
                with suppress(BrokenPipeError):
                    process.stdin.close()
                code = process.wait()
            self._check_end(words, code, complaints)

    def _started(self, words: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C is for this program, which then lets the command end in good order."""
        try:
            return subprocess.Popen(self.argv(words), start_new_session=True, **streams)
        except FileNotFoundError as error:
            raise CorralError(f"{self.name}: {error.filename} is not installed on this machine") from None

    def _check_end(self, words: Sequence[str], code: int, complaints: IO[bytes]) -> None:
        complaints.seek(0)
        done = Done(code, "", complaints.read().decode(errors="replace"))
        if self.ssh is not None and code == UNREACHABLE:
            raise CorralError(f"{self.name}: ssh {self.ssh} does not connect: {done.words}")
        if code != 0:
            raise CommandError(self.name, [word for word in words if "\n" not in word], done)

    def compose_words(self, *words: str) -> list[str]:
        """`docker compose` for this host's project."""
        return [
            "docker",
            "compose",
            "--project-directory",
            self.folder,
            "--file",
            f"{self.folder}/compose.yaml",
            *(("--file", f"{self.folder}/{CPU_FILE}") if self.is_on_cpu else ()),
            *words,
        ]

    def compose(self, *words: str, limit_s: float = COMMAND_LIMIT_S, check: bool = True) -> Done:
        """Runs `docker compose` for this host's project."""
        return self.run(self.compose_words(*words), limit_s=limit_s, check=check)

    def containers(self) -> list[Container]:
        """Every container of the project, stopped ones too, by name."""
        label = f"label={PROJECT}={self.project}"
        ids = self.run(["docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", label]).out.split()
        if not ids:
            return []
        return containers_in(self.run(["docker", "inspect", *ids], check=False).out)  # one may have gone in between

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
            if done.code == 0:
                return spec
        raise CorralError(f"{self.name}: ssh {self.ssh} does not forward to {place}: {done.words}")

    def _control(self, action: str, spec: str) -> Done:
        words = [*ssh_words(), "-O", action, "-L", spec, str(self.ssh)]
        ended = subprocess.run(words, capture_output=True, timeout=COMMAND_LIMIT_S, check=False)
        return Done(ended.returncode, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace"))

    def copy(self) -> None:
        """Makes a far host's folder agree with the rendering, secrets included; other files there stay."""
        if self.ssh is None:
            return
        self.run(["sh", "-c", UNPACK, "-", self.folder], given=_packed(self.rendered), limit_s=600)


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Waits up to END_LIMIT_S for the process to exit, then kills it."""
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    """A port of this machine's loopback address on which nothing listens."""
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return int(link.getsockname()[1])


def ssh_words() -> list[str]:
    """How ssh is started; its connections are kept in a private folder."""
    folder = Path(f"/tmp/corral-ssh-{os.getuid()}")  # noqa: S108 - a socket's path must be short; checked below
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or not stat.S_ISDIR(facts.st_mode):
        raise CorralError(f"{folder}: not a folder of yours alone; remove it")
    config = os.environ.get(SSH_CONFIG, "")
    return [*SSH, "-o", f"ControlPath={folder}/%C", *(("-F", config) if config else ())]


def compose_hosts(plan: Plan, out: Path, chosen: Iterable[str] | None = None) -> list[ComposeHost]:
    """The plan's Compose hosts that have services, in the inventory's order, or those of them that were chosen."""
    busy = {service.host for service in plan.contributions.services}
    wanted = set(chosen) if chosen else busy
    names = [name for name in plan.inventory.hosts if name in wanted and name in busy and not plan.site.is_local(name)]
    if not names:
        raise UsageError("no host with Docker Compose is meant; `make demo` starts a `local` one")
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
