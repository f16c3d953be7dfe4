"""LiteLLM callback: sessions. The farm keeps their messages, and a chat with `session_id` sends only what is new.

    POST   /v1/sessions               {"id", "ttl_s", "data"}, all optional
    GET    /v1/sessions               ?limit=50&offset=0
    GET    /v1/sessions/ID
    DELETE /v1/sessions/ID
    GET    /v1/sessions/ID/messages   ?limit=100, the newest
    POST   /v1/sessions/ID/extend     {"ttl_s"}, optional
    POST   /v1/chat/completions       with `session_id` in the body

A session belongs to a key: another key has no such session. Each turn is one row in LiteLLM's database, written after
the whole answer, so an answer that did not end leaves nothing. Of a long session the model gets the newest turns, as
many as its context takes beside the new messages and the answer. How long each turn is, the server has counted.

LiteLLM loads this file from beside its `config.yaml`, on sites with `gateway.conversations`, after
corral_conversations, which has the database.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import litellm
import yaml
from fastapi import APIRouter, Body, Depends, HTTPException, Query
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy._types import ProxyException
from prisma.errors import PrismaError

BAD_REQUEST, NOT_FOUND, CONFLICT, UNAVAILABLE = 400, 404, 409, 503
PATH = "/v1/sessions"
# Ids of clients' own, and how those begin that are made here: such a one is never made by using it.
ID, MADE = re.compile(r"[A-Za-z0-9._:-]{1,128}"), "session-"
MOST_DATA, MOST_TURNS = 16_384, 1000
# Tokens at the most of a message beside its text, and of a picture or recording.
MESSAGE_TOKENS, PART_TOKENS = 16, 4096
# Share of a context that is left free, and that of an answer whose length the request does not limit.
SPARE, ANSWER = 1 / 16, 1 / 4
SETTINGS: dict[str, Any] = {"keep_s": 24 * 60 * 60, "contexts": {}}
FORGET = "DELETE FROM corral.sessions WHERE until < now()"
FIND = """SELECT id, data, keep_s, extract(epoch FROM created)::float8 AS created,
    extract(epoch FROM until)::float8 AS until,
    (SELECT count(*)::int FROM corral.turns WHERE turns.key = sessions.key AND session = id) AS turns
  FROM corral.sessions WHERE key = $1 AND ($2::text IS NULL OR id = $2) AND until > now()
  ORDER BY created DESC, id LIMIT $3::int OFFSET $4::int"""
CREATE = """INSERT INTO corral.sessions (key, id, data, keep_s, until)
  VALUES ($1, $2, $3, $4::int, now() + $4::int * interval '1 second') ON CONFLICT DO NOTHING"""
EXTEND = """UPDATE corral.sessions SET keep_s = coalesce($3::int, keep_s),
    until = now() + coalesce($3::int, keep_s) * interval '1 second'
  WHERE key = $1 AND id = $2 AND until > now()"""
DELETE = "DELETE FROM corral.sessions WHERE key = $1 AND id = $2 AND until > now()"
TURNS = "SELECT * FROM corral.turns WHERE key = $1 AND session = $2 ORDER BY number DESC LIMIT $3::int"
# A session that was deleted meanwhile stays so.
ADD = """WITH of AS (
    UPDATE corral.sessions SET until = now() + keep_s * interval '1 second'
    WHERE key = $1 AND id = $2 AND until > now() RETURNING id
  )
  INSERT INTO corral.turns (key, session, messages, tokens, answer, head, head_hash, head_tokens)
  SELECT $1, id, $3, $4::int, $5::int, $6, $7, $8::int FROM of"""

log = logging.getLogger("corral.sessions")


class Refusal(ProxyException):
    """An error in OpenAI's format whose `code` is a name."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message, "invalid_request_error", "session_id", status, openai_code=code)

    def to_dict(self) -> dict[str, Any]:
        """The object below `error`."""
        return {**super().to_dict(), "code": self.openai_code}


class Turn(NamedTuple):  # no dataclass: LiteLLM puts the module nowhere that one could look itself up
    """A turn of a session that is to be kept once it is answered."""

    key: str
    session: str
    # System messages, and with them the tools, by which two heads are compared.
    head: list[Any]
    head_hash: str
    head_size: int
    added: list[Any]
    # Tokens of the turns before that the model gets.
    before: int


_turn: ContextVar[Turn | None] = ContextVar("corral_session_turn", default=None)


class CorralSessions(CustomLogger):
    """LiteLLM hooks that put sessions before chats and keep their turns; one instance serves a worker."""

    def __init__(self, contexts: Mapping[str, int]) -> None:
        super().__init__()
        self._contexts = contexts

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Puts the messages of the session before those of a chat.

        Raises:
            Refusal: 400 and 404, for a session that cannot be.
            HTTPException: 503, the database does not answer.
        """
        _turn.set(None)
        if call_type not in {"completion", "acompletion"} or data.get("session_id") is None:
            return data
        key, name, messages = owner(user_api_key_dict), identifier(data.pop("session_id")), data.get("messages")
        if not isinstance(messages, list) or not all(isinstance(item, Mapping) for item in messages):
            raise Refusal(BAD_REQUEST, "invalid_request", "messages must be a list of messages")
        turns = await _opened(key, name)
        head, added = split(messages)
        head = head or (json.loads(turns[-1]["head"]) if turns else [])
        tools = json.dumps(data.get("tools") or [])
        digest, head_size = sha256(f"{json.dumps(head)} {tools}".encode()).hexdigest(), size(head) + len(tools)
        known = turns[-1]["head_tokens"] if turns and turns[-1]["head_hash"] == digest else head_size
        if context := self._contexts.get(str(data.get("model"))):
            limit = data.get("max_completion_tokens") or data.get("max_tokens")
            answer = limit if isinstance(limit, int) else int(context * ANSWER)
            turns = fitting(turns, int(context * (1 - SPARE)) - answer - known - size(added) - _unread(turns))
        history = [message for turn in turns for message in json.loads(turn["messages"])]
        data["messages"] = [*head, *history, *added]
        before = sum(turn["tokens"] for turn in turns)
        _turn.set(Turn(key, name, head, digest, head_size, added, before))
        return data

    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: object, response: Any
    ) -> None:
        """Keeps a plain answer."""
        turn = _turn.get()
        if turn and getattr(response, "object", None) == "chat.completion":
            await _keep(turn, response)

    def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: object, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """The stream, whose answer is kept before the client learns that it is complete."""
        turn = _turn.get()
        return _kept(turn, response) if turn else response


async def _kept(turn: Turn, response: AsyncIterator[Any]) -> AsyncIterator[Any]:
    chunks: list[Any] = []
    end: list[Any] = []
    async for chunk in response:
        chunks.append(chunk)
        if end or any(choice.finish_reason for choice in getattr(chunk, "choices", None) or ()):
            end.append(chunk)
        else:
            yield chunk
    if end:
        await _keep(turn, litellm.stream_chunk_builder(chunks))
    for chunk in end:
        yield chunk


async def _keep(turn: Turn, answer: Any) -> None:
    """Writes a turn; a client that has its answer need not know that this failed."""
    message = answer.choices[0].message.model_dump(exclude_none=True)
    kept = {"role": "assistant", "content": message.get("content") or ""}
    kept |= {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    usage, length = getattr(answer, "usage", None), size([kept])
    rest = max(usage.prompt_tokens - turn.before, 1) if usage else turn.head_size + size(turn.added)
    head = rest * turn.head_size // (turn.head_size + size(turn.added)) if turn.head else 0
    thoughts = len(str(message.get("reasoning_content") or "").encode())
    said = usage.completion_tokens * length // (length + thoughts) + 1 if usage else length
    messages = json.dumps([*turn.added, kept])
    row = (messages, rest - head + said, said, json.dumps(turn.head), turn.head_hash, head)
    try:
        await _write(ADD, turn.key, turn.session, *row)
    except HTTPException:
        log.warning("a turn was not kept")


# --- what a model gets


def split(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    """The system messages in front, and the others."""
    count = next((at for at, item in enumerate(messages) if item.get("role") not in ("system", "developer")), None)
    return (messages, []) if count is None else (messages[:count], messages[count:])


def size(messages: list[Any]) -> int:
    """How many tokens messages have at the most: every byte may be one."""
    return sum(MESSAGE_TOKENS + _size(item.get("content")) + _size(item.get("tool_calls")) for item in messages)


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    parts = value if isinstance(value, list) else []
    sizes = [_size(part.get("text") or json.dumps(part.get("function"))) for part in parts if isinstance(part, Mapping)]
    pictures = [part for part in parts if isinstance(part, Mapping) and not {"text", "function"} & part.keys()]
    return sum(sizes) + PART_TOKENS * len(pictures)


def _unread(turns: list[Any]) -> int:
    """How many tokens more than counted the last answer may have when it is read, which no request has measured yet."""
    return max(0, size(json.loads(turns[-1]["messages"])[-1:]) - turns[-1]["answer"]) if turns else 0


def fitting(turns: list[Any], room: int) -> list[Any]:
    """The newest turns that have room; a tool's result does not come without its call."""
    first = len(turns)
    while first and turns[first - 1]["tokens"] <= room:
        first -= 1
        room -= turns[first]["tokens"]
    while first < len(turns) and json.loads(turns[first]["messages"])[0].get("role") == "tool":
        first += 1
    return turns[first:]


# --- the store


async def _opened(key: str, name: str) -> list[Any]:
    """The turns of a session, the oldest one first; a session with a name of the client's own is made here."""
    if not await _write(EXTEND, key, name, None):
        if name.startswith(MADE):
            raise _no_session()
        await _write(FORGET)
        await _write(CREATE, key, name, "{}", SETTINGS["keep_s"])
    return list(reversed(await _read(TURNS, key, name, MOST_TURNS)))


async def _database() -> Any:
    return await next(item.conversations for item in litellm.callbacks if hasattr(item, "conversations"))()


async def _read(statement: str, *values: object) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = await (await _database()).query_raw(statement, *values)
    except PrismaError as error:
        raise _no_database(error) from error
    return found


async def _write(statement: str, *values: object) -> int:
    """How many rows it has changed."""
    try:
        return int(await (await _database()).execute_raw(statement, *values))
    except PrismaError as error:
        raise _no_database(error) from error


def _no_database(error: PrismaError) -> HTTPException:
    log.warning("the database with the sessions does not answer: %s", type(error).__name__)
    return HTTPException(UNAVAILABLE, "the database with the sessions does not answer")


def _no_session() -> Refusal:
    return Refusal(
        NOT_FOUND, "session_not_found", "this key has no such session: it was deleted, has expired, or never was"
    )


def owner(key: Any) -> str:
    """What stands for a key in the database."""
    return sha256(str(key.api_key).encode()).hexdigest()


def identifier(name: object) -> str:
    """A session's id, if it can be one."""
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise Refusal(BAD_REQUEST, "invalid_session_id", "session_id has 1 to 128 letters, digits and . _ : -")
    return name


# --- the routes


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    times = {"created_at": row["created"], "expires_at": row["until"], "ttl_s": row["keep_s"]}
    return {"id": row["id"], "object": "session", **times, "turns": row["turns"], "data": json.loads(row["data"])}


async def _found(key: str, name: str) -> dict[str, Any]:
    rows = await _read(FIND, key, identifier(name), 1, 0)
    if not rows:
        raise _no_session()
    return _shown(rows[0])


def _ttl_s(body: Mapping[str, Any]) -> int | None:
    told, most = body.get("ttl_s", body.get("ttl")), SETTINGS["keep_s"]
    if told is not None and (isinstance(told, bool) or not isinstance(told, int) or not 1 <= told <= most):
        raise Refusal(BAD_REQUEST, "invalid_ttl", f"ttl_s is a number of seconds from 1 to {most}")
    return told


def install(server: Any) -> None:
    """Adds the routes to LiteLLM's application, before its own."""
    router, asked = APIRouter(), Depends(server.user_api_key_auth)
    nothing = Body(default={})

    @router.post(PATH, response_model=None)
    async def create(body: dict[str, Any] = nothing, key: Any = asked) -> dict[str, Any]:
        data = json.dumps(body.get("data") or {})
        if len(data) > MOST_DATA:
            raise Refusal(BAD_REQUEST, "invalid_data", f"data has {MOST_DATA} characters of JSON at the most")
        name = identifier(body.get("id") or f"{MADE}{secrets.token_hex(16)}")
        await _write(FORGET)
        if not await _write(CREATE, owner(key), name, data, _ttl_s(body) or SETTINGS["keep_s"]):
            raise Refusal(CONFLICT, "session_exists", "this key has a session with this id")
        return await _found(owner(key), name)

    @router.get(PATH, response_model=None)
    async def listed(
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        key: Any = asked,
    ) -> dict[str, Any]:
        rows = await _read(FIND, owner(key), None, limit + 1, offset)
        return {"object": "list", "data": [_shown(row) for row in rows[:limit]], "has_more": len(rows) > limit}

    @router.get(f"{PATH}/{{name}}", response_model=None)
    async def one(name: str, key: Any = asked) -> dict[str, Any]:
        return await _found(owner(key), name)

    @router.get(f"{PATH}/{{name}}/messages", response_model=None)
    async def messages(
        name: str, limit: Annotated[int, Query(ge=1, le=1000)] = 100, key: Any = asked
    ) -> dict[str, Any]:
        await _found(owner(key), name)
        turns = await _read(TURNS, owner(key), name, limit)
        found = [message for turn in reversed(turns) for message in json.loads(turn["messages"])]
        return {"object": "list", "data": found[-limit:]}

    @router.post(f"{PATH}/{{name}}/extend", response_model=None)
    async def extend(name: str, body: dict[str, Any] = nothing, key: Any = asked) -> dict[str, Any]:
        await _write(EXTEND, owner(key), identifier(name), _ttl_s(body))
        return await _found(owner(key), name)

    @router.delete(f"{PATH}/{{name}}", response_model=None)
    async def delete(name: str, key: Any = asked) -> dict[str, Any]:
        if not await _write(DELETE, owner(key), identifier(name)):
            raise _no_session()
        return {"id": name, "object": "session", "deleted": True}

    server.app.router.routes[:0] = router.routes


path = Path(__file__).with_name("conversations.yaml")
if path.is_file():
    SETTINGS |= yaml.safe_load(path.read_text(encoding="utf-8"))
if "litellm.proxy.proxy_server" in sys.modules:  # not in a test of this file
    install(sys.modules["litellm.proxy.proxy_server"])

corral_sessions = CorralSessions(SETTINGS["contexts"])
