"""The sources of the examples: their names and sizes as published, and what the plan takes them for."""

import json
from decimal import Decimal
from typing import Any

import pytest

from corral.config.client_names import all_aliases
from corral.config.inventory import Model
from corral.config.load import load_inventory
from corral.declarations import ASSETS
from corral.plan.sizes import weights_mib

EXAMPLES = [ASSETS / "inventory.yaml", *sorted(ASSETS.glob("inventories/*.yaml"))]
PUBLISHED: dict[str, dict[str, Any]] = json.loads((ASSETS / "inventories" / "sources.json").read_text())
# Names round parameters (14B has 14.8 billion), and quantizations mix types. The tolerance covers both.
TOLERANCE = 0.08


# What users of the systems that examples replace call models, in each one's documentation.
NAMES = {
    "heartcode": {
        "heartcode-chat-sfw", "heartcode-chat-nsfw", "heartcode-embed", "heartcode-image", "heartcode-default",
        "heartcode-sfw", "heartcode-chat", "heartcode-nsfw",
    },
    "neural-farm": {"auto"},
    "jarvis": {"live", "background", "all-MiniLM-L6-v2"},
    "dragon": {
        "nemotron-ultra", "command-a", "qwen3-14b", "default", "fast", "vision", "qwen",
        "mlx-community/command-a-03-2025-q8", "mlx-community/qwen-3-14b-lbrx-2.0-q8",
    },
    "llama-farm": {"llama3", "codegemma", "codellama:7b", "llama2", "mistral"},
}  # fmt: skip
# What answers them there: files and models as the documentation names them.
BEHIND = {
    "heartcode": {
        "Llama-3.1-8B-Stheno-v3.4-Q5_K_M",
        "Lumimaid-v0.2-8B-Q5_K_M",
        "nomic-embed-text-v1.5",
        "segmind/SSD-1B",
    },
    "neural-farm": {"Qwen3-8B-4bit", "Qwen2.5-3B", "Llama-3.2-3B", "Qwen3-4B"},
    "jarvis": {"Qwen3-14B-Q6_K.gguf", "Qwen3-32B-Q4_K_M.gguf", "All-MiniLM-L6-v2"},
    "dragon": {"Nemotron-Ultra-253B-v1-mlx-q5", "command-a-03-2025-q8", "qwen-3-14b-lbrx-2.0-q8", "llama-scout"},
    "llama-farm": {"llama3", "codegemma", "codellama:7b", "llama2", "mistral"},
}


def from_the_hub() -> list[tuple[str, Model]]:
    models = [(path.stem, model) for path in EXAMPLES for model in load_inventory(path).inventory.models.values()]
    return [(example, model) for example, model in models if model.source.startswith("hf:")]


@pytest.mark.parametrize("example", NAMES)
def test_an_example_answers_to_the_names_of_the_system_that_it_replaces(example: str) -> None:
    inventory = load_inventory(ASSETS / "inventories" / f"{example}.yaml").inventory
    automatic = {inventory.gateway.auto.name} if inventory.gateway.auto else set()
    assert NAMES[example] - {*inventory.pools, *all_aliases(inventory), *automatic} == set()
    served = [model.source for model in inventory.models.values()]
    served += [name for node in inventory.nodes.values() for name in node.names]
    missing = {model for model in BEHIND[example] if not any(model.lower() in name.lower() for name in served)}
    assert missing == set()


def half_a_digit(published: str) -> Decimal:
    """How far a rounded figure can be from the real one: 0.05 for `5.7`."""
    return Decimal(5).scaleb(int(Decimal(published).as_tuple().exponent) - 1)


def bounds(entry: dict[str, Any]) -> tuple[float, float]:
    """The least and the most bytes that the published size allows."""
    if "bytes" in entry:
        return entry["bytes"], entry["bytes"]
    size, slack = Decimal(entry["gb"]), half_a_digit(entry["gb"])
    return float((size - slack) * 10**9), float((size + slack) * 10**9)


def test_every_source_of_the_examples_is_listed_and_nothing_else() -> None:
    assert set(PUBLISHED) == {model.source for _, model in from_the_hub()}
    assert list(PUBLISHED) == sorted(PUBLISHED)


@pytest.mark.parametrize("source", PUBLISHED)
def test_an_entry_has_one_size_and_the_page_that_proves_it(source: str) -> None:
    entry = PUBLISHED[source]

    assert len({"bytes", "gb"} & set(entry)) == 1
    assert set(entry) <= {"bytes", "gb", "page", "size_page", "proof"}
    assert entry["page"].startswith("https://")
    assert entry["proof"]


@pytest.mark.parametrize("source", PUBLISHED)
def test_pages_of_the_hub_are_of_the_repository_and_the_file(source: str) -> None:
    owner, name, *file = source.removeprefix("hf:").split("/")
    pages = [page for page in (PUBLISHED[source]["page"], PUBLISHED[source].get("size_page", "")) if ".co/" in page]

    assert all(f"/{owner}/{name}/" in page for page in pages)
    assert all(page.endswith("/".join(file)) for page in pages if "/resolve/" in page)


@pytest.mark.parametrize(
    "model", [pytest.param(model, id=f"{name}-{model.source.rsplit('/', 1)[-1]}") for name, model in from_the_hub()]
)
def test_the_size_from_the_name_or_the_inventory_is_near_the_published_one(model: Model) -> None:
    low, high = bounds(PUBLISHED[model.source])

    assert low * (1 - TOLERANCE) <= weights_mib(model) * 2**20 <= high * (1 + TOLERANCE)
