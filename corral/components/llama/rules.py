"""What must hold for llama-servers."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.llama import COMPONENT, server_settings
from corral.components.llama.flags import preset_troubles
from corral.components.serving import engine_key, one_of_each_sort
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.settings import WHOLE_INPUT
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


@check("plan", "whole-input", level="warning")
def _whole_input(site: Site, _found: Contributions) -> Iterator[Finding]:
    """An embedding or rerank server takes a whole input in one physical batch; longer inputs are refused."""
    for replica in one_of_each_sort(site, COMPONENT):
        batch = min(replica.engine.ubatch or 0, replica.engine.batch or 0)
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
