"""A small farm for `up` and its kin, run through the command line as a person would, gone afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.render.secrets import read_env
from tests.compose import command
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, Project
from tests.processes.helpers import Process
from tests.tiny_models import make_chat_model

HOST = "ua"
SITE = f"{PREFIX}up"
PORT = 21000
RUN_LIMIT_S = 400
CORRAL = (sys.executable, "-c", "import sys; from corral.cli import main; sys.exit(main())")
INVENTORY = """\
schema_version: 1
name: {site}
hosts:
  {host}: {{address: 127.0.0.1, models_dir: {models}}}   # one machine
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}}
pools:
  chat:
    model: tiny
    on: {{host: {host}, replicas: 2}}
    engine: {{slots: 2, threads: 1, memory_mib: 512}}
  solo:
    model: tiny
    short: solo
    on: {{host: {host}}}
    ports: 21150
    engine: {{slots: 2, threads: 1, memory_mib: 512}}
gateway: {{host: {host}, port: 21000, database: false, cache: false, queue: {{depth: 10, timeout_s: 60}}}}
monitoring: {{host: {host}, port: 21090, node_exporter: false, grafana: false}}
"""


@dataclass(slots=True)
class Site:
    """An inventory in a folder of its own, and the verbs on it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def inventory(self) -> Path:
        """The inventory's file."""
        return self.folder / "inventory.yaml"

    @property
    def out(self) -> Path:
        """Where it is rendered."""
        return self.folder / "compose"

    @property
    def plan(self) -> Plan:
        """What the inventory says now."""
        return build_plan(load_inventory(self.inventory))

    @property
    def project(self) -> Project:
        """The host's Compose project in the engine."""
        return Project(self.plan, HOST, self.out, f"{SITE}-{HOST}")

    @property
    def client(self) -> Client:
        """The operator."""
        key = read_env(self.out / HOST / ".env")["LITELLM_MASTER_KEY"]
        return Client(f"http://127.0.0.1:{PORT}", key)

    def edit(self, old: str, new: str) -> None:
        """Changes the inventory's text."""
        text = self.inventory.read_text()
        assert old in text, f"{old!r} is not in\n{text}"
        self.inventory.write_text(text.replace(old, new))

    def arguments(self, *words: str) -> list[str]:
        """A verb's words for this site."""
        return [*words, "--inventory", str(self.inventory), "--out", str(self.out)]

    def corral(self, *words: str, code: int = 0, **environment: str) -> str:
        """All that a verb prints; it has to end with the given code."""
        done = command.run(self.arguments(*words), {**self.environment, **environment}, is_joined=True)
        assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def data(self, *words: str, code: int = 0) -> Any:
        """What a verb prints with `--json` on its standard output; it has to end with the given code."""
        done = command.run(self.arguments(*words, "--json"), self.environment)
        assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def start(self, *words: str) -> Process:
        """A verb in a process of its own, to be interrupted."""
        return Process([*CORRAL, *self.arguments(*words)], self.folder / "up.log", environment=dict(self.environment))

    def ids(self) -> dict[str, str]:
        """Container ids by name."""
        return self.project.ids()


@contextmanager
def site_in(folder: Path) -> Iterator[Site]:
    """A rendered site with secrets, models and images, nothing of it running; nothing of it is left afterwards."""
    models = folder / "models"
    models.mkdir()
    make_chat_model(models / "tiny.gguf", context=2048)
    site = Site(folder)
    site.inventory.write_text(INVENTORY.format(site=SITE, host=HOST, models=models))
    ensure_images([site.plan])
    site.corral("render", "--quiet")
    with site.project:
        yield site
