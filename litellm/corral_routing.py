"""LiteLLM callback: chooses a pool for requests to `auto`, and reports which pool answered.

LiteLLM loads this file from beside its `config.yaml`; its settings are in `routing.yaml` there, rendered from the
inventory. It calls no model: words and lengths determine the difficulty, HAProxy reports free slots.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name
# No postponed annotations: LiteLLM loads this file without registering its module, which dataclasses would need.

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import yaml
from litellm.integrations.custom_logger import CustomLogger

CONVERSATIONS = frozenset(
    {
        "completion",
        "acompletion",
        "text_completion",
        "atext_completion",
        "anthropic_messages",
        "aanthropic_messages",
        "responses",
        "aresponses",
    }
)
CLASS_HEADER = "x-corral-class"
TIER_HEADER = "x-corral-tier"
POOL_HEADER = "x-corral-pool"
# Characters for which an image or another part without text counts.
OTHER_PART_CHARACTERS = 100
FIGURES_TIMEOUT_S = 0.5
# Time after which a request no longer counts as on its way to HAProxy: its client has disconnected.
ON_ITS_WAY_S = 5.0
# Errors of the request itself, for which there is no fallback.
CLIENT_ERRORS = frozenset({400, 401, 403, 404, 405, 413, 415, 422})
# Scripts without spaces between words.
IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")

log = logging.getLogger("corral.routing")
if not log.handlers:  # beside LiteLLM's own JSON lines, whatever its level
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


@dataclass(frozen=True)
class Tier:
    """One level of difficulty."""

    name: str
    pool: str
    spill: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    words_beyond: int | None = None
    characters_beyond: int | None = None
    messages_beyond: int | None = None

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        whole = (
            re.escape(word) if IDEOGRAPHS.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)" for word in self.words
        )
        return re.compile("|".join(whole), re.IGNORECASE) if self.words else None

    def fits(self, text: str, characters: int, messages: int) -> bool:
        """Whether a request with this last message and total length is at least of this tier."""
        if self.characters_beyond is not None and characters > self.characters_beyond:
            return True
        if self.messages_beyond is not None and messages > self.messages_beyond:
            return True
        if self._pattern is None or len(text.split()) <= (self.words_beyond or 0):
            return False
        return bool(self._pattern.search(text))


@dataclass(frozen=True)
class Room:
    """A pool's room according to HAProxy."""

    # Free slots.
    free: int
    waiting: int
    # Queue depth.
    depth: int
    is_up: bool


@dataclass(eq=False)
class Decision:
    """The decision for one request."""

    tier: str = ""
    pool: str = ""
    # Pools to which it may go as well while it waits.
    spill: tuple[str, ...] = ()
    fallbacks: list[dict[str, list[str]]] = field(default_factory=list)


_decision: ContextVar[Decision | None] = ContextVar("corral_decision", default=None)


class Rooms:
    """The room of every pool: HAProxy's numbers minus requests that have not arrived there yet."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: httpx.AsyncClient | None = None
        self._on_its_way: dict[Decision, tuple[str, float]] = {}

    async def ask(self) -> dict[str, Room]:
        """Room by pool; empty if HAProxy does not answer."""
        if not self._url:
            return {}
        self._client = self._client or httpx.AsyncClient(timeout=FIGURES_TIMEOUT_S, trust_env=False)
        try:
            answer = await self._client.get(self._url)
            pools: Mapping[str, Mapping[str, list[int]]] = answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            _say("WARNING", "HAProxy does not report free slots", url=self._url, error=repr(error))
            return {}
        return {pool: self._room(pool, groups) for pool, groups in pools.items()}

    def _room(self, pool: str, groups: Mapping[str, list[int]]) -> Room:
        """A pool has one or more groups, each with: free slots, waiting requests, queue depth, servers up."""
        free, waiting, depth, up = (sum(column) for column in zip(*groups.values(), strict=True))
        now = time.monotonic()
        coming = sum(1 for name, since in self._on_its_way.values() if name == pool and now - since < ON_ITS_WAY_S)
        return Room(free - coming, waiting + max(0, coming - free), depth, up > 0)

    def sent(self, decision: Decision) -> None:
        """Counts a request as on its way to its pool."""
        now = time.monotonic()
        for known, (_, since) in list(self._on_its_way.items()):
            if now - since > ON_ITS_WAY_S:
                del self._on_its_way[known]
        self._on_its_way[decision] = (decision.pool, now)

    def arrived(self, decision: Decision) -> None:
        """The request has arrived: HAProxy counts it from now on."""
        self._on_its_way.pop(decision, None)


class CorralRouting(CustomLogger):
    """LiteLLM hooks that choose pools; one instance serves every request of a worker."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        auto = settings.get("auto") or {}
        self._auto_names = frozenset(auto.get("names", ()))
        self._tiers = tuple(_tier(tier) for tier in auto.get("tiers", ()))
        self._background = frozenset(settings.get("background", ()))
        self._fallbacks: dict[str, list[str]] = dict(settings.get("fallbacks") or {})
        self._has_context_fallbacks = bool(settings.get("has_context_fallbacks"))
        self._pools: dict[str, str] = dict(settings.get("pools") or {})
        self._rooms = Rooms(settings.get("slots_url") or "")

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request with a pool instead of `auto`, and with the settings of its model name."""
        decision = Decision()
        _decision.set(decision)
        if call_type in CONVERSATIONS:
            if data.get("model") in self._background:
                data["extra_headers"] = {**(data.get("extra_headers") or {}), CLASS_HEADER: "background"}
            if data.get("model") in self._auto_names:
                await self._route(data, decision)
        if self._fallbacks and not data.get("fallbacks"):
            decision.fallbacks = [{name: list(instead)} for name, instead in self._fallbacks.items()]
            data["fallbacks"] = decision.fallbacks
        return data

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: object) -> None:
        """The request is being sent."""
        decision = _decision.get()
        if decision is not None:
            self._rooms.arrived(decision)

    async def async_post_call_failure_deployment_hook(
        self,
        request_data: Mapping[str, object],
        exception: Exception,
        call_type: object,
        fallback_depth: int | None = None,
    ) -> None:
        """Disables fallbacks after client errors; LiteLLM would fall back after any failure."""
        decision = _decision.get()
        if decision is None or getattr(exception, "status_code", None) not in CLIENT_ERRORS:
            return
        is_too_long = type(exception).__name__ == "ContextWindowExceededError"
        if not (is_too_long and self._has_context_fallbacks):
            decision.fallbacks.clear()

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: object,
        traceback_str: str | None = None,
    ) -> None:
        """The request was refused and will not be sent."""
        decision = _decision.get()
        if decision is not None:
            self._rooms.arrived(decision)

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: object,
        response: object,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, object] | None = None,
    ) -> dict[str, str]:
        """Returns the client's headers with the tier of its request and the pool that answered."""
        decision = _decision.get()
        deployment = str((litellm_call_info or {}).get("model_id") or "")
        pool = self._pools.get(deployment, "")
        tier = decision.tier if decision is not None else ""
        return {name: value for name, value in ((TIER_HEADER, tier), (POOL_HEADER, pool)) if value}

    def spill(self, pool: str) -> list[str]:
        """Pools that may take this request instead of `pool`, the one it was led to; corral_leases.py asks."""
        decision = _decision.get()
        return list(decision.spill) if decision is not None and decision.pool == pool else []

    async def _route(self, data: dict[str, Any], decision: Decision) -> None:
        tier = self.tier_of(data)
        decision.tier = tier.name
        decision.pool = await self._pool_with_room(tier)
        decision.spill = tuple(pool for pool in (tier.pool, *tier.spill) if pool != decision.pool)
        self._rooms.sent(decision)
        data["model"] = decision.pool
        call = str(data.get("litellm_call_id") or "")
        _say("INFO", "auto", tier=tier.name, tier_pool=tier.pool, pool=decision.pool, call_id=call)

    def tier_of(self, data: Mapping[str, Any]) -> Tier:
        """The hardest tier that the request fits."""
        text, characters, messages = measure(data)
        hardest_first = reversed(self._tiers[1:])
        return next((tier for tier in hardest_first if tier.fits(text, characters, messages)), self._tiers[0])

    async def _pool_with_room(self, tier: Tier) -> str:
        """The tier's pool; if it is full, the first with a free slot, else the first with room in its queue."""
        pools = (tier.pool, *tier.spill)
        if len(pools) == 1:
            return tier.pool
        rooms = await self._rooms.ask()
        if not rooms:
            return tier.pool
        unbounded = Room(1, 0, 0, is_up=True)  # a cloud provider has no slots
        known = {pool: rooms.get(pool, unbounded) for pool in pools}
        free = (pool for pool in pools if known[pool].is_up and known[pool].free > 0)
        waits = (pool for pool in pools if known[pool].is_up and known[pool].waiting < known[pool].depth)
        return next(free, None) or next(waits, tier.pool)


def _say(level: str, message: str, **facts: str) -> None:
    log.log(getattr(logging, level), json.dumps({"message": message, "level": level, "component": "corral", **facts}))


def measure(data: Mapping[str, Any]) -> tuple[str, int, int]:
    """The user's last message, the characters of all messages, and how many messages there are."""
    messages = list(_messages(data))
    texts = [(str(role), *_text(content)) for role, content in messages]
    from_user = [text for role, text, _ in texts if role == "user"]
    last = from_user[-1] if from_user else (texts[-1][1] if texts else "")
    return last, sum(characters for _, _, characters in texts), len(messages)


def _messages(data: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    """Role and content of every message; a prompt or an input counts as one message of the user."""
    found = next((data[name] for name in ("messages", "input", "prompt") if data.get(name)), None)
    if isinstance(found, str):
        yield "user", found
    for item in found if isinstance(found, list) else ():
        if isinstance(item, Mapping):
            yield item.get("role", ""), item.get("content")
        elif isinstance(item, str):
            yield "user", item


def _text(content: object) -> tuple[str, int]:
    """The text of a message, and its length in characters."""
    if isinstance(content, str):
        return content, len(content)
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    return " ".join(known), sum(map(len, known)) + OTHER_PART_CHARACTERS * (len(texts) - len(known))


def _tier(settings: Mapping[str, Any]) -> Tier:
    lists = {name: tuple(settings.get(name) or ()) for name in ("words", "spill")}
    return Tier(**{**settings, **lists})


def _settings() -> Mapping[str, Any]:
    """The settings beside this file; empty outside a rendered site."""
    path = Path(__file__).with_name("routing.yaml")
    if not path.is_file():
        return {}
    settings: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings


corral_routing = CorralRouting(_settings())
