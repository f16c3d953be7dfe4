"""Which of the models found are served, and where: the plan itself says what fits, this only asks it.

Nothing here estimates memory. A proposal is rendered as an inventory and planned like any other; what breaks a rule is
not proposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from corral.build import Plan, build_plan
from corral.config.file_names import file_of
from corral.config.inventory import Placement
from corral.config.load import validate
from corral.config.model_lock import Gguf, ModelLock
from corral.config.source import parse
from corral.errors import SiteError
from corral.plan.memory import is_causal
from corral.verbs.init.look import FoundFile, Machine
from corral.verbs.models.models import QUANTIZATION

RANK_POOLING = 4
# Tokens of one request: tried first, and where even that is too much.
FIRST_CONTEXT, LEAST_CONTEXT, EMBEDDING_CONTEXT = 8192, 4096, 2048
# What a chat pool gets while there is room: first a longer context for one, then more requests at the same time.
GROWTH = ({"context": 16384}, {"slots": 2}, {"context": 32768}, {"slots": 4})
# GiB that a processor may read for each token: more is too slow to talk with.
CPU_GIB = 4.0
GIB = 1 << 30
# What is proposed for cards where no model file was found, from large to small: official files and their GiB.
PROPOSED = {
    "qwen3-32b": ("hf:Qwen/Qwen3-32B-GGUF/Qwen3-32B-Q4_K_M.gguf", 18.4),
    "qwen3-14b": ("hf:Qwen/Qwen3-14B-GGUF/Qwen3-14B-Q4_K_M.gguf", 8.4),
    "qwen3-8b": ("hf:Qwen/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf", 4.7),
    "qwen3-4b": ("hf:Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q4_K_M.gguf", 2.4),
    "qwen3-0.6b": ("hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf", 0.6),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that could be served, and what its file says; without `gguf` it would have to be downloaded."""

    name: str
    host: str
    file: FoundFile
    size: int
    gguf: Gguf | None = None

    @property
    def kind(self) -> str:
        """What it is for, as its file says."""
        if self.gguf is None:
            return "chat"
        if self.gguf.pooling == RANK_POOLING:
            return "rerank"
        return "embedding" if self.gguf.pooling or not is_causal(self.gguf) else "chat"

    @property
    def read_gib(self) -> float:
        """GiB that are read for each token: of experts only those that are used."""
        share = self.gguf.experts_used / self.gguf.experts if self.gguf and self.gguf.experts else 1.0
        return self.size * share / GIB

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        quantization = f"{self.gguf.quantization}, " if self.gguf and self.gguf.quantization else ""
        return f"{quantization}{self.size / GIB:.1f} GiB"


@dataclass(frozen=True, slots=True)
class Serving:
    """A candidate with its settings and its place."""

    candidate: Candidate
    context: int
    slots: int = 1
    replicas: int = 1
    is_on_cards: bool = True
    # Where the plan has put it.
    places: tuple[Placement, ...] = ()

    @property
    def on(self) -> list[str]:
        """Its places as the inventory has them: chosen by the plan until they are known."""
        if not self.is_on_cards:
            return [f"{{host: {self.candidate.host}}}"]
        if not self.places:
            return [f"{{auto: true, host: {self.candidate.host}, replicas: {self.replicas}}}"]
        alone = [place.gpus[0] for place in self.places if place.gpus and place.gpus_per_replica == 1]
        first = [f"{{host: {self.candidate.host}, gpus: {ranges(alone)}}}"] if alone else []
        split = [place for place in self.places if place.gpus_per_replica > 1]
        return first + [
            f"{{host: {place.host}, gpus: {ranges(place.gpus or ())}, gpus_per_replica: {place.gpus_per_replica}}}"
            for place in split
        ]


# The text of an inventory that serves these, and what of it the plan judges.
Render = Callable[[Sequence[Serving]], str]


@dataclass(slots=True)
class Chooser:
    """Asks the plan what fits, and keeps why something does not."""

    render: Render
    lock: ModelLock
    machines: Sequence[Machine]
    chosen: list[Serving] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    # The reason of the last refusal.
    reason: str = ""

    def plan(self, servings: Sequence[Serving], lock: ModelLock | None = None) -> Plan | None:
        """The plan of an inventory with these; None when it breaks a rule, or may be too large."""
        try:
            found = build_plan(replace(validate(parse(self.render(servings), "inventory")), lock=lock or self.lock))
        except SiteError as error:
            self.reason = error.problems[0].message
            return None
        guesses = [warning for warning in found.warnings if warning.rule == "vram"]
        self.reason = guesses[0].message if guesses else ""
        return None if guesses and lock is None else found

    def choose(self, candidates: Iterable[Candidate]) -> None:
        """Chats from the largest to the smallest as far as they fit beside each other, and one model of other kinds."""
        for item in sorted(candidates, key=lambda it: (it.kind != "chat", -it.size, it.name, it.file.store)):
            if any(item.name == other.candidate.name for other in self.chosen):
                self.refused[self.label(item)] = f"another file of {item.name} is served"
            elif item.kind != "chat" and any(item.kind == other.candidate.kind for other in self.chosen):
                self.refused[self.label(item)] = f"one {item.kind} model is enough for most sites"
            elif reason := self._added(item):
                self.refused[self.label(item)] = reason

    @staticmethod
    def label(item: Candidate) -> str:
        """A candidate as people find it."""
        return f"{item.file.source} on {item.host} ({item.place})"

    def _added(self, item: Candidate) -> str:
        """Serves a model if there is a way, and returns why there is none."""
        trained = (item.gguf.context if item.gguf else 0) or FIRST_CONTEXT
        has_cards = any(machine.name == item.host and machine.cards for machine in self.machines)
        is_chat = item.kind == "chat"
        first = Serving(item, min(trained, FIRST_CONTEXT if is_chat else EMBEDDING_CONTEXT))
        ways = [first, replace(first, context=min(trained, LEAST_CONTEXT))] if has_cards else []
        if not (has_cards and is_chat):
            ways.append(replace(first, is_on_cards=False))
        reason = ""
        for way in ways:
            if not way.is_on_cards and is_chat and (why := self._too_slow(item)):
                return why
            if self.plan([*self.chosen, way]):
                self.chosen.append(way)
                return ""
            reason = reason or self.reason
        return reason

    def _too_slow(self, item: Candidate) -> str:
        """Why a processor is not to serve a chat model; empty when it may."""
        if item.read_gib > CPU_GIB:
            return f"a processor reads {item.read_gib:.1f} GiB for each token of it, which is too slow to talk with"
        others = [other for other in self.chosen if other.candidate.kind == "chat" and other.candidate.host == item.host]
        return "one chat model is enough for a processor" if others else ""

    def grow(self) -> None:
        """Gives what is left: further replicas to cards that are idle, longer contexts, more requests at a time."""
        while any(self._is_grown(index, self._with_replica(index)) for index in range(len(self.chosen))):
            pass
        for step in GROWTH:
            for index, serving in enumerate(self.chosen):
                item = serving.candidate
                trained = item.gguf.context if item.gguf else FIRST_CONTEXT
                if item.kind == "chat" and serving.is_on_cards and step.get("context", 0) <= trained:
                    self._is_grown(index, replace(serving, **step))

    def _with_replica(self, index: int) -> Serving | None:
        """A pool with a replica more, where a card of its host has nothing to do."""
        serving = self.chosen[index]
        found = self.plan(self.chosen) if serving.is_on_cards and serving.candidate.kind == "chat" else None
        if found is None:
            return None
        used = {card.number for item in found.site.replicas if item.host == serving.candidate.host for card in item.cards}
        return replace(serving, replicas=serving.replicas + 1) if len(used) < len(found.site.cards[serving.candidate.host]) else None

    def _is_grown(self, index: int, wanted: Serving | None) -> bool:
        """Takes the change if all fits with it and no card has two replicas of one pool."""
        if wanted is None or wanted == self.chosen[index]:
            return False
        changed = [*self.chosen[:index], wanted, *self.chosen[index + 1 :]]
        found = self.plan(changed)
        if found is None:
            return False
        cards = [(item.pool, card.number) for item in found.site.replicas for card in item.cards]
        if len(set(cards)) < len(cards):
            return False
        self.chosen = changed
        return True

    def settle(self) -> None:
        """Writes down where the plan has put everything, so that a later change moves nothing by itself."""
        found = self.plan(self.chosen)
        pools = found.inventory.pools if found else {}
        self.chosen = [replace(it, places=pools[it.candidate.name].on) if it.is_on_cards else it for it in self.chosen]


def ranges(numbers: Sequence[int]) -> str:
    """Card numbers as people write them: `1`, `1-3` or `"1-3,5"`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
    return words[0] if len(words) == 1 else f'"{",".join(words)}"'


def name_of(text: str) -> str:
    """A pool's name for a model file: without its folder, its quantization and its number of parts."""
    text = re.sub(r"(?i)\.gguf$", "", file_of(text) if ":" not in text else text)
    text = QUANTIZATION.sub("", re.sub(r"-\d{5}-of-\d{5}$", "", text))
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"(?i)[-_.]ud(?=[-_.]?$)", "", text).lower()).strip("-.")[:40] or "model"
