"""Chat servers with vLLM: one for each replica, on one NVIDIA card or split over several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corral.components import Stage
from corral.components.llama import facts_of, has_private_cache, keys_for, labels_of, published_at
from corral.components.nodes import WITHOUT_THINKING
from corral.config.client_names import adapter_name
from corral.contributions import (
    Backend,
    ConfigMount,
    Contribution,
    Contributions,
    Endpoint,
    File,
    Health,
    Port,
    Rules,
    ScrapeTarget,
    Service,
)
from corral.plan.devices import access, claims
from corral.plan.site import Replica, Site

STAGE = Stage.BACKENDS
COMPONENT = "vllm"
IMAGE = "vllm/vllm-openai:v0.33.0"
API_KEY = "VLLM_API_KEY"
START = "/etc/corral/start.sh"
# Where it keeps what it compiled.
HOME = "/var/lib/vllm"
# For each card: through it the processes of a server that is split over cards talk to each other.
SHARED_MEMORY_MIB = 1024
PROTECTION = "the key VLLM_API_KEY below /v1; vLLM asks for none at /invocations and /tokenize"
ROOT = "vLLM's image has no other user, and its volume belongs to root"
WRITES = "vLLM's compilers write beside their code"


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service, a backend and a scrape target for every replica, and the key that protects them."""
    replicas = [replica for replica in site.replicas if replica.weights.server == "vllm"]
    yield from keys_for(site, replicas, API_KEY, "opens the vLLM servers for the gateway")
    if replicas:
        yield Rules("monitoring/rules/vllm.yml")
    for host in sorted({replica.host for replica in replicas}):
        yield File(host, COMPONENT, "start.sh", asset="gpu-server/vllm/start.sh")
    for replica in replicas:
        endpoint = Endpoint(replica.port, replica.host, replica.service)
        thinking = site.inventory.pools[replica.pool].thinking or "hidden"
        names = [adapter_name(replica.pool, adapter) for adapter in replica.weights.adapters]
        yield _service(site, replica)
        yield Backend(
            replica.pool,
            replica.container,
            replica.kind,
            endpoint,
            replica.slots,
            replica.pool,
            "/health",
            secret=API_KEY,
            parameters=WITHOUT_THINKING["vllm"] if thinking == "off" else {},
            hides_thoughts=thinking != "shown",
            cache_field="cache_salt" if has_private_cache(site, replica) else "",
            adapters={name: {"model": name} for name in names},
        )
        yield ScrapeTarget("vllm", endpoint, labels_of(replica))  # its figures need no key
        yield from facts_of(replica)


def arguments(site: Site, replica: Replica) -> tuple[str, ...]:
    """What `vllm serve` is told; everything that it would choose by itself is said."""
    engine, weights = replica.engine, replica.weights
    words: list[Any] = [
        _place(site, replica, weights.source),
        "--served-model-name", replica.pool,
        "--host", "0.0.0.0",  # noqa: S104 - inside the container's own network
        "--port", replica.port,
        "--max-model-len", weights.context,
        "--max-num-seqs", replica.slots,
        "--tensor-parallel-size", len(replica.cards),
        "--gpu-memory-utilization", engine.gpu_memory_fraction,
    ]  # fmt: skip
    if weights.adapters:
        words += ["--enable-lora", "--max-loras", engine.adapters_at_once, "--max-lora-rank", engine.adapter_rank]
        words.append("--lora-modules")
        words += [
            f"{adapter_name(replica.pool, adapter)}={_place(site, replica, adapter.source)}"
            for adapter in weights.adapters
        ]
    return (*map(str, words), *(engine.extra_args or ()))


def _place(site: Site, replica: Replica, source: str) -> str:
    """The path in the container of a folder, or of the one that `models pull` makes of a repository."""
    return site.model_path(replica.host, replica.weights.folder(source))


def _image(site: Site, replica: Replica) -> str:
    return replica.engine.image or site.image(COMPONENT, IMAGE)


def is_pinned(site: Site, replica: Replica) -> bool:
    """Whether a replica runs the vLLM that the kit pins, whose flags are known."""
    return IMAGE.rpartition(":")[2] in _image(site, replica)


def _service(site: Site, replica: Replica) -> Service:
    engine, cards = replica.engine, access(site, replica)
    return Service(
        host=replica.host,
        component=COMPONENT,
        name=replica.service,
        container=replica.container,
        role=replica.kind,
        image=_image(site, replica),
        program="vllm",
        entrypoint=("/bin/sh", START),
        args=arguments(site, replica),
        health=Health(
            replica.port,
            "/health",
            ("curl", "-fsS", f"http://localhost:{replica.port}/health"),
            replica.start_timeout_s,
        ),
        memory_mib=replica.memory_mib,
        memory_swap_mib=engine.memory_swap_mib or 0,
        environment={
            "CORRAL_API_KEY_FILE": site.secret_path(replica.host, API_KEY),
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{HOME}/huggingface",
            "VLLM_CACHE_ROOT": f"{HOME}/vllm",
            "VLLM_NO_USAGE_STATS": "1",
            **cards.environment,
            **(engine.environment or {}),
        },
        secrets=(API_KEY,),
        ports=(Port(replica.port, published_at(site, replica), PROTECTION),),
        mounts=((site.host(replica.host).models_dir, "/models"),),
        volumes=((f"{replica.service}-cache", HOME),),
        configs=(ConfigMount("start.sh", START),),
        network="servers-vllm",
        gpus=claims(replica),
        devices=cards.devices,
        groups=cards.groups,
        tmpfs=("/tmp:size=1024m",),  # noqa: S108 - a path in the container
        shm_mib=SHARED_MEMORY_MIB * len(replica.cards),
        read_only=False,
        pids=4096,
        stop_grace_s=30,
        exceptions={
            "non-root": ROOT,
            "read-only": WRITES,
            **cards.exceptions,
        },
    )
