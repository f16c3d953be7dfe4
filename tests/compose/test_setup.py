"""`setup` on this machine with its real engine: from an inventory to running services, and nothing twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.build import build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.render.compose import project_name
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, Project, make_models
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap")

HOST = "pas"
PORT = 22100
SITE = f"""\
schema_version: 1
name: {PREFIX}setup
hosts:
  {HOST}: {{address: 127.0.0.1}}
models:
  tiny: {{source: "hf:example/tiny/tiny.gguf", kind: chat, context: 512, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: {HOST}}}, engine: {{threads: 1}}}}
gateway: {{host: {HOST}, port: {PORT}, admin_port: 22102, database: false, cache: false}}
"""


@pytest.fixture
def fresh(engine: None, tmp_path: Path) -> Iterator[Project]:
    """A machine with an engine and images, and nothing else of the site."""
    (tmp_path / "site.yaml").write_text(SITE)
    plan = build_plan(load_inventory(tmp_path / "site.yaml"))
    ensure_images([plan])
    with Project(plan, HOST, tmp_path / "out", project_name(plan, HOST)) as project:
        yield project


def setup(project: Project, *options: str) -> int:
    mask = os.umask(0o022)
    try:
        return main(
            ["setup", "--inventory", str(project.out.parent / "site.yaml"), "--out", str(project.out), *options]
        )
    finally:
        os.umask(mask)


def test_from_an_inventory_to_answers_step_by_step(fresh: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup(fresh, "--dry-run") == 0
    assert not fresh.out.exists()
    assert fresh.objects("container") == set()

    assert setup(fresh) == 1
    said = capsys.readouterr().err
    assert "stopped before: model files" in said
    assert "tiny.gguf  from hf:example/tiny/tiny.gguf" in said
    assert fresh.objects("container") == set()

    make_models(fresh.plan, HOST, fresh.folder / "models")
    assert setup(fresh) == 0, capsys.readouterr().err
    assert set(fresh.states().values()) == {"healthy"}
    client = Client(f"http://127.0.0.1:{PORT}", fresh.secrets["LITELLM_MASTER_KEY"])
    assert client.chat_text() == KNOWN_ANSWER

    before, secrets = fresh.ids(), fresh.secrets
    capsys.readouterr()
    assert setup(fresh) == 0
    assert (fresh.ids(), fresh.secrets) == (before, secrets)
    assert "✓ rendering" in capsys.readouterr().err

    fresh.compose("stop", "chat-1")
    assert setup(fresh) == 0
    assert client.chat_text() == KNOWN_ANSWER
