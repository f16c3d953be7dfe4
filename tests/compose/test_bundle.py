"""`bundle` and `bundle load`: a site in an engine that reaches nothing, brought there as files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.render.secrets import read_env
from tests.compose.engines import Engine
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, patiently
from tests.processes.helpers import REPOSITORY
from tests.tiny_models import KNOWN_ANSWER, make_chat_model

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "network-namespaces")

HOST = "bu"
SITE = f"{PREFIX}bundle"
PORT = 21750
RUN_LIMIT_S = 900
START_LIMIT_S = "600"
CORRAL = (sys.executable, "-c", "import sys; from corral.cli import main; sys.exit(main())")
INVENTORY = """\
schema_version: 1
name: {site}
hosts:
  {host}: {{address: 127.0.0.1, models_dir: ./models}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: {host}}}, engine: {{slots: 2, threads: 1, memory_mib: 512}}}}
gateway: {{host: {host}, port: {port}, database: false, cache: false, balancing: direct}}
"""


@dataclass(slots=True)
class Side:
    """A machine with a checkout of the kit: where the site comes from, or where it goes."""

    folder: Path
    kit: Path
    # What stands before a command that runs there.
    words: tuple[str, ...] = ()
    docker_host: str = ""

    def run(self, *command: str, code: int = 0) -> str:
        """All that a command prints on this machine; it has to end with the given code."""
        engine = {"DOCKER_HOST": self.docker_host} if self.docker_host else {}
        environment = {**os.environ, **engine, "PYTHONPATH": str(self.kit), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [*self.words, *command], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def corral(self, *words: str, code: int = 0) -> str:
        """What a verb of the kit prints."""
        said = self.run(*CORRAL, *words, code=code)
        assert "Traceback" not in said, said
        return said


@pytest.fixture(scope="module")
def home(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Side:
    """A site that is rendered and has its models and images; nothing of it runs."""
    side = Side(tmp_path_factory.mktemp("home"), REPOSITORY)
    (side.folder / "inventory.yaml").write_text(INVENTORY.format(site=SITE, host=HOST, port=PORT))
    ensure_images([build_plan(load_inventory(side.folder / "inventory.yaml"))])
    side.corral("render", "--quiet")
    side.corral("secrets", "init")
    models = side.folder / "compose" / HOST / "models"
    models.mkdir()
    make_chat_model(models / "tiny.gguf", context=2048)
    return side


@pytest.fixture(scope="module")
def bundle(home: Side) -> Path:
    """The bundle, without wheels, which come from a registry; the kit is laid beside it instead."""
    home.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "maker")
    said = home.corral("bundle", "--without-kit", "--to", "parcel", "--sign", "maker")
    assert "parcel: complete, 2 images, 1 model files" in said
    return home.folder / "parcel"


@pytest.fixture(scope="module")
def island(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """A machine whose only network is its own loopback, with an engine that has no images, and a copy of the bundle."""
    folder = tmp_path_factory.mktemp("island")
    with Engine("island", "", folder / "engine") as engine:
        (folder / "site").mkdir()
        (folder / "signers").write_text(f"maker@example.com {(bundle.parent / 'maker.pub').read_text()}")
        enter = ("nsenter", f"--net=/run/netns/{engine.namespace}")
        side = Side(folder / "site", REPOSITORY, enter, engine.words[1])
        assert side.run("ip", "-brief", "-4", "route", "show", "default") == ""
        yield side
        if (side.folder / "inventory.yaml").exists():
            side.corral("down", "--volumes", "--yes")


def load(island: Side, bundle: Path, code: int = 0) -> str:
    return island.corral("bundle", "load", str(bundle), "--signer", str(island.folder.parent / "signers"), code=code)


def test_a_bundle_has_no_secret_and_names_images_by_id_and_models_by_checksum(home: Side, bundle: Path) -> None:
    values = [value.encode() for value in read_env(home.folder / "compose" / HOST / ".env").values()]
    small = [path for path in bundle.rglob("*") if path.is_file() and "blobs" not in path.parts]
    assert [path for path in small if any(value in path.read_bytes() for value in values)] == []
    manifest = json.loads((bundle / "manifest.json").read_text())
    references = {name for image in manifest["images"] for name in image["references"]}
    plan = build_plan(load_inventory(home.folder / "inventory.yaml"))
    assert references == {service.image for service in plan.services_of(HOST)}
    assert {image["id"] for image in manifest["images"]} == set(manifest["hosts"][HOST]["images"])
    (model,) = manifest["hosts"][HOST]["models"]
    assert (bundle / "blobs" / "sha256" / model["sha256"]).stat().st_size == model["size"]
    home.run("sha256sum", "--check", "--quiet", "--strict", str(bundle / "SHA256SUMS"), code=1)  # from elsewhere
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=bundle, check=True, timeout=300)


def test_a_second_run_fetches_nothing_again(home: Side, bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (bundle / "blobs" / "sha256").iterdir()}
    (bundle / "SHA256SUMS").unlink()  # as a run that was killed leaves it
    said = home.corral("bundle", "--without-kit", "--to", "parcel", "--sign", "maker")
    assert "with shared layers" not in said
    assert {path: path.stat().st_mtime_ns for path in (bundle / "blobs" / "sha256").iterdir()} == before


def test_a_missing_model_and_an_outdated_rendering_are_refused(home: Side) -> None:
    model = home.folder / "compose" / HOST / "models" / "tiny.gguf"
    model.rename(model.with_suffix(".away"))
    try:
        said = home.corral("bundle", "--to", "other", code=1)
        assert f"{HOST}: model files are not there:" in said
        assert "models/tiny.gguf  from tiny.gguf" in said
    finally:
        model.with_suffix(".away").rename(model)
    inventory = home.folder / "inventory.yaml"
    text = inventory.read_text()
    inventory.write_text(text.replace("slots: 2", "slots: 3"))
    try:
        assert "differ from the inventory" in home.corral("bundle", "--to", "another", code=3)
    finally:
        inventory.write_text(text)
    assert not (home.folder / "another").exists()


def test_a_damaged_bundle_is_refused_before_anything_is_changed(bundle: Path, island: Side) -> None:
    model = json.loads((bundle / "manifest.json").read_text())["hosts"][HOST]["models"][0]["sha256"]
    blob = bundle / "blobs" / "sha256" / model
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert f"blobs/sha256/{model} is not what SHA256SUMS says" in load(island, bundle, code=1)
    finally:
        blob.write_bytes(data)
    assert list(island.folder.iterdir()) == []
    assert island.run("docker", "images", "--quiet") == ""


def test_on_an_island_it_is_loaded_comes_up_and_answers(bundle: Path, island: Side) -> None:
    model = json.loads((bundle / "manifest.json").read_text())["hosts"][HOST]["models"][0]["sha256"]
    draft = island.folder / "compose" / HOST / "models" / f".tiny.gguf.{model[:16]}.part"
    draft.parent.mkdir(parents=True)
    draft.write_bytes((bundle / "blobs" / "sha256" / model).read_bytes()[:1000])  # as a killed load leaves it
    said = load(island, bundle)
    assert "signed by maker@example.com" in said
    assert said.rstrip().splitlines()[-1] == "next: ./generate.py secrets init && ./generate.py up"
    assert not draft.exists()
    island.corral("secrets", "init")
    patiently(lambda: island.corral("up", "--timeout", START_LIMIT_S), lambda: is_healthy(island))
    key = read_env(island.folder / "compose" / HOST / ".env")["LITELLM_MASTER_KEY"]
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hello"}]})
    words = ["--header", f"Authorization: Bearer {key}", "--header", "Content-Type: application/json", "--data", body]
    answer = json.loads(island.run("curl", "--silent", *words, f"http://127.0.0.1:{PORT}/v1/chat/completions"))
    assert answer["choices"][0]["message"]["content"] == KNOWN_ANSWER
    said = island.corral("bundle", "load", str(bundle), "--unsigned")
    assert said.count(": is there") == 3
    assert said.rstrip().splitlines()[-1] == "next: ./generate.py up"


def is_healthy(side: Side) -> bool:
    states = side.run("docker", "ps", "--all", "--format", "{{.Status}}").splitlines()
    return bool(states) and all("(healthy)" in state for state in states)


def test_another_inventory_is_not_written_over(bundle: Path, island: Side) -> None:
    inventory = island.folder / "inventory.yaml"
    text = inventory.read_text()
    inventory.write_text(f"{text}# mine\n")
    try:
        assert "the bundle differs from: inventory.yaml, another one" in load(island, bundle, code=2)
        assert inventory.read_text() == f"{text}# mine\n"
    finally:
        inventory.write_text(text)
