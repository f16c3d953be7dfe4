"""The store of jobs: one Lua script on a Valkey, and what is kept from the eyes of those who can read it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from cryptography.fernet import Fernet
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

FINISHED = frozenset({"succeeded", "failed", "cancelled", "expired"})
# What a list of jobs shows.
LISTED = (
    "id", "type", "status", "created_at", "started_at", "finished_at", "attempts", "error", "callback",
    "callback_status", "callback_attempts", "metadata", "custom_id",
)  # fmt: skip
TIMES = ("created_at", "started_at", "finished_at")
# By type of job, where at the gateway it is run.
PATHS = {
    "chat": "/v1/chat/completions",
    "vision": "/v1/chat/completions",
    "vision_inference": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
}


class Settings(NamedTuple):
    """What the inventory says, from the rendered settings.yaml."""

    listen: str
    port: int
    # Address of the store, and URL of the gateway.
    store: str
    gateway: str
    workers: int
    model: str
    depth: int
    key_depth: int
    ttl_s: int
    retries: int
    keep_s: int
    run_s: int
    callbacks: list[str]
    deliver_s: float
    deliver_within_s: float
    lease_s: float
    backoff_s: list[float]
    # By name of the secret with which a poller fetches jobs, their models.
    pollers: dict[str, list[str]]

    @classmethod
    def read(cls) -> Settings:
        """The settings beside this file."""
        return cls(**yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8")))


def secret(name: str) -> str:
    """The value of one of the site's secrets."""
    return (Path(os.environ["CORRAL_SECRETS_DIR"]) / name).read_text(encoding="utf-8").strip()


def owner_of(key: str) -> str:
    """What stands for a key in the store."""
    return hashlib.sha256(key.encode()).hexdigest()


class Store:
    """The store as the API and the workers use it. Errors of the connection are redis.RedisError."""

    def __init__(self, settings: Settings) -> None:
        host, _, port = settings.store.rpartition(":")
        # No second attempt of its own: an operation that has been carried out may not be so again.
        self.redis: Any = Redis(
            host=host,
            port=int(port),
            username="jobs",
            password=secret("JOBS_STORE_PASSWORD"),
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=5,
            socket_timeout=30,
        )
        text = Path(__file__).with_name("store.lua").read_text(encoding="utf-8")
        # A store that is full takes no new job, and goes on with those that it has.
        self._submit, self._script = map(self.redis.register_script, (text, f"#!lua flags=allow-oom\n{text}"))
        self._key = bytes.fromhex(secret("JOBS_KEY"))
        self._fernet = Fernet(base64.urlsafe_b64encode(self._key))

    async def do(self, operation: str, **arguments: object) -> Any:
        """What an operation of store.lua returns."""
        script = self._submit if operation == "submit" else self._script
        return await script(args=[operation, json.dumps(arguments)])

    async def job(self, operation: str, **arguments: object) -> dict[str, str] | None:
        """The job that an operation returns, as `fields` does."""
        flat = await self.do(operation, **arguments)
        return dict(zip(flat[::2], flat[1::2], strict=True)) if flat else None

    async def fields(self, job: str) -> dict[str, str]:
        """All fields of a job; empty when there is no such job."""
        found: dict[str, str] = await self.redis.hgetall(f"job:{job}")
        return found

    async def many(self, jobs: list[str], *names: str) -> list[dict[str, str]]:
        """The fields of those jobs that are still there: all of them, or these."""
        async with self.redis.pipeline(transaction=False) as pipeline:
            for job in jobs:
                pipeline.hmget(f"job:{job}", names) if names else pipeline.hgetall(f"job:{job}")
            rows = await pipeline.execute()
        found = [dict(zip(names, row, strict=True)) if names else row for row in rows]
        plain = [{name: text for name, text in row.items() if text is not None} for row in found]
        return [row for row in plain if "id" in row]

    def seal(self, value: object) -> str:
        """Any data as text that only the site's own key opens."""
        return self._fernet.encrypt(json.dumps(value).encode()).decode()

    def open(self, text: str) -> Any:
        """What was sealed."""
        return json.loads(self._fernet.decrypt(text))

    def error_of(self, job: dict[str, str]) -> Any:
        """Why a job failed: code and message; sealed where a server said it, which may quote the request."""
        text = job["error"]
        return json.loads(text) if text.startswith("{") else self.open(text)

    def signing_key(self, owner: str) -> bytes:
        """The key with which callbacks of an owner are signed."""
        return hmac.digest(self._key, f"callbacks of {owner}".encode(), "sha256")


def shown(store: Store, job: dict[str, str]) -> dict[str, Any]:
    """A job as its owner sees it."""
    times: dict[str, Any] = {name: float(job[name]) for name in TIMES if name in job}
    callback = {"status": job.get("callback_status"), "attempts": int(job.get("callback_attempts", 0))}
    return {
        "id": job["id"],
        "object": "job",
        "type": job["type"],
        "status": job["status"],
        **times,
        "attempts": int(job.get("attempts", 0)),
        **({"result": store.open(job["result"])} if "result" in job else {}),
        **({"error": store.error_of(job)} if "error" in job else {}),
        **({"callback": callback} if "callback_status" in job else {}),
        **{name: store.open(job[name]) for name in ("metadata", "custom_id") if name in job},
    }
