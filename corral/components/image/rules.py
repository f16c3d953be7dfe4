"""What must hold for image servers."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.image import COMPONENT, GGML, family_of
from corral.components.serving import one_of_each_sort
from corral.config.file_names import file_of
from corral.config.inventory import Inventory, Model
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


@check("inventory", "picture-file")
def _picture_file(inventory: Inventory) -> Iterator[Finding]:
    """A picture model from files has all its parts and stablediffusion-ggml; pipelines are for repositories."""
    for name, model in inventory.models.items():
        for key, words, remedy in _unsuitable(model):
            yield Finding(words, ("models", name, key), remedy)


def _unsuitable(model: Model) -> Iterator[tuple[str, str, str]]:
    """Key, words and remedy of what has no effect, or does not work, with the model's source."""
    is_ggml = (model.backend or "").endswith(GGML)
    if model.components and not (model.kind == "image" and model.reads_files):
        yield "components", "only a picture model from a file has its other parts in files", "remove it"
    if model.kind != "image":
        return
    if not model.reads_files:
        if is_ggml:
            yield "backend", f"{GGML} reads files, and this is a repository or folder", "name a file as source"
        return
    if model.backend and not is_ggml:
        words = f"{model.backend} reads a single file only with a configuration from the Hub, which is closed here"
        yield "backend", words, f"remove it, so that {GGML} reads the file, or name a repository as source"
    if model.pipeline:
        yield "pipeline", f"{GGML} has no pipelines", "remove it, or name a repository as source"
    parts = family_of(model).get("files", [])
    if parts and not model.components and file_of(model.source).lower().endswith(".gguf"):
        example = ", ".join(f"{part}: …" for part in parts)
        yield (
            "source",
            "this file lacks the parts that read prompts and finish pictures",
            f"add components: {{{example}}}",
        )
