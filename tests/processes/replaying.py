"""A trace of requests, sent to a real farm at the moments it names: what each waited, and who was refused."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, replace

import aiohttp

from corral.whatif.simulation import Station, Trace, make_trace, replay
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import Farm, body_of

ANSWER_LIMIT_S = 120
OK, REFUSED = 200, 429
# Between the first look at the clock and the first request.
BEFORE_S = 0.5
IDLE_REQUESTS = 30
IDLE_SERVICE_S = 0.05


@dataclass(frozen=True)
class Compared:
    """One trace through the real farm and through the simulation. Seconds, and shares of all requests."""

    requests: int
    measured_wait_s: float
    simulated_wait_s: float
    measured_refused: float
    simulated_refused: float
    # How late the latest request was sent.
    latest_s: float
    # What an answer of an idle farm takes beyond the replica's own time.
    overhead_s: float
    # The part of it for which a slot is taken: what HAProxy and the replica need, and not the gateway.
    held_s: float

    @property
    def error(self) -> float:
        """How far the simulated mean wait is from the measured one, as a share of that."""
        return self.simulated_wait_s / self.measured_wait_s - 1 if self.measured_wait_s else 0.0


@dataclass(frozen=True)
class Way:
    """How a pool is asked: at the balancer, or through the whole gateway."""

    url: str
    key: str
    pool: str
    # Address of the pool at the balancer.
    balancer: str = ""

    @classmethod
    def to(cls, farm: Farm, pool: str, *, through_gateway: bool = False) -> Way:
        """The way to a pool of this farm."""
        balancer = f"http://{LOOPBACK}:{farm.ports['balancer']}/{pool}/any/v1/chat/completions"
        if through_gateway:
            gateway = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1/chat/completions"
            return cls(gateway, farm.key, pool, balancer)
        return cls(balancer, "none", pool, balancer)


def trace_of(station: Station, lasts_s: float, seed: int) -> Trace:
    """Requests by chance at the station's rate, all within this time."""
    made = make_trace(station, max(1, round(station.rate_per_s * lasts_s * 2)), seed)
    count = sum(at <= lasts_s for at in made.arrivals)
    return Trace(made.arrivals[:count], made.answers[:count], lasts_s)


def compare(way: Way, station: Station, trace: Trace) -> Compared:
    """The trace through both. The simulation knows only the trace and what an answer costs when nobody waits."""
    held_s = overhead_s = asyncio.run(_overhead(replace(way, url=way.balancer)))
    if way.url != way.balancer:
        overhead_s = asyncio.run(_overhead(way))
    rows = asyncio.run(_send(way, trace))
    waits = [
        e2e - answer - overhead_s for (_, status, e2e), answer in zip(rows, trace.answers, strict=True) if status == OK
    ]
    wrong = {status for _, status, _ in rows} - {OK, REFUSED}
    assert not wrong, f"{way.url} answered with {wrong}"
    simulated = replay(station, replace(trace, answers=[answer + held_s for answer in trace.answers]))
    expected = [wait for wait, fate in zip(simulated.waits_s, simulated.fates, strict=True) if fate == "answered"]
    return Compared(
        requests=len(rows), measured_wait_s=statistics.fmean(waits), simulated_wait_s=statistics.fmean(expected),
        measured_refused=1 - len(waits) / len(rows), simulated_refused=1 - len(expected) / len(rows),
        latest_s=max(late for late, _, _ in rows), overhead_s=overhead_s, held_s=held_s,
    )  # fmt: skip


async def _overhead(way: Way) -> float:
    async with _session(way) as session:
        times = [(await _ask(session, way, IDLE_SERVICE_S))[1] for _ in range(IDLE_REQUESTS)]
    return statistics.median(times) - IDLE_SERVICE_S


async def _send(way: Way, trace: Trace) -> list[tuple[float, int, float]]:
    """Of every request how late it was sent, its status, and seconds until its answer was complete."""
    async with _session(way) as session:
        start = time.perf_counter() + BEFORE_S

        async def one(at: float, answer_s: float) -> tuple[float, int, float]:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            late = time.perf_counter() - start - at
            return (late, *await _ask(session, way, answer_s))

        return await asyncio.gather(*map(one, trace.arrivals, trace.answers))


def _session(way: Way) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # A connection for each: LiteLLM closes idle ones after some seconds, perhaps just as a request goes out.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        headers={"Authorization": f"Bearer {way.key}"},
        timeout=aiohttp.ClientTimeout(ANSWER_LIMIT_S),
    )


async def _ask(session: aiohttp.ClientSession, way: Way, answer_s: float) -> tuple[int, float]:
    began = time.perf_counter()
    async with session.post(way.url, json=body_of(way.pool, service_s=answer_s)) as response:
        await response.read()
        return response.status, time.perf_counter() - began
