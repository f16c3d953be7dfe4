"""What the plan counts for published models against llama.cpp's own accounting (field rows 1-6, 29-31).

Files have everything but weights (tests/model_headers), cards do not exist (tests/llama_accounting): 8 s for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from corral.config.gguf_header import facts_of, read_header
from corral.plan.memory import EXPERTS, MIB, Use, memory_of
from tests.llama_accounting import accounts
from tests.model_headers import models, write_header

# The aim: what an estimate may differ by from llama.cpp's figure, whichever is larger.
MIB_OFF, SHARE_OFF = 200, 0.05
RERANKERS = ("qwen3-reranker-0.6b", "bge-reranker-v2-m3")
EMBEDDERS = ("qwen3-embedding-0.6b", "nomic-embed-text-v1.5", "embeddinggemma-300m")
# Fits onto any card: not split over several.
SMALL = "gemma-3n-e4b"
EXPERT_MODELS = (
    "qwen3-30b-a3b",
    "gpt-oss-120b",
    "glm-4.5-air",
    "deepseek-v3",
    "qwen3-next-80b-a3b",
    "granite-4.0-h-small",
)


@dataclass(frozen=True)
class Case:
    """One model in one use."""

    model: str
    use: Use

    @property
    def embeds(self) -> bool:
        return self.model in (*RERANKERS, *EMBEDDERS)

    def told(self, path: Path) -> dict[str, Any]:
        """The same for llama.cpp; the server wants one output for each slot, an embedding server for each token."""
        use = self.use
        words = [
            "--model", str(path), "--ctx-size", str(use.context * use.streams), "--parallel", str(use.slots),
            "--batch-size", str(use.batch), "--ubatch-size", str(use.ubatch), "--flash-attn", use.flash_attention,
            "--cache-type-k", use.cache_type, "--cache-type-v", use.cache_type, "--n-gpu-layers", str(use.gpu_layers),
        ]  # fmt: skip
        kind = ["--reranking"] if self.model in RERANKERS else ["--embeddings"] if self.embeds else []
        told = {
            "n_outputs_max": use.batch if self.embeds else use.slots,
            "kv_unified": use.is_unified,
            "swa_full": use.is_window_ignored,
            "no_kv_offload": not use.has_cache_on_cards,
            "tensor_split": list(use.split),
        }
        return {"words": [*words, *kind], "parameters": told, "on_host": list(use.on_host)}


def cases() -> list[Case]:
    """Every model as it is served usually, in parts, and in the ways that differ for it."""
    found = []
    for model in models():
        if model in (*RERANKERS, *EMBEDDERS):
            uses = [Use(4, 2048, 2048, 2048, embeds=True), Use(1, 512, 2048, 512, embeds=True)]
        else:
            uses = [
                Use(1, 32768, 2048, 512),
                Use(4, 8192, 2048, 512, cache_type="q8_0"),
                Use(2, 4096, 2048, 2048, flash_attention="off"),
                Use(1, 32768, 2048, 512, flash_attention="on", gpu_layers=12),
                *[Use(1, 32768, 2048, 512, split=(2, 1))][: model != SMALL],
                Use(4, 32768, 2048, 512, is_unified=True),
                Use(2, 8192, 2048, 512, is_window_ignored=True),
                Use(2, 8192, 2048, 512, flash_attention="on", has_cache_on_cards=False),
            ]
        if model in EXPERT_MODELS:
            uses += [
                Use(1, 32768, 2048, 512, on_host=(EXPERTS,)),
                Use(1, 32768, 2048, 512, on_host=tuple(rf"blk\.{layer}{EXPERTS}" for layer in range(10)), split=(1, 3)),
            ]
        found += [Case(model, use) for use in uses]
    found.append(Case("qwen3-embedding-0.6b", Use(1, 8192, 2048, 512, embeds=True)))
    return found


CASES = cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of every model."""
    made = tmp_path_factory.mktemp("headers")
    for name in models():
        write_header(made / f"{name}.gguf", name)
    return made


@pytest.fixture(scope="module")
def counted(folder: Path) -> dict[Case, dict[str, list[int]]]:
    """llama.cpp's figures of every case."""
    found: dict[Case, dict[str, list[int]]] = {}
    for cards in (1, 2):
        group = [case for case in CASES if len(case.use.split) == cards]
        told = [case.told(folder / f"{case.model}.gguf") for case in group]
        found.update(zip(group, accounts(told, cards), strict=True))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model} {changes(case.use)}")
def test_the_plan_counts_as_llama_cpp_does(case: Case, folder: Path, counted: dict[Case, dict[str, list[int]]]) -> None:
    with (folder / f"{case.model}.gguf").open("rb") as file:
        memory = memory_of(facts_of(read_header(file.read)), case.use)
    theirs = counted[case]
    for card, ours in enumerate(memory.cards):
        assert ours / MIB == near(sum(theirs[f"GPU{card}"])), f"card {card}: {memory}"
    assert memory.device == sum(memory.cards)
    host = (memory.host_weights + memory.host_cache + memory.host_compute) / MIB
    assert host == near(sum(theirs["Host"])), memory


def near(theirs: int) -> Any:
    return pytest.approx(theirs, abs=MIB_OFF, rel=SHARE_OFF)


def changes(use: Use) -> str:
    """What of a use is not as usual."""
    usual = Use(use.slots, use.context, use.batch, use.ubatch)
    names = [name for name in Use.__slots__ if getattr(use, name) != getattr(usual, name)]
    return f"{use.slots}x{use.context} {' '.join(names)}"
