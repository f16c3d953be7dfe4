"""What a machine has: system, engine, graphics cards. Only looks; what is missing is said with the commands to type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from corral.errors import CorralError
from corral.plan.site import Card
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import CARDS_SCRIPT, SeenCard, card_of, parse_cards
from corral.verbs.doctor.case import version_of
from corral.verbs.doctor.machine import COMPOSE_FLOOR, ENGINE_FLOOR

# The first Debian whose own engine is new enough.
DEBIAN_FLOOR = (13,)
# Compute capability from which on any driver will do; 580 is the last branch for older cards.
NEW_CARDS = (7, 5)
# A shell's exit code for a program that it does not find.
NOT_THERE = 127
ENGINE_PAGE = "https://docs.docker.com/engine/install/ (its apt repository)"
TOOLKIT_PAGE = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html"
CPU_FILES = "docker compose -f compose.yaml -f compose.cpu.yaml up -d --wait"

State = Literal["done", "todo", "yours"]


@dataclass(frozen=True, slots=True)
class Look:
    """What a step found: nothing to do, something that `setup` does, or something that only a person can do."""

    state: State
    words: str
    remedy: str = ""


@dataclass(slots=True)
class Machine:
    """Questions to a host, and what it has answered."""

    host: ComposeHost
    # `debian 12`, as /etc/os-release has it; known after `look`.
    system: str = ""

    def look(self) -> Look:
        """Whether the machine answers, and what it is."""
        try:
            _, answer = self._ask("sh", "-c", '. /etc/os-release 2>/dev/null; echo "$(uname -s) $ID $VERSION_ID"')
        except CorralError as error:
            return Look("yours", str(error), f"try: ssh {self.host.ssh} true")
        kernel, _, self.system = answer.partition(" ")
        if kernel != "Linux":
            return Look("yours", f"{answer} is no Linux", "take a Linux machine, or use it as a node: docs/nodes.md")
        return Look("done", f"Linux, {self.system.strip() or 'of unknown make'}")

    def look_at_engine(self) -> Look:
        """Whether a new enough engine answers this user."""
        code, answer = self._ask("docker", "version", "--format", "{{.Server.Version}}")
        if code == NOT_THERE:
            return Look("yours", "not installed", self._engine_commands())
        if code != 0 and "permission denied" in answer.lower():
            return Look("yours", "this user may not use it", "sudo usermod -aG docker $USER    # then log in again")
        if code != 0:
            return Look("yours", f"does not answer: {_last_line(answer)}", "sudo systemctl enable --now docker")
        if version_of(answer) < ENGINE_FLOOR:
            return Look("yours", f"{answer} is too old; 25 is the oldest that works", self._engine_commands())
        return Look("done", answer)

    def look_at_compose(self) -> Look:
        """Whether Compose is new enough."""
        code, answer = self._ask("docker", "compose", "version", "--short")
        if code != 0:
            return Look("yours", "not installed", self._engine_commands())
        if version_of(answer) < COMPOSE_FLOOR:
            return Look("yours", f"{answer} is too old; 2.24 is the oldest that works", self._engine_commands())
        return Look("done", answer)

    def look_at_cards(self, cards: Sequence[Card]) -> Look:
        """Whether the driver sees the cards of the inventory, those with a UUID or slot where they are said to be."""
        found, problem = parse_cards(self._ask("sh", "-c", CARDS_SCRIPT)[1])
        if not found:
            words = f"nvidia-smi fails: {problem}" if problem else "no driver"
            return Look("yours", words, self._driver_commands(cards))
        if len(found) < len(cards):
            remedy = "look at: nvidia-smi -L, dmesg | grep -i xid"
            return Look("yours", f"the driver sees {len(found)} of {len(cards)}", remedy)
        for card in cards:
            if card.pinned_by != "index" and card_of(card, found) is None:
                words = f"GPU {card.number} ({card.device}) is not there; write into the inventory what is"
                there = (f"{one.index}: {one.uuid} at {one.pci}, {one.name}" for one in found)
                return Look("yours", words, "\n".join(there))
        return Look("done", *_told(cards, found))

    def look_at_toolkit(self, cards: Sequence[Card]) -> Look:
        """Whether the engine can hand cards to containers, and by the names that the inventory gives them."""
        _, answer = self._ask("docker", "info", "--format", "{{json .Runtimes}} {{json .DiscoveredDevices}}")
        has_hook = self._ask("sh", "-c", "command -v nvidia-container-runtime-hook")[0] == 0
        if not has_hook and "nvidia" not in answer:
            return Look("yours", "the engine cannot hand cards to containers", _toolkit_commands())
        by_slot = [str(card.number) for card in cards if card.pinned_by == "PCI slot"]
        if by_slot and not has_hook:
            words = "the engine hands out cards by CDI, which knows no PCI slots"
            return Look("yours", words, f"give GPU {', '.join(by_slot)} a uuid in the inventory")
        return Look("done", "there")

    def _ask(self, *words: str) -> tuple[int, str]:
        """Exit code of a command and what it says; NOT_THERE when the host does not have it."""
        try:
            done = self.host.run(words, check=False)
        except CorralError as error:
            if "is not installed" not in str(error):
                raise
            return NOT_THERE, ""
        return done.code, done.out.strip() or done.words

    def _engine_commands(self) -> str:
        name, _, version = self.system.partition(" ")
        packages = {"ubuntu": "docker.io docker-compose-v2", "debian": "docker.io docker-cli docker-compose"}
        if name not in packages or (name == "debian" and version_of(version) < DEBIAN_FLOOR):
            return f"install Docker Engine 25 or newer with its Compose plugin: {ENGINE_PAGE}"
        return (
            f"sudo apt-get update && sudo apt-get install -y {packages[name]}\n"
            "sudo usermod -aG docker $USER    # then log in again\n"
            f"# still too old? {ENGINE_PAGE}"
        )

    def _driver_commands(self, cards: Sequence[Card]) -> str:
        old = [card.card for card in cards if card.compute_capability and card.compute_capability < NEW_CARDS]
        on_ubuntu = "nvidia-driver-580-server" if old else "ubuntu-drivers-common && sudo ubuntu-drivers install"
        packages = {"ubuntu": on_ubuntu, "debian": "nvidia-driver    # from non-free"}
        package = packages.get(self.system.partition(" ")[0])
        command = f"sudo apt-get update && sudo apt-get install -y {package}" if package else "install NVIDIA's driver"
        note = [f"# 580 is the last driver branch that knows {old[0]}"] if old else []
        return "\n".join([*note, command, "sudo reboot", f"# no cards in this machine? {CPU_FILES}"])


def _toolkit_commands() -> str:
    return (
        f"# NVIDIA's apt repository first: {TOOLKIT_PAGE}\n"
        "sudo apt-get install -y nvidia-container-toolkit\n"
        "sudo nvidia-ctk runtime configure --runtime=docker\n"
        "sudo systemctl restart docker"
    )


def _told(cards: Sequence[Card], found: Sequence[SeenCard]) -> tuple[str, str]:
    """The cards in words, and the UUIDs of those that the inventory knows by their index only."""
    words = f"{len(found)} ({', '.join(dict.fromkeys(one.name for one in found))})"
    by_index = [card for card in cards if card.pinned_by == "index"]
    if not by_index:
        return words, ""
    uuids = "\n".join(f"GPU {card.number}: uuid: {found[card.number - 1].uuid}" for card in by_index)
    return f"{words}; known by index, a uuid in the inventory would be safer:", uuids


def _last_line(text: str) -> str:
    return (text.splitlines() or ["it says nothing"])[-1]
