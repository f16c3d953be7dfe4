"""Jobs for programs that have no address: they fetch a job, say that they live, and bring its answer.

A poller has a key that opens these routes alone. What it has fetched is its own under a lease, whose token it sends
with everything it says of the job; without a sign of life the lease ends, and the job waits again.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Header
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from store import secret
from web import SETTINGS, STORE, refusal

# How often in seconds a waiting poller's queues are looked at.
LOOK_S = 0.25
ONE = "/v1/work/{job_id}"
router = APIRouter()


async def models(authorization: Annotated[str, Header()] = "") -> list[str]:
    """The models of the poller whose key it is; the key is read anew each time, so that another one holds at once."""
    key = authorization.removeprefix("Bearer ").strip().encode()
    for name, its in SETTINGS.pollers.items():
        if hmac.compare_digest(secret(name).encode(), key):
            return its
    raise refusal(401, "invalid_api_key", "send the key of a poller of this farm: Authorization: Bearer sk-…")


class Claim(BaseModel):
    """How long to wait for a job."""

    wait_s: float = Field(20, ge=0, le=30)


class Beat(BaseModel):
    """A sign of life, with what there is of the answer since the last one."""

    lease: str = Field(max_length=100)
    text: str = Field("", max_length=100_000)
    number: int = Field(0, ge=0)


class Failure(BaseModel):
    """Why a job could not be done, and whether it may be tried again."""

    code: str = Field("failed", max_length=100)
    message: str = Field("", max_length=2000)
    again: bool = True


class End(BaseModel):
    """The answer, as the gateway would give it, or an error; with `next` the next job is claimed in the same call."""

    lease: str = Field(max_length=100)
    result: dict[str, Any] | None = None
    error: Failure | None = None
    next: Claim | None = None


@router.post("/v1/work/claim")
async def claim(its: Annotated[list[str], Depends(models)], told: Claim) -> Response:
    """A job under a lease; 204 when there is none."""
    found = await _claimed(its, told)
    return JSONResponse(found) if found else Response(status_code=204)


async def _claimed(its: list[str], told: Claim) -> dict[str, Any] | None:
    until = time.monotonic() + told.wait_s
    while True:
        job = await STORE.job("claim", lease=uuid4().hex, lease_s=SETTINGS.lease_s, models=its)
        if job is not None:
            shown = {name: job[name] for name in ("id", "type", "lease")}
            return shown | {"lease_s": SETTINGS.lease_s, "request": STORE.open(job["request"])}
        if time.monotonic() >= until:
            return None
        await asyncio.sleep(LOOK_S)


async def _said(job: str, its: list[str], operation: str, **told: object) -> dict[str, str]:
    """Tells the store something of a job that this poller may have, if the lease still holds."""
    known = await STORE.fields(job)
    if known.get("model") not in its or not await STORE.do(operation, id=job, **told):
        raise refusal(409, "lease_lost", "this lease has ended: throw the job away and claim another one")
    return {"id": job}


@router.post(f"{ONE}/heartbeat")
async def heartbeat(job_id: str, its: Annotated[list[str], Depends(models)], told: Beat) -> dict[str, str]:
    """Keeps the lease; a numbered text becomes a piece of the answer, once."""
    piece = {"piece": STORE.seal(told.text), "number": told.number} if told.text else {}
    return await _said(job_id, its, "beat", lease=told.lease, lease_s=SETTINGS.lease_s, **piece)


@router.post(f"{ONE}/finish")
async def finish(job_id: str, its: Annotated[list[str], Depends(models)], told: End) -> dict[str, Any]:
    """Brings the answer, or says why there is none; may claim the next job."""
    if (told.result is None) == (told.error is None):
        raise refusal(400, "invalid_job", "send either result or error")
    if told.error is None:
        outcome: dict[str, object] = {"status": "succeeded", "field": "result", "value": STORE.seal(told.result)}
    else:
        error = STORE.seal({"code": told.error.code, "message": told.error.message})
        again = {"again_s": SETTINGS.backoff_s[0]} if told.error.again else {}
        outcome = {"status": "failed", "field": "error", "value": error, **again}
    said = await _said(job_id, its, "finish", lease=told.lease, **outcome)
    return said | ({"next": await _claimed(its, told.next)} if told.next else {})
