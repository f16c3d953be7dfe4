"""Every scenario as data; load-tests/locustfile.py runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Loop = Literal["open", "closed", "burst"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A period that changes from one level to another; requests per second, clients, or requests in one burst."""

    duration_s: float
    to: float
    start: float = 0.0
    # Between two bursts.
    every_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load. Levels are relative to the user's `--rate` or `--users`."""

    name: str
    words: str
    loop: Loop
    stages: tuple[Stage, ...]
    kinds: tuple[str, ...] = ("chat",)
    max_tokens: int = 128
    # Share of long prompts among chat requests.
    long_share: float = 0.0
    # Turns of a conversation; each carries all that was said before.
    turns: int = 1
    timeout_s: float = 300.0
    # Whether clients come one after the other over a stage, and not all at its start.
    is_ramped: bool = False
    # Clients, or requests in a burst, when the user does not say; 0: as many as there are slots.
    users: int = 0
    # Least answered requests in a hundred, of all; 0: not judged.
    success_percent: float = 0.0
    # The same for each pool.
    pool_success_percent: float = 0.0
    # Longest 95th percentile of the whole answer.
    p95_s: float = 0.0

    def lasting(self, seconds: float | None) -> Scenario:
        """The same load with another duration."""
        if seconds is None:
            return self
        share = seconds / sum(stage.duration_s for stage in self.stages)
        stages = (replace(stage, duration_s=stage.duration_s * share) for stage in self.stages)
        return replace(self, stages=tuple(stages))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "stress", "every GPU with long answers: clients come within a minute, stay 58, leave within one",
            "closed", (Stage(60, 1), Stage(3480, 1), Stage(60, 0)), max_tokens=2048, timeout_s=90, is_ramped=True,
            users=16, success_percent=95, pool_success_percent=90, p95_s=60,
        ),
        Scenario(
            "mixed", "short and long chat, embeddings and images at the rate that is asked for",
            "open", (Stage(600, 1, 1),), ("chat", "embedding", "image"), long_share=0.2,
        ),
        Scenario("soak", "half an hour of heat at one rate", "open", (Stage(1800, 1, 1),), max_tokens=512),
        Scenario("single", "one replica alone, all its slots busy", "closed", (Stage(120, 1),)),
        Scenario(
            "conversation", "clients that talk in eight turns, each with all that was said before",
            "closed", (Stage(300, 1),), turns=8,
        ),
        Scenario(
            "burst", "as many requests at one instant as there are slots, four times over, every 20 seconds",
            "burst", (Stage(120, 4, every_s=20),),
        ),
    )
}  # fmt: skip
