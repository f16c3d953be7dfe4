"""`figures` against a real engine: what it writes reaches Prometheus through the real node-exporter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from corral.errors import CorralError
from corral.runtime.hosts import ComposeHost
from corral.verbs.status.figures import FILE, FOLDER, write_figures
from tests.compose import command
from tests.compose.far import Sshd, client_config
from tests.compose.images.build import ensure_images
from tests.compose.project import Project, docker, make_models, render_site
from tests.processes.helpers import wait_until

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

HOST = "fa"
STARTED = ("chat-1", "node-exporter", "prometheus")
PROMETHEUS = "http://127.0.0.1:21690"
LIMIT_S = 60
INVENTORY = """
schema_version: 1
name: corral-test-figures
hosts:
  fa: {address: 127.0.0.1}
models:
  tiny: {source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}
pools:
  chat: {model: tiny, on: {host: fa}, ports: 21610, engine: {slots: 2, threads: 1}}
gateway: {host: fa, port: 21600, admin_port: 21602, database: false, cache: false}
monitoring: {host: fa, port: 21690, grafana: false, scrape_interval_s: 5}
"""


@pytest.fixture(scope="module")
def site(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    out = tmp_path_factory.mktemp("figures")
    (out / "inventory.yaml").write_text(INVENTORY)
    plan = render_site(out / "inventory.yaml", out)
    ensure_images([plan])
    make_models(plan, HOST, out / HOST / "models")
    with Project(plan, HOST, out, ComposeHost(plan, HOST, out).project) as project:
        project.up(*STARTED)
        yield project


def corral(site: Project, *words: str, code: int = 0) -> str:
    paths = ["--inventory", str(site.out / "inventory.yaml"), "--out", str(site.out)]
    done = command.run([*words, *paths], {"NO_COLOR": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def read(expression: str, label: str) -> dict[str, float]:
    """What Prometheus knows now, by a label."""
    answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, trust_env=False, timeout=10).json()
    return {item["metric"][label]: float(item["value"][1]) for item in answer["data"]["result"]}


def wait_for(expression: str, label: str, wanted: dict[str, float]) -> None:
    wait_until(lambda: wanted.items() <= read(expression, label).items(), LIMIT_S, f"{expression} says {wanted}")


def test_figures_reach_prometheus_through_node_exporter(site: Project) -> None:
    said = corral(site, "figures")
    assert f"{HOST}: 5 services, drift: containers" in said, said  # haproxy and litellm were never started
    wait_for("corral_drift", "kind", {"rendering": 0, "containers": 1})
    wait_for("container:healthy", "service", {**dict.fromkeys(STARTED, 1.0), "haproxy": 0, "litellm": 0})
    assert set(read("corral_figures_timestamp_seconds", "host")) == {HOST}
    assert set(read("corral_container_restarts_total", "service")) == set(STARTED)
    assert 1 < read("corral_container_memory_bytes", "service")["chat-1"] / 2**20 < 1500
    assert read("host:figures_age:seconds", "host")[HOST] < 120
    assert read("node_textfile_scrape_error", "host") == {HOST: 0}


def test_an_inventory_edit_is_drift_until_it_is_rendered(site: Project) -> None:
    inventory = site.out / "inventory.yaml"
    inventory.write_text(INVENTORY.replace("context: 2048", "context: 1024"))
    try:
        assert "drift: rendering, containers" in corral(site, "figures")
        wait_for("host:drift", "kind", {"rendering": 1})
    finally:
        inventory.write_text(INVENTORY)
    corral(site, "figures", "--scheduled")
    wait_for("host:drift", "kind", {"rendering": 0})
    wait_for("corral_figures_scheduled", "host", {HOST: 1})


def test_a_stopped_service_is_not_healthy(site: Project) -> None:
    docker("stop", "--time", "1", f"{HOST}-chat-1")
    try:
        corral(site, "figures")
        wait_for("container:healthy", "service", {"chat-1": 0, "prometheus": 1})
    finally:
        docker("start", f"{HOST}-chat-1")


def test_weights_are_known_after_verify_says_so(site: Project) -> None:
    corral(site, "models", "pull")  # takes the file that lies there as it is, and pins it
    wait_for("host:weights_verified", "file", {"tiny.gguf": 1})
    path = site.folder / "models" / "tiny.gguf"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        corral(site, "models", "verify", code=1)
        wait_for("host:weights_verified", "file", {"tiny.gguf": 0})
    finally:
        path.write_bytes(good)
    corral(site, "models", "verify")
    wait_for("host:weights_verified", "file", {"tiny.gguf": 1})


def test_an_engine_that_does_not_answer_is_told_and_the_old_file_stays(
    site: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = site.folder / FOLDER / FILE
    before = path.read_bytes()
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert "Cannot connect to the Docker daemon" in corral(site, "figures", code=1)
    assert path.read_bytes() == before


@pytest.mark.needs("sshd")
@pytest.mark.skipif(os.getuid() != 0, reason="sshd needs root")
def test_a_far_hosts_file_is_written_there_and_its_copy_compared(
    site: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, out, far = tmp_path / "inventory.yaml", tmp_path / "out", tmp_path / "far"
    inventory.write_text(INVENTORY.replace("127.0.0.1}", f"127.0.0.1, ssh: corral-test, folder: {far}}}"))
    with Sshd("corral-test", tmp_path / "sshd", docker_host=os.environ.get("DOCKER_HOST", "")) as sshd:
        for name, value in client_config([sshd], tmp_path / "ssh_config").items():
            monkeypatch.setenv(name, value)
        host = ComposeHost(render_site(inventory, out), HOST, out)
        with pytest.raises(CorralError, match=rf"{far}/{FOLDER}/{FILE} cannot be written.*makes the folder"):
            write_figures(host.plan, [host])
        host.copy()
        write_figures(host.plan, [host])
        assert 'corral_drift{kind="copy"} 0.0' in (far / FOLDER / FILE).read_text()
        assert not (out / HOST / FOLDER / FILE).exists()
        inventory.write_text(inventory.read_text().replace("context: 2048", "context: 1024"))
        again = ComposeHost(render_site(inventory, out), HOST, out)
        write_figures(again.plan, [again])
        text = (far / FOLDER / FILE).read_text()
        assert 'corral_drift{kind="copy"} 1.0' in text
        assert 'corral_drift{kind="rendering"} 0.0' in text
