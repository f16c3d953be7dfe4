"""The inventory resolved: seats, names, ports, engine settings, sizes."""

import itertools
import random
from typing import Any

import pytest

from corral.config.inventory import Inventory, Node, ServerSettings
from corral.contributions import Endpoint
from corral.plan.settings import engine_place, merged_engine
from corral.plan.site import Replica, Site, resolve

BASE: dict[str, Any] = {
    "schema_version": 1,
    "name": "farm",
    "hosts": {
        "box": {"address": "192.0.2.10", "gpus": {"card": "rtx-3060", "count": 4}},
        "pi": {"address": "192.0.2.11"},
    },
    "models": {
        "m": {"source": "m-8b-q4_k_m.gguf", "kind": "chat", "context": 8192},
        "e": {"source": "e.gguf", "kind": "embedding", "context": 2048},
    },
    "gateway": {"host": "pi"},
}


def inventory(pools: dict[str, Any], **sections: Any) -> Inventory:
    return Inventory.model_validate({**BASE, "pools": pools, **sections})


def replicas(pools: dict[str, Any], **sections: Any) -> tuple[Replica, ...]:
    return resolve(inventory(pools, **sections)).replicas


def seats(pools: dict[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    return [(item.service, tuple(card.number for card in item.cards), item.port) for item in replicas(pools)]


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ({"host": "box", "gpus": 2}, [("chat-2", (2,), 8102)]),
        ({"host": "box", "gpus": "1-3"}, [("chat-1", (1,), 8101), ("chat-2", (2,), 8102), ("chat-3", (3,), 8103)]),
        ({"host": "box", "gpus": [4, 1]}, [("chat-4", (4,), 8104), ("chat-1", (1,), 8101)]),
        ({"host": "box", "gpus": "1-4", "gpus_per_replica": 2}, [("chat-1", (1, 2), 8101), ("chat-3", (3, 4), 8103)]),
        ({"host": "box", "gpus": 1, "replicas": 2}, [("chat-1", (1,), 8101), ("chat-1-2", (1,), 8121)]),
        ({"host": "pi"}, [("chat-1", (), 8100)]),
        ({"host": "pi", "replicas": 2}, [("chat-1", (), 8100), ("chat-2", (), 8101)]),
        ({"host": "box", "replicas": 2}, [("chat-cpu-1", (), 8100), ("chat-cpu-2", (), 8101)]),
        (
            [{"host": "box", "gpus": 3}, {"host": "pi"}],
            [("chat-3", (3,), 8103), ("chat-1", (), 8100)],
        ),
    ],
)
def test_seats_names_and_derived_ports(on: Any, expected: Any) -> None:
    assert seats({"chat": {"model": "m", "on": on}}) == expected


def test_ports_that_are_said_follow_each_other() -> None:
    on = [{"host": "box", "gpus": "2-3"}, {"host": "pi", "replicas": 2}]

    assert [port for *_, port in seats({"chat": {"model": "m", "on": on, "ports": 9000}})] == [9000, 9001, 9002, 9003]


def test_a_short_name_names_services_and_containers() -> None:
    (one,) = replicas({"chat": {"model": "m", "short": "gpu", "on": {"host": "box", "gpus": 3}}})

    assert (one.service, one.container, one.pool) == ("gpu-3", "box-gpu-3", "chat")


def test_nodes_are_no_replicas() -> None:
    nodes = {"mac": {"url": "http://192.0.2.20:8080", "model": "q"}}

    assert replicas({"smart": {"on": {"node": "mac"}}}, nodes=nodes) == ()


def test_order_in_the_inventory_moves_no_name_and_no_port() -> None:
    pools = {
        "chat": {"model": "m", "on": {"host": "box", "gpus": "1-2"}},
        "code": {"model": "m", "on": {"host": "box", "gpus": "3-4"}},
        "embed": {"model": "e", "on": [{"host": "box", "gpus": "1-4"}, {"host": "pi"}]},
    }
    expected = resolve(inventory(pools))
    shuffle = random.Random(1)  # noqa: S311 - an order, not a secret
    for _ in range(20):
        changed = {
            section: dict(shuffle.sample(list(items.items()), len(items)))
            for section, items in {**BASE, "pools": pools}.items()
            if isinstance(items, dict)
        }
        assert resolve(Inventory.model_validate({**BASE, **changed})) == expected


def test_a_pool_more_or_less_moves_no_port_of_another() -> None:
    chat = {"model": "m", "on": {"host": "box", "gpus": "2-3"}}
    more = {"a": {"model": "e", "on": {"host": "box", "gpus": "1-4"}}, "z": {"model": "e", "on": {"host": "pi"}}}

    alone = replicas({"chat": chat})

    assert tuple(item for item in replicas({**more, "chat": chat}) if item.pool == "chat") == alone


# --- engine settings -------------------------------------------------------------------------------------------------

LEVELS = ("kind", "card", "model", "pool")
PLACES = {
    "kind": ("defaults", "chat", "threads"),
    "card": ("cards", "rtx-3060", "engine", "threads"),
    "model": ("models", "m", "engine", "threads"),
    "pool": ("pools", "chat", "engine", "threads"),
}


def with_threads(threads: dict[str, int]) -> Inventory:
    engine = {level: {"threads": number} for level, number in threads.items()}
    return inventory(
        {"chat": {"model": "m", "on": {"host": "box", "gpus": 1}, "engine": engine.get("pool", {})}},
        defaults={"chat": engine.get("kind", {})},
        cards={"rtx-3060": {"engine": engine.get("card", {})}},
        models={"m": {**BASE["models"]["m"], "engine": engine.get("model", {})}},
    )


@pytest.mark.parametrize(("weaker", "stronger"), itertools.combinations(LEVELS, 2))
def test_the_nearer_level_wins(weaker: str, stronger: str) -> None:
    site = with_threads({weaker: 3, stronger: 5})

    assert merged_engine(site, "chat", "rtx-3060").threads == 5
    assert engine_place(site, "chat", "rtx-3060", "threads") == PLACES[stronger]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_heard_alone(level: str) -> None:
    site = with_threads({level: 7})

    assert merged_engine(site, "chat", "rtx-3060").threads == 7
    assert engine_place(site, "chat", "rtx-3060", "threads") == PLACES[level]


def test_a_setting_that_nobody_says_would_be_said_in_the_pool() -> None:
    assert engine_place(with_threads({}), "chat", "rtx-3060", "threads") == PLACES["pool"]


def test_the_settings_of_a_card_are_for_that_card_only() -> None:
    site = with_threads({"card": 7})

    assert merged_engine(site, "chat", "").threads is None
    assert merged_engine(site, "chat", "p104-100").threads is None


def test_a_level_can_take_back_what_another_says() -> None:
    site = inventory(
        {"chat": {"model": "m", "on": {"host": "pi"}, "engine": {"cache_reuse": 0, "mlock": False, "extra_args": []}}},
        defaults={"chat": {"cache_reuse": 64, "mlock": True, "extra_args": ["--x"]}},
    )

    engine = merged_engine(site, "chat", "")

    assert (engine.cache_reuse, engine.mlock, engine.extra_args) == (0, False, ())


def test_an_embedding_server_takes_a_whole_input_in_one_batch() -> None:
    """Measured: llama-server answers 500 to an input longer than its physical batch."""
    site = inventory({"embed": {"model": "e", "on": {"host": "pi"}}, "chat": {"model": "m", "on": {"host": "pi"}}})

    assert (merged_engine(site, "embed", "").batch, merged_engine(site, "embed", "").ubatch) == (2048, 2048)
    assert (merged_engine(site, "chat", "").batch, merged_engine(site, "chat", "").ubatch) == (2048, 512)


def test_every_engine_setting_that_a_server_needs_has_a_default() -> None:
    optional = {
        "threads", "pooling", "memory_mib", "memory_swap_mib", "vram_mib", "cache_ram_mib", "image", "extra_args",
        "environment", "backend", "split_mode", "sleep_idle_s", "gpu_memory_fraction", "adapters_at_once",
        "adapter_rank", "tensor_split", "cpu_moe", "host_tensors", "kv_unified", "checkpoints", "load_mode",
    }  # fmt: skip
    engine = merged_engine(inventory({"chat": {"model": "m", "on": {"host": "pi"}}}), "chat", "")

    assert {name for name in ServerSettings.model_fields if getattr(engine, name) is None} == optional


# --- memory ----------------------------------------------------------------------------------------------------------


def one(model: str, on: dict[str, Any], **engine: Any) -> Replica:
    (found,) = replicas({"p": {"model": model, "on": on, "engine": engine}})
    return found


def test_memory_on_the_cpu_is_weights_cache_and_program() -> None:
    found = one("m", {"host": "pi"}, slots=2)

    assert found.vram_mib == 0
    assert found.memory_mib == 4578 + 2036 + 1024
    assert found.context == 2 * 8192


def test_memory_on_a_card_is_the_card_s() -> None:
    found = one("m", {"host": "box", "gpus": 1}, slots=2)

    assert found.vram_mib == 4578 + 2036 + 550
    assert found.memory_mib == 2048


def test_vllm_takes_its_share_of_each_card_whatever_it_needs() -> None:
    """001-11: 0.9 of the card, one adapter at once of rank 64; a card's own figure counts, not its kind's."""
    models = {"v": {"source": "hf:owner/repo", "revision": "1" * 40, "kind": "chat", "server": "vllm"}}
    gpus = [{"card": "rtx-3060"}, {"card": "rtx-3060", "vram_gib": 11}]
    hosts = BASE["hosts"] | {"box": {"address": "192.0.2.10", "gpus": gpus}}
    on = {"host": "box", "gpus": "1-2", "gpus_per_replica": 2}
    (found,) = replicas({"p": {"model": "v", "on": on}}, models=models, hosts=hosts)

    assert found.vram_mib == round(0.9 * 12 * 1024) + round(0.9 * 11 * 1024)
    assert (found.slots, found.memory_mib) == (16, 8192)
    assert found.files == {
        "owner--repo--111111111111": "hf:owner/repo"
    }  # the folder, until `models pull` has filled it
    assert (found.engine.adapters_at_once, found.engine.adapter_rank) == (1, 64)


def test_the_prompt_cache_fits_its_container() -> None:
    assert one("m", {"host": "box", "gpus": 1}).cache_ram_mib == 512
    assert one("m", {"host": "pi"}).cache_ram_mib == 1024
    assert one("m", {"host": "pi"}, cache_ram_mib=0).cache_ram_mib == 0
    assert one("e", {"host": "pi"}).cache_ram_mib == 0


def test_what_is_said_counts() -> None:
    found = one("m", {"host": "box", "gpus": 1}, vram_mib=7000, memory_mib=3000, cache_ram_mib=100)

    assert (found.vram_mib, found.memory_mib, found.cache_ram_mib) == (7000, 3000, 100)


# --- addresses -------------------------------------------------------------------------------------------------------


def site_of(**hosts: dict[str, Any]) -> Site:
    return resolve(inventory({"chat": {"model": "m", "on": {"host": "pi"}}}, hosts={**BASE["hosts"], **hosts}))


def test_programs_find_each_other() -> None:
    site = site_of(mine={"runtime": "local"}, six={"address": "2001:db8::1"})

    assert site.address(Endpoint(80, "box", "web"), "box") == "web:80"
    assert site.address(Endpoint(80, "box", "web"), "pi") == "192.0.2.10:4443"  # its edge
    assert site.address(Endpoint(80, "mine", "web"), "mine") == "127.0.0.1:80"
    assert site.address(Endpoint(80, "six", "web"), "pi") == "[2001:db8::1]:4443"
    assert site.address(Endpoint(80, address="192.0.2.20"), "pi") == "192.0.2.20:80"


def test_ports_are_opened_for_programs_of_a_local_host_only() -> None:
    site = site_of(mine={"runtime": "local"})

    assert site.publish_address("box") == ""
    assert site.publish_address("mine") == "127.0.0.1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://192.0.2.7:8080", ("192.0.2.7", 8080)),
        ("http://192.0.2.7", ("192.0.2.7", 80)),
        ("https://api.example.com", ("api.example.com", 443)),
        ("https://api.example.com/openai/v1", ("api.example.com", 443)),
        ("http://[2001:db8::7]:8080/v1", ("2001:db8::7", 8080)),
        ("http://[2001:db8::7]", ("2001:db8::7", 80)),
    ],
)
def test_where_a_node_listens(url: str, expected: tuple[str, int]) -> None:
    endpoint = Site(inventory({"chat": {"model": "m", "on": {"host": "pi"}}})).node_endpoint(Node(url=url, model="q"))

    assert (endpoint.address, endpoint.port) == expected


def test_cards_have_their_facts() -> None:
    gpus = [{"card": "p104-100", "uuid": "GPU-12345678", "power_limit_w": 90}, {"card": "p104-100", "vram_gib": 4}]
    first, second = resolve(
        inventory({"chat": {"model": "m", "on": {"host": "pi"}}}, hosts={**BASE["hosts"], "old": {"gpus": gpus}})
    ).cards["old"]

    assert (first.device, first.vram_mib, first.compute_capability, first.power_limit_w) == (
        "GPU-12345678", 8192, (6, 1), 90,
    )  # fmt: skip
    assert (second.device, second.vram_mib, second.vendor) == ("1", 4096, "nvidia")
