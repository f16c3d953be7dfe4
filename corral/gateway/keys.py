"""Keys of consumers: what LiteLLM should have, what it has, and the changes between the two. No input, no output."""

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
from corral.plan.routing import local_names

# In the metadata of every key that `keys sync` may change and revoke.
MANAGED = {"managed_by": "corral"}
# In the metadata of a key with a weight other than 1; the gateway's callback passes it to the balancer.
WEIGHT = "corral_weight"
# In the metadata of a key whose budget, or that of its team, names a pool for when it is spent.
KEY_FALLBACK, TEAM_FALLBACK = "corral_key_fallback", "corral_team_fallback"
# LiteLLM's fields of a team that the inventory decides; its `team_id` is made of the name.
TEAM_FIELDS = ("team_alias", "max_budget", "budget_duration", "metadata")
METRICS_NAME = f"{OWN_PREFIX}prometheus"
NO_MODELS = "no-default-models"
# LiteLLM's fields that the inventory decides, beside the expiry.
FIELDS = (
    "models", "rpm_limit", "tpm_limit", "max_parallel_requests", "max_budget", "budget_duration", "allowed_routes",
    "metadata", "team_id",
)  # fmt: skip
# Two expiries that differ by less are the same: LiteLLM takes a duration, and clocks differ.
TOLERANCE = timedelta(minutes=10)

Action = Literal["create", "update", "adopt", "replace", "revoke", "keep", "expired", "taken"]
CHANGES: frozenset[Action] = frozenset({"create", "update", "adopt", "replace", "revoke"})


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key that LiteLLM should have."""

    name: str
    settings: Mapping[str, Any]
    expires: datetime | None = None
    # The key itself, and its name, where the host's secrets contain it; other keys are in files of their own.
    value: str = ""
    secret: str = ""


@dataclass(frozen=True, slots=True)
class StoredKey:
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
    def metadata(self) -> dict[str, Any]:
        """What the kit and people noted about it."""
        return dict(self.settings.get("metadata") or {})

    @property
    def is_managed(self) -> bool:
        """Whether `keys sync` made it or took it over."""
        return MANAGED.items() <= self.metadata.items()

    @property
    def replaced_by(self) -> str:
        """The hash of its successor after a rotation; empty for a key in use."""
        return str(self.metadata.get("replaced_by", ""))

    @property
    def retires(self) -> datetime | None:
        """When a rotation revokes it."""
        return moment(self.metadata.get("retires"))


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What `keys sync` does about one key, or why it does nothing."""

    action: Action
    name: str
    token: str = ""
    # LiteLLM's field, its value there, its value in the inventory.
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    wanted: KeySpec | None = None
    # Whether the file here lacks the key that LiteLLM knows.
    is_lost: bool = False

    @property
    def is_change(self) -> bool:
        """Whether it changes anything."""
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


# --- what there should be, and what there is -------------------------------------------------------------------------


def wanted_keys(inventory: Inventory, own: Iterable[KeySpec] = ()) -> list[KeySpec]:
    """The keys of all consumers, and those of the site's own programs."""
    return [*(wanted_of(inventory, name, consumer) for name, consumer in inventory.consumers.items()), *own]


def metrics_settings() -> dict[str, Any]:
    """What Prometheus' own key opens: figures, and no model."""
    opens = {"models": [NO_MODELS], "allowed_routes": list(METRICS_ROUTES), "metadata": MANAGED}
    return {name: opens.get(name) for name in FIELDS}


def wanted_of(inventory: Inventory, name: str, consumer: Consumer, *, is_managed: bool = True) -> KeySpec:
    """The key of one consumer, in LiteLLM's terms; LiteLLM lists an alias as a model only if the key names it."""
    limits, budget = consumer.limits, consumer.budget
    weight = {WEIGHT: consumer.weight} if consumer.weight != 1 else {}
    shared = inventory.teams[consumer.team].budget if consumer.team else None
    fallbacks = {KEY_FALLBACK: budget and budget.fallback, TEAM_FALLBACK: shared and shared.fallback}
    own = weight | {name: pool for name, pool in fallbacks.items() if pool}
    opened = consumer.pools or (local_names(inventory) or (NO_MODELS,) if consumer.local_only else ())
    settings = {
        "models": [model for pool in opened for model in (pool, *aliases_of(inventory, pool))],
        "rpm_limit": limits.rpm,
        "tpm_limit": limits.tpm,
        "max_parallel_requests": limits.parallel,
        "max_budget": budget.max_usd if budget else None,
        "budget_duration": budget.period if budget else None,
        "allowed_routes": list(CONSUMER_ROUTES),
        "metadata": {**consumer.metadata, **own, **(MANAGED if is_managed else {})},
        "team_id": team_id(consumer.team) if consumer.team else None,
    }
    return KeySpec(name, settings, moment(consumer.expires))


def team_id(name: str) -> str:
    """LiteLLM's id of a team of the inventory."""
    return f"{OWN_PREFIX}{name}"


def wanted_teams(inventory: Inventory) -> dict[str, dict[str, Any]]:
    """The teams that LiteLLM should have, by id, in its terms."""
    return {
        team_id(name): {
            "team_alias": name,
            "max_budget": team.budget.max_usd,
            "budget_duration": team.budget.period,
            "metadata": dict(MANAGED),
        }
        for name, team in inventory.teams.items()
    }


def stored_key(row: Mapping[str, Any]) -> StoredKey:
    """A key as LiteLLM lists it."""
    return StoredKey(
        token=str(row["token"]),
        name=str(row.get("key_alias") or ""),
        settings={name: row.get(name) for name in FIELDS},
        expires=moment(row.get("expires")),
        spend=float(row.get("spend") or 0),
        hint=str(row.get("key_name") or ""),
        is_blocked=bool(row.get("blocked")),
        resets=moment(row.get("budget_reset_at")),
    )


# --- the difference --------------------------------------------------------------------------------------------------


def compare(
    wanted: Iterable[KeySpec],
    stored: Collection[StoredKey],
    files: Mapping[str, str],
    now: datetime,
    adopted: Collection[str] = (),
) -> list[KeyChange]:
    """What makes LiteLLM agree with the inventory: one item for every key that is wanted, or no longer wanted.

    Args:
        wanted: the keys that there should be.
        stored: all keys that LiteLLM has.
        files: the keys in files here, by name.
        now: this moment; keys that should have expired are not made.
        adopted: names of keys made by hand that are to be taken over.
    """
    by_name = {key.name: key for key in stored}
    by_token = {key.token: key for key in stored if not key.replaced_by}
    found, claimed = [], set()
    for want in wanted:
        value = want.value or files.get(want.name, "")
        key = by_name.get(want.name) or by_token.get(hash_of(value))
        if key is None:
            is_late = want.expires is not None and want.expires <= now
            found.append(KeyChange("expired" if is_late else "create", want.name, wanted=want))
        else:
            claimed.add(key.token)
            found.append(_present(want, key, value, now, adopted))
    left = (key for key in stored if key.token not in claimed and _is_over(key, now))
    return found + [KeyChange("revoke", key.name, key.token) for key in left]


def compare_teams(wanted: Mapping[str, Mapping[str, Any]], stored: Iterable[Mapping[str, Any]]) -> list[KeyChange]:
    """What makes LiteLLM's teams agree with the inventory: changes only, those that end last."""
    known = {str(row["team_id"]): row for row in stored if MANAGED.items() <= (row.get("metadata") or {}).items()}
    found = []
    for token, team in wanted.items():
        old = known.get(token)
        pairs = {name: ((old or {}).get(name), team[name]) for name in TEAM_FIELDS if name != "metadata"}
        changes = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if old is None or changes:
            action: Action = "update" if old else "create"
            found.append(KeyChange(action, f"team {team['team_alias']}", token, changes if old else {}))
    gone = (row for token, row in known.items() if token not in wanted)
    return [*found, *(KeyChange("revoke", f"team {row.get('team_alias')}", str(row["team_id"])) for row in gone)]


def _present(want: KeySpec, key: StoredKey, value: str, now: datetime, adopted: Collection[str]) -> KeyChange:
    is_lost = hash_of(value) != key.token
    is_ours = key.is_managed or not is_lost
    if not is_ours and want.name not in adopted:
        return KeyChange("taken", want.name, key.token, wanted=want)
    if want.value and is_lost:
        return KeyChange("replace", want.name, key.token, wanted=want)
    changes = _differences(want, key, now)
    action: Action = "adopt" if not is_ours else "update" if changes else "keep"
    return KeyChange(action, want.name, key.token, changes, want, is_lost)


def _differences(want: KeySpec, key: StoredKey, now: datetime) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (key.settings.get(name), value) for name, value in want.settings.items()}
    found = {name: pair for name, pair in pairs.items() if _comparable(pair[0]) != _comparable(pair[1])}
    if key.name != want.name:
        found["key_alias"] = (key.name, want.name)
    if not _is_same_moment(key.expires, want.expires, now):
        found["expires"] = (key.expires, want.expires)
    return found


def _comparable(value: Any) -> Any:
    """The value without the order of lists, and with empty as absent."""
    if isinstance(value, list | tuple):
        return sorted(value) or None
    return value or None if isinstance(value, Mapping) else value


def _is_same_moment(one: datetime | None, other: datetime | None, now: datetime) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) < TOLERANCE or max(one, other) <= now


def _is_over(key: StoredKey, now: datetime) -> bool:
    """Whether a key that the inventory does not name is to be revoked; a replaced one may have some time left."""
    if key.replaced_by:
        return key.retires is None or key.retires <= now
    return key.is_managed


# --- in LiteLLM's terms ----------------------------------------------------------------------------------------------


def body_of(want: KeySpec, now: datetime, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The body of a request to LiteLLM that sets a key's fields: all of them, or those with these names."""
    body = {"key_alias": want.name, **want.settings, "duration": duration_of(want.expires, now)}
    chosen = body if names is None else {"duration" if name == "expires" else name for name in names}
    return {name: value for name, value in body.items() if name in chosen}


def duration_of(expires: datetime | None, now: datetime) -> str | None:
    """The time until then, as LiteLLM reads it; None for no expiry, one second for the past."""
    return None if expires is None else f"{max(1, round((expires - now).total_seconds()))}s"


def words_of(change: KeyChange) -> Iterator[str]:
    """What changes, for people: `rpm_limit 35 → 60`."""
    for name, (old, new) in change.changes.items():
        yield f"{name} {_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "all"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
