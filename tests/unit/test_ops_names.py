from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.errors import UsageError
from corral.verbs.names import services_named

REPOSITORY = Path(__file__).resolve().parents[2]
TWO_HOSTS = """
schema_version: 1
name: site
hosts:
  pea: {address: 192.0.2.10, gpus: {card: p104-100, count: 2}}
  pod: {address: 192.0.2.11, gpus: {card: p104-100, count: 3}}
  desk: {address: 192.0.2.12}
nodes:
  mac: {url: "http://192.0.2.13:8080", engine: mlx, model: m}
models:
  small: {source: small.gguf, kind: chat, context: 2048, size_gib: 1}
  words: {source: words.gguf, kind: embedding, context: 512, size_gib: 0.1}
pools:
  chat:
    model: small
    short: gpu
    on: [{host: pea, gpus: 1-2}, {host: pod, gpus: 1-2}, {node: mac}]
    aliases: [default]
  embed: {model: words, on: {host: pea, gpus: 1}}
  desk: {model: words, on: {host: desk}}
gateway: {host: desk, database: false}
monitoring: {host: desk}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("names") / "inventory.yaml"
    path.write_text(TWO_HOSTS)
    return build_plan(load_inventory(path))


@pytest.fixture(scope="module")
def heartcode() -> Plan:
    return build_plan(load_inventory(REPOSITORY / "inventories" / "heartcode.yaml"))


def named(plan: Plan, *words: str, hosts: list[str] | None = None) -> list[str]:
    return [f"{item.host}/{item.name}" for item in services_named(plan, words, hosts)]


@pytest.mark.parametrize(
    ("words", "services"),
    [
        (["gpu-1"], ["pea/gpu-1"]),
        (["pea-gpu-1"], ["pea/gpu-1"]),
        (["PEA-GPU-1"], ["pea/gpu-1"]),
        (["pea:1"], ["pea/gpu-1", "pea/embed-1"]),
        (["pea:gpu1"], ["pea/gpu-1", "pea/embed-1"]),
        (["gpu", "1"], ["pea/gpu-1", "pea/embed-1"]),
        (["gpu 1"], ["pea/gpu-1", "pea/embed-1"]),
        (["GPU1"], ["pea/gpu-1", "pea/embed-1"]),
        (["pea-image-8"], ["pea/image-8"]),
        (["heartcode-chat-sfw"], ["pea/gpu-1", "pea/gpu-2", "pea/gpu-3"]),
        (["heartcode-nsfw"], ["pea/gpu-4", "pea/gpu-5", "pea/gpu-6", "pea/gpu-7"]),
        (["ssd-1b"], ["pea/image-8"]),
        (["litellm"], ["prod/litellm"]),
        (["gateway"], ["prod/litellm"]),
        (["balancer"], ["prod/haproxy"]),
        (["service:gpu-2", "gpu-2"], ["pea/gpu-2"]),
    ],
)
def test_what_people_type(heartcode: Plan, words: list[str], services: list[str]) -> None:
    assert sorted(named(heartcode, *words)) == sorted(services)


def test_no_words_mean_everything(heartcode: Plan) -> None:
    assert len(named(heartcode)) == len(heartcode.contributions.services)
    assert {name.partition("/")[0] for name in named(heartcode, hosts=["pea"])} == {"pea"}


def test_a_host_is_all_its_services(heartcode: Plan) -> None:
    assert len(named(heartcode, "pea")) == len(heartcode.services_of("pea"))


def test_a_component_or_exporter_of_several_hosts_is_all_of_them(plan: Plan) -> None:
    assert {name.partition("/")[0] for name in named(plan, "node-exporter")} == {"pea", "pod", "desk"}


@pytest.mark.parametrize(
    ("words", "hosts", "message"),
    [
        (["gpu-1"], None, '"gpu-1" is a service of pea and pod; say pea-gpu-1 or pod-gpu-1, or name the --host'),
        (["gpu 2"], None, "pea and pod have a GPU 2 each; say pea:2 or pod:2"),
        (["desk"], None, '"desk" is the name of a host and of a pool; say host:desk or pool:desk'),
        (["pod:3"], None, "nothing runs on GPU 3 of pod"),
        (["gpu 7"], None, "there is no GPU 7; pea has 1 to 2, pod has 1 to 3"),
        (["pea:9"], None, "there is no GPU 9; pea has 1 to 2"),
        (["mac"], None, '"mac" is a node: the farm uses it, but the kit does not run it; look on its machine'),
        (["pea-gpu-3"], None, 'nothing is called "pea-gpu-3"; did you mean "pea-gpu-2" or "pea-gpu-1"?'),
        (["litelm"], None, 'nothing is called "litelm"; did you mean "litellm" or "desk-litellm"?'),
        (["litellm"], ["pea"], '"litellm" is not on the hosts named with --host'),
    ],
)
def test_unknown_and_ambiguous_words(plan: Plan, words: list[str], hosts: list[str] | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        named(plan, *words, hosts=hosts)
    assert str(caught.value) == message


def test_a_word_like_nothing_lists_what_there_is(plan: Plan) -> None:
    with pytest.raises(
        UsageError, match=r'nothing is called "xyz"; services: .*litellm.*; pools: chat, default, desk, embed'
    ):
        named(plan, "xyz")


def test_host_option_makes_a_name_clear(plan: Plan) -> None:
    assert named(plan, "gpu-1", hosts=["pod"]) == ["pod/gpu-1"]
    assert named(plan, "gpu 1", hosts=["pod"]) == ["pod/gpu-1"]
    assert len(named(plan, "pool:desk")) == 1
    assert set(named(plan, "default")) == {"pea/gpu-1", "pea/gpu-2", "pod/gpu-1", "pod/gpu-2"}
