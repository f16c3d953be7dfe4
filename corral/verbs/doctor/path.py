"""The way of a request, hop by hop: gateway, key, balancer, replicas. Nothing here costs inference unless asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx

from corral.checks.registry import Findings
from corral.components.litellm import MASTER_KEY
from corral.config.client_names import routed_names
from corral.contributions import Backend, Service
from corral.errors import CorralError
from corral.render.secrets import ENV_FILE, read_env
from corral.runtime.causes import Reason, check_words
from corral.runtime.haproxy import Server, balancer_of
from corral.runtime.hosts import ComposeHost
from corral.verbs.doctor.case import Answers, Case, say
from corral.verbs.keys.gateway import client, client_address, is_out_of_reach, reached

ANSWER_LIMIT_S = 10
QUESTION_LIMIT_S = 120
OK, TEAPOT = 200, 400
NO_KEY = {401, 403}
# HAProxy's own words for a LiteLLM that is not there, or does not answer.
UPSTREAM_GONE = {502, 503, 504}
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 5}),
    "embedding": ("/v1/embeddings", {"input": "hello"}),
}


# --- asking ----------------------------------------------------------------------------------------------------------


def ask(host: ComposeHost, *, must_ask: bool = False) -> Answers:
    """What the gateway on this host answers; `must_ask` puts a question to every pool, which costs some inference."""
    found: dict[str, Any] = {}
    try:
        with reached(host.plan, host.out) as place, client(place, _key(host), ANSWER_LIMIT_S) as operator:
            found["health"] = operator.get("/health/liveliness").status_code
            models = operator.get("/v1/models")
            found["models"] = models.status_code
            if models.status_code == OK:
                found["offered"] = frozenset(str(item["id"]) for item in models.json()["data"])
                found["pools"] = dict(_questions(host, operator)) if must_ask else {}
    except httpx.HTTPError as problem:
        found["problem"] = _words(problem)
    except CorralError as problem:
        found["unreached"] = str(problem)
    except (ValueError, LookupError, TypeError):
        found["problem"] = "its list of models cannot be read; another program may have its port"
    if not is_out_of_reach(host.plan):
        try:
            with client(client_address(host.plan), "", ANSWER_LIMIT_S) as stranger:
                found["stranger"] = stranger.get("/v1/models").status_code
        except httpx.HTTPError as problem:
            found["problem"] = _words(problem)
    return Answers(**found)


def _key(host: ComposeHost) -> str:
    """The operator's key; empty without one, and with a file that cannot be read: then `secrets` says it."""
    try:
        return read_env(host.rendered / ENV_FILE).get(MASTER_KEY, "")
    except CorralError:
        return ""


def _questions(host: ComposeHost, operator: httpx.Client) -> Iterator[tuple[str, float | str]]:
    """Every pool that can be asked, with the seconds until its short answer, or its refusal."""
    for pool, kind in {item.pool: item.kind for item in host.plan.contributions.backends}.items():
        if kind not in QUESTIONS:
            continue
        place, question = QUESTIONS[kind]
        began = time.monotonic()
        try:
            answer = operator.post(place, json={"model": pool, **question}, timeout=QUESTION_LIMIT_S)
        except httpx.HTTPError as problem:
            yield pool, f"gave no answer: {_words(problem)}"
            continue
        refusal = f"answered {answer.status_code}: {' '.join(answer.text.split())[:200]}"
        yield pool, time.monotonic() - began if answer.status_code == OK else refusal


def _words(problem: Exception) -> str:
    return str(problem) or type(problem).__name__


# --- the gateway -----------------------------------------------------------------------------------------------------


def gateway_answers(case: Case) -> Findings:
    """The gateway answers at its published address."""
    answers = case.answers
    if answers is None or _of_role(case, "balancer")[1]:  # then `balancer-answers` says it
        return
    if answers.problem:
        yield from _no_gateway(case, f"does not answer: {answers.problem}")
    elif answers.unreached:
        yield say("gateway-answers/unreached", problem=answers.unreached)
    elif UPSTREAM_GONE & {answers.stranger, answers.health}:
        yield from _no_gateway(case, "does not answer")
    elif answers.health != OK:
        yield from _no_gateway(case, f"answers {answers.health} to /health/liveliness")


def _of_role(case: Case, role: str) -> tuple[Service | None, Reason | None]:
    """The service of a role on this host, and why it is not well."""
    service = next((item for item in case.services if item.role == role), None)
    return service, case.reason(service) if service else None


def _no_gateway(case: Case, words: str) -> Findings:
    service, why = _of_role(case, "gateway")
    name, address = service.name if service else "gateway", client_address(case.plan)
    yield say(f"gateway-answers/{'unwell' if why else 'well'}", service=name, words=words, why=why, address=address)


def key_accepted(case: Case) -> Findings:
    """The gateway accepts the operator's key, and nothing without a key."""
    answers, secrets = case.answers or Answers(), case.host.rendered / ENV_FILE
    if not _key(case.host):
        yield say("key-accepted/none", file=secrets, key=MASTER_KEY)
    elif answers.models in {*NO_KEY, TEAPOT}:
        yield say("key-accepted/refused", file=secrets, key=MASTER_KEY, status=answers.models)
    elif answers.models not in {0, OK, *UPSTREAM_GONE}:  # of those `gateway-answers` says it
        yield say("key-accepted/other", status=answers.models)
    if answers.models and answers.stranger not in {0, *NO_KEY, *UPSTREAM_GONE}:
        yield say("key-accepted/open", stranger=answers.stranger)


def pools_offered(case: Case) -> Findings:
    """The gateway offers every pool and alias."""
    inventory = case.plan.inventory
    wanted = {*inventory.pools, *(name for name, _, _ in routed_names(inventory))}
    if case.answers and case.answers.models == OK and (missing := sorted(wanted - case.answers.offered)):
        yield say("pools-offered/missing", missing=", ".join(missing))


def balancer_answers(case: Case) -> Findings:
    """The balancer answers and knows every replica."""
    service, why = _of_role(case, "balancer")
    if service is None or balancer_of(case.plan, case.host.out) is None:
        return
    behind = [item for item in case.plan.contributions.backends if item.protocol != "cloud"]
    unknown = [item.name for item in behind if item.name not in case.servers]
    if why is not None or unknown:
        text = "unwell" if why else "silent" if len(unknown) == len(behind) else "older"
        yield say(f"balancer-answers/{text}", service=service.name, why=why, unknown=", ".join(unknown))


# --- replicas --------------------------------------------------------------------------------------------------------


def _down(case: Case) -> Iterator[tuple[Backend, Server]]:
    """What the balancer gives no work, with what it says of it."""
    for backend in case.plan.contributions.backends:
        server = case.servers.get(backend.name)
        if server is not None and server.state != "UP":
            yield backend, server


def replicas_up(case: Case) -> Findings:
    """The balancer reaches every replica on this host, and gives it work."""
    for backend, server in _down(case):
        hop = f"{backend.pool}: HAProxy → {backend.name}"
        if backend.endpoint.host != case.name or not backend.is_ours:
            continue
        if server.state in ("MAINT", "DRAIN", "NOLB"):
            yield say("replicas-up/out", hop=hop, state=server.state.lower(), name=backend.name)
            continue
        gateway = case.plan.inventory.gateway
        place = case.plan.site.address(backend.endpoint, gateway.host)
        why = case.reason(next(item for item in case.services if item.name == backend.endpoint.service))
        words = f"{check_words(server.check, server.code)} on {place}"
        text = "unwell" if why else "here" if gateway.host == case.name else "network"
        values = {"hop": hop, "words": words, "why": why, "host": case.name}
        yield say(f"replicas-up/{text}", port=gateway.edge_port, gateway=gateway.host, **values)


def pools_alive(case: Case) -> Findings:
    """Every pool has a replica that gets work."""
    down = {backend.name for backend, _ in _down(case)}
    for name in case.plan.inventory.pools:
        backends = {item.name for item in case.plan.contributions.backends if item.pool == name}
        if backends and backends <= down:
            yield say("pools-alive/none", pool=name)


def nodes(case: Case) -> Findings:
    """Every node that pools use answers the balancer."""
    for backend, server in _down(case):
        if not backend.is_ours:
            place = case.plan.site.address(backend.endpoint, case.plan.inventory.gateway.host)
            words = check_words(server.check, server.code)
            text = "away" if backend.endpoint.service else "down"
            yield say(f"nodes/{text}", pool=backend.pool, name=backend.name, words=words, place=place)


def answers(case: Case) -> Findings:
    """With --ask: every chat and embedding pool answers a short question through the gateway."""
    for pool, found in case.answers.pools.items() if case.answers else ():
        yield say(f"answers/{'refused' if isinstance(found, str) else 'seconds'}", pool=pool, found=found)


def summary(case: Case) -> str:
    """What was found, when all is well."""
    own = [item for item in case.plan.contributions.backends if item.is_ours and item.endpoint.host == case.name]
    up = sum(case.servers[item.name].state == "UP" for item in own if item.name in case.servers)
    has_balancer = balancer_of(case.plan, case.host.out) is not None
    replicas = f"HAProxy → {up} of {len(own)} replicas" if has_balancer else f"{len(own)} replicas"
    if case.has("gateway"):
        return f"clients → {client_address(case.plan)} → {replicas}"
    return replicas if own else "nothing on the way of requests"
