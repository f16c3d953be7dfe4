"""`up` and `down` in a real engine: stages, refusals, interruptions, bad weather, and hosts behind ssh."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from corral.render.secrets import read_env
from tests.compose.far import Sshd, client_config
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, CommandFailed, Project, docker, without_permission
from tests.compose.site_up import HOST, PORT, SITE, Site, site_in
from tests.processes.helpers import free_port, serving_http, wait_until
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

SERVICES = {"ua-chat-1", "ua-chat-2", "ua-solo-1", "ua-haproxy", "ua-litellm", "ua-prometheus"}
UP_LIMIT_S = 300
PROXY = f"{PREFIX}proxy"
# This machine, on a network of its own.
SIX = "fd00:c0a2::1"
MAC = "02:00:00:00:00:02"
WAKE_LIMIT_S = 30
SECOND = """\
schema_version: 1
name: {site}
hosts:
  {host}: {{address: 127.0.0.1, services: {{haproxy: {{networks: [{network}]}}}}}}
nodes:
  six: {{url: "http://[{six}]:{node}", model: m, health: /health, sleep: {{mac: "{mac}", wake_s: 60}}}}
pools: {{six: {{on: {{node: six}}}}}}
gateway: {{host: {host}, port: 21400, admin_port: 21402, stats_port: 21404, database: false, cache: false, path: /llm}}
"""
# Far more than a second `up` takes, far less than a start.
QUICK_S = 20
# An image of a registry that does not answer.
NOWHERE = "localhost:21499/nothing:1"


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_in(tmp_path_factory.mktemp("up")) as site:
        yield site


@pytest.fixture
def running(site: Site) -> Site:
    """The site, up and as rendered when the test begins."""
    site.corral("secrets", "init")
    site.corral("up")
    return site


# --- before anything is started --------------------------------------------------------------------------------------


def test_nothing_starts_without_secrets_or_with_an_outdated_rendering(site: Site) -> None:
    said = site.corral("up", code=1)
    assert "secrets init" in said
    site.corral("secrets", "init")
    site.edit("depth: 10", "depth: 11")
    said = site.corral("up", code=3)
    assert "generate.py render" in said
    site.edit("depth: 11", "depth: 10")
    assert site.project.objects("container") == set()


def test_an_engine_that_does_not_run_is_named_with_the_remedy(site: Site) -> None:
    said = site.corral("up", code=1, DOCKER_HOST=f"unix://{site.folder}/no.sock")
    assert "Docker is installed but does not run; sudo systemctl" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without a right")
def test_a_user_without_permission_is_told_what_to_do(site: Site, tmp_path: Path) -> None:
    said = site.corral("up", code=1, **without_permission(tmp_path))
    assert "this user may not use Docker; add it to the group docker" in said
    assert site.project.objects("container") == set()


def _is_made(site: Site, container: str) -> bool:
    return container in site.project.objects("container")


# --- starting, interrupted -------------------------------------------------------------------------------------------


def test_killed_at_any_stage_and_run_again_it_completes(site: Site) -> None:
    """SIGKILL after the first container, then SIGINT while the gateway starts; the third run goes through."""
    for container, number in (("ua-chat-1", signal.SIGKILL), ("ua-litellm", signal.SIGINT)):
        with site.start("up") as process:
            wait_until(partial(_is_made, site, container), UP_LIMIT_S, f"{container} made")
            os.kill(process.pid, number)
            process.wait(60)
        assert set(site.project.objects("container")) != SERVICES
    before = site.ids()
    said = site.corral("up")
    after = site.ids()
    assert set(after) == SERVICES
    assert {name: after[name] for name in before if name != "ua-litellm"} == {
        name: before[name] for name in before if name != "ua-litellm"
    }
    assert said.rstrip().splitlines()[-1].startswith(f"base URL: http://127.0.0.1:{PORT}/v1")
    assert site.client.chat_text() == KNOWN_ANSWER


def test_a_second_up_touches_nothing_and_is_quick(running: Site) -> None:
    before = running.ids()
    began = time.monotonic()
    said = running.corral("up")
    assert time.monotonic() - began < QUICK_S
    assert "nothing to do" in said
    assert running.ids() == before


class Answering(BaseHTTPRequestHandler):
    """A node that knows one answer."""

    def do_GET(self) -> None:
        """Healthy."""
        self._say({})

    def do_POST(self) -> None:
        """The answer."""
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": KNOWN_ANSWER}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self._say({"id": "a", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

    def _say(self, data: dict[str, object]) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def packet_of_wake_on_lan() -> bytes:
    """The first that this machine sends or gets."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.settimeout(WAKE_LIMIT_S)
        listener.bind(("", 9))
        return listener.recv(200)


@pytest.fixture
def networks() -> Iterator[None]:
    """A network as a reverse proxy has one, and one that gives this machine the address `SIX`."""
    made = {PROXY: (), f"{PREFIX}six": ("--ipv6", "--subnet", SIX.removesuffix("1") + "/64")}
    try:
        for name, words in made.items():
            docker("network", "create", *words, name)
        yield
    finally:
        for name in made:
            docker("network", "rm", name, check=False)


def test_a_second_farm_lives_beside_the_first_behind_a_proxy_and_wakes_an_ipv6_node(
    running: Site, networks: None, tmp_path: Path
) -> None:
    before, second, port = running.ids(), Site(tmp_path), free_port()
    text = SECOND.format(site=f"{SITE}-two", host=HOST, network=PROXY, six=SIX, node=port, mac=MAC)
    second.inventory.write_text(text)
    with ThreadPoolExecutor() as clients, Project(second.plan, HOST, second.out, f"{SITE}-two-{HOST}"):
        second.corral("render", "--quiet")
        second.corral("secrets", "init")
        said = second.corral("up", code=1)
        assert f"ua-haproxy, ua-litellm of the Compose project {SITE}-{HOST} has a name of this site's" in said
        assert "set container_prefix" in said
        second.edit("schema_version: 1", "schema_version: 1\ncontainer_prefix: two")
        second.corral("up", "--render")
        key = read_env(second.out / HOST / ".env")["LITELLM_MASTER_KEY"]
        client = Client("http://127.0.0.1:21400/llm", key)
        asked_in_its_sleep = clients.submit(client.chat_text, "six")
        assert packet_of_wake_on_lan() == b"\xff" * 6 + bytes.fromhex(MAC.replace(":", "")) * 16
        with serving_http(Answering, port, address="::"):
            assert asked_in_its_sleep.result() == KNOWN_ANSWER
        script = "exec 3<>/dev/tcp/two-ua-haproxy/$1; printf 'GET /llm/healthz HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
        image = next(item.image for item in second.plan.contributions.services if item.name == "haproxy")
        asked = ("run", "--rm", "--network", PROXY, "--entrypoint", "bash", image, "-c", script, "-")
        assert docker(*asked, "21400").endswith("ok")
        for inner in (21402, 8081, 21404):
            with pytest.raises(CommandFailed, match="refused"):
                docker(*asked, str(inner))
    assert running.ids() == before
    assert running.client.chat_text() == KNOWN_ANSWER


def test_a_stopped_and_a_removed_service_come_back_and_nothing_else_is_touched(running: Site) -> None:
    before = running.ids()
    docker("stop", "ua-chat-1")
    docker("rm", "--force", "ua-solo-1")
    running.corral("up")
    after = running.ids()
    assert {name for name in before if before[name] != after[name]} == {"ua-solo-1"}
    assert set(running.project.states().values()) == {"healthy"}


def test_a_service_that_is_not_in_the_inventory_any_more_goes(running: Site) -> None:
    running.edit("replicas: 2", "replicas: 1")
    said = running.corral("up", "--render")
    assert "ua-chat-2 is not in the inventory any more" in said
    assert set(running.project.objects("container")) == SERVICES - {"ua-chat-2"}
    running.edit("replicas: 1", "replicas: 2")
    running.corral("up", "--render")
    assert set(running.project.objects("container")) == SERVICES


# --- bad weather -----------------------------------------------------------------------------------------------------


def test_a_service_that_does_not_become_well_is_named_with_its_last_lines_and_the_rest_stays(running: Site) -> None:
    before = running.ids()
    model = running.folder / "models" / "broken.gguf"
    model.write_bytes(b"this is no model")
    text = running.inventory.read_text()
    running.edit("pools:\n", "  bad: {source: broken.gguf, kind: chat, context: 2048, size_gib: 0.01}\npools:\n")
    running.edit("  solo:\n    model: tiny", "  solo:\n    model: bad")
    try:
        said = running.corral("up", "--render", code=1)
        assert "ua/solo-1:" in said
        assert "its model file is damaged or not complete" in said
        assert "exit code" in said
        assert "last lines:" in said
        assert "invalid magic" in said
        after = running.ids()
        assert {name for name in before if before[name] != after.get(name)} == {"ua-solo-1"}
        assert running.client.chat_text() == KNOWN_ANSWER
    finally:
        running.inventory.write_text(text)
    running.corral("up", "--render")
    assert running.client.chat_text("solo") == KNOWN_ANSWER


def test_an_image_that_cannot_be_had_changes_nothing(running: Site) -> None:
    before = running.ids()
    text = running.inventory.read_text()
    running.inventory.write_text(f"{text}images: {{llama-cpu: {NOWHERE}}}\n")
    try:
        said = running.corral("up", "--render", code=1)
        assert "nothing was changed" in said
        assert f"the image {NOWHERE} of chat-1, chat-2, solo-1 is not there" in said
        assert running.ids() == before
    finally:
        running.inventory.write_text(text)
    running.corral("up", "--render")
    assert running.ids() == before


def test_without_an_nvidia_runtime_the_cause_is_named_and_the_processor_can_be_used(running: Site) -> None:
    text = running.inventory.read_text()
    running.edit("models_dir:", "gpus: {card: rtx-3060, count: 1}, models_dir:")
    running.edit(f"short: solo\n    on: {{host: {HOST}}}", f"short: solo\n    on: {{host: {HOST}, gpus: 1}}")
    ensure_images([running.plan])
    try:
        said = running.corral("up", "--render", code=1)
        assert "the engine does not start solo-1:" in said
        assert "the engine cannot hand out GPUs; install nvidia-container-toolkit" in said
        said = running.corral("up", "--cpu")
        assert running.client.chat_text("solo") == KNOWN_ANSWER
        assert "nothing to do" in running.corral("up")
    finally:
        running.inventory.write_text(text)
        running.corral("up", "--render")


def test_a_taken_port_is_named_with_its_holder(running: Site) -> None:
    docker("rm", "--force", "ua-haproxy")
    with socket.create_server(("127.0.0.1", PORT)):
        said = running.corral("up", code=1)
    assert "another program holds the port" in said
    assert re.search(rf"port {PORT} is held by .*\(pid {os.getpid()}", said), said
    running.corral("up")


# --- down ------------------------------------------------------------------------------------------------------------


def test_down_keeps_volumes_until_they_are_asked_for_twice(running: Site) -> None:
    name = running.project.name
    volumes = {f"{name}_llama-restarts", f"{name}_metrics"}
    said = running.corral("down", "--volumes", code=2)
    assert all(volume in said for volume in volumes)
    assert set(running.project.objects("container")) == SERVICES
    project = running.project
    began = time.time()
    said = running.corral("down")
    ends = _ends(project.name, began)
    assert [name for name, _ in ends[:2]] == ["ua-litellm", "ua-haproxy"]  # while replicas still answer
    assert dict(ends)["ua-haproxy"] == "0"  # it ended by itself
    assert f"kept the volumes {', '.join(sorted(volumes))}" in said
    assert (project.objects("container"), project.objects("network")) == (set(), set())
    assert project.objects("volume") == volumes
    running.corral("down", "--volumes", "--yes")
    assert project.objects("volume") == set()


def _ends(project: str, since: float) -> list[tuple[str, str]]:
    """Containers of a project that ended since then, in order, with their exit codes."""
    filters = ["--filter", "event=die", "--filter", f"label=com.docker.compose.project={project}"]
    form = "{{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}"
    said = docker("events", "--since", str(since), "--until", str(time.time()), *filters, "--format", form)
    return [(name, code) for name, code in map(str.split, said.splitlines())]


# --- hosts behind ssh ------------------------------------------------------------------------------------------------


@pytest.fixture
def far_host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A real sshd on loopback, `corral-test` to ssh; the environment in which corral reaches it."""
    with Sshd("corral-test", tmp_path / "sshd") as sshd:
        yield client_config([sshd], tmp_path / "ssh_config")


@pytest.mark.needs("sshd")
@pytest.mark.skipif(os.getuid() != 0, reason="sshd and mounts need root")
def test_a_host_behind_ssh_is_brought_up_and_a_full_disk_there_loses_nothing(
    site: Site, far_host: dict[str, str]
) -> None:
    far = site.folder / "far"
    plain = site.inventory.read_text()
    site.edit("models_dir:", f"ssh: corral-test, folder: {far}, models_dir:")
    site.environment.update(far_host)
    try:
        said = site.corral("up", "--render")
        assert said.rstrip().splitlines()[-1].startswith("base URL:")
        assert site.client.chat_text() == KNOWN_ANSWER
        assert (far / "secrets").stat().st_mode & 0o777 == 0o700
        assert (far / ".env").stat().st_mode & 0o777 == 0o600
        assert "nothing to do" in site.corral("up")
        _fill_and_try(site, far)
        site.corral("down", "--volumes", "--yes")
        assert site.project.objects("container") == set()
    finally:
        site.environment.clear()
        site.inventory.write_text(plain)
        site.corral("render", "--quiet")


def _fill_and_try(site: Site, far: Path) -> None:
    """Lays a full file system over the far folder; what was there is as it was, and the containers run on."""
    before, old = site.ids(), (far / "haproxy" / "haproxy.cfg").read_bytes()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=755", "tmpfs", far], check=True)
    try:
        (far / "haproxy").mkdir()
        (far / "haproxy" / "haproxy.cfg").write_bytes(old)
        _fill(far / "filler")
        site.edit("depth: 10", "depth: 12")
        said = site.corral("up", "--render", code=1)
        assert "the disk is full; nothing was changed there" in said
        assert (far / "haproxy" / "haproxy.cfg").read_bytes() == old
        assert site.ids() == before
    finally:
        subprocess.run(["umount", far], check=True)
    site.edit("depth: 12", "depth: 10")
    site.corral("render", "--quiet")


def _fill(path: Path) -> None:
    """Writes a file until the disk is full."""
    facts = os.statvfs(path.parent)
    path.write_bytes(bytes(facts.f_bavail * facts.f_frsize))
    with pytest.raises(OSError, match="No space left"):
        path.with_suffix(".more").write_bytes(bytes(1))


def test_an_unreachable_host_is_named(site: Site, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"Host corral-nowhere\n    HostName 127.0.0.1\n    Port {free_port()}\n")
    plain = site.inventory.read_text()
    site.edit("models_dir:", "ssh: corral-nowhere, models_dir:")
    try:
        said = site.corral("up", "--render", code=1, CORRAL_SSH_CONFIG=str(config))
        assert f"{HOST}: ssh corral-nowhere does not connect" in said
    finally:
        site.inventory.write_text(plain)
        site.corral("render", "--quiet")
