"""Figures of NVIDIA cards: nvidia_gpu_exporter, which knows every card, or NVIDIA's dcgm-exporter; for each host."""

from __future__ import annotations

from collections.abc import Iterator

from corral.components import Stage
from corral.components.declared import service
from corral.config.inventory import Monitoring
from corral.contributions import Contribution, Contributions, Dashboard, Endpoint, Fact, GpuClaim, Rules, ScrapeTarget
from corral.plan.site import Card, Site

STAGE = Stage.BALANCER
COMPONENT = "gpu-exporter"
# Programs by kind; what is scraped is called like the program.
KINDS = {"nvidia": "gpu-exporter", "dcgm": "dcgm-exporter"}
RULES = {"nvidia": "monitoring/rules/gpu_nvidia.yml", "dcgm": "monitoring/rules/gpu_dcgm.yml"}


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """An exporter for every Compose host with NVIDIA cards, and which card of the inventory is which."""
    monitoring = site.inventory.monitoring
    if monitoring is None:
        return
    for host, facts in site.inventory.hosts.items():
        cards = [card for card in site.cards[host] if card.has_nvidia_smi]
        kind = facts.gpu_exporter or monitoring.gpu_exporter
        if not cards or kind == "none" or site.is_local(host):
            continue
        yield Rules("monitoring/rules/gpu.yml")
        yield Rules(RULES[kind])
        yield Dashboard("monitoring/dashboards/gpu.json")
        yield from (fact for card in cards for fact in _facts(site, monitoring, card))
        endpoint = Endpoint(monitoring.gpu_exporter_port, host, COMPONENT)
        yield ScrapeTarget(KINDS[kind], endpoint, {"host": host, "role": "gpu"})
        gpus = tuple(GpuClaim(card.number, card.device, 0) for card in cards)
        yield service(site, host, "gpu_exporter", KINDS[kind], port=monitoring.gpu_exporter_port, gpus=gpus)


def _facts(site: Site, monitoring: Monitoring, card: Card) -> Iterator[Fact]:
    """The card with the name by which its exporter knows it, and where its temperature starts to be an alert."""
    labels = {"host": card.host, "gpu": str(card.number), "card": card.card}
    yield Fact("inventory:gpu", 1, labels | _identity(card))
    own = site.inventory.cards.get(card.card)
    thresholds = monitoring.thresholds
    warm = own.warm_c if own and own.warm_c else thresholds.gpu_warm_c
    hot = own.hot_c if own and own.hot_c else thresholds.gpu_hot_c
    yield Fact("threshold:gpu_warm_celsius", warm, labels)
    yield Fact("threshold:gpu_hot_celsius", hot, labels)


def _identity(card: Card) -> dict[str, str]:
    """What the inventory pins a card by, spelled as the exporters spell it."""
    if card.pinned_by == "UUID":
        return {"uuid": card.uuid.removeprefix("GPU-")}
    if card.pinned_by == "PCI slot":
        domain, _, slot = card.device.partition(":")
        return {"pci_bus_id": f"{domain:0>8}:{slot}".upper()}
    return {"index": card.device}
