"""What must hold for models that speaches serves, and for its servers."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.serving import one_of_each_sort
from corral.components.speaches import COMPONENT
from corral.config.inventory import Inventory
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.site import Site


@check("inventory", "speaches-model")
def _speaches_model(inventory: Inventory) -> Iterator[Finding]:
    """A model for speech comes from a repository that speaches knows; speaches serves nothing else."""
    for name, model in inventory.models.items():
        if model.served_by.component != COMPONENT:
            continue
        if model.kind not in ("transcription", "speech"):
            yield Finding(f"speaches serves no {model.kind} models", ("models", name, "server"), "remove server:")
        elif model.source not in model.repositories or model.source.count("/") != 1:
            hint = "write a repository, such as hf:Systran/faster-whisper-large-v3, and its commit as revision"
            yield Finding("speaches finds models by their repository", ("models", name, "source"), hint)


@check("plan", "speaches-card")
def _speaches_card(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A speech server is on one NVIDIA card, or on the processor."""
    for replica in one_of_each_sort(site, COMPONENT):
        if len(replica.cards) > 1 or any(card.vendor != "nvidia" for card in replica.cards):
            hint = "name single NVIDIA cards, or leave gpus out"
            yield Finding("speaches runs on one NVIDIA card or on the processor", ("pools", replica.pool, "on"), hint)
