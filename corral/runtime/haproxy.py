"""HAProxy's runtime API, of the balancer and of the hosts' edges.

It says who is in rotation and how busy, takes servers out and puts them back, and reloads without a gap.

In a container the API listens on the container's own loopback address; it is asked through bash, which the image has
(socat it has not). On a `local` host it is a Unix socket in the host's folder.
"""

from __future__ import annotations

import csv
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from corral.build import Plan
from corral.components import edge, haproxy
from corral.contributions import Backend
from corral.errors import CorralError
from corral.plan.site import bracketed, swarm_name
from corral.render.swarm import stack_name
from corral.runtime import supervisor
from corral.runtime.board import Board, wait_until
from corral.runtime.hosts import ComposeHost

ANSWER_LIMIT_S = 15
RELOAD_LIMIT_S = 30
# Bits of `srv_admin_state`: taken out, or drained, by command.
FORCED_OUT = 0x01 | 0x08
# Commands whose answers `parse_servers` reads.
STATES = ("show stat", "show servers state")
ASK = r'exec 3<>/dev/tcp/127.0.0.1/"$1" && printf "%s\n" "$2" >&3 && cat <&3'
# Runs a command in the container of a service of Swarm's on this node.
IN_TASK = 'exec docker exec "$(docker ps --quiet --filter "label=com.docker.swarm.service.name=$0" | head -n 1)" "$@"'
# Begins the table of each of these commands.
STATS, STATE = "# pxname", "# be_id"
_DIGEST = re.compile(r"^\s*description:? ([0-9a-f]{16})\b", re.MULTILINE)


class BalancerError(CorralError):
    """The balancer does not answer, or refused what it was told."""


@dataclass(frozen=True, slots=True)
class Server:
    """A replica as HAProxy sees it at this moment."""

    group: str
    name: str
    # HAProxy's words, such as `UP`, `DOWN 1/3`, `MAINT (resolution)`.
    status: str
    in_flight: int
    # Requests that wait for this server alone.
    waiting: int
    address: str
    port: int
    # Whether it was taken out of rotation by command.
    is_out: bool
    # HAProxy's word for the last check, such as `L4CON`.
    check: str = ""
    # HTTP status of the last check, 0 without one.
    code: int = 0
    # Seconds since it went up or down.
    changed_s: int = 0

    @property
    def state(self) -> str:
        """`UP`, `DOWN`, `MAINT`, `DRAIN` or `NOLB`."""
        return "UP" if self.status == "no check" else self.status.partition(" ")[0]

    @property
    def is_usable(self) -> bool:
        """Whether it gets requests."""
        return self.status.startswith("UP") and not self.is_out


@dataclass(frozen=True, slots=True)
class Balancer:
    """The running balancer of a plan."""

    plan: Plan
    host: ComposeHost
    # The component whose HAProxy it is: the balancer, or a host's edge, which has no replicas to balance.
    component: str = haproxy.COMPONENT

    @property
    def container(self) -> str:
        """Name of its container."""
        return f"{self.host.name}-{self.component}"

    def ask(self, *commands: str) -> str:
        """The answer to commands of the runtime API; raises BalancerError when there is none."""
        if self.plan.site.is_local(self.host.name):
            return self._ask_socket("; ".join(commands))
        done = self.host.run(self.words(*commands), check=False)
        if done.code != 0:
            raise BalancerError(f"{self.host.name}: {self.component} does not answer: {done.words}")
        return done.out

    def words(self, *commands: str) -> list[str]:
        """The command that asks the runtime API of a container on its host."""
        port = (edge if self.component == edge.COMPONENT else haproxy).control_port(self.plan.site)
        inside = ["timeout", str(ANSWER_LIMIT_S), "bash", "-c", ASK, "-", str(port), "; ".join(commands)]
        if self.plan.site.is_swarm:
            name = f"{stack_name(self.plan)}_{swarm_name(self.host.name, self.component)}"
            return ["sh", "-c", IN_TASK, name, *inside]
        return ["docker", "exec", self.container, *inside]

    def _ask_socket(self, line: str) -> str:
        path = self.host.rendered / haproxy.LOCAL_SOCKET.removeprefix("unix@").partition(" ")[0]
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(ANSWER_LIMIT_S)
                link.connect(str(path))
                link.sendall(f"{line}\n".encode())
                return b"".join(iter(lambda: link.recv(65536), b"")).decode(errors="replace")
        except OSError as error:
            raise BalancerError(f"{self.host.name}: the balancer does not answer: {error.strerror or error}") from None

    def is_running(self) -> bool:
        """Whether it answers."""
        try:
            self.ask("show version")
        except CorralError:
            return False
        return True

    def servers(self) -> dict[str, Server]:
        """Every replica by the name that the balancer knows it by (the container's)."""
        return parse_servers(self.ask(*STATES))

    def workers(self, service: str) -> list[Server]:
        """A worker of LiteLLM, once for each backend in which the clients' frontends have it."""
        found = _parsed(self.ask(*STATES))
        return [item for item in found if item.name == service and item.group.startswith(haproxy.BEHIND_THE_DOOR)]

    def command(self, line: str) -> None:
        """Says something that has no answer; raises BalancerError when it is refused."""
        answer = self.ask(line).strip()
        if answer:
            raise BalancerError(f"{self.host.name}: the balancer refused `{line}`: {answer}")

    def take_out(self, server: Server) -> None:
        """From now on the server gets no new request; those that it has go on."""
        self.command(f"set server {server.group}/{server.name} state maint")

    def put_back(self, server: Server) -> None:
        """The server gets requests again as soon as it passes a health check."""
        self.command(f"set server {server.group}/{server.name} state ready")

    def move(self, server: Server, address: str, port: int) -> None:
        """The server is elsewhere from now on."""
        self.ask(f"set server {server.group}/{server.name} addr {address} port {port}")

    def hold(self, group: str, seconds: int) -> bool:
        """Lets new requests to a pool wait, for so long at most; False when this HAProxy cannot (it has no Lua)."""
        return self.ask(f"corral hold {group} {seconds}").strip() == "held"

    def release(self, group: str) -> None:
        """Lets the waiting requests of a pool go on."""
        self.ask(f"corral release {group}")

    def forget(self, token: str) -> None:
        """Ends the permits of a key, named by its hash: its next request is LiteLLM's to judge."""
        if (answer := self.ask(f"corral forget {token}").strip()) != "forgotten":
            raise BalancerError(f"{self.host.name}: the balancer may let this key pass for some seconds more: {answer}")

    def put_all_back(self) -> list[str]:
        """Undoes what a killed run left: every server in rotation, no request held; names of those that were out."""
        servers = _parsed(self.ask(*STATES))
        out = [server for server in servers if server.is_out]
        for server in out:
            self.put_back(server)
        self.ask(*sorted({f"corral release {server.group}" for server in servers if _is_replica(server)}))
        return [server.name for server in out]

    # --- configuration ---

    def loaded(self) -> str:
        """Digest of the configuration that the running HAProxy has read."""
        return _digest_in(self.ask("show info"))

    def rendered(self) -> str:
        """Digest of the configuration that is rendered."""
        return config_digest(self.host.rendered / self.component / "haproxy.cfg")

    def reload(self) -> None:
        """Makes HAProxy read its files anew; no request is lost, and servers keep their states.

        Raises:
            BalancerError: HAProxy refuses the new configuration, and goes on with the old one.
        """
        wanted, is_local = self.rendered(), self.plan.site.is_local(self.host.name)
        done = self.host.run(self._local_check() if is_local else self._check(), check=False)
        if done.code != 0:
            raise BalancerError(
                f"{self.host.name}: HAProxy refuses the new configuration; the old one stays: {done.words}"
            )
        if is_local:
            self.keep_figures()
            supervisor.asked(Path(self.host.folder), "signalProcess", self.component, "USR2")
        else:
            if self.component == haproxy.COMPONENT:
                self._store_state()
            self.host.run(["docker", "kill", "--signal", "SIGUSR2", self.container])
        if not wait_until(lambda: self._has_loaded(wanted), RELOAD_LIMIT_S):
            last = self.host.last_lines(self.container, 8)
            raise BalancerError(f"{self.host.name}: HAProxy did not take its new configuration: {last}")

    def _check(self) -> list[str]:
        return ["docker", "exec", self.container, "haproxy", "-c", "-f", haproxy.CONFIG]

    def _local_check(self) -> list[str]:
        config = shlex.quote(f"{self.component}/haproxy.cfg")
        path, folder = shlex.quote(supervisor.search_path()), shlex.quote(self.host.folder)
        return ["sh", "-c", f"cd {folder} && PATH={path} haproxy -c -f {config}"]

    def _has_loaded(self, digest: str) -> bool:
        try:
            return self.loaded() == digest
        except BalancerError:  # its workers are changing places
            return False

    def keep_figures(self) -> None:
        """Lets the next worker go on counting requests and errors where this one is, for `/health`."""
        self.ask("corral keep")

    def _store_state(self) -> None:
        """Keeps who is up for the next worker; servers that moved are left out, it has to look at them anew."""
        self.keep_figures()
        site = self.plan.site
        places = {item.name: site.address(item.endpoint, self.host.name) for item in self.plan.contributions.backends}
        state = keep_known(self.ask("show servers state"), places)
        script = f"cat >{haproxy.STATE_FILE}"
        self.host.run(["docker", "exec", "--interactive", self.container, "bash", "-c", script], given=state.encode())


def balancer_of(plan: Plan, out: Path) -> Balancer | None:
    """The plan's balancer, running or not; None when the plan has none, or only HAProxy's frontends for clients."""
    has_haproxy = any(service.component == haproxy.COMPONENT for service in plan.contributions.services)
    if not has_haproxy or plan.inventory.gateway.balancing == "direct":
        return None
    return Balancer(plan, ComposeHost(plan, plan.inventory.gateway.host, out))


def running_balancer(plan: Plan, out: Path, board: Board | None = None) -> Balancer | None:
    """The plan's balancer; None also when it does not run, which the board says."""
    balancer = balancer_of(plan, out)
    if balancer is None or balancer.is_running():
        return balancer
    if board is not None:
        board.say("the balancer does not run, so nothing is drained", "yellow")
    return None


def edge_of(host: ComposeHost) -> Balancer | None:
    """The HAProxy that is a host's edge, running or not; None where no other host calls this one."""
    if not any(service.component == edge.COMPONENT for service in host.services):
        return None
    return Balancer(host.plan, host, edge.COMPONENT)


def config_digest(config: Path) -> str:
    """The digest that a rendered configuration has in it; empty when there is none."""
    try:
        return _digest_in(config.read_text(encoding="utf-8"))
    except OSError:
        return ""


def _digest_in(text: str) -> str:
    found = _DIGEST.search(text)
    return found[1] if found else ""


def backends_of(plan: Plan, host: str, service: str) -> list[Backend]:
    """What the balancer knows a service as: one for each pool that it serves, none where it sends no requests."""
    backends = [item for item in plan.contributions.backends if item.is_ours]
    return [item for item in backends if (item.endpoint.host, item.endpoint.service) == (host, service)]


def parse_servers(text: str) -> dict[str, Server]:
    """Replicas by name, from the answers to `show stat` and `show servers state`."""
    return {item.name: item for item in _parsed(text) if _is_replica(item)}


def _is_replica(server: Server) -> bool:
    return not server.group[:1].isupper()  # no pool's name begins so


def _parsed(text: str) -> list[Server]:
    table, _, state = text.partition(STATE)
    rows = csv.DictReader((STATS + table.partition(STATS)[2]).splitlines())
    stats = {(row[STATS], row.get("svname")): row for row in rows}
    return [_server(row, stats.get((row["be_name"], row["srv_name"]), {})) for _, row in _rows(STATE + state) if row]


def _rows(state: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every line of `show servers state`, with its fields if it is about a server."""
    names: list[str] = []
    for line in state.splitlines():
        if line.startswith(STATE):
            names = line.removeprefix("# ").split()
        is_header = not names or line.startswith("#") or not line.strip()
        yield line, {} if is_header else dict(zip(names, line.split(), strict=False))


def _server(state: Mapping[str, str], stats: Mapping[str, str]) -> Server:
    return Server(
        group=state["be_name"],
        name=state["srv_name"],
        status=stats.get("status", ""),
        in_flight=int(stats.get("scur") or 0),
        waiting=int(stats.get("qcur") or 0),
        address="" if state["srv_addr"] == "-" else state["srv_addr"],
        port=int(state["srv_port"]),
        is_out=bool(int(state["srv_admin_state"]) & FORCED_OUT),
        check=stats.get("check_status", "").removeprefix("* "),  # a check is under way
        code=int(stats.get("check_code") or 0),
        changed_s=int(stats.get("lastchg") or 0),
    )


def keep_known(state: str, places: Mapping[str, str]) -> str:
    """`show servers state` with only those servers that are still at their places, `address:port` by name."""
    kept = [line for line, row in _rows(state) if not row or places.get(row["srv_name"]) == _place(row)]
    return "\n".join(kept) + "\n"


def _place(state: Mapping[str, str]) -> str:
    """Where a server is by its configuration: its name if it has one, which the resolver turns into an address."""
    name = state["srv_addr"] if state["srv_fqdn"] == "-" else state["srv_fqdn"]
    return f"{bracketed(name)}:{state['srv_port']}"
