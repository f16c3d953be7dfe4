"""What the gateway costs and how well it shares: HAProxy alone, plain LiteLLM, and both lanes of ours, in one run.

Prints a table and writes docs/benchmarks/gateway.json; takes about twelve minutes and needs nothing but HAProxy and the
environment that `make env` makes. All stacks run all the time, one is measured at a time, in turns; the replicas
are fakes that count their requests and take exactly as long as a request says. What matters are the ratios.
`--quick` shows in a minute whether everything works, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import yaml
from aiohttp import web

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from corral.build import Plan, build_plan  # noqa: E402
from corral.config.load import load_inventory  # noqa: E402 - the checkout is not installed
from corral.json_layout import laid_out  # noqa: E402
from corral.render.output import write  # noqa: E402
from corral.render.secrets import initialise, read_env  # noqa: E402
from corral.render.tree import render  # noqa: E402
from corral.runtime import supervisor  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "gateway.json"
LOOPBACK = "127.0.0.1"
KEY = "sk-bench"
REPLICAS = 4
SERVICE_S = 0.4
# A short answer of a language model; the waiting is measured with these, too.
ANSWER_S = 2.0
WIDE_SLOTS = 16
# What takes a request out of the fast lane, and changes nothing else.
SLOW = {"n": 1}
DEPTH = 8
OVERLOAD = 3
LOAD = 0.8
USERS = 4
TURNS = 8
START_LIMIT_S = 240
OK, TOO_MANY = 200, 429
# Time until a refusal if there was none: the machine was too slow to cause an overload.
NEVER_MS = 1e9
ANSWER_LIMIT_S = 120
TOKENS = 24
TOKEN_GAP_S = 0.03
# How long an answer takes, in the text of a request.
WISH = re.compile(r"takes ([\d.]+) s")
# A token whose text is the time at which the replica wrote it.
STAMP = re.compile(rb'"(?:content|text|delta)": ?"(\d+\.\d+) ')
SEED = 20_261_120

TARGETS: dict[str, tuple[str, float]] = {
    "overhead_ratio": ("<=", 1.02),
    "throughput_ratio": (">=", 1.0),
    "stream_late_ms": ("<=", 10.0),
    "stream_reads": (">=", 20),
    "saturation_efficiency": (">=", 0.99),
    "wait_mean_ratio": ("<=", 1.2),
    "wait_p95_ratio": ("<=", 1.05),
    "short_wait_mean_ratio": ("<=", 1.2),
    "short_wait_p95_ratio": ("<=", 1.05),
    "overload_goodput_ratio": (">=", 0.99),
    "refusal_p95_ms": ("<=", 250.0),
    "affinity": (">=", 0.9),
    "fast_throughput_ratio": (">=", 10.0),
    "fast_added_ms": ("<=", 2.0),
    "fast_stream_late_ms": ("<=", 3.0),
    "fast_short_wait_mean_ratio": ("<=", 1.1),
}
MEANING = {
    "overhead_ratio": "median latency of one request after the other, ours to plain LiteLLM",
    "throughput_ratio": "requests a second of 16 clients, ours to plain LiteLLM",
    "stream_late_ms": "95th percentile of how late a token is, ours above plain LiteLLM",
    "stream_reads": f"pieces in which {TOKENS} tokens arrive that are written {1000 * TOKEN_GAP_S:.0f} ms apart",
    "saturation_efficiency": "answers a second of a full pool, to slots divided by service time",
    "wait_mean_ratio": "mean wait at 0.8 of capacity, to a queue that all slots share and that costs nothing",
    "wait_p95_ratio": "95th percentile of the wait, to the same; answers take 2 s, as a language model's short ones do",
    "short_wait_mean_ratio": "mean wait where answers take 0.4 s",
    "short_wait_p95_ratio": "95th percentile where answers take 0.4 s",
    "overload_goodput_ratio": "answers a second at three times the capacity, to the full pool",
    "refusal_p95_ms": "95th percentile of the time until a client is refused at three times the capacity",
    "fast_throughput_ratio": "requests a second of 16 clients, the fast lane to ours through LiteLLM",
    "fast_added_ms": "median latency of one request after the other, the fast lane above HAProxy alone",
    "fast_stream_late_ms": "95th percentile of how late a token is in the fast lane, above the replica itself",
    "fast_short_wait_mean_ratio": "mean wait in the fast lane where answers take 0.4 s, to the ideal queue",
    "affinity": "turns that came to the replica of the turn before, four users on four replicas",
}


@dataclass(frozen=True)
class Lengths:
    """How long everything is measured."""

    rounds: int = 3
    # Of latency and throughput: many short ones, since a machine's speed changes from minute to minute.
    light_rounds: int = 8
    sequential: int = 40
    throughput_s: float = 3.0
    saturated_s: float = 12.0
    arrivals: int = 240
    overload_s: float = 12.0


QUICK = Lengths(rounds=1, light_rounds=1, sequential=10, throughput_s=1.0, saturated_s=3.0, arrivals=30, overload_s=3.0)


# --- replicas: fakes with slots -----------------------------------------------------------------------------------


@dataclass
class Fake:
    """One server that takes as long as the text of a request says, however many it has at once."""

    name: str
    port: int
    slots: int
    in_flight: int = 0
    most_in_flight: int = 0

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Answers after as many seconds as the last message says, or for so long with tokens."""
        body = await request.json()
        wish = WISH.search(body["messages"][-1]["content"])
        service_s = float(wish[1]) if wish else 0.0
        if body.get("stream"):
            return await _stamps(request, service_s)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(service_s)
        finally:
            self.in_flight -= 1
        message = {"role": "assistant", "content": self.name}
        return web.json_response(
            {
                "id": self.name,
                "object": "chat.completion",
                "created": 1,
                "model": "fake",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
            }
        )


async def _stamps(request: web.Request, service_s: float) -> web.StreamResponse:
    """Streams tokens at a steady pace, each with the time at which it is written."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    head = {"id": "stamps", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    for number in range(TOKENS + 1):
        delta = {"role": "assistant", "content": f"{time.monotonic():.6f} "} if number < TOKENS else {}
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        await response.write(b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n")
        await asyncio.sleep(service_s / TOKENS if delta else 0)
    await response.write(b"data: [DONE]\n\n")
    return response


def serve(words: Sequence[str]) -> None:
    """Runs fakes, each given as name:port:slots, in this process for good."""

    async def run() -> None:
        for word in words:
            name, port, slots = word.split(":")
            fake = Fake(name, int(port), int(slots))
            app = web.Application()
            app.router.add_post("/v1/chat/completions", fake.infer)
            app.router.add_get("/health", _healthy)
            app.router.add_get("/most", _most_of(fake))
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
            await runner.setup()
            await web.TCPSite(runner, LOOPBACK, fake.port).start()
        await asyncio.Event().wait()

    asyncio.run(run())


async def _healthy(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def _most_of(fake: Fake) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_request: web.Request) -> web.Response:
        most, fake.most_in_flight = fake.most_in_flight, fake.in_flight
        return web.json_response(most)

    return answer


# --- stacks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """One way to the replicas: a base address for each pool."""

    name: str
    urls: dict[str, str]
    key: str = KEY
    # Fields of every request beside the model and the messages.
    fields: Mapping[str, object] = field(default_factory=dict)


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback address."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind((LOOPBACK, 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def inventory(ports: dict[str, int]) -> dict[str, Any]:
    """Ours: two pools of fakes, `narrow` with a slot each for waiting, `wide` for what the gateway itself costs."""

    def node(name: str, slots: int) -> dict[str, Any]:
        url, pool = f"http://{LOOPBACK}:{ports[name]}", name.partition("-")[0]
        node = {"url": url, "engine": "openai", "model": pool, "slots": slots, "health": "/health"}
        return node | {"thinking": "shown"}

    nodes = {name: node(name, 1) for name in names("narrow")} | {name: node(name, WIDE_SLOTS) for name in names("wide")}
    pools: dict[str, Any] = {pool: {"on": [{"node": name} for name in names(pool)]} for pool in ("narrow", "wide")}
    pools["narrow"] = pools["narrow"] | {"queue": {"depth": DEPTH, "timeout_s": 60}}
    return {
        "schema_version": 1,
        "name": "bench",
        "hosts": {"here": {"runtime": "local"}},
        "nodes": nodes,
        "pools": pools,
        "gateway": {
            "host": "here", "port": ports["ours"], "admin_port": ports["admin"], "litellm_port": ports["litellm"],
            "balancer_port": ports["balancer"], "stats_port": ports["stats"],
            "database": False, "cache": False, "fast_lane": True,
        },
    }  # fmt: skip


def names(pool: str) -> list[str]:
    """The replicas of a pool."""
    return [f"{pool}-{number}" for number in range(1, REPLICAS + 1)]


def plain_configuration(ports: dict[str, int]) -> dict[str, Any]:
    """LiteLLM as seed 004 had it: every replica a deployment, least-busy, retries and cooldowns of its own."""
    return {
        "model_list": [
            {
                "model_name": pool,
                "litellm_params": {
                    "model": "openai/fake",
                    "api_base": f"http://{LOOPBACK}:{ports[name]}/v1",
                    "api_key": "none",
                },
                "model_info": {"id": name},
            }
            for pool in ("narrow", "wide")
            for name in names(pool)
        ],
        "router_settings": {
            "routing_strategy": "least-busy",
            "num_retries": 2,
            "allowed_fails": 2,
            "cooldown_time": 60,
            "timeout": 600,
        },
        "litellm_settings": {"drop_params": False, "request_timeout": 600},
        "general_settings": {"master_key": KEY},
    }


@contextmanager
def process(command: Sequence[str], log: Path, **environment: str) -> Iterator[int]:
    """The id of a program that runs for as long as the block lasts."""
    with log.open("wb") as output:
        running = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    try:
        yield running.pid
    finally:
        running.terminate()
        with suppress(subprocess.TimeoutExpired):
            running.wait(10)
        running.kill()
        running.wait()


@dataclass(frozen=True)
class Bench:
    """A running farm of the kit before fakes, and what another stack beside it needs."""

    folder: Path
    plan: Plan
    ports: dict[str, int]
    key: str


@contextmanager
def farm() -> Iterator[Bench]:
    """The fakes and our stack before them, started but perhaps not healthy yet."""
    wanted = [*names("narrow"), *names("wide"), "ours", "admin", "litellm", "balancer", "stats", "plain"]
    ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
    folder = Path(tempfile.mkdtemp(prefix="corral-bench-"))
    try:
        path = folder / "inventory.yaml"
        path.write_text(yaml.safe_dump(inventory(ports), sort_keys=False), encoding="utf-8")
        plan = build_plan(load_inventory(path))
        write(render(plan), folder)
        initialise({"here": plan.secrets_of("here")}, folder)
        fakes = [f"{name}:{ports[name]}:1" for name in [*names("narrow"), *names("wide")]]
        with process([sys.executable, __file__, "--serve", *fakes], folder / "fakes.log"), _ours(folder / "here"):
            key = read_env(folder / "here" / ".env")["LITELLM_MASTER_KEY"]
            yield Bench(folder, plan, ports, key)
    finally:
        shutil.rmtree(folder)


@contextmanager
def stacks() -> Iterator[tuple[list[Stack], dict[str, int]]]:
    """All five, healthy."""
    with farm() as bench:
        path, port = bench.folder / "plain.yaml", str(bench.ports["plain"])
        path.write_text(yaml.safe_dump(plain_configuration(bench.ports)), encoding="utf-8")
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "PYTHONUNBUFFERED": "1"}
        with process(litellm_command(path, port), bench.folder / "plain.log", **quiet):
            yield _when_healthy(bench.ports, bench.key), bench.ports


def litellm_command(configuration: Path, port: str) -> list[str]:
    """How a LiteLLM of this environment is started."""
    program = str(Path(sys.executable).parent / "litellm")
    return [program, "--config", str(configuration), "--host", LOOPBACK, "--port", port]


@contextmanager
def _ours(folder: Path) -> Iterator[None]:
    try:
        supervisor.start(folder, supervisor.search_path())
        yield
    finally:
        supervisor.stop(folder)


def _when_healthy(ports: dict[str, int], key: str) -> list[Stack]:
    def base(port: str) -> str:
        return f"http://{LOOPBACK}:{ports[port]}"

    found = [
        Stack("direct", {"wide": base("wide-1"), "narrow": base("narrow-1")}),
        Stack("haproxy", {pool: f"{base('balancer')}/{pool}/any" for pool in ("wide", "narrow")}),
        Stack("plain", {pool: base("plain") for pool in ("wide", "narrow")}),
        Stack("ours", {pool: base("ours") for pool in ("wide", "narrow")}, key, SLOW),
        Stack("fast", {pool: base("ours") for pool in ("wide", "narrow")}, key),
    ]
    asyncio.run(answering(found))
    return found


async def answering(found: list[Stack]) -> None:
    """Comes back when every stack has answered on every pool; raises TimeoutError when one does not in four minutes."""
    end = time.monotonic() + START_LIMIT_S
    async with client() as session:
        for stack in found:
            while True:
                try:
                    last = str({(await ask(session, stack, pool)).status for pool in stack.urls})
                except (aiohttp.ClientError, ValueError) as error:
                    last = repr(error)
                if last == str({OK}):
                    break
                if time.monotonic() > end:
                    raise TimeoutError(f"{stack.name} does not answer: {last}")
                await asyncio.sleep(0.5)


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    status: int
    seconds: float
    replica: str
    at: float = 0.0
    service_s: float = 0.0


_numbers = itertools.count(1)


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that opens as many connections as it has requests."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        yield session


async def ask(
    session: aiohttp.ClientSession,
    stack: Stack,
    pool: str,
    service_s: float = 0.0,
    text: str = "",
    session_name: str = "",
) -> Answer:
    """One request that opens a conversation of its own, unless it has a text."""
    body: dict[str, Any] = {"model": pool, "messages": _question(text, service_s), **stack.fields}
    headers = {"Authorization": f"Bearer {stack.key}"}
    if session_name:
        headers["x-litellm-session-id"] = session_name
    begin = time.perf_counter()
    async with session.post(f"{stack.urls[pool]}/v1/chat/completions", json=body, headers=headers) as response:
        content = await response.json(content_type=None)
        seconds = time.perf_counter() - begin
        replica = content["choices"][0]["message"]["content"] if response.status == OK else ""
        return Answer(response.status, seconds, replica, begin, service_s)


# --- measurements -------------------------------------------------------------------------------------------------


async def sequential_ms(stack: Stack, count: int) -> float:
    """Median latency of one request after the other, in milliseconds."""
    async with client() as session:
        await ask(session, stack, "wide")
        return 1000 * statistics.median([(await ask(session, stack, "wide")).seconds for _ in range(count)])


async def closed_loop(stack: Stack, pool: str, clients: int, seconds: float, service_s: float = 0.0) -> list[Answer]:
    """Answers of clients that ask without a pause."""
    answers: list[Answer] = []
    end = time.perf_counter() + seconds

    async def go_on(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            answers.append(await ask(session, stack, pool, service_s))

    async with client() as session:
        await asyncio.gather(*(go_on(session) for _ in range(clients)))
    return answers


@dataclass(frozen=True)
class Stream:
    """How the tokens of one streamed answer arrived."""

    # From the request to the first token.
    first_ms: float
    # Of each token, from its writing to its arrival.
    late_ms: list[float]
    # In how many pieces the tokens came; all at once is one.
    reads: int


async def stream(stack: Stack, pool: str, path: str, **fields: object) -> Stream:
    """How tokens with stamps arrive; ValueError where none do."""
    arrivals: dict[bytes, float] = {}
    begin, seen = time.monotonic(), b""
    async for moment, piece in pieces(stack, pool, path, **fields):
        seen += piece
        arrivals = dict.fromkeys(STAMP.findall(seen), moment) | arrivals
    if not arrivals:
        raise ValueError(f"{stack.name} streamed no tokens: {seen[-300:]!r}")
    late_ms = [1000 * (moment - float(stamp)) for stamp, moment in arrivals.items()]
    return Stream(1000 * (min(arrivals.values()) - begin), late_ms, len(set(arrivals.values())))


async def pieces(stack: Stack, pool: str, path: str, **fields: object) -> AsyncIterator[tuple[float, bytes]]:
    """A streamed answer as it comes in, and when: from the connection itself, since libraries put pieces together."""
    url = urlsplit(stack.urls[pool] + path)
    body = json.dumps({"model": pool, "stream": True, **fields})
    lines = [
        f"POST {url.path} HTTP/1.1", f"Host: {url.netloc}", f"Authorization: Bearer {stack.key}",
        "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close",
    ]  # fmt: skip
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write("\r\n".join([*lines, "", body]).encode())
    while data := await reader.read(1 << 16):
        yield time.monotonic(), data
    writer.close()


async def streaming(stack: Stack) -> dict[str, float]:
    """Figures of one streamed answer."""
    messages = _question(service_s=TOKENS * TOKEN_GAP_S)
    found = await stream(stack, "wide", "/v1/chat/completions", messages=messages, **stack.fields)
    late_ms = percentile(found.late_ms, 95)
    return {"stream_first_ms": found.first_ms, "stream_late_p95_ms": late_ms, "stream_reads": found.reads}


def _question(text: str = "", service_s: float = 0.0) -> list[dict[str, str]]:
    """Messages of a conversation of its own, unless it has a text; `service_s` is how long its answers take."""
    return [{"role": "user", "content": f"{text or f'question {next(_numbers)}'} takes {service_s:.6f} s"}]


async def throughput(stack: Stack, seconds: float) -> float:
    """Requests a second of 16 clients that ask without a pause."""
    answers = await closed_loop(stack, "wide", 16, seconds)
    last = max(answer.at + answer.seconds for answer in answers)
    return len(answers) / (last - min(answer.at for answer in answers))


async def goodput(stack: Stack, seconds: float) -> float:
    """Answers of a full pool within the time, to as many as its slots can give."""
    begin = time.perf_counter()
    answers = await closed_loop(stack, "narrow", REPLICAS + DEPTH, seconds, SERVICE_S)
    # The first and the last service time are the ramps of a measurement, not of a queue.
    inside = [
        answer
        for answer in answers
        if answer.status == OK and begin + SERVICE_S < answer.at + answer.seconds <= begin + seconds
    ]
    return len(inside) * SERVICE_S / (REPLICAS * (seconds - SERVICE_S))


def schedule(service_s: float, count: int, seed: int) -> list[tuple[float, float]]:
    """Poisson arrivals at 0.8 of capacity, in seconds from the start, each with a service time around the mean."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    moments = itertools.accumulate(chance.expovariate(LOAD * REPLICAS / service_s) for _ in range(count))
    return [(moment, service_s * chance.uniform(0.5, 1.5)) for moment in moments]


async def open_loop(stack: Stack, planned: list[tuple[float, float]]) -> list[Answer]:
    """The answer to every planned request, sent when it is due whatever became of the ones before."""
    async with client() as session:
        begin = time.perf_counter()

        async def at(moment: float, service_s: float) -> Answer:
            await asyncio.sleep(max(0.0, begin + moment - time.perf_counter()))
            return await ask(session, stack, "narrow", service_s)

        return await asyncio.gather(*(at(*item) for item in planned))


def ideal_waits(planned: list[tuple[float, float]]) -> list[float]:
    """Waits of the same requests in one queue that all slots share and that costs nothing."""
    free = [0.0] * REPLICAS
    waits = []
    for moment, service_s in planned:
        begin = max(moment, heapq.heappop(free))
        heapq.heappush(free, begin + service_s)
        waits.append(begin - moment)
    return waits


@dataclass
class Waits:
    """Waits of one stack, and of the ideal queue for the same requests."""

    own: list[float] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)
    refused: int = 0

    def figures(self, prefix: str) -> dict[str, float]:
        """The stack's waits beside the ideal ones, by names that begin so; nothing when there are none."""
        if not self.own:
            return {}
        own, ideal = statistics.mean(self.own), statistics.mean(self.ideal)
        return {
            f"{prefix}wait_mean_ratio": round(own / ideal, 4),
            f"{prefix}wait_p95_ratio": round(percentile(self.own, 95) / max(percentile(self.ideal, 95), 0.001), 4),
            f"{prefix}wait_mean_above_ideal_ms": round(1000 * (own - ideal), 1),
            f"{prefix}wait_refused": self.refused,
        }


async def measure_waits(stack: Stack, count: int, seed: int, service_s: float, into: Waits) -> None:
    """Waits at 0.8 of capacity; the few that are refused wait in the ideal queue neither."""
    planned = schedule(service_s, count, seed)
    answers = await open_loop(stack, planned)
    into.refused += sum(answer.status != OK for answer in answers)
    served = [index for index, answer in enumerate(answers) if answer.status == OK]
    into.own += [answers[index].seconds - answers[index].service_s for index in served]
    into.ideal += ideal_waits([planned[index] for index in served])


async def overload(stack: Stack, seconds: float) -> dict[str, float]:
    """Three times as many requests as the slots can answer: goodput, and how fast the others are refused."""
    rate = OVERLOAD * REPLICAS / SERVICE_S
    planned = [(number / rate, SERVICE_S) for number in range(int(seconds * rate))]
    begin = time.perf_counter()
    answers = await open_loop(stack, planned)
    warm = begin + SERVICE_S + DEPTH * SERVICE_S / REPLICAS
    end = begin + seconds
    inside = [item for item in answers if item.status == OK and warm < item.at + item.seconds <= end]
    refused = sorted(item.seconds for item in answers if item.status == TOO_MANY)
    accepted = sorted(item.seconds for item in answers if item.status == OK)
    return {
        "goodput": len(inside) * SERVICE_S / (REPLICAS * (end - warm)),
        "refused": len(refused),
        "other_errors": len(answers) - len(refused) - len(accepted),
        **({"refusal_p95_ms": 1000 * percentile(refused, 95)} if refused else {}),
        "accepted_p95_s": percentile(accepted, 95),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def affinity(stack: Stack, seed: int) -> float:
    """Share of turns that came to the replica of the turn before, with users who think for as long as they wait."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    kept = []

    async def converse(session: aiohttp.ClientSession, user: int) -> None:
        text, before = f"conversation {seed}-{user}", ""
        for _ in range(TURNS):
            answer = await ask(session, stack, "narrow", SERVICE_S / 2, text)
            if before:
                kept.append(answer.replica == before)
            before = answer.replica
            await asyncio.sleep(chance.uniform(0, SERVICE_S))

    async with client() as session:
        await asyncio.gather(*(converse(session, user) for user in range(USERS)))
    return statistics.mean(kept)


async def most_in_flight(ports: dict[str, int]) -> int:
    """The most requests that any replica with one slot has had at once since this was last asked."""
    async with client() as session:
        found = []
        for name in names("narrow"):
            async with session.get(f"http://{LOOPBACK}:{ports[name]}/most") as response:
                found.append(int(await response.text()))
        return max(found)


# --- the run ------------------------------------------------------------------------------------------------------


# Compared round by round: a figure of one stack with that of another.
RATIOS = (
    ("overhead_ratio", "ours", "plain", "sequential_ms"),
    ("throughput_ratio", "ours", "plain", "requests_per_s"),
    ("fast_throughput_ratio", "fast", "ours", "requests_per_s"),
)
# What was measured, by stack and figure.
Samples = dict[tuple[str, str], list[float]]


async def run(
    found: list[Stack], ports: dict[str, int], lengths: Lengths
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Everything that is measured, by stack; and round by round what ours is compared with plain LiteLLM by."""
    rows: dict[str, dict[str, Any]] = {stack.name: {} for stack in found}
    samples: Samples = defaultdict(list)
    for number in range(lengths.light_rounds):
        for stack in found if number % 2 == 0 else found[::-1]:
            samples[stack.name, "sequential_ms"].append(await sequential_ms(stack, lengths.sequential))
            samples[stack.name, "requests_per_s"].append(await throughput(stack, lengths.throughput_s))
            for name, value in (await streaming(stack)).items():
                samples[stack.name, name].append(value)
        tell(f"round {number + 1} of {lengths.light_rounds}: latency, throughput and streaming")
    queued = [stack for stack in found if stack.name != "direct"]
    waits, short_waits = defaultdict[str, Waits](Waits), defaultdict[str, Waits](Waits)
    for number in range(lengths.rounds):
        for stack in queued if number % 2 == 0 else queued[::-1]:
            arrivals, seed = lengths.arrivals // lengths.rounds, SEED + number
            await most_in_flight(ports)
            samples[stack.name, "saturation"].append(await goodput(stack, lengths.saturated_s))
            await measure_waits(stack, arrivals, seed, SERVICE_S, short_waits[stack.name])
            if stack.name != "plain":  # its replicas are never full, whatever it gives them
                await measure_waits(stack, arrivals, seed, ANSWER_S, waits[stack.name])
            samples[stack.name, "affinity"].append(await affinity(stack, seed))
            for name, value in (await overload(stack, lengths.overload_s)).items():
                samples[stack.name, name].append(value)
            samples[stack.name, "most_in_flight"].append(await most_in_flight(ports))
            tell(f"round {number + 1} of {lengths.rounds}: {stack.name}, waiting, overload and conversations")
            await asyncio.sleep(SERVICE_S * 2)
    for (stack_name, name), values in samples.items():
        worst = max(values) if name in {"most_in_flight", "other_errors"} else statistics.median(values)
        rows[stack_name][name] = round(worst, 4)
    for stack in queued:
        rows[stack.name] |= waits[stack.name].figures("") | short_waits[stack.name].figures("short_")
    return rows, {
        ratio: [own / other for own, other in zip(samples[one, name], samples[than, name], strict=True)]
        for ratio, one, than, name in RATIOS
    }


def judge(rows: dict[str, dict[str, Any]], ratios: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Each figure beside what it should be; the ratios of each round are compared, and their middle half is told."""
    ours, fast = rows["ours"], rows["fast"]
    values = {
        **{name: statistics.median(found) for name, found in ratios.items()},
        "stream_late_ms": ours["stream_late_p95_ms"] - rows["plain"]["stream_late_p95_ms"],
        "stream_reads": ours["stream_reads"],
        "saturation_efficiency": ours["saturation"],
        **{name: ours[name] for name in TARGETS if "wait" in name and not name.startswith("fast")},
        "overload_goodput_ratio": ours["goodput"] / ours["saturation"],
        "refusal_p95_ms": ours.get("refusal_p95_ms", NEVER_MS),
        "affinity": ours["affinity"],
        "fast_added_ms": fast["sequential_ms"] - rows["haproxy"]["sequential_ms"],
        "fast_stream_late_ms": fast["stream_late_p95_ms"] - rows["direct"]["stream_late_p95_ms"],
        "fast_short_wait_mean_ratio": fast["short_wait_mean_ratio"],
    }
    return {
        name: {
            "value": round(value, 4),
            "target": " ".join(map(str, TARGETS[name])),
            "holds": value <= TARGETS[name][1] if TARGETS[name][0] == "<=" else value >= TARGETS[name][1],
            "meaning": MEANING[name],
            **({"middle_half": middle_half(ratios[name])} if name in ratios else {}),
        }
        for name, value in values.items()
    }


def middle_half(found: list[float]) -> list[float]:
    """Between which two values half of the rounds lie."""
    if len(found) < 2:  # noqa: PLR2004 - of one value there is no middle
        return [round(value, 4) for value in found * 2]
    low, _, high = statistics.quantiles(found, n=4)
    return [round(low, 4), round(high, 4)]


def machine() -> dict[str, Any]:
    """What it ran on."""
    haproxy = subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=False).stdout
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "litellm": importlib.metadata.version("litellm"),
        "haproxy": haproxy.partition("version ")[2].partition(" ")[0],
        "load_before": round(os.getloadavg()[0], 1),
    }


def tell(words: str) -> None:
    """Says something on standard error: standard output has the table only."""
    print(words, file=sys.stderr, flush=True)


def print_tables(rows: dict[str, dict[str, Any]], figures: dict[str, dict[str, Any]]) -> None:
    """What a person reads."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{'':26}" + "".join(f"{name:>12}" for name in rows))
    for column in columns:
        print(f"{column:26}" + "".join(f"{row.get(column, '-'):>12}" for row in rows.values()))
    print()
    for name, figure in figures.items():
        word = "holds" if figure["holds"] else "DOES NOT HOLD"
        print(f"{name:26}{figure['value']:>12}   {figure['target']:10} {word:14} {figure['meaning']}")


def main() -> int:
    """Measures, prints and writes; 0 whatever the figures are, 1 when a stack did not start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="write nothing")
    parser.add_argument("--serve", nargs="+", metavar="NAME:PORT:SLOTS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    about = machine()
    with stacks() as (found, ports):
        rows, ratios = asyncio.run(run(found, ports, QUICK if arguments.quick else Lengths()))
    figures = judge(rows, ratios)
    print_tables(rows, figures)
    if not arguments.quick and not arguments.no_write:
        text = laid_out({"machine": about, "figures": figures, "stacks": rows})
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
