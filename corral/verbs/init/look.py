"""What a machine has, asked with one shell script: cards, memory, Docker, model files, servers that run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.config.file_names import OLLAMA_REGISTRY, OLLAMA_USER
from corral.config.inventory import PATTERNS
from corral.contributions import is_systems
from corral.errors import CorralError
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import CARDS_SCRIPT, assigned, parts
from corral.units import counted
from corral.verbs.init.cards import FoundCard, cards_in
from corral.verbs.init.said import items, json_in, mapping
from corral.verbs.init.servers import FoundServer, servers_in

SCRIPT = Path(__file__).with_suffix(".sh")
# Seconds that an answer may take; a folder on a slow network share takes longest.
LIMIT_S = 20
SYSTEM = "/sys"
# Where makers' tools are that a session over ssh does not look for.
MORE_PATH = "/usr/local/bin:/opt/rocm/bin:/opt/homebrew/bin:/usr/lib/wsl/lib:/usr/sbin:/sbin"
# Ollama, LM Studio, llama-server and MLX, vLLM, LiteLLM.
PORTS = (11434, 1234, 8080, 8000, 4000)
GIB = 1 << 30
# Further parts of a split model, and files that are no models by themselves.
NO_MODEL = re.compile(r"(?i)-(?!00001)\d{5}-of-\d{5}\.gguf$|(^|[/_])(mmproj|imatrix)[^/]*$|mmproj[^/]*\.gguf$")
PROJECTOR = re.compile(r"(?i)mmproj[^/]*\.gguf$")
KINDS = ("hub", "ollama", "lmstudio", "llama", "folder")
HUB_FILE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)")


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A model file: as the inventory names it, in which store, and its projector if one lies beside it."""

    source: str
    store: str
    name: str
    revision: str = ""
    projector: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """All of it; `notes` are what a person should know besides."""

    name: str
    ssh: str
    is_mac: bool = False
    words: str = ""
    cores: int = 0
    ram_gib: int = 0
    has_avx: bool = True
    # Its address in the network; empty when it was not found.
    address: str = ""
    cards: tuple[FoundCard, ...] = ()
    docker: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    stores: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FoundFile, ...] = ()
    servers: tuple[FoundServer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nodes(self) -> list[FoundServer]:
        """Servers that the gateway reaches."""
        is_here = self.is_mac and not self.ssh
        return [server for server in self.servers if server.models and (server.is_open or is_here)]

    @property
    def in_short(self) -> str:
        """What a farm could use, as `2 cards (rtx-3090), 3 model files, ollama`; empty without any of these."""
        kinds = ", ".join(sorted({card.kind for card in self.cards}))
        found = [
            f"{counted(len(self.cards), 'card')} ({kinds})" if self.cards else "",
            counted(len(self.files), "model file") if self.files else "",
            *sorted({server.engine or "a server" for server in self.servers if server.models}),
        ]
        return ", ".join(filter(None, found))

    @property
    def remarks(self) -> list[str]:
        """What there is besides the machine itself: cards, servers that run, and notes."""
        lines = [f"card: {card.words}" for card in self.cards]
        for server in self.servers:
            words = f"{server.engine or 'an unknown server'} runs on port {server.port}"
            if server.models and server not in self.nodes:
                setting = " (OLLAMA_HOST=0.0.0.0)" if server.engine == "ollama" else ""
                words += (
                    " on loopback only, where no container reaches it, and takes memory of the same cards: stop it,"
                )
                words += f" or let it listen on {self.address or 'the network'}{setting} and run init again"
            lines.append(words)
        return [*lines, *self.notes]


def look(host: ComposeHost, folders: Iterable[str]) -> Machine:
    """Asks a machine; raises CorralError when it does not answer at all."""
    values = {
        "limit": str(LIMIT_S),
        "fields": CARDS_SCRIPT.partition("fields=")[2].split()[0],
        "system": SYSTEM,
        "folders": "\n".join(folders),
        "ports": " ".join(map(str, PORTS)),
    }
    path = f"PATH=$PATH:{MORE_PATH}" if MORE_PATH else ""
    script = "\n".join(
        ["{ export LC_ALL=C", path, assigned(values), SCRIPT.read_text(encoding="utf-8"), "} </dev/null"]
    )
    done = host.run(["sh"], given=f"{script}\n".encode(), limit_s=3 * LIMIT_S, check=False)
    said = parts(done.out)
    if len(said.get("machine", "").splitlines()) < 3:  # noqa: PLR2004 - name, system, processor
        raise CorralError(f"{host.ssh or 'this machine'}: gives no answer: {done.last_line}")
    return understood(said, host.ssh or "")


def understood(said: Mapping[str, str], ssh: str) -> Machine:
    """What the sections of an answer say."""
    name, system, *rest = said["machine"].splitlines()
    text, is_mac = "\n".join(rest), system == "Darwin"
    docker, docker_words = _docker(said)
    stores, files, notes = _files(said.get("models", ""))
    cards, card_notes = cards_in(said)
    pages = re.search(r"^pages (\d+) (\d+)$", text, re.MULTILINE)
    memory = re.search(r"^memory (\d+)$", text, re.MULTILINE)
    ram = int(pages[1]) * int(pages[2]) if pages else int(memory[1]) if memory else 0
    cores = re.search(r"^cores (\d+)$", text, re.MULTILINE)
    flags = re.search(r"^Flags:\s+(.*)$", text, re.MULTILINE)
    address = re.search(r"\bsrc ([\d.]+)", text) or (re.search(r"^([\d.]+)$", text, re.MULTILINE) if is_mac else None)
    model = re.search(r"^Model name:\s+(.+)$|^(Apple .+)$", text, re.MULTILINE)
    words = [(model[1] or model[2]) if model else rest[0], f"{cores[1] if cores else '?'} cores"]
    disk = re.search(r"^disk \S+ +\d+ +\d+ +(\d+)", text, re.MULTILINE)
    words += [
        f"{ram / GIB:.0f} GiB of memory",
        *([f"{int(disk[1]) >> 20} GiB free on disk"] if disk else []),
        docker_words,
    ]
    silent = [name.removeprefix("silent ") for name in said if name.startswith("silent ")]
    notes += [f"{name} hangs: no answer within {LIMIT_S} s; what it would say is not known" for name in silent]
    if "servers" not in said:
        notes.append("curl is not installed, so servers that run were not looked for")
    ssh_address = re.search(r"(?:^|@)(\d+\.\d+\.\d+\.\d+)$", ssh)
    return Machine(
        re.sub(r"[^a-z0-9-]+", "-", name.partition(".")[0].lower()).strip("-") or "box",
        ssh,
        is_mac,
        ", ".join(words),
        int(cores[1]) if cores else 0,
        int(ram // GIB),
        not flags or "avx" in flags[1].split(),
        ssh_address[1] if ssh_address else address[1] if address else "",
        cards,
        docker,
        tuple(sorted({int(group) for group in re.findall(r"^/dev/\S+ (\d+)$", said.get("devices", ""), re.MULTILINE)})),
        stores,
        files,
        servers_in(said.get("servers", "")),
        (*card_notes, *notes),
    )


def _docker(said: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """What Docker says of itself, with what hands out NVIDIA cards (`gpus`); and in words."""
    info = mapping(json_in(said.get("docker", "")))
    if not info.get("ServerVersion"):
        is_there = "docker" in said
        return {}, "Docker does not answer this user" if is_there else "no Docker"
    devices = [str(item.get("ID", "")) for item in items(info.get("DiscoveredDevices"))]
    has_hook = "nvidia" in (info.get("Runtimes") or {}) or "code 0" in said.get("hook", "")
    has_cdi = any(item.startswith("nvidia.com/gpu") for item in devices)
    options = " ".join(info.get("SecurityOptions") or [])
    info |= {"gpus": "reservation" if has_hook else "cdi" if has_cdi else "", "is_rootless": "rootless" in options}
    compose = "" if re.match(r"v?\d", said.get("compose", "")) else " without Compose"
    return info | {"selinux": "selinux" in options}, f"Docker {info['ServerVersion']}{compose}"


def _files(text: str) -> tuple[dict[str, str], tuple[FoundFile, ...], list[str]]:
    """Folders by the names that they get as stores, the model files in them, and what is to be said of them."""
    stores: dict[str, str] = {}
    files: list[FoundFile] = []
    notes: list[str] = []
    kind, store, paths = "", "", list[str]()
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("file", "model"):
            paths.append(rest)
        elif word == "absent":
            notes.append(f"{rest}: there is no such folder")
        elif word in KINDS:
            files += _in_store(kind, store, paths)
            kind, paths = "", []
            if is_systems(rest) or not re.fullmatch(PATTERNS["folder"].expression, rest):
                notes.append(f"{rest}: containers may not see such a folder; move its models to one of their own")
            elif rest not in stores.values():
                kind, store = word, {"folder": "files"}.get(word, word)
                alike = sum(name.rstrip("0123456789") == store for name in stores)
                store += str(alike + 1) if alike else ""
                stores[store] = rest
    files += _in_store(kind, store, paths)
    used = {item.store for item in files}
    return {name: folder for name, folder in stores.items() if name in used}, tuple(files), notes


def _in_store(kind: str, store: str, paths: list[str]) -> Iterator[FoundFile]:
    """The models of a store, as the inventory names them."""
    for path in sorted(path for path in paths if not NO_MODEL.search(path)):
        folder, _, file = path.rpartition("/")
        near = sorted(other for other in paths if PROJECTOR.search(other) and other.rpartition("/")[0] == folder)
        projector = near[0] if len(near) == 1 and folder else ""
        if kind == "ollama":
            registry, user, *names = path.split("/")
            is_usual = registry == OLLAMA_REGISTRY
            owner = [*([] if is_usual else [registry]), *([] if is_usual and user == OLLAMA_USER else [user])]
            yield FoundFile(f"ollama:{'/'.join([*owner, *names[:-1]])}:{names[-1]}", store, ":".join(names))
        elif kind == "hub" and (found := HUB_FILE.fullmatch(path)):
            start, commit = f"hf:{found[1]}/{found[2]}/", found[3]
            seen = HUB_FILE.fullmatch(projector)
            yield FoundFile(start + found[4], store, file, commit, start + seen[4] if seen else "")
        elif kind not in ("", "hub"):
            yield FoundFile(path, store, file, projector=projector)
