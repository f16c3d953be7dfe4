"""`generate.py` in a made-up checkout: which Python runs it, from where, and what it says without an environment."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLI = """
import sys

def main():
    print(sys.prefix, *sys.argv[1:], sep="\\n")
    return 3
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real entry point, a bare environment, and a command line that reports what it sees."""
    root = tmp_path / "a checkout"
    (root / "corral").mkdir(parents=True)
    shutil.copy(ROOT / "generate.py", root)
    (root / "corral" / "__init__.py").touch()
    (root / "corral" / "cli.py").write_text(CLI, encoding="utf-8")
    venv.create(root / ".venv", with_pip=False, symlinks=True)
    (root / ".venv" / "corral-complete").touch()
    return root


def start(program: Path, *arguments: str, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, str(program), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_another_python_hands_over_to_the_environment(checkout: Path, tmp_path: Path) -> None:
    done = start(checkout / "generate.py", "plan", "two words", "", cwd=tmp_path)
    assert done.stdout.splitlines() == [str(checkout / ".venv"), "plan", "two words", ""]
    assert (done.returncode, done.stderr) == (3, "")


def test_the_environments_own_python_goes_on_at_once(checkout: Path) -> None:
    done = start(Path("generate.py"), "check", cwd=checkout, python=str(checkout / ".venv" / "bin" / "python"))
    assert done.stdout.splitlines() == [str(checkout / ".venv"), "check"]


def test_a_link_from_elsewhere_finds_its_checkout(checkout: Path, tmp_path: Path) -> None:
    link = tmp_path / "corral"
    link.symlink_to(checkout / "generate.py")
    assert start(link, "check", cwd=tmp_path).stdout.splitlines() == [str(checkout / ".venv"), "check"]


@pytest.mark.parametrize("left", ["nothing", "unfinished"])
def test_without_a_finished_environment_it_names_the_remedy(checkout: Path, left: str) -> None:
    if left == "nothing":
        shutil.rmtree(checkout / ".venv")
    else:
        (checkout / ".venv" / "corral-complete").unlink()
    done = start(checkout / "generate.py", "plan", cwd=checkout)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "corral: no environment yet; run: make env\n"
    elsewhere = start(checkout / "generate.py", "plan", cwd=checkout.parent)
    assert elsewhere.stderr == f"corral: no environment yet; run: make -C {checkout} env\n"
