"""`images.lock.json` with a real registry and a real engine: a tag that is moved changes nothing here."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.image_lock import IMAGE_LOCK
from corral.config.load import load_inventory
from corral.errors import CorralError
from corral.runtime.board import Board
from corral.runtime.hosts import compose_hosts
from corral.verbs.up.up import Run, fetch_images, look
from tests.compose.project import PREFIX, Project, docker
from tests.processes.helpers import Process, free_port, wait_http
from tests.tiny_models import make_chat_model

pytestmark = pytest.mark.needs("docker-engine", "docker-registry")

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
REGISTRY = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
INVENTORY = """\
schema_version: 1
name: {site}
hosts:
  lo: {{address: 127.0.0.1, models_dir: ./models}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: lo}}}}
gateway: {{host: lo, port: {port}, database: false, cache: false, balancing: direct}}
images: {{litellm: "{litellm}", llama-cpu: "{llama}"}}
"""


@dataclass(slots=True)
class Shop:
    """A registry on loopback, and images of a few bytes that are never started."""

    address: str

    def reference(self, name: str) -> str:
        """An image's name and tag in the registry."""
        return f"{self.address}/{PREFIX}{name}:1.2"

    def put(self, name: str, content: str) -> str:
        """Gives a name to other content, in the registry too; returns the content's id."""
        made = make(self.reference(name), content)
        docker("push", "--quiet", self.reference(name))
        return made

    def digest(self, name: str) -> str:
        """What the registry calls the content that a tag names now."""
        url = f"http://{self.address}/v2/{PREFIX}{name}/manifests/1.2"
        return str(httpx.head(url, headers={"Accept": MANIFEST}).headers["Docker-Content-Digest"])

    def forget(self, name: str, digest: str) -> None:
        """Removes a content from the registry."""
        httpx.delete(f"http://{self.address}/v2/{PREFIX}{name}/manifests/{digest}").raise_for_status()


def make(reference: str, content: str) -> str:
    """Gives a name to an image with one file in the engine; returns its id."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("content")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content.encode()))
    return docker("import", "-", reference, given=buffer.getvalue()).strip()


@pytest.fixture
def shop(engine: None, tmp_path: Path) -> Iterator[Shop]:
    port = free_port()
    (tmp_path / "registry.yml").write_text(REGISTRY.format(folder=tmp_path / "registry", port=port))
    with Process(["docker-registry", "serve", tmp_path / "registry.yml"], tmp_path / "registry.log"):
        wait_http(f"http://127.0.0.1:{port}/v2/")
        yield Shop(f"127.0.0.1:{port}")
    for image in docker("image", "ls", "--all", "--quiet", "--filter", f"reference=127.0.0.1:{port}/*").split():
        docker("image", "rm", "--force", image, check=False)


@pytest.fixture
def site(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an inventory whose two images are in the registry and in its lock."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(folder)
    images = {name: shop.reference(name) for name in ("litellm", "llama")}
    for name in images:
        shop.put(name, f"first {name}")
    text = INVENTORY.format(site=f"{PREFIX}locked", port=free_port(), **images)
    (folder / "inventory.yaml").write_text(text)
    assert main(["images", "lock"]) == 0
    return folder


def plan_of(folder: Path) -> Plan:
    return build_plan(load_inventory(folder / "inventory.yaml"))


def run_of(folder: Path) -> Run:
    plan = plan_of(folder)
    return Run(plan, folder / "compose", compose_hosts(plan, folder / "compose"), Board(Console(quiet=True)))


def test_a_moved_tag_is_neither_run_nor_locked(shop: Shop, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, first = shop.reference("llama"), shop.digest("llama")
    content = docker("image", "inspect", "--format", "{{.Id}}", reference).strip()
    assert json.loads((site / IMAGE_LOCK).read_text())["images"][reference] == {"digest": first}
    assert main(["check"]) == 0
    assert "[image-lock]" not in capsys.readouterr().err
    assert main(["render"]) == 0
    assert f'image: "{reference}@{first}"' in (site / "compose/lo/llama/compose.yaml").read_text()
    assert main(["secrets", "init"]) == 0

    other = shop.put("llama", "second")
    docker("image", "rm", content)  # as on a host that never had it
    assert docker("image", "inspect", "--format", "{{.Id}}", reference).strip() == other != content
    run = run_of(site)
    look(run)
    fetch_images(run)
    with Project(run.plan, "lo", site / "compose", f"{PREFIX}locked") as project:
        project.compose("create")
        assert project.inspect("lo-chat-1")["Image"] == content

    capsys.readouterr()
    assert main(["images", "lock"]) == 1
    said = capsys.readouterr().err
    assert f"{reference}: is {shop.digest('llama')} now, and {first} in {IMAGE_LOCK}" in said
    assert "a tag was moved" in said
    assert "images lock --update" in said
    assert json.loads((site / IMAGE_LOCK).read_text())["images"][reference] == {"digest": first}
    assert main(["images", "lock", "--update"]) == 0
    assert json.loads((site / IMAGE_LOCK).read_text())["images"][reference] == {"digest": shop.digest("llama")}


def test_a_content_that_the_registry_has_lost_is_said_before_anything_is_touched(shop: Shop, site: Path) -> None:
    assert main(["render", "--quiet"]) == 0
    shop.forget("llama", shop.digest("llama"))
    docker("image", "rm", "--force", docker("image", "inspect", "--format", "{{.Id}}", shop.reference("llama")).strip())
    make(shop.reference("llama"), "somebody's own")  # the same name and tag: not taken for it
    run = run_of(site)
    look(run)
    with pytest.raises(CorralError, match=r"(?s)nothing was changed.*is not there and cannot be fetched.*images lock"):
        fetch_images(run)


def test_an_image_without_a_registry_is_locked_by_its_id(
    shop: Shop, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"{PREFIX}own:1.2"
    text = (site / "inventory.yaml").read_text()
    (site / "inventory.yaml").write_text(text.replace(shop.reference("llama"), own))
    capsys.readouterr()
    assert main(["check"]) == 0
    assert f"1 of 2 images have no digest, such as {own}" in " ".join(capsys.readouterr().err.split())
    try:
        made = make(own, "built here")
        assert main(["images", "lock"]) == 0
        known = json.loads((site / IMAGE_LOCK).read_text())["images"]
        assert known[own] == {"ids": [made]}
        assert shop.reference("llama") not in known  # what no plan names any more
        assert main(["render", "--quiet"]) == 0
        assert f'image: "{own}"' in (site / "compose/lo/llama/compose.yaml").read_text()
        look(run_of(site))
        docker("image", "rm", own)
        with pytest.raises(CorralError, match="knows it by id only"):
            _fetch(site)
        other = make(own, "built again")
        with pytest.raises(CorralError, match=rf"(?s){own} is {other}, {IMAGE_LOCK} says {made}.*images lock --update"):
            look(run_of(site))
    finally:
        docker("image", "rm", own, check=False)


def _fetch(site: Path) -> None:
    run = run_of(site)
    look(run)
    fetch_images(run)


def test_a_bundle_of_a_locked_site_is_known_by_its_ids(
    shop: Shop, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded into this engine, from which the images were taken away: it has forgotten their digests."""
    references = {name: shop.reference(name) for name in ("litellm", "llama")}
    ids = {name: docker("image", "inspect", "--format", "{{.Id}}", ref).strip() for name, ref in references.items()}
    assert main(["render", "--quiet"]) == 0
    assert main(["secrets", "init"]) == 0
    (site / "compose/lo/models").mkdir()
    make_chat_model(site / "compose/lo/models/tiny.gguf", context=2048)
    shop.put("llama", "second")  # the lock still names the first
    assert main(["bundle", "--without-kit", "--to", "parcel"]) == 0
    docker("image", "rm", "--force", *ids.values(), references["llama"])

    (tmp_path / "island").mkdir()
    monkeypatch.chdir(tmp_path / "island")
    assert main(["bundle", "load", str(site / "parcel"), "--unsigned"]) == 0
    known = json.loads((tmp_path / "island" / IMAGE_LOCK).read_text())["images"]
    assert known == {reference: {"ids": [ids[name]]} for name, reference in references.items()}
    assert main(["diff"]) == 0
    run = run_of(tmp_path / "island")
    look(run)
    images = {item.service.image: item.image_id for item in run.seen["lo"].found.values()}
    assert images == {reference: ids[name] for name, reference in references.items()}
    make(references["llama"], "third")
    with pytest.raises(CorralError, match=r"(?s)nothing was changed: the image .*bundle load"):
        look(run)
