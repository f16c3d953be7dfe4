"""`keys`: consumers' keys in LiteLLM, and in files here that only their owner reads.

A new key is written to its file before LiteLLM hears of it, so a run that is killed loses nothing: the next one finds
the file and tells LiteLLM the same key.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from corral.build import Plan
from corral.checks.references import OWN_PREFIX
from corral.components.litellm import METRICS_KEY
from corral.config.client_names import all_aliases
from corral.config.inventory import Consumer, ConsumerName
from corral.config.messages import problems_of
from corral.errors import CorralError, DriftError, UsageError, did_you_mean
from corral.files import write_atomically
from corral.gateway.keys import (
    MANAGED,
    NO_MODELS,
    Found,
    Step,
    Wanted,
    body_of,
    compare,
    duration_of,
    hash_of,
    wanted_keys,
    wanted_of,
    words_of,
)
from corral.plan.routing import pools_behind
from corral.render.secrets import ENV_FILE, read_env
from corral.runtime.lock import alone
from corral.verbs.keys.gateway import GatewayKeys, connected

FOLDER = "keys"
LOCK = ".keys.lock"
NEXT = ".next"


class KeyFiles:
    """The folder with one file for each key, mode 0600 in a folder 0700; a file holds the key and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The file of a key."""
        return self.folder / name

    def values(self) -> dict[str, str]:
        """The keys by name."""
        return {path.name: _read(path) for path in self._files() if not path.name.startswith(".")}

    def begun(self) -> dict[str, str]:
        """New keys of rotations that have not ended, by name."""
        names = [path for path in self._files() if path.name.startswith(".") and path.name.endswith(NEXT)]
        return {path.name[1:].removesuffix(NEXT): _read(path) for path in names}

    def write(self, name: str, value: str) -> None:
        """Keeps a key; it is on the disk when this returns."""
        self._write(self.path(name), value)

    def begin(self, name: str, value: str) -> None:
        """Keeps a rotation's new key beside the old one."""
        self._write(self.folder / f".{name}{NEXT}", value)

    def finish(self, name: str) -> None:
        """Puts a rotation's new key in the place of the old one."""
        (self.folder / f".{name}{NEXT}").replace(self.path(name))
        self._settle()

    def remove(self, name: str) -> None:
        """Forgets a key."""
        self.path(name).unlink(missing_ok=True)

    def forget_begun(self, name: str) -> None:
        """Forgets a rotation's new key."""
        (self.folder / f".{name}{NEXT}").unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        if self.folder.is_symlink():
            raise CorralError(f"{self.folder}: a symbolic link stands where keys are kept; move it away")
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _write(self, path: Path, value: str) -> None:
        self._files()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            write_atomically(path, value.encode(), 0o600)
            self._settle()
        except OSError as error:
            raise CorralError(f"{path}: cannot be written: {error.strerror}; no key was made") from None

    def _settle(self) -> None:
        """Waits until the folder's names are on the disk."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise CorralError(f"{path}: cannot be read as a key; remove it") from None


def new_value() -> str:
    """A random key of 256 bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


@dataclass(frozen=True, slots=True)
class Keyring:
    """The gateway's keys, the files here, and what the inventory says."""

    plan: Plan
    gateway: GatewayKeys
    files: KeyFiles
    now: datetime
    metrics_key: str = ""

    def wanted(self) -> list[Wanted]:
        """The keys that there should be."""
        return wanted_keys(self.plan.inventory, self.metrics_key)

    def find(self, name: str) -> Found | None:
        """LiteLLM's key of this name."""
        return next((key for key in self.gateway.all() if key.name == name), None)


@contextmanager
def opened(plan: Plan, out: Path) -> Iterator[Keyring]:
    """The keys of a site, for one run at a time."""
    folder = out / plan.inventory.gateway.host
    with connected(plan, out) as gateway, alone(out / LOCK, "corral keys"):
        known = read_env(folder / ENV_FILE)
        is_scraped = any(target.secret == METRICS_KEY for target in plan.contributions.targets)
        if is_scraped and not known.get(METRICS_KEY):
            raise CorralError(f"{folder / ENV_FILE} has no {METRICS_KEY}; run: ./generate.py secrets init")
        metrics_key = known[METRICS_KEY] if is_scraped else ""
        yield Keyring(plan, gateway, KeyFiles(folder / FOLDER), datetime.now(UTC), metrics_key)


# --- sync ------------------------------------------------------------------------------------------------------------


def needs_sync(plan: Plan) -> bool:
    """Whether the inventory says anything about keys."""
    is_scraped = any(target.secret == METRICS_KEY for target in plan.contributions.targets)
    return plan.inventory.gateway.database and bool(plan.inventory.consumers or is_scraped)


def sync(plan: Plan, out: Path, *, dry_run: bool = False, adopted: Collection[str] = ()) -> list[Step]:
    """Makes LiteLLM agree with the inventory; returns every step, also those with nothing to do.

    Args:
        plan: what the inventory says.
        out: the folder of renderings; keys lie in `<gateway's host>/keys`.
        dry_run: only find out.
        adopted: consumers whose names are taken by keys made by hand, to be taken over.
    """
    for name in adopted:
        if name not in plan.inventory.consumers:
            raise UsageError(f'no consumer named "{name}"; {did_you_mean(name, plan.inventory.consumers)}')
    with opened(plan, out) as keyring:
        if not dry_run:
            _settle_rotations(keyring)
        steps = compare(keyring.wanted(), keyring.gateway.all(), keyring.files.values(), keyring.now, adopted)
        for step in steps:
            if step.is_change and not dry_run:
                _carry_out(keyring, step)
    return steps


def _carry_out(keyring: Keyring, step: Step) -> None:
    gateway, files = keyring.gateway, keyring.files
    if step.action == "revoke" or step.wanted is None:
        gateway.delete([step.token])
        if hash_of(files.values().get(step.name, "")) == step.token:
            files.remove(step.name)
        return
    if step.action == "replace":
        gateway.delete([step.token])
    if step.action in {"create", "replace"}:
        _create(keyring, step.wanted)
    else:
        gateway.update(step.token, body_of(step.wanted, keyring.now, step.changes))


def _create(keyring: Keyring, want: Wanted, **more: Any) -> None:
    """Makes a key: with the value that is known already, or a new one that is on the disk first."""
    value = want.value or keyring.files.values().get(want.name) or new_value()
    if not want.value:
        keyring.files.write(want.name, value)
    keyring.gateway.create(value, body_of(want, keyring.now) | more)


# --- by hand ---------------------------------------------------------------------------------------------------------


def create(plan: Plan, out: Path, name: str, consumer: Consumer) -> Path:
    """Makes a key that the inventory does not know; returns the file that it is in.

    Raises:
        UsageError: the name is a consumer of the inventory, or a pool does not exist.
        CorralError: LiteLLM has a key of that name, and not this one.
    """
    if name in plan.inventory.consumers:
        raise UsageError(f"{name} is a consumer of the inventory; ./generate.py keys sync makes its key")
    for pool in consumer.pools or ():
        if not pools_behind(plan.inventory, pool):
            raise UsageError(f'no pool named "{pool}"; {did_you_mean(pool, plan.inventory.pools)}')
    with opened(plan, out) as keyring:
        found = keyring.find(name)
        if found is not None and found.token != hash_of(keyring.files.values().get(name, "")):
            raise CorralError(f"there is a key named {name}; choose another name, or keys revoke {name}")
        if found is None:
            _create(keyring, wanted_of(plan.inventory, name, consumer, is_managed=False))
        return keyring.files.path(name)


def revoke(plan: Plan, out: Path, names: Iterable[str]) -> list[str]:
    """Revokes keys by name and forgets their files; returns the names that the next `sync` would make again."""
    with opened(plan, out) as keyring:
        found = {key.name: key for key in keyring.gateway.all() if key.name}
        wanted = list(names)
        for name in wanted:
            if name not in found:
                raise UsageError(f'no key named "{name}"; {did_you_mean(name, found)}; nothing was revoked')
        for name in wanted:
            keyring.gateway.delete([found[name].token])
            keyring.files.remove(name)
    return [name for name in wanted if name in plan.inventory.consumers]


def rotate(plan: Plan, out: Path, name: str, *, keep: timedelta = timedelta(0)) -> Path:
    """Puts a new key in the place of one, with its settings and spending; returns the file that it is in.

    The old one is revoked at the end, or lives on for `keep`. LiteLLM's own `regenerate` needs its paid licence.
    """
    with opened(plan, out) as keyring:
        value = keyring.files.begun().get(name, "")
        if not value:
            known = [key.name for key in keyring.gateway.all() if key.name and not key.replaced_by]
            if name not in known:
                raise UsageError(f'no key named "{name}"; {did_you_mean(name, known)}')
            if name in {want.name for want in keyring.wanted() if want.value}:
                raise UsageError(f"{name} is made from {METRICS_KEY}: remove its line from .env, then secrets init")
            value = new_value()
            keyring.files.begin(name, value)
        _finish_rotation(keyring, name, value, keep)
        return keyring.files.path(name)


def _settle_rotations(keyring: Keyring) -> None:
    """Ends rotations that were interrupted; one that LiteLLM has not heard of is forgotten."""
    for name, value in keyring.files.begun().items():
        token = hash_of(value)
        if any(token in {key.token, key.replaced_by} for key in keyring.gateway.all()):
            _finish_rotation(keyring, name, value, timedelta(0))
        else:
            keyring.files.forget_begun(name)


def _finish_rotation(keyring: Keyring, name: str, value: str, keep: timedelta) -> None:
    """Ends a rotation from wherever it stopped: old key out of the way, new one made, file swapped, old one revoked."""
    token, gateway = hash_of(value), keyring.gateway
    listed = gateway.all()
    current = next((key for key in listed if key.name == name), None)
    old = next((key for key in listed if key.replaced_by == token), None)
    if current is not None and current.token != token:
        old = _step_aside(keyring, current, token, keep)
        current = None
    if current is None:
        want = _as_before(keyring, name, old)
        gateway.create(value, body_of(want, keyring.now) | {"spend": old.spend if old else 0.0})
    keyring.files.finish(name)
    if old is not None and (old.retires is None or old.retires <= keyring.now):
        gateway.delete([old.token])


def _step_aside(keyring: Keyring, key: Found, successor: str, keep: timedelta) -> Found:
    """Renames a key so that its successor can have the name; it goes on being valid for now."""
    retires = keyring.now + keep
    metadata = {**(key.settings.get("metadata") or {}), "replaced_by": successor, "retires": retires.isoformat()}
    body: dict[str, Any] = {"key_alias": f"{key.name}.old-{key.token[:8]}", "metadata": metadata}
    if keep and (key.expires is None or retires < key.expires):
        body["duration"] = duration_of(retires, keyring.now)
    keyring.gateway.update(key.token, body)
    return replace(key, name=body["key_alias"], settings={**key.settings, "metadata": metadata})


def _as_before(keyring: Keyring, name: str, old: Found | None) -> Wanted:
    """What the new key of a rotation is like: as the inventory says, else as the old one was."""
    for want in keyring.wanted():
        if want.name == name:
            return want
    if old is None:
        raise CorralError(f"{name}: the key to replace is gone; remove {keyring.files.folder}/.{name}{NEXT}")
    metadata = {
        key: value for key, value in old.settings["metadata"].items() if key not in {"replaced_by", "retires", *MANAGED}
    }
    return Wanted(name, {**old.settings, "metadata": metadata}, old.expires)


@dataclass(frozen=True, slots=True)
class Listed:
    """A key and where it is known."""

    key: Found
    state: str
    file: Path | None

    def data(self) -> Mapping[str, Any]:
        """For programs."""
        key, settings = self.key, self.key.settings
        return {
            "name": key.name, "key": key.hint, "token": key.token, "state": self.state, "managed": key.is_managed,
            "pools": settings["models"] or [],
            "limits": {
                "rpm": settings["rpm_limit"], "tpm": settings["tpm_limit"],
                "parallel": settings["max_parallel_requests"],
            },
            "spend_usd": key.spend,
            "budget": {"max_usd": settings["max_budget"], "period": settings["budget_duration"],
                       "resets": key.resets.isoformat() if key.resets else None},
            "expires": key.expires.isoformat() if key.expires else None,
            "metadata": settings["metadata"] or {},
            "file": str(self.file) if self.file else None,
        }  # fmt: skip


def listed(plan: Plan, out: Path) -> list[Listed]:
    """Every key that LiteLLM has, by name."""
    with opened(plan, out) as keyring:
        values = keyring.files.values()
        found = sorted(keyring.gateway.all(), key=lambda key: (key.name.lower(), key.token))
        return [
            Listed(
                key,
                _state(key, keyring.now),
                keyring.files.path(key.name) if hash_of(values.get(key.name, "")) == key.token else None,
            )
            for key in found
        ]


def _state(key: Found, now: datetime) -> str:
    if key.is_blocked:
        return "blocked"
    if key.is_expired(now):
        return "expired"
    budget = key.settings.get("max_budget")
    if budget is not None and key.spend >= budget:
        return "over budget"
    return "replaced" if key.replaced_by else "active"


def by_spend(found: Iterable[Listed]) -> list[Listed]:
    """The same keys, those that have spent most first."""
    return sorted(found, key=lambda item: (-item.key.spend, item.key.name.lower()))


def checked_consumer(name: str, given: Mapping[str, Any]) -> Consumer:
    """A consumer from the words of the command line; UsageError with the inventory's words for what is wrong."""
    kept = {key: _without_none(value) for key, value in given.items()}
    data = {key: value for key, value in kept.items() if value}
    try:
        TypeAdapter(dict[ConsumerName, Consumer]).validate_python({name: data})
    except ValidationError as error:
        problems = problems_of(error)
        raise UsageError("; ".join(f"{problem.message} ({problem.remedy})" for problem in problems)) from None
    if name.lower().startswith(OWN_PREFIX):
        raise UsageError(f"names with {OWN_PREFIX}… are the kit's own; choose another")
    return Consumer.model_validate(data)


def _without_none(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else value


# --- what people and programs see ------------------------------------------------------------------------------------

STYLES = {
    "create": "green",
    "update": "yellow",
    "adopt": "yellow",
    "replace": "yellow",
    "revoke": "red",
    "taken": "red",
}


def steps_as_data(plan: Plan, out: Path, steps: Iterable[Step]) -> list[dict[str, Any]]:
    """For programs: what is or would be done about each key."""
    return [
        {
            "action": step.action,
            "name": step.name,
            "changes": {
                name: {"from": _jsonable(old), "to": _jsonable(new)} for name, (old, new) in step.changes.items()
            },
            "file": _file_of(plan, out, step),
        }
        for step in steps
    ]


def _jsonable(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _file_of(plan: Plan, out: Path, step: Step) -> str | None:
    is_in_file = step.wanted is not None and not step.wanted.value and not step.is_lost
    is_there = step.action not in {"revoke", "expired", "taken"}
    return str(out / plan.inventory.gateway.host / FOLDER / step.name) if is_in_file and is_there else None


def show_steps(plan: Plan, out: Path, steps: Sequence[Step], console: Console, talk: Console) -> None:
    """For people: a line for every key that changes or needs attention, and a last one with what is well."""
    for step in steps:
        words = "; ".join(words_of(step))
        if step.action == "create":
            words = _file_of(plan, out, step) or f"from {METRICS_KEY}"
        if step.action != "keep":
            console.print(
                Text.assemble((f"{step.action:>8}", STYLES.get(step.action, "dim")), f"  {step.name}  {words}")
            )
    for step in steps:
        if step.is_lost and step.action in {"keep", "update", "adopt"}:
            hint = "whoever has it goes on; keys rotate makes a new one"
            talk.print(Text(f"{step.name}: its key is not in the files here ({hint})", style="yellow"))
    kept = sum(step.action == "keep" for step in steps)
    if kept == len(steps):
        talk.print(f"nothing to do: {kept} keys are as in the inventory" if kept else "the inventory has no consumers")


def conclude(steps: Sequence[Step], *, dry_run: bool) -> None:
    """Raises CorralError for names that are taken, DriftError when a dry run found something to do."""
    if taken := [step.name for step in steps if step.action == "taken"]:
        raise CorralError(
            f"taken by keys made by hand: {', '.join(taken)}; ./generate.py keys sync --adopt NAME takes one over with "
            "the inventory's settings, keys revoke NAME ends it"
        )
    changes = sum(step.is_change for step in steps)
    if dry_run and changes:
        raise DriftError(f"{changes} keys differ from the inventory; ./generate.py keys sync makes them agree")


def show_keys(plan: Plan, found: Sequence[Listed], console: Console) -> None:
    """A table of all keys; aliases are left out, as a key for a pool is a key for its aliases."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("key", "by", "opens", "per minute", "at once", "USD", "of", "until", "state"):
        table.add_column(column, justify="right" if column in {"at once", "USD", "of"} else "left", overflow="fold")
    for item in found:
        key, settings = item.key, item.key.settings
        limits = [(settings["rpm_limit"], "req"), (settings["tpm_limit"], "tok")]
        counted = "\n".join(f"{number} {what}" for number, what in limits if number)
        budget = "" if settings["max_budget"] is None else f"{settings['max_budget']:g}"
        table.add_row(
            escape(key.name or key.hint), "sync" if key.is_managed else "hand", _opens(plan, key), counted,
            str(settings["max_parallel_requests"] or ""), f"{key.spend:.4f}", budget,
            f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "", item.state,
        )  # fmt: skip
    console.print(table)


def _opens(plan: Plan, key: Found) -> str:
    aliases = all_aliases(plan.inventory)
    models = [name for name in key.settings["models"] or [] if name not in aliases]
    return "figures" if models == [NO_MODELS] else "\n".join(map(escape, models)) or "all pools"


def show_spend(found: Sequence[Listed], console: Console) -> None:
    """A table of what keys have spent."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("key", "spent, USD", "budget, USD", "counts anew"):
        table.add_column(column, justify="right" if "USD" in column else "left")
    for item in found:
        budget = item.key.settings["max_budget"]
        resets = f"{item.key.resets:%Y-%m-%d %H:%M} UTC" if item.key.resets else ""
        limit = "" if budget is None else f"{budget:g}"
        table.add_row(escape(item.key.name or item.key.hint), f"{item.key.spend:.6f}", limit, resets)
    table.add_section()
    table.add_row("total", f"{sum(item.key.spend for item in found):.6f}", "", "")
    console.print(table)
