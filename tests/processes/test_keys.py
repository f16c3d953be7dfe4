"""Consumers' keys on a real gateway with database and counters: `keys sync` and by hand, limits, budgets, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import redis
import yaml

from corral.cli import main
from corral.config.client_names import EDITOR_NAMES
from corral.gateway.keys import hash_of
from corral.runtime.haproxy import balancer_of
from corral.verbs.keys import keys
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import CONSUMERS, EVEN, EVEN_DEPTH, HOST, MIXED, VECTORS, Farm, in_modes
from tests.processes.helpers import free_port, wait_until

pytestmark = [in_modes("slots"), pytest.mark.needs("postgres", "prisma-engine", "redis")]

CHAT_ALIASES = {"default", "assistant", "chat:late", "chat:weak"}
EVEN_ALIASES = {"Owner/Model:8B", *EDITOR_NAMES["chat"]}
LIMIT_RPM = 35
# LiteLLM writes spending to its database every ten seconds or so.
SPEND_WITHIN_S = 40


class Said(NamedTuple):
    """What a run printed and how it ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(farm: Farm, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `keys …` for the farm; at the end the keys are again as in its inventory."""

    def call(*arguments: str, inventory: Path | None = None, out: Path | None = None) -> Said:
        capsys.readouterr()
        where = ["--inventory", str(inventory or farm.out / "inventory.yaml"), "--out", str(out or farm.out)]
        code = main(["keys", *arguments, *where])
        said = capsys.readouterr()
        assert not re.search(r"sk-[\w-]{20,}", said.out + said.err), "a key on the screen"
        return Said(code, said.out, said.err)

    yield call
    call("sync")


def file_of(farm: Farm, name: str) -> Path:
    return farm.out / HOST / "keys" / name


def key_of(farm: Farm, name: str) -> str:
    return file_of(farm, name).read_text(encoding="utf-8")


def client_of(farm: Farm, key: str) -> openai.OpenAI:
    """The client that people use, without its retries."""
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    return openai.OpenAI(base_url=base, api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False))


def ask(client: openai.OpenAI, model: str) -> str:
    question: list[Any] = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=model, messages=question, max_tokens=3)
    return answer.choices[0].message.content or ""


def ask_until_refused(client: openai.OpenAI, model: str, most: int) -> tuple[int, openai.RateLimitError]:
    """How many answers there were before the first 429, and that."""
    for answers in range(most):
        try:
            ask(client, model)
        except openai.RateLimitError as refused:
            return answers, refused
    raise AssertionError(f"{most} answers and no refusal")


def changed(farm: Farm, tmp_path: Path, **consumers: dict[str, Any] | None) -> Path:
    """An inventory like the farm's with other consumers; None takes one away."""
    data = yaml.safe_load((farm.out / "inventory.yaml").read_text(encoding="utf-8"))
    data["consumers"] = {name: item for name, item in {**CONSUMERS, **consumers}.items() if item is not None}
    path = tmp_path / "inventory.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def actions(said: Said) -> dict[str, str]:
    """What `sync` did, by name."""
    return {name: action for action, name in re.findall(r"^ *(\w+)  (\S+)", said.out, re.MULTILINE)}


def as_listed(run: Run) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in json.loads(run("ls", "--json").out)}


def test_a_team_shares_one_budget_until_it_is_gone(farm: Farm, run: Run, tmp_path: Path) -> None:
    """One answer costs more than the team may spend, so the second is refused, whichever key asks."""
    member = {"pools": ["mixed", "even"], "team": "family"}
    path = changed(farm, tmp_path, ann=member, bob=member)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["teams"] = {"family": {"budget": {"max_usd": 0.05, "period": "30d"}}}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert actions(run("sync", inventory=path)) == {"ann": "create", "bob": "create", "team": "create"}
    assert "nothing to do" in run("sync", "--dry-run", inventory=path).err
    ann, bob = (client_of(farm, key_of(farm, name)) for name in ("ann", "bob"))
    ask(ann, "mixed")
    for client in (bob, ann):
        _, refused = ask_until_refused(client, "mixed", 20)
        assert refused.code == "insufficient_quota"
        assert ask(client, "even"), "what costs nothing still answers"
    spent = next(row for row in keys.spending(farm.plan, farm.out) if row["name"] == "team family")
    assert spent["budget"]["max_usd"] == 0.05

    left = changed(farm, tmp_path, ann={"pools": ["mixed"]})
    said = actions(run("sync", inventory=left))
    assert said == {"ann": "update", "bob": "revoke", "team": "revoke"}
    assert ask(client_of(farm, key_of(farm, "ann")), "mixed"), "a key that has left the team goes on"


# --- sync (004-36, 002-08)


def test_sync_has_made_every_consumers_key_and_has_nothing_more_to_do(farm: Farm, run: Run) -> None:
    for name in CONSUMERS:
        assert file_of(farm, name).stat().st_mode & 0o777 == 0o600
    assert file_of(farm, "VISTA").parent.stat().st_mode & 0o777 == 0o700
    assert len({key_of(farm, name) for name in CONSUMERS}) == len(CONSUMERS)
    said = run("sync", "--dry-run")
    assert (said.code, said.out) == (0, "")
    assert f"nothing to do: {len(CONSUMERS) + 1} keys are as in the inventory" in said.err
    found = as_listed(run)["VISTA"]
    assert found["limits"] == {"rpm": 35, "tpm": None, "parallel": 2}
    assert found["metadata"]["team"] == "vets"
    assert found["file"] == str(file_of(farm, "VISTA"))
    assert "VISTA" in run("ls").out


def test_sync_updates_creates_and_revokes_only_what_is_its_own(farm: Farm, run: Run, tmp_path: Path) -> None:
    run("create", "by-hand", "--pool", "even")
    by_hand = farm.new_client(key_of(farm, "by-hand"))
    revoked = key_of(farm, "lbrxvoice")
    other = changed(
        farm, tmp_path, lbrxvoice=None, forkmeASAPp={"pools": ["even"]},
        VISTA={"pools": ["even"], "limits": {"rpm": 60}, "expires": "2099-01-31"},
    )  # fmt: skip
    wanted = {"lbrxvoice": "revoke", "forkmeASAPp": "create", "VISTA": "update"}
    said = run("sync", "--dry-run", inventory=other)
    assert (said.code, actions(said)) == (3, wanted)
    assert "rpm_limit 35 → 60" in said.out
    assert farm.ask("even", key=revoked).status_code == 200, "a dry run changes nothing"
    said = run("sync", inventory=other)
    assert (said.code, actions(said)) == (0, wanted)
    assert farm.ask("even", key=revoked).status_code == 401
    assert not file_of(farm, "lbrxvoice").exists()
    assert farm.ask("even", key=key_of(farm, "forkmeASAPp")).status_code == 200
    assert farm.ask("chat", key=key_of(farm, "VISTA")).status_code == 403
    assert by_hand.get("/v1/models").status_code == 200
    assert as_listed(run)["VISTA"]["expires"].startswith("2099-01-3")
    run("sync")
    assert as_listed(run)["VISTA"]["expires"] is None
    run("revoke", "by-hand")


def test_a_killed_run_loses_no_key(farm: Farm, run: Run, tmp_path: Path) -> None:
    """Killed between file and LiteLLM, the same key is made by the next run; a database that was lost comes back."""
    before = key_of(farm, "lbrxvoice")
    token = as_listed(run)["lbrxvoice"]["token"]
    farm.admin.post("/key/delete", json={"keys": [token]}).raise_for_status()
    assert farm.ask("even", key=before).status_code == 401
    assert actions(run("sync")) == {"lbrxvoice": "create"}
    assert key_of(farm, "lbrxvoice") == before
    assert farm.ask("even", key=before).status_code == 200


def test_a_name_taken_by_hand_is_told_and_can_be_adopted(farm: Farm, run: Run, tmp_path: Path) -> None:
    made = farm.admin.post("/key/generate", json={"key_alias": "old-service", "models": ["even"]}).json()["key"]
    other = changed(farm, tmp_path, **{"old-service": {"pools": ["even"], "limits": {"rpm": 9}}})
    said = run("sync", inventory=other)
    assert said.code == 1
    assert "taken by keys made by hand: old-service" in said.err
    assert as_listed(run)["old-service"]["limits"]["rpm"] is None
    said = run("sync", "--adopt", "old-service", inventory=other)
    assert (said.code, actions(said)) == (0, {"old-service": "adopt"})
    assert as_listed(run)["old-service"]["limits"]["rpm"] == 9
    assert farm.ask("even", key=made).status_code == 200, "whoever has the key goes on"


def test_what_stands_in_the_way_is_said_clearly(farm: Farm, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / HOST).mkdir(parents=True)
    env = (farm.folder / ".env").read_text(encoding="utf-8")
    (out / HOST / ".env").write_text(env.replace(farm.key, "sk-another-master-key"), encoding="utf-8")
    said = run("ls", out=out)
    assert said.code == 1
    assert "the gateway refuses LITELLM_MASTER_KEY" in said.err
    data = yaml.safe_load((farm.out / "inventory.yaml").read_text(encoding="utf-8"))
    data["gateway"]["admin_port"] = free_port()
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(yaml.safe_dump(data), encoding="utf-8")
    said = run("ls", inventory=elsewhere)
    assert said.code == 1
    assert "the gateway does not answer" in said.err
    data["gateway"]["database"] = False
    del data["consumers"]
    elsewhere.write_text(yaml.safe_dump(data), encoding="utf-8")
    said = run("sync", inventory=elsewhere)
    assert said.code == 1
    assert "this site has no database" in said.err
    shutil.rmtree(out)


# --- by hand


def test_rotation_changes_the_key_and_keeps_settings_and_spending(farm: Farm, run: Run) -> None:
    run("create", "turning", "--pool", "even", "--rpm", "9")
    old = key_of(farm, "turning")
    assert run("rotate", "turning").code == 0
    new = key_of(farm, "turning")
    assert old != new
    assert farm.ask("even", key=old).status_code == 401
    answer = farm.ask("even", key=new)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-api_key-limit-requests"] == "9"
    run("rotate", "turning", "--keep-hours", "1")
    assert farm.ask("even", key=new).status_code == 200, "the old one has an hour left"
    assert farm.ask("even", key=key_of(farm, "turning")).status_code == 200
    states = Counter(item["state"] for name, item in as_listed(run).items() if name.startswith("turning"))
    assert states == {"active": 1, "replaced": 1}
    run("revoke", "turning", *(name for name in as_listed(run) if name.startswith("turning.old")))


def test_a_rotation_that_was_killed_is_ended_or_forgotten(farm: Farm, run: Run) -> None:
    folder = file_of(farm, "VISTA").parent
    old = key_of(farm, "VISTA")
    begun = folder / ".VISTA.next"
    begun.write_text("sk-begun-and-never-told-to-anybody-1234", encoding="utf-8")
    run("sync")
    assert not begun.exists()
    assert key_of(farm, "VISTA") == old
    begun.write_text("sk-begun-and-old-key-out-of-the-way-1234", encoding="utf-8")
    assert run("rotate", "VISTA").code == 0
    assert key_of(farm, "VISTA") == "sk-begun-and-old-key-out-of-the-way-1234"
    assert farm.ask("even", key=old).status_code == 401
    assert as_listed(run)["VISTA"]["limits"]["rpm"] == LIMIT_RPM
    assert run("sync", "--dry-run").code == 0


# --- what a key opens (004-11, 004-36, 000-F4)


def test_models_of_a_key_are_its_pools_and_their_aliases(farm: Farm) -> None:
    def models_of(name: str) -> set[str]:
        return {model.id for model in client_of(farm, key_of(farm, name)).models.list()}

    assert models_of("VISTA") == {"even", *EVEN_ALIASES, "chat", *CHAT_ALIASES}
    assert models_of("whisplbrx") == {"even", *EVEN_ALIASES}


def test_names_that_editors_have_built_in_and_names_of_any_case(farm: Farm) -> None:
    client = client_of(farm, key_of(farm, "VISTA"))
    for name in ("gpt-4o", "gpt-3.5-turbo", "Owner/Model:8B"):
        assert ask(client, name).startswith("answer of even"), name
    with pytest.raises(openai.NotFoundError):
        ask(client, "owner/model:8b")
    everything = client_of(farm, key_of(farm, "lbrxvoice"))
    vector = everything.embeddings.create(model="text-embedding-3-small", input="x", encoding_format="float")
    assert vector.data[0].embedding
    assert sum(farm.fakes.arrivals(VECTORS).values()) == 1


def test_a_key_opens_its_pools_by_every_name_and_no_other(farm: Farm) -> None:
    client = client_of(farm, key_of(farm, "VISTA"))
    for name in ("even", "chat", *CHAT_ALIASES):
        assert ask(client, name), name
    with pytest.raises(openai.PermissionDeniedError, match="'embed' is not available for this API key"):
        client.embeddings.create(model="embed", input="x", encoding_format="float")
    with pytest.raises(openai.PermissionDeniedError, match="'mixed' is not available"):
        ask(client, "mixed")
    with pytest.raises(openai.NotFoundError, match="'no-such-model' does not exist"):
        ask(client, "no-such-model")
    assert farm.fakes.arrivals(MIXED) == dict.fromkeys(MIXED, 0)


def test_a_consumer_cannot_manage_the_gateway_but_sees_its_own_limits(farm: Farm) -> None:
    key = key_of(farm, "lbrxvoice")
    with farm.new_client(key) as client, farm.new_admin(key) as at_the_operators:
        for path in ("/key/list", "/model/info", "/health", "/spend/logs", "/metrics/"):
            assert at_the_operators.get(path).status_code in {401, 403}, path
            assert path == "/health" or client.get(path).status_code == 404, path
        assert at_the_operators.post("/key/generate", json={}).status_code == 403
        assert client.get("/key/info").json()["info"]["key_alias"] == "lbrxvoice"


def test_prometheus_key_opens_the_figures_and_nothing_else(farm: Farm) -> None:
    with farm.new_admin(farm.secrets["LITELLM_METRICS_KEY"]) as client:
        assert client.get("/metrics/").status_code == 200
        for path in ("/v1/models", "/key/list", "/key/info"):
            assert client.get(path).status_code == 403, path
    assert farm.ask("even", key=farm.secrets["LITELLM_METRICS_KEY"]).status_code == 403
    assert farm.fakes.arrivals(EVEN) == dict.fromkeys(EVEN, 0)


# --- limits (004-32, 004-35), budget, expiry


def test_request_36_of_a_minute_gets_429_with_retry_after(farm: Farm, run: Run) -> None:
    run("create", "counted", "--pool", "even", "--rpm", str(LIMIT_RPM))
    client = client_of(farm, key_of(farm, "counted"))
    for _ in range(LIMIT_RPM):
        assert ask(client, "even")
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, "even")
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60
    assert sum(farm.fakes.arrivals(EVEN).values()) == LIMIT_RPM
    run("revoke", "counted")


def test_requests_at_the_same_time_are_limited_and_told_to_come_back_soon(farm: Farm, run: Run) -> None:
    run("create", "two-at-once", "--pool", "even", "--parallel", "2")
    key = key_of(farm, "two-at-once")
    with farm.fakes.behaving(EVEN, "hold"), ThreadPoolExecutor() as pool:
        held = [pool.submit(farm.ask, "even", key=key) for _ in range(2)]
        wait_until(lambda: farm.fakes.in_flight(EVEN) == 2, 10, "two requests are at work")
        refused = farm.ask("even", key=key)
        farm.fakes.tell(EVEN)
        assert [answer.result().status_code for answer in held] == [200, 200]
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "5"
    wait_until(lambda: farm.ask("even", key=key).status_code == 200, 10, "there is a place again")
    run("revoke", "two-at-once")


def test_tokens_of_a_minute_are_limited(farm: Farm) -> None:
    answers, refused = ask_until_refused(client_of(farm, key_of(farm, "whisplbrx")), "even", 30 // 6 + 1)
    assert answers >= 1
    assert "tokens" in refused.message
    assert 0 < int(refused.response.headers["retry-after"]) <= 60


def test_budget_is_kept_and_spending_survives_a_restart_with_keys_and_limits(farm: Farm, run: Run) -> None:
    """Six tokens of three US cents each time, against ten cents."""
    client = client_of(farm, key_of(farm, "AnyDataNext"))
    answers, refused = ask_until_refused(client, "mixed", 12)
    assert answers >= 1
    assert "budget" in refused.message.lower()
    assert (refused.code, refused.response.headers.get("retry-after")) == ("insufficient_quota", None)
    assert client.embeddings.create(model="vectors", input="what costs nothing is still answered").data
    wait_until(lambda: as_listed(run)["AnyDataNext"]["spend_usd"] > 0.02, SPEND_WITHIN_S, "spending is in the database")
    before = as_listed(run)["AnyDataNext"]["spend_usd"]
    assert as_listed(run)["lbrxvoice"]["spend_usd"] == 0, "other pools' tokens cost nothing"
    spent = json.loads(run("spend", "--json").out)[0]
    assert (spent["name"], spent["budget"]["period"]) == ("AnyDataNext", "30d")
    farm.restart("litellm")
    assert run("sync", "--dry-run").code == 0
    _, refused = ask_until_refused(client, "mixed", 6)
    assert "budget" in refused.message.lower()
    assert as_listed(run)["AnyDataNext"]["spend_usd"] >= before
    answer = farm.ask("even", key=key_of(farm, "VISTA"))
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-api_key-limit-requests"] == str(LIMIT_RPM)


def test_an_expired_key_is_refused(farm: Farm, run: Run) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=4)
    run("create", "brief-guest", "--pool", "even", "--expires", soon.isoformat())
    key = key_of(farm, "brief-guest")
    assert farm.ask("even", key=key).status_code == 200
    wait_until(lambda: farm.ask("even", key=key).status_code == 401, 15, "the key has expired")
    assert as_listed(run)["brief-guest"]["state"] == "expired"
    with pytest.raises(openai.AuthenticationError, match="this key has expired"):
        ask(client_of(farm, key), "even")
    run("revoke", "brief-guest")


def test_a_revoked_key_is_refused_at_once(farm: Farm, run: Run) -> None:
    run("create", "leaving", "--pool", "even")
    key = key_of(farm, "leaving")
    assert farm.ask("even", key=key).status_code == 200
    assert run("revoke", "leaving").code == 0
    assert farm.ask("even", key=key).status_code == 401
    assert not file_of(farm, "leaving").exists()


# --- fairness (B10); exact shares are tested in `test_balancer_fairness.py`


def test_b10_a_key_that_fills_a_pool_leaves_room_for_another(farm: Farm) -> None:
    inside = len(EVEN) + EVEN_DEPTH
    with ThreadPoolExecutor(inside + 1) as threads, farm.fakes.behaving(EVEN, "hold"):
        asked = [threads.submit(farm.ask, "even") for _ in range(inside)]
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 20, "the queue is full")
        asked.append(threads.submit(farm.ask, "even", key=key_of(farm, "lbrxvoice")))
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH + 1, 20, "another key's request waits, too")
        assert farm.ask("even").status_code == 429
    assert {future.result().status_code for future in asked} == {200}


def test_b10_the_balancer_knows_keys_by_the_hash_that_litellm_stores(farm: Farm) -> None:
    """For every kind of call; the public frontend computes the same from the credential."""
    key = key_of(farm, "lbrxvoice")
    with farm.new_client(key) as client:
        message = {"role": "user", "content": "hello"}
        client.post("/v1/chat/completions", json={"model": "brief", "messages": [message]}).raise_for_status()
        client.post("/v1/messages", json={"model": "mixed", "max_tokens": 5, "messages": [message]}).raise_for_status()
        client.post("/v1/embeddings", json={"model": "vectors", "input": "hello"}).raise_for_status()
    balancer = balancer_of(farm.plan, farm.out)
    assert balancer is not None
    known = set(re.findall(r"key=(\S+)", balancer.ask("show table Keys")))
    assert {f"{pool}/{hash_of(key)[:32]}" for pool in ("brief", "mixed", "vectors")} <= known


def test_limits_and_budgets_need_no_right_in_valkey_that_the_gateway_lacks(farm: Farm) -> None:
    """After all of the above: Valkey counts what it refuses, for lack of rights too."""
    port, password = farm.ports["cache"], farm.secrets["VALKEY_PASSWORD"]
    with redis.Redis(LOOPBACK, port, username="litellm", password=password) as own:
        commands = own.info("commandstats")
    refused = {name for name, figures in commands.items() if figures["rejected_calls"]}
    assert refused <= {"cmdstat_ping"}  # of strangers in other tests
    assert commands.keys() & {"cmdstat_eval", "cmdstat_evalsha"}
