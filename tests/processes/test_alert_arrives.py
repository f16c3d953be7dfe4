"""From a server that is gone to a person who is told: real HAProxy, Prometheus, Alertmanager, and a webhook."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest

from tests.processes import farm as farms
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import BRIEF, Extras, Farm, Mode
from tests.processes.helpers import serving_http, wait_until

pytestmark = [
    *(pytest.mark.needs(program) for program in ("haproxy", "prometheus", "alertmanager")),
    pytest.mark.xdist_group("alert-arrives"),
]
SECRET = "OPS_WEBHOOK"
RUNBOOKS = "https://docs.example.com/runbooks/"
# Reading, evaluating, waiting for the replica to come back and telling take seconds on an idle machine.
TOLD_WITHIN_S = 150.0


def inventory_of(mode: Mode, ports: dict[str, int], _extras: Extras) -> dict[str, Any]:
    """Two pools of fakes, Prometheus, and somebody who wants to be told."""
    site = farms.inventory_of(mode, ports, Extras(has_monitoring=True))
    farms.keep_only(site, "brief", "vectors")
    site["monitoring"] |= {
        "node_exporter": False,
        "scrape_interval_s": 1,
        "alertmanager_port": ports["cache"],
        "runbooks": RUNBOOKS,
        "receivers": [{"name": "ops", "kind": "webhook", "secret": SECRET, "severities": ["critical"]}],
    }
    return site


class Receiver:
    """What was posted to an address of this machine."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []

    def has(self, status: str, name: str) -> bool:
        """Whether such an alert was told."""
        return bool(self.alerts(status, name))

    def alerts(self, status: str, name: str) -> list[dict[str, Any]]:
        """Alerts of this name that were told as firing or resolved."""
        told = [alert for post in self.posted for alert in post["alerts"]]
        return [alert for alert in told if (alert["status"], alert["labels"]["alertname"]) == (status, name)]


@contextmanager
def receiving(receiver: Receiver) -> Iterator[str]:
    """The address of a webhook, for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    with serving_http(Handler) as port:
        yield f"http://{LOOPBACK}:{port}/hook"


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with farms.running("slots", inventory_of) as farm:
        yield farm


def tell_at_once(farm: Farm) -> None:
    """Told within seconds and not minutes; how long each alert waits is tested in tests/monitoring."""
    rules = farm.folder / "prometheus" / "rules" / "farm.yml"
    before, name, rest = rules.read_text().partition("- alert: PoolDown\n")
    assert name
    rules.write_text(before + name + rest.replace("for: 1m", "for: 3s", 1))
    os.kill(farm.pid("prometheus"), signal.SIGHUP)
    path = farm.folder / "alertmanager" / "alertmanager.yml"
    text = path.read_text()
    assert text.count("group_interval: 5m") == text.count("group_wait: 30s") == 1
    path.write_text(
        text.replace("group_interval: 5m", "group_interval: 1s").replace("group_wait: 30s", "group_wait: 1s")
    )
    httpx.post(f"http://{LOOPBACK}:{farm.ports['cache']}/-/reload", trust_env=False).raise_for_status()


def test_a_pool_that_is_gone_is_told_with_what_to_do_and_told_again_when_it_is_back(farm: Farm) -> None:
    receiver = Receiver()
    with receiving(receiver) as address:
        (farm.folder / "secrets" / SECRET).write_text(address)
        tell_at_once(farm)
        with farm.fakes.behaving(BRIEF, "refuse"):
            wait_until(lambda: receiver.has("firing", "PoolDown"), TOLD_WITHIN_S, "somebody is told")
        wait_until(lambda: receiver.has("resolved", "PoolDown"), TOLD_WITHIN_S, "somebody is told that it is over")
    [alert] = receiver.alerts("firing", "PoolDown")[:1]
    assert alert["labels"]["pool"] == "brief"
    assert alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"] == "No replica of brief is left"
    assert alert["annotations"]["runbook_url"].startswith(RUNBOOKS)
    assert "PoolDown" in alert["annotations"]["runbook_url"]
    # The pool that was well is in no alert, and the smaller trouble of the one replica is not told beside the greater.
    # What else is told has to do with the machine: on a busy one the gateway takes more than a minute to start.
    labels = [alert["labels"] for post in receiver.posted for alert in post["alerts"]]
    told = {(item["alertname"], item.get("pool")) for item in labels if {"pool", "replica"} & item.keys()}
    assert told == {("PoolDown", "brief")}
