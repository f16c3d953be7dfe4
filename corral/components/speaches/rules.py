"""What must hold for models that speaches serves, and for its servers; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.components.serving import one_of_each_sort
from corral.components.speaches import COMPONENT
from corral.config.inventory import Inventory
from corral.contributions import Contributions
from corral.plan.site import Site

TEXTS = Texts.beside(__file__)


@TEXTS.check("inventory", "speaches-model")
def _speaches_model(inventory: Inventory) -> Findings:
    for name, model in inventory.models.items():
        if model.served_by.component == COMPONENT:
            yield from TEXTS.first(
                ("models", name),
                (model.kind not in ("transcription", "speech"), "speaches-model/kind", "server"),
                (
                    model.source not in model.repositories or model.source.count("/") != 1,
                    "speaches-model/file",
                    "source",
                ),
                kind=model.kind,
            )


@TEXTS.check("plan", "speaches-card")
def _speaches_card(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site, COMPONENT):
        is_other = len(replica.cards) > 1 or any(card.vendor != "nvidia" for card in replica.cards)
        yield from TEXTS.broken(("pools", replica.pool), (is_other, "speaches-card/other", "on"))
