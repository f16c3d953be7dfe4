"""What must hold for llama-servers; `rules.yaml` has the texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from corral.checks.registry import Findings, Texts
from corral.components.llama import COMPONENT, server_settings
from corral.components.llama.flags import preset_troubles
from corral.components.serving import engine_key, one_of_each_sort
from corral.contributions import Contributions
from corral.declarations import read_yaml
from corral.errors import KeyPath, shown
from corral.plan.own_image import BUILD
from corral.plan.settings import WHOLE_INPUT, host_patterns, takes_parts
from corral.plan.site import Replica, Site
from corral.units import counted

# Tokens by which vocabularies may differ (llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE): padding of the larger one.
DRAFT_SLACK = 128
TEXTS = Texts.beside(__file__)


@TEXTS.check("plan", "draft-vocabulary")
def _draft_vocabulary(site: Site, _found: Contributions) -> Findings:
    models = site.inventory.models
    for name, model in models.items():
        draft = models.get(model.draft.model) if model.draft else None
        locked = [site.lock.get(item.key(item.sources[0])) for item in (model, draft) if item]
        ours, other = ([known.gguf for known in locked if known and known.gguf] + [None, None])[:2]
        if draft is None or ours is None or other is None:
            continue
        difference = abs(ours.vocabulary - other.vocabulary)
        is_other = not difference and ours.tokens != other.tokens and bool(ours.tokens and other.tokens)
        yield from TEXTS.broken(
            ("models", name),
            (difference > DRAFT_SLACK, "draft-vocabulary/size", "draft.model"),
            (is_other, "draft-vocabulary/tokens", "draft.model"),
            name=name, draft=model.draft and model.draft.model, ours=ours.vocabulary, other=other.vocabulary,
        )  # fmt: skip


@TEXTS.check("plan", "model-architecture")
def _model_architecture(site: Site, _found: Contributions) -> Findings:
    table = read_yaml(Path(__file__).with_name("architectures.yaml"))
    for replica in one_of_each_sort(site, COMPONENT):
        for model, found in _architectures(site, replica):
            words, remedy = table["others"].get(found, ("", ""))
            yield from TEXTS.first(
                ("models", model, "source"),
                (words, "model-architecture/other", ""),
                (found in table["pictures"], "model-architecture/picture", ""),
                (found not in table["known"] and replica.engine.image is None, "model-architecture/unknown", ""),
                words=words, remedy=remedy, found=found, shown=shown(found), build=BUILD,
            )  # fmt: skip


def _architectures(site: Site, replica: Replica) -> Iterator[tuple[str, str]]:
    """Names of a replica's models, and the architectures that their files name."""
    for name in replica.models:
        model = site.inventory.models[name]
        known = site.lock.get(model.key(model.sources[0])) if model.sources else None
        if known and known.gguf:
            yield name, known.gguf.architecture


@TEXTS.check("plan", "offload")
def _offload(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site, COMPONENT):
        for key, text, values in _without_effect(replica):
            place = engine_key(site, replica, key)
            if place[0] in ("pools", "models"):
                yield TEXTS.finding(f"offload/{text}", place, replica=replica, **values)
        gguf = replica.gguf
        is_old = gguf is not None and gguf.layers and not gguf.tensors and host_patterns(replica.engine)
        path: KeyPath = ("models", replica.model)
        yield from TEXTS.broken(path, (is_old, "offload/old-lock", "source"), replica=replica)


def _without_effect(replica: Replica) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Keys of a replica's engine that change nothing or do not fit its cards, and the text that says why."""
    engine, cards, gguf = replica.engine, len(replica.cards), replica.gguf
    for key in ("cpu_moe", "host_tensors", "tensor_split"):
        if getattr(engine, key) is not None and not cards:
            yield key, "processor", {}
    if engine.tensor_split is not None and cards and len(engine.tensor_split) != cards:
        yield "tensor_split", "shares", {"cards": counted(cards, "card"), "shares": len(engine.tensor_split)}
    if gguf is not None and engine.cpu_moe is not None and not gguf.experts:
        yield "cpu_moe", "no-experts", {}
    names = [f"blk.{layer}.{name}" for name in gguf.tensors for layer in range(gguf.layers)] if gguf else []
    for pattern in engine.host_tensors or () if names else ():
        if not any(re.search(pattern, name) for name in names):
            yield "host_tensors", "no-tensor", {"pattern": shown(pattern)}


@TEXTS.check("plan", "whole-input")
def _whole_input(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site, COMPONENT):
        batch, context = min(replica.engine.ubatch or 0, replica.engine.batch or 0), replica.weights.context
        is_whole = replica.kind in WHOLE_INPUT and not takes_parts(replica.engine.pooling, replica.gguf)
        place = engine_key(site, replica, "ubatch" if batch == replica.engine.ubatch else "batch")
        row = (is_whole and batch < context, "whole-input/long", "")
        yield from TEXTS.broken(place, row, batch=batch, context=context)


@TEXTS.check("plan", "shared-flag")
def _shared_flag(site: Site, _found: Contributions) -> Findings:
    for replica in one_of_each_sort(site, COMPONENT):
        for trouble in preset_troubles(replica.engine.extra_args or ()) if replica.shared else ():
            place = engine_key(site, replica, "extra_args")
            yield TEXTS.finding("shared-flag/trouble", place, trouble=trouble, pool=replica.pool)


@TEXTS.check("plan", "shared-alike")
def _shared_alike(site: Site, _found: Contributions) -> Findings:
    first: dict[tuple[str, str], Replica] = {}
    for replica in (replica for replica in site.replicas if replica.shared):
        other = first.setdefault((replica.host, replica.service), replica)
        ours, theirs = server_settings(site, replica), server_settings(site, other)
        for key in (key for key in ours if ours[key] != theirs[key]):
            place = engine_key(site, replica, key)
            yield TEXTS.finding("shared-alike/differ", place, replica=replica, other=other.pool, key=key)
