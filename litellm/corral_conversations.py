"""LiteLLM callback: keeps what `/v1/responses` answers, so that a request may go on from it (`previous_response_id`).

LiteLLM's own way keeps the prompts of all interfaces in its spend logs, cuts long texts, mixes the branches of a
conversation, and does not ask whose it was. This callback has a table of its own in LiteLLM's database. Each row is one
turn: what the request added, what was answered, the hash of the caller's key, and until when it is kept, which every
further turn extends. An answer that did not end is not kept. For another key there is no such response.

LiteLLM loads this file from beside its `config.yaml`, on sites with `gateway.conversations`, before the callbacks that
look at the whole input.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger
from litellm.types.utils import ADDRESSED_RESPONSE_ID_FIELD
from prisma.errors import PrismaError

UNAVAILABLE = 503
DEFAULT_S = 24 * 60 * 60
ENDS = frozenset({"response.completed", "response.incomplete"})
# One statement, and one worker of LiteLLM at a time: two that make the same table would fail.
TABLES = """DO $$ BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('corral'));
  CREATE SCHEMA IF NOT EXISTS corral;
  CREATE TABLE IF NOT EXISTS corral.answers (
    id text PRIMARY KEY, key text NOT NULL, previous text, items text NOT NULL, until timestamptz NOT NULL
  );
  CREATE INDEX IF NOT EXISTS answers_until ON corral.answers (until);
  CREATE TABLE IF NOT EXISTS corral.sessions (
    key text, id text, data text NOT NULL, keep_s int NOT NULL, created timestamptz NOT NULL DEFAULT now(),
    until timestamptz NOT NULL, PRIMARY KEY (key, id)
  );
  CREATE INDEX IF NOT EXISTS sessions_until ON corral.sessions (until);
  CREATE TABLE IF NOT EXISTS corral.turns (
    number bigserial PRIMARY KEY, key text NOT NULL, session text NOT NULL, messages text NOT NULL, tokens int NOT NULL,
    answer int NOT NULL, head text NOT NULL, head_hash text NOT NULL, head_tokens int NOT NULL,
    FOREIGN KEY (key, session) REFERENCES corral.sessions ON DELETE CASCADE
  );
  CREATE INDEX IF NOT EXISTS turns_of ON corral.turns (key, session, number);
END $$"""
# All turns up to an answer, the first one first; they are kept from now on. The numbers are seconds.
LOAD = """
WITH RECURSIVE chain AS (
  SELECT id, previous, items, 0 AS back FROM corral.answers WHERE id = $1 AND key = $2 AND until > now()
  UNION ALL
  SELECT earlier.id, earlier.previous, earlier.items, back + 1
  FROM corral.answers earlier JOIN chain ON earlier.id = chain.previous AND earlier.key = $2
), used AS (
  UPDATE corral.answers SET until = now() + interval '{keep_s} seconds' WHERE id IN (SELECT id FROM chain)
)
SELECT previous, items FROM chain ORDER BY back DESC
"""
STORE = """
INSERT INTO corral.answers (id, key, previous, items, until)
VALUES ($1, $2, $3, $4, now() + interval '{keep_s} seconds')
"""
FORGET = "DELETE FROM corral.answers WHERE until < now()"

log = logging.getLogger("corral.conversations")


class Turn(NamedTuple):  # no dataclass: LiteLLM puts the module nowhere that one could look itself up
    """A request that is to be kept once it is answered."""

    id: str
    key: str
    previous: str | None
    added: list[Any]


_turn: ContextVar[Turn | None] = ContextVar("corral_turn", default=None)


class CorralConversations(CustomLogger):
    """LiteLLM hooks that load and keep conversations; one instance serves every request of a worker."""

    def __init__(self, keep_s: int) -> None:
        super().__init__()
        self._load, self._store = (text.format(keep_s=keep_s) for text in (LOAD, STORE))
        self._lock = asyncio.Lock()
        self._has_tables = False

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Puts the conversation before the input; leaves an id that names none, which corral_interfaces refuses.

        Raises:
            HTTPException: 503, the database does not answer.
        """
        _turn.set(None)
        if call_type not in {"responses", "aresponses"}:
            return data
        key = sha256(str(user_api_key_dict.api_key).encode()).hexdigest()
        added, previous = items_of(data.get("input")), data.get("previous_response_id")
        if previous:
            before = await self._before(str(previous), key)
            if not before:
                return data
            data.pop("previous_response_id")
            data.pop(ADDRESSED_RESPONSE_ID_FIELD, None)
            data["input"] = [*before, *added]
        if data.get("store") is not False:
            _turn.set(Turn(f"resp_{secrets.token_hex(24)}", key, previous or None, added))
        return data

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: object, response: Any
    ) -> None:
        """Keeps a plain answer."""
        turn = _turn.get()
        if turn and getattr(response, "object", None) == "response":
            await self._keep(turn, response)
            _name(turn, response)

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: object, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """The stream, whose answer is kept before the client learns that it is complete."""
        turn = _turn.get()
        return self._kept(turn, response) if turn else response

    async def _kept(self, turn: Turn, response: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for event in response:
            if answer := getattr(event, "response", None):
                if event.type in ENDS:
                    await self._keep(turn, answer)
                _name(turn, answer)
            yield event

    async def _before(self, previous: str, key: str) -> list[Any]:
        """The items of all turns up to an answer; empty if it is not kept for this key."""
        try:
            turns = await (await self.conversations()).query_raw(self._load, previous, key)
        except PrismaError as error:
            log.warning("a conversation was not read: %s", error)
            raise HTTPException(UNAVAILABLE, "the database with the conversations does not answer") from error
        is_whole = turns and turns[0]["previous"] is None
        return [item for turn in turns for item in json.loads(turn["items"])] if is_whole else []

    async def _keep(self, turn: Turn, answer: Any) -> None:
        items = json.dumps([*turn.added, *answered(answer.output)])
        try:
            database = await self.conversations()
            await database.execute_raw(self._store, turn.id, turn.key, turn.previous, items)
            await database.execute_raw(FORGET)
        except PrismaError as error:
            log.warning("an answer was not kept: %s", error)

    async def conversations(self) -> Any:
        """LiteLLM's database, with the tables of this callback and of corral_sessions."""
        from litellm.proxy import proxy_server

        database = proxy_server.prisma_client.db if proxy_server.prisma_client else None
        if database is None:
            raise HTTPException(UNAVAILABLE, "the database with the conversations does not answer")
        async with self._lock:
            if not self._has_tables:
                await database.execute_raw(TABLES)
                self._has_tables = True
        return database


def _name(turn: Turn, answer: Any) -> None:
    answer.id, answer.previous_response_id = turn.id, turn.previous


def items_of(given: object) -> list[Any]:
    """The input of a request as a list of items."""
    if isinstance(given, list):
        return given
    return [{"type": "message", "role": "user", "content": given}] if given else []


def answered(output: list[Any]) -> list[dict[str, Any]]:
    """An answer's output as input of the next turn: without thoughts and ids of this one answer, texts in one piece."""
    items = [dict(item) if isinstance(item, Mapping) else item.model_dump(exclude_none=True) for item in output]
    kept = [item for item in items if item.get("type") != "reasoning"]
    return [{name: _text(value) for name, value in item.items() if name not in ("id", "status")} for item in kept]


def _text(value: Any) -> Any:
    """The text of a content that is nothing else; strict chat templates take no list from an assistant."""
    parts = [part if isinstance(part, Mapping) else {} for part in value] if isinstance(value, list) else []
    is_text = bool(parts) and all(part.get("type") == "output_text" for part in parts)
    return "".join(part["text"] for part in parts) if is_text else value


def _keep_s() -> int:
    """The setting beside this file."""
    path = Path(__file__).with_name("conversations.yaml")
    return int(yaml.safe_load(path.read_text(encoding="utf-8"))["keep_s"]) if path.is_file() else DEFAULT_S


corral_conversations = CorralConversations(_keep_s())
