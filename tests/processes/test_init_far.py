"""`init` looks at another machine over a real ssh connection, and reads the headers of its model files there."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.cli import main
from tests.compose.far import Sshd, client_config
from tests.model_headers import write_header
from tests.processes.helpers import free_port

pytestmark = pytest.mark.needs("sshd")


def test_a_far_machine_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, cache = f"corral-init-{free_port()}", tmp_path / "cache"
    for folder in (cache, tmp_path / "home"):
        folder.mkdir()
    write_header(cache / "nomic-embed-text-v1.5.Q8_0.gguf", "nomic-embed-text-v1.5")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # this machine has no models; the other one's Docker is away
    with Sshd(name, tmp_path / "sshd", docker_host=f"unix:///nowhere LLAMA_CACHE={cache}") as door:
        for variable, value in client_config([door], tmp_path / "ssh_config").items():
            monkeypatch.setenv(variable, value)
        output = str(tmp_path / "inventory.yaml")
        assert main(["init", "--host", name, "--output", output]) == 0, capsys.readouterr().err
    text = Path(output).read_text()
    assert f'ssh: "{name}"' in text
    assert f'llama: "{cache}"' in text
    assert "kind: embedding" in text
    assert "Docker does not answer" in text
    assert main(["check", "--inventory", output]) == 0


def test_a_machine_that_ssh_does_not_reach_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "inventory.yaml"
    assert main(["init", "--host", "nowhere.invalid", "--output", str(output)]) == 1
    assert "ssh nowhere.invalid does not connect" in capsys.readouterr().err
    assert main(["init", "--host", "-oProxyCommand=x", "--output", str(output)]) == 1
    assert "must be an ssh destination" in capsys.readouterr().err
    assert not output.exists()
