"""`models pull | verify | ls | inspect` with real GGUF files from a server on loopback (004-28)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from corral.cli import main
from corral.config.model_lock import ModelLock
from corral.verbs.models.fetch import part_of
from tests.model_files import make_embedding_model
from tests.model_stores import put_in_hub
from tests.tiny_models import make_chat_model
from tests.weight_server import Shop, weight_server

INVENTORY = """
schema_version: 1
name: farm
hosts:
  box: {address: 192.0.2.10, models_dir: MODELS}
models:
  chat: {source: "hf:o/r/sub/tiny-Q8_0.gguf", kind: chat, context: 2048}
  embed: {source: "WEB/embed.gguf", kind: embedding, context: 512}
pools:
  chat: {model: chat, on: {host: box}, engine: {slots: 2}}
  embed: {model: embed, on: {host: box}}
gateway: {host: box}
"""


@dataclass(frozen=True)
class Made:
    """Two model files."""

    chat: bytes
    embed: bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    make_chat_model(folder / "chat.gguf", weight_type="q8_0")
    make_embedding_model(folder / "embed.gguf")
    return Made((folder / "chat.gguf").read_bytes(), (folder / "embed.gguf").read_bytes())


class Site:
    """A folder with an inventory, a shop with its models, and the command line."""

    def __init__(self, folder: Path, shop: Shop, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.shop = shop
        self.models = folder / "models"
        self.capsys = capsys
        shop.put_hub("o/r", "sub/tiny-Q8_0.gguf", made.chat)
        shop.put("/embed.gguf", made.embed)
        self.write(INVENTORY)

    def write(self, text: str) -> None:
        words = text.replace("MODELS", str(self.models)).replace("WEB", self.shop.address)
        (self.folder / "inventory.yaml").write_text(words)

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main(["models", *arguments])
        said = self.capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return code, said.out, said.err

    @property
    def lock(self) -> ModelLock:
        return ModelLock.read(self.folder / "models.lock.json")

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self("ls", "--json")[1])
        return found


@pytest.fixture
def site(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mask = os.umask(0o022)
    with weight_server() as shop:
        monkeypatch.setenv("HF_ENDPOINT", shop.address)
        yield Site(tmp_path, shop, made, capsys)
    os.umask(mask)


def test_pull_fetches_checks_and_pins(site: Site, made: Made) -> None:
    code, out, err = site("pull")
    assert (code, out) == (0, "")
    assert "2 files are there and as models.lock.json says; 2 were fetched" in err
    assert (site.models / "tiny-Q8_0.gguf").read_bytes() == made.chat
    assert (site.models / "embed.gguf").read_bytes() == made.embed
    locked = site.lock.files["hf:o/r/sub/tiny-Q8_0.gguf"]
    assert locked.sha256 == hashlib.sha256(made.chat).hexdigest()
    assert locked.commit == "1" * 40
    assert locked.gguf is not None
    assert (locked.gguf.architecture, locked.gguf.quantization, locked.gguf.layers) == ("llama", "Q8_0", 2)
    before = (site.folder / "models.lock.json").read_bytes()
    sent = site.shop.sent
    assert "0 were fetched" in site("pull")[2]
    assert site.shop.sent == sent, "a second run fetches nothing"
    assert (site.folder / "models.lock.json").read_bytes() == before
    assert not [path for path in site.models.iterdir() if ".part" in path.name]


def test_the_lock_pins_the_commit(site: Site, made: Made) -> None:
    site("pull")
    site.shop.put("/o/r/resolve/main/sub/tiny-Q8_0.gguf", b"something else")
    shutil.rmtree(site.models)
    site.shop.seen.clear()
    assert site("pull")[0] == 0, "the commit still has it"
    assert (site.models / "tiny-Q8_0.gguf").read_bytes() == made.chat
    assert "/o/r/resolve/main/sub/tiny-Q8_0.gguf" not in {path for path, _ in site.shop.seen}


def test_another_content_at_the_source_is_refused_until_told(site: Site, made: Made) -> None:
    site("pull")
    site.shop.put("/embed.gguf", made.chat)
    (site.models / "embed.gguf").unlink()
    code, _, err = site("pull")
    assert code == 1
    assert "expected" in err
    assert not (site.models / "embed.gguf").exists()
    assert site("pull", "--update")[0] == 0
    assert (site.models / "embed.gguf").read_bytes() == made.chat
    assert site.lock.files[f"{site.shop.address}/embed.gguf"].sha256 == hashlib.sha256(made.chat).hexdigest()
    site.shop.put("/embed.gguf", made.embed)
    assert site("pull", "--update")[0] == 0
    assert (site.models / "embed.gguf").read_bytes() == made.embed, "also in the place of a file that is as pinned"


def test_verify_finds_one_flipped_bit_and_pull_repairs_it(site: Site, made: Made) -> None:
    site("pull")
    code, out, _ = site("verify")
    assert code == 0
    assert "2 of 2 files are as pinned, to the last bit" in out
    path = site.models / "tiny-Q8_0.gguf"
    stamp = path.stat()
    damaged = bytearray(made.chat)
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    code, out, _ = site("verify")
    assert code == 1
    assert "DAMAGED" in out
    assert "1 of 2 files" in out
    assert [row["state"] for row in site.rows()] == ["damaged", "verified"]
    assert "is damaged or another file; fetching it again" in site("pull")[2]
    assert path.read_bytes() == made.chat
    assert site("verify")[0] == 0


def test_ls_says_who_uses_what(site: Site, made: Made) -> None:
    before = site.rows()
    assert [(row["model"], row["state"], row["used_by"]) for row in before] == [
        ("chat", "missing", ["chat"]),
        ("embed", "missing", ["embed"]),
    ]
    site("pull", "chat")
    chat, embed = site.rows()
    assert (chat["state"], embed["state"]) == ("verified", "missing")
    assert (chat["size"], chat["quantization"], chat["context"], chat["trained"]) == (
        len(made.chat),
        "Q8_0",
        2048,
        8192,
    )
    _, out, _ = site("ls")
    assert "tiny-Q8_0.gguf" in "".join(out.split())
    assert "not there" in out


def test_inspect_reads_the_beginning_only(site: Site, made: Made) -> None:
    body = made.chat + bytes(40_000_000)
    site.shop.put_hub("o/r", "sub/tiny-Q8_0.gguf", body)
    code, _, err = site("inspect")
    assert code == 0, err
    assert site.shop.sent < len(body) // 2
    assert not site.models.exists()
    known = site.lock.files["hf:o/r/sub/tiny-Q8_0.gguf"]
    assert known.gguf is not None
    assert known.gguf.heads == (2, 2)
    assert known.sha256 == hashlib.sha256(body).hexdigest()


def test_a_cut_off_model_is_refused_even_without_a_checksum(site: Site, made: Made) -> None:
    site.shop.put("/embed.gguf", made.embed[:-100])
    code, _, err = site("pull", "embed")
    assert code == 1
    assert "is cut off" in err
    site.shop.put("/embed.gguf", b"<html>please log in</html>")
    assert "is not a GGUF file" in site("pull", "embed")[2]
    assert not (site.models / "embed.gguf").exists()
    assert not part_of(site.models / "embed.gguf").exists()


def test_fallback_takes_another_quantization_and_the_plan_knows(site: Site, made: Made) -> None:
    site.shop.files.clear()
    site.shop.put("/embed.gguf", made.embed)
    site.shop.put_hub("o/r", "sub/tiny-Q4_K_M.gguf", made.chat)
    code, _, err = site("pull")
    assert code == 1
    assert "the source has no such file" in err
    assert (site.models / "embed.gguf").exists(), "the others are fetched all the same"
    code, _, err = site("pull", "--fallback", "Q4_K_M")
    assert code == 0
    assert "taking tiny-Q4_K_M.gguf for it" in err
    assert (site.models / "tiny-Q4_K_M.gguf").read_bytes() == made.chat
    assert main(["render"]) == 0
    rendered = (site.folder / "compose/box/llama/compose.yaml").read_text()
    assert "/models/tiny-Q4_K_M.gguf" in rendered
    assert site("pull")[0] == 0
    assert site("verify")[0] == 0


def test_offline_takes_from_a_folder_and_asks_nobody(site: Site, made: Made) -> None:
    stick = site.folder / "stick"
    (stick / "o/r/sub").mkdir(parents=True)
    (stick / "o/r/sub/tiny-Q8_0.gguf").write_bytes(made.chat)
    code, _, err = site("pull", "--from", str(stick))
    assert code == 1
    assert f"embed.gguf is not in {stick}" in err
    (stick / "embed.gguf").write_bytes(made.embed)
    assert site("pull", "--from", str(stick))[0] == 0
    assert not site.shop.seen
    (stick / "embed.gguf").write_bytes(made.chat[: len(made.embed)].ljust(len(made.embed), b"x"))
    (site.models / "embed.gguf").unlink()
    assert "damaged on the way, or another file" in site("pull", "--from", str(stick))[2]
    assert site("pull", "--from", "nowhere")[0] == 2


def test_local_files_and_bare_names(site: Site, made: Made) -> None:
    (site.folder / "mine.gguf").write_bytes(made.chat)
    text = INVENTORY.replace("hf:o/r/sub/tiny-Q8_0.gguf", f"file:{site.folder}/mine.gguf").replace("WEB/", "")
    site.write(text)
    code, _, err = site("pull")
    assert code == 1
    assert f"embed.gguf: is not there; put it into {site.models}" in err
    assert (site.models / "mine.gguf").read_bytes() == made.chat
    (site.models / "embed.gguf").write_bytes(made.embed)
    assert site("pull")[0] == 0
    assert site.lock.files["embed.gguf"].sha256 == hashlib.sha256(made.embed).hexdigest()


def test_a_disk_that_is_too_small_is_said_before_anything_comes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=(256 << 20) + 1_000_000))
    code, _, err = site("pull")
    assert code == 1
    assert "GiB are missing; nothing was fetched" in err
    assert "the largest is embed.gguf" in err
    assert not list(site.folder.glob("models/*"))


def test_slips_are_usage_errors(site: Site) -> None:
    assert site("pull", "caht")[0] == 2
    assert 'did you mean "chat"?' in site("ls", "caht")[2]
    assert site("ls", "--host", "bxo")[0] == 2


def test_a_broken_lock_is_explained(site: Site) -> None:
    (site.folder / "models.lock.json").write_text('{"version": 1, "files": {"x": {"file": "a/../b"}}}')
    code, _, err = site("ls")
    assert code == 1
    assert "models.lock.json: files.x.file" in err
    assert main(["check"]) == 1


# --- killed at any moment ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_moment_nothing_looks_complete(site: Site, made: Made) -> None:
    """SIGKILL after so many bytes were sent; then a run to the end."""
    body = made.chat + bytes(8_000_000)
    for sent in (300_000, 3_000_000, len(body)):
        shutil.rmtree(site.models, ignore_errors=True)
        (site.folder / "models.lock.json").unlink(missing_ok=True)
        site.shop.put_hub("o/r", "sub/tiny-Q8_0.gguf", body)
        _kill_after(site, sent)
        for path in site.models.glob("*.gguf"):
            assert path.read_bytes() == (body if path.name.startswith("tiny") else made.embed), "a name means whole"
        site.shop.sent = 0
        assert site("pull")[0] == 0
        assert (site.models / "tiny-Q8_0.gguf").read_bytes() == body
        assert site("verify")[0] == 0


def _kill_after(site: Site, sent: int) -> None:
    site.shop.sent = 0
    process = _start(site)
    _wait(lambda: (site.shop.sent >= sent and bool(site.shop.seen)) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait(30)


@pytest.mark.slow
def test_an_interrupted_pull_ends_at_once_and_goes_on_later(site: Site, made: Made) -> None:
    pause = threading.Event()
    site.shop.put_hub("o/r", "sub/tiny-Q8_0.gguf", made.chat, pause=pause)
    process = _start(site, "chat")
    _wait(lambda: part_of(site.models / "tiny-Q8_0.gguf").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    pause.set()
    assert not (site.models / "tiny-Q8_0.gguf").exists()
    assert site("pull", "chat")[0] == 0
    assert (site.models / "tiny-Q8_0.gguf").read_bytes() == made.chat


def _start(site: Site, *names: str) -> subprocess.Popen[bytes]:
    script = "import sys; from corral.cli import main; sys.exit(main())"
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", script, "models", "pull", *names],
        cwd=site.folder, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _wait(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- a host behind ssh ------------------------------------------------------------------------------------------------

STAND_IN = """#!/bin/sh
# ssh as far as the kit uses it: everything after `--` is one command line for the far shell
while [ "$1" != -- ]; do shift; done
shift
cd "$FAR_HOME" && exec sh -c "$*"
"""


@pytest.fixture
def far(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A far host's home; its files are here, its commands go through a stand-in for ssh."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(STAND_IN)
    (tmp_path / "bin/ssh").chmod(0o755)
    home = tmp_path / "far"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAR_HOME", str(home))
    site.write(INVENTORY.replace("models_dir: MODELS", "models_dir: ./models, ssh: user@192.0.2.10"))
    return home / "corral/farm/box/models"


def test_a_far_host_gets_copies_and_never_a_login(site: Site, made: Made, far: Path) -> None:
    assert [row["state"] for row in site.rows()] == ["missing", "missing"]
    code, _, err = site("pull")
    assert code == 0, err
    assert (far / "tiny-Q8_0.gguf").read_bytes() == made.chat
    assert (far / "embed.gguf").read_bytes() == made.embed
    assert [row["state"] for row in site.rows()] == ["there", "there"]
    assert site("verify")[0] == 0
    sent = site.shop.sent
    assert "0 were fetched" in site("pull")[2]
    assert site.shop.sent == sent


def test_damage_on_a_far_host_is_found_and_repaired_from_the_store(site: Site, made: Made, far: Path) -> None:
    site("pull")
    damaged = bytearray(made.embed)
    damaged[-1] ^= 1
    (far / "embed.gguf").write_bytes(damaged)
    assert site("verify")[0] == 1
    sent = site.shop.sent
    assert site("pull")[0] == 0
    assert (far / "embed.gguf").read_bytes() == made.embed
    assert site.shop.sent - sent <= 1, "the store had it: one byte to see that the source is there"


def test_a_copy_that_broke_goes_on(site: Site, made: Made, far: Path) -> None:
    sha256 = hashlib.sha256(made.chat).hexdigest()
    far.mkdir(parents=True)
    (far / f".tiny-Q8_0.gguf.{sha256[:16]}.part").write_bytes(made.chat[:1000])
    assert site("pull", "chat")[0] == 0
    assert (far / "tiny-Q8_0.gguf").read_bytes() == made.chat
    (far / "tiny-Q8_0.gguf").unlink()
    (far / f".tiny-Q8_0.gguf.{sha256[:16]}.part").write_bytes(bytes(1000))
    code, _, err = site("pull", "chat")
    assert code == 1
    assert "did not arrive whole" in err
    assert not list(far.glob("*.gguf"))
    assert site("pull", "chat")[0] == 0


def test_files_that_a_far_host_has_in_stores_are_read_there(site: Site, made: Made, far: Path, tmp_path: Path) -> None:
    put_in_hub(tmp_path / "hub", "o/r", {"sub/tiny-Q8_0.gguf": made.chat})
    (tmp_path / "nas").mkdir()
    (tmp_path / "nas" / "mine.gguf").write_bytes(made.embed)
    text = (site.folder / "inventory.yaml").read_text().replace(f"{site.shop.address}/embed.gguf", "mine.gguf")
    stores = f"model_stores: {{hub: {tmp_path}/hub, nas: {tmp_path}/nas}}"
    site.write(text.replace("models_dir: ./models", f"models_dir: ./models, {stores}"))
    code, _, err = site("pull")
    assert code == 0, err
    assert site.shop.sent == 0
    assert not far.exists()
    lock = site.lock.files
    assert lock["hf:o/r/sub/tiny-Q8_0.gguf"].places["box"].startswith("hub/models--o--r/snapshots/")
    assert lock["mine.gguf"].places == {"box": "nas/mine.gguf"}
    assert [bool(item.gguf and item.sha256 and item.size) for item in lock.values()] == [True, True]
    assert site("verify")[0] == 0
    (tmp_path / "nas" / "mine.gguf").write_bytes(made.embed[:-1] + b"x")
    assert "is not the file that models.lock.json has" in site("pull")[2]


def test_a_checksum_in_the_inventory_is_what_the_file_must_have(site: Site, made: Made) -> None:
    right = hashlib.sha256(made.embed).hexdigest()
    wrong = "ab" * 32
    site.write(INVENTORY.replace('embed.gguf", kind', f'embed.gguf", sha256: {wrong}, kind'))
    code, _, err = site("pull", "embed")
    assert code == 1
    assert wrong[:8] in err or "checksum" in err
    assert not (site.models / "embed.gguf").exists()
    site.write(INVENTORY.replace('embed.gguf", kind', f'embed.gguf", sha256: {right}, kind'))
    assert site("pull", "embed")[0] == 0
    site.write(INVENTORY.replace('embed.gguf", kind', f'embed.gguf", sha256: {wrong}, kind'))
    code, _, err = site("pull", "embed")
    assert code == 1
    assert "sha256 in the inventory is not what models.lock.json says" in err
