"""LiteLLM's own interface for keys, spoken with the master key from the host's secrets."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from corral.build import Plan
from corral.components.litellm import MASTER_KEY
from corral.errors import CorralError, on_one_line
from corral.gateway.fronts import gateway_publish_address
from corral.gateway.keys import Found, found_of
from corral.plan.site import bracketed
from corral.render.secrets import ENV_FILE, read_env
from corral.runtime.hosts import ComposeHost

LIMIT_S = 60.0
PAGE = 100
UNAUTHORIZED, NOT_FOUND, FIRST_ERROR = 401, 404, 400
MOST_TOLD = 300


class GatewayKeys:
    """The keys of one gateway. Every method raises CorralError with words that say what to do."""

    def __init__(self, client: httpx.Client, place: str, secrets: Path) -> None:
        self._client = client
        self._place = place
        self._secrets = secrets

    def all(self) -> list[Found]:
        """Every key that LiteLLM has."""
        found: list[Found] = []
        page = 1
        while True:
            wanted = {"return_full_object": "true", "size": PAGE, "page": page}
            answer = self._ask("GET", "/key/list", params=wanted)
            found += [found_of(row) for row in answer.get("keys", [])]
            if page >= int(answer.get("total_pages") or 1):
                return found
            page += 1

    def create(self, value: str, body: Mapping[str, Any]) -> None:
        """Makes `value` a key with these settings."""
        given = {name: item for name, item in body.items() if item is not None}
        self._ask("POST", "/key/generate", json={**given, "key": value})

    def update(self, token: str, body: Mapping[str, Any]) -> None:
        """Changes settings of a key; None takes a limit away."""
        self._ask("POST", "/key/update", json={**body, "key": token})

    def delete(self, tokens: Iterable[str]) -> None:
        """Revokes keys; those that are gone already are no error."""
        for token in tokens:
            self._ask("POST", "/key/delete", json={"keys": [token]}, missing_is_fine=True)

    def _ask(self, method: str, path: str, *, missing_is_fine: bool = False, **given: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **given)
        except httpx.HTTPError as error:
            words = on_one_line(str(error)) or type(error).__name__
            raise CorralError(
                f"the gateway does not answer at {self._place} ({words}); start it with ./generate.py up, "
                "or see ./generate.py doctor"
            ) from None
        if missing_is_fine and answer.status_code == NOT_FOUND:
            return {}
        if answer.status_code >= FIRST_ERROR:
            raise CorralError(self._refusal(answer))
        found: dict[str, Any] = answer.json()
        return found

    def _refusal(self, answer: httpx.Response) -> str:
        words = _words(answer)
        if answer.status_code == UNAUTHORIZED:
            return (
                f"the gateway refuses {MASTER_KEY} of {self._secrets}: it was started with another value; "
                "./generate.py secrets init, then ./generate.py restart litellm"
            )
        if "db" in words.lower().split() or "database" in words.lower():
            return f"the gateway at {self._place} has lost its database: {words}; see ./generate.py doctor"
        return f"the gateway at {self._place} answers {answer.status_code}: {words}"


def _words(answer: httpx.Response) -> str:
    """What LiteLLM says is wrong."""
    try:
        data = answer.json()
    except ValueError:
        return on_one_line(answer.text)[:MOST_TOLD]
    found = data.get("error", data.get("detail", data)) if isinstance(data, dict) else data
    message = found.get("message", found) if isinstance(found, dict) else found
    return on_one_line(str(message))[:MOST_TOLD]


@contextmanager
def connected(plan: Plan, out: Path) -> Iterator[GatewayKeys]:
    """The keys of the plan's gateway, on another machine over ssh; raises CorralError where there can be none."""
    name = plan.inventory.gateway.host
    if not plan.inventory.gateway.database:
        raise CorralError(
            "this site has no database, so there is only the master key; set gateway.database: true, render, up"
        )
    secrets = out / name / ENV_FILE
    key = read_env(secrets).get(MASTER_KEY, "")
    if not key:
        raise CorralError(f"{secrets} has no {MASTER_KEY}; run: ./generate.py secrets init")
    headers = {"Authorization": f"Bearer {key}"}
    with (
        reached(plan, out) as place,
        httpx.Client(base_url=place, headers=headers, timeout=LIMIT_S, trust_env=False) as client,
    ):
        yield GatewayKeys(client, gateway_address(plan), secrets)


@contextmanager
def reached(plan: Plan, out: Path) -> Iterator[str]:
    """Base URL at which this machine may use the master key: keys never cross a network in clear.

    Raises:
        CorralError: ssh to the gateway's host does not connect.
    """
    address, port = _admin_place(plan)
    with ComposeHost(plan, plan.inventory.gateway.host, out).forwarded(port, address) as place:
        yield place


def gateway_address(plan: Plan) -> str:
    """Where the operator finds all of LiteLLM, without `/v1`; behind HAProxy a port of the host's own loopback."""
    address, port = _admin_place(plan)
    return f"http://{bracketed(address)}:{port}"


def _admin_place(plan: Plan) -> tuple[str, int]:
    """Address and port of that on the gateway's host."""
    gateway = plan.inventory.gateway
    if plan.contributions.doors:
        return "127.0.0.1", gateway.admin_port
    return gateway_publish_address(plan.site), gateway.port


def client_address(plan: Plan) -> str:
    """Where clients inside the farm find the gateway; without `/v1`."""
    gateway = plan.inventory.gateway
    return f"http://{bracketed(gateway_publish_address(plan.site))}:{gateway.port}"


def is_out_of_reach(plan: Plan) -> bool:
    """Whether clients find the gateway on a far host's loopback address only."""
    host = plan.inventory.hosts[plan.inventory.gateway.host]
    return host.ssh is not None and ipaddress.ip_address(gateway_publish_address(plan.site)).is_loopback
