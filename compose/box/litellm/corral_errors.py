# Rendered by corral from the inventory "farm", host box; do not edit.
# Change the inventory or litellm/corral_errors.py, then run: ./generate.py render

"""LiteLLM callback: gives every error one shape, for all interfaces and from every source.

    {"type": "error", "error": {"type": "…", "message": "…", "param": null, "code": "context_length_exceeded"}}

It is Anthropic's shape with OpenAI's fields added, so clients of both find what they look for. The types are
Anthropic's. The codes are OpenAI's, and null for an error that has none. HAProxy's own errors have the same shape.

`ErrorFormat` is a layer around LiteLLM's application: it rewrites the body of each error, including those that LiteLLM
answers before any callback runs. It also begins a streamed answer that has to wait, and tells its client every 15
seconds that it goes on, so that neither the client nor a proxy gives up. LiteLLM has a setting for that, too, but then
runs each streamed request in a second task, with a further one for each token. The hooks refuse requests that no server
could answer, and correct LiteLLM's statuses.

LiteLLM loads this file from beside its `config.yaml`, on every site.
"""
# ruff: noqa: ARG002 - LiteLLM passes the parameters of hooks by name

from __future__ import annotations

import ast
import asyncio
import gzip
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple
from uuid import uuid4

from fastapi import Depends, HTTPException
from litellm._logging import verbose_proxy_logger
from litellm.integrations.custom_logger import CustomLogger

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]

BAD_REQUEST, NOT_FOUND, TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE = 400, 404, 429, 503
RETRY_AFTER = "retry-after"
DELAY_OR_DATE = re.compile(r"[\w,: .+-]{1,40}", re.ASCII)
SOON_S = "5"
MOST_SHOWN = 127
# The pool for models that do not exist; without it they get 404.
UNKNOWN_MODEL = os.environ.get("CORRAL_UNKNOWN_MODEL", "")
# LiteLLM's messages for a backend that was unreachable or closed the connection without an answer.
#
# The first comes from OpenAI's library, the others from LiteLLM's own connections.
NOBODY_THERE = re.compile(r"Exception - (Connection error\.|Server disconnected|Cannot connect to host)")

# LiteLLM's errors for a server or provider that refuses the key which it got; for clients' keys LiteLLM has others.
REFUSED_BY_SERVERS = ("AuthenticationError", "PermissionDeniedError")
KEY_REFUSED = "the pool's server or provider refuses the key that this farm has for it; tell the operator"

# --- kinds of pools

# The mode (LiteLLM's word for a kind) that each call needs, without the `a` of asynchronous ones.
MODES = {
    "completion": "chat", "text_completion": "chat", "anthropic_messages": "chat", "responses": "chat",
    "embedding": "embedding", "rerank": "rerank", "image_generation": "image_generation",
    "transcription": "audio_transcription", "speech": "audio_speech",
}  # fmt: skip
PURPOSES = {
    "chat": "chat", "embedding": "embeddings", "rerank": "reranking", "image_generation": "images",
    "audio_transcription": "transcription", "audio_speech": "speech",
}  # fmt: skip

# --- types and codes

# By status; others below 500 have the type of 400, others from 500 that of 500. HAProxy's templates have the same.
BY_STATUS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("not_found_error", "not_found"),
    413: ("request_too_large", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("api_error", "server_error"),
    502: ("api_error", "bad_gateway"),
    503: ("api_error", "service_unavailable"),
    504: ("timeout_error", "timeout"),
}


class Rule(NamedTuple):
    """What an error becomes if its type or message match; None keeps what it has."""

    pattern: re.Pattern[str]
    status: int | None = None
    code: str | None = None
    message: str | None = None


def _rule(pattern: str, status: int | None = None, code: str | None = None, message: str | None = None) -> Rule:
    return Rule(re.compile(pattern, re.IGNORECASE), status, code, message)


CONTEXT = "context_length_exceeded"
QUOTA = "insufficient_quota"
RULES = (
    _rule(
        r"ContextWindowExceeded|exceed_context_size|context_length_exceeded|available context size"
        r"|maximum context length|input \(\d+ tokens\) is too large to process",
        BAD_REQUEST, CONTEXT,
    ),
    _rule(r"Exceeded budget for", TOO_MANY_REQUESTS, QUOTA, "the budget of this pool is spent"),
    _rule(r"budget_?exceeded|budget has been exceeded|over budget|insufficient_quota", TOO_MANY_REQUESTS, QUOTA),
    _rule(
        r"token_not_found_in_db|no_db_connection|VerificationTokenTable|Malformed API Key", 401, "invalid_api_key",
        "this key is not known here",
    ),
    _rule(r"expired_key", 401, "invalid_api_key", "this key has expired"),
    _rule(r"key_model_access_denied|model .{1,140} does not exist", None, "model_not_found"),
    # What llama-server answers with 500 although the request is wrong; clients would repeat it.
    _rule(r"Failed to parse|Unsupported tool type|Unsupported param", BAD_REQUEST),
    _rule(r"No deployments available|No healthy deployment", None, None, "no replica of this pool can be used now"),
    _rule(
        r"payload is not completed|incomplete chunked read|peer closed connection|Server disconnected", None, None,
        "the replica broke the connection",
    ),
    _rule(
        r"object has no attribute|object is not subscriptable|\bTypeError\b|\bKeyError\b", None, None,
        "the request could not be processed: a field probably has the wrong type",
    ),
)  # fmt: skip

# --- messages

NAMES = re.compile(r"^(?:(?:litellm\.)?[\w-]*(?:Error|Exception)(?:: | - )|\d{3}: )+")
REST = re.compile(
    r"\s*(?:LiteLLM: model group|model=\S* context_window_fallbacks|Received Model Group|Available Model Group"
    r"|Set 'context_window_fallback|Original exception:).*",
    re.DOTALL,
)
LINKS = re.compile(r"[^.\n]*https?://(?:docs|www)\.litellm\.ai\S*")
HASHES = re.compile(r"\b[0-9a-f]{64}\b")
INNER = re.compile(r"""\{\s*["'](?:error|type)["']:.*\}""", re.DOTALL)
TOKENS = re.compile(r"\((\d+) tokens\)\D+(\d+)")
# How the events of a stream begin that are errors.
STREAM_ERRORS = (b'data: {"error"', b"event: error", b'data: {"type":"response.failed"', b"event: response.failed")

# --- streams that wait

# Seconds of silence after which the client of a stream gets a sign of life. The first one begins the answer, with 200.
KEEP_ALIVE_S = 15.0
# A comment, which clients skip; for Anthropic's, the event that their interface has for this.
COMMENT = b": keep-alive\n\n"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
END_OF_EVENT = b"\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    b"content-type": b"text/event-stream; charset=utf-8", b"cache-control": b"no-cache", b"x-accel-buffering": b"no",
}  # fmt: skip

# The answer to the request that is being processed.
_answer: ContextVar[Answer] = ContextVar("corral_errors_answer")


class ErrorFormat:
    """The layer around an ASGI application."""

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Processes a request.

        LiteLLM raises an error again after it has answered 500; the server would then close the connection on which
        HAProxy sends other clients' requests. So this logs such an error.
        """
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        answer = Answer(send)
        try:
            await self._application(scope, receive, answer.send)
        except Exception:
            if not answer.is_complete:
                raise
            verbose_proxy_logger.exception("the request to %s failed", scope.get("path"))
        finally:
            answer.end()


class Answer:
    """The answer to one request: its error rewritten, and while a stream is silent, signs of life."""

    def __init__(self, send: Send) -> None:
        self._send = send
        # The start and the body of an error, until it is complete.
        self._error: Message | None = None
        self._body = b""
        # Headers for an error.
        self.headers: dict[str, str] = {}
        self.is_complete = False
        # LiteLLM's name of the call, and the model, for a stream.
        self._call_type = self._model = ""
        self._keeper: asyncio.Task[None] | None = None
        self._is_begun = self._has_spoken = False
        self._last = END_OF_EVENT
        _answer.set(self)

    async def send(self, message: Message) -> None:
        """Passes on a message of the application; holds an error until its body is complete."""
        self._has_spoken = True
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body")
            await self._go_on(message, message.get("body", b""))
        else:
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        if _is_error(start):
            self._error = start
        elif not self._is_begun:
            self._is_begun = True
            await self._send(start)

    async def _go_on(self, message: Message, body: bytes) -> None:
        self._last = body or self._last
        if self._error is not None:
            self._body += body
            if self.is_complete:
                await self._send_error(self._error)
        elif body.startswith(STREAM_ERRORS):
            await self._send({**message, "body": rewritten_event(body)})
        else:
            await self._send(message)

    async def _send_error(self, start: Message) -> None:
        start, body = rewritten(start, self._body, self.headers)
        if self._is_begun:
            body = last_event(body, self._call_type, self._model)
        else:
            await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def keep_alive(self, call_type: str, model: str) -> None:
        """Tells the client of a stream from now on that it goes on, whenever it has been silent for some time."""
        self._call_type, self._model = call_type, model
        self._keeper = self._keeper or asyncio.create_task(
            self._keep_alive(PING if "anthropic" in call_type else COMMENT)
        )

    async def _keep_alive(self, sign: bytes) -> None:
        while True:
            self._has_spoken = False
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._has_spoken or not self._last.endswith(END_OF_EVENT):
                continue
            if not self._is_begun:
                self._is_begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS.items()]})
            if not self.is_complete:
                await self._send({"type": "http.response.body", "body": sign, "more_body": True})

    def end(self) -> None:
        """Ends the signs of life."""
        if self._keeper is not None:
            self._keeper.cancel()


def _is_error(start: Message) -> bool:
    kind = dict(start.get("headers") or ()).get(b"content-type", b"")
    return bool(start["status"] >= BAD_REQUEST and kind.startswith((b"application/json", b"text/plain")))


def rewritten(start: Message, body: bytes, added: Mapping[str, str]) -> tuple[Message, bytes]:
    """The start and the body of an error for the client."""
    headers = {name.lower(): value for name, value in start["headers"]}
    if headers.pop(b"content-encoding", b"") == b"gzip":
        body = gzip.decompress(body)
    payload: object = body.decode(errors="replace")
    with suppress(ValueError):
        payload = json.loads(body)
    status, error = described(start["status"], payload)
    headers |= {name.encode(): value.encode() for name, value in added.items()}
    if status == TOO_MANY_REQUESTS and error["code"] != QUOTA:
        headers.setdefault(RETRY_AFTER.encode(), SOON_S.encode())
    text = _json(error)
    headers |= {b"content-type": b"application/json", b"content-length": str(len(text)).encode()}
    return {**start, "status": status, "headers": list(headers.items())}, text


def last_event(error: bytes, call_type: str, model: str) -> bytes:
    """An error as the end of a stream that has begun without a word of the answer, in the shape of its interface."""
    if "anthropic" in call_type:
        return b"event: error\ndata: " + error + END_OF_EVENT
    if "responses" not in call_type:
        return b"data: " + error + END_OF_EVENT + DONE
    found = json.loads(error)["error"]
    response = {
        "id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model,
        "status": "failed", "error": {"code": found["code"] or "server_error", "message": found["message"]},
        "output": [], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    event = {"type": "response.failed", "sequence_number": 0, "response": response}
    return b"event: response.failed\ndata: " + json.dumps(event, ensure_ascii=False).encode() + END_OF_EVENT + DONE


def rewritten_event(event: bytes) -> bytes:
    """An error in the middle of a stream, in the shape of all others; that of a response keeps its own."""
    head, mark, data = event.partition(b"data: ")
    try:
        payload = json.loads(data)
    except ValueError:
        return event
    failed = payload.get("response") or payload
    status = str((failed.get("error") or {}).get("code"))
    _, error = described(int(status) if status.isdecimal() else 500, failed)
    if failed is payload:
        return head + mark + _json(error) + b"\n\n"
    failed["error"] = {"code": error["code"], "message": error["message"]}
    return head + mark + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"


def _json(error: Mapping[str, Any]) -> bytes:
    return json.dumps({"type": "error", "error": error}, ensure_ascii=False, separators=(",", ":")).encode()


def described(status: int, payload: object) -> tuple[int, dict[str, Any]]:
    """The status for the client, and the object below `error`.

    Args:
        status: LiteLLM's.
        payload: the body of LiteLLM's answer: JSON with `error` or `detail`, or a text.
    """
    found = _found(payload)
    message, kind, code = str(found.get("message") or ""), str(found.get("type") or ""), found.get("code")
    named = code if isinstance(code, str) and not code.isdecimal() else None
    rule = next((rule for rule in RULES if rule.pattern.search(f"{kind} {code} {message}")), None)
    if rule is not None:
        status, named, message = rule.status or status, rule.code or named, rule.message or message
    status = BAD_REQUEST if status == 422 else 500 if status == 501 else status  # noqa: PLR2004
    known = BY_STATUS.get(status) or (BY_STATUS[500] if status >= 500 else (BY_STATUS[400][0], None))  # noqa: PLR2004
    text = plain(message) or "the gateway has no further information"
    if named == CONTEXT:
        text = _too_long(text)
    return status, {"type": known[0], "message": text, "param": found.get("param"), "code": named or known[1]}


def _found(payload: object) -> Mapping[str, Any]:
    """The error in an answer of LiteLLM's, of FastAPI's or of a server's."""
    inner = payload
    for name in ("error", "detail"):
        if isinstance(inner, Mapping) and name in inner:
            inner = inner[name]
    if isinstance(inner, list):  # FastAPI's, for fields that are missing or of the wrong type
        told = [f"{'.'.join(map(str, item.get('loc', ())[1:]))}: {item.get('msg')}" for item in inner]
        return {"message": "; ".join(told)}
    return inner if isinstance(inner, Mapping) else {"message": str(inner)}


def plain(text: str) -> str:
    """A message without LiteLLM's names, advice for its operator, hashes of keys and JSON around it."""
    text = NAMES.sub("", REST.sub("", text)).strip()
    if nested := INNER.search(text):
        inner = _parsed(nested[0])
        message = inner.get("message") if isinstance(inner, Mapping) else inner
        if isinstance(message, str):
            return plain(message)
    return HASHES.sub("…", LINKS.sub("", text)).strip()


def _parsed(text: str) -> object:
    """The value of `error` in a text of JSON or Python."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return parse(text).get("error")
    return None


def _too_long(text: str) -> str:
    """A message that clients recognise: they search it for the words of Anthropic or of OpenAI."""
    numbers = TOKENS.search(text)
    if numbers is None:
        return f"prompt is too long: {text}"
    return (
        f"prompt is too long: {numbers[1]} tokens > {numbers[2]} maximum;"
        f" this model's maximum context length is {numbers[2]} tokens"
    )


# --- hooks


class CorralErrors(CustomLogger):
    """LiteLLM hooks for requests that fail; one instance serves every request of a worker."""

    async def async_pre_call_hook(
        self, user_api_key_dict: object, cache: object, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Returns the request; where the site names a pool for models that do not exist, such a request gets its name.

        Raises:
            HTTPException: 400 for a pool of another kind, or messages that are none.
        """
        if UNKNOWN_MODEL and is_unknown(data.get("model")):
            data["model"] = UNKNOWN_MODEL
        mode = MODES.get(call_type.removeprefix("a"), MODES.get(call_type))
        _check_kind(data.get("model"), mode)
        messages = data.get("messages")
        if messages is not None and not _are_messages(messages):
            raise HTTPException(
                BAD_REQUEST, 'messages must be a list of objects, such as [{"role": "user", "content": "…"}]'
            )
        if mode == "chat" and data.get("stream") is True and (answer := _answer.get(None)) is not None:
            answer.keep_alive(call_type, str(data.get("model")))
        return data

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: object,
        traceback_str: str | None = None,
    ) -> None:
        """Corrects the status, and passes on `Retry-After`, which LiteLLM alone would hide."""
        _correct_status(original_exception, request_data.get("model"))
        if str(getattr(original_exception, "status_code", "")) == str(TOO_MANY_REQUESTS):
            delay = _delay(original_exception)
            if delay and (answer := _answer.get(None)) is not None:
                answer.headers[RETRY_AFTER] = delay


def _check_kind(model: object, mode: str | None) -> None:
    """Raises HTTPException if a pool is not for this kind of request."""
    actual = _mode_of(str(model))
    if mode and actual in PURPOSES and actual != mode:
        raise HTTPException(
            BAD_REQUEST,
            f"'{str(model)[:MOST_SHOWN]}' is for {PURPOSES[actual]}, not for {PURPOSES[mode]};"
            " GET /v1/models lists the models of your key, each with its mode",
        )


def _mode_of(model: str) -> str | None:
    """The mode of a pool or alias, where the configuration says it."""
    from litellm.proxy import proxy_server

    router = proxy_server.llm_router
    if router is None:
        return None
    alias = (router.model_group_alias or {}).get(model, model)
    places = router.model_name_to_deployment_indices.get(alias if isinstance(alias, str) else model)
    info = (router.model_list[places[0]].get("model_info") if places else None) or {}
    return info.get("mode")


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _delay(error: Exception) -> str:
    """The server's `Retry-After`; empty for none. A slot of one's own is free as soon as an answer ends."""
    own = _lower_case(getattr(error, "headers", None))
    if own.get("rate_limit_type") == "max_parallel_requests":
        return SOON_S
    told = getattr(error, "litellm_response_headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )
    delay = own.get(RETRY_AFTER) or _lower_case(told).get(RETRY_AFTER, "")
    return delay if DELAY_OR_DATE.fullmatch(delay) else ""


def _correct_status(error: Exception, model: object) -> None:
    """Replaces LiteLLM's status by OpenAI's.

    404 for an unknown model, 401 for an unknown key, 429 for a budget that is spent, 503 when no server took the
    request: on a reused connection, HAProxy signals that by closing it. 503 also when a server or provider refuses the
    farm's own key: the client's key is not to blame.
    """
    kind = str(getattr(error, "type", ""))
    if NOBODY_THERE.search(str(getattr(error, "message", ""))) and str(getattr(error, "status_code", "")) == "500":
        vars(error)["status_code"] = SERVICE_UNAVAILABLE
    if type(error).__name__ in REFUSED_BY_SERVERS:
        vars(error).update(status_code=SERVICE_UNAVAILABLE, message=KEY_REFUSED)
    elif type(error).__name__ == "BudgetExceededError":
        vars(error)["status_code"] = TOO_MANY_REQUESTS
    elif kind.endswith("no_db_connection"):  # without a database the master key is the only key
        vars(error).update(code="401", type="auth_error", message="this key is not known here")
    elif not is_unknown(model):
        return
    elif type(error).__name__ == "ProxyModelNotFoundError":
        vars(error).update(status_code=NOT_FOUND, detail=_no_such_model(model))
    elif kind.endswith("key_model_access_denied"):
        vars(error).update(code=str(NOT_FOUND), message=_no_such_model(model))


def _no_such_model(model: object) -> str:
    return f"The model '{str(model)[:MOST_SHOWN]}' does not exist. GET /v1/models lists the models of your key."


def is_unknown(model: object) -> bool:
    """Whether the gateway has no pool, alias or deployment of this name."""
    if not isinstance(model, str) or not model:
        return False
    from litellm.proxy import proxy_server

    router = proxy_server.llm_router
    if router is None:
        return False
    known = model in router.model_names or model in (router.model_group_alias or {}) or router.has_model_id(model)
    return not known and not router.pattern_router.route(model)


def _lower_case(headers: object) -> dict[str, str]:
    items = headers.items() if isinstance(headers, Mapping) else ()
    return {str(name).lower(): str(value) for name, value in items}


def install(server: Any) -> None:
    """Puts the layer around LiteLLM's application, and replaces `GET /v1/models/NAME`.

    LiteLLM's own finds neither aliases nor names with a slash.
    """

    async def model(model_id: str, key: Any = Depends(server.user_api_key_auth)) -> dict[str, Any]:  # noqa: B008
        listed = (await server.model_list(user_api_key_dict=key))["data"]
        found: dict[str, Any] | None = next((item for item in listed if item["id"] == model_id), None)
        if found is None:
            raise HTTPException(NOT_FOUND, _no_such_model(model_id))
        return found

    routes = server.app.router.routes
    server.app.add_api_route("/v1/models/{model_id:path}", model, response_model=None)
    routes.insert(0, routes.pop())
    server.app.middleware_stack = ErrorFormat(server.app.middleware_stack or server.app.build_middleware_stack())


if "litellm.proxy.proxy_server" in sys.modules:  # not in a test of this file
    install(sys.modules["litellm.proxy.proxy_server"])

corral_errors = CorralErrors()
