"""The default site, rendered without a change, in a real Docker engine with the real programs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.compose import command
from tests.compose.images.build import ensure_images
from tests.compose.project import (
    PREFIX,
    Client,
    CommandFailed,
    Load,
    Project,
    docker_logs,
    files_with,
    make_models,
    render_site,
    replica_of,
    streamed_text,
)
from tests.monitoring.boards import asked, troubles
from tests.processes.helpers import wait_until
from tests.tiny_models import KNOWN_ANSWER
from tools.bench_gateway import Stack, pieces

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

REPOSITORY = Path(__file__).resolve().parents[2]
INVENTORY = REPOSITORY / "inventory.yaml"
HOST = "box"
REPLICAS = ("box-chat-1", "box-chat-2")
PROMETHEUS = "http://127.0.0.1:9090"
GRAFANA = "http://127.0.0.1:3000"
INNER_PORTS = {
    "balancer": 8081,
    "figures": 8404,
    "chat": 8100,
    "embed": 8300,
    "database": 5432,
    "cache": 6379,
    "node": 9100,
}
PAGES = ("farm.json", "gateway.json", "host.json", "keys.json", "pool.json")
PANELS_LIMIT_S = 240
NO_LOOK = "`figures` has not looked yet: its timer is systemd's; tests/compose/test_figures.py has these"
# Queries that may have nothing to show on this site, and why.
EMPTY_HERE = {
    **dict.fromkeys(("farm.json: Hottest GPU A", "farm.json: Hottest GPU B"), "no cards"),
    "host.json: Hottest sensor A": "a virtual machine has no sensors",
    "keys.json: Budget left A": "no consumer has a budget",
    "keys.json: Use of the limits A": "no consumer has limits",
    **{
        f"farm.json: {title} A": NO_LOOK
        for title in (
            "Age of these metrics", "Damaged model files", "Drift", "Memory of containers", "Oldest backup",
            "Rendering of each host", "Restarts", "Unhealthy containers", "Verified model files",
        )
    },
}  # fmt: skip
# Services that keep keys: made anew with the volumes that they had.
STORING = ("postgres", "valkey", "litellm")
VOLUMES = ("cache", "dashboards", "database", "llama-restarts", "metrics")
ATTEMPTS = 3
# Two scrapes and a start.
FIGURES_LIMIT_S = 60
# Behaviour B4: how long a recovered replica may take to get its share again.
BACK_LIMIT_S = 30


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    out = tmp_path_factory.mktemp("default-site")
    plan = render_site(INVENTORY, out)
    ensure_images([plan])
    make_models(plan, HOST, out / HOST / "models")
    with Project(plan, HOST, out, f"{PREFIX}default") as project:
        project.up()
        yield project


@pytest.fixture
def client(site: Project) -> Client:
    """The operator; the site is whole when a test begins."""
    site.wait_healthy()
    return Client("http://127.0.0.1:4000", site.secrets["LITELLM_MASTER_KEY"])


@pytest.fixture(scope="module")
def scraped(site: Project) -> None:
    """Give Prometheus its own key for LiteLLM, which `up` does by itself."""
    command.run(["keys", "sync", "--inventory", str(INVENTORY), "--out", str(site.out)]).check_returncode()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_every_container_is_healthy(site: Project) -> None:
    assert site.states() == {
        service.container or f"{HOST}-{service.name}": "healthy" for service in site.plan.services_of(HOST)
    }


def test_a_chat_is_answered_with_the_known_text(client: Client) -> None:
    response = client.chat()
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (KNOWN_ANSWER, "stop")
    assert replica_of(response) in REPLICAS


def test_a_streamed_chat_has_the_same_text(client: Client) -> None:
    response = client.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert streamed_text(response.text) == KNOWN_ANSWER


def test_a_streamed_chat_arrives_token_by_token(client: Client) -> None:
    """A bridge's kernel would keep tokens back until six of them fill a segment."""
    stack = Stack("site", {"chat": client.base}, client.key)
    best = max(asyncio.run(_share_of_pieces(stack)) for _ in range(ATTEMPTS))
    assert best > 0.5


async def _share_of_pieces(stack: Stack) -> float:
    """Pieces in which an answer arrives, to its tokens."""
    messages = [{"role": "user", "content": "hello"}]
    found = [piece async for _, piece in pieces(stack, "chat", "/v1/chat/completions", messages=messages)]
    return len(found) / b"".join(found).count(b'"content":')


def test_an_alias_is_the_pool(client: Client) -> None:
    assert client.chat_text("default") == KNOWN_ANSWER


def test_texts_that_share_words_are_nearer(client: Client) -> None:
    texts = ["the capital of france", "paris is the capital of france", "dog in the river"]
    response = client.send("POST", "/v1/embeddings", {"model": "embed", "input": texts})
    assert response.status_code == 200, response.text
    same, near, far = (item["embedding"] for item in response.json()["data"])
    assert sum(a * b for a, b in zip(same, near, strict=True)) > sum(a * b for a, b in zip(same, far, strict=True))


@pytest.mark.parametrize("key", ["", "sk-wrong"])
def test_a_wrong_key_is_refused(client: Client, key: str) -> None:
    assert Client(client.base, key).chat().status_code == 401


@pytest.mark.usefixtures("scraped")
def test_prometheus_reads_every_target(site: Project, client: Client) -> None:
    jobs = yaml.safe_load((site.folder / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    expected = {target for job in jobs for group in job["static_configs"] for target in group["targets"]}
    assert len(expected) == 10
    wait_until(lambda: _up() == expected, FIGURES_LIMIT_S, f"all targets up: {expected}")
    client.chat_text()
    wait_until(
        lambda: sum(_query("llamacpp:tokens_predicted_total").values()) > 0,
        FIGURES_LIMIT_S,
        "predicted tokens in Prometheus",
    )


@pytest.mark.usefixtures("scraped")
def test_every_panel_of_the_sites_pages_shows_something_under_load(site: Project, client: Client) -> None:
    """The pages that Grafana has here, asked in the site's own Prometheus; recorded figures show the rest elsewhere."""

    def empty() -> set[str]:
        client.chat(stream=True, max_tokens=20)
        client.send("POST", "/v1/embeddings", {"model": "embed", "input": "hello"})
        found = [trouble for query in asked(*PAGES) for trouble in troubles(query, _series)]
        return {trouble.partition(": no data")[0] for trouble in found} - set(EMPTY_HERE)

    with Load(client):
        wait_until(lambda: empty() == set(), PANELS_LIMIT_S, "every panel shows something")
    assert len(list(asked(*PAGES))) > 50


@pytest.mark.parametrize(
    ("service", "tools"),
    [
        ("chat-1", ("python3", "wget", "busybox", "node")),
        ("haproxy", ("curl", "wget", "python3", "socat")),
        ("litellm", ("curl", "wget")),
        ("postgres", ("curl", "wget", "python3")),
        ("valkey", ("curl", "wget", "python3")),
        ("prometheus", ("bash", "curl", "python3", "perl")),
        ("node-exporter", ("bash", "curl", "python3", "perl")),
        ("grafana", ("python3", "perl", "node")),
    ],
)
def test_a_container_has_no_tool_that_upstreams_image_lacks(
    site: Project, service: str, tools: tuple[str, ...]
) -> None:
    """A health check that passes here would otherwise fail there."""
    script = 'for tool; do command -v "$tool"; done; true'
    assert site.docker("exec", f"{HOST}-{service}", "sh", "-c", script, "-", *tools) == ""


# --- what people see --------------------------------------------------------------------------------------------------


def test_grafana_lists_the_pages_of_the_site_in_its_folder(site: Project, client: Client) -> None:
    found = _grafana(site, "/api/search?type=dash-db").json()
    assert {page["uid"] for page in found} == {f"corral-{name}" for name in ("farm", "gateway", "host", "keys", "pool")}
    assert {page["folderTitle"] for page in found} == {"farm"}


def test_grafana_reaches_the_prometheus_that_its_data_source_names(site: Project, client: Client) -> None:
    (source,) = _grafana(site, "/api/datasources").json()
    assert (source["uid"], source["isDefault"], source["readOnly"]) == ("prometheus", True, True)
    query = f"/api/datasources/proxy/uid/{source['uid']}/api/v1/query?query=vector(42)"
    assert _grafana(site, query).json()["data"]["result"][0]["value"][1] == "42"


def test_grafana_shows_nothing_without_the_password(site: Project, client: Client) -> None:
    for path in ("/api/search", "/api/datasources", "/metrics"):
        assert _grafana(site, path, password="admin").status_code == 401, path
    assert _grafana(site, "/api/health", password="admin").json()["database"] == "ok"


def test_grafana_can_write_into_its_volume_and_nowhere_else(site: Project, client: Client) -> None:
    facts = site.inspect("box-grafana")
    assert (facts["HostConfig"]["ReadonlyRootfs"], facts["Config"]["User"]) == (True, "472:472")
    assert [mount["Destination"] for mount in facts["Mounts"] if mount["RW"]] == ["/var/lib/grafana"]
    assert "grafana.db" in site.docker("exec", "box-grafana", "ls", "/var/lib/grafana")


# --- what strangers see ----------------------------------------------------------------------------------------------


def test_only_what_people_call_is_published_and_only_on_the_hosts_address(site: Project) -> None:
    published = {
        (port["HostIp"], port["HostPort"])
        for name in site.objects("container")
        for ports in (site.inspect(name)["NetworkSettings"]["Ports"] or {}).values()
        for port in ports or []
    }
    assert published == {("127.0.0.1", port) for port in ("3000", "4000", "4002", "9090")}
    assert [name for name, port in INNER_PORTS.items() if _is_open(port)] == []


def test_no_secret_is_in_the_tree_in_inspect_or_in_logs(site: Project, client: Client) -> None:
    client.chat_text()
    values = list(site.secrets.values())
    assert len(values) >= 5
    assert all(len(value) > 20 for value in values)
    assert files_with(site.out, values, but={".env", "secrets"}) == []
    for name in sorted(site.objects("container")):
        for source, text in (("inspect", site.docker("inspect", name)), ("logs", docker_logs(site, name))):
            assert not [value for value in values if value in text], f"a secret in {source} of {name}"


def test_every_service_has_the_limits_of_the_baseline(site: Project) -> None:
    for name in sorted(site.objects("container")):
        facts = site.inspect(name)["HostConfig"]
        assert facts["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in facts["SecurityOpt"], name
        assert facts["Memory"] > 0, name
        assert facts["PidsLimit"] > 0, name


# --- bad weather -----------------------------------------------------------------------------------------------------


def test_a_replica_stopped_under_load_costs_at_most_its_own_requests(site: Project, client: Client) -> None:
    with Load(client) as load:
        load.wait_for(10)
        site.compose("stop", "chat-1")
        load.wait_for(20)
        site.compose("start", "chat-1")
        load.wait_for_replica(REPLICAS[0], BACK_LIMIT_S)
    assert len(load.failures()) <= _slots(site), load.failures()


def test_a_replica_whose_process_dies_under_load_is_back_in_rotation(site: Project, client: Client) -> None:
    before = site.inspect(REPLICAS[0])
    with Load(client) as load:
        load.wait_for(10)
        os.kill(before["State"]["Pid"], signal.SIGKILL)  # as a crash would; `docker kill` counts as stopped by hand
        load.wait_for(20)
        wait_until(
            lambda: bool(site.inspect(REPLICAS[0])["RestartCount"] > before["RestartCount"]), BACK_LIMIT_S, "restart"
        )
        load.wait_for_replica(REPLICAS[0], BACK_LIMIT_S)
    assert len(load.failures()) <= _slots(site), load.failures()


def test_a_server_started_before_its_models_folder_was_filled_says_so(site: Project, client: Client) -> None:
    model = site.folder / "models" / "nomic-embed-text-v1.5.Q8_0.gguf"
    away = model.rename(model.with_suffix(".away"))
    try:
        site.compose("restart", "embed-1")
        wait_until(
            lambda: model.name in docker_logs(site, "box-embed-1", 20), BACK_LIMIT_S, "the file's name in the log"
        )
    finally:
        away.rename(model)
    site.wait_healthy()
    response = client.send("POST", "/v1/embeddings", {"model": "embed", "input": "hello"})
    assert response.status_code == 200, response.text


# --- change ----------------------------------------------------------------------------------------------------------


def test_a_plain_up_notices_a_changed_configuration_and_a_key_survives_it_and_new_containers(
    site: Project, client: Client
) -> None:
    made = client.admin().send("POST", "/key/generate", {"models": ["chat"], "key_alias": "survivor"})
    assert made.status_code == 200, made.text
    user = Client(client.base, made.json()["key"])
    assert user.chat_text() == KNOWN_ANSWER
    assert user.send("POST", "/v1/embeddings", {"model": "embed", "input": "hello"}).status_code in (401, 403)

    before = site.ids()
    changed = site.out / "changed.yaml"
    text = INVENTORY.read_text()
    assert "aliases: [default]" in text
    changed.write_text(text.replace("aliases: [default]", "aliases: [default, fast]").replace("depth: 10", "depth: 11"))
    render_site(changed, site.out)
    site.up()
    after = site.ids()
    assert {name for name in before if before[name] != after[name]} == {"box-litellm", "box-haproxy", "box-prometheus"}
    wait_until(lambda: client.chat("fast").status_code == 200, BACK_LIMIT_S, "an answer under the new alias")
    assert user.chat_text() == KNOWN_ANSWER

    site.compose("stop", "litellm")
    site.compose("stop", "haproxy")
    assert site.inspect("box-haproxy")["State"]["ExitCode"] == 0  # by itself, not by the engine's SIGKILL

    site.compose("rm", "--stop", "--force", *STORING)
    assert site.objects("volume") == {f"{site.name}_{name}" for name in VOLUMES}

    render_site(INVENTORY, site.out)
    site.up()
    wait_until(lambda: user.chat().status_code == 200, BACK_LIMIT_S, "the key works in new containers")
    assert client.chat("fast").status_code in (400, 404)


def test_up_without_change_touches_nothing(site: Project, client: Client) -> None:
    before = site.ids()
    site.up()
    assert site.ids() == before


def test_a_service_that_cannot_become_healthy_is_named_with_its_last_lines(site: Project, client: Client) -> None:
    config = site.folder / "haproxy" / "haproxy.cfg"
    good = config.read_text()
    config.write_text(good + "\nnonsense\n")
    try:
        site.compose("restart", "haproxy")
        wait_until(lambda: site.states()["box-haproxy"] != "healthy", BACK_LIMIT_S, "haproxy notices")
        with pytest.raises(CommandFailed, match=r"box-haproxy(?s:.)*unknown keyword 'nonsense'"):
            site.up()
    finally:
        config.write_text(good)
    site.compose("up", "--detach", "--force-recreate", "--no-deps", "haproxy")
    site.wait_healthy()


def _slots(site: Project) -> int:
    return next(replica.slots for replica in site.plan.site.replicas if replica.container == REPLICAS[0])


def _series(expression: str) -> list[dict[str, Any]]:
    with httpx.Client(trust_env=False, timeout=10) as http:
        answer = http.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression})
    found: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
    return found


def _query(expression: str) -> dict[str, float]:
    return {str(item["metric"].get("instance")): float(item["value"][1]) for item in _series(expression)}


def _grafana(site: Project, path: str, password: str = "") -> httpx.Response:
    login = ("admin", password or site.secrets["GRAFANA_ADMIN_PASSWORD"])
    return httpx.get(f"{GRAFANA}{path}", auth=login, timeout=10, trust_env=False)


def _up() -> set[str]:
    return {instance for instance, value in _query("up").items() if value == 1}


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
