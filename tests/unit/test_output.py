"""Trees on disk: what is written, what is left alone, and what a killed run leaves behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.errors import CorralError
from corral.files import write_atomically
from corral.render.output import MANIFEST, Change, compare, digest, locked, refuse_unfinished, write

Tree = dict[str, bytes]
ROOT = Path(__file__).resolve().parents[2]
OLD: Tree = {
    "a/compose.yaml": b"old\n",
    "a/part/changed": b"one\n",
    "a/part/same": b"same\n",
    "a/stale/deep/file": b"goes\n",
    "b/compose.yaml": b"host b\n",
    "b/start.sh": b"#!/bin/sh\n",
}
NEW: Tree = {
    "a/compose.yaml": b"new\n",
    "a/part/changed": b"two\n",
    "a/part/same": b"same\n",
    "a/fresh/file": b"comes\n",
    "c/compose.yaml": b"host c\n",
}
KILL_DEADLINE_S = 20


def on_disk(out: Path) -> Tree:
    """Every rendered file below a folder; the kit's own records aside."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name != MANIFEST}


def actions(changes: list[Change]) -> dict[str, str]:
    return {change.path: change.action for change in changes}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that holds OLD."""
    folder = tmp_path / "out"
    write(OLD, folder)
    return folder


# --- what is done to each file ----------------------------------------------------------------------------------------


def test_a_first_write_creates_everything(tmp_path: Path) -> None:
    changes = write(OLD, tmp_path / "not" / "there")
    assert set(actions(changes).values()) == {"create"}
    assert on_disk(tmp_path / "not" / "there") == OLD


def test_create_update_identical_remove(out: Path) -> None:
    assert actions(write(NEW, out)) == {
        "a/compose.yaml": "update",
        "a/fresh/file": "create",
        "a/part/changed": "update",
        "a/part/same": "identical",
        "a/stale/deep/file": "remove",
        "b/compose.yaml": "remove",
        "b/start.sh": "remove",
        "c/compose.yaml": "create",
    }
    assert on_disk(out) == NEW
    assert sorted(path.name for path in out.iterdir()) == ["a", "c"]
    assert not (out / "a" / "stale").exists()


def test_a_second_write_finds_nothing_to_do_and_touches_nothing(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert set(actions(write(OLD, out)).values()) == {"identical"}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_comparing_says_what_writing_does_and_writes_nothing(out: Path) -> None:
    planned = actions(compare(NEW, out))
    assert on_disk(out) == OLD
    assert actions(write(NEW, out)) == planned


def test_scripts_are_executable_and_nothing_else(out: Path) -> None:
    assert (out / "b" / "start.sh").stat().st_mode & 0o777 == 0o755
    assert (out / "a" / "compose.yaml").stat().st_mode & 0o777 == 0o644


def test_the_manifest_has_the_hash_of_every_file(out: Path) -> None:
    manifest = json.loads((out / "a" / MANIFEST).read_text())
    assert manifest == {path[2:]: digest(data) for path, data in OLD.items() if path.startswith("a/")}


def test_a_host_is_changed_alone(out: Path) -> None:
    write(NEW, out, {"a"})
    assert {path: data for path, data in on_disk(out).items() if path.startswith("a/")} == {
        path: data for path, data in NEW.items() if path.startswith("a/")
    }
    assert (out / "b" / "compose.yaml").read_bytes() == OLD["b/compose.yaml"]
    assert not (out / "c").exists()


def test_files_of_others_are_never_removed(out: Path) -> None:
    (out / "a" / "stale" / "notes.txt").write_text("mine")
    (out / "b" / ".env").write_text("X=1")
    (out / "elsewhere").mkdir()
    (out / "elsewhere" / "file").write_text("mine too")
    write(NEW, out)
    kept = {"a/stale/notes.txt": b"mine", "b/.env": b"X=1", "elsewhere/file": b"mine too"}
    assert on_disk(out) == NEW | kept


# --- edited by hand ---------------------------------------------------------------------------------------------------


def test_an_edited_file_is_reported_and_kept(out: Path) -> None:
    (out / "a" / "part" / "changed").write_text("by hand\n")
    for _ in range(2):  # it stays known as edited
        assert actions(write(NEW, out))["a/part/changed"] == "edited"
        assert on_disk(out) == NEW | {"a/part/changed": b"by hand\n"}


def test_an_edited_file_is_overwritten_when_forced(out: Path) -> None:
    (out / "a" / "part" / "changed").write_text("by hand\n")
    assert actions(write(NEW, out, force=True))["a/part/changed"] == "edited"
    assert on_disk(out) == NEW
    assert actions(write(NEW, out))["a/part/changed"] == "identical"


def test_an_edited_stale_file_is_kept_unless_forced(out: Path) -> None:
    (out / "a" / "stale" / "deep" / "file").write_text("by hand\n")
    assert actions(write(NEW, out))["a/stale/deep/file"] == "edited"
    assert on_disk(out) == NEW | {"a/stale/deep/file": b"by hand\n"}
    write(NEW, out, force=True)
    assert on_disk(out) == NEW


def test_an_edit_that_equals_the_new_text_is_no_conflict(out: Path) -> None:
    (out / "a" / "part" / "changed").write_bytes(NEW["a/part/changed"])
    assert actions(write(NEW, out))["a/part/changed"] == "identical"
    assert actions(write(OLD, out))["a/part/changed"] == "update"


def test_a_deleted_file_comes_back(out: Path) -> None:
    (out / "a" / "part" / "same").unlink()
    assert actions(write(OLD, out))["a/part/same"] == "create"
    assert on_disk(out) == OLD


def test_a_foreign_file_where_one_is_rendered_is_kept_and_forgotten_with_its_place(out: Path) -> None:
    (out / "a" / "fresh").mkdir()
    (out / "a" / "fresh" / "file").write_text("somebody's\n")
    assert actions(write(NEW, out))["a/fresh/file"] == "edited"
    assert (out / "a" / "fresh" / "file").read_text() == "somebody's\n"
    assert "a/fresh/file" not in actions(write(OLD, out))
    assert (out / "a" / "fresh" / "file").read_text() == "somebody's\n"


# --- what stands in the way -------------------------------------------------------------------------------------------


def test_a_folder_where_a_file_is_rendered(out: Path) -> None:
    (out / "a" / "fresh" / "file").mkdir(parents=True)
    with pytest.raises(CorralError, match="a folder stands where a file is rendered"):
        write(NEW, out)
    assert on_disk(out) == OLD


def test_a_file_where_a_folder_is_rendered(out: Path) -> None:
    (out / "a" / "fresh").write_text("in the way")
    with pytest.raises(CorralError, match=r"a/fresh: cannot be written"):
        write(NEW, out)
    assert on_disk(out) == OLD | {"a/fresh": b"in the way"}


def test_a_pipe_where_a_file_is_rendered(out: Path) -> None:
    (out / "c").mkdir()
    os.mkfifo(out / "c" / "compose.yaml")
    with pytest.raises(CorralError, match="something that is not a file"):
        write(NEW, out)


def test_links_to_folders_are_not_followed(out: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (out / "a" / "fresh").symlink_to(outside)
    with pytest.raises(CorralError, match="a symbolic link stands where a folder is rendered"):
        write(NEW, out)
    assert list(outside.iterdir()) == []
    assert on_disk(out) == OLD


def test_a_host_folder_that_is_a_link_is_not_followed(out: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (out / "b").rename(outside)
    (out / "b").symlink_to(outside)
    with pytest.raises(CorralError, match="symbolic link"):
        write(NEW, out)
    assert (outside / "compose.yaml").read_bytes() == OLD["b/compose.yaml"]


def test_links_to_files_are_kept_and_their_targets_never_written(out: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.yaml"
    outside.write_bytes(OLD["a/compose.yaml"])
    (out / "a" / "compose.yaml").unlink()
    (out / "a" / "compose.yaml").symlink_to(outside)
    assert actions(write(NEW, out))["a/compose.yaml"] == "edited"
    assert (out / "a" / "compose.yaml").is_symlink()
    write(NEW, out, force=True)
    assert not (out / "a" / "compose.yaml").is_symlink()
    assert outside.read_bytes() == OLD["a/compose.yaml"]


def test_the_output_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(OLD, tmp_path / "link")
    assert on_disk(tmp_path / "real") == OLD


# --- damaged records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"x": 1}', '{"../../b/compose.yaml": "00"}', '{"/etc/passwd": "00"}', '{"": "00"}', "\xff"]
)
def test_a_damaged_manifest_is_named_with_its_remedy(out: Path, text: str) -> None:
    (out / "a" / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CorralError, match=r"a/\.manifest\.json: damaged; .*--force"):
        write(NEW, out)
    assert on_disk(out) == OLD
    (out / "a" / MANIFEST).unlink()
    write(NEW, out, force=True)
    assert {**on_disk(out), **NEW} == on_disk(out)


@pytest.mark.parametrize("value", ["", " ", "00 "])
def test_a_record_without_a_hash_makes_a_file_an_edited_one(out: Path, value: str) -> None:
    (out / "a" / MANIFEST).write_text(json.dumps({"compose.yaml": value}))
    for _ in range(2):
        assert actions(write({"a/compose.yaml": b"new\n"}, out, {"a"}))["a/compose.yaml"] == "edited"


# --- killed at any step -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that is gone: nothing may catch it and go on."""


class Fuse:
    """Ends the process (or fails) at the n-th call of what changes the disk."""

    CALLS = ("replace", "unlink", "fsync", "mkdir", "rmdir", "open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, failure: Callable[[], None]) -> None:
        self.step = step
        self.count = 0
        self.failure = failure
        self.lock = threading.Lock()
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fused(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.count += 1
                is_now = self.count == self.step
            if is_now:
                self.failure()
            return call(*arguments, **options)

        return fused


def exit_at(step: int, out: Path) -> int:
    """Writes NEW in a child that is gone at the given step; the exit code, 77 when the step was reached."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as monkeypatch:
            Fuse(monkeypatch, step, lambda: os._exit(77))
            write(NEW, out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def states_after_kills(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A folder for every step at which a run can be gone, with what it left."""
    for step in range(1, 500):
        out = tmp_path / str(step)
        write(OLD, out)
        if exit_at(step, out) == 0:
            return
        yield step, out
    pytest.fail("a write of a few files takes more than 500 steps")


@pytest.mark.slow
def test_after_a_kill_at_any_step_the_next_run_finishes(tmp_path: Path) -> None:
    """Until then, who reads the tree is told that it is half written."""
    steps = halves = 0
    for step, out in states_after_kills(tmp_path):
        steps = step
        if {path: data for path, data in on_disk(out).items() if not path.endswith(".new")} not in (OLD, NEW):
            halves += 1
            with pytest.raises(CorralError, match=r"was interrupted while it wrote here; run .* render first"):
                refuse_unfinished(out)
        write(NEW, out)
        refuse_unfinished(out)
        assert on_disk(out) == NEW, f"killed at step {step}"
        left = {path.name for path in out.iterdir() if any(path.iterdir())}
        assert left == {"a", "c"}, f"killed at step {step}"
    assert steps > 20
    assert halves > 3


@pytest.mark.slow
def test_after_a_kill_at_any_step_another_inventory_can_be_rendered(tmp_path: Path) -> None:
    """What the killed run wrote, and what it left, does not pass for edited by hand; an edit still does."""
    other = {**OLD, "a/compose.yaml": b"newer\n", "a/part/changed": b"three\n"}
    for step, out in states_after_kills(tmp_path):
        assert "edited" not in actions(compare(other, out)).values(), f"killed at step {step}"
        (out / "a" / "part" / "changed").write_text("by hand\n")
        assert actions(write(other, out))["a/part/changed"] == "edited", f"killed at step {step}"
        assert on_disk(out) == other | {"a/part/changed": b"by hand\n"}, f"killed at step {step}"
        refuse_unfinished(out)


def test_a_failure_of_the_disk_at_any_step_leaves_a_tree_that_can_be_finished(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, os.strerror(28), "the disk")

    for step in range(1, 500):
        out = tmp_path / str(step)
        write(OLD, out)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fuse = Fuse(monkeypatch, step, fail)
            message = ""
            try:
                write(NEW, out)
            except CorralError as error:
                message = str(error)
        if fuse.count < step:
            assert step > 20
            return
        assert not message or "run the same command again" in message, f"failed at step {step}: {message}"
        write(NEW, out)
        assert on_disk(out) == NEW, f"failed at step {step}"
    pytest.fail("a write of a few files takes more than 500 steps")


WRITER = """
import sys
from pathlib import Path
from corral.render.output import write
out, number = Path(sys.argv[1]), int(sys.argv[2])
tree = {f"host-{index % 5}/file-{index}": f"{number} ".encode() * 200 for index in range(60)}
tree |= {f"host-{number % 2}/only-{number}": b"x"}
print("ready", flush=True)
write(tree, out)
print("done", flush=True)
"""


@pytest.mark.slow
def test_real_kills_at_random_moments(tmp_path: Path) -> None:
    """Thirty runs are shot with SIGKILL at random moments of their writing; the last one makes the tree whole."""
    dice = random.Random(4711)  # noqa: S311 - the same moments in every run, as far as a machine can
    out = tmp_path / "out"
    span = timed_writer(out, 0)
    killed = 0
    for number in range(1, 31):
        process = start_writer(out, number)
        time.sleep(dice.uniform(0, span))
        process.kill()
        killed += process.wait(KILL_DEADLINE_S) == -signal.SIGKILL
        if process.stdout:
            process.stdout.close()
        assert "edited" not in actions(compare({}, out)).values(), f"after run {number}"
    assert killed >= 5, "the dice are loaded: too few runs were killed"
    timed_writer(out, 31)
    refuse_unfinished(out)
    assert {data[:3].split()[0] for path, data in on_disk(out).items() if "only" not in path} == {b"31"}


def start_writer(out: Path, number: int) -> subprocess.Popen[str]:
    """A process that is about to write its tree."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out), str(number)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def timed_writer(out: Path, number: int) -> float:
    """Seconds that a whole write takes."""
    with start_writer(out, number) as process:
        begun = time.perf_counter()
        assert process.wait(KILL_DEADLINE_S) == 0
    return time.perf_counter() - begun


# --- others, and a disk that says no ----------------------------------------------------------------------------------


def test_two_writers_at_once(out: Path) -> None:
    with locked(out), pytest.raises(CorralError, match="another corral is writing here; wait for it to end"):
        write(NEW, out)
    assert on_disk(out) == OLD
    write(NEW, out)
    assert on_disk(out) == NEW


@pytest.mark.slow
def test_of_many_writers_each_writes_its_tree_or_says_that_another_is_at_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    timed_writer(out, 0)
    writers = [start_writer(out, number) for number in range(2, 8)]
    codes = []
    for process in writers:
        said, _ = process.communicate(timeout=KILL_DEADLINE_S)
        codes.append((process.returncode, said))
    assert (0, "done\n") in codes
    contents = {data[:3].split()[0] for path, data in on_disk(out).items() if "only" not in path}
    assert len(contents) == 1


def test_a_full_disk(small_disk: Path) -> None:
    out = small_disk / "out"
    write(OLD, out)
    big = {**NEW, "a/big": b"x" * 200_000}
    with pytest.raises(CorralError, match=r"No space left on device; then run the same command again"):
        write(big, out)
    assert "edited" not in actions(compare(NEW, out)).values()
    write(NEW, out)
    assert on_disk(out) == NEW


def test_too_many_files_for_the_disk(small_disk: Path) -> None:
    out = small_disk / "out"
    write(OLD, out)
    with pytest.raises(CorralError, match=r"No space left on device; then run the same command again"):
        write(NEW | {f"many/{number}/file": b"x" for number in range(100)}, out)
    write(NEW, out)
    assert on_disk(out) == NEW


def test_a_read_only_file_system(small_disk: Path) -> None:
    out = small_disk / "out"
    write(OLD, out)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CorralError, match=r"cannot be written: Read-only file system; then run"):
        write(NEW, out)
    assert actions(compare(OLD, out)) == dict.fromkeys(OLD, "identical")
    with pytest.raises(CorralError, match="Read-only file system"):
        write(OLD, small_disk / "other")


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorralError, match="file: cannot be written"):
        write(OLD, tmp_path / "file")


def test_an_atomic_write_that_fails_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def fail() -> None:
        raise OSError("full")

    with monkeypatch.context() as patch:
        Fuse(patch, 2, fail)  # open, then fsync
        with pytest.raises(OSError, match="full"):
            write_atomically(path, b"new", 0o600)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
