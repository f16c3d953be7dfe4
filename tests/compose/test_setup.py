"""The first hour, with the real engine: from an inventory and from another gateway to running services."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import httpx
import pytest

from corral.build import build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.render.compose import project_name
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, Project, make_models
from tests.needs import postgres_folder
from tests.processes.farm import search_path
from tests.processes.helpers import Process, free_port, wait_until
from tests.processes.test_database import PASSWORDS, Database
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "postgres", "prisma-engine")

HOST = "pas"
PORT, ADMIN_PORT = 22100, 22102
# What a key had spent at the old gateway, in dollars.
OLD_SPEND = 1.5
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
    inventory = fresh.out.parent / "site.yaml"
    inventory.write_text(SITE.replace("database: false, ", ""))
    moved = Project(build_plan(load_inventory(inventory)), HOST, fresh.out, fresh.name)
    ensure_images([moved.plan])
    assert setup(fresh) == 0
    assert client.chat_text() == KNOWN_ANSWER
    keys_of_another_gateway_are_carried_over(moved, capsys)


def keys_of_another_gateway_are_carried_over(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """A LiteLLM that ran elsewhere with its own database; a client keeps its key, and the key what it has spent."""
    folder = project.out.parent
    place = ["--inventory", str(folder / "site.yaml"), "--out", str(project.out)]
    client = Client(f"http://127.0.0.1:{PORT}", project.secrets["LITELLM_MASTER_KEY"])
    own = client.admin(ADMIN_PORT).send("POST", "/key/generate", {"key_alias": "own"}).json()["key"]
    dump, old = old_gateway(folder)

    wrong = folder / "wrong.dump"
    wrong.write_bytes(b"CREATE TABLE ...")
    assert main(["keys", "import", str(wrong), *place]) == 1
    assert "is no dump in PostgreSQL's own format" in capsys.readouterr().err
    wrong.write_bytes(dump.read_bytes()[:4000])
    assert main(["keys", "import", str(wrong), *place]) == 1
    assert "is damaged, or no dump" in capsys.readouterr().err
    aside = "ALTER SCHEMA public RENAME TO before_import; CREATE SCHEMA public"  # as a run that was killed leaves it
    project.docker("exec", f"{HOST}-postgres", "psql", "--username", "litellm", "--dbname", "corral", "-c", aside)
    assert main(["keys", "import", str(dump), *place]) == 2
    assert "the gateway has 1 keys, which would be lost" in capsys.readouterr().err
    wrong.write_bytes(dump.read_bytes()[:-2000])
    assert main(["keys", "import", str(wrong), "--replace", *place]) == 1
    assert "the database is as it was" in capsys.readouterr().err

    assert main(["up", *place]) == 0
    assert Client(client.base, own).chat_text() == KNOWN_ANSWER
    assert main(["keys", "import", str(dump), "--replace", *place]) == 0
    said = capsys.readouterr().err
    assert "1 keys and 0 teams" in said
    assert "keys name models that this farm does not have: gone; add aliases" in said
    assert main(["up", *place]) == 0
    assert Client(client.base, old).chat_text() == KNOWN_ANSWER
    assert Client(client.base, own).chat().status_code == httpx.codes.UNAUTHORIZED
    info = client.admin(ADMIN_PORT).send("GET", f"/key/info?key={old}").json()["info"]
    assert (info["key_alias"], info["spend"] >= OLD_SPEND) == ("friend", True)


def old_gateway(folder: Path) -> tuple[Path, str]:
    """A dump of its database, and a key that it has given out."""
    port = free_port()
    (folder / "old.yaml").write_text("model_list: []\n")
    with TemporaryDirectory(prefix="corral-test-") as name:
        Path(name).chmod(0o755)  # for the account that root lends to PostgreSQL
        database = Database(Path(name))
        url = f"postgresql://litellm:{quote(PASSWORDS['litellm'], safe='')}@127.0.0.1:{database.port}/corral"
        environment = {
            "PATH": search_path(),
            "DATABASE_URL": url,
            "LITELLM_MASTER_KEY": "sk-old",
            "LITELLM_SALT_KEY": "s",
        }
        words = ["litellm", "--config", str(folder / "old.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        with database.server():
            database.wait()
            with Process(words, folder / "old.log", environment=environment):
                old = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
                wait_until(lambda: answers(old), 180, "the old gateway is ready")
                wanted = {"key_alias": "friend", "models": ["chat", "gone"], "spend": OLD_SPEND}
                made = old.post("/key/generate", json=wanted, headers={"Authorization": "Bearer sk-old"})
                key = str(made.raise_for_status().json()["key"])
            program = postgres_folder()
            assert program is not None
            command = [str(program / "pg_dump"), "--format", "custom", "--file", str(folder / "old.dump"), url]
            subprocess.run(command, check=True, timeout=60)
    return folder / "old.dump", key


def answers(client: httpx.Client) -> bool:
    with suppress(httpx.HTTPError):
        return client.get("/health/readiness").status_code == httpx.codes.OK
    return False
