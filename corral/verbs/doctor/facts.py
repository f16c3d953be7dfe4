"""What a host says about itself: one shell script, one round trip, no program that a plain Linux lacks."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from corral.components import litellm
from corral.errors import CorralError
from corral.render.output import MANIFEST
from corral.render.secrets import ENV_FILE, FOLDER
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import parts, section
from corral.verbs.status.certificates import certificate_lines, understood_ends

TIME_SERVICE = "timedatectl show --property NTPSynchronized --value 2>/dev/null"
UP_TO_WHAT_EXISTS = 'until [ -e "$place" ] || [ "$place" = / ] || [ "$place" = . ]; do place=$(dirname "$place"); done'
# Both, since each of them may be closed to this user.
KERNEL_MESSAGES = "(journalctl -k -b -q --no-pager; dmesg) 2>/dev/null | grep -o 'NVRM: Xid .*' | sort -u | tail -n 50"
_XID = re.compile(r"^NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)[, ]*(.*)$", re.MULTILINE)
_PROCESS = re.compile(r'\(\("([^"]+)",pid=(\d+)')


@dataclass(frozen=True, slots=True)
class Filesystem:
    """Room on a disk."""

    purpose: str
    mount: str
    free_mib: int


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A file or folder; `mode` as three or four octal digits, empty when there is none."""

    mode: str = ""
    size: int = 0
    digest: str = ""
    magic: str = ""

    @property
    def exists(self) -> bool:
        """Whether it is there."""
        return bool(self.mode)


@dataclass(frozen=True, slots=True)
class Xid:
    """An error that the NVIDIA driver has told the kernel: the card's PCI slot, the error's number, and its words."""

    pci: str
    code: int
    words: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it; what could not be found out is empty."""

    # Why the host could not be asked at all.
    problem: str = ""
    engine_version: str = ""
    engine_problem: str = ""
    compose_version: str = ""
    compose_problem: str = ""
    # `docker info`.
    info: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    # Groups of the session; a user just added to one gets it at the next login.
    groups: frozenset[str] = frozenset()
    future_groups: frozenset[str] = frozenset()
    machine: str = ""
    cores: int = 0
    cpu_flags: frozenset[str] = frozenset()
    ram_mib: int = 0
    swap_mib: int = 0
    addresses: frozenset[str] = frozenset()
    # Addresses that are listened on, by port.
    listeners: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    # Who listens, by port, where it can be seen.
    holders: Mapping[int, str] = field(default_factory=dict)
    filesystems: tuple[Filesystem, ...] = ()
    is_clock_synchronised: bool | None = None
    # How far the host's clock is ahead of this machine's; None for this machine itself.
    clock_ahead_s: float | None = None
    # By path below the rendered folder.
    files: Mapping[str, SeenFile] = field(default_factory=dict)
    # By file name; the models folder itself as `.`.
    models: Mapping[str, SeenFile] = field(default_factory=dict)
    # When each certificate ends; None when it cannot be read, not there on a host without openssl.
    certificates: Mapping[str, datetime | None] = field(default_factory=dict)
    has_nvidia_hook: bool = False
    # Through which AMD and Intel cards are reached: the number of the group that owns each.
    device_files: Mapping[str, int] = field(default_factory=dict)
    # The kernel's messages about cards since the host was started, where this user may read them.
    xids: tuple[Xid, ...] = ()
    # Of the running gateway.
    litellm_version: str = ""

    @property
    def is_reachable(self) -> bool:
        """Whether the engine answers."""
        return not self.problem and bool(self.engine_version)


# --- asking ----------------------------------------------------------------------------------------------------------


def collect(host: ComposeHost) -> Facts:
    """What a host says about itself; never raises, `problem` says why it could not be asked."""
    try:
        done = host.run(["sh"], given=script(host).encode(), check=False)
        ahead = _clock_ahead_s(host)
    except CorralError as error:
        return Facts(problem=str(error).removeprefix(f"{host.name}: "))
    return understood(parts(done.out), ahead)


def _clock_ahead_s(host: ComposeHost) -> float | None:
    """Seconds that a far host's clock is ahead; half of the way there and back is the error."""
    if host.ssh is None:
        return None
    before = time.time()
    said = host.run(["date", "+%s.%N"], check=False).out.strip()
    after = time.time()
    match = re.match(r"\d+(\.\d+)?", said)
    return float(match[0]) - (before + after) / 2 if match else None


def script(host: ComposeHost) -> str:
    """The shell script that asks a host about itself."""
    folder, models = shlex.quote(host.folder), shlex.quote(host.models_folder)
    secrets = [secret.name for secret in host.plan.secrets_of(host.name)]
    private = shlex.join([ENV_FILE, FOLDER, *(f"{FOLDER}/{name}" for name in secrets)])
    lines = [
        "{ export LC_ALL=C",
        *_part("engine", "docker version --format '{{.Server.Version}}' 2>&1", 'echo "code $?"'),
        *_part("compose", "docker compose version --short 2>&1", 'echo "code $?"'),
        *_part("info", "docker info --format '{{json .}}' 2>/dev/null"),
        *_part("user", "id -un", "id -nG", 'id -nG "$(id -un)"'),
        *_part("cpu", "uname -m", "getconf _NPROCESSORS_ONLN || echo 0", "grep -m 1 -i '^flags' /proc/cpuinfo"),
        *_part("memory", "grep -E '^(MemTotal|SwapTotal):' /proc/meminfo"),
        *_part("addresses", "PATH=$PATH:/usr/sbin:/sbin ip -j address 2>/dev/null"),
        *_part("programs", "ss -H -l -t -n -p 2>/dev/null"),
        *_part("published", "docker ps --format '{{.Names}} {{.Ports}}' 2>/dev/null"),
        *_part("disks", *_disk_lines(host)),
        *_part("clock", f"{TIME_SERVICE} || chronyc -n tracking 2>/dev/null"),
        *_part("files", f"(cd {folder} 2>/dev/null && {{", *_digest_lines(_manifest_paths(host)), "})"),
        *_part("private", f"(cd {folder} 2>/dev/null && stat -c '%a %s %n' {private} 2>/dev/null)"),
        *_part("digests", f"(cd {folder} 2>/dev/null && sha256sum {private} 2>/dev/null)"),
        *_part("models", f"(cd {models} 2>/dev/null && {{ stat -L -c '%a %s %n' .", *_model_lines(host), "})"),
        *_part("certificates", *certificate_lines(host)),
        *_part("hook", "PATH=$PATH:/usr/local/bin:/usr/bin command -v nvidia-container-runtime-hook"),
        *_part("devices", "stat -L -c '%n %g' /dev/kfd /dev/dri/render* 2>/dev/null"),
        *_part("xids", KERNEL_MESSAGES),
        *_part("litellm", *_gateway_lines(host)),
        "} </dev/null",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _part(name: str, *lines: str) -> list[str]:
    return [section(name), *lines]


def _disk_lines(host: ComposeHost) -> list[str]:
    """Free space where the rendering, the models and the engine's own data lie, or would lie."""
    folders = {"rendering": host.folder, "models": host.models_folder}
    lines = [
        f'place={shlex.quote(folder)}; {UP_TO_WHAT_EXISTS}; echo "{name} $(df -P -k "$place" | tail -n 1)"'
        for name, folder in folders.items()
    ]
    root = "root=$(docker info --format '{{.DockerRootDir}}' 2>/dev/null)"
    return [*lines, f'{root}; [ -d "$root" ] && echo "engine $(df -P -k "$root" | tail -n 1)"']


def _manifest_paths(host: ComposeHost) -> list[str]:
    try:
        return sorted(json.loads((host.rendered / MANIFEST).read_bytes()))
    except (OSError, ValueError):
        return []


def _digest_lines(paths: list[str]) -> list[str]:
    return [f"sha256sum {shlex.join(paths)} 2>/dev/null" if paths else ":"]


def _model_lines(host: ComposeHost) -> list[str]:
    """Mode, size, name and the first four bytes (in hexadecimal) of every model file."""
    files = shlex.join(sorted(host.model_sources))
    if not files:
        return [""]
    magic = "magic $(head -c 4 \"$file\" | od -A n -t x1 | tr -d ' ')"
    return [f'for file in {files}; do stat -L -c \'%a %s %n\' "$file" 2>/dev/null && echo "{magic}"; done']


def _gateway_lines(host: ComposeHost) -> list[str]:
    ask = "import importlib.metadata as m; print(m.version('litellm'))"
    services = host.plan.services_of(host.name)
    containers = [item.container_name for item in services if item.component == litellm.COMPONENT]
    return [f"{shlex.join(['docker', 'exec', name, 'python3', '-c', ask])} 2>/dev/null" for name in containers]


# --- understanding ---------------------------------------------------------------------------------------------------


def understood(found: Mapping[str, str], clock_ahead_s: float | None = None) -> Facts:
    """What the parts of the script's answer say."""
    if not found:
        return Facts(problem="the host gave no answer")
    engine, engine_problem = _version(found.get("engine", ""))
    compose, compose_problem = _version(found.get("compose", ""))
    user = [*found.get("user", "").splitlines(), "", "", ""]
    cpu = [*found.get("cpu", "").splitlines(), "", "", ""]
    memory = {name: int(kib) // 1024 for name, kib in re.findall(r"(\w+):\s+(\d+)", found.get("memory", ""))}
    return Facts(
        engine_version=engine,
        engine_problem=engine_problem,
        compose_version=compose,
        compose_problem=compose_problem,
        info=_json(found.get("info", ""), {}),
        user=user[0],
        groups=frozenset(user[1].split()),
        future_groups=frozenset(user[2].split()),
        machine=cpu[0],
        cores=int(cpu[1]) if cpu[1].isdecimal() else 0,
        cpu_flags=frozenset(cpu[2].partition(":")[2].split()),
        ram_mib=memory.get("MemTotal", 0),
        swap_mib=memory.get("SwapTotal", 0),
        addresses=_addresses(found.get("addresses", "")),
        listeners=_listeners(found.get("programs", "")),
        holders=_holders(found.get("programs", ""), found.get("published", "")),
        filesystems=tuple(_filesystems(found.get("disks", ""))),
        is_clock_synchronised=_is_synchronised(found.get("clock", "")),
        clock_ahead_s=clock_ahead_s,
        files=_files(found),
        models=_models(found.get("models", "")),
        certificates=understood_ends(found.get("certificates", "")),
        has_nvidia_hook=bool(found.get("hook", "").strip()),
        device_files={
            name: int(group)
            for name, _, group in (line.partition(" ") for line in found.get("devices", "").splitlines())
        },
        xids=tuple(Xid(slot, int(code), words) for slot, code, words in _XID.findall(found.get("xids", ""))),
        litellm_version=found.get("litellm", "").strip(),
    )


def _version(text: str) -> tuple[str, str]:
    """A version, or what was said instead of one."""
    body, _, code = text.rpartition("code ")
    body = body.strip()
    if code.strip() == "0" and re.match(r"v?\d", body.splitlines()[-1] if body else ""):
        return body.splitlines()[-1].removeprefix("v"), ""
    return "", body or f"ended with code {code.strip() or '?'}"


def _json(text: str, default: Any) -> Any:
    """What a program printed as JSON, where it did."""
    try:
        return json.loads(text) or default
    except ValueError:
        return default


def _addresses(text: str) -> frozenset[str]:
    """The machine's own addresses, as `ip` lists them."""
    return frozenset(item["local"] for link in _json(text, []) for item in link["addr_info"] if "local" in item)


def _listeners(programs: str) -> dict[int, tuple[str, ...]]:
    """Addresses that programs listen on, by port, as `ss` lists them."""
    found: dict[int, set[str]] = {}
    for line in programs.splitlines():
        words = line.split()
        if len(words) > 3:  # noqa: PLR2004 - state, queues, local address
            address, _, port = words[3].rpartition(":")
            plain = address.partition("%")[0].strip("[]").removeprefix("::ffff:")
            found.setdefault(int(port), set()).add("::" if plain == "*" else plain)
    return {port: tuple(sorted(addresses)) for port, addresses in sorted(found.items())}


def _holders(programs: str, published: str) -> dict[int, str]:
    """Who listens on a port: the program as `ss` shows it, or better the container that it is published for."""
    found: dict[int, str] = {}
    for line in programs.splitlines():
        words = line.split()
        process = _PROCESS.search(line)
        if len(words) > 3 and process:  # noqa: PLR2004 - state, queues, local address
            found[int(words[3].rpartition(":")[2])] = f"{process[1]} (pid {process[2]})"
    for line in published.splitlines():
        container, _, ports = line.partition(" ")
        for port in re.findall(r":(\d+)->", ports):
            found[int(port)] = f"the container {container}"
    return found


def _filesystems(text: str) -> list[Filesystem]:
    found = []
    for line in text.splitlines():
        match line.split(maxsplit=6):
            case [purpose, _, _, _, free, _, mount] if free.isdecimal():
                found.append(Filesystem(purpose, mount, int(free) // 1024))
    return found


def _is_synchronised(text: str) -> bool | None:
    word = text.strip().lower()
    if word in ("yes", "no"):
        return word == "yes"
    leap = re.search(r"leap status\s*:\s*(.+)", word)
    return leap[1].strip() == "normal" if leap else None


def _files(found: Mapping[str, str]) -> dict[str, SeenFile]:
    digests = {}
    for part in ("files", "digests"):
        for line in found.get(part, "").splitlines():
            digest, _, name = line.partition("  ")
            digests[name] = digest
    files = {name: SeenFile("?", 0, digest) for name, digest in digests.items()}
    for line in found.get("private", "").splitlines():
        match line.split(maxsplit=2):
            case [mode, size, name]:
                files[name] = SeenFile(mode, int(size), digests.get(name, ""))
    return files


def _models(text: str) -> dict[str, SeenFile]:
    found: dict[str, SeenFile] = {}
    last = ""
    for line in text.splitlines():
        match line.split(maxsplit=2):
            case ["magic", magic]:
                old = found[last]
                found[last] = SeenFile(old.mode, old.size, magic=bytes.fromhex(magic).decode("latin-1"))
            case [mode, size, name]:
                last = name
                found[last] = SeenFile(mode, int(size))
    return found
