"""`tools/make_env.py` with stand-ins for Python, pip and uv: its messages, repair after Ctrl-C, fallback to pip."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.txt", "requirements-dev.txt", "requirements-uv.txt")

# Stands in for the Python that an environment is built on, and for the one inside it: makes no real environment, notes
# what it is asked to do, and fails where FAILING names the step.
FAKE_PYTHON = r"""#!/bin/sh
case "$*" in
"-c import sys;"*) echo "${FAKE_VERSION:-3.12.4}"; exit ;;
"-c import ensurepip") [ "$FAILING" != ensurepip ]; exit ;;
esac
echo "$*" >> "$NOTES"
case "$*" in
"-m venv "*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    [ "$FAILING" != venv ] || { echo "no room on the disk"; exit 1; } ;;
"-m pip config list") echo "global.index-url='http://192.0.2.7/simple'" ;;
"-m pip --python"*) exit 1 ;;
"-m pip install"*requirements-uv.txt)
    [ -z "$SLEEPING" ] || { echo ready > "$NOTES.sleeping"; exec sleep 60; }
    [ "$FAILING" != network ] || { echo "WARNING: Retrying"; echo "ERROR: no route to the index"; exit 1; }
    printf '#!/bin/sh\necho "uv $*, index $UV_DEFAULT_INDEX" >> "$NOTES"\n[ "$FAILING" != uv ]\n' > "${0%python}uv"
    chmod 755 "${0%python}uv" ;;
"-m pip install"*) [ "$FAILING" != network ] || { echo "ERROR: no route to the index"; exit 1; } ;;
esac
"""


class Checkout:
    """A made-up checkout with the real program, and a PATH with nothing but a stand-in Python and a few tools."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.programs = folder / "programs"
        self.notes = folder / "notes"
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "make_env.py", self.root / "tools")
        for name in LOCKS:
            (self.root / name).write_text("alpha==1.0 \\\n    --hash=sha256:00\n", encoding="utf-8")
        self.programs.mkdir()
        for tool in ("sh", "mkdir", "cp", "chmod", "sleep"):
            (self.programs / tool).symlink_to(str(shutil.which(tool)))
        self.add_python("python3")

    def add_python(self, name: str) -> None:
        (self.programs / name).write_text(FAKE_PYTHON, encoding="utf-8")
        (self.programs / name).chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": str(self.programs), "NOTES": str(self.notes), "LC_ALL": "C.UTF-8", **variables}
        return subprocess.Popen(
            [sys.executable, str(self.root / "tools" / "make_env.py")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def make(self, **variables: str) -> tuple[int, str]:
        """Exit code and talk of one run; what it did is in `done`."""
        self.notes.write_text("", encoding="utf-8")
        with self.start(**variables) as process:
            silence, talk = process.communicate(timeout=60)
        assert silence == ""
        return process.returncode, talk

    def done(self) -> list[str]:
        return self.notes.read_text(encoding="utf-8").splitlines()

    def is_complete(self) -> bool:
        return (self.root / ".venv" / "corral-complete").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_installs_by_hash_with_uv_and_the_second_run_does_nothing(checkout: Checkout) -> None:
    code, talk = checkout.make()
    assert code == 0
    assert "making the environment with Python 3.12.4" in talk
    uv = checkout.done()[-1]
    assert uv.startswith("uv --no-config pip install")
    assert "--require-hashes --no-deps" in uv
    assert uv.endswith("index http://192.0.2.7/simple"), "pip's own index setting must hold for uv too"
    assert checkout.make() == (0, "")
    assert checkout.done() == []


def test_it_writes_the_corral_command(checkout: Checkout) -> None:
    checkout.make()
    command = checkout.root / ".venv" / "bin" / "corral"
    assert f'exec {checkout.root}/.venv/bin/python {checkout.root}/generate.py "$@"' in command.read_text()
    assert os.access(command, os.X_OK)


def test_a_changed_lock_makes_it_again_from_nothing(checkout: Checkout) -> None:
    checkout.make()
    leftover = checkout.root / ".venv" / "lib" / "old-package"
    leftover.mkdir(parents=True)
    (checkout.root / "requirements.txt").write_text("alpha==1.1 \\\n    --hash=sha256:01\n", encoding="utf-8")
    assert checkout.make()[0] == 0
    assert not leftover.exists()


def test_a_moved_checkout_is_made_again(checkout: Checkout) -> None:
    checkout.make()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert "environment ready" in checkout.make()[1]


def test_a_vanished_python_is_replaced(checkout: Checkout) -> None:
    checkout.make()
    (checkout.root / ".venv" / "bin" / "python").unlink()
    assert "environment ready" in checkout.make()[1]


def test_the_newest_tested_python_is_taken_and_one_that_does_not_run_is_passed_over(checkout: Checkout) -> None:
    checkout.add_python("python3.12")
    (checkout.programs / "python3.13").write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    (checkout.programs / "python3.13").chmod(0o755)
    assert f"({checkout.programs}/python3.12)" in checkout.make()[1]


def test_an_old_python_is_named_with_the_remedy(checkout: Checkout) -> None:
    code, talk = checkout.make(FAKE_VERSION="3.9.2")
    assert code == 1
    first, *remedies = talk.splitlines()
    assert first == f"corral: needs Python 3.11 or newer; found: {checkout.programs}/python3 is 3.9.2."
    assert "sudo apt install python3 python3-venv" in remedies[0]
    assert not (checkout.root / ".venv").exists()


def test_without_any_python_it_says_so(checkout: Checkout) -> None:
    (checkout.programs / "python3").unlink()
    assert "found: none on PATH." in checkout.make()[1]


def test_without_ensurepip_and_without_debian_it_names_the_package(checkout: Checkout) -> None:
    code, talk = checkout.make(FAILING="ensurepip")
    assert code == 1
    assert checkout.done()[0].startswith("-m venv --without-pip")
    assert talk.splitlines()[-1].endswith("sudo apt install python3-venv")
    assert not checkout.is_complete()


def test_a_failing_venv_shows_its_last_words(checkout: Checkout) -> None:
    code, talk = checkout.make(FAILING="venv")
    assert code == 1
    assert "  | no room on the disk" in talk


def test_where_uv_cannot_pip_installs_the_same_locks(checkout: Checkout) -> None:
    code, talk = checkout.make(FAILING="uv")
    assert code == 0
    assert "with uv … failed" in talk
    pip = checkout.done()[-1]
    assert pip.startswith("-m pip install")
    assert pip.endswith("requirements.txt -r " + str(checkout.root / "requirements-dev.txt"))
    assert "--require-hashes --no-deps" in pip


def test_without_a_network_it_shows_why_and_leaves_nothing_that_looks_finished(checkout: Checkout) -> None:
    code, talk = checkout.make(FAILING="network")
    assert code == 1
    assert "  | ERROR: no route to the index" in talk
    assert "Retrying" not in talk
    assert talk.endswith("Then run again: make env\n")
    assert not checkout.is_complete()


def test_an_interrupted_run_is_repaired_by_the_next(checkout: Checkout) -> None:
    process = checkout.start(SLEEPING="yes")
    deadline = time.monotonic() + 30
    while not checkout.notes.with_name("notes.sleeping").exists():
        assert time.monotonic() < deadline, "the installer never began"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130
    assert talk.endswith("interrupted; nothing to clean up, the next make env begins afresh\n")
    assert not checkout.is_complete()
    assert checkout.make()[0] == 0
    assert checkout.is_complete()


def test_somebody_elses_environment_is_left_alone(checkout: Checkout) -> None:
    precious = checkout.root / ".venv" / "precious"
    precious.mkdir(parents=True)
    code, talk = checkout.make()
    assert code == 1
    assert "was not made by this kit; move it away" in talk
    assert precious.exists()
