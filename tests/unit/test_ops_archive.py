"""The backup's format: complete or not there, every byte accounted for, and nothing believed that is not checked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
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
from corral.verbs.archives import contents
from corral.verbs.archives import passphrase as sealing
from corral.verbs.archives.container import INVENTORY, MANIFEST, SUMS, ArchiveFolder, sums_text, unpacked, work_folder
from corral.verbs.archives.contents import SEAL, Backup, Manifest, SavedState, Sealing
from corral.verbs.archives.passphrase import WrongPassphraseError

STATE = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(6000))
FILES = {INVENTORY: b"schema_version: 1\n", "rendering/sa/compose.yaml": b"services: {}\n"}
MEMBER = "states/sa/postgres/database.dump"


ROOT = Path(__file__).resolve().parents[2]
# Made by corral of commit 9bd54e3, before archives were sealed as a whole; its passphrase is `short123`.
OLD = ROOT / "tests" / "backups" / "format-1.tar.gz"
SECOND = ROOT / "tests" / "backups" / "format-2.backup"
# Made by corral of commit c5822d9, when the manifest had the checksums; their passphrase is PASSPHRASE.
SECOND_PLAIN = ROOT / "tests" / "backups" / "format-2.tar.gz"
PASSPHRASE = "open sesame, slowly"
SEALINGS = {"open": None, "plain": Sealing(PASSPHRASE, is_plain=True), "sealed": Sealing(PASSPHRASE)}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "COST", 14)


def read_backup(path: Path, folder: Path | None = None, passphrase: str = PASSPHRASE) -> Backup:
    return contents.read_backup(path, lambda: passphrase, folder)


def make(
    folder: Path, files: Mapping[str, bytes] = FILES, *, name: str = "a.tar.gz", seal: Sealing | None = None
) -> Path:
    target = folder / name
    with work_folder(folder / ".part", "no backup") as place:
        parts = ArchiveFolder(place)
        for path, data in {**files, MEMBER: STATE}.items():
            parts.add(path, data)
        contents.write_archive(target, parts, manifest(), seal)
    return target


def manifest() -> Manifest:
    state = SavedState(host="sa", service="postgres", name="database", purpose="keys", image="p:1", member=MEMBER)
    return Manifest(
        format="corral-backup/3", corral="0", site="site", made=datetime(2026, 1, 2, tzinfo=UTC), hosts=("sa",),
        has_secrets=False, secret_names={"sa": ("KEY",)}, images={"sa": {"p:1": "sha256:0"}}, states=(state,),
    )  # fmt: skip


def listed(files: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    """The members of an archive of these files."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return [(SUMS, sums_text(sums)), *files.items()]


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
    assert backup.files.items() >= FILES.items()
    assert {name: state.read_bytes() for name, state in backup.states.items()} == {MEMBER: STATE}
    assert set(backup.manifest.members) == {*FILES, MEMBER}
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name, "staging"]


def test_tar_and_sha256sum_read_it_too(tmp_path: Path) -> None:
    subprocess.run(["tar", "-xzf", make(tmp_path)], cwd=tmp_path, check=True, timeout=30)
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", SUMS], cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / MEMBER).read_bytes() == STATE


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
    with pytest.raises(CorralError, match=r"damaged|does not know"):
        read_backup(path)


def test_a_well_packed_archive_without_a_member_or_with_others_is_damaged(tmp_path: Path) -> None:
    members = read_members(make(tmp_path))
    with pytest.raises(CorralError, match=f"damaged.*: {MEMBER} is not in it"):
        read_backup(forge(tmp_path / "b.tar.gz", members[:-1]))
    with pytest.raises(CorralError, match="extra is not what its list of checksums says"):
        read_backup(forge(tmp_path / "c.tar.gz", [*members, ("extra", b"x")]))
    with pytest.raises(CorralError, match=f"{MEMBER} is in it twice"):
        read_backup(forge(tmp_path / "d.tar.gz", [*members, members[-1]]))
    with pytest.raises(CorralError, match=f"{MEMBER} is not what its list of checksums says"):
        read_backup(forge(tmp_path / "e.tar.gz", [*members[:-1], (MEMBER, STATE[::-1])]))


def test_a_state_that_the_manifest_names_is_in_the_archive(tmp_path: Path) -> None:
    with pytest.raises(CorralError, match=f"damaged.*: {MEMBER} is not in it"):
        read_backup(forge(tmp_path / "a.tar.gz", listed({MANIFEST: manifest_text()})))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/./b", "-rf", "a\nb", "a/../b", ""])
def test_a_member_that_leads_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    path = forge(tmp_path / "a.tar.gz", listed({MANIFEST: manifest_text(), name: b"x"}))
    with pytest.raises(CorralError, match=r"SHA256SUMS is not as it was made"):
        read_backup(path)
    members = {name: {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}}
    path = forge(tmp_path / "old.tar.gz", [(MANIFEST, manifest_text(members=members)), (name, b"x")])
    with pytest.raises(CorralError, match="is no path below a folder"):
        read_backup(path)
    path = forge(tmp_path / "b.tar.gz", [*listed({MANIFEST: manifest_text()}), (name, b"x")])
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
    files = {name: data for name, data in changed.items() if name not in {SUMS, SEAL}}
    changed[SUMS] = listed(files)[0][1]
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


@pytest.mark.parametrize("path", [SECOND, SECOND_PLAIN], ids=["sealed", "plain"])
def test_archives_of_the_second_format_are_read(path: Path, tmp_path: Path) -> None:
    backup = read_backup(path, tmp_path)
    assert (backup.manifest.format, backup.is_authentic) == ("corral-backup/2", True)
    assert b"name: old" in backup.files[INVENTORY]
    assert [state.read_bytes() for state in backup.states.values()] == [b"a dump"]
    assert list(unpacked(sealing.unseal(backup.files["secrets.sealed"], PASSPHRASE))) == ["sa/.env"]
    with pytest.raises(WrongPassphraseError):
        read_backup(path, passphrase="another one")


def test_an_old_archive_whose_manifest_was_written_anew_is_found(tmp_path: Path) -> None:
    changed = dict(read_members(SECOND_PLAIN))
    changed[MANIFEST] = changed[MANIFEST].replace(b': "site"', b': "evil"')
    with pytest.raises(CorralError, match="not the one that was sealed"):
        read_backup(forge(tmp_path / "a.tar.gz", list(changed.items())))
    del changed[contents.OLD_SEAL]
    with pytest.raises(CorralError, match=f"{contents.OLD_END} is not what its list"):
        read_backup(forge(tmp_path / "b.tar.gz", list(changed.items())))


# --- what has no end -------------------------------------------------------------------------------------------------


def bombs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Archives of a few MB at most that want some GB of memory, and what is said of them."""
    sums = sums_text(dict.fromkeys((MANIFEST, *(f"rendering/sa/{number}" for number in range(40))), ZEROS_SUM))
    many = [headed(f"rendering/sa/{number}", ZEROS) for number in range(40)]
    yield zipped(folder / "sum", [headed(SUMS, len(sums)) + padded(sums) + many[0], *many[1:]]), "files are too large"
    one = headed(SUMS, len(sums)) + padded(sums) + headed("rendering/sa/0", 40 * ZEROS)
    yield zipped(folder / "one", [one], 40), "its files are too large"
    yield zipped(folder / "list", [headed(SUMS, 40 * ZEROS)], 40), "SHA256SUMS is not as it was made"
    yield zipped(folder / "manifest", [headed(MANIFEST, 40 * ZEROS)], 40), "its manifest has no end"
    text = b'{"states": [' + b"{}," * ((8 << 20) // 3 - 20) + b"{}]}"
    yield forge(folder / "states", [(MANIFEST, text)]), "its manifest cannot be read"
    text = b'{"members": {' + b",".join(b'"%d":1' % number for number in range(700_000)) + b"}}"
    yield forge(folder / "members", [(MANIFEST, text)]), "its manifest cannot be read"
    yield forge(folder / "deep", [(MANIFEST, b"[" * (8 << 20))]), "its manifest cannot be read"
    yield zipped(folder / "pax", [headed("x", 40 * ZEROS, tarfile.XHDTYPE)], 40), "it has a header without end"
    yield (
        zipped(folder / "name", [headed("x", 40 * ZEROS, tarfile.GNUTYPE_LONGNAME)], 40),
        "it has a header without end",
    )
    maps = headed("x", 0, tarfile.GNUTYPE_SPARSE)
    maps = maps[:482] + b"\1" + maps[483:]  # more of its map follows
    again = (b"1".rjust(11, b"0") + b"\0") * 42 + b"\1" + bytes(7)
    yield zipped(folder / "sparse", [resummed(maps) + again * 80_000], 0), "it has a header without end"
    shared = b"".join(pax(b"%d" % number) + headed(SUMS, 0) for number in range(20))
    yield zipped(folder / "global", [shared], 0), "is no file with a safe name"
    yield zipped(folder / "tail", [gzip.decompress(make(folder).read_bytes())], 40), "something follows its end"


ZEROS = 40 << 20
ZEROS_SUM = hashlib.sha256(bytes(ZEROS)).hexdigest()
ZEROS_ZIPPED = gzip.compress(bytes(ZEROS), 1, mtime=0)


def headed(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def resummed(header: bytes) -> bytes:
    """A header with its checksum made anew."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def pax(key: bytes) -> bytes:
    """An extended header that is meant for all members that follow."""
    text = b"99 %s=%s\n" % (key.rjust(5, b"k"), b"x" * 89)
    return headed("x", len(text), tarfile.XGLTYPE) + padded(text)


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


@pytest.mark.parametrize("data", [b"", b"hello", gzip.compress(b"hello" * 400, mtime=0)], ids=["empty", "text", "gz"])
def test_another_file_is_no_backup(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(CorralError, match="other: damaged, or no backup that corral made"):
        read_backup(path)


def test_other_archives_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorralError, match="no backup that corral made: it does not begin with SHA256SUMS"):
        read_backup(forge(tmp_path / "x.tar.gz", [("holiday.txt", b"sun")]))
    with pytest.raises(CorralError, match=r"manifest cannot be read \(format"):
        read_backup(forge(tmp_path / "y.tar.gz", [(MANIFEST, manifest_text(format="corral-backup/9"))]))
    with pytest.raises(CorralError, match="gone: no such file or folder"):
        read_backup(tmp_path / "gone")
    with pytest.raises(CorralError, match="cannot be read: Is a directory"):
        read_backup(tmp_path)


def manifest_text(**changes: Any) -> bytes:
    return json.dumps({**json.loads(manifest().model_dump_json()), **changes}).encode()


# --- bad weather while it is made ------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_cleared_away_and_is_no_backup(tmp_path: Path) -> None:
    left = tmp_path / ".part"
    left.mkdir()
    (left / "rendering").mkdir()
    (left / "rendering" / "0").write_bytes(b"half of it")
    path = make(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    read_backup(path)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with work_folder(tmp_path / ".part", "no backup") as place:
            ArchiveFolder(place).add("a/0", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_two_backups_of_a_site_do_not_mix(tmp_path: Path) -> None:
    with (
        work_folder(tmp_path / ".part", "there is no backup of this run"),
        pytest.raises(CorralError, match="another corral is writing here"),
        work_folder(tmp_path / ".part", "there is no backup of this run"),
    ):
        pass


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = path.read_bytes()
    with pytest.raises(CorralError, match="is there already"):
        make(tmp_path)
    assert path.read_bytes() == before
