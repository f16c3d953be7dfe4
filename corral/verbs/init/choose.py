"""Which of the models found are served, and where: the plan itself says what fits, this only asks it.

Nothing here estimates memory. A proposal is rendered as an inventory and planned like any other; what breaks a rule is
not proposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from corral.build import Plan, build_plan
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
# Context and slots of a chat pool while there is room: first a longer context, then more requests at the same time.
GROWTH = ((16384, 1), (16384, 2), (32768, 2), (32768, 4))
# GiB that a processor may read for each token: more is too slow to talk with.
CPU_GIB = 4.0
GIB = 1 << 30
BESIDE = "fits, but not beside what is served"
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
    engine: Mapping[str, object] = field(default_factory=dict)
    replicas: int = 1
    is_on_cards: bool = True
    # Where the plan has put it.
    places: tuple[Placement, ...] = ()

    @property
    def why(self) -> str:
        """Why it is served like this, for people."""
        item = self.candidate
        words = [item.place, *([] if item.gguf else ["not here yet: ./generate.py models pull"])]
        words += [] if self.is_on_cards else ["on the processor"]
        words += ["cache at 8 bits, for it would not fit otherwise"] if "cache_type" in self.engine else []
        return ", ".join([*words, *(["one on each card that would be idle"] if self.replicas > 1 else [])])

    @property
    def on(self) -> list[str]:
        """Its places as the inventory has them: chosen by the plan until they are known."""
        if not self.is_on_cards:
            return [f"{{host: {self.candidate.host}}}"]
        if not self.places:
            return [f"{{auto: true, host: {self.candidate.host}, replicas: {self.replicas}}}"]
        alone = sorted(place.gpus[0] for place in self.places if place.gpus and place.gpus_per_replica == 1)
        groups = (
            [alone, ""],
            *(
                [list(it.gpus or ()), f", gpus_per_replica: {it.gpus_per_replica}"]
                for it in self.places
                if it.gpus_per_replica > 1
            ),
        )
        return [f"{{host: {self.candidate.host}, gpus: {numbers}{more}}}" for numbers, more in groups if numbers]


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
            first = error.problems[0]
            self.reason = f"{first.message}; {first.remedy}" if first.remedy else first.message
            return None
        guesses = [warning for warning in found.warnings if warning.rule == "vram"]
        self.reason = guesses[0].message if guesses else ""
        return None if guesses and lock is None else found

    def choose(self, candidates: Iterable[Candidate]) -> None:
        """Chats from the largest to the smallest as far as they fit beside each other, and one model of other kinds."""
        ordered = sorted(candidates, key=lambda it: (it.kind != "chat", -it.size, it.name, it.file.store))
        for item in ordered:
            self._take(item, FIRST_CONTEXT if item.kind == "chat" else EMBEDDING_CONTEXT)
        for item in ordered:
            if item.kind == "chat" and not any(it.candidate.kind == "chat" for it in self.chosen):
                self._take(item, LEAST_CONTEXT)

    @staticmethod
    def label(item: Candidate) -> str:
        """A candidate as people find it."""
        return f"{item.file.source} on {item.host} ({item.place})"

    def _take(self, item: Candidate, context: int) -> None:
        """Serves a model if there is a way, or keeps why there is none."""
        trained = (item.gguf.context if item.gguf else 0) or context
        has_cards = any(machine.name == item.host and machine.cards for machine in self.machines)
        on_card = Serving(item, min(trained, context))
        ways = [on_card] if has_cards else []
        ways += [replace(on_card, engine={"cache_type": "q8_0"})] if has_cards and item.kind == "chat" else []
        ways += [replace(on_card, is_on_cards=False)] if not (has_cards and item.kind == "chat") else []
        reason = self._not_wanted(item, has_cards=has_cards)
        way = next((way for way in ways if not reason and self.plan([*self.chosen, way])), None)
        self.refused.pop(self.label(item), None)
        if way:
            self.chosen.append(way)
        elif reason:
            self.refused[self.label(item)] = reason
        else:
            fits_alone = any(self.plan([way]) for way in ways)
            self.refused[self.label(item)] = BESIDE if fits_alone else self.reason

    def _not_wanted(self, item: Candidate, *, has_cards: bool) -> str:
        """Why a model is not to be served even where there is room; empty when it is."""
        others = [it.candidate for it in self.chosen]
        if any(item.name == it.name for it in others):
            return f"another file of {item.name} is served"
        if item.kind != "chat":
            return f"one {item.kind} model is enough to begin with" if item.kind in {it.kind for it in others} else ""
        if has_cards:
            return ""
        if item.read_gib > CPU_GIB:
            return f"a processor reads {item.read_gib:.1f} GiB of it for each token, which is too slow to talk with"
        alike = any(it.kind == "chat" and it.host == item.host for it in others)
        return "one chat model is enough for a processor" if alike else ""

    def grow(self) -> None:
        """Gives what is left: further replicas to cards that are idle, longer contexts, more requests at a time."""
        while any(self._has_replica_more(index) for index in range(len(self.chosen))):
            pass
        for context, slots in GROWTH:
            for index, serving in enumerate(self.chosen):
                item = serving.candidate
                if item.kind == "chat" and serving.is_on_cards:
                    trained = item.gguf.context if item.gguf else FIRST_CONTEXT
                    engine = {**serving.engine, **({"slots": slots} if slots > 1 else {})}
                    self._changed(index, replace(serving, engine=engine))
                    self._changed(
                        index, replace(self.chosen[index], context=max(serving.context, min(trained, context)))
                    )

    def _has_replica_more(self, index: int) -> bool:
        """Gives a pool a replica more if a card of its host has nothing to do."""
        serving = self.chosen[index]
        found = self.plan(self.chosen) if serving.is_on_cards and serving.candidate.kind == "chat" else None
        if found is None:
            return False
        host = serving.candidate.host
        used = {card.number for item in found.site.replicas if item.host == host for card in item.cards}
        is_idle = len(used) < len(found.site.cards[host])
        return is_idle and self._changed(index, replace(serving, replicas=serving.replicas + 1))

    def _changed(self, index: int, wanted: Serving) -> bool:
        """Takes a change if all fits with it and no card has two replicas of one pool."""
        changed = [*self.chosen[:index], wanted, *self.chosen[index + 1 :]]
        found = self.plan(changed) if wanted != self.chosen[index] else None
        cards = [(item.pool, card.number) for item in found.site.replicas for card in item.cards] if found else []
        if found is None or len(set(cards)) < len(cards):
            return False
        self.chosen = changed
        return True

    def settle(self) -> None:
        """Writes down where the plan has put everything, so that a later change moves nothing by itself."""
        found = self.plan(self.chosen)
        pools = found.inventory.pools if found else {}
        self.chosen = [replace(it, places=pools[it.candidate.name].on) if it.is_on_cards else it for it in self.chosen]


def name_of(text: str, *, keeps_all: bool = False) -> str:
    """A pool's name for a model file: without its folder, its number of parts and (unless `keeps_all`) quantization."""
    text = re.sub(r"(?i)\.gguf$|:latest$", "", text.rpartition("/")[2])
    text = re.sub(r"(?i)^.*-gguf_|-\d{5}-of-\d{5}$", "", text)  # llama.cpp's cache: owner_repository_file
    text = (text if keeps_all else QUANTIZATION.sub("", text)).lower()
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"[-_.]ud(?=[-_.]*$)", "", text)).strip("-.")[:40].strip("-.") or "model"
