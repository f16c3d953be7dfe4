"""Chat, embedding and rerank servers: one llama-server for each replica (llama.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from corral.components import Stage
from corral.components.llama import flags
from corral.components.serving import Trouble, has_private_cache, keys_for, replicas_of, served, server
from corral.config.client_names import adapter_name
from corral.config.inventory import ServerSettings, Thinking
from corral.contributions import ConfigMount, Contribution, Contributions, CpuVariant, File, Rules, Service
from corral.declarations import declaration
from corral.plan.devices import backend_of, compiles_first, uses_vulkan_on_nvidia
from corral.plan.own_image import BUILD
from corral.plan.settings import checkpoints
from corral.plan.site import Replica, Site, claimed_mib, memory_on_cpu_mib
from corral.plan.sizes import worst

STAGE = Stage.BACKENDS
COMPONENT = "llama"
API_KEY = "LLAMA_API_KEY"

IMAGES: dict[str, str] = declaration(COMPONENT)["images"]
# The watchdog, and where it counts: every user may write there, and a new volume takes that over from the image.
START, STATE = "/etc/corral/start.sh", "/var/tmp"  # noqa: S108 - a path in the container
COUNTS = "llama-restarts"
# Tells Vulkan of NVIDIA's driver, and where it looks for that.
VULKAN_DRIVER, DRIVERS = "corral_nvidia.json", "/etc/vulkan/icd.d"
# What one batch may take on a processor: 2048 tokens of an 8B model, on two slow cores.
LONG_BATCH_S = 900
HTTP = "--threads-http"
# Its own web page is off unless `extra_args` say otherwise; earlier builds know it by this name, too.
NO_PAGE = "--no-webui"
# Settings of the models of a shared server: their path in the container.
PRESETS = "/etc/corral/models.ini"
# What a shared server is told itself; it gives its models names, addresses and what they have in common.
OF_THE_SERVER = ("--alias", "--host", "--port", "--api-key-file", "--offline", "--metrics", NO_PAGE)
# Prometheus asks a shared server for a model's metrics without making it load that model.
ASKED_FOR = {"__param_autoload": "false"}
# HTTP threads besides one for each request: for health, metrics and requests that wait for a model.
SPARE_THREADS = 8
# Threads and processes of a server besides those that compute and those for HTTP; and the least limit.
SPARE_PIDS, LEAST_PIDS = 64, 256


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service, a backend and a scrape target for every replica, and the key that protects them."""
    replicas = replicas_of(site, COMPONENT)
    yield from keys_for(site, replicas, API_KEY, "opens the inference servers for the gateway and Prometheus")
    if replicas:
        yield Rules("monitoring/rules/llama.yml")
    for replica in replicas:
        members = site.members(replica.host, replica.service) if replica.shared else (replica,)
        if replica is members[0]:
            yield _service(site, replica) if not replica.shared else _shared_service(site, members)
            if replica.shared:
                yield _presets(site, members)
            if not site.is_local(replica.host):
                yield File(replica.host, COMPONENT, "start.sh", asset="gpu-server/llama/start.sh")
                if uses_vulkan_on_nvidia(replica):
                    yield File(replica.host, COMPONENT, VULKAN_DRIVER, asset=f"gpu-server/llama/{VULKAN_DRIVER}")
        yield from served(
            replica,
            "/health",
            API_KEY,
            "llama-shared" if replica.shared else "llama",
            hides_thoughts=_leaves_thoughts(site, replica),
            adapters={
                adapter_name(replica.pool, adapter): {"lora": [{"id": number, "scale": adapter.scale}]}
                for number, adapter in enumerate(replica.weights.adapters)
            },
            scrape_labels=ASKED_FOR | {"__param_model": replica.pool} if replica.shared else {},
        )


def extra_args_troubles(site: Site, replica: Replica) -> Iterator[Trouble]:
    """What is wrong with a replica's `extra_args`."""
    words = replica.engine.extra_args or ()
    rendered = arguments(site, replica)[: -len(words)]
    return flags.troubles(words, rendered=rendered, is_pinned=BUILD in _image(site, replica))


def _adapters(site: Site, replica: Replica) -> str:
    """The adapters as `--lora-scaled` has them: loaded, and used only by requests that name one.

    `--lora-init-without-apply` sounds like it and is not: requests that name no adapter then get all of them.
    """
    files = (replica.file_of(adapter.source) for adapter in replica.weights.adapters)
    paths = (site.model_path(replica.host, file) for file in files)
    return ",".join(f"{path}:0" for path in paths)


def _drafting(site: Site, replica: Replica) -> dict[str, Any]:
    """Options of a model for which a small one drafts; without --spec-type the small one would only take memory."""
    draft = replica.weights.draft
    if draft is None:
        return {}
    return {
        "--spec-type": "draft-simple",
        "--spec-draft-model": site.model_path(replica.host, replica.draft_file),
        "--spec-draft-type-k": replica.engine.cache_type,
        "--spec-draft-type-v": replica.engine.cache_type,
        "--spec-draft-ngl": draft.gpu_layers if replica.cards else 0,
        "--spec-draft-n-max": draft.tokens_max,
        "--spec-draft-n-min": draft.tokens_min,
        "--spec-draft-p-min": draft.probability_min,
    }


def _thinking(site: Site, replica: Replica) -> Thinking:
    return site.inventory.pools[replica.pool].thinking or "hidden"


def _leaves_thoughts(site: Site, replica: Replica) -> bool:
    """Whether thoughts have to be taken out of the answers; with a chat template llama-server separates them itself."""
    return replica.kind == "chat" and _thinking(site, replica) != "shown" and not replica.engine.jinja


def _service(site: Site, replica: Replica) -> Service:
    engine = replica.engine
    fields = {
        "image": _image(site, replica),
        "args": arguments(site, replica),
        "cpu_variant": _cpu_variant(site, replica),
        "mlock": bool(engine.mlock),
        "threads": engine.threads or 0,
        "pids": _pids(site, (replica,)),
    }
    service = server(site, replica, fields)
    return service if site.is_local(replica.host) else _watched(service, replica)


def _shared_service(site: Site, members: Sequence[Replica]) -> Service:
    """One llama-server for several pools: like that of one of them, with room for the largest that it holds at once."""
    first, shared = members[0], members[0].shared
    if shared is None:
        raise ValueError(f"{first.service} is not shared")
    limit = shared.memory_mib or worst((item.memory_mib for item in members), shared.loaded)
    one = _service(site, replace(first, card_mib=claimed_mib(members), memory_mib=limit))
    variant = one.cpu_variant
    mounts = site.store_mounts(first.host, (file for item in members for file in item.files))
    if variant is not None:
        on_cpu = worst((memory_on_cpu_mib(item) for item in members), shared.loaded)
        variant = replace(variant, memory_mib=max(limit, on_cpu))
    return replace(
        one,
        container=site.container(first.host, first.service),
        role="chat" if any(item.kind == "chat" for item in members) else first.kind,
        args=shared_arguments(site, members),
        health=replace(one.health, start_timeout_s=max(item.start_timeout_s for item in members)),
        memory_swap_mib=0,
        threads=worst((item.engine.threads or 0 for item in members), shared.loaded),
        pids=_pids(site, members),
        configs=(*one.configs, ConfigMount(preset_file(first.service), PRESETS)),
        mounts=(*one.mounts, *(mount for mount in mounts if mount not in one.mounts)),
        cpu_variant=variant,
    )


def shared_arguments(site: Site, members: Sequence[Replica]) -> tuple[str, ...]:
    """Command line of a server that several pools share: no model, and how many of its presets it may hold."""
    first, shared = members[0], members[0].shared
    options = {
        "--models-preset": PRESETS,
        "--models-max": shared.loaded if shared else len(members),
        "--host": "0.0.0.0",  # noqa: S104 - inside the container's own network
        "--port": first.port,
        "--api-key-file": site.secret_path(first.host, API_KEY),
        "--threads-http": sum(item.slots for item in members) + SPARE_THREADS,
        "--offline": True,
        "--metrics": True,
        NO_PAGE: not any(map(_speaks_of_page, members)),
    }
    return tuple(_words(options))


def _speaks_of_page(replica: Replica) -> bool:
    """Whether `extra_args` say themselves if llama-server's own page is there."""
    return not set(flags.known_flags()[NO_PAGE].names).isdisjoint(replica.engine.extra_args or ())


def _http_threads(replica: Replica) -> int:
    """HTTP threads of a replica's server; by itself it would start one for each processor of the host."""
    return _said(replica, HTTP) or replica.slots + SPARE_THREADS


def _said(replica: Replica, flag: str) -> int:
    """The number that `extra_args` gives a flag; 0 when it is not there."""
    words = replica.engine.extra_args or ()
    values = [value for name, value in pairwise(words) if name == flag and value.isdecimal()]
    return int(values[-1]) if values else 0


def _pids(site: Site, members: Sequence[Replica]) -> int:
    """Limit of threads and processes: for batches there are as many threads again as for tokens."""
    cores = site.host(members[0].host).cpu.cores or 0
    threads = [max(item.engine.threads or cores, _said(item, "--threads-batch")) for item in members]
    loaded = members[0].shared.loaded if members[0].shared else 1
    http = sum(map(_http_threads, members)) * (2 if members[0].shared else 1)
    return max(LEAST_PIDS, 2 * worst(threads, loaded) + http + SPARE_PIDS)


def server_settings(site: Site, replica: Replica) -> dict[str, object]:
    """Settings that a server has itself, and cannot have for one of its models, by their keys in `engine`."""
    engine = replica.engine
    return {
        "image": _image(site, replica),
        "environment": dict(engine.environment or {}),
        "mlock": bool(engine.mlock),
    }


def preset_file(service: str) -> str:
    """Name of the file with the models of a shared server."""
    return f"{service}.ini"


def _presets(site: Site, members: Sequence[Replica]) -> File:
    first = members[0]
    models = [{"name": item.pool, "settings": _preset(site, item)} for item in members]
    values = {"loaded": first.shared.loaded if first.shared else 0, "models": models}
    return File(first.host, COMPONENT, preset_file(first.service), template="llama/models.ini.j2", values=values)


def _preset(site: Site, replica: Replica) -> list[tuple[str, str]]:
    """Settings of one model of a shared server."""
    own = {name: value for name, value in options(site, replica).items() if name not in OF_THE_SERVER}
    return list(flags.settings([*_words(own), *(replica.engine.extra_args or ())]))


def _watched(service: Service, replica: Replica) -> Service:
    """The service below its watchdog.

    Not on a local host: supervisord starts and signals the server itself there, and a shell in between that is killed
    would leave it behind with its port taken.
    """
    variant = service.cpu_variant
    if variant is not None:
        variant = replace(variant, environment=_patience(replica, is_on_card=False))
    drivers = [ConfigMount(VULKAN_DRIVER, f"{DRIVERS}/{VULKAN_DRIVER}")] if uses_vulkan_on_nvidia(replica) else []
    return replace(
        service,
        entrypoint=("/bin/sh", START),
        health=replace(service.health, command=("/bin/sh", START, "health", str(replica.port))),
        environment={
            "CORRAL_NAME": replica.service,
            "CORRAL_STATE_DIR": STATE,
            **_patience(replica, is_on_card=bool(replica.cards)),
            **service.environment,
        },
        configs=(ConfigMount("start.sh", START), *drivers),
        volumes=((COUNTS, STATE),),
        cpu_variant=variant,
    )


def _patience(replica: Replica, *, is_on_card: bool) -> dict[str, str]:
    """How long a batch may take: a card is done in seconds, unless the driver compiles its programs first."""
    if not is_on_card:
        limit = str(LONG_BATCH_S)
        return {"CORRAL_COMPUTES_ON": "processor", "CORRAL_FIRST_S": limit, "CORRAL_LOOP_S": limit}
    first = {"CORRAL_FIRST_S": str(replica.start_timeout_s)} if compiles_first(replica) else {}
    return {"CORRAL_COMPUTES_ON": "card", **first}


def _cpu_variant(site: Site, replica: Replica) -> CpuVariant | None:
    if not replica.cards:
        return None
    memory_mib = max(replica.memory_mib, memory_on_cpu_mib(replica))
    return CpuVariant(site.image("llama-cpu", IMAGES["llama-cpu"]), memory_mib)


def _image(site: Site, replica: Replica) -> str:
    """The site's own image, else the one that suits the replica's card."""
    key = f"llama-{backend_of(replica)}"
    return replica.engine.image or site.image(key, IMAGES[key])


def arguments(site: Site, replica: Replica) -> tuple[str, ...]:
    """llama-server's command line."""
    return (*_words(options(site, replica)), *(replica.engine.extra_args or ()))


def _words(told: Mapping[str, Any]) -> Iterator[str]:
    """Options as words: one that is True is a switch, one that is None or False is left out."""
    for name, value in told.items():
        if value is not None and value is not False:
            yield from (name,) if value is True else (name, str(value))


def _load_mode(engine: ServerSettings) -> str | None:
    """How weights are read; None: as llama-server does by itself, mapped."""
    if engine.mlock:
        return "mlock" if engine.load_mode == "none" else "mmap+mlock"
    return engine.load_mode if engine.load_mode != "mmap" else None


def options(site: Site, replica: Replica) -> dict[str, Any]:
    """llama-server's options. Everything that it would choose by itself is said: port, slots, cache, fit."""
    engine, projector, host = replica.engine, replica.weights.projector, replica.host
    is_private, is_chat = has_private_cache(site, replica), replica.kind == "chat"
    thinking = _thinking(site, replica) if is_chat else ""
    return {
        "--model": site.model_path(host, replica.file),
        "--alias": replica.pool,
        "--host": "127.0.0.1" if site.is_local(host) else "0.0.0.0",  # noqa: S104 - in the container's own network
        "--port": replica.port,
        "--api-key-file": site.secret_path(host, API_KEY),
        "--ctx-size": replica.context,
        "--parallel": replica.slots,
        "--batch-size": engine.batch,
        "--ubatch-size": min(engine.ubatch or 512, engine.batch or 2048),
        "--flash-attn": engine.flash_attention,
        "--cache-type-k": engine.cache_type,
        "--cache-type-v": engine.cache_type,
        "--cache-ram": replica.cache_ram_mib,
        "--fit": "off",
        "--offline": True,
        "--metrics": True,
        NO_PAGE: not _speaks_of_page(replica),
        "--n-gpu-layers": engine.gpu_layers if replica.cards else 0,
        "--cpu-moe": engine.cpu_moe == "all" and bool(replica.cards),
        "--n-cpu-moe": engine.cpu_moe if engine.cpu_moe != "all" and replica.cards else None,
        "--override-tensor": ",".join(f"{pattern}=CPU" for pattern in engine.host_tensors or ()) or None,
        "--kv-unified": bool(engine.kv_unified),
        "--ctx-checkpoints": checkpoints(engine, replica.memory),
        "--threads": engine.threads,
        "--threads-http": None if HTTP in (engine.extra_args or ()) else _http_threads(replica),
        "--no-cache-prompt": is_private,
        "--cache-reuse": None if is_private else engine.cache_reuse or None,
        "--load-mode": _load_mode(engine),
        "--sleep-idle-seconds": engine.sleep_idle_s,
        "--jinja": is_chat and bool(engine.jinja),
        "--no-jinja": is_chat and not engine.jinja,
        "--embeddings": replica.kind == "embedding",
        "--reranking": replica.kind == "rerank",
        "--pooling": engine.pooling,
        "--split-mode": (engine.split_mode or "layer") if len(replica.cards) > 1 else None,
        "--tensor-split": ",".join(f"{share:g}" for share in replica.split) if len(replica.cards) > 1 else None,
        "--mmproj": site.model_path(host, replica.file_of(projector)) if projector else None,
        "--lora-scaled": _adapters(site, replica) or None,
        **_drafting(site, replica),
        # By itself llama-server puts thoughts into `reasoning_content`.
        "--reasoning": "off" if thinking == "off" else None,
        "--reasoning-format": "none" if thinking == "shown" else None,
    }
