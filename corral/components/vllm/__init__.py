"""Chat servers with vLLM: one for each replica, on one NVIDIA card or split over several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corral.components import Stage
from corral.components.serving import Trouble, has_private_cache, keys_for, replicas_of, served, server
from corral.components.vllm import flags
from corral.config.client_names import adapter_name
from corral.contributions import Contribution, Contributions, File, Rules, Service
from corral.plan.site import Replica, Site

STAGE = Stage.BACKENDS
COMPONENT = "vllm"
IMAGE = "vllm/vllm-openai:v0.33.0"
API_KEY = "VLLM_API_KEY"
# For each card.
SHARED_MEMORY_MIB = 1024
WITHOUT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service, a backend and a scrape target for every replica, and the key that protects them."""
    replicas = replicas_of(site, COMPONENT)
    yield from keys_for(site, replicas, API_KEY, "opens the vLLM servers for the gateway")
    if replicas:
        yield Rules("monitoring/rules/vllm.yml")
    for host in sorted({replica.host for replica in replicas}):
        yield File(host, COMPONENT, "start.sh", asset="gpu-server/vllm/start.sh")
    for replica in replicas:
        thinking = site.inventory.pools[replica.pool].thinking or "hidden"
        names = [adapter_name(replica.pool, adapter) for adapter in replica.weights.adapters]
        yield _service(site, replica)
        yield from served(
            replica,
            "/health",
            API_KEY,
            "vllm",
            parameters=WITHOUT_THINKING if thinking == "off" else {},
            hides_thoughts=thinking != "shown",
            cache_field="cache_salt" if has_private_cache(site, replica) else "",
            adapters={name: {"model": name} for name in names},
            scrape_secret="",  # its metrics need no key
        )


def extra_args_troubles(site: Site, replica: Replica) -> Iterator[Trouble]:
    """What is wrong with a replica's `extra_args`."""
    words = replica.engine.extra_args or ()
    is_pinned = IMAGE.rpartition(":")[2] in _image(site, replica)
    return flags.troubles(words, rendered=arguments(site, replica)[: -len(words)], is_pinned=is_pinned)


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
    return site.model_path(replica.host, replica.folder_of(source))


def _image(site: Site, replica: Replica) -> str:
    return replica.engine.image or site.image(COMPONENT, IMAGE)


def _service(site: Site, replica: Replica) -> Service:
    fields = {"image": _image(site, replica), "args": arguments(site, replica)}
    return server(site, replica, fields, shm_mib=SHARED_MEMORY_MIB * len(replica.cards))
