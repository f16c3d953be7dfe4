"""Pools that share one llama-server: what the plan counts, says and refuses (000-19, 001-07, 002-02, 002-03)."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.cli.plan_data import plan_as_data
from corral.config.load import load_inventory
from corral.errors import SiteError
from corral.plan.site import claimed_mib
from corral.plan.sizes import worst

SITE = """\
schema_version: 1
name: farm
hosts:
  box:
    address: 192.0.2.10
    gpus: [{{card: rtx-3090, vram_gib: {gib}}}]
    shared:
      turns: {{{shared}}}
models:
  a: {{source: a.gguf, kind: chat, size_gib: 1, engine: {{vram_mib: 9000, memory_mib: 1000}}}}
  b: {{source: b.gguf, kind: chat, size_gib: 1, engine: {{vram_mib: 7000, memory_mib: 3000}}}}
  c: {{source: c.gguf, kind: chat, size_gib: 1, engine: {{vram_mib: 2000, memory_mib: 2000}}}}
pools:
  a: {{model: a, on: {{host: box, gpus: 1, shared: turns}}, engine: {{threads: 4}}}}
  b: {{model: b, on: {{host: box, gpus: 1, shared: turns}}, engine: {{threads: 2, sleep_idle_s: 30}}}}
  c: {{model: c, on: {{host: box, gpus: 1, shared: turns}}}}
{more}
gateway: {{host: box}}
monitoring: {{host: box}}
"""


def plan_of(folder: Path, shared: str, *, gib: int = 24, more: str = "") -> Plan:
    path = folder / "inventory.yaml"
    path.write_text(SITE.format(shared=shared, gib=gib, more=more))
    return build_plan(load_inventory(path))


@pytest.mark.parametrize(
    ("loaded", "mib", "memory_mib", "threads"), [(1, 9000, 3000, 4), (2, 16000, 5000, 6), (9, 18000, 6000, 6)]
)
def test_the_worst_set_of_models_is_what_a_shared_server_takes(
    tmp_path: Path, loaded: int, mib: int, memory_mib: int, threads: int
) -> None:
    """002-03: memory, on the card and in the host, of the largest that it may hold at once; not of all of them."""
    plan = plan_of(tmp_path, f"loaded: {loaded}")
    (server,) = (item for item in plan.contributions.services if item.component == "llama")

    assert [claim.vram_mib for claim in server.gpus] == [mib]
    assert (server.memory_mib, server.threads) == (memory_mib, threads)
    assert claimed_mib(plan.site.members("box", "turns")) == (mib,)
    assert server.args[:4] == ("--models-preset", "/etc/corral/models.ini", "--models-max", str(loaded))


def test_what_does_not_fit_is_an_error_with_its_place_and_what_would_fit(tmp_path: Path) -> None:
    with pytest.raises(SiteError) as caught:
        plan_of(tmp_path, "loaded: 2", gib=12)

    assert str(caught.value) == (
        f"{tmp_path}/inventory.yaml:8:7: hosts.box.shared.turns: GPU 1 of box lacks 3968 MiB: 12032 are free, "
        "16000 wanted (turns 16000 = a 9000 + b 7000, the largest 2 of 3); "
        "what would fit: hosts.box.shared.turns.loaded: 1 [vram]"
    )


def test_other_servers_on_the_card_count_beside_it(tmp_path: Path) -> None:
    own = "  own: {model: c, on: {host: box, gpus: 1}}"
    assert plan_of(tmp_path, "loaded: 1", gib=12, more=own).warnings == ()
    with pytest.raises(SiteError, match="turns 9000 = a 9000, the largest 1 of 3"):
        plan_of(tmp_path, "loaded: 1", gib=12, more=own.replace("gpus: 1", "gpus: 1, replicas: 2"))


def test_a_pool_that_shares_stays_a_pool(tmp_path: Path) -> None:
    """Own name, own place in the balancer, own slots; one address."""
    plan = plan_of(tmp_path, "loaded: 1, idle_s: 600")
    backends = {item.pool: item for item in plan.contributions.backends}

    assert {pool: item.name for pool, item in backends.items()} == {"a": "box-a-1", "b": "box-b-1", "c": "box-c-1"}
    assert {(item.endpoint.service, item.endpoint.port) for item in backends.values()} == {("turns", 8901)}
    assert {pool: item.upstream_model for pool, item in backends.items()} == {"a": "a", "b": "b", "c": "c"}
    sleeps = {item.pool: item.engine.sleep_idle_s for item in plan.site.replicas}
    assert sleeps == {"a": 600, "b": 30, "c": 600}, "a pool's own word counts"


def test_figures_of_a_model_are_asked_without_making_it_load(tmp_path: Path) -> None:
    targets = [item for item in plan_of(tmp_path, "loaded: 1").contributions.targets if item.job == "llama-shared"]

    assert [item.labels["__param_model"] for item in targets] == ["a", "b", "c"]
    assert {item.labels["__param_autoload"] for item in targets} == {"false"}


def test_the_port_of_a_shared_server_is_open_on_loopback_when_it_is_named(tmp_path: Path) -> None:
    def published(shared: str) -> tuple[int, str]:
        (server,) = (item for item in plan_of(tmp_path, shared).contributions.services if item.component == "llama")
        return server.ports[0].number, server.ports[0].publish

    assert published("loaded: 1") == (8901, "")
    assert published("loaded: 1, port: 9400") == (9400, "127.0.0.1")


def test_the_plan_as_data_names_who_shares(tmp_path: Path) -> None:
    services = plan_as_data(plan_of(tmp_path, "loaded: 2"), None)["hosts"]["box"]["services"]
    turns = next(item for item in services if item["name"] == "turns")

    assert (turns["loaded"], turns["vram_mib"]) == (2, 16000)
    assert {item["pool"]: item["vram_mib"] for item in turns["shared_by"]} == {"a": 9000, "b": 7000, "c": 2000}


def test_worst_is_the_sum_of_the_largest() -> None:
    assert [worst([3, 9, 1], count) for count in (0, 1, 2, 5)] == [0, 9, 12, 13]
