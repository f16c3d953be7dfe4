"""Errors of every interface through the rendered farm: one shape, codes that programs act on, and no internals."""

from __future__ import annotations

import gzip
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.processes.fakes import LOOPBACK
from tests.processes.farm import CHAT_REPLICAS, EVEN, EVEN_DEPTH, HOST, LIMIT_RPM, Farm, in_modes
from tests.processes.helpers import wait_until

pytestmark = in_modes("slots")

HI = [{"role": "user", "content": "hi"}]
LONG = "word " * 6000
INTERNALS = re.compile(r"""[Ll]ite(llm|LLM)|https?:|[0-9a-f]{32}|Exception|Traceback|["']error["']:""")
CHAT, MESSAGES, RESPONSES, COMPLETIONS = (
    "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions",
)  # fmt: skip
EMBEDDINGS, RERANK, IMAGES, SPEECH = "/v1/embeddings", "/v1/rerank", "/v1/images/generations", "/v1/audio/speech"
# By path: the smallest body beside the model, and the same with a text.
BODIES: dict[str, Any] = {
    CHAT: lambda text: {"messages": [{"role": "user", "content": text}]},
    MESSAGES: lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 5},
    RESPONSES: lambda text: {"input": text},
    COMPLETIONS: lambda text: {"prompt": text},
    EMBEDDINGS: lambda text: {"input": text},
    RERANK: lambda text: {"query": text, "documents": ["one"]},
    IMAGES: lambda text: {"prompt": text},
    SPEECH: lambda text: {"input": text, "voice": "alloy"},
}
# Requests that fill the pool `even`.
PLACES = len(EVEN) + EVEN_DEPTH
CONVERSATIONS = (CHAT, MESSAGES, RESPONSES, COMPLETIONS)
BAD, UNKNOWN, AUTH = "invalid_request_error", "not_found_error", "authentication_error"

# Method, path, body, and of the answer: status, type, code, and a word of the message.
Row = tuple[str, str, Any, int, str, str | None, str]
ROWS: list[Row] = [
    *[("POST", path, {"model": "nope", **body("hi")}, 404, UNKNOWN, "model_not_found", "'nope'")
      for path, body in BODIES.items()],
    *[("POST", path, {"model": "chat", **BODIES[path](LONG), **more}, 400, BAD, "context_length_exceeded",
       "prompt is too long: ") for path in CONVERSATIONS for more in ({}, {"stream": True})],
    ("POST", EMBEDDINGS, {"model": "embed", "input": LONG}, 400, BAD, "context_length_exceeded", "> 512 maximum"),
    *[("POST", path, {"model": "embed", **BODIES[path]("hi")}, 400, BAD, None, "for embeddings, not for chat")
      for path in CONVERSATIONS],
    *[("POST", path, {"model": "chat", **BODIES[path]("hi")}, 400, BAD, None, "is for chat, not for")
      for path in (EMBEDDINGS, RERANK, IMAGES, SPEECH)],
    *[("POST", path, {**BODIES[path]("hi")}, 400, BAD, None, "`model`") for path in (CHAT, MESSAGES)],
    *[("POST", path, {"model": "chat", "max_tokens": 5, "messages": "hi"}, 400, BAD, None, "messages must be a list")
      for path in (CHAT, MESSAGES)],
    ("POST", CHAT, {"model": "chat", "messages": HI, "temperature": "hot"}, 400, BAD, None, "must be number"),
    ("POST", CHAT, {"model": "chat", "messages": HI, "tools": [{"type": "code_interpreter"}]}, 400, BAD, None,
     "Unsupported tool type"),
    ("POST", CHAT, b"[1]", 400, BAD, None, "JSON object"),
    ("POST", CHAT, gzip.compress(b"{}"), 400, BAD, None, "JSON object"),
    ("POST", CHAT, '{"model": "chat", "user": "é"}'.encode("latin-1"), 400, BAD, None, "UTF-8"),
    ("POST", "/v1/audio/transcriptions", {"model": "chat"}, 400, BAD, None, "file"),
    ("GET", CHAT, None, 405, BAD, None, "POST"),
    ("GET", "/v1/models/nope", None, 404, UNKNOWN, "model_not_found", "nope"),
    ("GET", "/v1/models/Qwen/Qwen3-8B:Q4", None, 404, UNKNOWN, "model_not_found", "Qwen/Qwen3-8B:Q4"),
    *[("POST", path, {"input": "hi"}, 404, UNKNOWN, "not_found", "this farm serves /v1/")
      for path in ("/v1/moderations", "/v1/vector_stores", "/v1/assistants", "/v1/fine_tuning/jobs")],
    ("POST", "/api/chat", {"model": "chat"}, 404, UNKNOWN, "not_found", "this farm serves /v1/"),
]  # fmt: skip


def checked(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has the shape of both protocols and names nothing of the farm's inside."""
    told = answer.json()
    assert set(told) == {"type", "error"}
    assert told["type"] == "error"
    error: dict[str, Any] = told["error"]
    assert set(error) == {"type", "message", "param", "code"}
    assert not INTERNALS.search(error["message"]), error["message"]
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    return error


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]} {row[5] or row[6]}")
def test_wrong_requests_are_told_what_is_wrong(farm: Farm, row: Row) -> None:
    method, path, body, status, kind, code, word = row
    sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = farm.client.request(method, path, **sent)
    error = checked(answer)
    assert (answer.status_code, error["type"], error["code"]) == (status, kind, code)
    assert word in error["message"]


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_keys_that_are_not_known_are_told_so(farm: Farm, path: str) -> None:
    for headers in ({}, {"Authorization": f"Bearer sk-unknown{path}"}, {"x-api-key": f"sk-unknown{path}"}):
        with farm.new_client() as client:
            answer = client.post(path, json={"model": "chat", **BODIES[path]("hi")}, headers=headers)
        assert (answer.status_code, checked(answer)["code"]) == (401, "invalid_api_key")
        assert checked(answer)["type"] == AUTH


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_refusals_say_when_to_come_back(farm: Farm, path: str) -> None:
    """A pool's limit, and a queue that is full: at the door, and past it by way of a fallback's field."""
    body = BODIES[path]("hi")
    many = (farm.client.post(path, json={"model": "limited", **body}) for _ in range(2 * LIMIT_RPM + 2))
    limited = next(answer for answer in many if not answer.is_success)
    with farm.fakes.behaving(EVEN, "hold"), ThreadPoolExecutor(PLACES) as threads:
        asked = [threads.submit(farm.ask, "even") for _ in range(PLACES)]
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, 20, "the queue is full")
        full = [
            farm.client.post(path, json={"model": "even", **body, **more}) for more in ({}, {"fallbacks": ["even"]})
        ]
        farm.fakes.tell(EVEN)
        assert [item.result().status_code for item in asked] == [200] * len(asked)
    for answer in (limited, *full):
        error = checked(answer)
        assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_failures_of_servers_have_the_same_shape(farm: Farm, path: str) -> None:
    body = {"model": "even", **BODIES[path]("hi")}
    with farm.fakes.behaving(EVEN, "error"):
        answer = farm.client.post(path, json=body)
        assert (answer.status_code, checked(answer)["message"]) == (500, "broken on purpose")
    with farm.fakes.behaving(EVEN, "break", service_s=0.2):
        answer = farm.client.post(path, json={**body, "stream": True})
        last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
        told = json.loads(last.removeprefix("data: "))
        error = (told.get("response") or told)["error"]
        assert (error["code"], error["message"]) == ("server_error", "the replica broke the connection")


def test_openais_library_knows_the_errors(farm: Farm) -> None:
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    with openai.OpenAI(base_url=base, api_key=farm.key, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
        assert (unknown.value.code, unknown.value.type) == ("model_not_found", UNKNOWN)
        assert unknown.value.request_id
        assert client.models.retrieve("Owner/Model:8B").id == "Owner/Model:8B"


def test_a_base_url_with_v1_or_a_slash_too_many_works(farm: Farm) -> None:
    for path in ("/v1/v1/messages", "//v1/messages", "//v1/v1/messages"):
        url = httpx.URL(f"http://{LOOPBACK}:{farm.ports['gateway']}{path}")
        assert farm.client.post(url, json={"model": "even", **BODIES[MESSAGES]("hi")}).status_code == 200


def test_a_request_has_one_name_for_its_client_and_in_litellms_log(farm: Farm) -> None:
    answer = farm.ask("nope")
    name = answer.headers["x-request-id"]
    logs = (farm.out / HOST / "logs").glob("litellm*")
    wait_until(lambda: any(name in log.read_text(errors="replace") for log in logs), 10, f"{name} is in the log")
    assert not [header for header in answer.headers if header.startswith("x-litellm-")]


def test_wrong_requests_of_one_client_take_no_replica_out(farm: Farm) -> None:
    """llama-server answers 500 to tools that it does not know."""
    wrong: dict[str, Any] = {"tools": [{"type": "code_interpreter"}]}
    for _ in range(4):
        assert farm.ask("chat", max_tokens=2).status_code == 200
        assert {farm.ask("chat", **wrong).status_code for _ in range(5)} == {400}
        assert not set(CHAT_REPLICAS) & set(farm.down())
