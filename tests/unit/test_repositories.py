"""Whole repositories, as vLLM and LocalAI read them: `models pull` fetches them at a commit, and nothing that runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.config.model_lock import ModelLock
from corral.runtime.hosts import ComposeHost
from tests.unit.test_models import STAND_IN
from tests.weight_server import Shop, weight_server

COMMIT, OTHER = "1" * 40, "2" * 40
INVENTORY = f"""
schema_version: 1
name: farm
hosts:
  box: {{address: 192.0.2.10, models_dir: MODELS, gpus: {{card: rtx-3090, count: 2}}}}
models:
  words:
    source: hf:o/words
    revision: "{COMMIT}"
    kind: chat
    server: vllm
    adapters: [{{name: sql, source: hf:o/sql, revision: "{OTHER}"}}, {{name: law, source: law}}]
  paint: {{source: hf:o/paint, revision: "{COMMIT}", kind: image, size_gib: 5}}
pools:
  chat: {{model: words, on: {{host: box, gpus: 1}}}}
  pictures: {{model: paint, on: {{host: box, gpus: 2}}}}
gateway: {{host: box}}
"""
WORDS = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "model-00001-of-00001.safetensors": b"weights of words",
    "pytorch_model.bin": b"a pickle",
    "modeling_words.py": b"import os",
    "README.md": b"read me",
    ".gitattributes": b"*.bin",
}
PAINT = {
    "model_index.json": b"{}",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"weights of a picture",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "all_in_one.safetensors": b"the same weights again",
}
SQL = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights of an adapter"}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A Hub with three repositories; the inventory lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path("inventory.yaml").write_text(INVENTORY.replace("MODELS", str(tmp_path / "models")))
    with weight_server() as opened:
        monkeypatch.setenv("HF_ENDPOINT", opened.address)
        for name, files, commit in (("words", WORDS, COMMIT), ("paint", PAINT, COMMIT), ("sql", SQL, OTHER)):
            opened.put_repository(f"o/{name}", files, commit)
        yield opened


def plan() -> Plan:
    return build_plan(load_inventory(Path("inventory.yaml")))


def below(folder: Path) -> dict[str, bytes]:
    """Content by path; without what the kit notes of checks."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_folders_are_filled_and_pinned_and_nothing_else_is_fetched(shop: Shop, tmp_path: Path) -> None:
    assert ComposeHost(plan(), "box", Path("compose")).model_sources == {
        "o--words--111111111111": "hf:o/words",
        "o--sql--222222222222": "hf:o/sql",
        "o--paint--111111111111": "hf:o/paint",
    }
    assert main(["models", "pull"]) == 0
    found = below(tmp_path / "models")
    assert found == {
        "o--words--111111111111/config.json": b"{}",
        "o--words--111111111111/tokenizer.model": b"pieces",
        "o--words--111111111111/model-00001-of-00001.safetensors": b"weights of words",
        "o--sql--222222222222/adapter_config.json": b"{}",
        "o--sql--222222222222/adapter_model.safetensors": b"weights of an adapter",
        "o--paint--111111111111/model_index.json": b"{}",
        "o--paint--111111111111/unet/config.json": b"{}",
        "o--paint--111111111111/unet/diffusion_pytorch_model.fp16.safetensors": b"weights of a picture",
    }
    lock = ModelLock.read(Path("models.lock.json"))
    assert {known.file: known.sha256 for known in lock.files.values()} == {
        path: hashlib.sha256(data).hexdigest() for path, data in found.items()
    }
    assert ComposeHost(plan(), "box", Path("compose")).model_sources.keys() == found.keys()
    sent = shop.sent
    assert main(["models", "pull"]) == 0
    assert shop.sent == sent, "a second run fetches nothing"


def test_a_changed_file_is_noticed_on_the_host_and_at_the_source(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "pull"]) == 0
    weights = tmp_path / "models/o--paint--111111111111/unet/diffusion_pytorch_model.fp16.safetensors"
    weights.write_bytes(b"weights of a trojan!")
    assert main(["models", "verify"]) == 1
    weights.unlink()
    shop.put_repository("o/paint", {**PAINT, "unet/diffusion_pytorch_model.fp16.safetensors": b"others"}, COMMIT)
    capsys.readouterr()
    assert main(["models", "pull"]) == 1
    assert "another file now than models.lock.json" in " ".join(capsys.readouterr().err.split())
    assert not weights.exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"a pickle"}, "has no .safetensors files"),
        ({**WORDS, "../../evil.json": b"{}"}, "may lead outside of its folder"),
        ({**WORDS, "/etc/evil.json": b"{}"}, "may lead outside of its folder"),
    ],
)
def test_pickles_alone_and_ways_out_of_the_folder_are_refused(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], words: str
) -> None:
    shop.put_repository("o/words", files, COMMIT)
    assert main(["models", "pull", "words"]) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert below(tmp_path / "models") == {}


def test_a_folder_that_a_person_has_brought_is_taken_without_a_network(shop: Shop, tmp_path: Path) -> None:
    for name, data in {**PAINT, "config.json": b"not this one"}.items():
        path = tmp_path / "disk" / "o" / "paint" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert main(["models", "pull", "paint", "--from", str(tmp_path / "disk")]) == 0
    assert (tmp_path / "models/o--paint--111111111111/unet/config.json").read_bytes() == b"{}"
    assert shop.seen == []


def services(tmp_path: Path, more: str) -> dict[str, tuple[str, ...]]:
    (tmp_path / "inventory.yaml").write_text(INVENTORY.replace("MODELS", "/srv/models") + more)
    found = build_plan(load_inventory(tmp_path / "inventory.yaml")).contributions.services
    return {item.name: tuple(item.exceptions) for item in found if item.component in ("vllm", "image")}


def test_only_an_image_server_without_its_backend_has_a_way_out(tmp_path: Path) -> None:
    assert services(tmp_path, "") == {
        "chat-1": ("non-root", "read-only"),
        "pictures-2": ("non-root", "read-only", "way-out"),
    }
    own = (
        'images: {localai-cuda13: "corral-localai:v4", localai-cpu: "corral-localai:v4-cpu@sha256:' + "0" * 64 + '"}\n'
    )
    assert services(tmp_path, own)["pictures-2"] == ("non-root", "read-only")
    half = 'images: {localai-cuda13: "corral-localai:v4"}\n'  # the other one is for the host without its cards
    assert "way-out" in services(tmp_path, half)["pictures-2"]


def test_check_says_how_to_put_the_backend_into_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    services(tmp_path, "")
    assert main(["check"]) == 0
    said = capsys.readouterr().err
    assert "docker build -t corral-localai:v4.9.0-gpu-nvidia-cuda-13 " in said
    assert "BACKEND=quay.io/go-skynet/local-ai-backends:v4.9.0-cpu-diffusers " in said
    services(tmp_path, 'images: {localai-cuda13: "corral-localai:v4", localai-cpu: "corral-localai:v4-cpu"}\n')
    assert main(["check"]) == 0
    assert "[image-backend]" not in capsys.readouterr().err


def test_a_far_host_gets_the_folders(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(STAND_IN)
    (tmp_path / "bin/ssh").chmod(0o755)
    (tmp_path / "far").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAR_HOME", str(tmp_path / "far"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = INVENTORY.replace("models_dir: MODELS", "models_dir: ./models, ssh: user@192.0.2.10")
    Path("inventory.yaml").write_text(text)
    assert main(["models", "pull"]) == 0
    assert main(["models", "verify"]) == 0
    there = below(tmp_path / "far/corral/farm/box/models")
    assert there == below(tmp_path / "cache/corral/models")
    assert there["o--paint--111111111111/unet/diffusion_pytorch_model.fp16.safetensors"] == b"weights of a picture"
