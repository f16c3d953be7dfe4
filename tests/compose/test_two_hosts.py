"""Seed 004 as it is meant: a host with eight cards and a host with the gateway, each with an engine and an sshd.

The copy of the inventory has documentation addresses, `ssh:` and a models folder beside the rendering. It also tells
the watchdogs that servers compute on the processor, as they do on cards that are not there: else each would be ended
for having lost its card. Nothing else differs. This machine has the inventory and the kit, and both hosts are looked
after from here.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.compose.engines import Engine, Lab, run
from tests.compose.far import Sshd, client_config
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, Project, docker_logs, make_models, render_site, replica_of
from tests.compose.site_up import Site
from tests.processes.helpers import wait_until
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "network-namespaces", "prisma-engine", "sshd")

INVENTORY = Path(__file__).resolve().parents[2] / "inventories" / "heartcode.yaml"
ADDRESSES = {"pea": ("192.168.0.144", "192.0.2.144"), "prod": ("192.168.0.152", "192.0.2.152")}
EDGE = "https://192.0.2.144:4443"
FIGURES_LIMIT_S = 90
FIRST_LIMIT_S = 120
SLOW_PICTURE_S = 61
NO_CARD = "{CORRAL_COMPUTES_ON: processor}"
UUID = "GPU-5d3b7e3a-0f4b-4b3e-9a53-0c4f6f1d2e01"
PINNED = f"""\
schema_version: 1
name: {PREFIX}pinned
hosts:
  gpus:
    address: 127.0.0.1
    gpus:
      - {{card: p104-100, uuid: {UUID}}}
      - {{card: p104-100, pci: "02:00.0"}}
      - {{card: p104-100}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: gpus, gpus: 1-3}}, ports: 8180, engine: {{threads: 1}}}}
gateway: {{host: gpus, balancing: direct, database: false, cache: false}}
"""


def _far_folder(site: Site, host: str) -> Path:
    return site.folder / "far" / host


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("two-hosts"))
    text = INVENTORY.read_text().replace("models_dir: /srv/models", "models_dir: ./models")
    for host, (address, stand_in) in ADDRESSES.items():
        far = f"{stand_in}, ssh: {PREFIX}{host}, folder: {_far_folder(site, host)}"
        text = text.replace(f"{{address: {address}", f"{{address: {far}")
        text = text.replace(f"address: {address}", f"address: {far}".replace(", ", "\n    "))
    text = text.replace("    gpu_layers: 33\n", f"    gpu_layers: 33\n    environment: {NO_CARD}\n")
    text = text.replace("  embedding: {slots: 1,", f"  embedding: {{slots: 1, environment: {NO_CARD},")
    assert text.count(NO_CARD) == 2
    assert "192.168." not in text
    assert text.count("ssh:") == len(ADDRESSES)
    site.inventory.write_text(text)
    ensure_images([site.plan])
    make_models(site.plan, "pea", _far_folder(site, "pea") / "models")
    return site


@pytest.fixture(scope="module")
def lab(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Both hosts with engine, images and sshd, reachable from here by address and through ssh."""
    folder = tmp_path_factory.mktemp("lab")
    images = {host: sorted({service.image for service in site.plan.services_of(host)}) for host in ADDRESSES}
    gateway = Engine("prod", "192.0.2.152/24", folder / "prod", images["prod"])
    servers = Engine("pea", "192.0.2.144/24", folder / "pea", images["pea"])
    with Lab(gateway, servers) as lab, ExitStack() as stack:
        doors = []
        for engine in (gateway, servers):
            place = engine.address.partition("/")[0]
            door = Sshd(
                f"{PREFIX}{engine.name}", folder / f"sshd-{engine.name}", place, engine.namespace, engine.socket
            )
            doors.append(stack.enter_context(door))
        site.environment.update(client_config(doors, folder / "ssh_config"))
        yield lab


def _project(site: Site, host: str, engine: Engine) -> Project:
    return Project(site.plan, host, site.out, f"{site.plan.inventory.name}-{host}", engine.words)


@pytest.fixture(scope="module")
def pea(site: Site, lab: Lab) -> Iterator[Project]:
    """The host with the cards, brought up alone."""
    site.corral("render", "--quiet")
    site.corral("secrets", "init")
    with _project(site, "pea", lab.servers) as project:
        said = site.corral("up", "--host", "pea")
        assert said.rstrip().splitlines()[-1] == "next: ./generate.py up --host prod"
        yield project


@pytest.fixture(scope="module")
def prod(site: Site, lab: Lab, pea: Project) -> Iterator[Project]:
    """The gateway's host, brought up by an `up` of everything, which leaves the other one alone."""
    with _project(site, "prod", lab.gateway) as project:
        before = pea.ids()
        said = site.corral("up")
        assert said.rstrip().splitlines()[-1].startswith("base URL: http://192.0.2.152:4000/v1")
        assert pea.ids() == before
        yield project


@pytest.fixture
def client(prod: Project) -> Client:
    return Client("http://192.0.2.152:4000", prod.secrets["LITELLM_MASTER_KEY"])


def test_all_services_of_the_gpu_host_are_healthy(pea: Project) -> None:
    states = pea.states()
    assert set(states.values()) == {"healthy"}
    assert len(states) == 19
    assert {
        "pea-gpu-1",
        "pea-gpu-7",
        "pea-embed-1",
        "pea-embed-7",
        "pea-prometheus",
        "pea-node-exporter",
        "pea-edge",
    } < set(states)


def test_every_container_was_given_the_card_of_the_plan_and_no_other(pea: Project) -> None:
    expected = {
        service.container or f"pea-{service.name}": ",".join(claim.device for claim in service.gpus)
        for service in pea.plan.services_of("pea")
        if service.gpus
    }
    assert len(expected) == 16
    assert {name: _variable(pea, name, "NVIDIA_VISIBLE_DEVICES") for name in expected} == expected


def test_both_chat_pools_the_embeddings_and_the_pictures_answer_through_the_other_host(client: Client) -> None:
    wait_until(lambda: client.chat("heartcode-default").status_code == 200, FIRST_LIMIT_S, "the first answer")
    for name in ("heartcode-default", "heartcode-chat-sfw", "heartcode-chat-nsfw", "heartcode-nsfw"):
        assert client.chat_text(name) == KNOWN_ANSWER
    assert replica_of(client.chat("heartcode-chat-nsfw", max_tokens=5)) in {
        f"pea-gpu-{number}" for number in range(4, 8)
    }
    embedded = client.send("POST", "/v1/embeddings", {"model": "heartcode-embed", "input": "hello"})
    assert embedded.status_code == 200, embedded.text
    drawn = client.send(
        "POST", "/v1/images/generations", {"model": "heartcode-image", "prompt": "a boat", "size": "64x64"}
    )
    assert drawn.status_code == 200, drawn.text
    assert drawn.json()["data"][0]["b64_json"].startswith("iVBOR")  # a picture, though LocalAI's default is an address


def test_004_50_the_first_picture_was_drawn_before_anybody_asked(pea: Project) -> None:
    wait_until(
        lambda: "the first picture is drawn" in docker_logs(pea, "pea-image-8"), FIRST_LIMIT_S, "the first picture"
    )


def test_who_asks_for_an_address_gets_the_image_servers_own(client: Client) -> None:
    wanted = {"model": "heartcode-image", "prompt": "a boat", "size": "64x64", "response_format": "url"}
    drawn = client.send("POST", "/v1/images/generations", wanted)
    assert drawn.status_code == 200, drawn.text
    assert drawn.json()["data"][0]["url"].startswith("http://")


@pytest.fixture(scope="module")
def slow_picture(pea: Project, prod: Project) -> Iterator[tuple[int, Future[httpx.Response]]]:
    """A picture that takes a minute, on its way while other tests look at the hosts; how many were drawn before it."""
    client = Client("http://192.0.2.152:4000", prod.secrets["LITELLM_MASTER_KEY"], timeout_s=2 * SLOW_PICTURE_S)
    wanted = {"model": "heartcode-image", "prompt": "a slow boat", "size": "64x64", "step": SLOW_PICTURE_S}
    with ThreadPoolExecutor(1) as threads:
        yield _pictures(pea), threads.submit(client.send, "POST", "/v1/images/generations", wanted)


def _pictures(pea: Project) -> int:
    return docker_logs(pea, "pea-image-8").count("POST /v1/images/generations")


@pytest.mark.usefixtures("slow_picture")
def test_the_gateways_prometheus_reads_both_hosts(prod: Project, client: Client) -> None:
    def down() -> list[str]:
        words = [
            "exec",
            "prod-prometheus",
            "wget",
            "-q",
            "-O",
            "-",
            "http://127.0.0.1:9090/api/v1/query?query=up%20!=%201",
        ]
        answer = httpx.Response(200, text=prod.docker(*words)).json()
        return [item["metric"]["instance"] for item in answer["data"]["result"]]

    wait_until(lambda: down() == [], FIGURES_LIMIT_S, f"every target up, but: {down()}")


def test_both_hosts_are_seen_from_here(site: Site, pea: Project, prod: Project) -> None:
    found = site.data("status")
    rows = {row["service"]: row for row in found["hosts"]["pea"]["services"]}
    assert set(rows) == {service.name for service in site.plan.services_of("pea")}
    assert all(row["well"] for host in found["hosts"].values() for row in host["services"])
    assert (rows["gpu-3"]["model"], rows["gpu-3"]["slots"], rows["gpu-3"]["slots_busy"]) == ("stheno-8b", 1, 0)
    assert "nothing to do" in site.corral("up")


def test_watch_asks_prometheus_over_ssh(site: Site, prod: Project) -> None:
    def slots() -> dict[str, float]:
        return {row["name"]: row["slots"] for row in site.data("watch") if "slots" in row}

    wait_until(lambda: len(slots()) == len(site.plan.inventory.pools), FIGURES_LIMIT_S, "every pool is in the figures")
    assert slots()["heartcode-chat-nsfw"] == 4


def test_what_runs_on_a_card_is_reached_by_its_number_over_ssh(site: Site, pea: Project, prod: Project) -> None:
    lines = site.corral("logs", "pea:3", "--tail", "3").splitlines()
    assert {line.split("│")[0].split()[-1] for line in lines if "│" in line} == {"gpu-3", "embed-3"}
    before = pea.inspect("pea-embed-3")["State"]["StartedAt"]
    site.corral("restart", "embed-3")
    assert pea.inspect("pea-embed-3")["State"]["StartedAt"] > before


def test_the_doctor_finds_over_ssh_that_there_are_no_cards(site: Site, pea: Project, prod: Project) -> None:
    found = site.data("doctor", code=1)
    wrong = {item["check"] for item in found["hosts"]["pea"]["findings"]}
    assert "gpu-driver" in wrong
    assert not wrong & {"host-reachable", "engine-answers", "copied", "running"}


def test_compose_itself_sees_nothing_to_change(site: Site, pea: Project, prod: Project) -> None:
    """What `up` made is what the unmodified rendering says, to the engine's own tool."""
    for project in (pea, prod):
        before = project.ids()
        file = _far_folder(site, project.host) / "compose.yaml"
        project.docker("compose", "--file", str(file), "up", "--detach", "--wait")
        assert project.ids() == before


def test_004_51_a_picture_that_takes_a_minute_arrives_and_is_asked_for_once(
    pea: Project, slow_picture: tuple[int, Future[httpx.Response]]
) -> None:
    before, drawing = slow_picture
    drawn = drawing.result()
    assert drawn.status_code == 200, drawn.text
    assert drawn.elapsed.total_seconds() >= SLOW_PICTURE_S
    assert _pictures(pea) == before + 1


def test_a_card_is_handed_out_by_uuid_by_slot_and_by_index(lab: Lab, pea: Project, tmp_path: Path) -> None:
    (tmp_path / "inventory.yaml").write_text(PINNED)
    plan = render_site(tmp_path / "inventory.yaml", tmp_path)
    ensure_images([plan])
    make_models(plan, "gpus", tmp_path / "gpus" / "models")
    with Project(plan, "gpus", tmp_path, f"{PREFIX}pinned-gpus", lab.servers.words) as project:
        project.up("chat-1", "chat-2", "chat-3")
        names = sorted(project.objects("container"))
        given = [_variable(project, name, "NVIDIA_VISIBLE_DEVICES") for name in names]
    assert given == [UUID, "0000:02:00.0", "2"]


def test_the_servers_refuse_strangers(lab: Lab, pea: Project) -> None:
    words = ["exec", "pea-gpu-1", "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-d", "{}"]
    assert pea.docker(*words, "http://localhost:8080/v1/chat/completions") == "401"


# --- between the hosts ------------------------------------------------------------------------------------------------


def _tls(project: Project, certificate: str = "") -> ssl.SSLContext:
    """TLS as a caller of the GPU host's edge speaks it, with one of a host's certificates or none."""
    folder = project.out / project.host / "secrets"
    context = ssl.create_default_context(cafile=str(folder / "EDGE_AUTHORITY"))
    if certificate:
        context.load_cert_chain(folder / certificate)
    return context


def _status(context: ssl.SSLContext, path: str) -> int:
    """Status of an answer of the GPU host's edge; 0 when it takes no request."""
    try:
        return httpx.get(f"{EDGE}{path}", verify=context, trust_env=False, timeout=10).status_code
    except httpx.HTTPError:
        return 0


def test_only_the_edge_of_the_gpu_host_listens_on_its_address(pea: Project) -> None:
    bindings = [pea.inspect(name)["HostConfig"]["PortBindings"] or {} for name in pea.objects("container")]
    doors = [door for ports in bindings for found in ports.values() for door in found]
    assert {door["HostPort"] for door in doors if door["HostIp"] != "127.0.0.1"} == {"4443"}
    ports = {port.number for service in pea.plan.services_of("pea") for port in service.ports} - {4443}
    assert len(ports) == 18
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("192.0.2.144", port), 5)


def test_the_edge_answers_nothing_without_a_client_certificate(pea: Project, prod: Project) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(EDGE.replace("https:", "http:") + "/gpu-1/health", trust_env=False)
    assert _status(_tls(prod), "/gpu-1/health") == 0
    assert _status(_tls(pea, "EDGE_CERTIFICATE"), "/gpu-1/health") == 0  # another host's own is none for a client


def test_callers_get_the_paths_that_they_need_and_no_others(prod: Project) -> None:
    gateway, monitoring = _tls(prod, "GATEWAY_CERTIFICATE"), _tls(prod, "MONITORING_CERTIFICATE")
    assert [_status(gateway, f"/gpu-1{path}") for path in ("/health", "/v1/models")] == [200, 200]
    closed = ("/slots", "/props", "/v1/%2e%2e/slots", "/", "/metrics")
    assert [_status(gateway, f"/gpu-1{path}") for path in closed] == [403, 403, 400, 403, 403]
    assert [_status(monitoring, f"/gpu-1{path}") for path in ("/metrics", "/v1/models")] == [200, 403]
    assert [_status(gateway, path) for path in ("/", "/prometheus/metrics")] == [404, 404]


def test_every_host_has_a_key_of_its_own(pea: Project, prod: Project) -> None:
    for name in ("LLAMA_API_KEY", "LOCALAI_API_KEY"):
        assert pea.secrets[name] != prod.secrets[name]


def test_half_open_connections_stop_nobody(client: Client, prod: Project) -> None:
    with ExitStack() as stack:
        for number in range(80):
            link = stack.enter_context(socket.create_connection(("192.0.2.144", 4443), 5))
            link.sendall(b"GET /he" if number % 2 else b"\x16\x03\x01\x02\x00")
        for name in ("heartcode-chat-sfw", "heartcode-chat-nsfw"):
            assert client.chat_text(name) == KNOWN_ANSWER


def test_the_master_key_crosses_no_network_in_clear(site: Site, prod: Project, client: Client) -> None:
    closed = ["OUTPUT", "--destination", "192.0.2.152", "--protocol", "tcp", "--dport", "4000", "--jump", "REJECT"]
    run("iptables", "--insert", *closed)
    try:
        with pytest.raises(httpx.ConnectError):
            client.chat("heartcode-default")
        site.corral("keys", "ls")
        assert "key-accepted" not in {
            item["check"] for item in site.data("doctor", code=1)["hosts"]["prod"]["findings"]
        }
    finally:
        run("iptables", "--delete", *closed)


def test_up_closes_the_ports_of_servers_that_an_older_version_started(
    site: Site, pea: Project, prod: Project, client: Client, tmp_path: Path
) -> None:
    older = tmp_path / "older.yaml"
    older.write_text('services: {gpu-1: {ports: ["192.0.2.144:8080:8080"]}}\n')
    files = ("--file", str(_far_folder(site, "pea") / "compose.yaml"), "--file", str(older))
    pea.docker("compose", *files, "up", "--detach", "--no-deps", "--wait", "gpu-1")
    assert "servers close their published ports" in site.corral("up")
    assert "192.0.2.144" not in str(pea.inspect("pea-gpu-1")["HostConfig"]["PortBindings"])
    assert client.chat_text("heartcode-chat-sfw") == KNOWN_ANSWER


def test_up_takes_over_a_renewed_certificate(site: Site, pea: Project, prod: Project, client: Client) -> None:
    before, others = pea.ids(), prod.ids()
    (site.out / "pea" / "secrets" / "EDGE_CERTIFICATE").unlink()
    site.corral("secrets", "init")
    site.corral("up")
    after = pea.ids()
    assert {name for name in before if before[name] != after[name]} == {"pea-edge"}
    assert prod.ids() == others
    wait_until(lambda: client.chat("heartcode-default").status_code == 200, FIRST_LIMIT_S, "an answer")


def _variable(project: Project, container: str, name: str) -> str:
    """A variable of the container's first process; what the engine adds for cards is not in `docker exec env`."""
    pid = project.inspect(container)["State"]["Pid"]
    variables = dict(item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item)
    return variables[name]
