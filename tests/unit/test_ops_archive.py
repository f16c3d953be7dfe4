"""The backup's format: complete or not there, every byte accounted for, and nothing believed that is not checked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from corral.errors import CorralError
from corral.ops.archives import archive
from corral.ops.archives import passphrase as sealing
from corral.ops.archives.archive import (
    END,
    INVENTORY,
    MANIFEST,
    SEAL,
    Backup,
    Manifest,
    Member,
    SavedState,
    Sealing,
    feed_states,
)
from corral.ops.archives.passphrase import WrongPassphraseError
from corral.ops.history import unpacked

STATE = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(6000))
FILES = {INVENTORY: b"schema_version: 1\n", "rendering/sa/compose.yaml": b"services: {}\n"}
MEMBER = "states/sa/postgres/database.dump"


ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "backups" / "format-1.tar.gz"
"""Made by corral of commit 9bd54e3, before archives were sealed as a whole; its passphrase is `short123`."""
PASSPHRASE = "open sesame, slowly"
SEALINGS = {"open": None, "plain": Sealing(PASSPHRASE, is_plain=True), "sealed": Sealing(PASSPHRASE)}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "COST", 14)


def read_backup(path: Path, folder: Path | None = None, passphrase: str = PASSPHRASE) -> Backup:
    return archive.read_backup(path, lambda: passphrase, folder)


def make(
    folder: Path, files: Mapping[str, bytes] = FILES, *, name: str = "a.tar.gz", seal: Sealing | None = None
) -> Path:
    target = folder / name
    with archive.workshop(folder, "site") as place:
        parts, members = {}, {}
        for number, (path, data) in enumerate({**files, MEMBER: STATE}.items()):
            parts[path] = place / str(number)
            members[path] = archive.receive(io.BytesIO(data), parts[path])
        archive.write_archive(target, place, manifest(members), parts, seal)
    return target


def manifest(members: Mapping[str, Member]) -> Manifest:
    state = SavedState(host="sa", service="postgres", name="database", purpose="keys", image="p:1", member=MEMBER)
    return Manifest(
        format="corral-backup/2", corral="0", site="site", made=datetime(2026, 1, 2, tzinfo=UTC), hosts=("sa",),
        has_secrets=False, secret_names={"sa": ("KEY",)}, images={"sa": {"p:1": "sha256:0"}}, states=(state,),
        members=members,
    )  # fmt: skip


def read_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as file:
        return [(item.name, file.extractfile(item).read()) for item in file]  # type: ignore[union-attr]


def forge(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """An archive of anything."""
    with tarfile.open(path, "w:gz", compresslevel=1) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


each_sealing = pytest.mark.parametrize("seal", SEALINGS.values(), ids=SEALINGS.keys())


@each_sealing
def test_what_was_written_is_read_and_the_file_is_its_owners_alone(tmp_path: Path, seal: Sealing | None) -> None:
    path = make(tmp_path, seal=seal)
    staging = tmp_path / "staging"
    staging.mkdir()
    backup = read_backup(path, staging)
    assert backup.is_authentic == (seal is not None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert dict(backup.files) == FILES
    assert backup.rendering == {"sa/compose.yaml": b"services: {}\n"}
    found: list[bytes] = []
    feed_states(backup, {MEMBER: lambda data: found.append(data.read())})
    assert found == [STATE]
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name, "staging"]


def test_tar_and_sha256sum_read_it_too(tmp_path: Path) -> None:
    with tarfile.open(make(tmp_path)) as file:
        names = file.getnames()
        assert names[0] == MANIFEST
        assert names[-1] == END
        text = file.extractfile(MANIFEST)
        assert text is not None
        listed = json.loads(text.read())["members"]
    assert set(listed) == set(names) - {MANIFEST, END}


@each_sealing
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, seal: Sealing | None) -> None:
    path = make(tmp_path, seal=seal)
    data = path.read_bytes()
    header = 0 if seal and not seal.is_plain else 10  # of gzip: date and system, which nobody reads
    step = 7 if seal else 1
    for place in [
        *range(header, 60, step),
        *range(60, len(data), 3331 * step),
        *range(len(data) - 8, len(data), step),
    ]:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CorralError):
            read_backup(path)


@each_sealing
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_what_was_cut_off_is_no_backup(tmp_path: Path, share: float, seal: Sealing | None) -> None:
    path = make(tmp_path, seal=seal)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorralError, match=r"damaged|is no backup|does not know"):
        read_backup(path)


def test_a_well_packed_archive_without_its_last_members_is_damaged(tmp_path: Path) -> None:
    whole = make(tmp_path)
    members = read_members(whole)
    with pytest.raises(CorralError, match="its end is missing"):
        read_backup(forge(tmp_path / "b.tar.gz", members[:-1]))
    with pytest.raises(CorralError, match=f"damaged: {MEMBER} is not in it"):
        read_backup(forge(tmp_path / "c.tar.gz", [*members[:-2], members[-1]]))
    with pytest.raises(CorralError, match="extra is not in its manifest"):
        read_backup(forge(tmp_path / "d.tar.gz", [*members[:-1], ("extra", b"x"), members[-1]]))
    with pytest.raises(CorralError, match="not the one that it was made with"):
        read_backup(forge(tmp_path / "e.tar.gz", [*members[:-1], (END, b"0" * 64)]))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/./b", "-rf", "a\nb", "a/../b", ""])
def test_a_member_that_leads_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    members = {name: {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}}
    path = forge(tmp_path / "a.tar.gz", [(MANIFEST, manifest_text(members=members)), (name, b"x")])
    with pytest.raises(CorralError, match="is no path below a folder"):
        read_backup(path)
    path = forge(tmp_path / "b.tar.gz", [(MANIFEST, manifest_text()), (name, b"x")])
    with pytest.raises(CorralError, match="is no file with a safe name"):
        read_backup(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo(MANIFEST)
        member.type, member.linkname = kind, "/etc/passwd"
        file.addfile(member)
    with pytest.raises(CorralError, match="is no file with a safe name"):
        read_backup(path)


def test_names_and_sizes_in_extended_headers_are_read(tmp_path: Path) -> None:
    long = "rendering/sa/" + "/".join(["ä" * 50] * 5)
    assert read_backup(make(tmp_path, {**FILES, long: b"x"})).files[long] == b"x"


# --- who wrote it ----------------------------------------------------------------------------------------------------


def test_a_sealed_archive_shows_nothing_and_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    path = make(tmp_path, seal=SEALINGS["sealed"])
    assert b"services" not in path.read_bytes()
    assert not tarfile.is_tarfile(path)
    with pytest.raises(WrongPassphraseError, match="passphrase is wrong"):
        read_backup(path, passphrase="another one")


def test_parts_of_two_sealed_archives_do_not_make_one(tmp_path: Path) -> None:
    first, second = (make(tmp_path, name=name, seal=SEALINGS["sealed"]).read_bytes() for name in ("a", "b"))
    lines = first.splitlines(keepends=True)[:3]
    (tmp_path / "c").write_bytes(b"".join(lines) + second[len(b"".join(second.splitlines(keepends=True)[:3])) :])
    with pytest.raises(CorralError, match="does not open to its end"):
        read_backup(tmp_path / "c")


def test_an_exchanged_file_with_a_manifest_written_anew_is_found_by_the_passphrase(tmp_path: Path) -> None:
    """The attack on an archive that anybody can read and write: all checksums are right, only nobody sealed them."""
    changed = dict(read_members(make(tmp_path, seal=SEALINGS["plain"])))
    changed[INVENTORY] = b"schema_version: 1\nhosts: {sa: {ssh: root@evil.example}}\n"
    listed = json.loads(changed[MANIFEST])
    digest = hashlib.sha256(changed[INVENTORY]).hexdigest()
    listed["members"][INVENTORY] = {"sha256": digest, "size": len(changed[INVENTORY])}
    changed[MANIFEST] = json.dumps(listed).encode()
    changed[END] = hashlib.sha256(changed[MANIFEST]).hexdigest().encode()
    with pytest.raises(CorralError, match="not the one that was sealed"):
        read_backup(forge(tmp_path / "b.tar.gz", list(changed.items())))
    del changed[SEAL]
    assert not read_backup(forge(tmp_path / "c.tar.gz", list(changed.items()))).is_authentic


def test_an_archive_of_the_first_format_is_read_and_known_as_not_authenticated(tmp_path: Path) -> None:
    backup = read_backup(OLD, tmp_path)
    assert (backup.manifest.format, backup.is_authentic) == ("corral-backup/1", False)
    assert b"name: old" in backup.files[INVENTORY]
    assert [path.read_bytes() for path in backup.states.values()] == [b"a dump"]
    assert list(unpacked(sealing.unseal(backup.files["secrets.sealed"], "short123"))) == ["sa/.env"]


# --- what has no end -------------------------------------------------------------------------------------------------


def small(count: int, size: int) -> bytes:
    return manifest_text(
        members={f"rendering/sa/{number}": {"sha256": "0" * 64, "size": size} for number in range(count)}
    )


def bombs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Archives of a few MB at most that want some GB of memory, and what is said of them."""
    listed = small(40, ZEROS)
    many = [headed(MANIFEST, len(listed)) + padded(listed), *([headed("rendering/sa/0", ZEROS)] * 40)]
    yield zipped(folder / "sum", many), "its files are too large"
    listed = small(1, 40 * ZEROS)
    yield zipped(folder / "one", [headed(MANIFEST, len(listed)) + padded(listed)], 40), "its files are too large"
    yield zipped(folder / "manifest", [headed(MANIFEST, 40 * ZEROS)], 40), "its manifest has no end"
    text = b'{"states": [' + b"{}," * ((8 << 20) // 3 - 20) + b"{}]}"
    yield forge(folder / "states", [(MANIFEST, text)]), "its manifest cannot be read"
    text = b'{"members": {' + b",".join(b'"%d":1' % number for number in range(700_000)) + b"}}"
    yield forge(folder / "members", [(MANIFEST, text)]), "its manifest cannot be read"
    yield forge(folder / "deep", [(MANIFEST, b"[" * (8 << 20))]), "its manifest cannot be read"
    yield zipped(folder / "pax", [headed("x", 40 * ZEROS, tarfile.XHDTYPE)], 40), "it has a header without end"
    yield zipped(folder / "name", [headed("x", 40 * ZEROS, tarfile.GNUTYPE_LONGNAME)], 40), "is no file"
    yield zipped(folder / "tail", [gzip.decompress(make(folder).read_bytes())], 40), "something follows its end"


ZEROS = 40 << 20
ZEROS_ZIPPED = gzip.compress(bytes(ZEROS), 1, mtime=0)


def headed(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def zipped(path: Path, heads: Sequence[bytes], zeros: int = 1) -> Path:
    """A compressed file of these bytes, each with so many times ZEROS after it."""
    path.write_bytes(b"".join(gzip.compress(head, 1, mtime=0) + ZEROS_ZIPPED * zeros for head in heads))
    return path


LISTING = """
import resource, sys
from corral.cli import main
resource.setrlimit(resource.RLIMIT_AS, (1200 << 20, 1200 << 20))
for path in sys.argv[1:]:
    print(main(["restore", "--list", path]), flush=True)
"""


def test_an_archive_that_unpacks_to_gigabytes_is_refused_within_little_memory(tmp_path: Path) -> None:
    made = list(bombs(tmp_path))
    words = [sys.executable, "-c", LISTING, *(str(path) for path, _ in made)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    said = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1"] * len(made)
    assert [words in line for (_, words), line in zip(made, said, strict=True)] == [True] * len(made), said


def test_data_that_the_disk_does_not_hold_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=len(STATE) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    path = make(tmp_path)
    (tmp_path / "staging").mkdir()
    with pytest.raises(CorralError, match=r"has not free; nothing was changed"):
        read_backup(path, tmp_path / "staging")
    assert not list((tmp_path / "staging").iterdir())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no backup that corral made"),
        (b"hello", "is no backup that corral made"),
        (gzip.compress(b"hello" * 400, mtime=0), "damaged"),
    ],
    ids=["empty", "text", "cut"],
)
def test_another_file_is_no_backup(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(CorralError, match=words):
        read_backup(path)


def test_other_archives_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorralError, match="is no backup that corral made"):
        read_backup(forge(tmp_path / "x.tar.gz", [("holiday.txt", b"sun")]))
    with pytest.raises(CorralError, match=r"manifest cannot be read \(format"):
        read_backup(forge(tmp_path / "y.tar.gz", [(MANIFEST, manifest_text(format="corral-backup/9"))]))
    with pytest.raises(CorralError, match="gone: no such file"):
        read_backup(tmp_path / "gone")
    with pytest.raises(CorralError, match="cannot be read: Is a directory"):
        read_backup(tmp_path)


def manifest_text(**changes: Any) -> bytes:
    return json.dumps({**json.loads(manifest({}).model_dump_json()), **changes}).encode()


# --- bad weather while it is made ------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_cleared_away_and_is_no_backup(tmp_path: Path) -> None:
    left = tmp_path / ".site.backup.part"
    left.mkdir()
    (left / "archive").write_bytes(b"half of it")
    path = make(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    read_backup(path)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with archive.workshop(tmp_path, "site") as place:
            archive.write_part(place / "0", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_two_backups_of_a_site_do_not_mix(tmp_path: Path) -> None:
    with (
        archive.workshop(tmp_path, "site"),
        pytest.raises(CorralError, match="another corral is writing here"),
        archive.workshop(tmp_path, "site"),
    ):
        pass


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = path.read_bytes()
    with pytest.raises(CorralError, match="is there already"):
        make(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")  # noqa: PTH110
def test_a_full_disk_is_named() -> None:
    with (
        pytest.raises(CorralError, match=r"No space left on device; there is no backup of this run"),
        archive.explained(Path("/dev/full")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")
