"""A bundle: every file under its checksum, complete or not, resumed where it stopped, the same as one file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.load import validate
from corral.config.model_lock import LockedFile
from corral.config.source import parse
from corral.errors import CorralError, UsageError
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost, Done
from corral.verbs.archives import bundle as making
from corral.verbs.archives import load
from corral.verbs.archives.bundle import BundleFolder
from corral.verbs.archives.container import SUMS, members
from corral.verbs.archives.load import SIGNATURE, Bundle, HostParts, Image, Manifest, ModelFile
from corral.verbs.archives.target import Target

ROOT = Path(__file__).resolve().parents[2]
LAYER = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(3000))
MODEL = b"GGUF" + LAYER[::-1]


QUIET = Console(quiet=True)
SITE = """\
schema_version: 1
name: site
hosts: {sa: {address: 192.0.2.1, models_dir: /srv/models}}
models: {m: {source: m.gguf, kind: chat, size_gib: 1}}
pools: {chat: {model: m, on: {host: sa}}}
gateway: {host: sa, database: false, cache: false}
"""
TWO_HOSTS = SITE.replace("/srv/models}", "/srv/models}, sb: {address: 192.0.2.2}").replace(
    "on: {host: sa}", "on: [{host: sa}, {host: sb}]"
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SAVED: list[list[str]] = []


@dataclass(frozen=True, slots=True)
class Shop(ComposeHost):
    """A host whose engine has images; every command prints `content`, or else itself."""

    content: bytes = b""

    def run(self, command: Sequence[str], **_: Any) -> Done:
        name = command[-1].partition("@")[0]
        facts = {"Id": f"sha256:{sha256(name.encode())}", "Os": "linux", "Architecture": "amd64", "Size": 1}
        return Done(0, json.dumps([facts]), "")

    @contextlib.contextmanager
    def stream(self, words: Sequence[str]) -> Iterator[IO[bytes]]:
        SAVED.append(list(words))
        yield io.BytesIO((self.content or " ".join(words).encode())[int(words[2]) - 1 if words[0] == "tail" else 0 :])


def host(content: bytes) -> ComposeHost:
    return Shop(plan_of(SITE), "sa", Path(), content=content)


def plan_of(text: str) -> Plan:
    return build_plan(validate(parse(text, "inventory.yaml")))


def opened(path: Path) -> Bundle:
    """A bundle of any maker."""
    return load.read_bundle(path, QUIET, None)


def manifest_of(images: tuple[Image, ...], models: tuple[ModelFile, ...]) -> Manifest:
    parts = HostParts(images=tuple(image.id for image in images), models=models)
    return Manifest(
        format="corral-bundle/2", corral="0", site="site", made=datetime(2026, 1, 2, tzinfo=UTC), platform="",
        hosts={"sa": parts}, images=images,
    )  # fmt: skip


def make(folder: Path, target: Path | None = None) -> Manifest:
    target_folder = BundleFolder(folder)
    archive = target_folder.fetch(host(LAYER), ["docker", "save"])
    target_folder.fetch(host(MODEL), "m.gguf", sha256(MODEL))
    target_folder.add("inventory.yaml", b"schema_version: 1\n")
    image_id = f"sha256:{sha256(b'image')}"
    known = Image(id=image_id, references=("a:1",), digests=(), platform="linux/amd64", size=9, archive=archive)
    model = ModelFile(file="m.gguf", source="m.gguf", sha256=sha256(MODEL), size=len(MODEL))
    manifest = manifest_of((known,), (model,))
    target_folder.finish(manifest)
    if target:
        target_folder.finish_file(target)
    return manifest


@pytest.fixture(params=["folder", "file"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    make(folder, None if request.param == "folder" else tmp_path / "bundle.tar")
    if request.param == "folder":
        return folder
    assert not folder.exists()
    return tmp_path / "bundle.tar"


def test_what_was_packed_is_read(bundle: Path) -> None:
    found = opened(bundle)
    assert found.manifest.site == "site"
    assert found.files["inventory.yaml"] == b"schema_version: 1\n"
    assert found.stored[f"{load.BLOBS}/{found.manifest.hosts['sa'].models[0].sha256}"].read() == MODEL
    assert content_of(found, found.manifest.images[0]) == LAYER


def content_of(bundle: Bundle, image: Image) -> bytes:
    buffer = io.BytesIO()
    buffer.writelines(bundle.image_archive(image))
    return buffer.getvalue()


def test_a_bundle_of_the_first_format_is_read() -> None:
    """Made by corral of commit c5822d9, which kept the layers of images one by one."""
    found = opened(ROOT / "tests" / "backups" / "bundle-1.tar")
    archive = io.BytesIO(content_of(found, found.manifest.images[0]))
    files = {part.name: part.data.read() for part in members(archive)}
    assert files == {f"blobs/sha256/{sha256(b'a layer')}": b"a layer", "index.json": b"{}", "oci-layout": b"1"}


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
        with pytest.raises(CorralError, match="damaged"):
            opened(tmp_path)
        path.write_bytes(data)
    opened(tmp_path)


def test_a_missing_file_and_a_missing_list_are_said(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "inventory.yaml").unlink()
    with pytest.raises(CorralError, match=r"damaged.*: inventory\.yaml is not"):
        opened(tmp_path)
    (tmp_path / SUMS).unlink()
    with pytest.raises(CorralError, match="is not complete, or no bundle"):
        opened(tmp_path)


def test_a_link_in_a_bundle_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "inventory.yaml").rename(tmp_path / "elsewhere")
    (tmp_path / "inventory.yaml").symlink_to("elsewhere")
    with pytest.raises(CorralError, match=r"damaged.*: inventory\.yaml is not"):
        opened(tmp_path)


def test_a_file_that_was_cut_off_or_is_another_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "bundle", tmp_path / "bundle.tar")
    data = (tmp_path / "bundle.tar").read_bytes()
    for share in (0.2, 0.6, 0.9):
        (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CorralError):
            opened(tmp_path / "cut.tar")
    (tmp_path / "other.tar").write_bytes(b"hello" * 500)
    with pytest.raises(CorralError, match="no bundle that corral made"):
        opened(tmp_path / "other.tar")
    with pytest.raises(CorralError, match="no such file"):
        opened(tmp_path / "gone")


# --- what is not believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../../keys", "/etc/cron.d/x", "a/../b", "a//b", "a/-b", ".", "..", "-rf", "a\nb", "", "x" * 300, "a\\b"],
)
def test_a_model_file_has_the_name_of_one_file(name: str) -> None:
    with pytest.raises(ValidationError):
        ModelFile(file=name, source="m.gguf", sha256=sha256(MODEL), size=len(MODEL))
    with pytest.raises(ValidationError):
        LockedFile(file=name)


@pytest.mark.parametrize("taken", ["hf:o/r/..", "hf:o/r/-rf.gguf", "https://h/a\x01.gguf"])
def test_what_stands_in_for_a_file_has_a_name_as_well(taken: str) -> None:
    with pytest.raises(ValidationError):
        LockedFile(file="m.gguf", taken=taken)


def test_what_is_read_is_what_was_checked(tmp_path: Path) -> None:
    """Somebody exchanges files of a stick between the check and their use."""
    manifest = make(tmp_path)
    found = opened(tmp_path)
    (tmp_path / "inventory.yaml").write_bytes(b"schema_version: 2\n")
    assert found.files["inventory.yaml"] == b"schema_version: 1\n"
    (tmp_path / "blobs" / "sha256" / sha256(LAYER)).write_bytes(LAYER[::-1])
    with pytest.raises(tarfile.ReadError, match=f"blobs/sha256/{sha256(LAYER)} is not what SHA256SUMS says"):
        content_of(found, manifest.images[0])


def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    (tmp_path / "bundle" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "bundle" / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorralError, match=r"damaged.*: blobs"):
        opened(tmp_path / "bundle")


def bombs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Bundles that want more memory than they are worth, and what is said of them."""
    for name, file, size in (("text", "inventory.yaml", 256 << 20), ("list", SUMS, 512 << 20)):
        make(folder / name)
        (folder / name / file).write_bytes(b"")
        os.truncate(folder / name / file, size)
    sums = folder / "text" / SUMS
    sums.write_text(sums.read_text().replace(sha256(b"schema_version: 1\n"), sha256(bytes(256 << 20))))
    yield folder / "text", "inventory.yaml is too large"
    yield folder / "list", "SHA256SUMS is too large"
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    (folder / "pax.tar").write_bytes(header.tobuf())
    os.truncate(folder / "pax.tar", 1 << 31)
    yield folder / "pax.tar", "a header without end"


def test_files_of_an_archive_are_counted() -> None:
    archive = io.BytesIO(tarfile.TarInfo("a").tobuf() * 11 + bytes(1024))
    with pytest.raises(tarfile.ReadError, match="it has more than 10 files"):
        list(members(archive, most=10))


LOADING = """
import os, resource, sys, tempfile
from corral.cli import main
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (200 << 20), taken + (200 << 20)))
os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
for path in sys.argv[2:]:
    print(main(["bundle", "load", path, "--unsigned"]), os.listdir(), flush=True)
"""


def test_a_bundle_without_end_is_refused_within_little_memory(tmp_path: Path) -> None:
    made = list(bombs(tmp_path))
    words = [sys.executable, "-c", LOADING, str(tmp_path), *(str(path) for path, _ in made)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("corral: ")]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["1 []"] * len(made)
    assert [words in line for (_, words), line in zip(made, said, strict=True)] == [True] * len(made), said


# --- who made it -----------------------------------------------------------------------------------------------------


def make_site(folder: Path, model: str = "m.gguf", text: str = SITE, key: Path | None = None) -> str:
    """A bundle of a site without images; returns the checksum of its list."""
    target_folder = BundleFolder(folder)
    target_folder.fetch(host(MODEL), "m.gguf", sha256(MODEL))
    target_folder.add("inventory.yaml", text.encode())
    models = (ModelFile(file=model, source=model, sha256=sha256(MODEL), size=len(MODEL)),)
    return target_folder.finish(manifest_of((), models), key)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A maker's ssh key; `signers` beside it is the file that the other side has."""
    path = tmp_path / "maker"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    (tmp_path / "signers").write_text(f"maker@example.com {path.with_suffix('.pub').read_text()}")
    return path


def loaded(bundle: Path, signers: Path | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `bundle load` says until it would call the host."""
    talk = Console(file=io.StringIO(), width=400)
    with monkeypatch.context() as patch:
        patch.setattr(load, "check_engine", lambda _host: None)
        patch.setattr(load, "_load_images", lambda *_: None)
        patch.setattr(load, "_copy_models", lambda *_: None)
        place = bundle.parent / "new"
        load.load(bundle, talk, Target(place / "inventory.yaml", place / "compose"), signers)
    return talk.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_signed_bundle_is_loaded_and_its_maker_named(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "bundle", key=key)
    assert "signed by maker@example.com" in loaded(tmp_path / "bundle", tmp_path / "signers", monkeypatch)
    rendered = (tmp_path / "new" / "compose" / "sa" / "compose.yaml").read_bytes()
    plan = plan_of(SITE)
    assert rendered == render(plan)["sa/compose.yaml"]


def test_a_change_with_its_checksums_written_anew_does_not_pass_for_the_signed_bundle(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "bundle", key=key)
    signature = (tmp_path / "bundle" / SIGNATURE).read_bytes()
    make_site(tmp_path / "bundle", text=SITE.replace("192.0.2.1", "192.0.2.66"))
    with pytest.raises(CorralError, match="is not signed; nothing was changed"):
        loaded(tmp_path / "bundle", tmp_path / "signers", monkeypatch)
    (tmp_path / "bundle" / SIGNATURE).write_bytes(signature)
    with pytest.raises(
        CorralError, match=r"nothing was changed: no key in .* made the signature, or it is of another text"
    ):
        loaded(tmp_path / "bundle", tmp_path / "signers", monkeypatch)
    assert not (tmp_path / "new").exists()


def test_a_signature_of_somebody_else_or_for_something_else_does_not_count(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "bundle", key=key)
    words = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(key), "-n", "file", str(tmp_path / "bundle" / SUMS)]
    (tmp_path / "bundle" / SIGNATURE).unlink()
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    with pytest.raises(CorralError, match="made the signature, or it is of another text"):
        loaded(tmp_path / "bundle", tmp_path / "signers", monkeypatch)
    (tmp_path / "signers").write_text("")
    make_site(tmp_path / "bundle", key=key)
    with pytest.raises(CorralError, match="made the signature, or it is of another text"):
        loaded(tmp_path / "bundle", tmp_path / "signers", monkeypatch)


def test_an_unsigned_bundle_shows_the_checksum_that_its_maker_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = make_site(tmp_path / "bundle")
    assert f"sha256 of SHA256SUMS: {digest}" in loaded(tmp_path / "bundle", None, monkeypatch)


def test_a_stick_that_is_pulled_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(tmp_path / "bundle")

    def pulled(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(load, "_lay_out", pulled)
    with pytest.raises(
        CorralError, match=r"bundle: cannot be read: Input/output error; then run the same command again"
    ):
        loaded(tmp_path / "bundle", None, monkeypatch)


def test_who_loads_a_bundle_says_who_made_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_site(tmp_path / "bundle")
    assert main(["bundle", "load", str(tmp_path / "bundle")]) == 2
    assert "--signer FILE" in capsys.readouterr().err


ENTRANCE = SITE.replace("database", "entrance: {certificate: /home/a.pem}, database")


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        ("other.gguf", SITE, "it brings other.gguf for sa, which its inventory does not ask for"),
        ("m.gguf", ENTRANCE, "sees /home of the host"),
        ("m.gguf", SITE.replace("/srv/models", "/var/run"), "is the system's own folder"),
    ],
)
def test_what_its_inventory_does_not_ask_for_and_what_weakens_a_host_is_not_taken(
    tmp_path: Path, model: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(tmp_path / "bundle", model, text)
    with pytest.raises(CorralError, match=words):
        loaded(tmp_path / "bundle", None, monkeypatch)
    assert not (tmp_path / "new").exists()


def test_an_image_that_no_service_runs_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "bundle")
    BundleFolder(tmp_path / "bundle").add("inventory.yaml", SITE.encode())
    sums = tmp_path / "bundle" / SUMS
    sums.write_text(sums.read_text().replace(sha256(b"schema_version: 1\n"), sha256(SITE.encode())))
    with pytest.raises(CorralError, match="it brings the image a:1, which its inventory does not ask for"):
        loaded(tmp_path / "bundle", None, monkeypatch)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_model_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    target_folder = BundleFolder(tmp_path)
    draft = target_folder.blob(sha256(MODEL)).with_name(f"{sha256(MODEL)}.part")
    draft.parent.mkdir(parents=True)
    draft.write_bytes(MODEL[:70_000])
    SAVED.clear()
    target_folder.fetch(host(MODEL), "m.gguf", sha256(MODEL))
    assert SAVED == [["tail", "-c", "+70001", "m.gguf"]]
    assert target_folder.blob(sha256(MODEL)).read_bytes() == MODEL
    assert not draft.exists()


@pytest.mark.parametrize("wrong", [b"x" * 500, MODEL + b"more"])
def test_a_draft_of_something_else_does_not_stay(tmp_path: Path, wrong: bytes) -> None:
    target_folder = BundleFolder(tmp_path)
    draft = target_folder.blob(sha256(MODEL)).with_name(f"{sha256(MODEL)}.part")
    draft.parent.mkdir(parents=True)
    draft.write_bytes(wrong)
    with contextlib.suppress(CorralError):
        target_folder.fetch(host(MODEL), "m.gguf", sha256(MODEL))
    assert not draft.exists()
    if not target_folder.has(sha256(MODEL)):
        target_folder.fetch(host(MODEL), "m.gguf", sha256(MODEL))
    assert target_folder.blob(sha256(MODEL)).read_bytes() == MODEL


def test_what_is_left_over_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    make(tmp_path)
    left = tmp_path / "blobs" / "sha256" / sha256(b"of an older image")
    left.write_bytes(b"of an older image")
    own = tmp_path / "notes.txt"
    own.write_text("mine")
    make(tmp_path)
    assert not left.exists()
    assert own.exists()


def test_images_that_the_same_hosts_need_are_saved_at_once_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "_models", lambda *_: [])
    plan = plan_of(TWO_HOSTS)
    hosts = [Shop(plan, name, tmp_path) for name in ("sa", "sb")]
    wanted = making._gather(plan, hosts, QUIET, is_with_kit=False)
    groups = making._groups(wanted)
    assert groups.keys() == {("sa",), ("sa", "sb")}
    SAVED.clear()
    for _ in range(2):
        target_folder = BundleFolder(tmp_path)
        made = making._add_images(target_folder, wanted, hosts, QUIET)
        assert {image.id for image in made.images} == {image.id for image in wanted.images}
        assert all(target_folder.has(image.archive or "") for image in made.images)
    assert sorted(words[2:] for words in SAVED) == sorted([image.id for image in images] for images in groups.values())


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
        making._check_space(BundleFolder(tmp_path), manifest_of((), (model,)), 1)


def test_a_model_in_parts_is_all_of_its_parts() -> None:
    text = (
        "schema_version: 1\nname: site\nhosts: {sa: {address: 192.0.2.1}}\n"
        "models: {m: {source: big-00001-of-00003.gguf, kind: chat, size_gib: 1}}\n"
        "pools: {chat: {model: m, on: {host: sa}}}\ngateway: {host: sa}\n"
    )
    plan = plan_of(text)
    host = ComposeHost(plan, "sa", Path("out"))
    assert list(host.model_sources) == [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
