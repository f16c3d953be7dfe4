"""Jobs as clients send and read them. A job belongs to the key with which it was sent; no other key sees it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from store import FINISHED, LISTED, PATHS, owner_of, shown
from web import SETTINGS, STORE, Key, Own, opens, refusal

# How often in seconds a quiet stream says that it is still there.
SIGN_OF_LIFE_S = 15.0
LISTED_AT_ONCE = 100
JobType = Literal["chat", "vision", "vision_inference", "embeddings"]
ONE = "/v1/jobs/{job_id}"
router = APIRouter()


class Item(BaseModel):
    """One request of a batch."""

    type: JobType = "chat"
    request: dict[str, Any]
    custom_id: str | None = Field(None, max_length=200)


class Callback(BaseModel):
    """Where the result goes, and the token that its receiver wants; `auth_type` is jarvis's word for how it is sent."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=2000, pattern=r"^[!-~]+$")
    token: str | None = Field(None, max_length=2000, pattern=r"^[!-~]+$")
    auth_type: str | None = Field(None, pattern=r"^(?i:bearer)$")


class Submission(BaseModel):
    """A job as a client sends it; the second names of fields are those of jarvis's queue."""

    type: Literal["chat", "vision", "vision_inference", "embeddings", "batch"] = Field(
        "chat", validation_alias=AliasChoices("type", "job_type")
    )
    request: dict[str, Any] | None = None
    requests: list[Item] = Field(default=[], max_length=10_000)
    callback: Callback | str | None = Field(None, validation_alias=AliasChoices("callback", "callback_url"))
    ttl_s: int | None = Field(None, ge=1, le=30 * 86_400, validation_alias=AliasChoices("ttl_s", "ttl", "ttl_seconds"))
    retries: int | None = Field(None, ge=0)
    idempotency_key: str | None = Field(None, max_length=200)
    job_id: str | None = Field(None, max_length=200)
    created_at: datetime | None = None
    metadata: dict[str, Any] | None = None


# --- new jobs


def _callback(told: Callback | str) -> Callback:
    """A callback whose receiver is one of those that the inventory allows."""
    callback = Callback(url=told) if isinstance(told, str) else told
    try:
        parts = urlsplit(callback.url)
        origin = f"{parts.scheme}://{parts.netloc}".lower()
    except ValueError:
        origin = ""
    if origin not in {allowed.lower() for allowed in SETTINGS.callbacks}:
        raise refusal(400, "callback_not_allowed", "jobs.callbacks of this farm does not have this origin")
    return callback


def _checked(request: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """The request of a job, with a model."""
    wanted = request.get("response_format") or {}
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema" and not wanted.get("json_schema"):
        raise refusal(400, "missing_schema", "response_format.json_schema is missing")
    if is_chat and not isinstance(request.get("messages"), list):
        raise refusal(400, "invalid_job", "request.messages is missing")
    model = request.get("model") or SETTINGS.model
    if not model:
        raise refusal(400, "invalid_job", "request.model is missing")
    return request | {"model": model}


def _fields(key: str, told: Submission, item: Item, **more: str) -> dict[str, str]:
    """What the store keeps of one request."""
    retries = min(SETTINGS.retries, SETTINGS.retries if told.retries is None else told.retries)
    request = _checked(item.request, is_chat=PATHS[item.type].endswith("completions"))
    return more | {
        "id": more.get("id") or f"job-{uuid4().hex}",
        "type": item.type,
        "model": str(request["model"]),
        "request": STORE.seal(request),
        "key": STORE.seal(key),
        "ttl_s": str(told.ttl_s or SETTINGS.ttl_s),
        "most_attempts": str(retries + 1),
        **({"custom_id": STORE.seal(item.custom_id)} if item.custom_id is not None else {}),
    }


def _new_jobs(key: str, told: Submission) -> list[dict[str, str]]:
    """The jobs of a submission, that which the client is told first."""
    if told.type != "batch":
        if told.request is None:
            raise refusal(400, "invalid_job", "request is missing")
        first, rest = _fields(key, told, Item(type=told.type, request=told.request)), []
    else:
        if not told.requests:
            raise refusal(400, "invalid_job", "requests is missing")
        first = {"id": f"job-{uuid4().hex}", "type": "batch", "open": str(len(told.requests))}
        rest = [_fields(key, told, item, batch=first["id"]) for item in told.requests]
    if told.callback:
        first["callback"] = STORE.seal(_callback(told.callback).model_dump())
    if told.metadata is not None:
        first["metadata"] = STORE.seal(told.metadata)
    if told.job_id:
        first["job_id"] = told.job_id
    return [first, *rest]


async def _with_polled_models(key: str, jobs: list[dict[str, str]]) -> list[dict[str, str]]:
    """The jobs, each with its model only if a poller may take it: one that has it, and that the key opens."""
    known = {model for models in SETTINGS.pollers.values() for model in models}
    polled = {model for model in known & {job.get("model", "") for job in jobs} if await opens(key, model)}
    return [{name: text for name, text in job.items() if name != "model" or text in polled} for job in jobs]


async def submit(key: str, told: Submission, same: str | None, extra: dict[str, str] | None = None) -> tuple[str, bool]:
    """The id of the job, and whether it was there already; `extra` are further fields of it."""
    ttl_s, made = told.ttl_s or SETTINGS.ttl_s, told.created_at or datetime.now(UTC)
    age_s = (datetime.now(UTC) - (made if made.tzinfo else made.replace(tzinfo=UTC))).total_seconds()
    if age_s >= ttl_s:
        raise refusal(400, "expired", "the job had expired before it came")
    if age_s > 1:
        told.ttl_s = max(1, int(ttl_s - age_s))
    name = same or told.idempotency_key
    owner = owner_of(key)
    jobs = await _with_polled_models(key, _new_jobs(key, told))
    jobs[0] |= extra or {}
    found = await STORE.do(
        "submit",
        jobs=jobs,
        owner=owner,
        depth=SETTINGS.depth,
        key_depth=SETTINGS.key_depth,
        keep_s=SETTINGS.keep_s,
        same_s=ttl_s + SETTINGS.keep_s,
        **({"same": owner_of(f"{owner} {told.job_id or ''} {name}")} if name else {}),
    )
    if not found:
        raise refusal(429, "rate_limit_exceeded", "as many jobs wait as may")
    return found[0], found[1] == "same"


@router.post("/v1/jobs")
async def send(key: Key, told: Submission, idempotency_key: Annotated[str | None, Header()] = None) -> Response:
    """Takes a job."""
    job, is_known = await submit(key, told, idempotency_key)
    answer = shown(STORE, await STORE.fields(job)) | {"deduped": is_known}
    return JSONResponse(answer, 200 if is_known else 202)


@router.post("/internal/queue/enqueue")
async def enqueue(key: Key, told: Submission) -> dict[str, Any]:
    """Takes a job in the words of jarvis's queue."""
    job, is_known = await submit(key, told, None)
    return {"accepted": True, "job_id": told.job_id or job, "id": job, "deduped": is_known}


# --- jobs that are there


@router.get("/v1/jobs")
async def listed(key: Key, status: str | None = None) -> dict[str, Any]:
    """The newest jobs of a key, without results; `status` is one of a job, or `undelivered`."""
    names, found = await STORE.redis.zrevrange(f"keys:{owner_of(key)}", 0, -1), []
    for start in range(0, len(names), LISTED_AT_ONCE):
        for job in await STORE.many(names[start : start + LISTED_AT_ONCE], *LISTED):
            words = {job["status"], "undelivered" if job.get("callback_status") == "dead" else None}
            if status is None or status in words:
                found.append(shown(STORE, job))
        if len(found) >= LISTED_AT_ONCE:
            break
    return {"object": "list", "data": found[:LISTED_AT_ONCE]}


@router.get("/v1/jobs/signing-key")
async def signing_key(key: Key) -> dict[str, str]:
    """The secret by which a key's receivers know callbacks of this farm (standardwebhooks.com)."""
    return {"secret": f"whsec_{base64.b64encode(STORE.signing_key(owner_of(key))).decode()}"}


@router.get(ONE)
async def status(job: Own) -> dict[str, Any]:
    """All about a job."""
    answer = shown(STORE, job)
    if "open" in job:
        items = await STORE.redis.lrange(f"items:{job['id']}", 0, -1)
        answer["requests"] = [shown(STORE, item) for item in await STORE.many(items)]
    return answer


@router.delete(ONE)
async def cancel(job: Own) -> dict[str, Any]:
    """Cancels a job that is not finished."""
    await STORE.do("cancel", id=job["id"])
    return shown(STORE, await STORE.fields(job["id"]))


@router.post(f"{ONE}/again")
async def again(job: Own) -> dict[str, Any]:
    """Runs a job again that did not succeed, or delivers its callback again."""
    limits = {"depth": SETTINGS.depth, "key_depth": SETTINGS.key_depth}
    found = await STORE.do("again", id=job["id"], owner=job["owner"], **limits)
    if not found:
        raise refusal(429, "rate_limit_exceeded", "as many jobs wait as may")
    if found == "unfit":
        raise refusal(409, "not_failed", "only what has failed can be sent again")
    return shown(STORE, await STORE.fields(job["id"]))


@router.get(f"{ONE}/events")
async def events(job: Own, last_event_id: Annotated[str, Header()] = "0") -> StreamingResponse:
    """What happens to a job, as server-sent events from the one after Last-Event-ID on."""
    parts = last_event_id.split("-")
    if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts) or len(parts) > 2:  # noqa: PLR2004
        raise refusal(400, "invalid_event_id", "Last-Event-ID is none of this job's")
    return StreamingResponse(_events(job["id"], last_event_id), media_type="text/event-stream")


async def _events(job: str, after: str) -> AsyncIterator[str]:
    last = after
    while True:
        found = await STORE.redis.xread({f"events:{job}": last}, count=100, block=int(SIGN_OF_LIFE_S * 1000))
        for name, event in found[0][1] if found else []:
            last = name
            data = {"text": STORE.open(event["sealed"])} if "sealed" in event else json.loads(event.get("data", "{}"))
            yield f"id: {last}\nevent: {event['event']}\ndata: {json.dumps(data)}\n\n"
            if event["event"] in FINISHED:
                return
        if not found:
            fields = await STORE.fields(job)
            if fields.get("status", "gone") in FINISHED | {"gone"}:
                return
            yield ": waiting\n\n"
