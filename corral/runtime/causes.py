"""Why a program does not run or is not well: from its last lines, and from what Docker says, to cause and remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from corral.contributions import Service
from corral.declarations import Place, cause_rows, servers
from corral.plan.own_image import build_command, tag
from corral.runtime.docker import Container

WATCHDOG = 75
OUT_OF_MEMORY = 137
SHOWN = 160
EXIT_WORDS = {
    WATCHDOG: "ended by its watchdog, see its logs",
    126: "its program may not be run",
    127: "its program is not in the image",
    132: "illegal instruction",
    134: "it gave up by itself",
    OUT_OF_MEMORY: "killed from outside",
    139: "it crashed: segmentation fault",
}
STOPPED = (0, 143)
# A program that ended so often while it starts will not become well by waiting.
ENDS = 3
EXIT_REMEDIES = {
    127: "check images: and engine.image in the inventory",
    132: (
        "this processor lacks what the image was built for: write cpu: {avx: false}; llama.cpp for any processor: "
        f"{build_command()}, then set engine.image: {tag()}"
    ),
}


@dataclass(frozen=True, slots=True)
class Reason:
    """What is wrong, and what helps; the remedy is empty when none is known."""

    what: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Cause:
    """What words in a log or in a message of Docker mean, and what helps."""

    pattern: re.Pattern[str]
    what: str
    remedy: str
    places: frozenset[Place]

    @property
    def words(self) -> str:
        """Both on one line."""
        return f"{self.what}; {self.remedy}"


def _cause(pattern: str, what: str, remedy: str, *places: Place) -> Cause:
    """A row of the table; without places it is of what programs say, in a container or not."""
    return Cause(re.compile(pattern, re.IGNORECASE), what, remedy, frozenset(places or ("container", "process")))


def cause_of(text: str, place: Place = "container") -> Cause | None:
    """What the words usually mean, by the first row of the table that knows them; None when none does."""
    return next((item for item in CAUSES if place in item.places and item.pattern.search(text)), None)


OFF_THE_BUS = "reboot the host; if it comes back, reseat card and riser, look at power and heat"
# The first row that knows the words counts: what says more stands before what says less.
CAUSES = (
    _cause(
        r"address already in use|couldn't bind|cannot bind|errno 98",
        "another program took its port meanwhile",
        "run it again",
        "process",
    ),
    _cause(
        r"SIGKILL|out of memory|cannot allocate|bad_alloc",
        "this machine has too little free memory",
        "try a smaller model",
        "process",
    ),
    _cause(
        r"SIGILL|illegal instruction",
        "the program was built for another processor",
        "install a llama-server built for this one",
        "process",
    ),
    _cause(
        r"can't find command|command not found|no such file or directory: '?llama",
        "the program is not installed, or not on PATH",
        "install it, or put it on PATH",
        "process",
    ),
    _cause(
        r"invalid argument|unknown argument|unknown option",
        "this program is too old or too new for the rendered options",
        "see its version",
        "process",
    ),
    _cause(
        r"No module named|ModuleNotFoundError|ImportError",
        "the environment is incomplete",
        "run: rm -rf .venv && make env",
        "process",
    ),
    _cause(
        r"could not select device driver|unresolvable CDI devices|unknown or invalid runtime",
        "the engine cannot hand out GPUs",
        "install nvidia-container-toolkit, run nvidia-ctk runtime configure --runtime=docker, restart docker",
    ),
    _cause(
        r"nvidia-container-cli: .*(unknown device|device error)",
        "the card that it wants is not there",
        "compare the uuid, pci and order of hosts.….gpus with nvidia-smi -L",
    ),
    _cause(
        r"unsatisfied condition: cuda",
        "the NVIDIA driver is too old for the image",
        "install a newer driver, or name an older image in images:",
    ),
    _cause(
        r"cannot assign requested address",
        "the host has no such address",
        "correct hosts.….address in the inventory, then render and up",
    ),
    _cause(
        r"port is already allocated|address already in use|couldn't bind HTTP server socket",
        "another program holds the port",
        "stop that program or choose another port",
    ),
    _cause(r"no space left on device", "the disk is full", "free some space"),
    _cause(
        r"no such image|pull access denied|manifest unknown|failed to resolve reference",
        "the image is not there",
        "name another one in images:, or bring it there: docker save … | docker load",
        "container",
    ),
    _cause(
        r"container name \S+ is already in use",
        "a container of another project has that name",
        "remove or rename it",
        "container",
    ),
    _cause(
        r"mounts denied|source path does not exist",
        "a rendered file is not there",
        "./generate.py render",
        "container",
    ),
    *(_cause(row.says, row.means, row.remedy, *([row.of] if row.of else [])) for row in cause_rows()),
    _cause(
        r"unsupported toolchain|CUDA driver version is insufficient",
        "the NVIDIA driver is too old for the image",
        "install driver 570 or newer (580 for CUDA 13 images)",
    ),
    _cause(
        r"no kernel image is available",
        "the image has no code for this card",
        "use a CUDA 12 image for cards before Turing",
    ),
    _cause(
        r"cudaMalloc failed: out of memory|CUDA error: out of memory|unable to allocate \S*CUDA\S* buffer",
        "the card's memory is full",
        "less context, fewer slots, cache_type q8_0, or a smaller quantization",
    ),
    _cause(
        r"Xid \S+: 79\b|fallen off the bus|GPU is lost|Unable to determine the device handle",
        "its card fell off the bus",
        OFF_THE_BUS,
    ),
    _cause(
        r"uncorrectable ECC|Xid \S+: (48|64|95)\b",
        "its card's memory is faulty",
        "reset the card (nvidia-smi --gpu-reset -i INDEX) or reboot the host; if it comes back, replace the card",
    ),
    _cause(r"it hangs in the driver", "nothing but the kernel can end it", "reboot the host"),
    _cause(
        r"no CUDA-capable device|failed to initialize CUDA|Failed to initialize NVML|no usable GPU found|offloaded 0/"
        r"|No devices were found",
        "it sees no card",
        "run doctor again after ./generate.py restart; if nvidia-smi on the host fails too, reboot",
    ),
    _cause(
        r"(CUDA|ROCm|SYCL) error|ErrorDeviceLost|Xid \S+: \d",
        "its card made an error",
        "reset the card (nvidia-smi --gpu-reset -i INDEX) or reboot the host; if it comes back, reseat it",
    ),
    _cause(
        r"no batch was done for|no answer for \d+ s|and the processor idle",
        "it hung",
        "./generate.py restart it; if it comes back, doctor's card-errors and a newer image may help",
    ),
    _cause(
        r"password authentication failed|WRONGPASS|NOAUTH",
        "a password differs from the one that its store was made with",
        "put the old value back into .env, run secrets init, then restart it",
    ),
    _cause(r"\bpermission denied", "it may not read or write something it needs", "see its last lines in the logs"),
    _cause(
        r"permission denied",
        "this user may not use the engine",
        "add it to the group docker, then log in again",
        "docker",
    ),
    _cause(
        r"cannot connect to the docker daemon|is the docker daemon running",
        "the engine does not run",
        "start it: sudo systemctl start docker",
        "docker",
    ),
    _cause(r"command not found", "Docker is not installed there", "./generate.py setup installs it", "docker"),
    _cause(
        r"is not a docker command|unknown shorthand flag",
        "Docker Compose is not installed there",
        "./generate.py setup installs it",
        "docker",
    ),
)


def explained(container: Container | None, service: Service | None = None, log: str = "") -> Reason:
    """Why a container is not well.

    Args:
        container: what the engine says; None when there is none.
        service: its service in the plan, for the remedy.
        log: its last lines.
    """
    if container is None:
        return Reason("it has no container", "./generate.py up")
    is_calm = container.is_running and not container.restarts
    known = cause_of(container.last_check if is_calm else f"{container.error}\n{log}")
    if container.was_out_of_memory and not container.is_running:
        return Reason(f"container {_ended(container, 'out of memory')}", _memory_remedy(service))
    return _unwell(container, known, log) if container.is_running else _stopped(container, known, log)


def _unwell(container: Container, known: Cause | None, log: str) -> Reason:
    if container.health == "parked":
        sign = cause_of(container.last_check)
        what = f"its watchdog does not start it any more ({shortened(container.last_check)})"
        remedy = f"{sign.what}: {sign.remedy}" if sign else "see its logs"
        return Reason(what, f"{remedy}; then ./generate.py restart {container.service}")
    if container.health == "unhealthy":
        words = shortened(container.last_check) or "its health check does not end"
        remedy = known.remedy if known else f"./generate.py restart {container.service}"
        return Reason(f"it runs, but its health check fails: {words}", remedy)
    if container.health == "starting" and container.restarts >= ENDS:
        words = known.what if known else shortened(last_line(log))
        tail = f": {words}" if words else ""
        what = f"container keeps ending while it starts ({container.restarts} times){tail}"
        return Reason(what, known.remedy if known else "see its logs")
    if container.health == "starting":
        return Reason("it is still starting", "wait; ./generate.py logs shows how far it is")
    return Reason("it runs")


def _stopped(container: Container, known: Cause | None, log: str) -> Reason:
    if container.state == "created":
        what = known.what if known else shortened(container.error) or "it was never started"
        return Reason(f"the container was made but not started: {what}", known.remedy if known else "./generate.py up")
    words = known.what if known else EXIT_WORDS.get(container.exit_code, "")
    if container.state == "paused":
        return Reason("the container is paused", f"docker unpause {container.name}")
    if container.state == "exited" and container.exit_code in STOPPED:
        return Reason("the container was stopped", "./generate.py up starts it")
    last = shortened(last_line(log))
    tail = f"; it said: {last}" if last and not known else ""
    remedy = known.remedy if known else EXIT_REMEDIES.get(container.exit_code, "")
    by_hand = "./generate.py up starts it" if container.state == "exited" and not known else "see its logs"
    return Reason(f"container {_ended(container, words)}{tail}", remedy or by_hand)


def _ended(container: Container, words: str) -> str:
    """`exited (137: out of memory)`, `keeps restarting (1)`."""
    verb = "keeps restarting" if container.state == "restarting" else "exited"
    return f"{verb} ({container.exit_code}{': ' if words else ''}{words})"


def _memory_remedy(service: Service | None) -> str:
    known = {item.component: item.memory_remedy for item in servers()}
    return known.get(service.component if service else "", "raise its memory_mib")


def last_line(log: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


def shortened(text: str) -> str:
    """A program's words on one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
