"""What-if simulation of planned changes: the pools that `plan --what-if` simulates before and after. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from corral.build import Plan
from corral.contributions import Backend
from corral.errors import UsageError, did_you_mean, shown
from corral.whatif.simulation import Outcome, Station, simulate

# Default spread of answers: lengths of answers differ much, and too long a wait is the safer error.
USUAL_CV = 1.0
Changes = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Key:
    """Something that a what-if may change, and the values that it may take."""

    words: str
    low: float
    high: float
    is_whole: bool = True


KEYS = {
    "gpus": Key("cards of the pool, with replicas on them as now", 1, 100_000),
    "slots": Key("slots of each replica", 1, 256),
    "rpm": Key("requests a minute that clients ask for", 0.001, 1e9, is_whole=False),
    "limit_rpm": Key("requests a minute that the gateway lets through", 1, 1e9),
    "answer_s": Key("mean seconds of an answer, the wait left out", 0.001, 86_400, is_whole=False),
    "answer_cv": Key("spread of answers: standard deviation by mean", 0, 10, is_whole=False),
    "queue_depth": Key("requests that may wait", 0, 100_000),
    "queue_timeout_s": Key("longest wait in seconds", 1, 3600, is_whole=False),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """How long a pool's answers take, by a run of `bench sweep`."""

    answer_s: float
    run: str


@dataclass(frozen=True, slots=True)
class Case:
    """A pool as it is and as it would be; without a reason both are there."""

    pool: str
    now: Station | None = None
    then: Station | None = None
    # Where its answer time comes from.
    source: str = ""
    # Why it cannot be simulated.
    reason: str = ""


# A case and what comes of it, as it is and as it would be.
Result = tuple[Case, Outcome | None, Outcome | None]


def parse_changes(words: Iterable[str], plan: Plan) -> dict[str, dict[str, float]]:
    """Changes of every pool from `[POOL.]KEY=VALUE`; one for a pool goes before one for all pools.

    Raises UsageError with all that is wrong at once.
    """
    wrong: list[str] = []
    given: dict[tuple[str, str], float] = {}
    for word in words:
        try:
            pool, key, value = _parsed(word, plan)
        except ValueError as error:
            wrong.append(f"--what-if {shown(word)}: {error}")
            continue
        if given.setdefault((pool, key), value) != value:
            wrong.append(f"--what-if {shown(word)}: it has been given another value before")
    if wrong:
        raise UsageError("\n".join(wrong))
    found: dict[str, dict[str, float]] = {name: {} for name in plan.inventory.pools}
    for (pool, key), value in sorted(given.items()):  # "" comes first: all pools
        for name in [pool] if pool else found:
            if pool or key != "gpus" or _cards(plan, name):
                found[name][key] = value
    return found


def _parsed(word: str, plan: Plan) -> tuple[str, str, float]:
    """Pool (`""`: all), key and value; raises ValueError with words and a remedy."""
    name, sign, text = word.partition("=")
    pool, _, key = name.rpartition(".")
    if not sign:
        raise ValueError("write [POOL.]KEY=VALUE, such as chat.gpus=4")
    if key not in KEYS:
        raise ValueError(f"no key {shown(key)}; {did_you_mean(key, KEYS)}")
    if pool and pool not in plan.inventory.pools:
        raise ValueError(f"no pool named {shown(pool)}; {did_you_mean(pool, plan.inventory.pools)}")
    rule = KEYS[key]
    kind = "a whole number" if rule.is_whole else "a number"
    read: Callable[[str], float] = int if rule.is_whole else float
    try:
        value = read(text)
    except ValueError:
        value = rule.low - 1
    if not rule.low <= value <= rule.high:
        raise ValueError(f"{key} is {kind} from {rule.low:,g} to {rule.high:,.0f}")
    if key == "gpus":
        _check_cards(plan, pool, int(value))
    return pool, key, value


def _check_cards(plan: Plan, pool: str, gpus: int) -> None:
    names = [pool] if pool else [name for name in plan.inventory.pools if _cards(plan, name)]
    if not names or not _cards(plan, names[0]):
        raise ValueError(f"{pool or 'no pool'} has {'no' if pool else 'any'} replica on a card")
    for name in names:
        replicas, cards = _replicas_on_cards(plan, name), _cards(plan, name)
        if gpus * replicas < cards:
            raise ValueError(f"a replica of {name} takes {-(-cards // replicas)} cards")


def cases(plan: Plan, changes: Mapping[str, Changes], answers: Mapping[str, Measured]) -> list[Case]:
    """Every pool as it is and as it would be.

    Args:
        plan: the farm as it is.
        changes: what `parse_changes` found.
        answers: measured answer times of pools.
    """
    return [_case(plan, pool, changes.get(pool, {}), answers.get(pool)) for pool in plan.inventory.pools]


def run(found: Iterable[Case]) -> list[Result]:
    """Each case with what comes of it; pools that are alike are simulated once."""
    simulated = cache(simulate)

    def outcome(station: Station | None) -> Outcome | None:
        return simulated(replace(station, pool="")) if station else None

    return [(case, outcome(case.now), outcome(case.then)) for case in found]


def as_data(results: Iterable[Result]) -> dict[str, Any]:
    """The results as plain data, by pool; rates by the second, times in seconds."""
    return {
        case.pool: {
            "reason": case.reason or None, "answer_s_from": case.source or None,
            "now": _side(case.now, now), "what_if": _side(case.then, then),
        }
        for case, now, then in results
    }  # fmt: skip


def _side(station: Station | None, outcome: Outcome | None) -> dict[str, Any] | None:
    if station is None or outcome is None:
        return None
    data = asdict(station)
    del data["pool"]
    return data | asdict(outcome)


def _case(plan: Plan, pool: str, changes: Changes, measured: Measured | None) -> Case:
    backends = _backends(plan, pool)
    if plan.inventory.gateway.balancing == "direct":
        return Case(pool, reason="balancing: direct has no queue that all replicas share")
    if not backends:
        return Case(pool, reason="a provider answers it, and its slots are not known")
    limit = plan.inventory.pools[pool].limits.rpm
    # What is not known of the farm as it is goes for both sides.
    rpm = limit or changes.get("rpm")
    answer_s = measured.answer_s if measured else changes.get("answer_s")
    lacking = [] if rpm else [f"how many requests come ({pool}.rpm=…)"]
    lacking += [] if answer_s else [f"how long an answer takes ({pool}.answer_s=…, or bench sweep)"]
    if rpm is None or answer_s is None:
        return Case(pool, reason=f"nobody has said {' and '.join(lacking)}")
    queue = plan.inventory.pools[pool].queue or plan.inventory.gateway.queue
    now = Station(
        pool, sum(backend.slots for backend in backends), rpm / 60, answer_s,
        USUAL_CV if measured else changes.get("answer_cv", USUAL_CV), queue.depth, queue.timeout_s, limit,
    )  # fmt: skip
    source = f"measured (run {measured.run})" if measured else "given"
    return Case(pool, now, _changed(plan, now, changes), source)


def _changed(plan: Plan, now: Station, changes: Changes) -> Station:
    given: dict[str, Any] = {key: int(value) if KEYS[key].is_whole else value for key, value in changes.items()}
    same = {key: value for key, value in given.items() if key not in ("gpus", "slots", "rpm")}
    rate = given["rpm"] / 60 if "rpm" in given else now.rate_per_s
    return replace(now, slots=_slots(plan, now.pool, changes), rate_per_s=rate, **same)


def _slots(plan: Plan, pool: str, changes: Changes) -> int:
    """All slots of the pool with other cards or other slots on each replica; what is on no card stays as it is."""
    backends = _backends(plan, pool)
    slots, count = sum(backend.slots for backend in backends), len(backends)
    replicas, cards = _replicas_on_cards(plan, pool), _cards(plan, pool)
    if "gpus" in changes:
        made = int(changes["gpus"]) * replicas // cards
        on_cards = sum(replica.slots for replica in plan.site.replicas if replica.pool == pool and replica.cards)
        slots += on_cards * made // replicas - on_cards
        count += made - replicas
    return int(changes["slots"]) * count if "slots" in changes else slots


def _backends(plan: Plan, pool: str) -> list[Backend]:
    """Replicas of which the balancer knows the slots."""
    return [item for item in plan.contributions.backends if item.pool == pool and item.protocol != "cloud"]


def _cards(plan: Plan, pool: str) -> int:
    used = {(card.host, card.number) for item in plan.site.replicas if item.pool == pool for card in item.cards}
    return len(used)


def _replicas_on_cards(plan: Plan, pool: str) -> int:
    return sum(1 for replica in plan.site.replicas if replica.pool == pool and replica.cards)
