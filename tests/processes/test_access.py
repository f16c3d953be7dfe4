"""What a key may reach, on the real LiteLLM behind the real HAProxy: exactly its pools, by one list of routes.

Both lists of cases are made from what runs: every path of LiteLLM's own `openapi.json`, and every route with a model in
every spelling of the model. A new version of LiteLLM is judged by running them.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from corral.gateway.routes import JOBS_PATHS, MODEL_ROUTES, READ_ROUTES, with_short_forms
from tests.processes import preloaded
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import MIXED, POOLS, Farm, in_modes
from tests.processes.helpers import wait_until

pytestmark = [pytest.mark.needs("postgres", "prisma-engine", "redis")]

# A consumer, a pool that its key opens, and one that it does not.
OWNER, ALLOWED, CLOSED = "guest", "even", "mixed"
METHODS = ("get", "post", "put", "patch", "delete")
# Further addresses of the loopback network.
STRANGERS = tuple(f"127.0.0.{number}" for number in range(71, 75))
MIB = 1024 * 1024

slots = in_modes("slots")


@pytest.fixture
def key(farm: Farm) -> str:
    return (farm.folder / "keys" / OWNER).read_text()


def at(farm: Farm, port: str, key: str = "", address: str = "") -> httpx.Client:
    """A client of one of the farm's ports, from another address of the loopback network if one is named."""
    transport = httpx.HTTPTransport(local_address=address) if address else None
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = f"http://{LOOPBACK}:{farm.ports[port]}"
    return httpx.Client(base_url=base, headers=headers, transport=transport, trust_env=False, timeout=60)


def body_for(route: str, **fields: Any) -> dict[str, Any]:
    """A request that the route would answer."""
    inputs: dict[str, dict[str, Any]] = {
        "embeddings": {"input": "x"},
        "rerank": {"query": "x", "documents": ["a", "b"]},
        "generations": {"prompt": "x"},
        "speech": {"input": "x", "voice": "alloy"},
        "responses": {"input": "x"},
    }
    if route in {"/v1/completions", "/completions"}:
        return {"prompt": "x", **fields}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    return {**inputs.get(route.rpartition("/")[2], chat), **fields}


def sent(route: str, **fields: Any) -> dict[str, Any]:
    """How httpx is told to send that request: recordings as a form with a file, all else as JSON."""
    if "transcriptions" not in route:
        return {"json": body_for(route, **fields)}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return {"data": form, "files": {"file": ("talk.wav", b"RIFF", "audio/wav")}}


# --- every path of LiteLLM's


def paths(farm: Farm) -> list[tuple[str, str]]:
    """Method and path of everything that the running LiteLLM offers."""
    with at(farm, "admin") as admin:
        found = admin.get("/openapi.json").raise_for_status().json()["paths"]
    listed = [(method, re.sub(r"{[^}]*}", "x", path)) for path, methods in found.items() for method in methods]
    return [(method, path) for method, path in listed if method in METHODS]


def is_listed(method: str, path: str) -> bool:
    """Whether the kit's list of routes has it."""
    if method == "post":
        return path in with_short_forms(MODEL_ROUTES) or bool(_azure(path))
    return method == "get" and (path in {*with_short_forms(READ_ROUTES), "/health"} or _is_a_model(path))


def _azure(path: str) -> str:
    found = re.fullmatch(r"/openai/deployments/x(/.*)", path)
    return found[1] if found and f"/v1{found[1]}" in MODEL_ROUTES else ""


def _is_a_model(path: str) -> bool:
    return re.fullmatch(r"(/v1)?/models/[A-Za-z0-9._:-]+", path) is not None


@slots
def test_haproxy_lets_through_the_listed_routes_alone(farm: Farm, key: str) -> None:
    """969 paths with a key for two pools, without a key and with a wrong one; one route in a hundred gets further."""
    found = paths(farm)
    assert len(found) > 500
    with at(farm, "gateway", key) as client, at(farm, "gateway") as stranger:
        for method, path in found:
            codes = {client.request(method, path).status_code, stranger.request(method, path).status_code}
            if (method, path) == ("get", "/"):  # the page about the farm, not LiteLLM's
                assert codes == {200}
            elif path.startswith(JOBS_PATHS):  # the farm's own batches and files, not LiteLLM's
                assert codes <= {400, 401, 404, 405, 422} or (method, codes) == ("get", {200, 401}), (method, path)
            elif not is_listed(method, path):
                assert codes <= {404, 405}, (method, path)
        assert client.get("/").headers["content-security-policy"].startswith("default-src 'none'")
        for route in (*MODEL_ROUTES, *READ_ROUTES):
            method = "GET" if route in READ_ROUTES else "POST"
            given = sent(route, model=ALLOWED) if method == "POST" else {}
            assert stranger.request(method, route, **given).status_code == 401, route
            answer = client.request(method, route, **given)
            assert answer.status_code not in {401, 403, 405}, route
            assert "this farm serves" not in answer.text, route


@slots
def test_a_wrong_key_opens_no_route(farm: Farm) -> None:
    with at(farm, "gateway", "sk-wrong", STRANGERS[0]) as client:
        for route in MODEL_ROUTES:
            assert client.post(route, **sent(route, model=ALLOWED)).status_code == 401, route
        assert client.get("/v1/models").status_code == 401


@slots
def test_a_consumers_key_opens_the_same_list_at_litellm_itself(farm: Farm, key: str) -> None:
    """Without HAProxy: what such a key is let through to, beyond the list, is open without a key as well."""
    below = tuple(f"{route}/" for route in with_short_forms((*MODEL_ROUTES, *READ_ROUTES)))
    with at(farm, "litellm", key) as client, at(farm, "litellm") as stranger:
        client.headers["Connection"] = stranger.headers["Connection"] = "close"  # some answers end it unsaid
        for method, path in paths(farm):
            if is_listed(method, path) or path.startswith(below):  # LiteLLM takes a route for all that is below it
                continue
            if client.request(method, path).is_success:
                assert stranger.request(method, path).is_success, (method, path)


# --- every spelling of a model


def spellings(route: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and body of requests for the closed pool on one route, in every way in which a model can be named."""
    own = {"model": ALLOWED}
    yield route, {"model": CLOSED}
    yield route, {"model": [CLOSED]}
    yield route, {"model": f"{ALLOWED},{CLOSED}"}
    yield route, {"model": f"openai/{CLOSED}"}
    yield route, {"model": MIXED[0]}
    yield f"{route}?model={CLOSED}", own
    yield f"{route}?mod%65l={CLOSED}", own
    for prefix in ("/engines/", "/openai/deployments/"):
        yield f"{prefix}{CLOSED}{route.removeprefix('/v1')}", own
    for name in ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks"):
        yield route, own | {name: [CLOSED], "mock_testing_fallbacks": True}
        yield route, own | {name: [{"model": CLOSED}], "mock_testing_fallbacks": True}
        yield route, own | {name: [{ALLOWED: [CLOSED]}], "mock_testing_fallbacks": True}
    yield route, own | {"extra_body": {"model": CLOSED}}
    yield route, {"extra_body": {"model": CLOSED}}
    yield (
        route,
        own | {"litellm_params": {"model": CLOSED}, "model_info": {"id": MIXED[0]}, "specific_deployment": True},
    )
    yield route, own | {"deployment_id": MIXED[0], "model_list": [{"model_name": ALLOWED}]}
    yield route, own | {"router_settings_override": {"model_group_alias": {ALLOWED: CLOSED}}}
    yield route, own | {"metadata": {"model_group": CLOSED, "model_group_alias": {ALLOWED: CLOSED}}}
    yield route, own | {"router_settings": {"fallbacks": [{ALLOWED: [CLOSED]}]}, "user_config": {"model_list": []}}


def reached(farm: Farm) -> dict[str, int]:
    """Requests that came to the closed pool's servers, on whatever path but that of the health checks."""
    seen = farm.fakes.seen()
    others = {name: sum(n for path, n in seen[name].other_paths.items() if path != "/health") for name in POOLS[CLOSED]}
    return {name: seen[name].arrivals + others[name] for name in POOLS[CLOSED]}


@slots
@pytest.mark.parametrize("port", ["gateway", "litellm"])
def test_no_spelling_reaches_a_pool_that_the_key_does_not_open(farm: Farm, key: str, port: str) -> None:
    """Through HAProxy, and at LiteLLM's own port, where nothing is checked before it."""
    with at(farm, port, key) as client:
        for route in MODEL_ROUTES:
            for path, fields in spellings(route):
                headers = {"x-litellm-model": CLOSED}
                answer = client.post(path, **sent(route, **fields), headers=headers)
                assert not any(reached(farm).values()), (path, fields, answer.text)


@slots
def test_a_key_is_told_that_a_pool_is_not_its_own(farm: Farm, key: str) -> None:
    with at(farm, "gateway", key) as client:
        for route in MODEL_ROUTES:
            assert client.post(route, **sent(route, model=CLOSED)).status_code == 403, route


@slots
def test_fallbacks_of_ones_own_still_work(farm: Farm, key: str) -> None:
    with at(farm, "gateway", key) as client, farm.fakes.behaving(POOLS[ALLOWED], "error"):
        answer = client.post("/v1/chat/completions", json=body_for("/v1/chat", model=ALLOWED, fallbacks=["chat"]))
    assert answer.raise_for_status().json()["choices"][0]["message"]["content"]


# --- fields and headers by which LiteLLM is controlled

CONTROLS: dict[str, Any] = {
    "num_retries": 50, "max_retries": 50, "timeout": 1, "stream_timeout": 1, "request_timeout": 1,
    "custom_llm_provider": "anthropic", "organization": "other", "api_version": "x", "base_model": "x",
    "extra_headers": {"Host": "elsewhere", "x-corral-session": "another", "x-corral-consumer": "another"},
    "headers": {"Cookie": "a=b"}, "cache_prompt": True, "id_slot": 0, "cache_salt": "another", "priority": -5,
    "mock_response": "made up", "tags": ["free"],
    "guardrails": [], "cache": {"no-cache": True}, "drop_params": True, "additional_drop_params": ["max_tokens"],
    "allowed_openai_params": ["x"], "litellm_trace_id": "x", "litellm_session_id": "x", "max_budget": 1e9,
    "model_info": {"thinking": "shown"}, "vertex_project": "x", "hf_model_name": "x", "weight": 1,
}  # fmt: skip
PASSED: dict[str, Any] = {
    "min_p": 0.1,
    "grammar": 'root ::= "a"',
    "seed": 7,
    "temperature": 0.5,
    "user": "me",
    "top_k": 3,
}


@slots
@pytest.mark.parametrize("place", ["body", "extra_body"])
def test_control_fields_are_taken_out_and_the_servers_own_pass(farm: Farm, place: str) -> None:
    fields: dict[str, Any] = CONTROLS if place == "body" else {"extra_body": CONTROLS}
    answer = farm.ask("even", **fields, **PASSED).raise_for_status()
    assert answer.json()["choices"][0]["message"]["content"].startswith("answer of even")
    [seen] = [item for name, item in farm.fakes.seen().items() if name in POOLS["even"] and item.arrivals]
    [body], [headers] = seen.bodies, seen.headers
    assert {name: body.get(name) for name in PASSED} == PASSED
    assert set(CONTROLS) & set(body) == set()
    assert {name.lower() for name in headers} & {"cookie", "x-corral-session", "x-corral-consumer"} == set()
    assert "elsewhere" not in headers.values()


@slots
@pytest.mark.parametrize("name", ["input_cost_per_token", "api_base", "base_url", "api_key"])
def test_prices_and_addresses_reach_no_server(farm: Farm, name: str) -> None:
    """LiteLLM refuses those that it knows as such, with 401."""
    fields: dict[str, Any] = {name: 0 if "cost" in name else "http://192.0.2.1/"}
    farm.ask("even", **fields)
    assert not any(name in body for seen in farm.fakes.seen().values() for body in seen.bodies)


@slots
def test_a_request_is_never_repeated_on_a_clients_word(farm: Farm) -> None:
    headers = {"x-litellm-num-retries": "9", "Authorization": f"Bearer {farm.key}"}
    with farm.fakes.behaving(POOLS["even"], "error"):
        answer = farm.client.post(
            "/v1/chat/completions", json=body_for("/v1/chat", model="even", num_retries=9), headers=headers
        )
    assert answer.status_code == 500
    assert sum(farm.fakes.arrivals(POOLS["even"]).values()) == 1


@slots
def test_no_providers_usual_variable_holds_a_key(farm: Farm) -> None:
    """LiteLLM takes OPENAI_API_KEY and its like for any request; servers' keys have names of the kit's own."""
    environment = psutil.Process(farm.pid("litellm")).environ()
    assert environment["CORRAL_KEY_LLAMA_API_KEY"]
    kept = {"LITELLM_MASTER_KEY", "LITELLM_SALT_KEY"}
    secret = {name for name, value in environment.items() if value and value in farm.secrets.values()}
    assert {name for name in secret if name.endswith("_KEY") and not name.startswith("CORRAL_KEY_")} <= kept


# --- strangers


@slots
def test_strangers_cost_nothing(farm: Farm, key: str) -> None:
    """Stalled uploads, endless bodies and anonymous requests, while a client with a key is answered in time."""
    memory = psutil.Process(preloaded.forked(farm.pid("litellm"))).memory_info
    before, is_over = memory().rss, threading.Event()
    waits: list[float] = []

    def ask_on() -> None:
        with at(farm, "gateway", key) as client:
            while not is_over.is_set():
                began = time.monotonic()
                client.get("/v1/models").raise_for_status()
                waits.append(time.monotonic() - began)
                time.sleep(0.1)

    with ThreadPoolExecutor(3) as threads:
        honest = threads.submit(ask_on)
        try:
            wait_until(lambda: len(waits) >= 10, 30, "it is answered")
            uploads = stalled_uploads(farm, 2100)
            anonymous = threads.submit(anonymous_requests, farm, 800, 200.0)
            sent = [endless_body(farm, head) for head in ENDLESS]
            assert anonymous.result() == {401}
            wait_until(lambda: not held(uploads), 40, "no stalled upload is held")
        finally:
            is_over.set()
        honest.result()
    assert max(sent) < 8 * MIB, "of 900 MiB"
    assert memory().rss - before < 64 * MIB
    assert sorted(waits)[len(waits) * 95 // 100] < 2.0


ENDLESS = (
    "GET /v1/models HTTP/1.1\r\nTransfer-Encoding: chunked",
    "PUT /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked",
    "POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked",
    "POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer sk-wrong\r\nContent-Length: 943718400",
    "GET /v1/models HTTP/1.1\r\nAuthorization: Bearer sk-wrong\r\nContent-Length: 943718400",
)


LENGTH = "Content-Length: 60000\r\n"


def endless_body(farm: Farm, head: str) -> int:
    """Sends a body of 900 MiB after this head; how many bytes were taken before the connection ended."""
    piece, sent = b"100000\r\n" + b"x" * MIB + b"\r\n", 0
    with socket.create_connection((LOOPBACK, farm.ports["gateway"]), 30, (STRANGERS[1], 0)) as link:
        link.sendall(f"{head}\r\nHost: farm\r\n\r\n".encode())
        try:
            while sent < 900 * MIB:
                sent += link.send(piece)
        except OSError:
            pass
    return sent


def stalled_uploads(farm: Farm, count: int) -> list[socket.socket]:
    """Connections with the head and a part of a body, from a few addresses; none of them sends any more."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: farm\r\n{LENGTH}Authorization: Bearer sk-wrong-{{}}\r\n\r\n"
    links = []
    for number in range(count):
        try:
            link = socket.create_connection((LOOPBACK, farm.ports["gateway"]), 30, (STRANGERS[number % 4], 0))
            link.sendall(head.format(number).encode() + b"x" * 17_000)
        except OSError:
            continue
        links.append(link)
    return links


def held(links: list[socket.socket]) -> int:
    """How many of them the other side has not ended yet; the others are forgotten."""
    links[:] = [link for link in links if is_open(link)]
    return len(links)


def is_open(link: socket.socket) -> bool:
    """Whether the other side has not ended it yet."""
    link.settimeout(0)
    try:
        while link.recv(65_536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    link.close()
    return False


def anonymous_requests(farm: Farm, count: int, each_second: float) -> set[int]:
    """So many requests without a key at this rate; the statuses of their answers."""
    codes = set()
    with at(farm, "gateway", address=STRANGERS[2]) as client:
        began = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, began + number / each_second - time.monotonic()))
            codes.add(
                client.post("/v1/chat/completions", content=json.dumps(body_for("/v1/chat", model="even"))).status_code
            )
    return codes
