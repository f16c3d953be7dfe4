"""`keys`: make LiteLLM's keys agree with the inventory; create, revoke and rotate keys by hand.

A new key is written to its file before LiteLLM gets it, so a run that is killed loses nothing: the next one finds the
file and gives LiteLLM the same key.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from corral.build import Plan
from corral.checks.references import OWN_PREFIX
from corral.config.inventory import Consumer, ConsumerName
from corral.config.messages import problems_of
from corral.errors import CorralError, DriftError, UsageError, did_you_mean
from corral.gateway.keys import (
    MANAGED,
    KeyChange,
    KeySpec,
    StoredKey,
    body_of,
    compare,
    compare_teams,
    duration_of,
    hash_of,
    wanted_keys,
    wanted_of,
    wanted_teams,
)
from corral.plan.routing import pools_behind
from corral.render.secrets import ENV_FILE, read_env
from corral.runtime.lock import alone
from corral.verbs.keys.files import KeyFiles
from corral.verbs.keys.gateway import USAGE, GatewayKeys, connected

FOLDER = "keys"
LOCK = ".keys.lock"
# Days of which `keys spend` shows requests and tokens.
USAGE_DAYS = 30


@dataclass(frozen=True, slots=True)
class Keyring:
    """The gateway's keys, the files here, and what the inventory says."""

    plan: Plan
    gateway: GatewayKeys
    files: KeyFiles
    now: datetime
    # Keys of the site's own programs.
    own: tuple[KeySpec, ...] = ()

    def wanted(self) -> list[KeySpec]:
        """The keys that there should be."""
        return wanted_keys(self.plan.inventory, self.own)


@contextmanager
def opened(plan: Plan, out: Path) -> Iterator[Keyring]:
    """The keys of a site, locked for this run."""
    folder = out / plan.inventory.gateway.host
    with connected(plan, out) as gateway, alone(out / LOCK, "corral keys"):
        own = tuple(_own_keys(plan, folder / ENV_FILE))
        yield Keyring(plan, gateway, KeyFiles(folder / FOLDER), datetime.now(UTC), own)


def _own_keys(plan: Plan, path: Path) -> Iterator[KeySpec]:
    """The keys of the site's own programs, from the secrets of the gateway's host."""
    values = read_env(path)
    for key in plan.contributions.own_keys:
        if not values.get(key.secret):
            raise CorralError(f"{path} has no {key.secret}; run: ./generate.py secrets init")
        yield KeySpec(key.name, key.settings, value=values[key.secret], secret=key.secret)


# --- sync ------------------------------------------------------------------------------------------------------------


def needs_sync(plan: Plan) -> bool:
    """Whether the inventory says anything about keys."""
    return plan.inventory.gateway.database and bool(plan.inventory.consumers or plan.contributions.own_keys)


def sync(plan: Plan, out: Path, *, dry_run: bool = False, adopted: Collection[str] = ()) -> list[KeyChange]:
    """Makes LiteLLM agree with the inventory; returns an item for every key, also for those that stay.

    Args:
        plan: what the inventory says.
        out: the folder of renderings; keys are in `<gateway's host>/keys`.
        dry_run: change nothing.
        adopted: consumers whose names belong to keys made by hand, which are to be taken over.
    """
    for name in adopted:
        if name not in plan.inventory.consumers:
            raise UsageError(f'no consumer named "{name}"; {did_you_mean(name, plan.inventory.consumers)}')
    with opened(plan, out) as keyring:
        if not dry_run:
            _settle_rotations(keyring)
        teams = compare_teams(wanted_teams(plan.inventory), keyring.gateway.teams())
        found = compare(keyring.wanted(), keyring.gateway.all(), keyring.files.values(), keyring.now, adopted)
        if not dry_run:
            _carry_out_all(keyring, teams, found)
    return [*teams, *found]


def _carry_out_all(keyring: Keyring, teams: Sequence[KeyChange], found: Sequence[KeyChange]) -> None:
    """Keys enter teams that exist, and have left those that end."""
    wanted = wanted_teams(keyring.plan.inventory)
    for change in teams:
        if change.action != "revoke":
            keyring.gateway.set_team(change.token, wanted[change.token], is_new=change.action == "create")
    for change in found:
        if change.is_change:
            _carry_out(keyring, change)
    for change in teams:
        if change.action == "revoke":
            keyring.gateway.delete_team(change.token)


def _carry_out(keyring: Keyring, change: KeyChange) -> None:
    want = change.wanted
    if change.action in {"revoke", "replace"}:
        keyring.gateway.delete(change.token)
    if want is None:
        if hash_of(keyring.files.values().get(change.name, "")) == change.token:
            keyring.files.path(change.name).unlink()
    elif change.action in {"create", "replace"}:
        _create(keyring, want)
    else:
        keyring.gateway.update(change.token, body_of(want, keyring.now, change.changes))


def _create(keyring: Keyring, want: KeySpec) -> None:
    """Makes a key: with the value that is known already, else with a new one, which is written to its file first."""
    value = want.value or keyring.files.values().get(want.name) or _new_value()
    if not want.value:
        keyring.files.write(keyring.files.path(want.name), value)
    keyring.gateway.create(value, body_of(want, keyring.now))


def _new_value() -> str:
    """A random key of 256 bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def conclude(changes: Sequence[KeyChange], *, dry_run: bool) -> None:
    """Raises CorralError for names that are taken, DriftError when a dry run found something to do."""
    if taken := [change.name for change in changes if change.action == "taken"]:
        raise CorralError(
            f"taken by keys made by hand: {', '.join(taken)}; ./generate.py keys sync --adopt NAME takes one over with "
            "the inventory's settings, keys revoke NAME ends it"
        )
    count = sum(change.is_change for change in changes)
    if dry_run and count:
        raise DriftError(f"{count} keys differ from the inventory; ./generate.py keys sync makes them agree")


# --- by hand ---------------------------------------------------------------------------------------------------------


def create(plan: Plan, out: Path, name: str, consumer: Consumer) -> Path:
    """Makes a key that is not in the inventory; returns its file.

    Raises:
        UsageError: the name is a consumer of the inventory, or a pool does not exist.
        CorralError: LiteLLM has another key of that name.
    """
    if name in plan.inventory.consumers:
        raise UsageError(f"{name} is a consumer of the inventory; ./generate.py keys sync makes its key")
    for pool in consumer.pools or ():
        if not pools_behind(plan.inventory, pool):
            raise UsageError(f'no pool named "{pool}"; {did_you_mean(pool, plan.inventory.pools)}')
    with opened(plan, out) as keyring:
        tokens = [key.token for key in keyring.gateway.all() if key.name == name]
        if not tokens:
            _create(keyring, wanted_of(plan.inventory, name, consumer, is_managed=False))
        elif hash_of(keyring.files.values().get(name, "")) not in tokens:
            raise CorralError(f"there is a key named {name}; choose another name, or keys revoke {name}")
        return keyring.files.path(name)


def revoke(plan: Plan, out: Path, names: Collection[str]) -> list[str]:
    """Revokes keys by name and removes their files; returns the names that the next `sync` would make again.

    While LiteLLM does not answer it raises CorralError, and the fast lane refuses the keys nevertheless.
    """
    with opened(plan, out) as keyring:
        try:
            found = {key.name: key for key in keyring.gateway.all() if key.name}
        except CorralError:
            values = keyring.files.values()
            for name in set(names) & set(values):
                keyring.gateway.forget(hash_of(values[name]))
            raise
        for name in names:
            if name not in found:
                raise UsageError(f'no key named "{name}"; {did_you_mean(name, found)}; nothing was revoked')
        for name in names:
            keyring.gateway.delete(found[name].token)
            keyring.files.path(name).unlink(missing_ok=True)
    return [name for name in names if name in plan.inventory.consumers]


def checked_consumer(name: str, given: Mapping[str, Any]) -> Consumer:
    """A consumer from options of the command line; raises UsageError with the inventory's message for what is wrong."""
    data = {key: value for key, value in given.items() if value}
    try:
        TypeAdapter(dict[ConsumerName, Consumer]).validate_python({name: data})
    except ValidationError as error:
        problems = problems_of(error)
        raise UsageError("; ".join(f"{problem.message} ({problem.remedy})" for problem in problems)) from None
    if name.lower().startswith(OWN_PREFIX):
        raise UsageError(f"names with {OWN_PREFIX}… are the kit's own; choose another")
    return Consumer.model_validate(data)


# --- rotation: the old key gives up its name, the new one is made, the file is replaced, the old key is revoked ------


def rotate(plan: Plan, out: Path, name: str, *, keep: timedelta = timedelta(0)) -> Path:
    """Replaces a key by a new one with its settings and spending; returns its file.

    The old one is revoked at the end, or stays valid for `keep`. LiteLLM's own `regenerate` needs its paid licence.
    """
    with opened(plan, out) as keyring:
        value = keyring.files.begun().get(name) or _begin_rotation(keyring, name)
        _finish_rotation(keyring, name, value, keep)
        return keyring.files.path(name)


def _begin_rotation(keyring: Keyring, name: str) -> str:
    known = [key.name for key in keyring.gateway.all() if key.name and not key.replaced_by]
    if name not in known:
        raise UsageError(f'no key named "{name}"; {did_you_mean(name, known)}')
    for own in keyring.own:
        if own.name == name:
            raise UsageError(f"{name} is made from {own.secret}: remove its line from .env, then secrets init")
    value = _new_value()
    keyring.files.write(keyring.files.next_path(name), value)
    return value


def _settle_rotations(keyring: Keyring) -> None:
    """Ends rotations that were interrupted; drops those that never reached LiteLLM."""
    for name, value in keyring.files.begun().items():
        token = hash_of(value)
        if any(token in {key.token, key.replaced_by} for key in keyring.gateway.all()):
            _finish_rotation(keyring, name, value, timedelta(0))
        else:
            keyring.files.next_path(name).unlink()


def _finish_rotation(keyring: Keyring, name: str, value: str, keep: timedelta) -> None:
    """Continues a rotation from wherever it stopped."""
    token, gateway = hash_of(value), keyring.gateway
    keys = gateway.all()
    current = next((key for key in keys if key.name == name), None)
    old = next((key for key in keys if key.replaced_by == token), None)
    if current is not None and current.token != token:
        old, current = _step_aside(keyring, current, token, keep), None
    if current is None:
        want = _successor(keyring, name, old)
        gateway.create(value, body_of(want, keyring.now) | {"spend": old.spend if old else 0.0})
    keyring.files.finish(name)
    if old is not None and (old.retires is None or old.retires <= keyring.now):
        gateway.delete(old.token)


def _step_aside(keyring: Keyring, key: StoredKey, successor: str, keep: timedelta) -> StoredKey:
    """Renames a key, as names are unique and its successor gets this one; it stays valid for `keep`."""
    retires = keyring.now + keep
    metadata = key.metadata | {"replaced_by": successor, "retires": retires.isoformat()}
    body: dict[str, Any] = {"key_alias": f"{key.name}.old-{key.token[:8]}", "metadata": metadata}
    if keep and (key.expires is None or retires < key.expires):
        body["duration"] = duration_of(retires, keyring.now)
    keyring.gateway.update(key.token, body)
    return replace(key, name=body["key_alias"], settings={**key.settings, "metadata": metadata})


def _successor(keyring: Keyring, name: str, old: StoredKey | None) -> KeySpec:
    """The new key of a rotation: as the inventory says, else like the old one."""
    for want in keyring.wanted():
        if want.name == name:
            return want
    if old is None:
        raise CorralError(f"{name}: the key to replace is gone; remove {keyring.files.next_path(name)}")
    notes = {"replaced_by", "retires", *MANAGED}
    metadata = {key: value for key, value in old.metadata.items() if key not in notes}
    return KeySpec(name, {**old.settings, "metadata": metadata}, old.expires)


# --- what there is ---------------------------------------------------------------------------------------------------


def listed(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Every key that LiteLLM has, by name, as data for programs."""
    with opened(plan, out) as keyring:
        files = {hash_of(value): str(keyring.files.path(name)) for name, value in keyring.files.values().items()}
        keys = sorted(keyring.gateway.all(), key=lambda key: (key.name.lower(), key.token))
        return [_as_data(key, _state(key, keyring.now), files.get(key.token)) for key in keys]


def spending(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """What every key has spent, and its requests and tokens of the last USAGE_DAYS days; the highest spending first."""
    with opened(plan, out) as keyring:
        today = keyring.now.date()
        usage = keyring.gateway.usage(today - timedelta(days=USAGE_DAYS - 1), today)
        rows = [_as_data(key, _state(key, keyring.now), None) for key in keyring.gateway.all()]
        found = [row | {"usage_30d": usage.get(row["token"], dict.fromkeys(USAGE, 0))} for row in rows]
        found += [_team_as_data(row) for row in keyring.gateway.teams()]
        return sorted(found, key=lambda row: (-row["spend_usd"], row["name"].lower()))


def _team_as_data(row: Mapping[str, Any]) -> dict[str, Any]:
    """The spending of a team in the shape of a key's; its requests are those of its keys."""
    limits = {"max_usd": "max_budget", "period": "budget_duration", "resets": "budget_reset_at"}
    return {
        "name": f"team {row.get('team_alias') or row['team_id']}",
        "spend_usd": float(row.get("spend") or 0),
        "budget": {name: row.get(field) for name, field in limits.items()},
        "usage_30d": dict.fromkeys(USAGE, 0),
    }


def _as_data(key: StoredKey, state: str, file: str | None) -> dict[str, Any]:
    settings = key.settings
    return {
        "name": key.name, "key": key.hint, "token": key.token, "state": state, "managed": key.is_managed,
        "pools": settings["models"] or [],
        "limits": {
            "rpm": settings["rpm_limit"], "tpm": settings["tpm_limit"], "parallel": settings["max_parallel_requests"],
        },
        "spend_usd": key.spend,
        "budget": {
            "max_usd": settings["max_budget"], "period": settings["budget_duration"],
            "resets": key.resets.isoformat() if key.resets else None,
        },
        "expires": key.expires.isoformat() if key.expires else None,
        "metadata": key.metadata, "file": file,
    }  # fmt: skip


def _state(key: StoredKey, now: datetime) -> str:
    budget = key.settings["max_budget"]
    if key.is_blocked:
        return "blocked"
    if key.expires is not None and key.expires <= now:
        return "expired"
    if budget is not None and key.spend >= budget:
        return "over budget"
    return "replaced" if key.replaced_by else "active"
