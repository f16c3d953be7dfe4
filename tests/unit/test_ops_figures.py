"""`figures`: the text that node-exporter reads, what stands in it, and what is said when it cannot be written."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.config.model_lock import LockedFile, ModelLock
from corral.errors import CorralError, UsageError
from corral.render.output import write
from corral.render.tree import render
from corral.runtime.docker import Container
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import Snapshot
from corral.verbs.models.local_files import STAMPS
from corral.verbs.status import figures
from corral.verbs.status.figures import FILE, FOLDER, figures_hosts, figures_of, text, write_figures
from corral.verbs.up.history import last_backups, note_backup
from tests.figures_example import EXAMPLE
from tools.catalogue import FOLDER as CATALOGUES
from tools.catalogue import metrics_in

SITE = """\
schema_version: 1
name: told
hosts:
  box: {}
models:
  tiny: {source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}
pools:
  chat: {model: tiny, on: {host: box}}
gateway: {host: box, database: false, cache: false}
monitoring: {host: box, grafana: false}
"""
SHA = "a" * 64


@pytest.fixture
def host(tmp_path: Path) -> ComposeHost:
    (tmp_path / "inventory.yaml").write_text(SITE)
    plan = plan_of(tmp_path)
    write(render(plan), tmp_path / "out")
    (tmp_path / "out" / "box" / "models").mkdir()
    return ComposeHost(plan, "box", tmp_path / "out")


def plan_of(folder: Path) -> Plan:
    return build_plan(load_inventory(folder / "inventory.yaml"))


def container(service: str, health: str = "healthy", state: str = "running", config: str = "new") -> Container:
    return Container(service, f"box-{service}", "told-box", service, "image", state, health, config_hash=config)


def seen(host: ComposeHost, *more: Container) -> Snapshot:
    """Everything runs, unless said otherwise."""
    other = {item.service: item for item in more}
    names = [service.name for service in host.services]
    found = tuple(other.get(name, container(name)) for name in names)
    return Snapshot("box", containers=found, hashes=dict.fromkeys(names, "new"))


def samples(data: bytes) -> dict[tuple[str, str], float]:
    """Values by name and the labels' values."""
    return {
        (sample.name, " ".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(data.decode())
        for sample in family.samples
    }


def told(host: ComposeHost, *more: Container) -> dict[tuple[str, str], float]:
    return samples(text(figures_of(host, seen(host, *more), render(host.plan))))


# --- the text --------------------------------------------------------------------------------------------------------


def test_the_text_says_what_was_found() -> None:
    assert samples(text(EXAMPLE)) == {
        ("corral_figures_timestamp_seconds", ""): 1.8e9,
        ("corral_figures_scheduled", ""): 1,
        ("corral_rendering_info", "0123456789abcdef fedcba9876543210 0.1.0"): 1,
        ("corral_drift", "rendering"): 0,
        ("corral_drift", "containers"): 1,
        ("corral_drift", "copy"): 0,
        ("corral_container_healthy", "box-chat-1 chat-1"): 1,
        ("corral_container_healthy", "box-haproxy haproxy"): 0,
        ("corral_container_restarts_total", "box-chat-1 chat-1"): 2,
        ("corral_container_memory_bytes", "box-chat-1 chat-1"): 100 * 2**20,
        ("corral_container_memory_limit_bytes", "box-chat-1 chat-1"): 512 * 2**20,
        ("corral_weights_verified", "qwen3.gguf qwen3"): 1,
        ("corral_weights_verified", "nomic.gguf nomic"): 0,
        ("corral_weights_checked_timestamp_seconds", "qwen3.gguf qwen3"): 1_799_990_000,
        ("corral_backup_last_success_timestamp_seconds", ""): 1_799_900_000,
        ("corral_certificate_expires_timestamp_seconds", "/etc/ssl/farm.pem"): 1_811_808_000,
        ("corral_certificate_expires_timestamp_seconds", "/etc/ssl/page.pem"): 0,
    }


def test_the_catalogue_has_what_the_kit_says_and_nothing_else() -> None:
    committed = json.loads((CATALOGUES / "corral.json").read_text(encoding="utf-8"))["metrics"]
    assert committed == metrics_in(text(EXAMPLE).decode()), "write it again with: make catalogue"


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_site_as_rendered_has_no_drift(host: ComposeHost) -> None:
    found = told(host)
    assert {kind: found["corral_drift", kind] for kind in ("rendering", "containers")} == {
        "rendering": 0,
        "containers": 0,
    }
    assert found["corral_container_healthy", "box-chat-1 chat-1"] == 1
    assert ("corral_drift", "copy") not in found
    assert ("corral_backup_last_success_timestamp_seconds", "") not in found
    assert found["corral_figures_scheduled", ""] == 0
    assert found["corral_figures_timestamp_seconds", ""] == pytest.approx(time.time(), abs=60)


def test_an_edited_inventory_is_drift_of_the_rendering(host: ComposeHost, tmp_path: Path) -> None:
    (tmp_path / "inventory.yaml").write_text(SITE.replace("context: 512", "context: 1024"))
    found = told(ComposeHost(plan_of(tmp_path), "box", host.out))
    assert (found["corral_drift", "rendering"], found["corral_drift", "containers"]) == (1, 0)


def test_a_file_edited_by_hand_is_drift_of_the_rendering(host: ComposeHost) -> None:
    before = told(host)
    with (host.rendered / "haproxy" / "haproxy.cfg").open("a") as file:
        file.write("# mine\n")
    after = told(host)
    assert (before["corral_drift", "rendering"], after["corral_drift", "rendering"]) == (0, 1)
    assert before.keys() ^ after.keys(), "another hash of the rendering"


@pytest.mark.parametrize(
    ("other", "is_healthy", "is_drift"),
    [
        (container("chat-1", config="old"), 1, 1),
        (container("chat-1", health="unhealthy"), 0, 0),
        (container("chat-1", health="starting"), 0, 0),
        (container("chat-1", health="parked"), 0, 0),
        (container("chat-1", state="exited"), 0, 0),
        (container("chat-1", health=""), 1, 0),
        (container("somebody-else"), 1, 0),
    ],
)
def test_containers_as_they_are(host: ComposeHost, other: Container, is_healthy: int, is_drift: int) -> None:
    found = told(host, other)
    assert found["corral_container_healthy", "box-chat-1 chat-1"] == is_healthy
    assert found["corral_drift", "containers"] == is_drift


def test_memory_is_told_in_bytes(host: ComposeHost) -> None:
    found = told(host, replace(container("chat-1"), memory_mib=100, wanted_mib=512, restarts=2))
    assert found["corral_container_restarts_total", "box-chat-1 chat-1"] == 2
    assert found["corral_container_memory_bytes", "box-chat-1 chat-1"] == 100 * 2**20
    assert found["corral_container_memory_limit_bytes", "box-chat-1 chat-1"] == 512 * 2**20
    assert ("corral_container_memory_limit_bytes", "box-haproxy haproxy") not in found


def test_a_missing_container_is_drift_and_not_healthy(host: ComposeHost) -> None:
    whole = seen(host)
    observed = Snapshot("box", containers=whole.containers[1:], hashes=whole.hashes)
    gone = whole.containers[0]
    found = samples(text(figures_of(host, observed, render(host.plan))))
    assert found["corral_container_healthy", f"{gone.name} {gone.service}"] == 0
    assert ("corral_container_restarts_total", f"{gone.name} {gone.service}") not in found
    assert found["corral_drift", "containers"] == 1


def test_weights_are_right_wrong_or_unknown(host: ComposeHost) -> None:
    key = ("corral_weights_verified", "tiny.gguf tiny")
    assert told(host)[key] == 0  # missing
    path = host.rendered / "models" / "tiny.gguf"
    path.write_bytes(b"GGUF")
    assert key not in told(host)  # nobody knows what it should be
    lock = ModelLock.beside(Path(host.plan.source_file))
    ModelLock(files={"tiny.gguf": LockedFile(file="tiny.gguf", size=4, sha256=SHA)}).write(lock)
    assert key not in told(host)  # nobody has read it
    for checksum, is_right in ((SHA, 1), ("b" * 64, 0)):
        stamp = [4, path.stat().st_mtime_ns, checksum, 1_799_990_000]
        (path.parent / STAMPS).write_text(json.dumps({"tiny.gguf": stamp}))
        found = told(host)
        assert found[key] == is_right
        assert found["corral_weights_checked_timestamp_seconds", "tiny.gguf tiny"] == 1_799_990_000
    os.utime(path, ns=(1, 1))
    assert key not in told(host)  # changed since


def test_a_backup_is_remembered_for_its_hosts(host: ComposeHost) -> None:
    assert last_backups(host.out) == {}
    note_backup(host.out, ["box", "other"], 100)
    note_backup(host.out, ["box"], 200)
    assert last_backups(host.out) == {"box": 200, "other": 100}
    assert told(host)["corral_backup_last_success_timestamp_seconds", ""] == 200
    assert (host.out / ".history" / ".gitignore").read_text() == "*\n"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_file_is_put_in_place_whole_and_for_everybody_to_read(
    host: ComposeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "observe_all", lambda hosts, _sections: [seen(item) for item in hosts])
    write_figures(host.plan, [host], is_scheduled=True)
    path = host.rendered / FOLDER / FILE
    assert samples(path.read_bytes())["corral_figures_scheduled", ""] == 1
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(item.name for item in path.parent.iterdir()) == ["README", FILE]


def test_every_host_that_fails_is_named_and_the_others_are_written(
    host: ComposeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ComposeHost(host.plan, "box", tmp_path / "elsewhere")
    monkeypatch.setattr(
        figures, "observe_all", lambda _hosts, _sections: [Snapshot("box", problem="no engine"), seen(host), seen(host)]
    )
    with pytest.raises(CorralError) as caught:
        write_figures(host.plan, [host, lost, host])
    first, second = str(caught.value).splitlines()
    assert first == "box: no engine"
    assert f"{lost.folder}/{FOLDER}/{FILE} cannot be written" in second
    assert "./generate.py up --host box makes the folder" in second
    assert (host.rendered / FOLDER / FILE).is_file()


def test_a_site_without_node_exporter_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inventory.yaml").write_text(SITE.replace("grafana: false", "grafana: false, node_exporter: false"))
    with pytest.raises(UsageError, match=r"monitoring\.node_exporter"):
        figures_hosts(plan_of(tmp_path), tmp_path)
    assert main(["figures", "--inventory", str(tmp_path / "inventory.yaml"), "--out", str(tmp_path)]) == 2
    assert "node-exporter reads the figures, and this site has none" in capsys.readouterr().err
