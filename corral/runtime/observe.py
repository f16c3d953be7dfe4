"""One snapshot of a running host: its containers, what is rendered there, what its balancer and its cards say.

One script asks for all of it, so that a far host costs one round trip. Memory is read from the control groups:
`docker stats` needs two seconds for its two samples, the files none. Where they cannot be read (Docker runs in a
virtual machine, as on macOS) `docker stats` is asked after all.
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

# Stands before the name of each part of an answer; no program prints it by itself.
MARK = "\x1e"
UNITS = {"B": 1, "KIB": 1024, "MIB": MIB, "GIB": 1024**3, "TIB": 1024**4, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
CARD_FIELDS = (
    "index", "uuid", "pci.bus_id", "name", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu",
    "driver_version", "compute_cap",
)  # fmt: skip
# What version 1 of control groups prints is a number near 2**63.
NO_LIMIT = 1 << 60
_HASH = re.compile(r"^(\S+) ([0-9a-f]{64})$", re.MULTILINE)
_AMOUNT = re.compile(r"([\d.]+)\s*([A-Za-z]+)")

_MEMORY_SCRIPT = r"""
[ -z "$ids" ] || docker inspect --format '{{.Id}} {{.State.Pid}}' $ids 2>/dev/null | while read -r id pid; do
    [ "${pid:-0}" -gt 0 ] && [ -r "/proc/$pid/cgroup" ] || continue
    while IFS=: read -r _ controllers path; do
        case ",$controllers," in
            *,memory,*)
                group=/sys/fs/cgroup/memory$path used=memory.usage_in_bytes cold=total_inactive_file
                limit=memory.limit_in_bytes
                break ;;
            ,,) group=/sys/fs/cgroup$path used=memory.current cold=inactive_file limit=memory.max ;;
        esac
    done <"/proc/$pid/cgroup"
    [ -r "$group/$used" ] || continue
    read -r bytes <"$group/$used"
    read -r most <"$group/$limit"
    echo "$id $bytes $(sed -n "s/^$cold //p" "$group/memory.stat") $most"
done
"""


@dataclass(frozen=True, slots=True)
class SeenCard:
    """A card as nvidia-smi prints it; sizes in MiB, use in percent."""

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


# Sections of the answer that a verb needs besides: shell commands for a host, by name.
More = Callable[[ComposeHost], Mapping[str, Sequence[str]]]


# --- asking ----------------------------------------------------------------------------------------------------------


def observe(host: ComposeHost, more: More | None = None) -> Snapshot:
    """What is to be seen on a host now, with what else is asked; never raises, `problem` says why there is nothing."""
    try:
        done = host.run(["sh"], given=script(host, more(host) if more else {}).encode(), check=False)
    except CorralError as error:
        return Snapshot(host.name, str(error).removeprefix(f"{host.name}: "), is_reached=False)
    moment, said = time.time(), parts(done.out)
    found = understood(host.name, said)
    if any(item.is_running and item.memory_mib is None for item in found.containers):
        said["memory"] += f"\n{_asked_memory(host)}"
        found = understood(host.name, said)
    return replace(found, moment=moment, said=said)


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


def script(host: ComposeHost, more: Mapping[str, Sequence[str]]) -> str:
    """The shell script that asks a host everything."""
    sections = {"containers": ['[ -z "$(echo $ids)" ] || docker inspect $ids 2>/dev/null'], "memory": [_MEMORY_SCRIPT]}
    sections |= {"hashes": _hash_lines(host), **_balancer(host)}
    lines = [
        "{ export LC_ALL=C",
        *_section("cards", card_lines()),
        f"ids=$({_listing(f'{PROJECT}={host.project}')} 2>&1) || failed=1",
        f"more=$({_listing(f'{SITE}={host.plan.inventory.name}')} 2>&1)",
        'if [ "${failed:-0}" = 1 ]; then',
        *_section("engine", ['printf "%s\\n" "$ids"']),
        "else",
        'ids=$(printf "%s\\n%s\\n" "$ids" "$more" | sort -u)',
        *(line for name, words in sections.items() for line in _section(name, words)),
        "fi",
        *(line for name, words in more.items() for line in _section(name, words)),
        "} </dev/null",
    ]
    return "\n".join(lines) + "\n"


def _listing(label: str) -> str:
    return f"docker ps --all --quiet --no-trunc --filter {shlex.quote(f'label={label}')}"


def _section(name: str, lines: Iterable[str]) -> list[str]:
    """Shell commands whose answer begins with the section's name."""
    return [f"printf '\\n\\036%s\\n' {name}", *lines]


def card_lines() -> list[str]:
    """Shell commands that print a line for every NVIDIA card, or nvidia-smi's complaint."""
    query = f"nvidia-smi --query-gpu={','.join(CARD_FIELDS)} --format=csv,noheader,nounits 2>&1"
    return ["if command -v nvidia-smi >/dev/null 2>&1; then", f"    {query}", '    echo "code $?"', "fi"]


def _hash_lines(host: ComposeHost) -> list[str]:
    """Hashes of what is rendered, of the files that the project was started with: perhaps the CPU variant too."""
    label = '{{index .Config.Labels "com.docker.compose.project.config_files"}}'
    words = host.compose_words()
    folder, plain = shlex.join(words[: words.index("--file")]), shlex.join(words[words.index("--file") :])
    return [
        f"one=$({_listing(f'{PROJECT}={host.project}')} | head -n 1)",
        f'files=$([ -z "$one" ] || docker inspect --format \'{label}\' "$one")',
        'case "$files" in',
        '    *,*) set -f; IFS=,; set --; for file in $files; do set -- "$@" --file "$file"; done; unset IFS; set +f ;;',
        f"    *) set -- {plain} ;;",
        "esac",
        f"{folder} \"$@\" config --hash '*' 2>&1",
    ]


def _balancer(host: ComposeHost) -> dict[str, list[str]]:
    balancer = balancer_of(host.plan, host.out)
    if balancer is None or balancer.host.name != host.name:
        return {}
    return {"balancer": [f"{shlex.join(balancer.words(*STATES))} 2>/dev/null"]}


def _asked_memory(host: ComposeHost) -> str:
    """What `docker stats` says, about two seconds later; nothing when it fails."""
    listing = _listing(f"{PROJECT}={host.project}").replace(" --all", "")
    words = f"docker stats --no-stream --no-trunc --format '{{{{.ID}}}} {{{{.MemUsage}}}}' $({listing})"
    return host.run(["sh", "-c", words], check=False).out


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
        if len(row) == len(CARD_FIELDS) and row[0].isdecimal():
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
