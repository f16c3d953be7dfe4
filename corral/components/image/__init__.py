"""Image servers: LocalAI with one model each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from corral.components import Stage
from corral.components.llama import facts_of, keys_for, labels_of, published_at
from corral.config.inventory import Weights
from corral.contributions import (
    Backend,
    ConfigMount,
    Contribution,
    Contributions,
    CpuVariant,
    Endpoint,
    File,
    Health,
    Port,
    Rules,
    ScrapeTarget,
    Service,
    State,
)
from corral.plan.devices import access, backend_of, claims
from corral.plan.own_image import has_backend
from corral.plan.site import Replica, Site, memory_on_cpu_mib

STAGE = Stage.BACKENDS
COMPONENT = "image"
API_KEY = "LOCALAI_API_KEY"
IMAGES = {
    "localai-cuda12": "localai/localai:v4.9.0-gpu-nvidia-cuda-12",
    "localai-cuda13": "localai/localai:v4.9.0-gpu-nvidia-cuda-13",
    "localai-rocm": "localai/localai:v4.9.0-gpu-hipblas",
    "localai-intel": "localai/localai:v4.9.0-gpu-intel",
    "localai-cpu": "localai/localai:v4.9.0",
}
# LocalAI's names of its backends; with plain `diffusers` it chooses itself: Intel's was renamed between versions.
BACKENDS = {
    "localai-cuda12": "cuda12-diffusers",
    "localai-cuda13": "cuda13-diffusers",
    "localai-rocm": "rocm-diffusers",
    "localai-intel": "diffusers",
    "localai-cpu": "cpu-diffusers",
}
ROOT = "LocalAI's image has no other user, and its volumes belong to root"
WRITES = "LocalAI's Python backends write beside their code and into their user's home"
# Volumes worth a backup, and why; what is in the others is downloaded again.
KEPT = {"configuration": "settings made in LocalAI", "data": "what LocalAI keeps of its use"}
VOLUMES = {"backends": "/backends", "configuration": "/configuration", "data": "/data"}
GENERATED = "/tmp/generated/content"  # noqa: S108 - a path in the container, gone when it stops
# Request that loads the model into the card before the first client request: a small image with one step.
FIRST_PICTURE = {"prompt": "a lighthouse", "size": "512x512", "step": 1}
DOWNLOADS = "LocalAI's own image fetches its backend when it first starts"
MODELS = "/models"
WEIGHTS = "/weights"
# Where LocalAI looks for backends that its image brings.
BUILT_IN = "/var/lib/local-ai/backends"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service with its model file and start script, and a backend, for every image replica."""
    replicas = [replica for replica in site.replicas if replica.kind == "image"]
    yield from keys_for(site, replicas, API_KEY, "opens the image servers for the gateway and Prometheus")
    if replicas:
        yield Rules("monitoring/rules/localai.yml")
    for replica in replicas:
        endpoint = Endpoint(replica.port, replica.host, replica.service)
        yield from _files(replica)
        yield _service(site, replica)
        for name, purpose in KEPT.items():
            volume = f"{replica.service}-{name}"
            yield State(replica.host, replica.service, name, purpose, volume, VOLUMES[name])
        yield Backend(
            replica.pool,
            replica.container,
            replica.kind,
            endpoint,
            replica.slots,
            replica.pool,
            "/readyz",
            secret=API_KEY,
            parameters={"response_format": "b64_json"},  # LocalAI's default is an address that only its own host knows
        )
        yield ScrapeTarget("localai", endpoint, labels_of(replica), secret=API_KEY)
        yield from facts_of(replica)


def _image_key(replica: Replica) -> str:
    """Key of the image; its diffusers know no Vulkan, so that a card gets its maker's own build."""
    backend = backend_of(replica)
    if backend == "vulkan":
        backend = "rocm" if replica.cards[0].vendor == "amd" else "intel"
    return f"localai-{backend}"


def _files(replica: Replica) -> Iterator[File]:
    yield File(
        replica.host,
        COMPONENT,
        f"{replica.service}.yaml",
        data=_model(replica, is_on_gpu=bool(replica.cards)),
        note=f"LocalAI's model file of {replica.service}",
    )
    if replica.cards:
        yield File(
            replica.host,
            COMPONENT,
            f"{replica.service}.cpu.yaml",
            data=_model(replica, is_on_gpu=False),
            note=f"LocalAI's model file of {replica.service} on a machine without cards",
        )
    yield File(replica.host, COMPONENT, "start.sh", asset="gpu-server/image/start.sh")


def _model(replica: Replica, *, is_on_gpu: bool) -> dict[str, Any]:
    """LocalAI's model file."""
    weights = replica.weights
    diffusers = {
        "cuda": is_on_gpu,
        "pipeline_type": weights.pipeline or "StableDiffusionXLPipeline",
        "scheduler_type": weights.scheduler or "k_dpmpp_2m",
    }
    model: dict[str, Any] = {
        "name": replica.pool,
        "backend": weights.backend or "diffusers",
        "parameters": {"model": _model_of(weights)},
        "f16": is_on_gpu,
        "step": weights.steps or 20,
        "diffusers": diffusers,
    }
    return model


def image_of(site: Site, replica: Replica) -> str:
    """The image that a replica runs."""
    key = _image_key(replica)
    return replica.engine.image or site.image(key, IMAGES[key])


def _model_of(weights: Weights) -> str:
    """A repository's name, which is found in the Hub cache; a folder's or file's path."""
    is_repository = weights.source in weights.repositories
    return weights.source.removeprefix("hf:") if is_repository else f"{WEIGHTS}/{weights.source}"


def _service(site: Site, replica: Replica) -> Service:
    engine, cards = replica.engine, access(site, replica)
    image = image_of(site, replica)
    variant = _cpu_variant(site, replica)
    is_complete = has_backend(image) and (variant is None or has_backend(variant.image))
    return Service(
        host=replica.host,
        component=COMPONENT,
        name=replica.service,
        container=replica.container,
        role=replica.kind,
        image=image,
        program="local-ai",
        entrypoint=("/bin/sh", site.config_path(replica.host, COMPONENT, "start.sh", "/etc/corral/start.sh")),
        health=Health(
            replica.port,
            "/readyz",
            ("curl", "-fsS", f"http://localhost:{replica.port}/readyz"),
            engine.start_timeout_s or 1800,
        ),
        memory_mib=replica.memory_mib,
        memory_swap_mib=engine.memory_swap_mib or 0,
        environment={
            "CORRAL_BACKEND": "" if has_backend(image) else BACKENDS[_image_key(replica)],
            "CORRAL_MODEL_FILE": f"{replica.service}.yaml",
            **_weights(replica),
            "CORRAL_FIRST_PICTURE": json.dumps({"model": replica.pool, **FIRST_PICTURE}),
            "CORRAL_API_KEY_FILE": site.secret_path(replica.host, API_KEY),
            "LOCALAI_ADDRESS": f":{replica.port}",
            "LOCALAI_MODELS_PATH": MODELS,
            "LOCALAI_BACKENDS_PATH": "/backends",
            "LOCALAI_BACKENDS_SYSTEM_PATH": BUILT_IN,
            "LOCALAI_GENERATED_CONTENT_PATH": GENERATED,
            "LOCALAI_THREADS": str(engine.threads or 2),
            "LOCALAI_MAX_ACTIVE_BACKENDS": "1",
            **cards.environment,
            **(engine.environment or {}),
        },
        secrets=(API_KEY,),
        ports=(Port(replica.port, published_at(site, replica), "the key LOCALAI_API_KEY"),),
        configs=(
            ConfigMount("start.sh", "/etc/corral/start.sh"),
            ConfigMount(f"{replica.service}.yaml", f"/etc/corral/{replica.service}.yaml"),
        ),
        mounts=((site.host(replica.host).models_dir, WEIGHTS),),
        volumes=tuple((f"{replica.service}-{name}", path) for name, path in VOLUMES.items()),
        tmpfs=("/tmp:size=64m", f"{MODELS}:size=16m"),  # noqa: S108 - paths in the container
        network="servers-image",
        gpus=claims(replica),
        devices=cards.devices,
        groups=cards.groups,
        cpu_variant=variant,
        read_only=False,
        pids=1024,
        exceptions={
            "non-root": ROOT,
            "read-only": WRITES,
            **({} if is_complete else {"way-out": DOWNLOADS}),
            **cards.exceptions,
        },
    )


def _weights(replica: Replica) -> dict[str, str]:
    """Where the weights lie: for a repository what makes a Hub cache of the folder that `models pull` filled."""
    weights = replica.weights
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": f"{MODELS}/.hub"}
    if weights.source not in weights.repositories:
        return offline
    return {
        **offline,
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
