"""A bundle: every file under its checksum, complete or not, resumed where it stopped, the same as one file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import pytest

from corral.errors import CorralError, UsageError
from corral.load import validate
from corral.ops import bundle as making
from corral.ops.bundle import _unpacked
from corral.ops.hosts import ComposeHost
from corral.ops.parcel import SUMS, HostParts, Image, Manifest, ModelFile, Packer, opened, pack
from corral.ops.setup import model_sources
from corral.plan import build_plan
from corral.yamlsource import parse

LAYER = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(3000))
MODEL = b"GGUF" + LAYER[::-1]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def saved_image() -> bytes:
    """What `docker save` prints."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in {f"blobs/sha256/{sha256(LAYER)}": LAYER, "index.json": b"{}", "oci-layout": b"1"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make(folder: Path) -> Manifest:
    packer = Packer(folder)
    files = _unpacked(packer, io.BytesIO(saved_image()))
    packer.fetch_blob(sha256(MODEL), len(MODEL), source(MODEL))
    packer.add_file("inventory.yaml", b"schema_version: 1\n")
    image = Image(
        id=f"sha256:{sha256(b'image')}", references=("a:1",), digests=(), platform="linux/amd64", size=9, files=files
    )
    model = ModelFile(file="m.gguf", source="m.gguf", sha256=sha256(MODEL), size=len(MODEL))
    manifest = Manifest(
        format="corral-bundle/1", corral="0", site="site", made=datetime(2026, 1, 2, tzinfo=UTC), platform="",
        hosts={"sa": HostParts(images=(image.id,), models=(model,))}, images=(image,),
    )  # fmt: skip
    packer.finish(manifest)
    return manifest


def source(
    data: bytes, asked: list[int] | None = None
) -> Callable[[int], contextlib.AbstractContextManager[IO[bytes]]]:
    @contextlib.contextmanager
    def start(count: int) -> Iterator[IO[bytes]]:
        if asked is not None:
            asked.append(count)
        yield io.BytesIO(data[count:])

    return start


@pytest.fixture(params=["folder", "file"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    make(folder)
    if request.param == "folder":
        return folder
    pack(folder, tmp_path / "bundle.tar")
    assert not folder.exists()
    return tmp_path / "bundle.tar"


def test_what_was_packed_is_read(bundle: Path) -> None:
    with opened(bundle) as found:
        assert found.manifest.site == "site"
        assert found.read("inventory.yaml") == b"schema_version: 1\n"
        image, model = found.manifest.images[0], found.manifest.hosts["sa"].models[0]
        with found.blob(model.sha256) as data:
            assert data.read() == MODEL
        with tarfile.open(fileobj=found.image_archive(image), mode="r|") as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert files == {f"blobs/sha256/{sha256(LAYER)}": LAYER, "index.json": b"{}", "oci-layout": b"1"}


def test_sha256sum_checks_a_bundle_too(tmp_path: Path) -> None:
    make(tmp_path)
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", SUMS], cwd=tmp_path, check=True, timeout=30)


def test_a_change_anywhere_is_found_and_the_file_named(tmp_path: Path) -> None:
    make(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CorralError, match="damaged"), opened(tmp_path):
            pass
        path.write_bytes(data)
    with opened(tmp_path):
        pass


def test_a_missing_file_and_a_missing_list_are_said(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "inventory.yaml").unlink()
    with pytest.raises(CorralError, match=r"damaged: inventory\.yaml"), opened(tmp_path):
        pass
    (tmp_path / SUMS).unlink()
    with pytest.raises(CorralError, match="is not complete, or no bundle"), opened(tmp_path):
        pass


def test_a_link_in_a_bundle_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "inventory.yaml").rename(tmp_path / "elsewhere")
    (tmp_path / "inventory.yaml").symlink_to("elsewhere")
    with pytest.raises(CorralError, match=r"damaged: inventory\.yaml"), opened(tmp_path):
        pass


def test_a_file_that_was_cut_off_or_is_another_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    pack(tmp_path / "bundle", tmp_path / "bundle.tar")
    data = (tmp_path / "bundle.tar").read_bytes()
    for share in (0.2, 0.6, 0.9):
        (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CorralError), opened(tmp_path / "cut.tar"):
            pass
    (tmp_path / "other.tar").write_bytes(b"hello" * 500)
    with pytest.raises(CorralError, match="is no bundle"), opened(tmp_path / "other.tar"):
        pass
    with pytest.raises(CorralError, match="no such file"), opened(tmp_path / "gone"):
        pass


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_model_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    packer = Packer(tmp_path)
    draft = packer.blob(sha256(MODEL)).with_name(f"{sha256(MODEL)}.part")
    draft.parent.mkdir(parents=True)
    draft.write_bytes(MODEL[:70_000])
    asked: list[int] = []
    packer.fetch_blob(sha256(MODEL), len(MODEL), source(MODEL, asked))
    assert asked == [70_000]
    assert packer.blob(sha256(MODEL)).read_bytes() == MODEL
    assert not draft.exists()


@pytest.mark.parametrize("wrong", [b"x" * 500, MODEL + b"more"])
def test_a_draft_of_something_else_does_not_stay(tmp_path: Path, wrong: bytes) -> None:
    packer = Packer(tmp_path)
    draft = packer.blob(sha256(MODEL)).with_name(f"{sha256(MODEL)}.part")
    draft.parent.mkdir(parents=True)
    draft.write_bytes(wrong)
    with contextlib.suppress(CorralError):
        packer.fetch_blob(sha256(MODEL), len(MODEL), source(MODEL))
    assert not draft.exists()
    if not packer.has(sha256(MODEL)):
        packer.fetch_blob(sha256(MODEL), len(MODEL), source(MODEL))
    assert packer.blob(sha256(MODEL)).read_bytes() == MODEL


def test_layers_that_are_there_are_not_written_again_and_what_is_left_over_goes(tmp_path: Path) -> None:
    make(tmp_path)
    layer = tmp_path / "blobs" / "sha256" / sha256(LAYER)
    before = layer.stat().st_mtime_ns
    left = tmp_path / "blobs" / "sha256" / sha256(b"of an older image")
    left.write_bytes(b"of an older image")
    own = tmp_path / "notes.txt"
    own.write_text("mine")
    make(tmp_path)
    assert layer.stat().st_mtime_ns == before
    assert not left.exists()
    assert own.exists()


def test_a_layer_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorralError, match="is not what was announced"):
        _unpacked(Packer(tmp_path), io.BytesIO(saved_image().replace(LAYER, LAYER[::-1])))
    assert not list((tmp_path / "blobs" / "sha256").iterdir())


# --- places and space ------------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sun")
    with pytest.raises(UsageError, match="is there and is no bundle"):
        making._check_place(tmp_path, tmp_path)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelFile(file="m.gguf", source="m.gguf", sha256=sha256(MODEL), size=3 << 30)
    usage = shutil.disk_usage(tmp_path)._replace(free=2 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(CorralError, match=r"2\.0 GiB free and at least 3\.0 GiB are needed"):
        making._check_space(Packer(tmp_path), [], {"sa": [model]}, 1)


def test_a_model_in_parts_is_all_of_its_parts() -> None:
    text = (
        "schema_version: 1\nname: site\nhosts: {sa: {address: 192.0.2.1}}\n"
        "models: {m: {source: big-00001-of-00003.gguf, kind: chat, size_gib: 1}}\n"
        "pools: {chat: {model: m, on: {host: sa}}}\ngateway: {host: sa}\n"
    )
    plan = build_plan(validate(parse(text, "inventory.yaml")))
    host = ComposeHost(plan, "sa", Path("out"))
    assert list(model_sources(host)) == [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
