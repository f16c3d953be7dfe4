"""Image servers: LocalAI with one model each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from corral.components import Stage
from corral.components.serving import keys_for, replicas_of, served, server
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
    weights = replica.weights
    return {
        "name": replica.pool,
        "backend": weights.backend or "diffusers",
        "parameters": {"model": _model_of(weights)},
        "f16": is_on_gpu,
        "step": weights.steps or 20,
        "diffusers": {
            "cuda": is_on_gpu,
            "pipeline_type": weights.pipeline or "StableDiffusionXLPipeline",
            "scheduler_type": weights.scheduler or "k_dpmpp_2m",
        },
    }


def image_of(site: Site, replica: Replica) -> str:
    """The image that a replica runs."""
    key = _image_key(replica)
    return replica.engine.image or site.image(key, IMAGES[key])


def complete_image(image: str) -> str:
    """What to type to put into an image what it would fetch when it starts; empty when it has all."""
    return "" if has_backend(image) else pictures_command(image)


def _model_of(weights: Model) -> str:
    """A repository's name, which is found in the Hub cache; a folder's or file's path."""
    is_repository = weights.source in weights.repositories
    return weights.source.removeprefix("hf:") if is_repository else f"{WEIGHTS}/{weights.source}"


def _service(site: Site, replica: Replica) -> Service:
    image, variant = image_of(site, replica), _cpu_variant(site, replica)
    is_complete = has_backend(image) and (variant is None or has_backend(variant.image))
    environment = {"CORRAL_BACKEND": "" if has_backend(image) else BACKENDS[_image_key(replica)], **_weights(replica)}
    return server(
        site,
        replica,
        {"image": image, "cpu_variant": variant},
        environment=environment,
        first_picture=json.dumps({"model": replica.pool, **FIRST_PICTURE}),
        threads=str(replica.engine.threads or 2),
        way_out={} if is_complete else {"way-out": DOWNLOADS},
    )


def _weights(replica: Replica) -> dict[str, str]:
    """Where the weights lie: for a repository what makes a Hub cache of the folder that `models pull` filled."""
    weights = replica.weights
    if weights.source not in weights.repositories:
        return {}
    return {
        "CORRAL_REPOSITORY": weights.source.removeprefix("hf:"),
        "CORRAL_WEIGHTS": f"{WEIGHTS}/{weights.folder(weights.source)}",
    }


def _cpu_variant(site: Site, replica: Replica) -> CpuVariant | None:
    if not replica.cards:
        return None
    key = "localai-cpu"
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
