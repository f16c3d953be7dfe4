"""The API of jobs: takes requests that may wait, and says what became of them. Behind HAProxy's door.

Keys are checked by asking the gateway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from redis import RedisError
from starlette.exceptions import HTTPException as PlainError

import batches
import polls
import sending
from web import SETTINGS, STORE, refusal

# How long in seconds streams and long polls may go on when it is stopped.
STOP_S = 2


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await STORE.redis.aclose()


app = FastAPI(openapi_url=None, lifespan=_lifespan)
for part in (batches, polls, sending):
    app.include_router(part.router)


@app.exception_handler(PlainError)
async def _refused(_request: Request, error: PlainError) -> JSONResponse:
    if not isinstance(error, HTTPException):
        error = refusal(error.status_code, "not_found", "there is no such route")
    return JSONResponse(error.detail, error.status_code, error.headers)


@app.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Says what is wrong with a body, without what it says."""
    words = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors())
    return await _refused(request, refusal(400, "invalid_job", words))


@app.exception_handler(RedisError)
async def _no_store(request: Request, _error: RedisError) -> JSONResponse:
    return await _refused(request, refusal(503, "service_unavailable", "the store of jobs does not take this now"))


# --- for the farm itself


@app.get("/healthz")
async def healthz() -> PlainTextResponse:
    """Whether the store answers."""
    await STORE.redis.ping()
    return PlainTextResponse("ok")


@app.get("/metrics")
async def metrics() -> PlainTextResponse:
    """Figures for Prometheus."""
    waiting, running, callbacks, oldest_s, totals = await STORE.do("count")
    lines = [
        f"corral_jobs_waiting {waiting}",
        f"corral_jobs_running {running}",
        f"corral_jobs_callbacks_waiting {callbacks}",
        f"corral_jobs_oldest_wait_seconds {oldest_s}",
        *(f'corral_jobs_total{{what="{n}"}} {v}' for n, v in zip(totals[::2], totals[1::2], strict=True)),
    ]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


if __name__ == "__main__":
    uvicorn.run(
        app,
        host=SETTINGS.listen,
        port=SETTINGS.port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=STOP_S,
    )
