"""What must hold for models that vLLM serves, and for its servers; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.components.serving import one_of_each_sort
from corral.components.vllm import COMPONENT
from corral.config.inventory import Inventory, Model
from corral.contributions import Contributions
from corral.errors import KeyPath
from corral.plan.site import Site

# Compute capability for which vLLM's images have code.
VLLM_FLOOR = (7, 5)
TEXTS = Texts.beside(__file__)


@TEXTS.check("inventory", "vllm-model")
def _vllm_model(inventory: Inventory) -> Findings:
    for name, model in inventory.models.items():
        if model.served_by.component == COMPONENT:
            yield from _model_problems(model, ("models", name))


def _model_problems(model: Model, path: KeyPath) -> Findings:
    yield from TEXTS.broken(
        path,
        (model.kind != "chat", "vllm-model/kind", "server"),
        (model.projector is not None, "vllm-model/projector", "projector"),
        (model.draft is not None, "vllm-model/draft", "draft"),
        kind=model.kind,
    )
    for key, source in (("source", model.source), *(("adapters", adapter.source) for adapter in model.adapters)):
        scheme, _, rest = source.rpartition(":")
        is_file = scheme not in ("", "hf") or source.endswith(".gguf") or (scheme and rest.count("/") > 1)
        yield from TEXTS.broken(path, (is_file, "vllm-model/file", key))
    for index, adapter in enumerate(model.adapters):
        yield from TEXTS.broken((*path, "adapters", index), (adapter.scale != 1, "vllm-model/scale", "scale"))


@TEXTS.check("plan", "vllm-card")
def _vllm_card(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site, COMPONENT):
        old = next((card for card in replica.cards if (card.compute_capability or VLLM_FLOOR) < VLLM_FLOOR), None)
        weights_mib = round((replica.weights.size_gib or 0) * 1024)
        is_foreign = not replica.cards or any(card.vendor != "nvidia" for card in replica.cards)
        yield from TEXTS.first(
            ("pools", replica.pool, "on"),
            (is_foreign, "vllm-card/foreign", ""),
            (old, "vllm-card/old", ""),
            (weights_mib > replica.vram_mib, "vllm-card/full", ""),
            card=old and old.card, capability=".".join(map(str, (old and old.compute_capability) or ())),
            least=".".join(map(str, VLLM_FLOOR)), weights_mib=weights_mib, share_mib=replica.vram_mib,
        )  # fmt: skip
