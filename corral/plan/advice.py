"""What would fit: changes of a server that does not fit onto its card, each tried before it is named."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import partial

from corral.plan.cards import VRAM_RESERVE_MIB
from corral.plan.settings import card_mib, memory_of_replica
from corral.plan.site import Card, Replica, Site
from corral.plan.sizes import worst

# Contexts are proposed in multiples of this.
STEP = 1024
GENERAL = "less context, fewer slots, cache_type q8_0, a smaller quantization, or more cards with gpus_per_replica"


def what_fits(site: Site, replicas: list[Replica], lacking: int) -> str:
    """Changes of one tenant each that save at least so many MiB on its card; general words when none is known."""
    found = [*_fewer_at_once(replicas, lacking)]
    found += [words for replica in replicas if replica.memory is not None for words in _changes(site, replica, lacking)]
    return f"what would fit: {'; '.join(found)}" if found else GENERAL


def _fewer_at_once(replicas: list[Replica], lacking: int) -> Iterator[str]:
    """For every shared server on the card: as many models at once as fit."""
    for service in dict.fromkeys(replica.service for replica in replicas if replica.shared):
        members = [replica for replica in replicas if replica.service == service]
        shared, sizes = members[0].shared, [_share(replica) for replica in members]
        loaded = shared.loaded if shared else 0
        target = worst(sizes, loaded) - lacking
        count = next((n for n in range(min(loaded, len(members)) - 1, 0, -1) if worst(sizes, n) <= target), 0)
        if count:
            yield f"hosts.{members[0].host}.shared.{service}.loaded: {count}"


def _share(replica: Replica) -> int:
    return max(replica.card_mib)


def _room(site: Site, replica: Replica, lacking: int) -> int:
    """The most that a replica may take on a card of its own, so that all lacks no more; less than 0: no size does."""
    if replica.shared is None:
        return _share(replica) - lacking
    loaded = replica.shared.loaded
    members = site.members(replica.host, replica.service)
    others = [_share(item) for item in members if item is not replica]
    target = worst(map(_share, members), loaded) - lacking
    return target - worst(others, loaded - 1) if worst(others, loaded) <= target else -1


def _changes(site: Site, replica: Replica, lacking: int) -> Iterator[str]:
    room, fits = _room(site, replica, lacking), partial(_size, site, replica)
    if replica.engine.cache_type in ("f16", "bf16", "f32") and fits(cache_type="q8_0") <= room:
        yield f"{replica.pool} with cache_type: q8_0"
    slots = bisect_right(range(1, replica.slots), room, key=lambda count: fits(slots=count))
    if slots:
        yield f"{replica.pool} with slots: {slots}"
    steps = range(1, (replica.weights.context - 1) // STEP + 1)
    context = STEP * bisect_right(steps, room, key=lambda count: fits(context=count * STEP))
    if context:
        yield f"models.{replica.model}.context: {context}"
    card = _other_card(site, replica)
    if card:
        yield f"{replica.pool} on GPU {card.number} of {card.host} ({card.card})"
    counts = range(len(replica.cards) + 1, len(site.cards[replica.host]) + 1)
    split = next((count for count in counts if fits(cards=count) <= room), 0)
    if split:
        yield f"{replica.pool} split with gpus_per_replica: {split}"
    yield from _in_host_memory(replica, room, fits)


def _in_host_memory(replica: Replica, room: int, fits: Callable[..., int]) -> Iterator[str]:
    """The fewest layers, or experts of layers, that have to stay in host memory."""
    layers = range(replica.layers_on_cards)
    if replica.gguf is not None and replica.gguf.experts:
        count = bisect_left(layers, x=-room, key=lambda number: -fits(cpu_moe=number))
        if count < len(layers):
            yield f"{replica.pool} with cpu_moe: {count} (experts of so many layers in host memory)"
            return
    kept = bisect_right(layers, room, key=lambda number: fits(gpu_layers=number)) - 1
    if kept > 0:
        yield f"{replica.pool} with gpu_layers: {kept} (the others in host memory, slower)"


def _other_card(site: Site, replica: Replica) -> Card | None:
    """The smallest free card of the farm onto which the replica fits as it is."""
    taken = {(card.host, card.number) for other in site.replicas for card in other.cards}
    free = [
        card
        for cards in site.cards.values()
        for card in cards
        if (card.host, card.number) not in taken and card.vram_mib - VRAM_RESERVE_MIB >= replica.vram_mib
    ]
    return min(free, key=lambda card: (card.vram_mib, card.host, card.number), default=None)


def _size(site: Site, replica: Replica, *, context: int = 0, cards: int = 0, **settings: str | int) -> int:
    """MiB on each of its cards after a change."""
    if replica.engine.vram_mib is not None:
        return _share(replica)
    weights = replica.weights.model_copy(update={"context": context} if context else {})
    engine = replica.engine.model_copy(update=settings)
    split = (1,) * cards if cards else replica.split
    memory = memory_of_replica(weights, site.lock, engine, split, replica.draft)
    return max(replica.card_mib if memory is None else card_mib(weights, engine, memory, replica.draft, split))
