"""The security baseline in a real engine: what containers may do, whom they reach, and where secrets do not turn up."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.checks.policy import check_project, exceptions_of
from corral.render.compose import project_name
from tests.compose.images.build import ensure_images
from tests.compose.project import (
    PREFIX,
    Client,
    Project,
    docker,
    docker_logs,
    files_with,
    make_models,
    reached_from,
    render_site,
)
from tests.processes.helpers import Process, wait_until
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine", "network-namespaces")

HOST = "pa"
MARKER = "m4rk3r"
NAMESPACE = "corral-outside"
# Addresses for documentation: this machine on a cable to another one, which is a network namespace.
HERE, OUTSIDE = "203.0.113.201", "203.0.113.202"
GATEWAY_PORT, PROMETHEUS_PORT, OUTSIDE_PORT, GRAFANA_PORT = 22000, 22001, 22002, 22003
ADMIN_PORT = 22004
NOBODY_ELSE = (
    "litellm", "prometheus", "chat-1", "postgres", "postgres-exporter", "valkey", "valkey-exporter", "node-exporter",
    "grafana",
)  # fmt: skip
ANSWER_S = 3

SITE = f"""\
schema_version: 1
name: {PREFIX}security
hosts:
  {HOST}: {{address: {HERE}}}
nodes:
  far: {{url: "http://{OUTSIDE}:{OUTSIDE_PORT}", model: far, api_key: FAR_API_KEY}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: {HOST}}}, engine: {{threads: 1}}}}
  far: {{on: {{node: far}}}}
gateway: {{host: {HOST}, port: {GATEWAY_PORT}, admin_port: {ADMIN_PORT}}}
monitoring: {{host: {HOST}, port: {PROMETHEUS_PORT}, grafana_port: {GRAFANA_PORT}}}
"""

CARD_SITE = f"""\
schema_version: 1
name: {PREFIX}cards
hosts:
  {HOST}g: {{address: 127.0.0.1, gpus: {{card: p104-100, count: 1}}}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: {HOST}g, gpus: 1}}, ports: 22010, engine: {{threads: 1}}}}
gateway: {{host: {HOST}g, port: 22011, balancing: direct, database: false, cache: false}}
"""

CALL = "import socket; socket.create_connection(('{address}', {port}), {limit}); print('reached')"


@dataclass(frozen=True, slots=True)
class Outside:
    """Another machine on this one's network that knows nothing of Docker's networks."""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command that ran there."""
        command = ["ip", "netns", "exec", NAMESPACE, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)


def remove_outside() -> None:
    for words in (["netns", "del", NAMESPACE], ["link", "del", "corral-sec0"]):
        subprocess.run(["ip", *words], check=False, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def outside(engine: None) -> Iterator[Outside]:
    remove_outside()  # of a run that was killed
    try:
        ip("netns", "add", NAMESPACE)
        ip("link", "add", "corral-sec0", "type", "veth", "peer", "name", "corral-sec1", "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/30", "dev", "corral-sec0")
        ip("link", "set", "corral-sec0", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{OUTSIDE}/30", "dev", "corral-sec1")
        ip("-n", NAMESPACE, "link", "set", "corral-sec1", "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield Outside()
    finally:
        remove_outside()


@pytest.fixture(scope="module")
def far_server(outside: Outside, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Something that answers on the other machine: a plain web server is enough to be reached."""
    folder = tmp_path_factory.mktemp("far")
    words = ["ip", "netns", "exec", NAMESPACE, "python3", "-m", "http.server", str(OUTSIDE_PORT), "--bind", OUTSIDE]
    with Process([*words, "--directory", str(folder)], folder.with_suffix(".log")):
        wait_until(lambda: _answers(f"http://{OUTSIDE}:{OUTSIDE_PORT}/"), 20, "the web server on the other machine")
        yield


@pytest.fixture(scope="module")
def site(far_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    out = tmp_path_factory.mktemp("security")
    inventory = out / "site.yaml"
    inventory.write_text(SITE)
    plan = render_site(inventory, out)
    names = [secret.name for secret in plan.secrets_of(HOST) if not secret.template]
    env = "".join(f"{name}={'sk-' if 'LITELLM' in name else ''}{MARKER}-{name.lower()}-{MARKER}\n" for name in names)
    (out / HOST / ".env").write_text(env)
    render_site(inventory, out)
    ensure_images([plan])
    make_models(plan, HOST, out / HOST / "models")
    with Project(plan, HOST, out, project_name(plan, HOST)) as project:
        project.up()
        yield project


@pytest.fixture
def client(site: Project) -> Client:
    return Client(f"http://{HERE}:{GATEWAY_PORT}", site.secrets["LITELLM_MASTER_KEY"])


def _answers(url: str) -> bool:
    try:
        httpx.get(url, timeout=ANSWER_S, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


# --- the baseline, as the engine and the kernel have it --------------------------------------------------------------


def test_what_compose_runs_keeps_every_rule(site: Project) -> None:
    project = json.loads(site.compose("config", "--no-interpolate", "--format", "json"))
    found = check_project(project, HERE, exceptions_of(site.plan, HOST))
    assert [str(finding) for finding in found] == []


def test_the_kernel_holds_every_container_to_it(site: Project) -> None:
    for name in sorted(site.objects("container")):
        facts = site.inspect(name)
        status = _status_of_children(facts["State"]["Pid"])
        assert status, name
        for fields in status:
            assert 0 not in {int(user) for user in fields["Uid"].split()}, name
            assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0, name
            assert fields["NoNewPrivs"] == "1", name
            assert fields["Seccomp"] == "2", name
        assert facts["HostConfig"]["ReadonlyRootfs"] is True, name
        assert facts["HostConfig"]["PidMode"] == "", name
        assert facts["HostConfig"]["CpuShares"] > 0, name


def _status_of_children(pid: int) -> list[dict[str, str]]:
    """What the kernel says of a container's first process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    texts = [Path(f"/proc/{number}/status").read_text() for number in (str(pid), *children)]
    return [dict(_field(line) for line in text.splitlines()) for text in texts]


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name, value.strip()


def test_nothing_can_be_written_but_what_is_meant_to(site: Project) -> None:
    for place, is_writable in (("/app", False), ("/etc", False), ("/tmp", True)):
        script = f"open('{place}/written', 'w').close(); print('written')"
        assert ("written" in _try(site, "litellm", "python3", "-c", script)) == is_writable, place


def _try(site: Project, service: str, *words: str) -> str:
    """What a command in a container prints; nothing when it fails."""
    return site.docker("exec", f"{HOST}-{service}", *words, check=False)


def test_the_gateway_keeps_keys_though_it_is_not_root_and_cannot_write(client: Client) -> None:
    made = client.admin(ADMIN_PORT).send("POST", "/key/generate", {"models": ["chat"]})
    assert made.status_code == 200, made.text
    assert Client(client.base, made.json()["key"]).chat_text() == KNOWN_ANSWER


def test_the_exporter_sees_the_machine_without_joining_its_processes(site: Project) -> None:
    figures = _try(site, "node-exporter", "wget", "-q", "-O", "-", "http://127.0.0.1:9100/metrics")
    values = dict(line.rsplit(" ", 1) for line in figures.splitlines() if not line.startswith("#"))
    total_kib = int(_field(Path("/proc/meminfo").read_text().splitlines()[0])[1].split()[0])
    assert float(values["node_memory_MemTotal_bytes"]) == total_kib * 1024
    assert any(name.startswith("node_filesystem_size_bytes") and 'mountpoint="/"' in name for name in values)
    processors = {name.split('cpu="')[1].split('"')[0] for name in values if name.startswith("node_cpu_seconds_total")}
    assert len(processors) == len(
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")]
    )


# --- networks --------------------------------------------------------------------------------------------------------


def test_people_come_in_through_the_declared_address(client: Client, outside: Outside) -> None:
    assert client.chat_text() == KNOWN_ANSWER
    url = f"http://{HERE}:{GATEWAY_PORT}/health"
    found = outside.run("python3", "-c", f"import urllib.request as u; print(u.urlopen('{url}', timeout=10).status)")
    assert found.stdout.strip() == "200", found.stderr


def test_nothing_else_is_open_to_the_outside(site: Project, outside: Outside) -> None:
    published = {
        (port["HostIp"], port["HostPort"])
        for name in site.objects("container")
        for ports in (site.inspect(name)["NetworkSettings"]["Ports"] or {}).values()
        for port in ports or []
    }
    inner = {("127.0.0.1", str(PROMETHEUS_PORT)), ("127.0.0.1", str(ADMIN_PORT))}
    assert published == {(HERE, str(GATEWAY_PORT)), (HERE, str(GRAFANA_PORT)), *inner}
    call = CALL.format(address=HERE, port=PROMETHEUS_PORT, limit=ANSWER_S)
    assert "reached" not in outside.run("python3", "-c", call).stdout


def test_the_balancer_reaches_the_node_that_is_its_reason_for_a_way_out(site: Project) -> None:
    assert exceptions_of(site.plan, HOST)["haproxy"].keys() == {"way-out"}
    assert "reached" in _try(
        site, "haproxy", "bash", "-c", f"exec 3<>/dev/tcp/{OUTSIDE}/{OUTSIDE_PORT} && echo reached"
    )


@pytest.mark.parametrize(
    ("service", "words"),
    [
        ("litellm", ("python3", "-c", CALL.format(address=OUTSIDE, port=OUTSIDE_PORT, limit=ANSWER_S))),
        (
            "chat-1",
            (
                "curl",
                "-s",
                "-m",
                str(ANSWER_S),
                "-o",
                "/dev/null",
                "-w",
                "reached",
                f"http://{OUTSIDE}:{OUTSIDE_PORT}/",
            ),
        ),
        (
            "postgres",
            ("timeout", str(ANSWER_S), "bash", "-c", f"exec 3<>/dev/tcp/{OUTSIDE}/{OUTSIDE_PORT} && echo reached"),
        ),
        (
            "valkey",
            ("timeout", str(ANSWER_S), "bash", "-c", f"exec 3<>/dev/tcp/{OUTSIDE}/{OUTSIDE_PORT} && echo reached"),
        ),
        *(
            (name, ("wget", "-q", "-T", str(ANSWER_S), "-O", "-", f"http://{OUTSIDE}:{OUTSIDE_PORT}/"))
            for name in ("prometheus", "node-exporter", "postgres-exporter", "valkey-exporter")
        ),
    ],
)
def test_nobody_else_gets_out(site: Project, service: str, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["docker", "exec", f"{HOST}-{service}", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0, done.stdout
    assert "not found" not in done.stderr


def test_all_who_have_no_reason_are_tried_above(site: Project) -> None:
    stated = exceptions_of(site.plan, HOST)
    assert sorted(NOBODY_ELSE) == sorted(name for name in stated if "way-out" not in stated[name])


# What a program in a container can connect to, by service and port: what it calls, and others that call the same.
SAME_NETWORK = {
    "chat-1": {("haproxy", GATEWAY_PORT), ("haproxy", 8404), ("chat-1", 8100)},
    "valkey": {("valkey", 6379), ("valkey-exporter", 9121), ("litellm", 4001)},
    "postgres": {("postgres", 5432), ("postgres-exporter", 9187), ("litellm", 4001)},
    "grafana": {("grafana", GRAFANA_PORT), ("prometheus", PROMETHEUS_PORT)},
    "node-exporter": {("node-exporter", 9100), ("postgres-exporter", 9187), ("valkey-exporter", 9121)},
    "litellm": {
        ("litellm", 4001), ("haproxy", GATEWAY_PORT), ("haproxy", 8081), ("haproxy", 8404), ("postgres", 5432),
        ("postgres-exporter", 9187), ("valkey", 6379), ("valkey-exporter", 9121),
    },
}  # fmt: skip


@pytest.mark.parametrize("service", SAME_NETWORK)
def test_a_container_reaches_what_it_calls_and_nothing_else(site: Project, service: str) -> None:
    assert reached_from(site, service) == SAME_NETWORK[service]


def test_a_servers_own_page_is_off(site: Project) -> None:
    words = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8100/")
    assert _try(site, "chat-1", *words) == "404"


@pytest.mark.parametrize("name", ["valkey", "postgres", "litellm", "grafana", "node-exporter"])
def test_a_server_does_not_even_learn_where_the_others_are(site: Project, name: str) -> None:
    assert _try(site, "chat-1", "getent", "hosts", "haproxy")
    assert _try(site, "chat-1", "getent", "hosts", name) == ""


def test_prometheus_reaches_all_that_it_reads(site: Project) -> None:
    def down() -> list[str]:
        url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/targets"
        targets = httpx.get(url, trust_env=False).json()["data"]["activeTargets"]
        return [
            f"{item['scrapeUrl']}: {item['lastError']}"
            for item in targets
            if item["health"] != "up" and "401" not in item["lastError"]  # reached: `up` would have given it its key
        ]

    wait_until(lambda: down() == [], 60, f"every target up, but: {down()}")


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_nowhere_but_in_their_files(site: Project, client: Client) -> None:
    client.chat_text()
    assert client.chat(stream=True).status_code == 200
    assert client.chat("far").status_code >= 400  # a web server, which says so in its own words
    assert client.chat("none-such").status_code >= 400
    assert Client(client.base, f"sk-{MARKER}-wrong").chat().status_code == 401

    values = list(site.secrets.values())
    assert len(values) == len({secret.name for secret in site.plan.secrets_of(HOST) if not secret.template})
    assert all(MARKER in value for value in values)
    assert files_with(site.out, [MARKER], but={".env", "secrets"}) == []
    assert MARKER not in site.compose("config")
    for name in sorted(site.objects("container")):
        facts = site.docker("inspect", name)
        assert MARKER not in facts, name
        assert MARKER not in site.docker("image", "history", "--no-trunc", json.loads(facts)[0]["Image"]), name
        assert [value for value in values if value in docker_logs(site, name)] == [], name
    for kind in ("network", "volume"):
        assert MARKER not in site.docker(kind, "inspect", *site.objects(kind)), kind


def test_secrets_can_be_read_by_their_owner_only(site: Project) -> None:
    assert (site.folder / ".env").stat().st_mode & 0o777 == 0o600
    assert (site.folder / "secrets").stat().st_mode & 0o777 == 0o700


# --- stores ----------------------------------------------------------------------------------------------------------


def test_the_gateways_role_is_no_superuser_and_the_database_survives_a_crash(site: Project, client: Client) -> None:
    """The lock file of a killed PostgreSQL names a process number that the next container has as well."""

    def ask(query: str) -> str:
        words = ("psql", "-p", "5432", "-U", "litellm", "-d", "corral", "-Atc", query)
        return site.docker("exec", f"{HOST}-postgres", *words, check=False).strip()

    assert ask("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == "f"
    assert ask("COPY (SELECT 1) TO PROGRAM 'true'") == ""
    tables = ask("SELECT count(*) FROM pg_tables WHERE tableowner = 'litellm'")
    assert int(tables) > 20
    site.docker("kill", "--signal", "KILL", f"{HOST}-postgres")
    site.docker("start", f"{HOST}-postgres")
    wait_until(lambda: ask("SELECT count(*) FROM pg_tables WHERE tableowner = 'litellm'") == tables, 120, "it is back")
    made = partial(client.admin(ADMIN_PORT).send, "POST", "/key/generate", {"models": ["chat"]})
    wait_until(lambda: made().status_code == 200, 60, "keys, too")


# --- a machine without cards -----------------------------------------------------------------------------------------


@pytest.fixture
def card_site(engine: None, tmp_path: Path) -> Iterator[Project]:
    inventory = tmp_path / "site.yaml"
    inventory.write_text(CARD_SITE)
    plan = render_site(inventory, tmp_path)
    ensure_images([plan])
    make_models(plan, f"{HOST}g", tmp_path / f"{HOST}g" / "models")
    with Project(plan, f"{HOST}g", tmp_path, project_name(plan, f"{HOST}g")) as project:
        yield project


def test_the_override_runs_a_server_without_its_card(card_site: Project) -> None:
    files = [word for name in ("compose.yaml", "compose.cpu.yaml") for word in ("-f", str(card_site.folder / name))]
    assert "nvidia" in card_site.compose("config")
    assert "nvidia" not in docker("compose", *files, "config")
    docker("compose", *files, "up", "--detach", "--wait", "chat-1")
    facts: dict[str, Any] = card_site.inspect(f"{HOST}g-chat-1")
    assert not facts["HostConfig"]["DeviceRequests"]
    assert facts["Config"]["Image"] == "ghcr.io/ggml-org/llama.cpp:server-b11347"
    key = card_site.secrets["LLAMA_API_KEY"]
    assert Client("http://127.0.0.1:22010", key).chat_text() == KNOWN_ANSWER
