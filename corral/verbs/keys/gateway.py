"""LiteLLM's API for keys, called with the master key from the host's secrets."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx

from corral.build import Plan
from corral.components.litellm import MASTER_KEY
from corral.errors import CorralError, on_one_line
from corral.gateway.frontends import gateway_publish_address
from corral.gateway.keys import StoredKey, stored_key
from corral.plan.site import bracketed, swarm_name
from corral.render.secrets import ENV_FILE, read_env
from corral.render.swarm import stack_name
from corral.runtime.haproxy import Balancer, running_balancer
from corral.runtime.hosts import ComposeHost

LIMIT_S = 60.0
# Prints the address of a service's container on the bridge through which Swarm publishes ports.
ON_BRIDGE = """
id=$(docker ps --quiet --no-trunc --filter "label=com.docker.swarm.service.name=$0" | head -n 1)
docker network inspect docker_gwbridge --format '{{range $id, $it := .Containers}}{{$id}} {{$it.IPv4Address}}
{{end}}' | sed -n "s/^${id:-none} //p"
"""
PAGE = 100
MAX_SHOWN = 300
# Rows of LiteLLM's daily sums that are asked for at a time, and the sums by the names that `keys spend` has for them.
ROWS = 1000
USAGE = {"requests": "api_requests", "input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}


class GatewayKeys:
    """The keys of one gateway. Every method raises CorralError with a message that says what to do."""

    def __init__(self, client: httpx.Client, place: str, secrets: Path, balancer: Balancer | None = None) -> None:
        self._client = client
        self._place = place
        self._secrets = secrets
        self._balancer = balancer

    def all(self) -> list[StoredKey]:
        """Every key that LiteLLM has."""
        found: list[StoredKey] = []
        page = last = 1
        while page <= last:
            wanted = {"return_full_object": "true", "size": PAGE, "page": page}
            answer = self._ask("GET", "/key/list", params=wanted)
            found += map(stored_key, answer.get("keys", []))
            page, last = page + 1, int(answer.get("total_pages") or 1)
        return found

    def usage(self, first: date, last: date) -> dict[str, dict[str, int]]:
        """Requests and tokens of every key from the first to the last day (UTC), by the key's hash."""
        found: dict[str, dict[str, int]] = {}
        page, is_last = 1, False
        while not is_last:
            wanted = {"start_date": str(first), "end_date": str(last), "page": page, "page_size": ROWS}
            answer = self._ask("GET", "/user/daily/activity", params=wanted)
            for day in answer["results"]:
                for token, item in day["breakdown"]["api_keys"].items():
                    sums = found.setdefault(token, dict.fromkeys(USAGE, 0))
                    sums |= {name: sums[name] + item["metrics"][metric] for name, metric in USAGE.items()}
            page, is_last = page + 1, not answer["metadata"].get("has_more")
        return found

    def teams(self) -> list[dict[str, Any]]:
        """Every team that LiteLLM has, in its terms."""
        return list(self._ask("GET", "/team/list"))

    def set_team(self, token: str, body: Mapping[str, Any], *, is_new: bool) -> None:
        """Makes a team, or changes its settings; None removes a limit."""
        given = {name: item for name, item in body.items() if item is not None or not is_new}
        self._ask("POST", "/team/new" if is_new else "/team/update", json={**given, "team_id": token})

    def delete_team(self, token: str) -> None:
        """Removes a team, and with it every key that is still in it."""
        self._ask("POST", "/team/delete", json={"team_ids": [token]})

    def create(self, value: str, body: Mapping[str, Any]) -> None:
        """Makes `value` a key with these settings."""
        given = {name: item for name, item in body.items() if item is not None}
        self._ask("POST", "/key/generate", json={**given, "key": value})

    def update(self, token: str, body: Mapping[str, Any]) -> None:
        """Changes settings of a key; None removes a limit."""
        self._ask("POST", "/key/update", json={**body, "key": token})
        self.forget(token)

    def delete(self, token: str) -> None:
        """Revokes a key; one that does not exist is no error."""
        self._ask("POST", "/key/delete", json={"keys": [token]}, missing_is_fine=True)
        self.forget(token)

    def forget(self, token: str) -> None:
        """Ends what the balancer lets the key do without asking LiteLLM, also while LiteLLM does not answer."""
        if self._balancer is not None:
            self._balancer.forget(token)

    def _ask(self, method: str, path: str, *, missing_is_fine: bool = False, **given: Any) -> Any:
        try:
            answer = self._client.request(method, path, **given)
        except httpx.HTTPError as error:
            words = on_one_line(str(error)) or type(error).__name__
            raise CorralError(
                f"the gateway does not answer at {self._place} ({words}); start it with ./generate.py up, "
                "or see ./generate.py doctor"
            ) from None
        if missing_is_fine and answer.status_code == httpx.codes.NOT_FOUND:
            return {}
        if answer.is_error:
            raise CorralError(self._refusal(answer))
        found: dict[str, Any] = answer.json()
        return found

    def _refusal(self, answer: httpx.Response) -> str:
        words = _message(answer)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return (
                f"the gateway refuses {MASTER_KEY} of {self._secrets}: it was started with another value; "
                "./generate.py secrets init, then ./generate.py restart litellm"
            )
        if "db" in words.lower().split() or "database" in words.lower():
            return f"the gateway at {self._place} has lost its database: {words}; see ./generate.py doctor"
        return f"the gateway at {self._place} answers {answer.status_code}: {words}"


def _message(answer: httpx.Response) -> str:
    """LiteLLM's error message."""
    try:
        found = answer.json()
    except ValueError:
        found = answer.text
    for name in ("error", "detail", "message"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return on_one_line(str(found))[:MAX_SHOWN]


@contextmanager
def connected(plan: Plan, out: Path) -> Iterator[GatewayKeys]:
    """The keys of the plan's gateway, on another machine over ssh; raises CorralError for a site without database."""
    name = plan.inventory.gateway.host
    if not plan.inventory.gateway.database:
        raise CorralError(
            "this site has no database, so there is only the master key; set gateway.database: true, render, up"
        )
    secrets = out / name / ENV_FILE
    key = read_env(secrets).get(MASTER_KEY, "")
    if not key:
        raise CorralError(f"{secrets} has no {MASTER_KEY}; run: ./generate.py secrets init")
    with reached(plan, out) as place, client(place, key, LIMIT_S) as link:
        balancer = running_balancer(plan, out) if plan.inventory.gateway.fast_lane else None
        yield GatewayKeys(link, gateway_address(plan), secrets, balancer)


def client(base_url: str, key: str, limit_s: float | None) -> httpx.Client:
    """A client of the gateway, with a key unless that is empty; proxies of the environment are not asked."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=base_url, headers=headers, timeout=limit_s, trust_env=False)


@contextmanager
def reached(plan: Plan, out: Path) -> Iterator[str]:
    """Base URL at which this machine may use the master key: over ssh, as keys never cross a network in clear text.

    Raises:
        CorralError: ssh to the gateway's host does not connect.
    """
    address, port = _admin_place(plan)
    host = ComposeHost(plan, plan.inventory.gateway.host, out)
    if plan.site.is_swarm and plan.contributions.doors:
        address = _address_in_swarm(plan, host)
    with host.forwarded(port, address) as place:
        yield place


def _address_in_swarm(plan: Plan, host: ComposeHost) -> str:
    """HAProxy's address on the bridge of its node, which the node itself reaches; Swarm publishes none on loopback."""
    name = f"{stack_name(plan)}_{swarm_name(host.name, plan.contributions.doors[0].endpoint.service)}"
    done = host.run(["sh", "-c", ON_BRIDGE, name], check=False)
    if not (found := done.out.strip().partition("/")[0]):
        raise CorralError(f"{host.name}: no task of {name} runs there; start it with ./generate.py up")
    return found


def gateway_address(plan: Plan) -> str:
    """Address of LiteLLM's whole API for the operator, without `/v1`; behind HAProxy a loopback port of the host."""
    address, port = _admin_place(plan)
    return f"http://{bracketed(address)}:{port}"


def _admin_place(plan: Plan) -> tuple[str, int]:
    """The same as address and port on the gateway's host."""
    gateway = plan.inventory.gateway
    if plan.contributions.doors:
        return "127.0.0.1", gateway.admin_port
    return gateway_publish_address(plan.site), gateway.port


def client_address(plan: Plan) -> str:
    """Address of the gateway for clients inside the farm, without `/v1`."""
    gateway = plan.inventory.gateway
    return f"http://{bracketed(gateway_publish_address(plan.site))}:{gateway.port}"


def is_out_of_reach(plan: Plan) -> bool:
    """Whether the gateway listens on the loopback address of another machine only."""
    host = plan.inventory.hosts[plan.inventory.gateway.host]
    return host.ssh is not None and ipaddress.ip_address(gateway_publish_address(plan.site)).is_loopback
