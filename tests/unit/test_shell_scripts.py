"""Every shell script of the repository, read by shellcheck."""

import subprocess
from pathlib import Path

import pytest

from tests.needs import program

ROOT = Path(__file__).resolve().parents[2]


def shell_scripts() -> list[Path]:
    """What git would commit that is a script for sh or bash, by its name or its first line."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    files = [ROOT / name for name in listing.stdout.decode().split("\0") if name and not name.endswith(".j2")]
    return sorted(path for path in files if path.is_file() and is_shell_script(path))


def is_shell_script(path: Path) -> bool:
    """Whether the name or the first line says sh or bash."""
    with path.open("rb") as file:
        first = file.readline(100).split()
    return path.suffix == ".sh" or (first[:1] != [] and first[0][:2] == b"#!" and first[-1].endswith((b"/sh", b"bash")))


@pytest.mark.slow
@pytest.mark.needs("shellcheck")
def test_shellcheck_finds_nothing() -> None:
    scripts = shell_scripts()
    assert ROOT / ".ci" / "run" in scripts
    done = subprocess.run([program("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
