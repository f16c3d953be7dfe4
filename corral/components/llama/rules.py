"""What must hold for llama-servers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from corral.checks.registry import check
from corral.components.llama import COMPONENT, server_settings
from corral.components.llama.flags import preset_troubles
from corral.components.serving import engine_key, one_of_each_sort
from corral.contributions import Contributions
from corral.declarations import read_yaml
from corral.errors import Finding, shown
from corral.plan.own_image import BUILD
from corral.plan.settings import WHOLE_INPUT, host_patterns, takes_parts
from corral.plan.site import Replica, Site

# Tokens by which vocabularies may differ (llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE): padding of the larger one.
DRAFT_SLACK = 128


@check("plan", "draft-vocabulary")
def _draft_vocabulary(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A model and the one that drafts for it have the same vocabulary; llama-server leaves any other draft unused."""
    for name, model in site.inventory.models.items():
        draft = site.inventory.models.get(model.draft.model) if model.draft else None
        if model.draft is None or draft is None:
            continue
        ours, other = (site.lock.get(item.key(item.sources[0])) for item in (model, draft))
        if not (ours and ours.gguf and other and other.gguf):
            continue
        if abs(ours.gguf.vocabulary - other.gguf.vocabulary) > DRAFT_SLACK:
            words = f"{name} knows {ours.gguf.vocabulary} tokens, {model.draft.model} {other.gguf.vocabulary}"
        elif ours.gguf.vocabulary == other.gguf.vocabulary and ours.gguf.tokens != other.gguf.tokens:
            if not (ours.gguf.tokens and other.gguf.tokens):
                continue
            words = f"{name} and {model.draft.model} know equally many tokens, but not the same"
        else:
            continue
        hint = "take a small model of the same family; llama-server would load this one and not use it"
        yield Finding(words, ("models", name, "draft", "model"), hint)


@check("plan", "model-architecture")
def _model_architecture(site: Site, _found: Contributions) -> Iterator[Finding]:
    """A model's file is a language model of an architecture that the pinned build of llama.cpp loads.

    Of another image than the kit's own, only what is no language model at all is known.
    """
    table = read_yaml(Path(__file__).with_name("architectures.yaml"))
    for replica in one_of_each_sort(site, COMPONENT):
        for model, found in _architectures(site, replica):
            place = ("models", model, "source")
            if found in table["others"]:
                words, remedy = table["others"][found]
                yield Finding(f"this file is {words}, no language model", place, remedy)
            elif found in table["pictures"]:
                yield Finding(
                    f"this file is a picture model ({found})", place, "write kind: image, or take another file"
                )
            elif found not in table["known"] and replica.engine.image is None:
                words = f"llama.cpp as pinned ({BUILD}) does not know the architecture {shown(found)}"
                remedy = (
                    "name an image with a newer build in engine.image, or take another model; a file may be damaged"
                )
                yield Finding(words, place, remedy)


def _architectures(site: Site, replica: Replica) -> Iterator[tuple[str, str]]:
    """Names of a replica's models, and the architectures that their files name."""
    for name in replica.models:
        model = site.inventory.models[name]
        known = site.lock.get(model.key(model.sources[0])) if model.sources else None
        if known and known.gguf:
            yield name, known.gguf.architecture


@check("plan", "offload")
def _offload(site: Site, _found: Contributions) -> Iterator[Finding]:
    """What stays in host memory, and the shares of cards, are said for servers on cards that have such parts."""
    for replica in one_of_each_sort(site, COMPONENT):
        for key, words, hint in _without_effect(replica):
            place = engine_key(site, replica, key)
            if place[0] in ("pools", "models"):
                yield Finding(words, place, hint)
        if (
            replica.gguf is not None
            and replica.gguf.layers
            and not replica.gguf.tensors
            and host_patterns(replica.engine)
        ):
            words = f"the lock does not know the tensors of {replica.model}, so the plan counts all of them on cards"
            hint = "an earlier version wrote it; look into the file again: ./generate.py models inspect"
            yield Finding(words, ("models", replica.model, "source"), hint, level="warning")


def _without_effect(replica: Replica) -> Iterator[tuple[str, str, str]]:
    """Keys of a replica's engine that change nothing or do not fit its cards, why, and the remedy."""
    engine, cards, gguf = replica.engine, len(replica.cards), replica.gguf
    for key in ("cpu_moe", "host_tensors", "tensor_split"):
        if getattr(engine, key) is not None and not cards:
            yield key, f"{replica.service} runs on the processor, where all is in host memory", "remove it"
    if engine.tensor_split is not None and cards and len(engine.tensor_split) != cards:
        words = f"{replica.service} has {cards} card{'s' if cards > 1 else ''}, not {len(engine.tensor_split)}"
        yield "tensor_split", words, "write one share for each card of a replica (gpus_per_replica)"
    if gguf is not None and engine.cpu_moe is not None and not gguf.experts:
        yield "cpu_moe", f"{replica.model} has no experts", "write gpu_layers: for a model that is larger than its card"
    names = [f"blk.{layer}.{name}" for name in gguf.tensors for layer in range(gguf.layers)] if gguf else []
    for pattern in engine.host_tensors or () if names else ():
        if not any(re.search(pattern, name) for name in names):
            words = f"no tensor is called like {shown(pattern)}"
            yield "host_tensors", words, "write a part of their names, such as ffn_(up|down)_exps"


@check("plan", "whole-input", level="warning")
def _whole_input(site: Site, _found: Contributions) -> Iterator[Finding]:
    """An embedding or rerank server takes a whole input in one physical batch; longer inputs are refused."""
    for replica in one_of_each_sort(site, COMPONENT):
        batch = min(replica.engine.ubatch or 0, replica.engine.batch or 0)
        if takes_parts(replica.engine.pooling, replica.gguf):
            continue
        if replica.kind in WHOLE_INPUT and batch < replica.weights.context:
            key = "ubatch" if batch == replica.engine.ubatch else "batch"
            words = f"inputs of more than {batch} tokens are refused, although the context is {replica.weights.context}"
            place = engine_key(site, replica, key)
            yield Finding(words, place, "raise batch and ubatch to the context")


@check("plan", "shared-flag")
def _shared_flag(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Words in `extra_args` of a pool on a shared server can stand in its file: flags with one value, each once."""
    for replica in one_of_each_sort(site, COMPONENT):
        words = replica.engine.extra_args or ()
        if replica.shared is None or not words:
            continue
        for trouble in preset_troubles(words):
            hint = f"remove it, or give {replica.pool} a server of its own"
            yield Finding(trouble, engine_key(site, replica, "extra_args"), hint)


@check("plan", "shared-alike")
def _shared_alike(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Pools on a shared server agree on what is its own: image, environment, locked memory."""
    first: dict[tuple[str, str], Replica] = {}
    for replica in site.replicas:
        if replica.shared is None:
            continue
        other = first.setdefault((replica.host, replica.service), replica)
        ours, theirs = server_settings(site, replica), server_settings(site, other)
        for key in (key for key in ours if ours[key] != theirs[key]):
            words = f"{replica.pool} and {other.pool} are on one server, {replica.service}, and differ in {key}"
            hint = "say the same for both, or give one a server of its own"
            yield Finding(words, engine_key(site, replica, key), hint)
