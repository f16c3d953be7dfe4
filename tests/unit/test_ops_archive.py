"""The backup's format: complete or not there, every byte accounted for, and nothing believed that is not checked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from corral.errors import CorralError
from corral.ops import archive
from corral.ops.archive import END, INVENTORY, MANIFEST, Manifest, Member, SavedState, feed_states, read_backup

STATE = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(6000))
FILES = {INVENTORY: b"schema_version: 1\n", "rendering/sa/compose.yaml": b"services: {}\n"}
MEMBER = "states/sa/postgres/database.dump"


def make(folder: Path, files: Mapping[str, bytes] = FILES, *, name: str = "a.tar.gz") -> Path:
    target = folder / name
    with archive.workshop(folder, "site") as place:
        parts, members = {}, {}
        for number, (path, data) in enumerate({**files, MEMBER: STATE}.items()):
            parts[path] = place / str(number)
            members[path] = archive.receive(io.BytesIO(data), parts[path])
        archive.write_archive(target, place, manifest(members), parts)
    return target


def manifest(members: Mapping[str, Member]) -> Manifest:
    state = SavedState(host="sa", service="postgres", name="database", purpose="keys", image="p:1", member=MEMBER)
    return Manifest(
        format="corral-backup/1", corral="0", site="site", made=datetime(2026, 1, 2, tzinfo=UTC), hosts=("sa",),
        has_secrets=False, secret_names={"sa": ("KEY",)}, images={"sa": {"p:1": "sha256:0"}}, states=(state,),
        members=members,
    )  # fmt: skip


def forge(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive of anything."""
    with tarfile.open(path, "w:gz") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_what_was_written_is_read_and_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = make(tmp_path)
    backup = read_backup(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert dict(backup.files) == FILES
    assert backup.rendering == {"sa/compose.yaml": b"services: {}\n"}
    found: list[bytes] = []
    feed_states(backup, {MEMBER: lambda data: found.append(data.read())})
    assert found == [STATE]
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_tar_and_sha256sum_read_it_too(tmp_path: Path) -> None:
    with tarfile.open(make(tmp_path)) as file:
        names = file.getnames()
        assert names[0] == MANIFEST
        assert names[-1] == END
        text = file.extractfile(MANIFEST)
        assert text is not None
        listed = json.loads(text.read())["members"]
    assert set(listed) == set(names) - {MANIFEST, END}


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = path.read_bytes()
    header = 10  # of gzip: date and system, which nobody reads
    for place in [
        *range(header, 60),
        *range(60, len(data), 3331),
        *range(len(data) - 8, len(data)),
    ]:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CorralError):
            read_backup(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_what_was_cut_off_is_no_backup(tmp_path: Path, share: float) -> None:
    path = make(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorralError, match=r"damaged|is no backup"):
        read_backup(path)


def test_a_well_packed_archive_without_its_last_members_is_damaged(tmp_path: Path) -> None:
    whole = make(tmp_path)
    with tarfile.open(whole) as file:
        members = [(item.name, file.extractfile(item).read()) for item in file]  # type: ignore[union-attr]
    with pytest.raises(CorralError, match="its end is missing"):
        read_backup(forge(tmp_path / "b.tar.gz", members[:-1]))
    with pytest.raises(CorralError, match=f"damaged: {MEMBER} is not in it"):
        read_backup(forge(tmp_path / "c.tar.gz", [*members[:-2], members[-1]]))
    with pytest.raises(CorralError, match="extra is not in its manifest"):
        read_backup(forge(tmp_path / "d.tar.gz", [*members[:-1], ("extra", b"x"), members[-1]]))
    with pytest.raises(CorralError, match="not the one that it was made with"):
        read_backup(forge(tmp_path / "e.tar.gz", [*members[:-1], (END, b"0" * 64)]))


def test_a_member_that_leads_out_of_the_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorralError, match="is not in its manifest"):
        read_backup(make(tmp_path, {"../../etc/passwd": b"x"}))


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
