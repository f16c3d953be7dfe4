"""Keys of consumers: what LiteLLM should have, what it has, and what turns the one into the other. Touches nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from corral.checks.references import OWN_PREFIX
from corral.config.client_names import aliases_of
from corral.config.inventory import Consumer, Inventory
from corral.gateway.routes import CONSUMER_ROUTES, METRICS_ROUTES

# In the metadata of every key that `keys sync` may change and revoke.
MANAGED = {"managed_by": "corral"}
# In the metadata of a key with a weight other than 1; the gateway's callback passes it to the balancer.
WEIGHT = "corral_weight"
METRICS_NAME = f"{OWN_PREFIX}prometheus"
NO_MODELS = "no-default-models"
# LiteLLM's names of what the inventory decides, beside the expiry.
FIELDS = (
    "models", "rpm_limit", "tpm_limit", "max_parallel_requests", "max_budget", "budget_duration", "allowed_routes",
    "metadata",
)  # fmt: skip
# Two expiries are the same when they differ by less: LiteLLM is told a duration, and clocks differ.
TOLERANCE = timedelta(minutes=10)

Action = Literal["create", "update", "adopt", "replace", "revoke", "keep", "expired", "taken"]
CHANGES: frozenset[Action] = frozenset({"create", "update", "adopt", "replace", "revoke"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A key that there should be."""

    name: str
    settings: Mapping[str, Any]
    expires: datetime | None = None
    # The key itself where the secret store says it; otherwise it lies in a file of its own.
    value: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A key that LiteLLM has; it stores a hash, never the key."""

    token: str
    name: str
    settings: Mapping[str, Any]
    expires: datetime | None = None
    spend: float = 0.0
    # The first and last letters, as LiteLLM shows them.
    hint: str = ""
    is_blocked: bool = False
    resets: datetime | None = None

    @property
    def is_managed(self) -> bool:
        """Whether `keys sync` made it or took it over."""
        return MANAGED.items() <= dict(self.settings.get("metadata") or {}).items()

    @property
    def replaced_by(self) -> str:
        """The hash of the key that a rotation put in its place; empty for a key in use."""
        return str((self.settings.get("metadata") or {}).get("replaced_by", ""))

    @property
    def retires(self) -> datetime | None:
        """When a rotation wants it gone."""
        return moment((self.settings.get("metadata") or {}).get("retires"))

    def is_expired(self, now: datetime) -> bool:
        """Whether LiteLLM refuses it for its age."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done, or is well, about one key."""

    action: Action
    name: str
    token: str = ""
    # LiteLLM's field, its value there, its value in the inventory.
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    wanted: Wanted | None = None
    # Whether the file here lacks the key that LiteLLM knows.
    is_lost: bool = False

    @property
    def is_change(self) -> bool:
        """Whether carrying it out changes anything."""
        return self.action in CHANGES


def hash_of(value: str) -> str:
    """A key as LiteLLM stores it."""
    return hashlib.sha256(value.encode()).hexdigest()


def moment(text: object) -> datetime | None:
    """A day or moment in ISO 8601, in UTC when it names no zone; None for anything else."""
    if not isinstance(text, str) or not text:
        return None
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


# --- what there should be --------------------------------------------------------------------------------------------


def wanted_keys(inventory: Inventory, metrics_key: str = "") -> list[Wanted]:
    """The keys of all consumers, and Prometheus' own where it has one."""
    found = [wanted_of(inventory, name, consumer) for name, consumer in inventory.consumers.items()]
    if metrics_key:
        settings = _settings({"models": [NO_MODELS], "allowed_routes": list(METRICS_ROUTES), "metadata": dict(MANAGED)})
        found.append(Wanted(METRICS_NAME, settings, value=metrics_key))
    return found


def wanted_of(inventory: Inventory, name: str, consumer: Consumer, *, is_managed: bool = True) -> Wanted:
    """The key of one consumer, in LiteLLM's words; aliases are named too, or LiteLLM would not list them as models."""
    budget = consumer.budget
    models = [model for pool in consumer.pools or () for model in (pool, *aliases_of(inventory, pool))]
    settings = {
        "models": models,
        "rpm_limit": consumer.limits.rpm,
        "tpm_limit": consumer.limits.tpm,
        "max_parallel_requests": consumer.limits.parallel,
        "max_budget": budget.max_usd if budget else None,
        "budget_duration": budget.period if budget else None,
        "allowed_routes": list(CONSUMER_ROUTES),
        "metadata": {**consumer.metadata, **_weight(consumer), **(MANAGED if is_managed else {})},
    }
    return Wanted(name, _settings(settings), moment(consumer.expires))


def _weight(consumer: Consumer) -> dict[str, int]:
    return {WEIGHT: consumer.weight} if consumer.weight != 1 else {}


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given.get(name) for name in FIELDS}


def found_of(row: Mapping[str, Any]) -> Found:
    """A key as LiteLLM lists it."""
    return Found(
        token=str(row["token"]),
        name=str(row.get("key_alias") or ""),
        settings=_settings(row),
        expires=moment(row.get("expires")),
        spend=float(row.get("spend") or 0),
        hint=str(row.get("key_name") or ""),
        is_blocked=bool(row.get("blocked")),
        resets=moment(row.get("budget_reset_at")),
    )


# --- the difference --------------------------------------------------------------------------------------------------


def compare(
    wanted: Iterable[Wanted],
    found: Iterable[Found],
    files: Mapping[str, str],
    now: datetime,
    adopted: Collection[str] = (),
) -> list[Step]:
    """What makes LiteLLM agree with the inventory: a step for every key that is wanted, or not wanted any more.

    Args:
        wanted: the keys that there should be.
        found: all keys that LiteLLM has.
        files: the keys that lie in files here, by name.
        now: this moment; keys that should have expired are not made.
        adopted: names of keys made by hand that are to be taken over.
    """
    listed = list(found)
    by_name = {key.name: key for key in listed}
    by_token = {key.token: key for key in listed if not key.replaced_by}
    steps, claimed = [], set()
    for want in wanted:
        value = want.value or files.get(want.name, "")
        key = by_name.get(want.name) or by_token.get(hash_of(value))
        claimed.add(key.token if key else "")
        steps.append(_missing(want, now) if key is None else _present(want, key, value, now, adopted))
    return steps + [Step("revoke", key.name, key.token) for key in listed if _is_left_over(key, claimed, now)]


def _missing(want: Wanted, now: datetime) -> Step:
    is_late = want.expires is not None and want.expires <= now
    return Step("expired" if is_late else "create", want.name, wanted=want)


def _present(want: Wanted, key: Found, value: str, now: datetime, adopted: Collection[str]) -> Step:
    is_ours = key.is_managed or hash_of(value) == key.token
    is_lost = hash_of(value) != key.token
    if not is_ours and want.name not in adopted:
        return Step("taken", want.name, key.token, wanted=want)
    if want.value and is_lost:
        return Step("replace", want.name, key.token, wanted=want)
    changes = differences(want, key, now)
    action: Action = "adopt" if not is_ours else "update" if changes else "keep"
    return Step(action, want.name, key.token, changes, want, is_lost)


def differences(want: Wanted, key: Found, now: datetime) -> dict[str, tuple[Any, Any]]:
    """LiteLLM's fields that are not as wanted: their value there and the wanted one."""
    pairs = {name: (key.settings.get(name), value) for name, value in want.settings.items()}
    found = {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}
    if key.name != want.name:
        found["key_alias"] = (key.name, want.name)
    if not _same_moment(key.expires, want.expires, now):
        found["expires"] = (key.expires, want.expires)
    return found


def _plain(value: Any) -> Any:
    """A value in which nothing but what it means is left: no order of lists, empty as absent."""
    if isinstance(value, list | tuple):
        return sorted(value) or None
    return value or None if isinstance(value, Mapping) else value


def _same_moment(one: datetime | None, other: datetime | None, now: datetime) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) < TOLERANCE or max(one, other) <= now


def _is_left_over(key: Found, claimed: Collection[str], now: datetime) -> bool:
    """Whether a key is ours and wanted no more; one that was replaced may have some time left."""
    if key.token in claimed:
        return False
    if key.replaced_by:
        return key.retires is None or key.retires <= now
    return key.is_managed


# --- in LiteLLM's words ----------------------------------------------------------------------------------------------


def body_of(want: Wanted, now: datetime, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The body of a request to LiteLLM that sets a key's fields (all of them, or those named)."""
    body: dict[str, Any] = {"key_alias": want.name, **want.settings}
    body |= {"duration": duration_of(want.expires, now)}
    if names is None:
        return body
    wanted = {"duration" if name == "expires" else name for name in names}
    return {name: value for name, value in body.items() if name in wanted}


def duration_of(expires: datetime | None, now: datetime) -> str | None:
    """How long from now, in LiteLLM's words; None for good. What is past gets one second."""
    return None if expires is None else f"{max(1, round((expires - now).total_seconds()))}s"


def words_of(step: Step) -> Iterator[str]:
    """What a step changes, for people: `rpm_limit 35 → 60`."""
    for name, (old, new) in step.changes.items():
        yield f"{name} {_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "all"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
