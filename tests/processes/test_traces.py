"""Traces of requests: the real LiteLLM, and a local receiver that reads OTLP as it is sent."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.processes import farm as farms
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import BRIEF, Extras, Farm, Mode
from tests.processes.helpers import free_port, serving_http, wait_until

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.xdist_group("traces")]
SECRET = "TRACES_KEY"
PROMPT = "the heron stands in the reeds"
ANSWER = "answer of brief-1"
REASON = "broken on purpose"
# LiteLLM's library sends every five seconds, and waits longer after each failed attempt.
TOLD_WITHIN_S = 60.0
PROMPT_S = 5.0


class Receiver:
    """What was sent to an address of this machine."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    def forget(self) -> None:
        """Starts anew."""
        self.bodies.clear()
        self.headers.clear()

    def spans(self) -> list[dict[str, Any]]:
        """Attributes of every span, with its name and its parent."""
        return [
            {
                "name": span.name,
                "parent": span.parent_span_id,
                "service": next(
                    item.value.string_value for item in sent.resource.attributes if item.key == "service.name"
                ),
                **{
                    item.key: getattr(item.value, item.value.WhichOneof("value") or "string_value")
                    for item in span.attributes
                },
            }
            for body in list(self.bodies)
            for sent in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in sent.scope_spans
            for span in scope.spans
        ]

    def of_clients(self) -> dict[str, dict[str, Any]]:
        """The spans of requests that said who asks, by that name."""
        who = "metadata.user_api_key_end_user_id"
        return {span[who]: span for span in self.spans() if span.get(who)}

    def knows(self, text: str) -> bool:
        """Whether a text is anywhere in what was sent."""
        return any(text.encode() in body for body in list(self.bodies))


@contextmanager
def receiving(receiver: Receiver, port: int) -> Iterator[None]:
    """A receiver of traces on this port, for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            receiver.headers.append({"path": self.path, **{name.lower(): text for name, text in self.headers.items()}})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    with serving_http(Handler, port):
        yield


def inventory_of(ports: dict[str, int], port: int, *, prompts: bool) -> dict[str, Any]:
    """Two pools of fakes, and a receiver of traces."""
    site = farms.inventory_of("slots", ports, Extras())
    farms.keep_only(site, "brief", "vectors")
    site["tracing"] = {"url": f"http://{LOOPBACK}:{port}/otel", "secret": SECRET, "prompts": prompts}
    return site


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module", params=[False, True], ids=["without-prompts", "with-prompts"])
def farm(request: pytest.FixtureRequest, port: int) -> Iterator[Farm]:
    def make(_mode: Mode, ports: dict[str, int], _extras: Extras) -> dict[str, Any]:
        return inventory_of(ports, port, prompts=request.param)

    with farms.running("slots", make) as farm:
        yield farm


def test_requests_are_traced_with_their_pool_and_prompts_only_if_asked_for(
    farm: Farm, receiver: Receiver, port: int
) -> None:
    assert farm.plan.inventory.tracing is not None
    # No receiver listens yet: no request fails for it, nor waits.
    assert all(farm.ask("brief").raise_for_status().elapsed.total_seconds() < PROMPT_S for _ in range(5))
    with receiving(receiver, port):
        ask_five_times(farm)
        wait_until(lambda: len(receiver.of_clients()) == 5, TOLD_WITHIN_S, "every request is traced")
    spans = receiver.of_clients()
    assert [spans[name]["litellm.model_group"] for name in sorted(spans)] == [*["brief"] * 3, "vectors", "brief"]
    assert all(span["name"] == span["litellm.model_group"] and not span["parent"] for span in spans.values())
    assert {span["gen_ai.request.model"] for span in spans.values()} == {"fake-model"}
    assert {span["service"] for span in spans.values()} == {"test-slots"}
    assert spans["client-1"]["gen_ai.usage.total_tokens"] == 6
    assert spans["client-5"]["error.code"] == "500"
    assert {sent["path"] for sent in receiver.headers} == {"/otel/v1/traces"}
    assert {sent["authorization"] for sent in receiver.headers} == {f"value-of-{SECRET}"}

    told = {number: receiver.knows(f"{PROMPT} {number}") for number in range(1, 6)}
    assert told == dict.fromkeys(told, farm.plan.inventory.tracing.prompts)
    assert receiver.knows(ANSWER) == receiver.knows(REASON) == farm.plan.inventory.tracing.prompts
    # One span for each request, and none for what the gateway does besides.
    assert {span["name"] for span in receiver.spans()} == {"brief", "vectors"}
    receiver.forget()


def ask_five_times(farm: Farm) -> None:
    """One request of every sort; the third would like its prompt to be kept, the last one is told an error."""
    farm.ask("brief", f"{PROMPT} 1", user="client-1").raise_for_status()
    farm.ask_streamed("brief", f"{PROMPT} 2", user="client-2")
    curious = {"litellm-disable-message-redaction": "true"}
    body = farms.body_of("brief", f"{PROMPT} 3", user="client-3")
    farm.client.post("/v1/chat/completions", json=body, headers=curious).raise_for_status()
    inputs = {"model": "vectors", "input": f"{PROMPT} 4", "user": "client-4"}
    farm.client.post("/v1/embeddings", json=inputs).raise_for_status()
    with farm.fakes.behaving(BRIEF, "error"):
        assert farm.ask("brief", f"{PROMPT} 5", user="client-5").status_code == 500
