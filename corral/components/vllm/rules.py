"""What must hold for models that vLLM serves, and for its servers."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.serving import one_of_each_sort
from corral.components.vllm import COMPONENT
from corral.config.inventory import Inventory, Model
from corral.contributions import Contributions
from corral.errors import Finding, KeyPath
from corral.plan.site import Site

# Compute capability for which vLLM's images have code.
VLLM_FLOOR = (7, 5)


@check("inventory", "vllm-model")
def _vllm_model(inventory: Inventory) -> Iterator[Finding]:
    """With `server: vllm` a chat model and its adapters come from a repository or a folder; it has no draft."""
    for name, model in inventory.models.items():
        if model.served_by.component == COMPONENT:
            yield from _model_problems(model, ("models", name))


def _model_problems(model: Model, path: KeyPath) -> Iterator[Finding]:
    if model.kind != "chat":
        yield Finding(f"vLLM serves no {model.kind} models here", (*path, "server"), "remove server: vllm")
    if model.projector is not None:
        words = "vLLM reads images with what is in the model's own repository"
        yield Finding(words, (*path, "projector"), "remove projector")
    if model.draft is not None:
        yield Finding("vLLM has no draft model here", (*path, "draft"), "remove draft, or use llama.cpp")
    for key, source in (("source", model.source), *(("adapters", adapter.source) for adapter in model.adapters)):
        scheme, _, rest = source.rpartition(":")
        if scheme not in ("", "hf") or source.endswith(".gguf") or (scheme and rest.count("/") > 1):
            hint = "write hf:owner/repo, or the name of a folder in the models folder"
            yield Finding("vLLM reads a repository, not a file", (*path, key), hint)
    for index, adapter in enumerate(model.adapters):
        if adapter.scale != 1:
            place = (*path, "adapters", index, "scale")
            yield Finding("vLLM has no scale for adapters", place, "remove scale")


@check("plan", "vllm-card")
def _vllm_card(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A vLLM server is on NVIDIA cards that vLLM has code for, and its weights are smaller than its share of them."""
    for replica in one_of_each_sort(site, COMPONENT):
        old = next((card for card in replica.cards if (card.compute_capability or VLLM_FLOOR) < VLLM_FLOOR), None)
        weights_mib = round((replica.weights.size_gib or 0) * 1024)
        path: KeyPath = ("pools", replica.pool, "on")
        if not replica.cards or any(card.vendor != "nvidia" for card in replica.cards):
            hint = "name cards of NVIDIA, or serve a GGUF file with llama.cpp: remove server: vllm"
            yield Finding("vLLM runs on NVIDIA cards only here", path, hint)
        elif old is not None:
            words = f"{old.card} has compute capability {'.'.join(map(str, old.compute_capability or ()))}"
            least = ".".join(map(str, VLLM_FLOOR))
            yield Finding(f"{words}, and vLLM wants {least}", path, "serve a GGUF file with llama.cpp there")
        elif weights_mib > replica.vram_mib:
            words = f"the weights take {weights_mib} MiB, and vLLM's share of its cards is {replica.vram_mib}"
            yield Finding(words, path, "split it over more cards (gpus_per_replica), or raise gpu_memory_fraction")
