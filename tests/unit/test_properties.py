"""What holds for every inventory, tried with random ones."""

import re
from collections import Counter, defaultdict
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.build import Plan, build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.errors import SiteError
from corral.plan.cards import VRAM_RESERVE_MIB
from corral.render.templates import Tree
from corral.render.tree import render

CARDS = ("rtx-3060", "p104-100", "l4", "mi50")
KINDS = ("chat", "embedding", "rerank", "image")
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
BRACES = "{{ x }}"
MARKER = "Zq7-marker-secret"


@st.composite
def hosts(draw: st.DrawFn, number: int) -> dict[str, Any]:
    host: dict[str, Any] = {"address": f"192.0.2.{10 + number}"}
    if draw(st.booleans()):
        host["gpus"] = {"card": draw(st.sampled_from(CARDS)), "count": draw(st.integers(1, 6))}
    if draw(st.booleans()):
        host["ram_gib"] = draw(st.sampled_from([8, 64, 512]))
    if draw(st.booleans()):
        host["cpu"] = {"cores": draw(st.integers(1, 32)), "avx": draw(st.booleans())}
    return host


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    choices: dict[str, st.SearchStrategy[Any]] = {
        "slots": st.integers(1, 4),
        "threads": st.integers(1, 8),
        "cache_type": st.sampled_from(["f16", "q8_0"]),
        "flash_attention": st.sampled_from(["on", "auto"]),
        "gpu_layers": st.one_of(st.just("all"), st.integers(0, 40)),
        "mlock": st.booleans(),
        "environment": st.just({"A_WORD": "50% of $HOME", "Z": BRACES}),
        "extra_args": st.just(["--verbose", "--tags", "a b", "--grammar", "$x"]),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=3))
    return {key: draw(choices[key]) for key in chosen}


@st.composite
def places(draw: st.DrawFn, all_hosts: dict[str, Any]) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(all_hosts)))
    place: dict[str, Any] = {"host": name}
    count = all_hosts[name].get("gpus", {}).get("count", 0)
    if count and draw(st.booleans()):
        first = draw(st.integers(1, count))
        place["gpus"] = f"{first}-{draw(st.integers(first, count))}"
    elif draw(st.booleans()):
        place["replicas"] = draw(st.integers(1, 3))
    return place


@st.composite
def inventories(draw: st.DrawFn) -> dict[str, Any]:
    """Inventories whose names all lead somewhere; whether everything fits is left to chance."""
    all_hosts = {f"host-{number}": draw(hosts(number)) for number in range(draw(st.integers(1, 3)))}
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    models = {
        f"model-{number}": {
            "source": f"hf:owner/repo-{number}" if kind == "image" else f"{kind}-{number}-1b-q4_0.gguf",
            "kind": kind,
            **({"revision": "1" * 40} if kind == "image" else {}),
            "context": draw(st.sampled_from([512, 4096])),
            "engine": draw(engines()),
        }
        for number, kind in enumerate(kinds)
    }
    pools: dict[str, Any] = {}
    for number in range(draw(st.integers(1, 4))):
        pools[f"pool-{number}"] = {
            "model": draw(st.sampled_from(sorted(models))),
            "on": draw(st.lists(places(all_hosts), min_size=1, max_size=2, unique_by=lambda place: place["host"])),
            "ports": 20000 + 100 * number,
            "aliases": draw(st.sampled_from([[], [f"alias-{number}", f"other-{number}"]])),
            "engine": draw(engines()),
        }
    inventory: dict[str, Any] = {
        "schema_version": 1,
        "name": "random",
        "hosts": all_hosts,
        "models": models,
        "pools": pools,
        "gateway": {
            "host": draw(st.sampled_from(sorted(all_hosts))),
            "balancing": draw(st.sampled_from(["slots", "least-busy", "direct"])),
            "database": draw(st.booleans()),
            "cache": draw(st.booleans()),
        },
    }
    if draw(st.booleans()):
        nodes = {f"node-{number}": {"url": f"http://192.0.2.{100 + number}:80", "model": "q"} for number in range(2)}
        inventory |= {"nodes": nodes}
        pools["nodes"] = {"on": [{"node": name} for name in nodes]}
    if draw(st.booleans()):
        names = sorted(all_hosts)
        inventory["monitoring"] = {"host": names[0], "local": dict.fromkeys(names[1:], 9099)}
    return inventory


def plan_of(inventory: dict[str, Any]) -> Plan | None:
    """The plan, or None when the random wishes cannot be fulfilled."""
    try:
        return build_plan(validate(parse(yaml.safe_dump(inventory, sort_keys=False), "inventory.yaml")))
    except SiteError as error:
        problems = error.problems
    if not all(problem.line for problem in problems):
        pytest.fail(f"a problem has no place: {problems}")
    return None


def no_two_services_want_one_port(plan: Plan) -> None:
    ports = Counter(
        (service.host, port.publish, port.number)
        for service in plan.contributions.services
        for port in service.ports
        if port.publish
    )
    assert not [port for port, times in ports.items() if times > 1]


def a_card_gives_no_more_than_it_has(plan: Plan) -> None:
    taken: dict[tuple[str, int], int] = defaultdict(int)
    for service in plan.contributions.services:
        for claim in service.gpus:
            taken[service.host, claim.number] += claim.vram_mib
    for (host, number), wanted in taken.items():
        assert wanted + VRAM_RESERVE_MIB <= plan.site.cards[host][number - 1].vram_mib


def cards_are_used_as_the_inventory_says(plan: Plan, inventory: dict[str, Any]) -> None:
    named = set()
    for pool in inventory["pools"].values():
        for place in pool["on"]:
            first, _, last = place.get("gpus", "1-0").partition("-")
            named |= {(place.get("host"), number) for number in range(int(first), int(last) + 1)}
    services = plan.contributions.services
    assert {(service.host, claim.number) for service in services for claim in service.tenancies} == named


def names_are_unique(plan: Plan) -> None:
    services = Counter((service.host, service.name) for service in plan.contributions.services)
    deployments = Counter(route.name for route in plan.contributions.routes)
    assert max(services.values()) == 1
    assert max(deployments.values()) == 1


@QUICK
@given(inventory=inventories())
def test_a_plan_hands_out_everything_once(inventory: dict[str, Any]) -> None:
    plan = plan_of(inventory)
    if plan is not None:
        no_two_services_want_one_port(plan)
        a_card_gives_no_more_than_it_has(plan)
        cards_are_used_as_the_inventory_says(plan, inventory)
        names_are_unique(plan)


def shuffled(value: Any, random: Any) -> Any:
    """The same named things in another order; lists and free text stay as they are."""
    if not isinstance(value, dict):
        return value
    keys = list(value)
    random.shuffle(keys)
    return {key: value[key] if key == "environment" else shuffled(value[key], random) for key in keys}


def differing(one: Tree, other: Tree) -> list[str]:
    """Paths whose bytes differ."""
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def files_are_tidy(tree: Tree) -> None:
    for path, data in tree.items():
        text = data.decode()
        assert text.endswith("\n"), path
        assert not text.endswith("\n\n"), path
        assert "\n\n\n" not in text or path.endswith(".py"), path
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), path
        assert "{%" not in text, path
        has_its_own = "/rules/" in path or "/grafana/pages/" in path  # templates of Prometheus and Grafana
        assert "{{" not in text.replace(BRACES, "") or has_its_own, path
        assert not path.startswith("/"), path
        assert ".." not in path.split("/"), path


@pytest.mark.slow
@QUICK
@given(inventory=inventories(), random=st.randoms(use_true_random=False))
def test_a_tree_depends_on_what_the_inventory_says_alone(inventory: dict[str, Any], random: Any) -> None:
    one, other = plan_of(inventory), plan_of(shuffled(inventory, random))
    assert (one is None) == (other is None)
    if one is None or other is None:
        return
    tree = render(one)
    files_are_tidy(tree)
    assert differing(tree, render(one)) == []
    assert differing(tree, render(other)) == []


def test_secrets_that_lie_about_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering knows names only: values in the environment of whoever renders stay there."""
    inventory: dict[str, Any] = {
        "schema_version": 1,
        "name": "random",
        "hosts": {"box": {"address": "192.0.2.10"}},
        "models": {
            "m": {"source": "m.gguf", "kind": "chat"},
            "i": {"source": "hf:owner/repo", "revision": "1" * 40, "kind": "image"},
        },
        "nodes": {"cloud": {"engine": "cloud", "model": "openai/gpt-4o-mini", "api_key": "OPENAI_API_KEY"}},
        "pools": {
            "chat": {"model": "m", "on": {"host": "box"}},
            "image": {"model": "i", "on": {"host": "box"}},
            "cloud": {"on": {"node": "cloud"}},
        },
        "gateway": {"host": "box"},
        "monitoring": {"host": "box"},
    }
    plan = plan_of(inventory)
    assert plan is not None
    names = {secret.name for secret in plan.contributions.secrets}
    for name in names:
        monkeypatch.setenv(name, MARKER)

    tree = render(plan)

    assert {"OPENAI_API_KEY", "LITELLM_MASTER_KEY", "POSTGRES_PASSWORD", "LOCALAI_API_KEY", "LLAMA_API_KEY"} <= names
    assert [path for path, data in tree.items() if MARKER.encode() in data] == []


@pytest.mark.slow
def test_most_random_inventories_can_be_planned() -> None:
    """Otherwise the properties above would say little."""
    planned: Counter[bool] = Counter()

    @QUICK
    @given(inventory=inventories())
    def count(inventory: dict[str, Any]) -> None:
        planned[plan_of(inventory) is not None] += 1

    count()
    assert planned[True] > planned.total() / 6
