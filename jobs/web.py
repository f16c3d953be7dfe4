"""What all parts of the API of jobs use: the store, errors in the gateway's shape, and whose key it is."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated
from urllib.parse import quote

import httpx
from fastapi import Depends, Header, HTTPException

from store import Settings, Store, owner_of

SETTINGS = Settings.read()
STORE = Store(SETTINGS)
# How long in seconds an answer about a key is believed.
BELIEVED_S = 30.0
RETRY_AFTER_S = 10
GATEWAY = httpx.AsyncClient(base_url=SETTINGS.gateway, timeout=30, trust_env=False)
# By owner, when the gateway was asked about a key, and its answer.
answers: dict[str, tuple[float, asyncio.Task[int]]] = {}


def refusal(status: int, code: str, message: str) -> HTTPException:
    """An error in the gateway's shape."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "api_error"}
    error = {"type": kind.get(status, "invalid_request_error"), "message": message, "param": None, "code": code}
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in {429, 503} else None
    return HTTPException(status, {"type": "error", "error": error}, headers)


async def caller(authorization: Annotated[str, Header()] = "") -> str:
    """The key of a request, which the gateway knows."""
    key = authorization.removeprefix("Bearer ").strip()
    owner, now = owner_of(key), time.monotonic()
    for old in [name for name, (since, answer) in answers.items() if since < now - BELIEVED_S and answer.done()]:
        del answers[old]
    if owner not in answers:
        answers[owner] = now, asyncio.create_task(_status(key))
    status = await asyncio.shield(answers[owner][1])
    if status in {401, 403}:
        raise refusal(401, "invalid_api_key", "send a key of this farm: Authorization: Bearer sk-…")
    if status != httpx.codes.OK:
        answers.pop(owner, None)
        raise refusal(503, "service_unavailable", "the gateway does not answer for this key")
    return key


async def _status(key: str) -> int:
    """What the gateway says to a key; 0 when it says nothing."""
    try:
        return (await GATEWAY.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code if key else 401
    except httpx.HTTPError:
        return 0


Key = Annotated[str, Depends(caller)]


async def opens(key: str, model: str) -> bool:
    """Whether a key may call a model, as the gateway would decide; asked for jobs that no gateway sees."""
    try:
        headers = {"Authorization": f"Bearer {key}"}
        return (await GATEWAY.get(f"/v1/models/{quote(model)}", headers=headers)).is_success
    except httpx.HTTPError:
        return False


async def own_job(job_id: str, key: Key) -> dict[str, str]:
    """The job in the path, if it is the caller's."""
    job = await STORE.fields(job_id)
    if job.get("owner") != owner_of(key):
        raise refusal(404, "not_found", "this key has no such job")
    return job


Own = Annotated[dict[str, str], Depends(own_job)]
