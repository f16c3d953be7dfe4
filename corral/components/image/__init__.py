"""Image servers: LocalAI with one model each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from corral.components import Stage
from corral.components.serving import keys_for, replicas_of, served, server
from corral.config.file_names import file_of
from corral.config.inventory import Model
from corral.contributions import ConfigMount, Contribution, Contributions, CpuVariant, File, Rules, Service, State
from corral.declarations import declaration
from corral.plan.devices import backend_of, makers_build
from corral.plan.own_image import has_backend, pictures_command
from corral.plan.site import Replica, Site, memory_on_cpu_mib

STAGE = Stage.BACKENDS
COMPONENT = "image"
API_KEY = "LOCALAI_API_KEY"
IMAGES: dict[str, str] = declaration(COMPONENT)["images"]
BACKENDS: dict[str, str] = declaration(COMPONENT)["backends"]
# Volumes worth a backup, and why; what is in the others is downloaded again.
KEPT = {"configuration": "settings made in LocalAI", "data": "what LocalAI keeps of its use"}
# Request that loads the model into the card before the first client request: a small image with one step.
FIRST_PICTURE = {"prompt": "a lighthouse", "size": "512x512", "step": 1}
DOWNLOADS = "LocalAI's own image fetches its backend when it first starts"
WEIGHTS = "/weights"
FAMILIES: list[dict[str, Any]] = declaration(COMPONENT)["families"]
# LocalAI's backend for single files, which diffusers reads only with a configuration from the Hub.
GGML = "stablediffusion-ggml"
# Scale of the prompt's influence where a family has none of its own.
CFG_SCALE = 7


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service with its model file and start script, and a backend, for every image replica."""
    replicas = replicas_of(site, COMPONENT)
    yield from keys_for(site, replicas, API_KEY, "opens the image servers for the gateway and Prometheus")
    if replicas:
        yield Rules("monitoring/rules/localai.yml")
    for replica in replicas:
        yield from _files(replica)
        yield _service(site, replica)
        for name, purpose in KEPT.items():
            yield State(replica.host, replica.service, name, purpose, f"{replica.service}-{name}", f"/{name}")
        # LocalAI's default for pictures is an address that only its own host knows.
        own = {"response_format": "b64_json"}
        yield from served(replica, "/readyz", API_KEY, "localai", parameters=own)


def _image_key(replica: Replica) -> str:
    """Key of the image; its diffusers know no Vulkan, so that a card gets its maker's own build."""
    backend = backend_of(replica)
    if replica.weights.reads_files:
        return f"localai-ggml-{'vulkan' if backend == 'rocm' else backend}"
    return f"localai-{makers_build(replica.cards) if backend == 'vulkan' else backend}"


def _files(replica: Replica) -> Iterator[File]:
    name = replica.service
    sorts = [(f"{name}.yaml", bool(replica.cards), f"LocalAI's model file of {name}")]
    if replica.cards:
        sorts.append((f"{name}.cpu.yaml", False, f"LocalAI's model file of {name} on a machine without cards"))
    for file, is_on_gpu, note in sorts:
        yield File(replica.host, COMPONENT, file, data=_model(replica, is_on_gpu=is_on_gpu), note=note)
    yield File(replica.host, COMPONENT, "start.sh", asset="gpu-server/image/start.sh")


def _model(replica: Replica, *, is_on_gpu: bool) -> dict[str, Any]:
    """LocalAI's model file."""
    weights, family = replica.weights, family_of(replica.weights)
    cfg_scale = family.get("cfg_scale", CFG_SCALE if weights.reads_files else None)
    has_type = is_on_gpu and "type" in family and not weights.reads_files
    diffusers = {
        "cuda": is_on_gpu,
        "pipeline_type": weights.pipeline or family["pipeline"],
        "scheduler_type": weights.scheduler or family.get("scheduler"),
    }
    found: dict[str, Any] = {
        "name": replica.pool,
        "backend": weights.backend or (GGML if weights.reads_files else "diffusers"),
        "parameters": {"model": _model_of(weights)},
        "f16": None if weights.reads_files else is_on_gpu and not has_type,
        "step": weights.steps or family["steps"],
        "cfg_scale": cfg_scale,
        "options": _parts(weights) if weights.reads_files else [f"torch_dtype:{family['type']}"] if has_type else None,
        "diffusers": None
        if weights.reads_files
        else {key: told for key, told in diffusers.items() if told is not None},
    }
    return {name: value for name, value in found.items() if value is not None}


def _parts(weights: Model) -> list[str]:
    """Options for a model from single files: what draws, and where its parts are."""
    paths = [f"{role}_path:{_link(role, source)}" for role, source in weights.components.items()]
    # Without it the file is taken for a checkpoint that has all parts in it.
    is_part = not {"t5xxl", "llm"}.isdisjoint(weights.components)
    return [*(["diffusion_model"] if is_part else []), *paths, f"sampler:{weights.scheduler or 'euler'}"]


def family_of(weights: Model) -> dict[str, Any]:
    """What is known of models of this kind, by the words of its source, or else by the pipeline that it names."""
    name = weights.source.removeprefix("hf:")
    by_pipeline = (item for item in FAMILIES if weights.pipeline and item["pipeline"] == weights.pipeline)
    by_name = next(item for item in FAMILIES if re.search(item["words"], name, re.IGNORECASE))
    return by_name if by_name["words"] or not weights.pipeline else next(by_pipeline, by_name)


def complete_image(service: Service, image: str) -> str:
    """What to type to put into an image of a service what it would fetch when it starts; empty when it has all."""
    backend = GGML if service.environment["CORRAL_BACKEND"].endswith(GGML) else "diffusers"
    return "" if has_backend(image) else pictures_command(image, backend)


def _model_of(weights: Model) -> str:
    """A repository's name, which is found in the Hub cache; the name of a link to a folder or file."""
    is_repository = weights.source in weights.repositories
    return weights.source.removeprefix("hf:") if is_repository else _link("model", weights.source)


def _link(role: str, source: str) -> str:
    """Name of the link in LocalAI's folder for a file (with its ending, by which it is read) or folder."""
    return f"{role}{PurePosixPath(file_of(source)).suffix}"


def _links(site: Site, replica: Replica) -> str:
    """What LocalAI finds in its own folder, outside of which it takes nothing for a local file; a line for each."""
    weights = replica.weights
    if weights.source in weights.repositories:
        return ""
    roles = [("model", weights.source), *weights.components.items()]
    known = {source: file for file, source in replica.files.items()}
    paths = {source: _weights_path(site, replica, known.get(source, source)) for _, source in roles}
    return "\n".join(f"{_link(role, source)}={paths[source]}" for role, source in roles)


def _weights_path(site: Site, replica: Replica, file: str) -> str:
    path = site.model_path(replica.host, file)
    return path if file.startswith("/") else f"{WEIGHTS}{path.removeprefix('/models')}"


def _service(site: Site, replica: Replica) -> Service:
    key, variant = _image_key(replica), _cpu_variant(site, replica)
    image = replica.engine.image or site.image(key, IMAGES[key])
    is_complete = has_backend(image) and (variant is None or has_backend(variant.image))
    environment = {
        "CORRAL_BACKEND": "" if has_backend(image) else BACKENDS[key],
        **_weights(site, replica),
    }
    return server(
        site,
        replica,
        {"image": image, "cpu_variant": variant},
        environment=environment,
        files=_links(site, replica) or None,
        first_picture=json.dumps({"model": replica.pool, **FIRST_PICTURE}),
        threads=str(replica.engine.threads or 2),
        way_out={} if is_complete else {"way-out": DOWNLOADS},
    )


def _weights(site: Site, replica: Replica) -> dict[str, str]:
    """Where the weights lie: for a repository what makes a Hub cache of the folder that `models pull` filled."""
    weights = replica.weights
    if weights.source not in weights.repositories:
        return {}
    return {
        "CORRAL_REPOSITORY": weights.source.removeprefix("hf:"),
        "CORRAL_WEIGHTS": _weights_path(site, replica, replica.folder_of(weights.source)),
    }


def _cpu_variant(site: Site, replica: Replica) -> CpuVariant | None:
    if not replica.cards:
        return None
    key = "localai-ggml-cpu" if replica.weights.reads_files else "localai-cpu"
    image = site.image(key, IMAGES[key])
    return CpuVariant(
        image,
        max(replica.memory_mib, memory_on_cpu_mib(replica)),
        {
            "CORRAL_BACKEND": "" if has_backend(image) else BACKENDS[key],
            "CORRAL_MODEL_FILE": f"{replica.service}.cpu.yaml",
        },
        (ConfigMount(f"{replica.service}.cpu.yaml", f"/etc/corral/{replica.service}.cpu.yaml"),),
    )
