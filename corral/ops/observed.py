"""What a host's engine, balancer and cards say at this moment, asked in one go so that a far host costs one round trip.

Memory is read from the control groups: `docker stats` needs two seconds for its two samples, the files none. Where they
cannot be read (the engine runs in a machine of its own, as on macOS) `docker stats` is asked after all.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from corral.errors import CorralError
from corral.ops.hosts import ComposeHost
from corral.plan import Plan

MIB = 1024**2
MARK = "\x1e"
"""Stands before the name of each part of an answer; no program prints it by itself."""
UNITS = {"B": 1, "KIB": 1024, "MIB": MIB, "GIB": 1024**3, "TIB": 1024**4, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
CARD_FIELDS = (
    "index", "uuid", "pci.bus_id", "name", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu",
    "driver_version", "compute_cap",
)  # fmt: skip
NO_LIMIT = 1 << 60
"""What version 1 of control groups prints is a number near 2**63."""
NO_DATE = "0001-01-01T00:00:00Z"
PARKED = "parked: "
"""Begins what the health check says of a server that its watchdog (gpu-server/llama/start.sh) no longer starts."""
GOOD = frozenset({"healthy", "running"})
"""Conditions that one wants."""
_FIGURE = re.compile(r'haproxy_server_(\w+)\{proxy="([^"]*)",server="([^"]*)"(?:,state="([^"]*)")?\} (\S+)')
_HASH = re.compile(r"^(\S+) ([0-9a-f]{64})$", re.MULTILINE)
_FINE = re.compile(r"(\.\d{1,6})\d*")
"""Fractions of a second; the engine's are finer than Python's."""
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
class Container:
    """One container as the engine sees it."""

    id: str
    name: str
    project: str
    service: str
    image: str
    state: str
    """`running`, `exited`, `restarting`, `created`, `paused` or `dead`."""
    health: str = ""
    """`healthy`, `starting`, `unhealthy`, or `parked` by its watchdog; empty without a health check."""
    last_check: str = ""
    """What the last health check printed."""
    exit_code: int = 0
    was_out_of_memory: bool = False
    error: str = ""
    """Why the engine could not start it."""
    restarts: int = 0
    started: datetime | None = None
    config_hash: str = ""
    memory_mib: float | None = None
    limit_mib: float | None = None
    """What its control group allows; None when it cannot be read."""
    published: tuple[tuple[str, int], ...] = ()
    """Addresses and ports on the host."""
    wanted_mib: float = 0
    """The limit that the engine was told; 0 for none."""
    devices: tuple[str, ...] = ()
    """Cards that the engine was asked for."""

    @property
    def is_running(self) -> bool:
        """Whether its program runs, well or not."""
        return self.state == "running"

    @property
    def condition(self) -> str:
        """One word: its health while it runs, else its state."""
        return (self.health or "running") if self.is_running else self.state

    @property
    def is_well(self) -> bool:
        """Whether its health check passes; without one, whether it runs."""
        return self.condition in GOOD


@dataclass(frozen=True, slots=True)
class Server:
    """A replica as the balancer sees it."""

    status: str
    """`UP`, `DOWN`, `MAINT`, `DRAIN` or `NOLB`."""
    busy: int = 0
    check: str = ""
    """HAProxy's word for the last check, such as `L4CON`."""
    code: int = 0
    """HTTP status of the last check, 0 without one."""


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
class Observed:
    """All of it for one host; `problem` says why there is nothing."""

    host: str
    problem: str = ""
    containers: tuple[Container, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hash of every service as it is rendered on the host; empty when Compose could not read it."""
    hashes_problem: str = ""
    servers: Mapping[str, Server] = field(default_factory=dict)
    """What the balancer says of each replica; only of the balancer's own host."""
    cards: tuple[SeenCard, ...] = ()
    cards_problem: str = ""
    """Why nvidia-smi shows no card although it is there."""

    def container_of(self, service: str, project: str) -> Container | None:
        """The container of a service."""
        return next((item for item in self.containers if (item.service, item.project) == (service, project)), None)

    def is_older(self, container: Container) -> bool:
        """Whether a container was made from another rendering than the one that lies there; False if nobody knows."""
        wanted = self.hashes.get(container.service)
        return bool(wanted and container.config_hash and wanted != container.config_hash)


# --- asking ----------------------------------------------------------------------------------------------------------


def observe(host: ComposeHost) -> Observed:
    """What is to be seen on a host now; never raises, `problem` says why it could not be asked."""
    try:
        done = host.run(["sh"], given=script(host).encode(), check=False)
    except CorralError as error:
        return Observed(host.name, problem=str(error).removeprefix(f"{host.name}: "))
    found = understood(host.name, parts(done.out))
    if found.problem or not any(item.is_running and item.memory_mib is None for item in found.containers):
        return found
    return _with_memory(found, _asked_memory(host))


def container_named(host: ComposeHost, name: str) -> Container | None:
    """One container as the engine sees it now; None when there is none."""
    found = _json_list(host.run(["docker", "inspect", "--type", "container", name], check=False).out)
    return _container(found[0], {}) if found else None


def balancer_servers(plan: Plan, out: Path) -> dict[str, Server]:
    """What the balancer says of each replica now; nothing without a balancer, or when it does not answer."""
    known = balancer(plan)
    if known is None or plan.site.is_local(known[0]):
        return {}
    host = ComposeHost(plan, known[0], out)
    done = host.run(["sh"], given="\n".join(_figures_lines(host)).encode(), check=False)
    return parse_figures(done.out)


def observe_all(hosts: Iterable[ComposeHost]) -> list[Observed]:
    """Every host at the same time, in their order."""
    wanted = list(hosts)
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        return list(pool.map(observe, wanted))


def balancer(plan: Plan) -> tuple[str, str, int] | None:
    """Host, container and port of the balancer's figures; None without a balancer."""
    target = next((item for item in plan.contributions.targets if item.job == "haproxy"), None)
    if target is None or plan.inventory.gateway.balancing == "direct":
        return None
    place = target.endpoint
    return place.host, container_name(plan, place.host, place.service), place.port


def container_name(plan: Plan, host: str, service: str) -> str:
    """Name of a service's container."""
    found = next(item for item in plan.services_of(host) if item.name == service)
    return found.container or f"{host}-{service}"


def script(host: ComposeHost) -> str:
    """The shell script that asks a host everything."""
    lines = [
        "{ export LC_ALL=C",
        section("engine"),
        f"ids=$({_listing(f'com.docker.compose.project={host.project}')} 2>&1) || failed=1",
        f"more=$({_listing(f'corral.site={host.plan.inventory.name}')} 2>&1)",
        'if [ "${failed:-0}" = 1 ]; then printf "%s\\n" "$ids"; exit 0; fi',
        'ids=$(printf \'%s\\n%s\\n\' "$ids" "$more" | sort -u)',
        section("containers"),
        '[ -z "$(echo $ids)" ] || docker inspect $ids 2>/dev/null',
        section("memory"),
        _MEMORY_SCRIPT.strip(),
        section("hashes"),
        *_hash_lines(host),
        *_figures_lines(host),
        section("cards"),
        *card_lines(),
        "} </dev/null",
    ]
    return "\n".join(lines) + "\n"


def _listing(label: str) -> str:
    return f"docker ps --all --quiet --no-trunc --filter {shlex.quote(f'label={label}')}"


def section(name: str) -> str:
    """A shell command that begins a part of the answer."""
    return f"printf '\\n\\036%s\\n' {name}"


def card_lines() -> list[str]:
    """Shell commands that print a line for every NVIDIA card, or nvidia-smi's complaint."""
    query = f"nvidia-smi --query-gpu={','.join(CARD_FIELDS)} --format=csv,noheader,nounits 2>&1"
    return ["if command -v nvidia-smi >/dev/null 2>&1; then", f"    {query}", '    echo "code $?"', "fi"]


def _hash_lines(host: ComposeHost) -> list[str]:
    """Hashes of what is rendered, of the files that the project was started with: perhaps the CPU variant too."""
    project = shlex.quote(f"label=com.docker.compose.project={host.project}")
    label = '{{index .Config.Labels "com.docker.compose.project.config_files"}}'
    words = host.compose_words()
    folder, plain = shlex.join(words[: words.index("--file")]), shlex.join(words[words.index("--file") :])
    return [
        f"one=$(docker ps --all --quiet --filter {project} | head -n 1)",
        f'files=$([ -z "$one" ] || docker inspect --format \'{label}\' "$one")',
        'case "$files" in',
        '    *,*) set -f; IFS=,; set --; for file in $files; do set -- "$@" --file "$file"; done; unset IFS; set +f ;;',
        f"    *) set -- {plain} ;;",
        "esac",
        f"{folder} \"$@\" config --hash '*' 2>&1",
    ]


def _figures_lines(host: ComposeHost) -> list[str]:
    """Asks the balancer inside its own network; its image has bash, neither curl nor wget."""
    found = balancer(host.plan)
    if found is None or found[0] != host.name:
        return []
    _, container, port = found
    request = r"printf 'GET /metrics?scope=server HTTP/1.0\r\n\r\n' >&3"
    inside = f"exec 3<>/dev/tcp/127.0.0.1/{port} && {request} && cat <&3"
    wanted = "haproxy_server_(current_sessions|status|check_status|check_code)[{]"
    command = shlex.join(["docker", "exec", container, "timeout", "5", "bash", "-c", inside])
    return [section("figures"), f"{command} 2>/dev/null | grep -E '^{wanted}' | grep -v ' 0$'"]


def _asked_memory(host: ComposeHost) -> str:
    """What `docker stats` says, about two seconds later; nothing when it fails."""
    listing = _listing(f"com.docker.compose.project={host.project}").replace(" --all", "")
    words = f"docker stats --no-stream --no-trunc --format '{{{{.ID}}}} {{{{.MemUsage}}}}' $({listing})"
    return host.run(["sh", "-c", words], check=False).out


# --- understanding ---------------------------------------------------------------------------------------------------


def parts(text: str) -> dict[str, str]:
    """The named parts of an answer."""
    found = (part.partition("\n") for part in text.split(MARK)[1:])
    return {name: body.strip("\n") for name, _, body in found}


def understood(host: str, found: Mapping[str, str]) -> Observed:
    """What the parts of an answer say."""
    if "containers" not in found:
        return Observed(host, problem=found.get("engine", "").strip() or "the host gave no answer")
    memory = _group_memory(found.get("memory", ""))
    containers = [_container(item, memory) for item in _json_list(found["containers"])]
    hashes, problem = _hashes(found.get("hashes", ""))
    cards, cards_problem = parse_cards(found.get("cards", ""))
    return Observed(
        host,
        containers=tuple(sorted(containers, key=lambda item: item.name)),
        hashes=hashes,
        hashes_problem=problem,
        servers=parse_figures(found.get("figures", "")),
        cards=cards,
        cards_problem=cards_problem,
    )


def _json_list(text: str) -> list[dict[str, Any]]:
    return list(json.loads(text)) if text.strip() else []


def _container(item: Mapping[str, Any], memory: Mapping[str, tuple[float, float | None]]) -> Container:
    state, labels = item["State"], item["Config"].get("Labels") or {}
    checks = (state.get("Health") or {}).get("Log") or [{}]
    used, limit = memory.get(item["Id"], (None, None))
    return Container(
        id=item["Id"],
        name=str(item["Name"]).removeprefix("/"),
        project=labels.get("com.docker.compose.project", ""),
        service=labels.get("com.docker.compose.service", ""),
        image=item["Config"]["Image"],
        state=state["Status"],
        health="parked" if is_parked(item) else _health((state.get("Health") or {}).get("Status", "")),
        last_check=str(checks[-1].get("Output", "")).strip(),
        exit_code=state["ExitCode"],
        was_out_of_memory=state["OOMKilled"],
        error=state.get("Error", ""),
        restarts=item.get("RestartCount", 0),
        started=_date(state.get("StartedAt", "")),
        config_hash=labels.get("com.docker.compose.config-hash", ""),
        memory_mib=used,
        limit_mib=limit,
        published=tuple(_published(item)),
        wanted_mib=item["HostConfig"].get("Memory", 0) / MIB,
        devices=tuple(_devices(item["HostConfig"])),
    )


def _devices(settings: Mapping[str, Any]) -> Iterator[str]:
    """Cards that the runtime hands in, by the id asked for, and device files."""
    for request in settings.get("DeviceRequests") or []:
        yield from request.get("DeviceIDs") or []
    for device in settings.get("Devices") or []:
        yield device["PathOnHost"]


def _health(status: str) -> str:
    return "" if status == "none" else status


def _published(item: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for places in (item["NetworkSettings"].get("Ports") or {}).values():
        for place in places or []:
            yield place["HostIp"], int(place["HostPort"])


def is_parked(container: Mapping[str, Any]) -> bool:
    """Whether its watchdog has parked the server of this running container, by a check since it was started."""
    state = container["State"]
    check = ((state.get("Health") or {}).get("Log") or [{}])[-1]
    if state["Status"] != "running" or not str(check.get("Output", "")).startswith(PARKED):
        return False
    begun, started = (datetime.fromisoformat(_FINE.sub(r"\1", text)) for text in (check["Start"], state["StartedAt"]))
    return begun > started


def _date(text: str) -> datetime | None:
    """The engine's time, whose fractions are longer than Python's."""
    if not text or text == NO_DATE:
        return None
    return datetime.fromisoformat(re.sub(r"\.\d+", "", text))


def _group_memory(text: str) -> dict[str, tuple[float, float | None]]:
    """MiB in use (without cache that costs nothing to give back) and allowed, by container."""
    found: dict[str, tuple[float, float | None]] = {}
    for line in text.splitlines():
        match line.split():
            case [name, used, cold, most]:
                limit = int(most) / MIB if most.isdecimal() and int(most) < NO_LIMIT else None  # "max" in version 2
                found[name] = (max(0, int(used) - int(cold)) / MIB, limit)
    return found


def _with_memory(found: Observed, text: str) -> Observed:
    memory = dict(_stats_memory(text))
    containers = tuple(
        replace(item, memory_mib=memory[item.id][0], limit_mib=memory[item.id][1]) if item.id in memory else item
        for item in found.containers
    )
    return replace(found, containers=containers)


def _stats_memory(text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    for line in text.splitlines():
        name, _, usage = line.partition(" ")
        amounts = [float(number) * UNITS.get(unit.upper(), 1) / MIB for number, unit in _AMOUNT.findall(usage)]
        match amounts:
            case [used, limit]:
                yield name, (used, limit)


def _hashes(text: str) -> tuple[dict[str, str], str]:
    good = dict(_HASH.findall(text))
    return (good, "") if good or not text.strip() else ({}, text.strip().splitlines()[-1])


def parse_figures(text: str) -> dict[str, Server]:
    """Servers by name, from lines of HAProxy's exporter that are not 0."""
    values: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        match = _FIGURE.match(line)
        if match:
            metric, _, server, state, number = match.groups()
            values.setdefault(server, {})[metric] = state or number
    return {
        name: Server(
            status=found.get("status", "DOWN"),
            busy=int(float(found.get("current_sessions", 0))),
            check=found.get("check_status", ""),
            code=int(float(found.get("check_code", 0))),
        )
        for name, found in values.items()
    }


def parse_cards(text: str) -> tuple[tuple[SeenCard, ...], str]:
    """Cards in nvidia-smi's order, and what it complained about."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    cards = [_card(row) for row in rows if len(row) == len(CARD_FIELDS) and row[0].isdecimal()]
    complaints = [
        line for line, row in zip(lines, rows, strict=True) if len(row) != len(CARD_FIELDS) and line != "code 0"
    ]
    words = [line for line in complaints if not line.startswith("code ")]
    problem = " ".join(words) if words else f"nvidia-smi ended with {complaints[0]}" if complaints else ""
    return tuple(sorted(cards, key=lambda card: card.index)), problem


def _card(row: list[str]) -> SeenCard:
    capability = re.fullmatch(r"(\d+)\.(\d+)", row[9])
    return SeenCard(
        index=int(row[0]),
        uuid=row[1],
        pci=row[2],
        name=row[3],
        total_mib=_whole(row[4]) or 0,
        used_mib=_whole(row[5]),
        use_percent=_whole(row[6]),
        celsius=_whole(row[7]),
        driver=row[8],
        compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
    )


def _whole(text: str) -> int | None:
    """A number, or None for `[N/A]` and `[Not Supported]`."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None
