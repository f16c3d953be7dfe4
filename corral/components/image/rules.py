"""What must hold for image servers; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.components.image import COMPONENT, GGML, family_of
from corral.components.serving import one_of_each_sort
from corral.config.file_names import file_of
from corral.config.inventory import Inventory
from corral.contributions import Contributions
from corral.plan.own_image import build_command
from corral.plan.site import Site

TEXTS = Texts.beside(__file__)


@TEXTS.check("plan", "no-avx")
def _no_avx(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site, COMPONENT):
        is_stock = not replica.engine.image and "localai-cpu" not in site.inventory.images
        is_broken = is_stock and not replica.cards and not site.host(replica.host).cpu.avx
        values = {"host": replica.host, "build": build_command()}
        yield from TEXTS.broken(("pools", replica.pool), (is_broken, "no-avx/stock", "on"), **values)


@TEXTS.check("inventory", "picture-file")
def _picture_file(inventory: Inventory) -> Findings:
    for name, model in inventory.models.items():
        is_image, is_file, is_ggml = model.kind == "image", model.reads_files, (model.backend or "").endswith(GGML)
        parts = family_of(model).get("files", []) if is_image and is_file else []
        is_part = not model.components and file_of(model.source).lower().endswith(".gguf")
        yield from TEXTS.broken(
            ("models", name),
            (model.components and not (is_image and is_file), "picture-file/components", "components"),
            (is_image and not is_file and is_ggml, "picture-file/repository", "backend"),
            (is_image and is_file and model.backend and not is_ggml, "picture-file/other", "backend"),
            (is_image and is_file and model.pipeline, "picture-file/pipeline", "pipeline"),
            (parts and is_part, "picture-file/parts", "source"),
            ggml=GGML, backend=model.backend, example=", ".join(f"{part}: …" for part in parts),
        )  # fmt: skip
