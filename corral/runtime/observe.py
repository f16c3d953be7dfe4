"""One snapshot of a running host: its containers, what is rendered there, what its balancer and its cards say.

One script asks for all of it, so that a far host costs one round trip. Memory is read from the control groups; where
they cannot be read (Docker runs in a virtual machine, as on macOS) `docker stats` is asked after all.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from corral.build import Plan
from corral.errors import CorralError
from corral.plan.site import Card
from corral.runtime.docker import MIB, PROJECT, SITE, Container, containers_in
from corral.runtime.haproxy import STATES, Server, balancer_of, parse_servers
from corral.runtime.hosts import ComposeHost
from corral.runtime.processes import ProcessHost

# Begin and end a script for a host; a section of its answer begins with its name.
BEGIN = """{ export LC_ALL=C
section() { printf '\\n\\036%s\\n' "$1"; }"""
END = "} </dev/null\n"
# Stands before the name of each part of an answer; no program prints it by itself.
MARK = "\x1e"
UNITS = {"B": 1, "KIB": 1024, "MIB": MIB, "GIB": 1024**3, "TIB": 1024**4, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
SCRIPT = Path(__file__).with_suffix(".sh")
# Prints a line with so many cells for every NVIDIA card, or nvidia-smi's complaint.
CARDS_SCRIPT, CARD_CELLS = Path(__file__).with_name("cards.sh").read_text(encoding="utf-8"), 10
# What version 1 of control groups prints is a number near 2**63.
NO_LIMIT = 1 << 60
_HASH = re.compile(r"^(\S+) ([0-9a-f]{64})$", re.MULTILINE)
_AMOUNT = re.compile(r"([\d.]+)\s*([A-Za-z]+)")


@dataclass(frozen=True, slots=True)
class SeenCard:
    """A card as nvidia-smi prints it; sizes in MiB, use in percent. One with the host's memory has a total of 0."""

    index: int
    uuid: str
    pci: str
    name: str
    total_mib: int
    used_mib: int | None
    use_percent: int | None
    celsius: int | None
    driver: str
    compute_capability: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of it for one host; `problem` says why there are no containers."""

    host: str
    problem: str = ""
    # Whether the host gave an answer; without one there is nothing but the problem.
    is_reached: bool = True
    # When the answer was there, in seconds since 1970.
    moment: float = 0
    containers: tuple[Container, ...] = ()
    # Hash of every service as it is rendered on the host; empty when Compose could not read it.
    hashes: Mapping[str, str] = field(default_factory=dict)
    hashes_problem: str = ""
    # What the balancer says of each replica; only of the balancer's own host.
    servers: Mapping[str, Server] = field(default_factory=dict)
    cards: tuple[SeenCard, ...] = ()
    # Why nvidia-smi shows no card although it is there.
    cards_problem: str = ""
    # What more was asked for, by section.
    said: Mapping[str, str] = field(default_factory=dict)

    def container_of(self, service: str, project: str) -> Container | None:
        """The container of a service."""
        return next((item for item in self.containers if (item.service, item.project) == (service, project)), None)

    def is_older(self, container: Container) -> bool:
        """Whether a container was made from another rendering than the one on the host; False if unknown."""
        wanted = self.hashes.get(container.service)
        return bool(wanted and container.config_hash and wanted != container.config_hash)


# A shell script for a host that asks for more, in sections of their own.
More = Callable[[ComposeHost], str]


# --- asking ----------------------------------------------------------------------------------------------------------


def observe(host: ComposeHost, more: More | None = None) -> Snapshot:
    """What is to be seen on a host now, with what else is asked; never raises, `problem` says why there is nothing."""
    if isinstance(host, ProcessHost):
        return _of_processes(host, more(host) if more else "")
    try:
        done = host.run(["sh"], given=script(host, more(host) if more else "").encode(), check=False)
    except CorralError as error:
        return Snapshot(host.name, str(error).removeprefix(f"{host.name}: "), is_reached=False)
    moment, said = time.time(), parts(done.out)
    found = understood(host.name, said)
    if any(item.is_running and item.memory_mib is None for item in found.containers):
        # `docker stats` says it, about two seconds later.
        listing = f"docker ps --quiet --no-trunc --filter {shlex.quote(f'label={PROJECT}={host.project}')}"
        words = f"docker stats --no-stream --no-trunc --format '{{{{.ID}}}} {{{{.MemUsage}}}}' $({listing})"
        said["memory"] += f"\n{host.run(['sh', '-c', words], check=False).out}"
        found = understood(host.name, said)
    return replace(found, moment=moment, said=said)


def _of_processes(host: ProcessHost, more: str) -> Snapshot:
    """The same of a `local` host, whose programs are no containers."""
    done = host.run(["sh"], given=f"{BEGIN}\n{more}\n{END}".encode(), check=False)
    balancer = balancer_of(host.plan, host.out)
    is_here = balancer is not None and balancer.host.name == host.name and balancer.is_running()
    return Snapshot(
        host.name, moment=time.time(), containers=tuple(host.containers()), hashes=host.digests,
        servers=balancer.servers() if balancer and is_here else {}, said=parts(done.out),
    )  # fmt: skip


def observe_all(hosts: Sequence[ComposeHost], more: More | None = None) -> list[Snapshot]:
    """Every host at the same time, in their order."""
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return list(pool.map(lambda host: observe(host, more), hosts))


def servers_seen(plan: Plan, out: Path, seen: Iterable[Snapshot]) -> Mapping[str, Server]:
    """What the balancer says of each replica; nothing without a balancer, or when it does not answer."""
    balancer = balancer_of(plan, out)
    if balancer is None:
        return {}
    known = next((item.servers for item in seen if item.host == balancer.host.name), None)
    if known is not None:
        return known
    try:
        return balancer.servers()
    except CorralError:
        return {}


def script(host: ComposeHost, more: str) -> str:
    """The shell script that asks a host everything."""
    balancer = balancer_of(host.plan, host.out)
    is_here = balancer is not None and balancer.host.name == host.name
    given = {
        "project": f"{PROJECT}={host.project}", "site": f"{SITE}={host.plan.inventory.name}", "folder": host.folder,
        "balancer": shlex.join(balancer.words(*STATES)) if balancer and is_here else "",
    }  # fmt: skip
    cards = f"cards() {{\n{CARDS_SCRIPT}}}"
    return "\n".join([BEGIN, assigned(given), cards, SCRIPT.read_text(encoding="utf-8"), more, END])


def assigned(given: Mapping[str, str]) -> str:
    """Shell commands that give variables their values."""
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in given.items())


# --- understanding ---------------------------------------------------------------------------------------------------


def parts(text: str) -> dict[str, str]:
    """The sections of an answer by name."""
    found = (part.partition("\n") for part in text.split(MARK)[1:])
    return {name: body.strip("\n") for name, _, body in found}


def understood(host: str, said: Mapping[str, str]) -> Snapshot:
    """What the sections of an answer say."""
    cards, cards_problem = parse_cards(said.get("cards", ""))
    seen = Snapshot(host, is_reached=bool(said), cards=cards, cards_problem=cards_problem)
    if "containers" not in said:
        return replace(seen, problem=said.get("engine", "").strip() or "the host gave no answer")
    words = said.get("hashes", "").strip()
    hashes = hashes_in(words)
    return replace(
        seen,
        containers=tuple(containers_in(said["containers"], _memory(said.get("memory", "")))),
        hashes=hashes,
        hashes_problem=words.splitlines()[-1] if words and not hashes else "",
        servers=parse_servers(said.get("balancer", "")),
    )


def _memory(text: str) -> dict[str, tuple[float, float | None]]:
    """MiB in use (without cache that costs nothing to give back) and allowed, by container."""
    found: dict[str, tuple[float, float | None]] = {}
    for line in text.splitlines():
        match line.split():
            case [name, used, "/", most]:  # `docker stats`
                found[name] = (_mib(used), _mib(most))
            case [name, used, cold, most]:
                limit = int(most) / MIB if most.isdecimal() and int(most) < NO_LIMIT else None  # "max" in version 2
                found[name] = (max(0, int(used) - int(cold)) / MIB, limit)
    return found


def _mib(amount: str) -> float:
    """`12.5MiB` as a number."""
    found = _AMOUNT.fullmatch(amount)
    return float(found[1]) * UNITS.get(found[2].upper(), 1) / MIB if found else 0


def hashes_in(text: str) -> dict[str, str]:
    """Hash of every service, from what `docker compose config --hash` prints."""
    return dict(_HASH.findall(text))


def parse_cards(text: str) -> tuple[tuple[SeenCard, ...], str]:
    """Cards in nvidia-smi's order, and what it complained about."""
    cards: list[SeenCard] = []
    complaints: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        row = [cell.strip() for cell in line.split(",")]
        if len(row) == CARD_CELLS and row[0].isdecimal():
            cards.append(_card(row))
        elif line != "code 0":
            complaints.append(line)
    words = [line for line in complaints if not line.startswith("code ")]
    problem = " ".join(words) if words else f"nvidia-smi ended with {complaints[0]}" if complaints else ""
    return tuple(sorted(cards, key=lambda card: card.index)), problem


def _card(row: list[str]) -> SeenCard:
    index, uuid, pci, name, total, used, use, celsius, driver, version = row
    match = re.fullmatch(r"(\d+)\.(\d+)", version)
    capability = (int(match[1]), int(match[2])) if match else None
    numbers = (_whole(total) or 0, _whole(used), _whole(use), _whole(celsius))
    return SeenCard(int(index), uuid, pci, name, *numbers, driver, capability)


def _whole(text: str) -> int | None:
    """A number, or None for `[N/A]` and `[Not Supported]`."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def card_at(card: Card, seen: Iterable[SeenCard]) -> SeenCard | None:
    """The card that has the inventory card's index today."""
    return next((item for item in seen if item.index == card.index), None)


def card_of(card: Card, seen: Iterable[SeenCard]) -> SeenCard | None:
    """The card that containers get for one of the inventory: by UUID, else by PCI slot, else by index."""
    if card.uuid:
        return next((item for item in seen if item.uuid.lower().startswith(card.uuid.lower())), None)
    if card.pci:
        return next((item for item in seen if slot_of(item.pci) == slot_of(card.pci)), None)
    return card_at(card, seen)


def slot_of(text: str) -> tuple[int, ...]:
    """A PCI slot as numbers: nvidia-smi writes eight digits of domain, people four or none."""
    numbers = [int(part, 16) for part in re.split(r"[:.]", text if "." in text else f"{text}.0")]
    return tuple([0] * (4 - len(numbers)) + numbers)


def short_slot(text: str) -> str:
    """A PCI slot as people write it: `0000:01:00.0`."""
    domain, bus, device, function = slot_of(text)
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function:x}"
