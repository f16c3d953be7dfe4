"""The way of a request, hop by hop: gateway, key, balancer, replicas. Nothing here costs inference unless asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from corral.components.litellm import MASTER_KEY
from corral.config.client_names import routed_names
from corral.contributions import Backend
from corral.errors import CorralError
from corral.plan.site import bracketed
from corral.render.secrets import ENV_FILE, read_env
from corral.runtime.causes import Reason
from corral.runtime.haproxy import balancer_of
from corral.verbs.doctor.checks import Case, Finding, check
from corral.verbs.doctor.services import reason
from corral.verbs.keys.gateway import client_address, is_out_of_reach, reached

ANSWER_LIMIT_S = 10
QUESTION_LIMIT_S = 120
OK, UNAUTHORIZED, FORBIDDEN = 200, 401, 403
# HAProxy's own words for a LiteLLM that is not there, or does not answer.
UPSTREAM_GONE = {502, 503, 504}
TEAPOT = 400
FORWARDING = "sshd on the host must allow it: AllowTcpForwarding local (or yes) in sshd_config"
# HAProxy's words for the last check.
CHECK_WORDS = {
    "L4CON": "refuses the connection",
    "L4TOUT": "does not answer",
    "SOCKERR": "does not answer: no way there",
    "L6TOUT": "does not finish the TLS handshake",
    "L6RSP": "fails the TLS handshake",
    "L7TOUT": "accepts the connection, but does not answer",
    "L7RSP": "does not answer in HTTP",
    "HANA": "broke requests",
}


def gateway_url(case: Case) -> str:
    """Where clients find the gateway."""
    return client_address(case.plan)


def _is_out_of_reach(case: Case) -> bool:
    """Whether the gateway listens on a far host's loopback address, where only that host reaches it."""
    return is_out_of_reach(case.plan)


def _key(case: Case) -> str:
    return read_env(case.host.rendered / ENV_FILE).get(MASTER_KEY, "")


def _client(case: Case) -> httpx.Client:
    """A client without a key, at the address of the clients."""
    return httpx.Client(base_url=gateway_url(case), timeout=ANSWER_LIMIT_S, trust_env=False)


@contextmanager
def _operator(case: Case, limit_s: float = ANSWER_LIMIT_S) -> Iterator[httpx.Client]:
    """A client with the master key; on another machine over ssh."""
    headers = {"Authorization": f"Bearer {_key(case)}"}
    with (
        reached(case.plan, case.host.out) as place,
        httpx.Client(base_url=place, headers=headers, timeout=limit_s, trust_env=False) as client,
    ):
        yield client


@check(
    "gateway-answers", "path", "./generate.py restart litellm; check address, port and firewall", "gateway", "running"
)
def gateway_answers(case: Case) -> Iterator[Finding]:
    """The gateway answers at its published address."""
    if _why_balancer_is_gone(case) is not None:  # then `balancer-answers` says it
        return
    try:
        code = OK if _is_out_of_reach(case) else _code_for_strangers(case)
        with _operator(case) as operator:
            behind = operator.get("/health/liveliness").status_code
    except httpx.HTTPError as error:
        yield _no_gateway(case, f"does not answer: {_words(error)}")
        return
    except CorralError as error:
        yield Finding(f"this machine does not reach the operator's port: {error}", FORWARDING)
        return
    if UPSTREAM_GONE & {code, behind}:
        yield _no_gateway(case, "does not answer")
    elif behind != OK:
        yield _no_gateway(case, f"answers {behind} to /health/liveliness")


def _code_for_strangers(case: Case) -> int:
    """What the published address answers to a request without a key."""
    with _client(case) as client:
        return client.get("/v1/models").status_code


def _why_balancer_is_gone(case: Case) -> Reason | None:
    found = (reason(case, item) for item in case.plan.services_of(case.name) if item.role == "balancer")
    return next(found, None)


def _no_gateway(case: Case, words: str) -> Finding:
    service = next(item for item in case.plan.services_of(case.name) if item.role == "gateway")
    why = reason(case, service)
    if why is not None:
        return Finding(f"clients → {service.name} {words}: {why.what}", why.remedy)
    place = gateway_url(case)
    remedy = "a firewall, or an address that this machine does not reach: look with curl on the host itself"
    return Finding(f"clients → {service.name} {words} at {place}, although it is healthy", remedy)


@check("key-accepted", "path", "restart litellm after a change of .env", "gateway", "running")
def key_accepted(case: Case) -> Iterator[Finding]:
    """The gateway accepts the operator's key, and nothing without a key."""
    models = _models(case)
    if isinstance(models, Finding):
        yield models
    if models is None or _is_out_of_reach(case):
        return
    try:
        code = _code_for_strangers(case)
    except httpx.HTTPError:
        return  # `gateway-answers` says it
    if code not in (UNAUTHORIZED, FORBIDDEN):
        yield Finding(f"the gateway answers {code} without a key: anybody may use it", "render, then ./generate.py up")


def _models(case: Case) -> set[str] | Finding | None:
    """Names that the gateway offers; what is wrong with the key; None when the gateway does not answer."""
    if not _key(case):
        return Finding(f"{case.host.rendered / ENV_FILE} has no {MASTER_KEY}", "./generate.py secrets init")
    try:
        with _operator(case) as client:
            answer = client.get("/v1/models")
    except (httpx.HTTPError, CorralError):
        return None
    if answer.status_code in (UNAUTHORIZED, FORBIDDEN, TEAPOT):
        words = f"the gateway refuses {MASTER_KEY} of {case.host.rendered / ENV_FILE} ({answer.status_code})"
        return Finding(words, "it was started with another value: secrets init, then ./generate.py restart litellm")
    if answer.status_code != OK:
        what = f"the gateway answers {answer.status_code} to /v1/models"
        is_gone = answer.status_code in UPSTREAM_GONE  # `gateway-answers` says it
        return None if is_gone else Finding(what, "./generate.py logs litellm")
    return {str(item["id"]) for item in answer.json()["data"]}


@check("pools-offered", "path", "render and up: the gateway runs with an older configuration", "gateway", "running")
def pools_offered(case: Case) -> Iterator[Finding]:
    """The gateway offers every pool and alias."""
    offered = _models(case)
    if not isinstance(offered, set):
        return
    inventory = case.plan.inventory
    wanted = {*inventory.pools, *(name for name, _, _ in routed_names(inventory))}
    if missing := sorted(wanted - offered):
        yield Finding(f"the gateway does not offer {', '.join(missing)}", "render, then ./generate.py up")


@check("balancer-answers", "path", "./generate.py restart haproxy", "gateway", "running")
def balancer_answers(case: Case) -> Iterator[Finding]:
    """The balancer answers and knows every replica."""
    if balancer_of(case.plan, case.host.out) is None:
        return
    service = next(item for item in case.plan.services_of(case.name) if item.role == "balancer")
    why = _why_balancer_is_gone(case)
    if why is not None:
        yield Finding(f"clients → {service.name} does not answer: {why.what}", why.remedy)
        return
    behind = [item for item in case.plan.contributions.backends if item.protocol != "cloud"]
    unknown = [item.name for item in behind if item.name not in case.servers]
    if unknown and len(unknown) == len(behind):
        yield Finding(f"{service.name} gives no figures", f"./generate.py restart {service.name}")
    elif unknown:
        yield Finding(f"{service.name} does not know {', '.join(unknown)}", "render, then ./generate.py up")


@check("replicas-up", "path", "depends on the reason that is given")
def replicas_up(case: Case) -> Iterator[Finding]:
    """The balancer reaches every replica on this host, and gives it work."""
    for backend in case.plan.contributions.backends:
        server = case.servers.get(backend.name)
        if backend.endpoint.host != case.name or server is None or server.state == "UP":
            continue
        place = case.plan.site.address(backend.endpoint, case.plan.inventory.gateway.host)
        hop = f"{backend.pool}: HAProxy → {backend.name}"
        if server.state in ("MAINT", "DRAIN", "NOLB"):
            words = f"{hop} gets no work: it was taken out of the balancer ({server.state.lower()})"
            yield Finding(words, f"./generate.py restart {backend.name} brings it back", "warning")
            continue
        service = next(item for item in case.plan.services_of(case.name) if item.name == backend.endpoint.service)
        why = reason(case, service)
        seen = _seen(server.check, server.code)
        if why is not None:
            yield Finding(f"{hop} {seen} on {place}: {why.what}", why.remedy)
        else:
            yield Finding(f"{hop} {seen} on {place}, although it is healthy on {case.name}", _network(case, backend))


def _seen(word: str, code: int) -> str:
    if word == "L7STS":
        return f"answers {code} to the health check"
    return CHECK_WORDS.get(word, "does not answer")


def _network(case: Case, backend: Backend) -> str:
    gateway = case.plan.inventory.gateway.host
    if backend.endpoint.host == gateway:
        return "wait some seconds and look again; then ./generate.py restart haproxy"
    return (
        f"open port {case.plan.inventory.gateway.edge_port} of {case.name} for {gateway} in the firewall; "
        "both must be in one network, and their clocks right"
    )


@check("pools-alive", "path", "see what is said about its replicas", "gateway", "running")
def pools_alive(case: Case) -> Iterator[Finding]:
    """Every pool has a replica that gets work."""
    for name in case.plan.inventory.pools:
        backends = [item for item in case.plan.contributions.backends if item.pool == name]
        known = [case.servers[item.name] for item in backends if item.name in case.servers]
        if known and len(known) == len(backends) and not any(server.state == "UP" for server in known):
            yield Finding(f"{name}: no replica is up; every request is refused", "see what is said about its replicas")


@check("nodes", "path", "switch the node on, or take it out of the pool", "gateway", "running")
def nodes(case: Case) -> Iterator[Finding]:
    """Every node that pools use answers the balancer."""
    for backend in case.plan.contributions.backends:
        server = case.servers.get(backend.name)
        if backend.is_ours or server is None or server.state == "UP":
            continue
        place = f"{bracketed(backend.endpoint.address)}:{backend.endpoint.port}"
        words = f"{backend.pool}: HAProxy → node {backend.name} {_seen(server.check, server.code)} on {place}"
        yield Finding(words, "switch it on; see that it listens on its network address, not only on its own", "warning")


@check("answers", "path", "see the other checks; ./generate.py logs litellm", "gateway", "running")
def answers(case: Case) -> Iterator[Finding]:
    """With --ask: every chat and embedding pool answers a short question through the gateway."""
    if not case.must_ask or not isinstance(_models(case), set):
        return
    kinds = {item.pool: item.kind for item in case.plan.contributions.backends}
    for pool, kind in kinds.items():
        if kind not in ("chat", "embedding"):
            continue
        began = time.monotonic()
        try:
            _ask(case, pool, kind)
        except CorralError as error:
            yield Finding(f"{pool}: {error}", f"./generate.py logs litellm {pool}")
        else:
            yield Finding(f"{pool} answered after {time.monotonic() - began:.1f} s", level="hint")


def _ask(case: Case, pool: str, kind: str) -> None:
    """Returns when the pool has answered five tokens or one embedding; raises CorralError when it does not."""
    body: dict[str, Any] = {"model": pool, "input": "hello"}
    path = "/v1/embeddings"
    if kind == "chat":
        body = {"model": pool, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 5}
        path = "/v1/chat/completions"
    try:
        with _operator(case, QUESTION_LIMIT_S) as client:
            answer = client.post(path, json=body)
    except httpx.HTTPError as error:
        raise CorralError(f"gave no answer: {_words(error)}") from None
    if answer.status_code != OK:
        raise CorralError(f"answered {answer.status_code}: {' '.join(answer.text.split())[:200]}")


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def summary(case: Case) -> str:
    """What was found, when all is well."""
    own = [item for item in case.plan.contributions.backends if item.endpoint.host == case.name]
    up = sum(case.servers[item.name].state == "UP" for item in own if item.name in case.servers)
    replicas = (
        f"HAProxy → {up} of {len(own)} replicas" if balancer_of(case.plan, case.host.out) else f"{len(own)} replicas"
    )
    if not case.has("gateway"):
        return replicas if own else "nothing on the way of requests"
    return f"clients → {gateway_url(case)} → {replicas}"
