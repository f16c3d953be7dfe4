"""The rendered HAProxy on loopback with pools of fakes behind it; a fake stands in for LiteLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from corral.build import build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.render.output import write
from corral.render.tree import render
from corral.runtime.haproxy import Balancer, balancer_of
from tests.needs import program
from tests.processes.fakes import LOOPBACK, Fakes, command
from tests.processes.helpers import Process, free_port, wait_http, wait_until

START_S = 20.0


@dataclass(frozen=True)
class Balancing:
    """A running HAProxy, the fakes behind it, its ports by their names in `gateway`, and its log."""

    balancer: Balancer
    fakes: Fakes
    ports: Mapping[str, int]
    log: Path

    def url(self, port: str) -> str:
        """Base address of one of its ports."""
        return f"http://{LOOPBACK}:{self.ports[port]}"


@contextmanager
def balancing(
    folder: Path,
    pools: Mapping[str, Mapping[str, int]],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    **gateway: Any,
) -> Iterator[Balancing]:
    """HAProxy in front of these pools: the name of each fake and its slots; `settings` of a pool and `gateway` go into
    the inventory."""
    slots = {name: count for pool in pools.values() for name, count in pool.items()}
    names = ("port", "admin_port", "litellm_port", "balancer_port", "stats_port")
    ports = {name: free_port() for name in (*names, "fakes", *slots)}
    node = {"engine": "openai", "model": "fake-model", "health": "/health"}
    inventory = {
        "schema_version": 1,
        "name": "balancing",
        "hosts": {"here": {"runtime": "local"}},
        "nodes": {
            name: node | {"slots": count, "url": f"http://{LOOPBACK}:{ports[name]}"} for name, count in slots.items()
        },
        "pools": {
            pool: {"on": [{"node": name} for name in members], **(settings or {}).get(pool, {})}
            for pool, members in pools.items()
        },
        "gateway": {
            "host": "here", "database": False, "cache": False, **{name: ports[name] for name in names}, **gateway,
        },
    }  # fmt: skip
    plan = build_plan(validate(parse(yaml.safe_dump(inventory), "inventory.yaml")))
    write(render(plan), folder)
    host = folder / "here"
    (host / "logs").mkdir()
    haproxy: list[str | Path] = [program("haproxy"), "-W", "-db", "-f", str(host / "haproxy" / "haproxy.cfg")]
    served = [(name, ports[name], count) for name, count in slots.items()]
    served.append(("litellm", ports["litellm_port"], 1))
    with (
        Process(command(ports["fakes"], served), folder / "fakes.log"),
        Process(haproxy, folder / "haproxy.log", folder=host) as process,
    ):
        wait_http(f"http://{LOOPBACK}:{ports['fakes']}/")
        balancer = balancer_of(plan, folder)
        assert balancer is not None
        wait_until(balancer.is_running, START_S, f"the balancer: {process.output}")
        fakes = Fakes(ports["fakes"])
        with fakes.client:
            yield Balancing(balancer, fakes, ports, process.log)
