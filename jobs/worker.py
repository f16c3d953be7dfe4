"""Runs jobs at the gateway, each with the key of who sent it, and delivers callbacks.

A worker holds a job by a lease that it prolongs. A worker that takes a job over after a lease has another one, so that
what a frozen worker says later is refused. Only ids and states are logged.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from redis import RedisError

from store import PATHS, Settings, Store, shown

# How often in seconds an idle worker looks for jobs, and how long it may take to give its own back.
IDLE_S, GIVE_BACK_S = 0.25, 3.0
# Statuses after which the same request may succeed, and those with which no server has begun it.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
NOT_BEGUN, WAIT_S = frozenset({429, 503}), 5.0
# What HAProxy says when LiteLLM ends before it has answered (templates/haproxy/door.cfg.j2).
BROKEN = "the gateway broke the connection"
# Where a piece of a streamed answer ends, at the latest after so many characters.
PIECE_END, PIECE_LENGTH = re.compile(r"[\n.?!,]"), 100
# Texts of a streamed answer that come in parts.
PARTED = frozenset({"content", "reasoning_content", "refusal", "arguments"})
log = logging.getLogger("corral.jobs")


class RunError(Exception):
    """Why a run failed, after how many seconds it may be tried again (None: never), and whether that counts.

    `uncounted` is a field of the store's `finish`: `is_uncounted`, or `is_broken` for what counts if it goes on.
    """

    def __init__(self, code: str, message: str, again_s: float | None, uncounted: str | None = None) -> None:
        super().__init__(code)
        self.told = {"code": code, "message": message}
        self.again_s, self.uncounted = again_s, uncounted


class Worker:
    """Some runs at a time, on one store."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings)
        self.client = httpx.AsyncClient(trust_env=False, timeout=settings.run_s, limits=httpx.Limits())

    async def work(self) -> None:
        """Runs jobs until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.settings.workers):
                tasks.create_task(self._on_and_on(self._run_next))
            for _ in range(2):
                tasks.create_task(self._on_and_on(self._deliver_next))

    async def _on_and_on(self, step: Callable[[], Awaitable[bool]]) -> None:
        while True:
            if seen := os.environ.get("CORRAL_SEEN"):
                Path(seen).touch()  # noqa: ASYNC240 - on a file system in memory
            try:
                is_busy = await step()
            except RedisError as error:
                log.warning("the store does not answer: %s", type(error).__name__)
                is_busy = False
            except Exception as error:  # noqa: BLE001 - other runs go on; the text of an error may quote a request
                log.warning("a step failed: %s", type(error).__name__)
                is_busy = False
            if not is_busy:
                await asyncio.sleep(IDLE_S)

    async def _insist(self, operation: str, **arguments: object) -> Any:
        """What an operation returns, as soon as the store answers."""
        while True:
            try:
                return await self.store.do(operation, **arguments)
            except RedisError:
                await asyncio.sleep(IDLE_S)

    # --- runs

    async def _run_next(self) -> bool:
        claim = asyncio.ensure_future(self.store.job("claim", lease=uuid4().hex, lease_s=self.settings.lease_s))
        try:
            job = await asyncio.shield(claim)
        except asyncio.CancelledError:  # the worker is stopped: a job that it gets now waits for another one
            if job := await claim:
                await Run(self, job).give_back()
            raise
        if job is None:
            return False
        outcome = await Run(self, job).outcome()
        is_taken = await to_its_end(self._insist("finish", id=job["id"], lease=job["lease"], **outcome))
        log.info(
            "job %s: %s", job["id"], outcome["status"] if is_taken else "the lease was lost, the result is refused"
        )
        return True

    # --- callbacks

    async def _deliver_next(self) -> bool:
        job = await self.store.job("callback", lease_s=3 * self.settings.deliver_within_s)
        if job is None:
            return False
        try:
            is_delivered = await self._deliver(job)
        except Exception as error:  # noqa: BLE001 - what cannot be sent is a dead letter in the end
            log.warning("callback of job %s: %s", job["id"], type(error).__name__)
            is_delivered = False
        backoff_s = self.settings.backoff_s[min(int(job["callback_attempts"]), len(self.settings.backoff_s)) - 1]
        told = {"is_delivered": is_delivered, "again_s": backoff_s, "deliver_s": self.settings.deliver_s}
        await to_its_end(self._insist("called_back", id=job["id"], **told))
        log.info("callback of job %s: %s", job["id"], "delivered" if is_delivered else "failed")
        return True

    async def _deliver(self, job: dict[str, str]) -> bool:
        callback = self.store.open(job["callback"])
        parts = urlsplit(callback["url"])
        if f"{parts.scheme}://{parts.netloc}".lower() not in {item.lower() for item in self.settings.callbacks}:
            return False
        body = json.dumps(envelope(self.store, job)).encode()
        headers = signature(self.store.signing_key(job["owner"]), job["id"], body)
        if callback["token"]:
            headers["Authorization"] = f"Bearer {callback['token']}"
        async with (
            asyncio.timeout(self.settings.deliver_within_s),
            self.client.stream("POST", callback["url"], content=body, headers=headers) as answer,
        ):
            return answer.is_success


class Run:
    """One run of one job."""

    def __init__(self, worker: Worker, job: dict[str, str]) -> None:
        self.worker, self.job, self.store = worker, job, worker.store
        self.text, self.pieces = "", 0
        self._is_told = asyncio.Lock()

    async def outcome(self) -> dict[str, Any]:
        """What the store is to be told about it."""
        answer = asyncio.create_task(self._answer())
        beats = asyncio.create_task(self._beat_on(answer))
        try:
            return {"status": "succeeded", "field": "result", "value": self.store.seal(await answer)}
        except RunError as error:
            return self._failed(error)
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # this is one
                return await self.give_back()
            return {"status": "lost"}
        finally:
            beats.cancel()
            answer.cancel()

    def _failed(self, error: RunError) -> dict[str, Any]:
        told = {"status": "failed", "field": "error", "value": self.store.seal(error.told)}
        if error.again_s is None:
            return told
        attempts, backoff_s = int(self.job["attempts"]), self.worker.settings.backoff_s
        wait_s = max(error.again_s, backoff_s[min(attempts, len(backoff_s)) - 1])
        return told | {"again_s": wait_s} | ({error.uncounted: True} if error.uncounted else {})

    async def give_back(self) -> dict[str, Any]:
        """The worker is stopped: another one takes the job at once."""
        told = {"status": "failed", "again_s": 0, "is_uncounted": True}
        with suppress(RedisError):
            await self.store.do("finish", id=self.job["id"], lease=self.job["lease"], **told)
        raise asyncio.CancelledError

    async def _beat_on(self, answer: asyncio.Task[Any]) -> None:
        """Prolongs the lease and writes pieces; ends the run when the lease is lost."""
        lease_s = self.worker.settings.lease_s
        while True:
            await asyncio.sleep(lease_s / 6)
            with suppress(RedisError):
                if not await self._beat():
                    answer.cancel()
                    return

    async def _beat(self) -> bool:
        """Whether the lease still holds; what there is of a piece is written with it."""
        async with self._is_told:
            piece, number = self.text, self.pieces + 1
            told = {"piece": self.store.seal(piece), "number": number} if piece else {}
            lease = {"id": self.job["id"], "lease": self.job["lease"], "lease_s": self.worker.settings.lease_s}
            is_held = bool(await self.store.do("beat", **lease, **told))
            if piece:
                self.pieces, self.text = number, self.text[len(piece) :]
            return is_held

    async def _answer(self) -> Any:
        """The gateway's answer."""
        request, run_s = self.store.open(self.job["request"]), self.worker.settings.run_s
        url = f"{self.worker.settings.gateway}{PATHS[self.job['type']]}"
        headers = {"Authorization": f"Bearer {self.store.open(self.job['key'])}"}
        try:
            async with (
                asyncio.timeout(run_s),
                self.worker.client.stream("POST", url, json=request, headers=headers) as answer,
            ):
                if not answer.is_success:
                    raise _refused(answer, await answer.aread())
                if answer.headers.get("content-type", "").startswith("text/event-stream"):
                    return await self._streamed(answer)
                return json.loads(await answer.aread())
        except TimeoutError:
            raise RunError("timeout", f"the run took longer than {run_s} s", 0) from None
        except httpx.ConnectError:
            raise RunError("gateway_down", "the gateway is not there", WAIT_S, "is_uncounted") from None
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            raise RunError("gateway_broke", BROKEN, WAIT_S, "is_broken") from None
        except (httpx.HTTPError, ValueError) as error:
            raise RunError("gateway_failed", type(error).__name__, 0) from None

    async def _streamed(self, answer: httpx.Response) -> dict[str, Any]:
        """A streamed answer as one, whose pieces are written as they come."""
        whole: dict[str, Any] = {}
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RunError("stream_failed", str(chunk["error"].get("message"))[:500], 0)
            merge(whole, chunk)
            choices = chunk.get("choices") or [{}]
            self.text += (choices[0].get("delta") or {}).get("content") or ""
            if PIECE_END.search(self.text) or len(self.text) > PIECE_LENGTH:
                with suppress(RedisError):
                    await self._beat()
        if not any(choice.get("finish_reason") for choice in whole.get("choices", [])):
            raise RunError("stream_failed", "the answer broke off", 0)
        while self.text:
            try:
                await self._beat()
            except RedisError:
                await asyncio.sleep(IDLE_S)
        for choice in whole["choices"]:
            choice["message"] = choice.pop("delta", {})
        return whole | {"object": "chat.completion"}


async def to_its_end(step: Awaitable[Any]) -> Any:
    """What a step returns that a stop of the worker does not break off; the stop comes after it."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _refused(answer: httpx.Response, body: bytes) -> RunError:
    """What an error of the gateway means for the job."""
    try:
        told = json.loads(body)["error"]
        code, message = str(told.get("code") or answer.status_code), str(told.get("message"))[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message = str(answer.status_code), "the gateway gave no reason"
    if answer.status_code not in PASSING:
        return RunError(code, message, None)
    if message == BROKEN:
        return RunError(code, message, WAIT_S, "is_broken")
    is_begun, after = answer.status_code not in NOT_BEGUN, answer.headers.get("retry-after", "")
    again_s = float(after) if after.isdigit() else 0.0 if is_begun else WAIT_S
    return RunError(code, message, again_s, None if is_begun else "is_uncounted")


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds a chunk of a streamed answer to what there is: texts are joined, items of lists are found by `index`."""
    for name, value in part.items():
        known = whole.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            merge(known, value)
        elif isinstance(value, list) and all(isinstance(item, dict) and "index" in item for item in value):
            items = whole.setdefault(name, [])
            for item in value:
                same = next((old for old in items if old["index"] == item["index"]), None)
                if same is None:
                    items.append(same := {})
                merge(same, item)
        elif name in PARTED and isinstance(value, str) and isinstance(known, str):
            whole[name] = known + value
        elif value is not None or name not in whole:
            whole[name] = value


def envelope(store: Store, job: dict[str, str]) -> dict[str, Any]:
    """What a receiver gets."""
    seen = shown(store, job)
    started = seen.get("started_at", seen["finished_at"])
    return {
        "job_id": job.get("job_id", job["id"]),
        "id": job["id"],
        "type": job["type"],
        "status": job["status"],
        "finished_at": seen["finished_at"],
        "result": seen.get("result"),
        "error": seen.get("error"),
        "timing": {"processing_ms": round(1000 * (seen["finished_at"] - started))},
        "metadata": seen.get("metadata"),
    }


def signature(key: bytes, name: str, body: bytes) -> dict[str, str]:
    """Headers by which a receiver knows who sent a callback, and which one it is (standardwebhooks.com)."""
    stamp = str(int(time.time()))
    digest = hmac.digest(key, b".".join([name.encode(), stamp.encode(), body]), "sha256")
    signed = f"v1,{base64.b64encode(digest).decode()}"
    return {
        "Content-Type": "application/json", "webhook-id": name, "webhook-timestamp": stamp, "webhook-signature": signed,
    }  # fmt: skip


async def _main() -> None:
    work, loop = asyncio.create_task(Worker(Settings.read()).work()), asyncio.get_running_loop()

    def stop() -> None:
        work.cancel()
        loop.call_later(GIVE_BACK_S, os._exit, 0)  # what has not been given back by then, its lease gives back

    loop.add_signal_handler(signal.SIGTERM, stop)
    with suppress(asyncio.CancelledError):
        await work


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(_main())
