"""What a machine has: system, Docker, graphics cards. Read only; for what is missing, the commands to type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corral.declarations import read_yaml
from corral.errors import CorralError
from corral.plan.site import Card
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import CARDS_SCRIPT, SeenCard, card_of, parse_cards
from corral.verbs.doctor.case import version_of

# The first Debian whose own Docker is new enough.
DEBIAN_FLOOR = (13,)
# Compute capability from which on every driver works; 580 is the last branch for older cards.
NEW_CARDS = (7, 5)
# A shell's exit code for a program that it does not find.
NOT_THERE = 127
ENGINE_VERSION = ("docker", "version", "--format", "{{.Server.Version}}")
COMPOSE_VERSION = ("docker", "compose", "version", "--short")
# What people type on a machine that lacks something.
COMMANDS: dict[str, Any] = read_yaml(Path(__file__).with_name("commands.yaml"))


@dataclass(frozen=True, slots=True)
class Look:
    """What a step found: nothing to do, something that `setup` does, or something that only a person can do."""

    state: Literal["done", "todo", "yours"]
    words: str
    remedy: str = ""


def look_at_machine(host: ComposeHost) -> Look:
    """Whether the machine answers and runs Linux."""
    try:
        system = _system(host)
    except CorralError as error:
        return Look("yours", str(error), f"try: ssh {host.ssh} true")
    if system[0] != "Linux":
        return Look(
            "yours", f"{' '.join(system)} is no Linux", "take a Linux machine, or use it as a node: docs/nodes.md"
        )
    return Look("done", f"Linux, {' '.join(system[1:]) or 'of unknown make'}")


def look_at_docker(host: ComposeHost, floor: tuple[int, int], *command: str) -> Look:
    """Whether Docker or its Compose plugin is new enough and answers this user; the command prints the version."""
    code, answer = _ask(host, *command)
    if code == NOT_THERE or (code != 0 and "compose" in command):
        return Look("yours", "not installed", _engine_commands(host))
    if code != 0 and "permission denied" in answer.lower():
        return Look("yours", "this user may not use it", "sudo usermod -aG docker $USER    # then log in again")
    if code != 0:
        reason = (answer.splitlines() or ["it says nothing"])[-1]
        return Look("yours", f"does not answer: {reason}", "sudo systemctl enable --now docker")
    if version_of(answer) < floor:
        oldest = ".".join(str(number) for number in floor).removesuffix(".0")
        return Look("yours", f"{answer} is too old; {oldest} is the oldest that works", _engine_commands(host))
    return Look("done", answer)


def look_at_cards(host: ComposeHost) -> Look:
    """Whether the driver sees the cards of the inventory, those with a UUID or slot by that name."""
    cards = nvidia_cards(host)
    found, problem = parse_cards(_ask(host, "sh", "-c", CARDS_SCRIPT)[1])
    if not found:
        return Look("yours", f"nvidia-smi fails: {problem}" if problem else "no driver", _driver_commands(host, cards))
    if len(found) < len(cards):
        remedy = "look at: nvidia-smi -L, dmesg | grep -i xid"
        return Look("yours", f"the driver sees {len(found)} of {len(cards)}", remedy)
    for card in cards:
        if card.pinned_by != "index" and card_of(card, found) is None:
            words = f"GPU {card.number} ({card.device}) is not there; write into the inventory what is"
            there = (f"{one.index}: {one.uuid} at {one.pci}, {one.name}" for one in found)
            return Look("yours", words, "\n".join(there))
    return _cards_found(cards, found)


def look_at_toolkit(host: ComposeHost) -> Look:
    """Whether Docker can hand cards to containers, and by the names that the inventory gives them."""
    _, answer = _ask(host, "docker", "info", "--format", "{{json .Runtimes}} {{json .DiscoveredDevices}}")
    has_hook = _ask(host, "sh", "-c", "command -v nvidia-container-runtime-hook")[0] == 0
    if not has_hook and "nvidia" not in answer:
        return Look("yours", "the engine cannot hand cards to containers", COMMANDS["toolkit"])
    by_slot = [str(card.number) for card in nvidia_cards(host) if card.pinned_by == "PCI slot"]
    if by_slot and not has_hook:
        words = "the engine hands out cards by CDI, which knows no PCI slots"
        return Look("yours", words, f"give GPU {', '.join(by_slot)} a uuid in the inventory")
    return Look("done", "there")


def nvidia_cards(host: ComposeHost) -> list[Card]:
    """The host's cards that need NVIDIA's driver and toolkit."""
    return [card for card in host.plan.site.cards[host.name] if card.has_nvidia_smi]


def _cards_found(cards: Sequence[Card], found: Sequence[SeenCard]) -> Look:
    """The cards by name, and the UUIDs of those that the inventory knows by their index only."""
    words = f"{len(found)} ({', '.join(dict.fromkeys(one.name for one in found))})"
    uuids = [f"GPU {one.number}: uuid: {found[one.number - 1].uuid}" for one in cards if one.pinned_by == "index"]
    if uuids:
        words += "; known by index, a uuid in the inventory would be safer:"
    return Look("done", words, "\n".join(uuids))


def _ask(host: ComposeHost, *words: str) -> tuple[int, str]:
    """Exit code and output of a command; NOT_THERE when the host does not have it."""
    try:
        done = host.run(words, check=False)
    except CorralError as error:
        if "is not installed" not in str(error):
            raise
        return NOT_THERE, ""
    return done.code, done.out.strip() or done.words


def _system(host: ComposeHost) -> list[str]:
    """Kernel, distribution and version: `["Linux", "debian", "13"]`."""
    return _ask(host, "sh", "-c", '. /etc/os-release 2>/dev/null; echo "$(uname -s) $ID $VERSION_ID"')[1].split()


def _engine_commands(host: ComposeHost) -> str:
    _, name, version, *_ = [*_system(host), "", ""]
    packages = COMMANDS["engine_packages"].get(name)
    is_old = packages is None or (name == "debian" and version_of(version) < DEBIAN_FLOOR)
    return str(COMMANDS["engine_elsewhere" if is_old else "engine"]).format(packages=packages)


def _driver_commands(host: ComposeHost, cards: Sequence[Card]) -> str:
    old = [card.card for card in cards if card.compute_capability and card.compute_capability < NEW_CARDS]
    packages = COMMANDS["driver_packages"] | (COMMANDS["driver_packages_of_old_cards"] if old else {})
    package = next((packages[word] for word in _system(host) if word in packages), "")
    command = f"sudo apt-get update && sudo apt-get install -y {package}" if package else "install NVIDIA's driver"
    note = [f"# 580 is the last driver branch that knows {old[0]}"] if old else []
    return "\n".join([*note, command, COMMANDS["after_driver"]])
