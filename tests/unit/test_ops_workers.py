"""`workers`: what is made for a machine that dials in, as the programs on its side read it."""

from __future__ import annotations

import json
import plistlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.cli.main import main
from corral.config.load import load_inventory
from corral.render.output import write
from corral.render.secrets import FOLDER, initialise
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost
from corral.verbs.archives.backup import _secret_files

TEXT = """\
schema_version: 1
name: farm
hosts:
  box: {address: 192.0.2.1}
nodes:
  laptop: {dials_in: 2101, engine: ollama, model: llama3}
  desk: {dials_in: 2102, engine: llama.cpp, model: chat}
  server: {url: "http://192.0.2.30:8080", engine: llama.cpp, model: chat}
pools:
  chat: {on: [{node: laptop}, {node: desk}, {node: server}]}
gateway: {host: box, tunnel: {name: farm.example.com, port: 2222}}
"""
LOCAL = TEXT.replace("address: 192.0.2.1", "runtime: local, address: 127.0.0.1").replace(
    "tunnel:", "database: false, cache: false, tunnel:"
)


class Site:
    """A site on disk, not running, and the verbs on it."""

    def __init__(self, folder: Path, text: str = LOCAL) -> None:
        self.folder = folder
        self.path = folder / "inventory.yaml"
        self.write(text)

    def write(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")
        write(render(self.plan), self.folder)
        initialise(self.plan.secrets, self.folder)

    @property
    def plan(self) -> Plan:
        return build_plan(load_inventory(self.path))

    def verb(self, *words: str) -> int:
        return main(["workers", *words, "--inventory", str(self.path), "--out", str(self.folder)])

    def issue(self, name: str, *words: str) -> Path:
        there = self.folder / f"for-{name}"
        assert self.verb("issue", name, "--to", str(there), *words) == 0
        return there

    def keys(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "box" / "tunnel" / "workers").glob("*"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def ssh_settings(config: Path) -> dict[str, str]:
    """What the real ssh makes of a configuration."""
    done = subprocess.run(["ssh", "-G", "-F", config, "farm"], capture_output=True, text=True, check=True, timeout=30)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@pytest.mark.needs("sshd")
def test_ssh_knows_the_farm_by_its_key_and_the_farm_the_worker(site: Site) -> None:
    folder = site.issue("laptop")
    settings = ssh_settings(folder / "config")
    assert {name: settings[name] for name in ("hostname", "port", "stricthostkeychecking", "exitonforwardfailure")} == {
        "hostname": "farm.example.com", "port": "2222", "stricthostkeychecking": "true", "exitonforwardfailure": "yes",
    }  # fmt: skip
    assert settings["remoteforward"] == "2101 [127.0.0.1]:11434"
    own = public_half(folder / "key")
    assert own in (site.folder / "box" / "tunnel" / "workers" / "laptop-2101").read_text()
    farm = site.folder / "farm-key"
    farm.write_bytes((site.folder / "box" / FOLDER / "TUNNEL_HOST_KEY").read_bytes())
    farm.chmod(0o600)
    assert (folder / "known_hosts").read_text() == f"[farm.example.com]:2222 {public_half(farm)}\n"


def public_half(key: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def test_nobody_else_reads_the_key(site: Site) -> None:
    folder = site.issue("laptop")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key").stat().st_mode & 0o777 == 0o600


def test_another_port_of_the_server_is_used(site: Site) -> None:
    assert "127.0.0.1:1234" in (site.issue("laptop", "--port", "1234") / "config").read_text()


@pytest.mark.needs("systemd")
def test_systemd_takes_the_unit(site: Site) -> None:
    unit = site.issue("laptop") / "corral-worker-laptop.service"
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_launchd_and_compose_start_the_same_command(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    folder = site.issue("laptop")
    command = capsys.readouterr().out.strip()
    assert command == "ssh -N -F ~/corral-worker-laptop/config farm"
    agent = plistlib.loads((folder / "corral-worker-laptop.plist").read_bytes())
    assert (agent["ProgramArguments"], agent["KeepAlive"]) == (["/bin/sh", "-c", f"exec {command}"], True)
    project = yaml.safe_load((folder / "compose.yaml").read_text())
    worker = project["services"]["corral-worker-laptop"]
    assert " ".join(worker["entrypoint"]) == command.replace("~", "/root")
    assert (worker["profiles"], worker["restart"]) == (["worker"], "always")


@pytest.mark.needs("docker-compose")
def test_compose_reads_its_file(site: Site) -> None:
    folder = site.issue("laptop")
    words = ["docker", "compose", "--profile", "worker", "config", "--format", "json"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert list(json.loads(done.stdout)["services"]) == ["corral-worker-laptop"]


def test_a_key_is_issued_once_and_revoked_by_name_or_with_all(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.issue("laptop")
    site.issue("desk")
    assert site.verb("issue", "laptop", "--to", str(site.folder / "again")) == 2
    assert "workers rotate laptop" in capfd.readouterr().err
    assert not (site.folder / "again").exists()
    assert site.verb("revoke", "laptop") == 0
    assert site.keys() == ["desk-2102"]
    assert site.verb("revoke", "laptop") == 2
    assert site.verb("rotate", "laptop") == 2
    assert site.verb("revoke", "desk", "--all") == 2
    assert site.verb("revoke", "--all") == 0
    assert site.keys() == []


@pytest.mark.parametrize("name", ["server", "lap"])
def test_only_nodes_that_dial_in_get_a_key(site: Site, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert site.verb("issue", name) == 2
    assert f'no node named "{name}" dials in' in capfd.readouterr().err


def test_a_site_without_tunnel_says_what_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in TEXT.splitlines() if "dials_in" not in line]
    text = (
        "\n".join(lines)
        .replace("{node: laptop}, {node: desk}, ", "")
        .replace(", tunnel: {name: farm.example.com, port: 2222}", "")
    )
    assert Site(tmp_path, text).verb("ls") == 2
    assert "gateway.tunnel" in capfd.readouterr().err


def test_after_a_change_of_the_port_the_old_key_opens_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.issue("laptop")
    site.write(LOCAL.replace("2101", "2105"))
    capsys.readouterr()
    assert site.verb("ls", "--json") == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert next(row for row in rows if row["name"] == "laptop")["fingerprint"] is None
    words = next(item.args for item in site.plan.contributions.services if item.name == "tunnel")
    assert "laptop-2105" in words
    assert "laptop-2101" not in words


def test_the_tunnel_s_key_stays_and_workers_keys_are_in_the_backup(site: Site) -> None:
    site.issue("laptop")
    host_key = (site.folder / "box" / FOLDER / "TUNNEL_HOST_KEY").read_bytes()
    initialise(site.plan.secrets, site.folder)
    assert (site.folder / "box" / FOLDER / "TUNNEL_HOST_KEY").read_bytes() == host_key
    saved = _secret_files(site.plan, site.folder, ["box"])
    assert b"TUNNEL_SEED=" in saved["box/.env"]
    assert saved["box/tunnel/workers/laptop-2101"].startswith(b"restrict,")


def test_a_gateway_behind_ssh_gets_keys_and_loses_connections_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that reach the host are those for its folder and its container; nothing runs on this machine."""
    far, programs, said = tmp_path / "far", tmp_path / "bin", tmp_path / "said"
    programs.mkdir()
    for name, body in {"ssh": 'for last; do :; done\nexec sh -c "$last"', "docker": "exit 0"}.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{said}\n{body}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    container = SimpleNamespace(id="0123abcd", is_running=True)
    monkeypatch.setattr(ComposeHost, "container_of", lambda _self, service: container if service == "tunnel" else None)
    text = TEXT.replace("address: 192.0.2.1", f"address: 192.0.2.1, ssh: root@192.0.2.1, folder: {far}")
    site = Site(tmp_path, text)
    keys = far / "tunnel" / "workers"
    for name in ("laptop", "desk"):
        site.issue(name)
    assert {path.name: path.read_text() for path in keys.iterdir()} == {
        name: (tmp_path / "box" / "tunnel" / "workers" / name).read_text() for name in ("laptop-2101", "desk-2102")
    }
    said.write_text("")
    assert site.verb("revoke", "laptop") == 0
    assert [path.name for path in keys.iterdir()] == ["desk-2102"]
    lines = said.read_text().splitlines()
    assert all("root@192.0.2.1" in line for line in lines if line.startswith("ssh"))
    assert [line for line in lines if line.startswith("docker")] == [
        "docker exec 0123abcd sh /etc/corral/end_others.sh 2222 2102"
    ]
