"""What must hold for image servers."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.image import COMPONENT
from corral.components.serving import one_of_each_sort
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.own_image import build_command
from corral.plan.site import Site


@check("plan", "no-avx")
def _no_avx(site: Site, _found: Contributions) -> Iterator[Finding]:
    """LocalAI on the CPU needs AVX; llama.cpp's images bring code for processors without it."""
    for replica in one_of_each_sort(site, COMPONENT):
        is_stock = not replica.engine.image and "localai-cpu" not in site.inventory.images
        if is_stock and not replica.cards and not site.host(replica.host).cpu.avx:
            hint = (
                "put it on a card, or set engine.image to a LocalAI built for this processor "
                f"(llama.cpp is built for it by: {build_command()}; that draws no pictures)"
            )
            yield Finding(f"{replica.host} has no AVX, which LocalAI needs", ("pools", replica.pool, "on"), hint)
