"""OpenAI's files and batches: a batch is a job of type `batch`, whose requests are the lines of a file.

Files of answers and errors are made of the jobs whenever they are read, and end with them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Depends, File, Form, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel, Field, ValidationError

from sending import Item, JobType, Submission, submit
from store import LISTED, owner_of
from web import SETTINGS, STORE, Key, own_job, refusal

TYPES: dict[str, JobType] = {"/v1/chat/completions": "chat", "/v1/embeddings": "embeddings"}
# Fields of a batch beside those of a job, and OpenAI's names of a job's states.
OWN = ("input_file", "endpoint", "window")
STATES = {"running": "in_progress", "succeeded": "completed", "cancelled": "cancelled"}
HOURS = re.compile(r"([1-9][0-9]{0,2})h")
ANSWERS, ERRORS = "file-out-", "file-err-"
LISTED_AT_ONCE = 100
FILE, BATCH = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
router = APIRouter()


# --- files


async def own_file(file_id: str, key: Key) -> dict[str, str]:
    """A file that the caller has sent, or one with what its batch has given; `text` is there as it is kept."""
    for prefix in (ANSWERS, ERRORS):
        if file_id.startswith(prefix):
            job = await own_batch(file_id.removeprefix(prefix), key)
            lines = [json.dumps(line) for line in await _lines(job) if (line["error"] is None) == (prefix == ANSWERS)]
            text = "".join(f"{line}\n" for line in lines)
            shown = {"id": file_id, "name": f"{file_id}.jsonl", "purpose": "batch_output"}
            return shown | {"bytes": str(len(text.encode())), "created_at": job["created_at"], "plain": text}
    found: dict[str, str] = await STORE.redis.hgetall(f"file:{file_id}")
    if found.get("owner") != owner_of(key):
        raise refusal(404, "not_found", "this key has no such file")
    return found


OwnFile = Annotated[dict[str, str], Depends(own_file)]


def _shown_file(file: dict[str, str]) -> dict[str, Any]:
    return {
        "id": file["id"],
        "object": "file",
        "bytes": int(file["bytes"]),
        "created_at": int(float(file["created_at"])),
        "filename": STORE.open(file["filename"]) if "filename" in file else file["name"],
        "purpose": file["purpose"],
        "status": "processed",
    }


@router.post("/v1/files")
async def upload(key: Key, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]) -> dict[str, Any]:
    """Keeps a file of requests for as long as results are kept."""
    if purpose != "batch":
        raise refusal(400, "invalid_purpose", "the purpose of a file is batch")
    text, now = (await file.read()).decode(errors="replace"), time.time()
    fields = {
        "id": f"file-{uuid4().hex}",
        "owner": owner_of(key),
        "filename": STORE.seal(file.filename or ""),
        "purpose": purpose,
        "bytes": str(len(text.encode())),
        "created_at": f"{now:.3f}",
        "text": STORE.seal(text),
    }
    mine = f"files:{fields['owner']}"
    async with STORE.redis.pipeline() as together:
        together.hset(f"file:{fields['id']}", mapping=fields).expire(f"file:{fields['id']}", SETTINGS.keep_s)
        together.zremrangebyscore(mine, "-inf", now - SETTINGS.keep_s)
        together.zadd(mine, {fields["id"]: now}).expire(mine, SETTINGS.keep_s)
        await together.execute()
    return _shown_file(fields)


@router.get("/v1/files")
async def files(key: Key) -> dict[str, Any]:
    """The newest files that a key has sent."""
    names = await STORE.redis.zrevrange(f"files:{owner_of(key)}", 0, LISTED_AT_ONCE - 1)
    found = [await STORE.redis.hgetall(f"file:{name}") for name in names]
    return {"object": "list", "data": [_shown_file(file) for file in found if file], "has_more": False}


@router.get(FILE)
async def file_of(file: OwnFile) -> dict[str, Any]:
    """All about a file but its text."""
    return _shown_file(file)


@router.get(f"{FILE}/content")
async def content(file: OwnFile) -> Response:
    """The text of a file."""
    text = file["plain"] if "plain" in file else STORE.open(file["text"])
    return Response(text, media_type="application/jsonl")


@router.delete(FILE)
async def delete(file: OwnFile) -> dict[str, Any]:
    """Deletes a file that was sent; batches that have begun go on."""
    if "owner" not in file:
        raise refusal(400, "invalid_file", "files of a batch end with it")
    await STORE.redis.delete(f"file:{file['id']}")
    return {"id": file["id"], "object": "file", "deleted": True}


# --- batches


class Batch(BaseModel):
    """A batch as a client asks for it."""

    input_file_id: str = Field(max_length=100)
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


class Line(BaseModel):
    """One request in a file."""

    custom_id: str = Field(max_length=200)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def _items(text: str, endpoint: str) -> Iterator[Item]:
    """The requests of a file."""
    for number, given in enumerate(text.splitlines(), 1):
        try:
            line = Line.model_validate_json(given) if given.strip() else None
        except ValidationError:
            line = Line(custom_id="", method="POST", url="", body={})
        if line and line.url != endpoint:
            wanted = f'{{"custom_id": "…", "method": "POST", "url": "{endpoint}", "body": {{…}}}}'
            raise refusal(400, "invalid_line", f"line {number} of the file is not {wanted}")
        if line:
            line.body.pop("stream", None)
            yield Item(type=TYPES[endpoint], request=line.body, custom_id=line.custom_id)


async def own_batch(batch_id: str, key: Key) -> dict[str, str]:
    """The job behind a batch of the caller's."""
    job = await own_job(batch_id.replace("batch_", "job-", 1), key)
    if "input_file" not in job:
        raise refusal(404, "not_found", "this key has no such batch")
    return job


OwnBatch = Annotated[dict[str, str], Depends(own_batch)]


async def _lines(job: dict[str, str]) -> list[dict[str, Any]]:
    """What a batch has given so far, in the lines of OpenAI's files."""
    items = await STORE.many(await STORE.redis.lrange(f"items:{job['id']}", 0, -1))
    return [_line(item) for item in items if item["status"] not in {"queued", "running"}]


def _line(item: dict[str, str]) -> dict[str, Any]:
    common = {"id": item["id"].replace("job-", "batch_req_", 1), "custom_id": STORE.open(item["custom_id"])}
    if "result" in item:
        body = STORE.open(item["result"])
        return common | {"response": {"status_code": 200, "request_id": item["id"], "body": body}, "error": None}
    error = STORE.error_of(item) if "error" in item else {"code": item["status"], "message": f"it was {item['status']}"}
    return common | {"response": None, "error": error}


async def _shown(job: dict[str, str]) -> dict[str, Any]:
    """A batch as OpenAI shows it."""
    names = await STORE.redis.lrange(f"items:{job['id']}", 0, -1)
    states = [item["status"] for item in await STORE.many(names, "id", "status")]
    done, bad = states.count("succeeded"), sum(map(states.count, ("failed", "expired", "cancelled")))
    name, made = job["id"].replace("job-", "batch_", 1), int(float(job["created_at"]))
    ended = {f"{STATES[job['status']]}_at": int(float(job["finished_at"]))} if "finished_at" in job else {}
    return {
        "id": name,
        "object": "batch",
        "endpoint": job["endpoint"],
        "errors": None,
        "input_file_id": job["input_file"],
        "completion_window": job["window"],
        "status": STATES[job["status"]],
        "output_file_id": f"{ANSWERS}{name}" if ended and done else None,
        "error_file_id": f"{ERRORS}{name}" if ended and bad else None,
        "created_at": made,
        "in_progress_at": made,
        **ended,
        "request_counts": {"total": len(names), "completed": done, "failed": bad},
        "metadata": STORE.open(job["metadata"]) if "metadata" in job else None,
    }


@router.post("/v1/batches")
async def create(key: Key, told: Batch) -> dict[str, Any]:
    """Makes a job of every line of a file."""
    hours = HOURS.fullmatch(told.completion_window)
    if told.endpoint not in TYPES or not hours:
        raise refusal(400, "invalid_batch", f"endpoint is one of {', '.join(TYPES)}, completion_window such as 24h")
    text = STORE.open((await own_file(told.input_file_id, key)).get("text") or STORE.seal(""))
    requests, ttl_s = list(_items(text, told.endpoint)), int(hours[1]) * 3600
    wanted = Submission(type="batch", requests=requests, ttl_s=ttl_s, metadata=told.metadata)
    extra = dict(zip(OWN, (told.input_file_id, told.endpoint, told.completion_window), strict=True))
    job, _ = await submit(key, wanted, None, extra)
    return await _shown(await STORE.fields(job))


@router.get("/v1/batches")
async def listed(key: Key, limit: int = 20, after: str = "") -> dict[str, Any]:
    """The newest batches of a key."""
    names = await STORE.redis.zrevrange(f"keys:{owner_of(key)}", 0, -1)
    found = [job for job in await STORE.many(names, *LISTED, *OWN) if "input_file" in job]
    at = next((number for number, job in enumerate(found, 1) if job["id"] == after.replace("batch_", "job-", 1)), 0)
    shown, most = found[at:], max(1, min(limit, LISTED_AT_ONCE))
    return {"object": "list", "data": [await _shown(job) for job in shown[:most]], "has_more": len(shown) > most}


@router.get(BATCH)
async def batch_of(job: OwnBatch) -> dict[str, Any]:
    """How far a batch is."""
    return await _shown(job)


@router.post(f"{BATCH}/cancel")
async def cancel(job: OwnBatch) -> dict[str, Any]:
    """Cancels what has not been answered."""
    await STORE.do("cancel", id=job["id"])
    return await _shown(await STORE.fields(job["id"]))
