"""What makes LiteLLM agree with the inventory, without LiteLLM; tests/processes/test_keys.py has the real one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from corral.config.client_names import EDITOR_NAMES, aliases_of
from corral.config.inventory import Consumer, Inventory
from corral.errors import CorralError, UsageError
from corral.gateway.keys import (
    MANAGED,
    METRICS_NAME,
    NO_MODELS,
    KeyChange,
    KeySpec,
    StoredKey,
    body_of,
    compare,
    hash_of,
    metrics_settings,
    moment,
    stored_key,
    wanted_keys,
    wanted_of,
    words_of,
)
from corral.gateway.routes import CONSUMER_ROUTES
from corral.verbs.keys.files import KeyFiles
from corral.verbs.keys.gateway import GatewayKeys
from corral.verbs.keys.keys import Keyring, _finish_rotation, checked_consumer

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
VALUE = "sk-a-value-that-is-in-the-file"


def inventory_with(**more: Any) -> Inventory:
    text = {
        "schema_version": 1, "name": "farm", "hosts": {"box": {}},
        "models": {"m": {"source": "m.gguf", "kind": "chat"}, "e": {"source": "e.gguf", "kind": "embedding"}},
        "pools": {
            "chat": {"model": "m", "on": {"host": "box"}, "aliases": ["GPT-Big", "owner/model:8b"]},
            "embed": {"model": "e", "on": {"host": "box"}},
        },
        "gateway": {"host": "box"}, **more,
    }  # fmt: skip
    return Inventory.model_validate(text)


def consumer(**settings: Any) -> Consumer:
    return Consumer.model_validate(settings)


def metrics_spec(value: str) -> KeySpec:
    """Prometheus' own key."""
    return KeySpec(METRICS_NAME, metrics_settings(), value=value, secret="LITELLM_METRICS_KEY")


def made(want: KeySpec, value: str = VALUE, **changes: Any) -> StoredKey:
    """A key as LiteLLM lists it after it was made as wanted."""
    row = {"token": hash_of(value), "key_alias": want.name, **want.settings}
    row |= {"expires": want.expires.isoformat() if want.expires else None}
    return stored_key(row | changes)


def actions(steps: list[KeyChange]) -> dict[str, str]:
    return {step.name: step.action for step in steps}


WANT = wanted_of(
    inventory_with(),
    "VISTA",
    consumer(
        pools=["chat"],
        limits={"rpm": 35, "parallel": 2},
        budget={"max_usd": 5, "period": "30d"},
        expires="2027-01-31",
        metadata={"team": "vets"},
    ),
)


# --- what there should be


def test_a_consumer_in_litellms_words() -> None:
    assert WANT.settings == {
        "models": ["chat", "GPT-Big", "owner/model:8b"],
        "rpm_limit": 35,
        "tpm_limit": None,
        "max_parallel_requests": 2,
        "max_budget": 5,
        "budget_duration": "30d",
        "allowed_routes": list(CONSUMER_ROUTES),
        "metadata": {"team": "vets", "managed_by": "corral"},
        "team_id": None,
    }
    assert WANT.expires == datetime(2027, 1, 31, tzinfo=UTC)
    assert body_of(WANT, NOW)["duration"] == f"{(WANT.expires - NOW).days * 86400 + 12 * 3600}s"


def test_a_weight_goes_with_the_key_to_the_gateway() -> None:
    weighted = wanted_of(inventory_with(), "VISTA", consumer(weight=3, metadata={"team": "vets"}))
    assert weighted.settings["metadata"] == {"team": "vets", "corral_weight": 3, "managed_by": "corral"}
    assert "corral_weight" not in wanted_of(inventory_with(), "VISTA", consumer(weight=1)).settings["metadata"]


def test_prometheus_has_a_key_that_opens_no_model() -> None:
    (found,) = wanted_keys(inventory_with(), [metrics_spec("sk-metrics")])
    assert (found.name, found.value) == (METRICS_NAME, "sk-metrics")
    assert found.settings["models"] == [NO_MODELS]
    assert found.settings["allowed_routes"] == ["/metrics", "/metrics/"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T18:00:00Z", datetime(2027, 1, 31, 18, tzinfo=UTC)),
        ("2027-01-31T18:00:00+02:00", datetime(2027, 1, 31, 16, tzinfo=UTC)),
        (None, None),
        ("", None),
    ],
)
def test_moments(text: str | None, expected: datetime | None) -> None:
    assert moment(text) == expected


def test_names_of_editors_leave_other_pools_aliases_alone() -> None:
    inventory = inventory_with()
    pools = {name: pool.model_dump(exclude_unset=True) for name, pool in inventory.pools.items()}
    pools["chat"]["editor_names"] = True
    pools["embed"]["aliases"] = ["gpt-4"]
    found = aliases_of(inventory_with(pools=pools), "chat")
    assert found[:2] == ("GPT-Big", "owner/model:8b")
    assert set(found[2:]) == set(EDITOR_NAMES["chat"]) - {"gpt-4"}


def test_a_consumer_may_be_given_auto(tmp_path: Path) -> None:
    auto = {"tiers": [{"name": "simple", "pool": "chat"}], "aliases": ["clever"]}
    given = {
        "gateway": {"host": "box", "auto": auto},
        "consumers": {"VISTA": {"pools": ["auto"], "limits": {"rpm": 6}, "budget": {"max_usd": 1}}},
    }
    path = tmp_path / "inventory.yaml"
    path.write_text(yaml.safe_dump(inventory_with(**given).model_dump(mode="json", exclude_unset=True)))
    plan = build(path)
    assert [problem.rule for problem in plan.warnings if problem.rule == "budget-counts"] == ["budget-counts"]
    (want,) = wanted_keys(plan.inventory)
    assert want.settings["models"] == ["auto", "clever"]


# --- the difference


def test_what_is_as_wanted_is_kept_whatever_the_order_and_the_clock() -> None:
    changes: dict[str, Any] = {
        "models": ["owner/model:8b", "chat", "GPT-Big"],
        "expires": "2027-01-31T00:00:07+00:00",
        "metadata": {"managed_by": "corral", "team": "vets"},
    }
    (step,) = compare([WANT], [made(WANT, **changes)], {"VISTA": VALUE}, NOW)
    assert (step.action, dict(step.changes), step.is_lost) == ("keep", {}, False)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rpm_limit", None, "rpm_limit none → 35"),
        ("models", [], "models all → chat, GPT-Big, owner/model:8b"),
        ("max_budget", 4.5, "max_budget 4.5 → 5"),
        ("expires", None, "expires none → 2027-01-31 00:00"),
        ("expires", "2027-01-31T01:00:00Z", "expires 2027-01-31 01:00 → 2027-01-31 00:00"),
        ("key_alias", "renamed", "key_alias renamed → VISTA"),
        ("metadata", {**MANAGED}, "metadata managed_by: corral → team: vets, managed_by: corral"),
        ("allowed_routes", ["openai_routes"], f"allowed_routes openai_routes → {', '.join(CONSUMER_ROUTES)}"),
    ],
)
def test_what_differs_is_updated_and_nothing_else(field: str, value: Any, words: str) -> None:
    (step,) = compare([WANT], [made(WANT, **{field: value})], {"VISTA": VALUE}, NOW)
    assert step.action == "update"
    assert list(words_of(step)) == [words]
    sent = body_of(WANT, NOW, step.changes)
    assert set(sent) == {"duration" if field == "expires" else field}


def test_only_keys_of_ours_are_revoked() -> None:
    gone = made(KeySpec("gone", {"metadata": MANAGED}), "sk-gone")
    by_hand = made(KeySpec("by-hand", {"metadata": {"note": "mine"}}), "sk-by-hand")
    nameless = stored_key({"token": hash_of("sk-nameless"), "metadata": None})
    steps = compare([WANT], [gone, by_hand, nameless], {}, NOW)
    assert actions(steps) == {"VISTA": "create", "gone": "revoke"}
    assert steps[-1].token == hash_of("sk-gone")


def test_a_name_taken_by_hand_is_left_alone_until_adopted() -> None:
    other = made(WANT, "sk-other", metadata={})
    assert actions(compare([WANT], [other], {}, NOW)) == {"VISTA": "taken"}
    (step,) = compare([WANT], [other], {}, NOW, adopted=["VISTA"])
    assert (step.action, set(step.changes), step.is_lost) == ("adopt", {"metadata"}, True)


def test_a_key_that_should_have_expired_is_not_made() -> None:
    late = wanted_of(inventory_with(), "late", consumer(expires="2026-11-19"))
    assert actions(compare([late], [], {}, NOW)) == {"late": "expired"}
    there = made(late, expires="2026-11-18T00:00:00Z")
    assert actions(compare([late], [there], {"late": VALUE}, NOW)) == {"late": "keep"}
    (step,) = compare([late], [made(late, expires=None)], {"late": VALUE}, NOW)
    assert body_of(late, NOW, step.changes) == {"duration": "1s"}


def test_a_new_value_in_the_secret_store_replaces_the_key() -> None:
    (want,) = wanted_keys(inventory_with(), [metrics_spec("sk-metrics-new")])
    assert actions(compare([want], [made(want, "sk-metrics-old")], {}, NOW)) == {METRICS_NAME: "replace"}
    assert actions(compare([want], [made(want, "sk-metrics-new")], {}, NOW)) == {METRICS_NAME: "keep"}


def test_a_replaced_key_goes_when_its_time_is_over() -> None:
    successor = {"replaced_by": hash_of(VALUE), **MANAGED}
    old = made(WANT, "sk-old", key_alias="VISTA.old-1", metadata={**successor, "retires": "2026-11-20T13:00:00+00:00"})
    found = [made(WANT), old]
    files = {"VISTA": VALUE}
    assert actions(compare([WANT], found, files, NOW)) == {"VISTA": "keep"}
    assert actions(compare([WANT], found, files, NOW + timedelta(hours=2))) == {
        "VISTA": "keep", "VISTA.old-1": "revoke",
    }  # fmt: skip


# --- files


def test_files_are_the_owners_alone_and_hold_the_key_and_nothing_else(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path / "keys")
    assert files.values() == {}
    files.write(files.path("VISTA"), VALUE)
    files.write(files.next_path("VISTA"), "sk-next")
    assert files.values() == {"VISTA": VALUE}
    assert files.begun() == {"VISTA": "sk-next"}
    assert files.path("VISTA").read_bytes() == VALUE.encode()
    assert files.path("VISTA").stat().st_mode & 0o777 == 0o600
    assert files.folder.stat().st_mode & 0o777 == 0o700
    files.finish("VISTA")
    assert (files.values(), files.begun()) == ({"VISTA": "sk-next"}, {})


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").symlink_to(tmp_path)
    with pytest.raises(CorralError, match="symbolic link"):
        KeyFiles(tmp_path / "keys").write(tmp_path / "keys" / "VISTA", VALUE)


# --- rotation, killed after every request to LiteLLM


class Killed(Exception):
    """The run ends here."""


class LiteLlm(GatewayKeys):
    """Keys in memory, as LiteLLM changes them; the run is killed after `calls` changes."""

    def __init__(self, rows: list[dict[str, Any]], calls: int) -> None:
        self.rows = rows
        self.calls = calls

    def all(self) -> list[StoredKey]:
        return [stored_key(row) for row in self.rows]

    def create(self, value: str, body: Mapping[str, Any]) -> None:
        assert body["key_alias"] not in {row["key_alias"] for row in self.rows}, "names are unique"
        self.rows.append({**body, "token": hash_of(value)})
        self._count()

    def update(self, token: str, body: Mapping[str, Any]) -> None:
        next(row for row in self.rows if row["token"] == token).update(body)
        self._count()

    def delete(self, token: str) -> None:
        self.rows[:] = [row for row in self.rows if row["token"] != token]
        self._count()

    def _count(self) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise Killed


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_rotation_killed_anywhere_is_ended_by_the_next_run(calls: int, tmp_path: Path) -> None:
    row = {"token": hash_of("sk-old"), "key_alias": "VISTA", "rpm_limit": 9, "spend": 1.5, "metadata": {"note": "x"}}
    files = KeyFiles(tmp_path / "keys")
    files.write(files.path("VISTA"), "sk-old")
    files.write(files.next_path("VISTA"), "sk-new")
    rows = [row]
    path = tmp_path / "inventory.yaml"
    path.write_text(yaml.safe_dump(inventory_with().model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    plan = build(path)
    with pytest.raises(Killed):
        _finish_rotation(Keyring(plan, LiteLlm(rows, calls), files, NOW), "VISTA", "sk-new", timedelta(0))
    keyring = Keyring(plan, LiteLlm(rows, -1), files, NOW)
    if files.begun():
        _finish_rotation(keyring, "VISTA", "sk-new", timedelta(0))
    left = compare([], keyring.gateway.all(), files.values(), NOW)
    for step in left:
        keyring.gateway.delete(step.token)
    assert files.values() == {"VISTA": "sk-new"}
    (found,) = rows
    assert (found["token"], found["rpm_limit"], found["spend"]) == (hash_of("sk-new"), 9, 1.5)
    assert found["metadata"] == {"note": "x"}


def build(path: Path) -> Any:
    from corral.build import build_plan
    from corral.config.load import load_inventory

    return build_plan(load_inventory(path))


# --- words


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": "no"}}, "refuses LITELLM_MASTER_KEY of secrets"),
        (500, {"error": {"message": "Database not connected"}}, "has lost its database: Database not connected"),
        (500, {"error": {"message": "DB not connected."}}, "has lost its database"),
        (400, {"detail": "bad"}, "answers 400: bad"),
        (502, "<html>", "answers 502: <html>"),
    ],
)
def test_refusals_say_what_to_do(status: int, body: Any, words: str) -> None:
    def answer(_request: httpx.Request) -> httpx.Response:
        given = {"text": body} if isinstance(body, str) else {"json": body}
        return httpx.Response(status, **given)

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        keys = GatewayKeys(client, "http://gateway", Path("secrets"))
        with pytest.raises(CorralError, match=words):
            keys.all()


def test_pages_of_keys_are_all_read() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        page = int(request.url.params["page"])
        return httpx.Response(200, json={"keys": [{"token": f"t{page}", "key_alias": f"k{page}"}], "total_pages": 3})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        assert [key.name for key in GatewayKeys(client, "", Path()).all()] == ["k1", "k2", "k3"]


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("two words", {}, "must be a consumer's name"),
        ("corral-x", {}, "are the kit's own"),
        ("guest", {"limits": {"rpm": 0}}, "must be at least 1, not 0"),
        ("guest", {"expires": "tomorrow"}, "write for instance 2027-01-31"),
        ("guest", {"budget": {"period": "30d"}}, '"max_usd" is missing'),
    ],
)
def test_wrong_words_on_the_command_line_are_told_as_in_the_inventory(
    name: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        checked_consumer(name, given)
