"""Speech servers with speaches: recordings to text with faster-whisper, text to sound with Kokoro or Piper."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.serving import keys_for, replicas_of, served, server
from corral.contributions import Contribution, Contributions, CpuVariant, File, Service
from corral.declarations import declaration
from corral.plan.site import Replica, Site, memory_on_cpu_mib

STAGE = Stage.BACKENDS
COMPONENT = "speaches"
API_KEY = "SPEACHES_API_KEY"
IMAGES: dict[str, str] = declaration(COMPONENT)["images"]


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """A service and a backend for every replica, and the key that protects them."""
    replicas = replicas_of(site, COMPONENT)
    yield from keys_for(site, replicas, API_KEY, "opens the speech servers for the gateway")
    for host in sorted({replica.host for replica in replicas}):
        yield File(host, COMPONENT, "start.sh", asset="gpu-server/speaches/start.sh")
    for replica in replicas:
        yield _service(site, replica)
        yield from served(replica, "/health", API_KEY, "", upstream_model=_repository(replica))


def _repository(replica: Replica) -> str:
    """The name by which speaches knows the model."""
    return replica.weights.source.removeprefix("hf:")


def _service(site: Site, replica: Replica) -> Service:
    images = {sort: site.image(f"{COMPONENT}-{sort}", IMAGES[f"{COMPONENT}-{sort}"]) for sort in ("cpu", "cuda")}
    variant = CpuVariant(
        images["cpu"], max(replica.memory_mib, memory_on_cpu_mib(replica)), {"WHISPER__INFERENCE_DEVICE": "cpu"}
    )
    return server(
        site,
        replica,
        {
            "image": replica.engine.image or images["cuda" if replica.cards else "cpu"],
            "cpu_variant": variant if replica.cards else None,
        },
        device="cuda" if replica.cards else "cpu",
        listens=str(replica.port),
        slots=str(replica.slots),
        threads=str(replica.engine.threads or 0),
        repository=_repository(replica),
        weights=site.model_path(replica.host, replica.folder_of(replica.weights.source)),
    )
